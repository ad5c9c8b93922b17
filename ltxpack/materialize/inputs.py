"""All inputs, read by their headers and small files and held against one another. No weight is read or fetched."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ltxpack.errors import UnsupportedError
from ltxpack.files.tensorfile import plain_file_name
from ltxpack.ltx23.releases import CHECKPOINT, LORA, TEXT_ENCODER, UPSAMPLER, Recognised, recognise
from ltxpack.materialize.access import Access, Located
from ltxpack.materialize.checkpoint import Checkpoint, Upsampler, read_checkpoint, read_upsampler
from ltxpack.materialize.lora_header import read_lora_header
from ltxpack.materialize.sources import Sources, TextEncoderFolder
from ltxpack.materialize.text_encoder import TextEncoder, check_fit, read_text_encoder


@dataclass(frozen=True)
class Inputs:
    """What the overlay is made from. An input that is None is in ``sources.missing``."""

    sources: Sources
    checkpoint: Checkpoint
    upsampler: Upsampler | None
    text_encoder: TextEncoder | None

    def files(self) -> list[tuple[str, Located]]:
        """Every input file with its role, in a fixed order."""
        sources = self.sources
        single = [(CHECKPOINT, sources.checkpoint), (LORA, sources.lora), (UPSAMPLER, sources.upsampler)]
        files = [(role, file) for role, file in single if file is not None]
        if self.text_encoder is not None:
            members = (*self.text_encoder.model, *self.text_encoder.tokenizer)
            files += [(TEXT_ENCODER, file) for file in sorted(members, key=lambda file: file.name)]
        return files

    def recognised(self) -> list[tuple[str, Located, Recognised]]:
        """Which of the files are known releases."""
        return [(role, file, recognise(file.name, file.size, file.sha256)) for role, file in self.files()]

    @property
    def distilled(self) -> bool:
        """Whether the base is a distilled one, by its name or its content."""
        file = self.sources.checkpoint
        release = recognise(file.name, file.size, file.sha256).release
        return release.distilled if release else "distilled" in file.name


def read_inputs(sources: Sources, access: Access) -> Inputs:
    """Read and check every input. Raises the first fault found, before anything large is fetched."""
    checkpoint = read_checkpoint(access.header(sources.checkpoint), sources.checkpoint.label)
    if sources.lora is not None:
        _check_lora(sources.lora, access)
    upsampler = None
    if sources.upsampler is not None:
        latent_channels = checkpoint.configs["vae"]["latent_channels"]
        upsampler = read_upsampler(access.header(sources.upsampler), latent_channels, sources.upsampler.label)
    encoder = None
    if sources.text_encoder is not None:
        encoder = read_text_encoder(sources.text_encoder, access)
        check_fit(encoder, checkpoint.configs["connectors"], sources.text_encoder)
    return Inputs(sources, checkpoint, upsampler, encoder)


def fetch_inputs(inputs: Inputs, access: Access) -> Inputs:
    """The same inputs with every file on this machine, read again from there."""
    sources = inputs.sources
    folder = None
    if sources.text_encoder is not None and inputs.text_encoder is not None:
        needed = {file.name: file for role, file in inputs.files() if role == TEXT_ENCODER}
        folder = TextEncoderFolder(
            sources.text_encoder.label, {name: access.fetch(file) for name, file in needed.items()}
        )
    local = dataclasses.replace(
        sources,
        checkpoint=access.fetch(sources.checkpoint),
        lora=None if sources.lora is None else access.fetch(sources.lora),
        upsampler=None if sources.upsampler is None else access.fetch(sources.upsampler),
        text_encoder=folder,
    )
    return read_inputs(local, access)


def _check_lora(lora: Located, access: Access) -> None:
    if not plain_file_name(lora.name) or not lora.name.endswith(".safetensors"):
        raise UnsupportedError("has a name that no overlay may hold", file=lora.label, expected="NAME.safetensors")
    header = read_lora_header(access.header(lora))
    if not header.is_lora:
        raise UnsupportedError(
            "is not a LoRA", file=lora.label, expected="pairs of lora_A and lora_B weights",
            found=f"{len(header.others)} other tensors", next="--lora FILE",
        )  # fmt: skip
