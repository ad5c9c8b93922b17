"""Which tensor goes into which file: a pure function from pieces to work items. No file is touched.

Names and index follow diffusers (spec 01, section 5): one file without an index, or ``-0000i-of-0000n`` with one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ltxpack.errors import FormatError, UsageError
from ltxpack.files.tensorfile import DTYPE_BITS
from ltxpack.repack.work import Piece, WriteBytes, WriteShard

DEFAULT_STEM = "diffusion_pytorch_model"
DEFAULT_MAX_SHARD_SIZE = 5_000_000_000


def assign_shards(
    pieces: Sequence[Piece], max_shard_size: int, folder: str, stem: str = DEFAULT_STEM
) -> tuple[WriteShard | WriteBytes, ...]:
    """Shards of at most ``max_shard_size`` tensor bytes each, then the index if there are several.

    Pieces are taken in the given order; a piece larger than the limit has a shard to itself. ``folder`` is relative
    to the overlay ("" for its root). Raises UsageError for a limit below 1, FormatError if a name stands twice.
    """
    if max_shard_size < 1:
        raise UsageError("a shard must hold at least one byte", expected="1 or more", found=max_shard_size)
    _refuse_twice(pieces)
    groups = split_by_size(pieces, max_shard_size)
    names = shard_names(len(groups), stem)
    prefix = f"{folder}/" if folder else ""
    shards = tuple(WriteShard(prefix + name, aligned_order(group)) for name, group in zip(names, groups, strict=True))
    if len(shards) == 1:
        return shards
    return (*shards, WriteBytes(f"{prefix}{stem}.safetensors.index.json", index_json(shards)))


def split_by_size(pieces: Iterable[Piece], limit: int) -> list[list[Piece]]:
    """Consecutive runs of at most ``limit`` bytes (a larger piece is a run of its own); at least one run."""
    groups: list[list[Piece]] = [[]]
    used = 0
    for piece in pieces:
        if groups[-1] and used + piece.size > limit:
            groups.append([])
            used = 0
        groups[-1].append(piece)
        used += piece.size
    return groups


def shard_names(count: int, stem: str) -> list[str]:
    """The file names of ``count`` shards."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def aligned_order(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Wider dtypes first, else the given order: readers that map the file need offsets that fit the dtype."""
    return tuple(sorted(pieces, key=lambda piece: -DTYPE_BITS[piece.dtype]))


def index_json(shards: Sequence[WriteShard]) -> bytes:
    """``*.safetensors.index.json`` of the shards: total tensor bytes and the shard of each tensor, by name."""
    weight_map = {piece.name: shard.path.rpartition("/")[2] for shard in shards for piece in shard.pieces}
    total = sum(piece.size for shard in shards for piece in shard.pieces)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=True) + "\n").encode()


def _refuse_twice(pieces: Sequence[Piece]) -> None:
    seen: set[str] = set()
    for piece in pieces:
        if piece.name in seen:
            raise FormatError("stands twice in one folder", file=piece.source, tensor=piece.name)
        seen.add(piece.name)
