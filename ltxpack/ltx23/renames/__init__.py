"""Key renames: one declarative table per component, matched on whole path components, reverse derived.

A table says which key roots of the checkpoint belong to the component and which paths inside them change
name. Everything else keeps its name; whether the result is what the module expects is not decided here but
checked against the module's own parameter names (spec 01, section 4).
"""

from __future__ import annotations

from ltxpack.ltx23.renames.table import RenameTable
from ltxpack.ltx23.renames.tables import AUDIO_VAE, CONNECTORS, DROPPED, LATENT_UPSAMPLER, TRANSFORMER, VAE, VOCODER

CHECKPOINT_TABLES = {
    "transformer": TRANSFORMER,
    "connectors": CONNECTORS,
    "vae": VAE,
    "audio_vae": AUDIO_VAE,
    "vocoder": VOCODER,
}

__all__ = [
    "AUDIO_VAE",
    "CHECKPOINT_TABLES",
    "CONNECTORS",
    "DROPPED",
    "LATENT_UPSAMPLER",
    "TRANSFORMER",
    "VAE",
    "VOCODER",
    "RenameTable",
    "component_of",
]


def component_of(key: str) -> str | None:
    """The component whose root ``key`` lies under (the longest root wins), or None for an unknown key."""
    owner, longest = None, -1
    for component, table in CHECKPOINT_TABLES.items():
        root = table.source_root(key)
        if root is not None and len(root) > longest:
            owner, longest = component, len(root)
    return owner
