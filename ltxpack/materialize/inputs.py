"""All inputs, read by their headers and small files, and checked against one another. No weight is read or fetched."""

from __future__ import annotations

from dataclasses import dataclass

from ltxpack.errors import UnsupportedError
from ltxpack.files.tensorfile import plain_file_name
from ltxpack.ltx23.contents import described
from ltxpack.ltx23.releases import CHECKPOINT, LORA, TEXT_ENCODER, UPSAMPLER
from ltxpack.materialize.checkpoint import (
    Checkpoint,
    Upsampler,
    checkpoint_header,
    read_checkpoint,
    read_lora,
    read_upsampler,
)
from ltxpack.materialize.sources import AGAIN, Access, InputFaults, InputFile, Sources
from ltxpack.materialize.text_encoder import TextEncoder, read_text_encoder


@dataclass(frozen=True)
class Inputs:
    """What the overlay is made from. An input that is None is missing, or a LoRA that a distilled base needs not."""

    sources: Sources
    checkpoint: Checkpoint
    upsampler: Upsampler | None
    text_encoder: TextEncoder | None

    def files(self) -> list[tuple[str, InputFile]]:
        """Every input file with its role, in a fixed order."""
        sources = self.sources
        single = [(CHECKPOINT, sources.checkpoint), (LORA, sources.lora), (UPSAMPLER, sources.upsampler)]
        files = [(role, file) for role, file in single if file is not None]
        members = self.text_encoder.files if self.text_encoder else ()
        return [*files, *((TEXT_ENCODER, file) for file in sorted(members, key=lambda file: file.name))]


def read_inputs(sources: Sources, access: Access) -> Inputs:
    """Read and check every input, before anything large is fetched.

    Raises one LtxpackError that names the faults of all inputs.
    """
    faults = InputFaults("inputs cannot be used")
    file, lora, own, folder = sources.checkpoint, sources.lora, sources.upsampler, sources.text_encoder
    checkpoint = faults.gather(CHECKPOINT, lambda: _read_checkpoint(file, access))
    configs = checkpoint.configs if checkpoint else None
    channels = configs["vae"]["latent_channels"] if configs else None
    connectors = configs["connectors"] if configs else None
    upsampler = encoder = None
    if lora is not None:
        faults.gather(LORA, lambda: _check_lora(lora, access))
    if own is not None:
        upsampler = faults.gather(UPSAMPLER, lambda: read_upsampler(access.header(own), channels, own.label))
    if folder is not None:
        encoder = faults.gather(TEXT_ENCODER, lambda: read_text_encoder(folder, access, connectors))
    faults.refuse()
    assert checkpoint is not None
    return Inputs(sources, checkpoint, upsampler, encoder)


def _read_checkpoint(file: InputFile, access: Access) -> Checkpoint:
    return read_checkpoint(checkpoint_header(lambda: access.header(file), file.label), file.label)


def _check_lora(lora: InputFile, access: Access) -> None:
    if not plain_file_name(lora.name) or not lora.name.endswith(".safetensors"):
        raise UnsupportedError("has a name that no overlay may hold", file=lora.label, expected="NAME.safetensors")
    header = read_lora(access.header(lora))
    if not header.is_lora:
        raise UnsupportedError(
            "is not a LoRA", file=lora.label, expected="pairs of lora_A and lora_B weights",
            found=described(access.header(lora)) or f"{len(header.others)} other tensors", next=f"{AGAIN}--lora FILE",
        )  # fmt: skip
