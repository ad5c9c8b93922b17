"""Weights from a component folder into a module built on the meta device, checked before a byte moves.

Knows no component: names and shapes come from the module, bytes from the folder (one safetensors file, or
shards listed in an index). Anything missing, left over, misshapen or of another kind stops the load by name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ltxpack.errors import FormatError, LtxpackError, OverlayError, SourceError, UnsupportedError, quoted
from ltxpack.files.foreign import is_foreign
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import DTYPE_NAMES, FLOATS, TensorInfo, read_index, read_json, read_tensorfile
from ltxpack.ltx23.codes import never_cast
from ltxpack.runtime.weights.copies import Copies
from ltxpack.runtime.weights.reading import FileReader, TensorRead

M = TypeVar("M", bound=nn.Module)

INDEX_SUFFIX = ".safetensors.index.json"
STORED: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Stored(TensorInfo):
    """A tensor as the header of ``file`` states it. ``never_cast``: it is loaded in its stored dtype."""

    file: Path
    never_cast: bool = False

    def __str__(self) -> str:
        return _described(self.dtype, self.shape)

    @property
    def source(self) -> Range:
        """Its bytes."""
        return Range(self.file, self.start, self.nbytes)

    def read_into(self, final: Tensor, on_host: bool = False, then: Callable[[], object] | None = None) -> TensorRead:
        """The read that brings it to ``final``, see :class:`.reading.TensorRead`; for dtypes that are loaded."""
        return TensorRead(self.source, STORED[self.dtype], final, on_host, then)

    def arriving_as(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype it has when it is loaded: ``dtype`` if that is given and this is a float that may be cast."""
        return dtype if dtype is not None and self.dtype in FLOATS and not self.never_cast else STORED[self.dtype]


Reader = Callable[[Mapping[str, Stored], torch.device, torch.dtype | None], Mapping[str, Tensor]]
"""Makes tensors of headers that were checked, floating ones in the dtype, wherever it puts them; by name.

:func:`read_tensors` reads them onto the device; residency has another. Raises OverlayError.
"""


def load_component(
    cls: type[M], folder: Path, device: torch.device, dtype: torch.dtype | None, reader: Reader | None = None
) -> M:
    """The module of ``folder``: built from its config.json on the meta device, then :func:`load_module`."""
    config = read_config(folder, cls.__name__)
    return load_module(build_on_meta(cls, config, folder), folder, device, dtype, reader=reader)


def load_module(
    module: M,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    reader: Reader | None = None,
    stored: Mapping[str, Stored] | None = None,
) -> M:
    """Fills ``module`` (built on the meta device) with the tensors of ``folder`` and returns it in eval mode.

    ``dtype`` casts floating tensors as they arrive on ``device``; None keeps the stored one. ``buffers`` gives
    the buffers that are in no file (non-persistent ones, lost on the meta device); they keep their own dtype.
    ``reader`` does the reading, :func:`read_tensors` if None. ``stored``: the headers, if they were read before.

    Raises OverlayError (a tensor missing, left over, misshapen; a file missing), FormatError (a damaged file)
    and UnsupportedError (a stored dtype that is no plain float), all before any tensor is read.
    """
    stored = read_headers(folder) if stored is None else stored
    check(module, stored, folder)
    buffers, kept = buffers or {}, module.state_dict(keep_vars=True)
    lost = {name: tuple(buffer.shape) for name, buffer in module.named_buffers() if name not in kept}
    if lost != {name: tuple(buffer.shape) for name, buffer in buffers.items()}:
        raise ValueError(f"{type(module).__name__} has the non-persistent buffers {lost}, given were {sorted(buffers)}")
    module.load_state_dict((reader or read_tensors)(stored, device, dtype), strict=True, assign=True)
    for name, tensor in buffers.items():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner).register_buffer(attribute, tensor.to(device), persistent=False)
    return module.requires_grad_(False).eval()


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """``config.json`` of a component, which must be of class ``class_name``; ``_``-fields are left out.

    Raises OverlayError, FormatError.
    """
    path = folder / "config.json"
    with verify_next(folder):
        config = read_json(path)
        if not isinstance(config, dict):
            raise FormatError("not a JSON object", file=path)
        found = config.get("_class_name")
        if found != class_name:
            raise OverlayError("another class of component", file=path, expected=class_name, found=found)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def build_on_meta(cls: type[M], config: Mapping[str, Any], folder: Path) -> M:
    """``cls(**config)`` without memory for its weights. Raises UnsupportedError naming fields the class has not."""
    unknown = sorted(set(config) - set(inspect.signature(cls.__init__).parameters))
    if unknown:
        with verify_next(folder):
            raise UnsupportedError(f"{cls.__name__} has no such fields", file=folder / "config.json", items=unknown)
    with torch.device("meta"):
        return cls(**config)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's weight files, by name; only headers are read.

    The files are those of the one ``*.safetensors.index.json``, else the one ``*.safetensors``. A shard may be
    a symlink. Each shard must hold exactly the tensors the index says it holds. Raises OverlayError, FormatError.
    """
    found: dict[str, Stored] = {}
    with verify_next(folder):
        weight_map, files = _weight_files(folder)
        for name in files:
            path = folder / name
            for tensor, info in read_tensorfile(path).tensors.items():
                if weight_map and weight_map.get(tensor) != name:
                    place = weight_map.get(tensor, "no such tensor")
                    problem = "the index does not place it here"
                    raise OverlayError(problem, file=path, tensor=tensor, expected=place, found=name)
                found[tensor] = Stored(tensor, info.dtype, info.shape, info.start, info.nbytes, path)
        absent = [f"{name} ({weight_map[name]})" for name in sorted(set(weight_map) - set(found))]
        if absent:
            raise OverlayError("tensors named in the index are in no shard", file=folder, items=absent)
    kept = never_cast({name: entry.dtype for name, entry in found.items()})
    return {name: replace(entry, never_cast=True) if name in kept else entry for name, entry in found.items()}


def check(module: nn.Module, stored: Mapping[str, Stored], folder: Path) -> None:
    """Holds names, shapes and kinds of ``stored`` against ``module``; see :func:`load_module`."""
    wanted = module.state_dict(keep_vars=True)
    missing = [f"missing: {name}" for name in sorted(set(wanted) - set(stored))]
    extra = [f"unknown: {name}" for name in sorted(set(stored) - set(wanted))]
    with verify_next(folder):
        if missing or extra:
            problem = f"{len(missing)} tensors missing, {len(extra)} not known to {type(module).__name__}"
            raise OverlayError(problem, file=folder, items=missing + extra)
        for name, tensor in wanted.items():
            entry, shape = stored[name], tuple(tensor.shape)
            same = {code for code, dtype in STORED.items() if dtype == tensor.dtype}
            accepted = set(FLOATS) if same & set(FLOATS) and not entry.never_cast else same
            expected = _described(entry.dtype if entry.dtype in accepted else "|".join(sorted(accepted)), shape)
            if entry.shape != shape:
                raise OverlayError("shape differs", file=entry.file, tensor=name, expected=expected, found=str(entry))
            if entry.dtype not in accepted:
                problem = "a dtype that is not loaded as it is"
                raise UnsupportedError(problem, file=entry.file, tensor=name, expected=expected, found=str(entry))


def read_tensors(stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """The tensors on ``device``, floating ones in ``dtype``; the default :class:`Reader`, which compares no hash."""
    found = {
        name: torch.empty(entry.shape, dtype=entry.arriving_as(dtype), device=device) for name, entry in stored.items()
    }
    copies = Copies(device)
    with contextlib.closing(FileReader(copies)) as reader:
        copies.before_computing(reader.fill(entry.read_into(found[name]) for name, entry in stored.items()))
    return found


@contextlib.contextmanager
def verify_next(folder: Path) -> Iterator[None]:
    """Errors of the block say to check the overlay of ``folder`` next; a file that cannot be had is an OverlayError."""
    try:
        yield
    except LtxpackError as error:
        kind = OverlayError if isinstance(error, SourceError) else type(error)
        raise kind(**{**vars(error), "next": verify_command(folder)}) from error


def verify_command(folder: Path) -> str:
    """The command that checks the overlay ``folder`` is in."""
    overlay = next((place for place in folder.parents if (place / "ltxpack.json").is_file()), folder.parent)
    return f"ltxpack verify {quoted(overlay)}"


def _weight_files(folder: Path) -> tuple[Mapping[str, str], list[str]]:
    """Tensor name -> file name of the folder's index, empty without one; and the names of the files."""
    names = sorted(path.name for path in folder.glob("*") if not is_foreign(path.name))
    indices, files = ([name for name in names if name.endswith(end)] for end in (INDEX_SUFFIX, ".safetensors"))
    if len(indices) > 1:
        raise OverlayError("several indices", file=folder, items=indices)
    if indices:
        weight_map = read_index(folder / indices[0])
        if not weight_map:
            raise FormatError("names no tensors", file=folder / indices[0])
        return weight_map, sorted(set(weight_map.values()))
    if len(files) != 1:
        problem, expected = "several weight files and no index", f"one .safetensors file, or an *{INDEX_SUFFIX}"
        raise OverlayError(problem if files else "no weights", file=folder, expected=expected, items=files)
    return {}, files


def _described(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype.lower()} {list(shape)}"
