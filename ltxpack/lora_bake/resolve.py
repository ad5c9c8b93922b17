"""Where a LoRA that a user names is: the overlay's own, a file, a PEFT folder, or REPO/FILE on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ltxpack.errors import OverlayError, SourceError, UsageError, quoted
from ltxpack.files.tensorfile import TensorFile, parse_header
from ltxpack.lora_bake import peft
from ltxpack.lora_bake.adapter import PEFT_CONFIG, PEFT_WEIGHTS, Adapter, fit_adapter, open_adapter
from ltxpack.lora_bake.names import lora_name
from ltxpack.ltx23.classes import DISTILLED
from ltxpack.manifest import Lora, Manifest
from ltxpack.materialize.hub.client import Hub, RepoInfo, parse_reference
from ltxpack.reporter import Reporter


@dataclass(frozen=True)
class Found:
    """A LoRA's place. ``path``: file or PEFT folder, None while only its header is here. ``own``: the overlay's.

    ``added``: by ``--add``, to be stacked below another.
    """

    name: str
    path: Path | None
    header: TensorFile | None = None
    own: Lora | None = None
    added: bool = False

    def adapter(self, shapes: dict[str, tuple[int, ...]], allow_unmatched: bool) -> Adapter:
        """The adapter fitted to a transformer; by its header alone if that is all there is. Raises AdapterError."""
        if self.path is not None:
            return open_adapter(self.path, shapes, name=self.name, allow_unmatched=allow_unmatched)
        assert self.header is not None
        stated = peft.from_metadata(self.header.metadata, self.header.path)
        return fit_adapter(self.header, shapes, stated, None, allow_unmatched)


def own_lora(overlay: Path, manifest: Manifest) -> Found:
    """The overlay's distilled LoRA. Raises OverlayError if it holds none."""
    lora = manifest.lora(DISTILLED) or (manifest.loras[0] if len(manifest.loras) == 1 else None)
    if lora is None:
        raise OverlayError(
            "holds no distilled LoRA",
            file=overlay,
            items=[lora.name for lora in manifest.loras],
            next=f"ltxpack bake-lora {quoted(overlay)} --lora FILE --strength 1.0",
        )
    path = overlay / lora.file.path
    if not path.is_file() or path.stat().st_size != lora.file.size:
        raise OverlayError(
            "is missing or has changed since the overlay was written",
            file=path,
            next=f"ltxpack verify {quoted(overlay)}",
        )
    return Found(DISTILLED, path, own=lora)


def find_lora(text: str, reporter: Reporter, *, headers_only: bool = False) -> Found:
    """The LoRA that ``text`` names; what exists as typed wins over the hub. Raises SourceError or UsageError."""
    path = Path(text)
    if os.path.exists(path):  # noqa: PTH110 (a Path raises for a name that is too long)
        return Found(lora_name(path.name if path.is_dir() else path.stem), path)
    try:
        repo, revision, member = parse_reference(text)
    except UsageError:
        raise _missing(text) from None
    if path.is_absolute() or text.startswith(".") or (member is None and text.endswith(".safetensors")):
        raise _missing(text)
    hub = Hub(reporter=reporter)
    info = hub.info(repo, revision)
    member = _member(info, member, text)
    name = lora_name(_stem(PurePosixPath(member), repo))
    config = str(PurePosixPath(member).with_name(PEFT_CONFIG))
    is_peft = PurePosixPath(member).name == PEFT_WEIGHTS and config in info.files
    if headers_only and not is_peft:
        head = hub.header(info, member)
        return Found(name, None, parse_header(head, info.files[member].size, f"{repo}/{member}"))
    if is_peft:
        hub.fetch(info, config)
    return Found(name, hub.fetch(info, member))


def _member(info: RepoInfo, member: str | None, text: str) -> str:
    """Which file of the repo is meant: the one named, the PEFT adapter in the folder named, or the only one."""
    names = sorted(name for name in info.files if name.endswith(".safetensors"))
    if member is not None and member in info.files:
        if member not in names:
            raise SourceError("is not a .safetensors file", file=text)
        return member
    inside = f"{member}/{PEFT_WEIGHTS}" if member else PEFT_WEIGHTS
    if inside in info.files:
        return inside
    if member is None and len(names) == 1:
        return names[0]
    problem = f"is not in {info.repo}" if member else "names a repo with several or no LoRA files"
    raise SourceError(problem, file=member or text, items=names, next=f"name one: {info.repo}/FILE")


def _stem(member: PurePosixPath, repo: str) -> str:
    """A PEFT file is always called the same; the folder or repo it lies in names it."""
    if member.name == PEFT_WEIGHTS:
        return member.parent.name or repo.rpartition("/")[2]
    return member.stem


def _missing(text: str) -> SourceError:
    return SourceError("no such LoRA", file=text, expected="a file, a PEFT folder, or REPO/FILE on the hub")
