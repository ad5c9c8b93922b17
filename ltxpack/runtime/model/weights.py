"""Loads the DiT from a transformer folder of an overlay, the base's or a bake's."""

from __future__ import annotations

from pathlib import Path

import torch

from ltxpack.ltx23.classes import LOADED_CLASSES
from ltxpack.ltx23.codes import coded_linears
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.quantised import put_quantised
from ltxpack.runtime.weights.load import Reader, load_module, read_config, read_headers


def load_dit(folder: Path, device: torch.device, dtype: torch.dtype, reader: Reader | None = None) -> DiT:
    """The model of ``folder`` on ``device``, its weights in ``dtype``; linears stored as codes stay codes.

    Raises as :func:`ltxpack.runtime.weights.load.load_module`; UnsupportedError for a config this DiT lacks.
    """
    config, stored = read_dit_config(folder), read_headers(folder)
    with torch.device("meta"):
        model = DiT(config)
    put_quantised(model, coded_linears({name: entry.dtype for name, entry in stored.items()}))
    return load_module(model, folder, device, dtype, reader=reader, stored=stored)


def read_dit_config(folder: Path) -> DiTConfig:
    """The config of the model in ``folder``. Raises OverlayError, FormatError, UnsupportedError."""
    return DiTConfig.from_dict(read_config(folder, LOADED_CLASSES["transformer"]))
