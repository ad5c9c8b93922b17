"""A CUDA device that is not there: tensors without content that claim to lie on it, streams and events that only keep
accounts, and a sanitizer that reads them.

What lies on the CPU stays real, what lies on ``cuda:N`` is a fake of torch's own (shape, dtype, device), so host code
runs as it is and a kernel that mixes devices raises as it would. Every operation on the card is entered with its
stream: each stream's clock says what it can rely on being done, by order, by events waited for and by what the host
waited for. Reading or writing what another stream may still write, freeing what another may still use, and filling or
unpinning host memory that is still being copied from are collected in ``Card.races``.

What kernels compute, whether one exists, how long it takes and what the driver refuses is not shown by it.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _guard_operations import described
from memory_meter import leaves
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ltxpack.runtime.model import kernels

aten = torch.ops.aten
GIB = 2**30
# What a card answers when the host asks for a number: masks are not all ones, errors are none.
ANSWERS = {torch.bool: False, torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 0.0}
COUNT = 9
LIKE, NEW = (aten.empty_like.default, aten.zeros_like.default), (aten.new_empty.default, aten.new_zeros.default)

Clock = dict[int, int]


def join(clock: Clock, other: Clock) -> None:
    """Let ``clock`` know what ``other`` knows."""
    for stream, count in other.items():
        if clock.get(stream, 0) < count:
            clock[stream] = count


class Stream:
    """A queue of the card. ``clock``: of each queue, how much is done before what is asked for next here."""

    def __init__(self, card: Card, device: torch.device, number: int) -> None:
        self.card, self.device, self.number = card, device, number
        self.clock: Clock = {}

    def ask(self) -> tuple[int, int]:
        """One thing more in the queue."""
        join(self.clock, self.card.host)
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.number, self.clock[self.number]

    def wait_event(self, event: Event) -> None:
        join(self.clock, event.clock)

    def synchronize(self) -> None:
        self.card.wait("stream.synchronize", self.clock)


class Event:
    """A point in a queue."""

    def __init__(self, card: Card) -> None:
        self.card, self.clock = card, Clock()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.card.current()
        join(stream.clock, self.card.host)
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        self.card.wait("event.synchronize", self.clock)

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Generator(torch.Generator):
    """Says that it draws on the card."""

    claimed: torch.device

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != "cuda":
            return torch._C.Generator(device=device)
        made = super().__new__(cls, device="cpu")
        made.claimed = indexed(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.claimed


def indexed(device: Any) -> torch.device:
    found = torch.device(device)
    return (
        found if found.index is not None or found.type != "cuda" else torch.device("cuda", torch.cuda.current_device())
    )


@dataclass
class Memory:
    """An allocation on the card: where it belongs, who wrote it last and who has read it since."""

    nbytes: int
    home: Stream
    written: tuple[int, int]
    read: Clock = field(default_factory=dict)
    used: Clock = field(default_factory=dict)


@dataclass
class Pinned:
    """Host memory the card may copy from, by address, and the copies from it."""

    start: int
    nbytes: int
    copies: Clock = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What an operation is: a view or a copy, by what it is made of; a mere view; and which arguments it writes.

    ``plain``: what comes of it is laid out the same on every device.
    """

    name: str
    plain: bool
    composite: bool
    view: bool
    writes: frozenset[int | str]


@dataclass(frozen=True)
class Known:
    """What came of an operation: a list or one tensor, and of each size, stride, offset and dtype.

    The offset of a view counts in bytes from where its tensor begins.
    """

    several: bool
    parts: list[tuple[Any, Any, int, torch.dtype]]
    device: torch.device
    view: bool

    @classmethod
    def of(cls, out: Any, device: torch.device, base: Tensor | None) -> Known:
        """``base``: the tensor that ``out`` is a view of."""
        begin = 0 if base is None else base.storage_offset() * base.itemsize
        parts = [(*laid(part), part.storage_offset() * part.itemsize - begin, part.dtype) for part in parts_of(out)]
        return cls(isinstance(out, list | tuple), parts, device, base is not None)

    def again(self, mode: Card, base: Any) -> Any:
        if self.view:
            made = [part_of(base, *part) for part in self.parts]
        else:
            made = [
                fake(mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), self.device)
                for size, stride, _, dtype in self.parts
            ]
        return made if self.several else made[0]


class Card(FakeTensorMode):
    """``with card:`` is the time in which the card is there, for this thread.

    ``races``: what a real card may get wrong; ``waits``: where the host waited, as (what, where); ``uploads``: where it
    copied from memory that is not pinned, which waits too; ``live`` and ``peak`` are bytes on the card, without gaps;
    ``pinned`` those of host memory that were ever pinned.
    """

    def __init__(self, card: int = 139 * GIB, count: int = 1) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # KNOWN has it.
        self.size, self.count, self.device_now = card, count, 0
        self.host: Clock = {}
        self.races: list[str] = []
        self.waits: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.live = self.peak = 0
        self.streams: list[Stream] = []
        self.defaults = [self.new_stream(torch.device("cuda", number)) for number in range(count)]
        self.chosen: dict[int, Stream] = {}
        self.memories: dict[int, Memory] = {}
        self.pins: list[Pinned] = []
        self.pinned = 0
        self.contexts: set[int] = set()
        self.asked: dict[str, int] = defaultdict(int)
        self._kinds: dict[Any, Kind] = {}
        self._within = False

    @property
    def avoid_device_init(self) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled on the card: to keep the compiler away from each operation is a tenth of its time."""
        return False

    # What torch.cuda offers.

    def new_stream(self, device: Any = None, **_: Any) -> Stream:
        self.streams.append(Stream(self, indexed(device or "cuda"), len(self.streams)))
        return self.streams[-1]

    def current(self, device: Any = None) -> Stream:
        number = self.device_now if device is None else indexed(device).index
        return self.chosen.get(number, self.defaults[number])

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, chosen = self.device_now, self.chosen
        self.device_now, self.chosen = stream.device.index, {**chosen, stream.device.index: stream}
        try:
            yield
        finally:
            self.device_now, self.chosen = before, chosen

    @contextlib.contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before, self.device_now = self.device_now, indexed(device).index
        try:
            yield
        finally:
            self.device_now = before

    @contextlib.contextmanager
    def on_another_thread(self) -> Iterator[None]:
        """As a thread that has just begun: its current streams are the default ones, its current device the first."""
        before, self.device_now, self.chosen = (self.device_now, self.chosen), 0, {}
        try:
            yield
        finally:
            self.device_now, self.chosen = before

    def wait(self, what: str, clock: Clock) -> None:
        """The host waits until all of ``clock`` is done."""
        join(self.host, clock)
        self.waits.append((what, here()))

    def register(self, address: int, nbytes: int, flags: int) -> int:
        self.contexts.add(self.device_now)
        assert address % 4096 == 0 and nbytes > 0
        assert flags == 1, "registered for one device only"
        for pin in self.pins:
            if address < pin.start + pin.nbytes and pin.start < address + nbytes:
                return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.pins.append(Pinned(address, nbytes))
        self.pinned += nbytes
        return 0

    def unregister(self, address: int) -> int:
        self.contexts.add(self.device_now)
        [pin] = [pin for pin in self.pins if pin.start == address]
        self.host_writes(address, pin.nbytes, "unpinned")
        self.pins.remove(pin)
        return 0

    def pin_at(self, address: int) -> Pinned | None:
        return next((pin for pin in self.pins if pin.start <= address < pin.start + pin.nbytes), None)

    def host_writes(self, address: int, nbytes: int, what: str) -> None:
        """The host changes or gives back memory: nobody may still be copying from it."""
        pin = self.pin_at(address)
        if pin is not None and self.before(pin.copies, self.host) is not None:
            self.race(f"host memory is {what} while it is copied from")

    def synchronize(self, device: Any = None) -> None:
        """The host waits for everything."""
        for stream in self.streams:
            self.wait("synchronize", stream.clock)

    def empty_cache(self) -> None:
        """The driver waits for the device where there is something to give back: not to be relied on."""
        self.waits.append(("empty_cache", here()))

    # The sanitizer.

    def before(self, used: Clock, known: Clock) -> int | None:
        """A stream whose use is not known to be done, or None."""
        return next((stream for stream, count in used.items() if known.get(stream, 0) < count), None)

    def race(self, what: str) -> None:
        self.races.append(f"{what}: {here()}")

    def enter(self, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """An operation asked of the current stream."""
        reads, writes = list(reads), list(writes)
        device = next(tensor.device for tensor in (*reads, *writes))
        stream = self.current(device)
        number, count = stream.ask()
        self.asked[what] += 1
        for tensor in reads:
            memory = self.memory_of(tensor)
            self._ordered(what, memory, stream, {memory.written[0]: memory.written[1]})
            memory.read[number] = memory.used[number] = count
        for tensor in writes:
            memory = self.memory_of(tensor)
            self._ordered(what, memory, stream, {**memory.read, memory.written[0]: memory.written[1]})
            memory.written, memory.read, memory.used[number] = (number, count), {}, count

    def _ordered(self, what: str, memory: Memory, stream: Stream, used: Clock) -> None:
        other = self.before({n: c for n, c in used.items() if n != stream.number}, stream.clock)
        if other is not None:
            self.race(f"{what} in stream {stream.number} does not wait for stream {other}")

    def memory_of(self, tensor: Tensor) -> Memory:
        """The allocation ``tensor`` lies in; a new one belongs to the current stream and was last used by it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        found = self.memories.get(key)
        if found is None:
            home = self.current(tensor.device)
            join(home.clock, self.host)
            stamp = (home.number, home.clock.get(home.number, 0))
            found = self.memories[key] = Memory(storage.nbytes(), home, stamp)
            self.live += found.nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key).atexit = False
        return found

    def _freed(self, key: int) -> None:
        memory = self.memories.pop(key)
        self.live -= memory.nbytes
        known = dict(memory.home.clock)
        join(known, self.host)
        other = self.before({n: c for n, c in memory.used.items() if n != memory.home.number}, known)
        if other is not None:
            self.race(f"memory of stream {memory.home.number} is freed while stream {other} may use it")

    # Operations.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE and not self.in_kernel_invocation:
            return args[0]._fake_device
        if self._within or func.namespace == "prim":
            # What torch makes of an operation to know its shape is not what the card is asked for.
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [tensor for tensor in leaves((args, kwargs)) if isinstance(tensor, FakeTensor)]
        cards = [tensor for tensor in tensors if tensor._fake_device.type == "cuda"]
        device = kwargs.get("device")
        place = None if device is None else torch.device(device).type
        if not tensors and place != "cuda":
            return func(*args, **kwargs)
        if place == "cuda":
            kwargs["device"] = indexed(device)
        kind = self._kinds.get(func) or self._kinds.setdefault(func, kind_of(func))
        if kind.composite:
            return self._composed(func, args, kwargs)
        if cards and func is aten._local_scalar_dense.default:
            return self._number(cards[0])
        if cards and place in ("cpu", "meta"):
            return self._off_card(func, cards[0], args, kwargs)
        if func is aten.copy_.default and cards and not all(isinstance(arg, FakeTensor) for arg in args[:2]):
            return self._across(*args, **kwargs)
        if func is aten._to_copy.default and not tensors:
            return self._to_card(args[0], **kwargs)
        out = self._shaped(func, kind, types, args, kwargs)
        if not kind.view:
            self._account(kind, args, kwargs, cards, out)
        return out

    def _composed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Whole only in inference mode; what it is made of tells a view from a copy. A view is known the next time."""
        key = (func, described(args), described(kwargs))
        if (found := KNOWN.get(key)) is not None:
            return found.again(self, args[0])
        with self:
            out = func.decompose(*args, **kwargs)
        if isinstance(out, Tensor) and out is not args[0] and storage_of(out) == storage_of(args[0]):
            KNOWN[key] = Known.of(out, out.device, args[0])
        return out

    def _shaped(self, func: Any, kind: Kind, types: Any, args: Any, kwargs: Any) -> Any:
        """What comes of an operation: as torch says, or as it said of the same before, whatever card that was."""
        if func is aten.detach.default:
            return part_of(args[0], args[0].shape, args[0].stride(), 0, args[0].dtype)
        key = (func, described(args), described(kwargs))
        found = KNOWN.get(key)
        if found is WRITTEN:
            return args[0] if func._schema.returns else None
        if found is None and kind.plain and (device := common_device((args, kwargs))) is not None:
            given = on_meta(args)
            out = func(*given, **on_meta(kwargs))
            found = KNOWN[key] = Known.of(out, device, given[0] if kind.view else None)
        if found is not None:
            return found.again(self, args[0] if kind.view else None)
        self._within = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._within = False
        if kind.writes:
            if out is None or (args and out is args[0] and torch.Tag.inplace_view not in func.tags):
                KNOWN[key] = WRITTEN
        elif not kind.view and all(is_on_card(part) for part in parts_of(out)):
            KNOWN[key] = Known.of(out, parts_of(out)[0].device, None)
        return out

    def _account(self, kind: Kind, args: Any, kwargs: Any, cards: Sequence[Tensor], out: Any) -> None:
        written = [leaf for n, given in enumerate(args) if n in kind.writes for leaf in leaves(given)]
        written += [leaf for name, given in kwargs.items() if name in kind.writes for leaf in leaves(given)]
        written = [tensor for tensor in (*written, *leaves(out)) if is_on_card(tensor)]
        known = {id(tensor) for tensor in written}
        if cards or written:
            self.enter(kind.name, [tensor for tensor in cards if id(tensor) not in known], written)

    def _number(self, tensor: Tensor) -> Any:
        self.enter("item", [tensor], [])
        self.wait("item", self.current(tensor.device).clock)
        return ANSWERS.get(tensor.dtype, COUNT)

    def _off_card(self, func: Any, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """A copy to the host is zeros, as nothing was computed; to the meta device and ``…_like`` there is none."""
        place, dtype, shape = kwargs["device"], kwargs.get("dtype") or tensor.dtype, tensor.shape
        if func is aten._to_copy.default and torch.device(place).type == "cpu":
            self._to_host(tensor, kwargs.get("non_blocking", False))
        elif func in NEW:
            shape = args[1]
        else:
            assert func in (aten._to_copy.default, *LIKE), f"{func} from the card to {place}"
        return torch.zeros(shape, dtype=dtype, device=place)

    def _to_host(self, tensor: Tensor, non_blocking: bool) -> None:
        self.enter("to the host", [tensor], [])
        if non_blocking:
            self.race("a copy to the host is not waited for")
        self.wait("to the host", self.current(tensor.device).clock)

    def _to_card(self, source: Tensor, device: torch.device, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        """From memory of the host that is not pinned."""
        with self:
            target = torch.empty(source.shape, dtype=dtype or source.dtype, device=device)
        return self._across(target, source, more.get("non_blocking") or False)

    def _across(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        assert torch.broadcast_shapes(target.shape, source.shape) == target.shape
        if not isinstance(target, FakeTensor):
            self._to_host(source, non_blocking)
            return target
        assert source.device.type == "cpu", f"copied from {source.device}"
        self.enter("from the host", [], [target])
        stream = self.current(target.device)
        pin = self.pin_at(source.data_ptr())
        if pin is not None and non_blocking and source.is_contiguous() and source.dtype == target.dtype:
            pin.copies[stream.number] = stream.clock[stream.number]
            assert pin.start <= source.data_ptr() and source.data_ptr() + source.nbytes <= pin.start + pin.nbytes
        else:
            self.uploads.append(here())
            self.waits.append(("from memory that is not pinned", here()))
        return target

    def draw(self, *size: Any, generator: Generator | None = None, **more: Any) -> Tensor:
        """``torch.randn``; a generator must be of the device it draws on."""
        if generator is None:
            return REAL_RANDN(*size, **more)
        place = indexed(more.get("device") or "cpu")
        if place != generator.device:
            raise RuntimeError(f"Expected a '{place}' device type for generator but found '{generator.device}'")
        given = {} if isinstance(generator, Generator) else {"generator": generator}
        return REAL_RANDN(*size, **given, **more)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        """Fused attention: nothing is kept of the scores, and the result lies as the queries' tokens do."""
        if not isinstance(query, FakeTensor):
            return REAL_ATTENTION(query, key, value, attn_mask, **more)
        given = [query, key, value, *([] if attn_mask is None else [attn_mask])]
        assert {tensor.device for tensor in given} == {query.device}, [tensor.device for tensor in given]
        assert query.dtype == key.dtype == value.dtype
        assert query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        self.enter("attention", given, [out])
        return out


# Operation and arguments -> what came of it.
KNOWN: dict[Any, Any] = {}
# Stands there for the first argument of an operation that writes to it, or for nothing.
WRITTEN = object()
DEVICE = torch.ops.prim.device.default
PLAIN = (aten._to_copy.default, aten.clone.default, aten.mean.dim)
# What a new fake has beside its device.
MEMOS = [
    f"_{name}_memo{what}"
    for name in ("nonzero", "item", "unique", "unique_consecutive", "nested_int")
    for what in ("", "_vc", "_epoch")
]
BLANK = dict.fromkeys(["constant", "pytype", "dispatch_keys", "real_tensor", *MEMOS])
REAL_RANDN, REAL_TENSOR, REAL_TO = torch.randn, torch.tensor, torch.Tensor.to
REAL_ATTENTION = torch.nn.functional.scaled_dot_product_attention


def picked(tensor: Tensor, index: Any) -> Tensor:
    """``tensor[index]``: a build without CUDA has no such thing for what claims to lie there."""
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        place = next(n for n, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (tensor.ndim - taken)
    if any(isinstance(part, Tensor | list) for part in parts):
        assert all(isinstance(part, Tensor) or part == slice(None) for part in parts), f"[{index}] is not pretended"
        found: Tensor = aten.index.Tensor(tensor, [part if isinstance(part, Tensor) else None for part in parts])
        return found
    axis, size, stride, offset = 0, list[int](), list[int](), 0
    for part in parts:
        if part is None:
            size, stride = [*size, 1], [*stride, 0]
            continue
        if isinstance(part, slice):
            begin, end, step = part.indices(tensor.shape[axis])
            assert step > 0
            size, stride = [*size, len(range(begin, end, step))], [*stride, step * tensor.stride(axis)]
        else:
            begin = int(part) % tensor.shape[axis]
        offset += begin * tensor.stride(axis)
        axis += 1
    size, stride = [*size, *tensor.shape[axis:]], [*stride, *tensor.stride()[axis:]]
    return part_of(tensor, size, stride, offset * tensor.itemsize, tensor.dtype)


def part_of(tensor: Any, size: Any, stride: Any, offset: int, dtype: torch.dtype) -> Tensor:
    """A view from ``offset`` bytes after the tensor's beginning on, without asking torch what it would be.

    It is made in inference mode or not, as the tensor was.
    """
    offset = (tensor.storage_offset() * tensor.itemsize + offset) // dtype.itemsize
    begun = tensor.is_inference()
    inference = contextlib.nullcontext() if begun == torch.is_inference_mode_enabled() else torch.inference_mode(begun)
    with torch._C._DisableTorchDispatch(), inference:
        empty = torch.empty(0, dtype=dtype, device="meta")
        empty.set_(tensor.untyped_storage(), offset, size, stride)
        return fake(tensor.fake_mode, empty, tensor._fake_device)


def fake(mode: FakeTensorMode, empty: Tensor, device: torch.device) -> Tensor:
    """``FakeTensor(mode, empty, device)``, for a device that has its number."""
    made: Any = Tensor._make_subclass(FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=device)
    torch._C._set_throw_on_mutable_data_ptr(made)
    made.__dict__.update(_fake_device=device, fake_mode=mode, **BLANK)
    return made


def put(tensor: Tensor, index: Any, value: Any) -> None:
    """``tensor[index] = value``."""
    place = picked(tensor, index)
    if isinstance(value, Tensor):
        # The last step of ``tensor[index] += value``, which was done in place.
        if storage_of(value) == storage_of(tensor) and laid(value) == laid(place):
            return
        place.copy_(value)
    else:
        place.fill_(value)


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, likewise."""
    device, dtype, non_blocking, layout = (
        torch._C._nn._parse_to(
            *(torch.empty(0, dtype=arg.dtype, device="meta") if isinstance(arg, FakeTensor) else arg for arg in args),
            **{name: value for name, value in kwargs.items() if name != "copy"},
        )
        if not (args and isinstance(args[0], Tensor))
        else (args[0].device, args[0].dtype, False, None)
    )
    if not isinstance(tensor, FakeTensor) and (device is None or device.type != "cuda"):
        return REAL_TO(tensor, *args, **kwargs)
    device = tensor.device if device is None else indexed(device) if device.type == "cuda" else device
    dtype = dtype or tensor.dtype
    kept = layout or torch.preserve_format
    same_layout = layout is None or tensor.is_contiguous(memory_format=layout)
    if (device, dtype) == (tensor.device, tensor.dtype) and same_layout and not kwargs.get("copy"):
        return tensor
    found: Tensor = aten._to_copy.default(
        tensor, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=kept
    )
    return found


def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``Tensor.copy_``, likewise; the operation by itself would not be bound to its tensor."""
    found: Tensor = aten.copy_.default(target, source, non_blocking)
    return found


def item(tensor: Tensor) -> Any:
    """``Tensor.item``, likewise."""
    return aten._local_scalar_dense.default(tensor)


def contiguous(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """``Tensor.contiguous``, likewise."""
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    found: Tensor = aten.clone.default(tensor, memory_format=memory_format)
    return found


def applied(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` with new parameters, as fakes cannot change places with others."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fn(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return module


def made(values: Any, *, device: Any = None, **more: Any) -> Tensor:
    """``torch.tensor``, likewise."""
    found = REAL_TENSOR(values, **more)
    return found if device is None else found.to(device)


def is_on_card(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == "cuda"


def parts_of(out: Any) -> Sequence[Any]:
    return out if isinstance(out, list | tuple) else (out,)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def laid(tensor: Tensor) -> tuple[Any, Any]:
    return tuple(tensor.shape), tensor.stride()


def common_device(arguments: Any) -> torch.device | None:
    """The device of all tensors in ``arguments``, if they are fakes of one."""
    tensors = leaves(arguments)
    devices = {tensor.device for tensor in tensors}
    return devices.pop() if len(devices) == 1 and all(isinstance(tensor, FakeTensor) for tensor in tensors) else None


def on_meta(value: Any) -> Any:
    """Arguments without devices."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list | tuple):
        return [on_meta(part) for part in value]
    if isinstance(value, dict):
        return {name: on_meta(part) for name, part in value.items() if name != "device"}
    return value


def kind_of(func: Any) -> Kind:
    schema = func._schema
    outs = [given.alias_info for given in schema.returns]
    view = bool(outs) and all(alias is not None and not alias.is_write for alias in outs)
    writes: set[int | str] = set()
    for number, given in enumerate(schema.arguments):
        if given.alias_info is not None and given.alias_info.is_write:
            writes |= {number, given.name}
    composite = view and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    pointwise = torch.Tag.pointwise in func.tags and not writes and len(outs) == 1
    plain = pointwise or func in PLAIN or (view and func is not aten.as_strided.default)
    return Kind(str(func), plain, composite, view, frozenset(writes))


def here() -> str:
    """The innermost places of the call stack in ltxpack, and the one that called torch."""
    frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(1)) if frame.f_code.co_filename != __file__]
    ours = [
        frame
        for frame in frames
        if "/ltxpack/" in frame.f_code.co_filename or "/benchmarks/" in frame.f_code.co_filename
    ]
    told = ours[:3] or frames[:3]
    return " < ".join(
        f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}" for frame in told
    )


class AtOnce:
    """A stand-in for an executor: work is done as it is handed in; as on another thread, without inference mode and in
    that thread's own current streams.
    """

    card: Card

    def __init__(
        self, workers: int = 1, name: str = "", initializer: Callable[[], None] | None = None, **_: Any
    ) -> None:
        if initializer is not None:
            initializer()

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            with torch.inference_mode(False), self.card.on_another_thread():
                done.set_result(work(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done

    def shutdown(self, **_: Any) -> None:
        pass


class Ahead:
    """A stand-in for ``Background``, likewise."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self._done = AtOnce().submit(work, lambda: None)

    def result(self) -> Any:
        done, self._done = self._done, Future()
        return done.result()

    def cancel(self) -> None:
        self._done = Future()


def install(patch: pytest.MonkeyPatch, card: Card) -> None:
    """Have torch.cuda speak of ``card``, and attention go to it."""

    def event(*_: Any, **__: Any) -> Event:
        return Event(card)

    patch.setattr(AtOnce, "card", card, raising=False)
    cudart = SimpleNamespace(cudaHostRegister=card.register, cudaHostUnregister=card.unregister)
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: card.count,
        "current_device": lambda: card.device_now,
        "get_device_name": lambda device=None: "Pretend",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="Pretend", multi_processor_count=132, total_memory=card.size, major=9, minor=0
        ),
        "mem_get_info": lambda device=None: (card.size - card.live, card.size),
        "memory_reserved": lambda device=None: card.live,
        "memory_allocated": lambda device=None: card.live,
        "max_memory_allocated": lambda device=None: card.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(card, "peak", card.live),
        "synchronize": card.synchronize,
        "empty_cache": card.empty_cache,
        "Stream": card.new_stream,
        "Event": event,
        "stream": card.on_stream,
        "device": card.on_device,
        "current_stream": card.current,
        "set_sync_debug_mode": lambda mode: None,
        "cudart": lambda: cudart,
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch, "randn", card.draw)
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", card.attend)
    # A torch for CUDA would look for a driver to say more.
    patch.setattr(kernels, "_JUDGES", dict.fromkeys(kernels._JUDGES, lambda params: False))
    patch.setattr(FakeTensor, "__getitem__", picked, raising=False)
    patch.setattr(FakeTensor, "__setitem__", put, raising=False)
    patch.setattr(FakeTensor, "copy_", copied, raising=False)
    for name, kind in {"__int__": int, "__index__": int, "__float__": float, "__bool__": bool}.items():
        patch.setattr(FakeTensor, name, lambda tensor, kind=kind: kind(tensor.item()), raising=False)
    patch.setattr(FakeTensor, "item", item, raising=False)
    patch.setattr(FakeTensor, "contiguous", contiguous, raising=False)
    patch.setattr(nn.Module, "_apply", applied)
    patch.setattr(torch.Tensor, "to", moved)
    patch.setattr(torch, "tensor", made)
    patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
