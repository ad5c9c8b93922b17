"""The clean base transformer of an overlay: its shards by their headers, its small files whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from blake3 import blake3

from ltxpack.errors import OverlayError, quoted
from ltxpack.files.tensorfile import MAX_INDEX_BYTES, TensorFile, TensorInfo, read_tensorfile
from ltxpack.manifest import FileRecord, Manifest, changed_file
from ltxpack.repack.lock import WORK_FOLDER

TRANSFORMER = "transformer"
WEIGHT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class BaseShard:
    """One shard as the manifest lists it, and its header."""

    record: FileRecord
    file: TensorFile

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(self.record.path).name


@dataclass(frozen=True)
class BaseTransformer:
    """The transformer that every bake starts from. ``small`` holds config and index: file name -> bytes."""

    shards: tuple[BaseShard, ...]
    small: dict[str, bytes]
    tensors: dict[str, TensorInfo]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_base(overlay: Path, manifest: Manifest) -> BaseTransformer:
    """The base of ``overlay``; sizes and small files are checked here, shards while they are streamed.

    Raises OverlayError for anything that is not as the manifest says.
    """
    if TRANSFORMER not in manifest.components:
        raise OverlayError(
            "holds no transformer", file=overlay, next=f"ltxpack materialize SOURCE {quoted(overlay)} --force"
        )
    shards, small = [], {}
    tensors: dict[str, TensorInfo] = {}
    for record in manifest.components[TRANSFORMER].files:
        path = overlay / record.path
        if not path.is_file() or path.stat().st_size != record.size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
            raise changed_file(path, f"{record.size} bytes", found)
        if not record.path.endswith(".safetensors"):
            if record.size > MAX_INDEX_BYTES:
                raise changed_file(path, f"at most {MAX_INDEX_BYTES} bytes", f"{record.size} bytes")
            data = path.read_bytes()
            if blake3(data).hexdigest() != record.blake3:
                raise changed_file(path, f"blake3 {record.blake3}", f"blake3 {blake3(data).hexdigest()}")
            small[path.name] = data
            continue
        shard = BaseShard(record, read_tensorfile(path))
        twice = next((name for name in shard.file.tensors if name in tensors), None)
        if twice is not None:
            raise OverlayError(
                "stands in two shards", file=path, tensor=twice, next=f"ltxpack verify {quoted(overlay)}"
            )
        foreign = next((info for info in shard.file.tensors.values() if info.dtype not in WEIGHT_DTYPES), None)
        if foreign is not None:
            raise OverlayError(
                "has a dtype no LoRA is baked into", file=path, tensor=foreign.name,
                expected=" or ".join(WEIGHT_DTYPES), found=foreign.dtype,
            )  # fmt: skip
        tensors |= shard.file.tensors
        shards.append(shard)
    return BaseTransformer(tuple(shards), small, tensors)


def refuse_links(overlay: Path, folders: Iterable[Path]) -> None:
    """Raise OverlayError if one of ``folders``, or the work folder, is a link: what is written must stay inside."""
    for folder in (overlay / WORK_FOLDER, *folders):
        if folder.is_symlink():
            raise OverlayError("is a link where only a folder may be", file=folder, next=f"remove {folder}")
