"""Weights from a component folder into a module built on the meta device, checked before a byte moves.

Knows no component: names and shapes come from the module, bytes from the folder (one safetensors file, or
shards listed in an index). Anything missing, left over, misshapen or of another kind stops the load by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ltxpack.errors import FormatError, LtxpackError, OverlayError, UnsupportedError, quoted
from ltxpack.files.reader import Range
from ltxpack.files.tensorfile import DTYPE_NAMES, FLOATS, read_json, read_tensorfile
from ltxpack.runtime.weights.copies import copies_to
from ltxpack.runtime.weights.reading import FileReader, TensorRead

M = TypeVar("M", bound=nn.Module)

INDEX_SUFFIX = ".safetensors.index.json"
STORED: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file's header states it, ``nbytes`` bytes from ``start`` on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

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
        """The dtype it has when it is loaded: ``dtype`` if that is given and this is a float."""
        return dtype if dtype is not None and self.dtype in FLOATS else STORED[self.dtype]


class Reader(Protocol):
    """Makes tensors of headers that were checked: the default reads them onto the device, residency has others."""

    def __call__(
        self, stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None, /
    ) -> Mapping[str, Tensor]:
        """The tensors by name, each where the reader puts it, floating ones in ``dtype``. Raises OverlayError."""


def load_component(
    cls: type[M],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    buffers: Mapping[str, Tensor] | None = None,
    reader: Reader | None = None,
) -> M:
    """The module of ``folder``: built from its config.json on the meta device, then :func:`load_module`."""
    config = read_config(folder, cls.__name__)
    return load_module(build_on_meta(cls, config, folder), folder, device, dtype, buffers, reader)


def load_module(
    module: M,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    reader: Reader | None = None,
) -> M:
    """Fills ``module`` (built on the meta device) with the tensors of ``folder`` and returns it in eval mode.

    ``dtype`` casts floating tensors as they arrive on ``device``; None keeps the stored one. ``buffers`` gives
    the buffers that are in no file (non-persistent ones, lost on the meta device); they keep their own dtype.
    ``reader`` does the reading, :func:`read_tensors` if None.

    Raises OverlayError (a tensor missing, left over, misshapen; a file missing), FormatError (a damaged file)
    and UnsupportedError (a stored dtype that is no plain float), all before any tensor is read.
    """
    stored = read_headers(folder)
    check(module, stored, folder)
    missing = _check_buffers(module, buffers or {})
    module.load_state_dict((reader or read_tensors)(stored, device, dtype), strict=True, assign=True)
    for name, tensor in missing.items():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner).register_buffer(attribute, tensor.to(device), persistent=False)
    return module.requires_grad_(False).eval()


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """``config.json`` of a component, which must be of class ``class_name``; ``_``-fields are left out."""
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("_class_name") != class_name:
        raise OverlayError(
            "another class of component",
            file=path,
            expected=class_name,
            found=config.get("_class_name"),
            next=verify_command(folder),
        )
    return {name: value for name, value in config.items() if not name.startswith("_")}


def build_on_meta(cls: type[M], config: Mapping[str, Any], folder: Path) -> M:
    """``cls(**config)`` without memory for its weights. A field the class does not know is refused by name."""
    known = set(inspect.signature(cls.__init__).parameters)
    unknown = sorted(set(config) - known)
    if unknown:
        raise UnsupportedError(
            f"{cls.__name__} has no such fields",
            file=folder / "config.json",
            items=unknown,
            next=verify_command(folder),
        )
    with torch.device("meta"):
        return cls(**config)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's weight files, by name; only headers are read.

    The files are those of the one ``*.safetensors.index.json``, else the one ``*.safetensors``. A shard may be
    a symlink. Each shard must hold exactly the tensors the index says it holds.
    """
    found: dict[str, Stored] = {}
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map.values())) if weight_map else [_single_file(folder)]:
        for tensor, stored in _read_header(folder / name, folder).items():
            if weight_map and weight_map.get(tensor) != name:
                raise OverlayError(
                    "the index does not place it here",
                    file=folder / name,
                    tensor=tensor,
                    expected=weight_map.get(tensor, "no such tensor"),
                    found=name,
                    next=verify_command(folder),
                )
            found[tensor] = stored
    absent = sorted(set(weight_map) - set(found))
    if absent:
        raise OverlayError(
            "tensors named in the index are in no shard",
            file=folder,
            items=[f"{name} ({weight_map[name]})" for name in absent],
            next=verify_command(folder),
        )
    return found


def check(module: nn.Module, stored: Mapping[str, Stored], folder: Path) -> None:
    """Holds names, shapes and kinds of ``stored`` against ``module``; see :func:`load_module`."""
    wanted = module.state_dict()
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or extra:
        raise OverlayError(
            f"{len(missing)} tensors missing, {len(extra)} not known to {type(module).__name__}",
            file=folder,
            items=[f"missing: {name}" for name in missing] + [f"unknown: {name}" for name in extra],
            next=verify_command(folder),
        )
    for name, tensor in wanted.items():
        _check_tensor(name, tensor, stored[name], folder)


def read_tensors(stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """The tensors on ``device``, floating ones in ``dtype``; the default :class:`Reader`, which compares no hash."""
    copies = copies_to(device)
    found = {
        name: torch.empty(entry.shape, dtype=entry.arriving_as(dtype), device=device) for name, entry in stored.items()
    }
    reader = FileReader(copies)
    try:
        copies.before_computing(reader.fill(entry.read_into(found[name]) for name, entry in stored.items()))
    finally:
        reader.close()
    return found


def verify_command(folder: Path) -> str:
    """The command that checks the overlay ``folder`` lies in."""
    overlay = next((place for place in folder.parents if (place / "ltxpack.json").is_file()), folder.parent)
    return f"ltxpack verify {quoted(overlay)}"


def _check_tensor(name: str, wanted: Tensor, entry: Stored, folder: Path) -> None:
    accepted = set(FLOATS) if wanted.is_floating_point() else {k for k, v in STORED.items() if v == wanted.dtype}
    if entry.shape == tuple(wanted.shape) and entry.dtype in accepted:
        return
    shape_differs = entry.shape != tuple(wanted.shape)
    error: type[LtxpackError] = OverlayError if shape_differs else UnsupportedError
    raise error(
        "shape differs" if shape_differs else "a dtype that is not loaded as it is",
        file=entry.file,
        tensor=name,
        expected=_described(entry.dtype if entry.dtype in accepted else "|".join(sorted(accepted)), wanted.shape),
        found=str(entry),
        next=verify_command(folder),
    )


def _check_buffers(module: nn.Module, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``given``, after holding it against the buffers of ``module`` that no file can hold."""
    lost = dict(module.named_buffers())
    for name in module.state_dict():
        lost.pop(name, None)
    shapes = {name: tuple(buffer.shape) for name, buffer in lost.items()}
    if shapes != {name: tuple(buffer.shape) for name, buffer in given.items()}:
        raise ValueError(f"{type(module).__name__} has the non-persistent buffers {shapes}, given were {sorted(given)}")
    return given


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name of the folder's index; empty without an index."""
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if not indices:
        return {}
    if len(indices) > 1:
        raise OverlayError("several indices", file=folder, items=[path.name for path in indices])
    weight_map = _read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("no weight_map", file=indices[0], next=verify_command(folder))
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(
                "not a file of this folder",
                file=indices[0],
                tensor=tensor,
                expected="a .safetensors file name",
                found=repr(name),
                next=verify_command(folder),
            )
    return weight_map


def _single_file(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    raise OverlayError(
        "no weights" if not files else "several weight files and no index",
        file=folder,
        expected=f"one .safetensors file, or an *{INDEX_SUFFIX}",
        items=files,
        next=verify_command(folder),
    )


def _read_header(path: Path, folder: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise OverlayError("no such file", file=path, next=verify_command(folder))
    try:
        file = read_tensorfile(path)
    except LtxpackError as error:
        problem = f"not a whole safetensors file: {error.problem}"
        raise FormatError(
            problem,
            file=path,
            tensor=error.tensor,
            expected=error.expected,
            found=error.found,
            next=verify_command(folder),
        ) from error
    return {t.name: Stored(path, t.dtype, t.shape, t.start, t.nbytes) for t in file.tensors.values()}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise OverlayError("no such file", file=path, next=verify_command(path.parent))
    try:
        value = read_json(path)
    except LtxpackError as error:
        raise FormatError(
            error.problem, file=path, expected=error.expected, next=verify_command(path.parent)
        ) from error
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", file=path, next=verify_command(path.parent))
    return value


def _described(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype.lower()} {list(shape)}"
