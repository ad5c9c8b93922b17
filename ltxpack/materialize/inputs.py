"""Reads the headers and small files of all inputs and checks them against one another. Reads and fetches no weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ltxpack.errors import UnsupportedError
from ltxpack.files.tensorfile import TensorFile, plain_file_name, tensor_reader
from ltxpack.ltx23.contents import described
from ltxpack.ltx23.lora_facts import Judged, judged_keys, listed_faults, ranks_of, read_facts
from ltxpack.ltx23.lora_statements import (
    PEFT_CONFIG,
    Configuration,
    configuration_among,
    configuration_beside,
    read_configuration,
)
from ltxpack.ltx23.releases import CHECKPOINT, LORA, TEXT_ENCODER, UPSAMPLER
from ltxpack.materialize.access import Access, InputFile, folder_of
from ltxpack.materialize.checkpoint import AGAIN, Checkpoint, Upsampler, read_lora, read_upsampler, says_distilled
from ltxpack.materialize.parts import read_parts
from ltxpack.materialize.sources import InputFaults, Sources
from ltxpack.materialize.text_encoder import RENAME, TextEncoder, read_text_encoder


@dataclass(frozen=True)
class Inputs:
    """The inputs of an overlay; None for a missing one, and for a LoRA that a distilled base does not need."""

    sources: Sources
    checkpoint: Checkpoint
    upsampler: Upsampler | None
    text_encoder: TextEncoder | None
    lora: Judged | None

    @property
    def distilled_by(self) -> str | None:
        """The evidence that the checkpoint is a distilled one; None for a full one."""
        base = self.sources.checkpoint[0].input
        return base.distilled_by or ("header" if says_distilled(self.checkpoint.file) else None)

    def files(self) -> list[tuple[str, InputFile]]:
        """Every input file with its role, in a fixed order."""
        sources = self.sources
        files = [(CHECKPOINT, part.input) for part in sources.checkpoint]
        files += [(role, file) for role, file in ((LORA, sources.lora), (UPSAMPLER, sources.upsampler)) if file]
        members = self.text_encoder.files if self.text_encoder else ()
        return [*files, *((TEXT_ENCODER, file) for file in sorted(members, key=lambda file: file.name))]


def read_inputs(sources: Sources, access: Access) -> Inputs:
    """Every input, checked before a large file is fetched. Raises one LtxpackError with the faults of all inputs.

    If the checkpoint is unusable, whatever the other inputs are, nobody should look for those that were not found: then
    its UnsupportedError is the only one.
    """
    faults = InputFaults({**sources.faults.found})
    not_found = faults.found.keys() - {CHECKPOINT}
    checkpoint = faults.gather(CHECKPOINT, read_parts, sources.checkpoint)
    configs = checkpoint.configs if checkpoint else None
    channels = configs["vae"]["latent_channels"] if configs else None
    connectors = configs["connectors"] if configs else None
    lora = faults.gather(LORA, lambda file: _check_lora(file, access), sources.lora)
    upsampler = faults.gather(
        UPSAMPLER, lambda file: read_upsampler(access.header(file), channels, file.label), sources.upsampler
    )
    encoder = faults.gather(
        TEXT_ENCODER, lambda folder: read_text_encoder(folder, access, connectors), sources.text_encoder
    )
    fault = faults.found.get(CHECKPOINT)
    if not_found and isinstance(fault, UnsupportedError):
        raise fault
    faults.refuse()
    assert checkpoint is not None
    return Inputs(sources, checkpoint, upsampler, encoder, lora)


def _check_lora(lora: InputFile, access: Access) -> Judged:
    if not plain_file_name(lora.name) or not lora.name.endswith(".safetensors"):
        problem, expected = "has a name that no overlay may hold", "a printable NAME.safetensors"
        raise UnsupportedError(problem, file=lora.label, expected=expected, found=lora.name, next=RENAME)
    header = read_lora(access.header(lora))
    if not header.is_lora:
        raise UnsupportedError(
            "is not a LoRA", file=lora.label, expected="pairs of lora_A and lora_B weights",
            found=described(access.header(lora)) or f"{len(header.others)} other tensors", next=f"{AGAIN}--lora FILE",
        )  # fmt: skip
    return _judged(lora, access.header(lora), access)


def _judged(lora: InputFile, file: TensorFile, access: Access) -> Judged:
    """The statements of the LoRA, as a bake will read them. Raises AdapterError or UnsupportedError."""
    with contextlib.ExitStack() as stack:
        read = None if lora.repo else stack.enter_context(tensor_reader(lora.path))
        facts = read_facts(file, None, read)
        beside = read_facts(file, _configuration(lora, access), read)
    keys = judged_keys(file.tensors)
    judged = facts.judge(keys, file.tensors)
    ranks = ranks_of(keys, file.tensors).items()
    problem, found, items = None, facts.foreign, listed_faults(judged.faults)
    if found:
        problem = "says that it was made for another model"
    elif items:
        problem = "contradicts itself"
    elif any(facts.scale(key, rank)[1] != beside.scale(key, rank)[1] for key, rank in ranks):
        problem, found = f"is scaled by the {PEFT_CONFIG} beside it, which an overlay does not keep", beside.alpha
    if problem:
        again = f"{AGAIN}--lora FILE (another one; this one can be baked by the --add or --lora of bake-lora)"
        raise UnsupportedError(problem, file=lora.label, found=found, items=items, next=again)
    return judged


def _configuration(lora: InputFile, access: Access) -> Configuration | None:
    """The PEFT configuration that belongs to ``lora``."""
    if lora.repo is None:
        return read_configuration(configuration_beside(Path(lora.member)))
    files = folder_of(lora, access).files
    config = files.get(configuration_among(files, lora.member))
    return None if config is None else Configuration(access.json(config), Path(config.label))
