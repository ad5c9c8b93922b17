"""Describes the contents of a safetensors file in words, by its header, for every refusal and for ``inspect``.

files/foreign.py recognises files of other formats, forms.py recognises codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ltxpack.files.tensorfile import TensorFile, TensorInfo
from ltxpack.ltx23.forms import ALL, PARTS_TOLD, TOLD, official, read_linears, root_and_parts
from ltxpack.ltx23.lora_keys import unread_method
from ltxpack.ltx23.renames import CHECKPOINT_TABLES, TRANSFORMER, component_of
from ltxpack.ltx23.text_encoder import root_of

# The start of an activations file's `format`.
ACTIVATIONS = "ltxpack-activations-"
UPSAMPLER_MARK = "post_upsample_res_blocks.0.conv1.weight"
_ADAPTER = re.compile(r"(?:^|[._])(?:lora|lokr|hada|oft|boft)_")
# Component -> words for a file that holds it alone.
COMPONENTS_TOLD = {
    "transformer": "the transformer", "connectors": "text connectors", "vae": "the video VAE",
    "audio_vae": "the audio VAE", "vocoder": "the vocoder",
}  # fmt: skip
PROJECTION, BARE_PROJECTIONS = "text_embedding_projection.", ("video_aggregate_embed.", "audio_aggregate_embed.")
_CONNECTORS = tuple(f"{stream}_embeddings_connector." for stream in ("video", "audio"))
_BARE_VOCODER = ("bwe_generator.", "mel_stft.")


def official_names(tensors: Mapping[str, TensorInfo], root: str | None) -> dict[str, str]:
    """Name in the checkpoint -> name in the file, for the tensors of parts of a checkpoint.

    ``root``: the prefix of the transformer's names. A part that was split off may lack its root; it is recognised by
    its convolutions, over three axes in the video VAE and two in the audio VAE, or by the vocoder's two generators.
    """
    bare_codec = any(name.startswith("per_channel_statistics.") for name in tensors)
    axes = {len(info.shape) for name, info in tensors.items() if name.startswith(("encoder.", "decoder."))}
    codec = "vae." if 5 in axes else "audio_vae."
    bare_vocoder = any(name.startswith(_BARE_VOCODER) for name in tensors)

    def named(name: str) -> str:
        if bare_codec and name.startswith(("encoder.", "decoder.", "per_channel_statistics.")):
            return codec + name
        if bare_vocoder and name.startswith(("vocoder.", *_BARE_VOCODER)):
            return f"vocoder.{name}"
        bare = name.removeprefix("model.").removeprefix("diffusion_model.")
        if bare.startswith(_CONNECTORS):
            return next(iter(TRANSFORMER.roots)) + bare
        return PROJECTION + name if name.startswith(BARE_PROJECTIONS) else official(name, root)

    return {named(name): name for name in tensors}


def components_of(file: TensorFile) -> tuple[str, ...]:
    """The components of a checkpoint of which ``file`` holds tensors, in the order of the tables."""
    root, _ = root_and_parts(file)
    found = {component_of(name) for name in official_names(file.tensors, root)}
    return tuple(name for name in CHECKPOINT_TABLES if name in found)


def described(file: TensorFile) -> str | None:
    """Words such as "the transformer alone, in scaled fp8" or "a LoRA"; None for an unknown file."""
    if file.metadata.get("format", "").startswith(ACTIVATIONS):
        return "an activations file"
    if sum(bool(_ADAPTER.search(name)) for name in file.tensors) > len(file.tensors) / 2:
        return "a LoRA"
    unread = [method for name in file.tensors if (method := unread_method(name))]
    if len(unread) > len(file.tensors) / 2:
        return f"an adapter of {unread[0]}, which is not read"
    what = _model(file) if file.tensors else "a file without tensors"
    return f"{what}, in {TOLD[read_linears(file).form]}" if what and file.tensors else what


def _model(file: TensorFile) -> str | None:
    held = components_of(file)
    if root_and_parts(file)[1] == ALL:
        return PARTS_TOLD[ALL]
    if held:
        told = [COMPONENTS_TOLD[name] for name in held if name != "connectors" or len(held) == 1]
        return " and ".join([*filter(None, [", ".join(told[:-1])]), told[-1]]) + " alone"
    if UPSAMPLER_MARK in file.tensors:
        return "a latent upsampler"
    if root_of(file.tensors) is not None:
        return "a language model, perhaps the text encoder"
    diffusers = any(part in TRANSFORMER.paths.values() for name in file.tensors for part in name.split("."))
    return "a part of a folder in diffusers' layout" if diffusers else None
