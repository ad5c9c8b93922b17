"""Blocks through two slots: the same numbers whenever a copy happens, weights only where they are needed."""

from __future__ import annotations

import functools
import gc
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import SMALL, random_streams, random_weights, recipe, tracing
from runtime.late_copies import LateCopies
from safetensors.torch import save_file
from support import HANG, relative_l2
from torch import Tensor, nn
from works import digests, of_blocks

from ltxpack.errors import OverlayError
from ltxpack.files.direct import PAGE, DirectReader
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.weights import placed, reading, sizes
from ltxpack.runtime.weights.copies import Copies, HostMemory
from ltxpack.runtime.weights.load import Stored, load_module, read_headers
from ltxpack.runtime.weights.placed import PlacedModule, PlacementReader, SpareMemory
from ltxpack.runtime.weights.plan import FILE, HOST, Placement
from ltxpack.runtime.weights.reading import FileReader, HashCheck
from ltxpack.runtime.weights.slots import ByteLayout, FileStream

CPU = torch.device("cpu")
LAYERS = 5
DEEP = {**SMALL, "num_layers": LAYERS}
AT_ONCE = functools.partial(Copies, CPU)
queues = pytest.mark.parametrize("queue", [AT_ONCE, LateCopies], ids=["at once", "late"])


def streaming(source: str, blocks: Iterable[int] = range(LAYERS), **more: Any) -> Placement:
    return Placement(source=source, streamed=frozenset(blocks), **more)


ROOT = "transformer_blocks"
PLACEMENTS = {"all on the card": Placement(), **of_blocks(LAYERS)}
placements = pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of five blocks in two files, bfloat16."""
    folder = tmp_path_factory.mktemp("dit") / "transformer"
    folder.mkdir()
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(DEEP).items()}
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    return folder


def empty_dit() -> DiT:
    with torch.device("meta"):
        return DiT(DiTConfig.from_dict(DEEP))


def placed_module(folder: Path, placement: Placement, queue: Callable[[], Copies]) -> PlacedModule[DiT]:
    """The DiT, placed; every copy goes through the queues of ``queue``."""
    reader = FileReader(queue(), read_bytes=1000, in_flight=2)
    read = PlacementReader(placement, ROOT, digests(folder), reader, queue(), to_host=placement.ahead)
    return loaded(folder, read)


def loaded(folder: Path, read: PlacementReader) -> PlacedModule[DiT]:
    """The DiT as ``read`` places it, whose reader is closed then."""
    with torch.inference_mode():
        module = load_module(empty_dit(), folder, CPU, torch.float32, reader=read)
    read.reader.close()
    return PlacedModule(module, read)


def gives(part: PlacedModule[DiT], expected: Sequence[Tensor]) -> bool:
    """Whether it comes to the card and its outputs are ``expected``, to the bit."""
    with torch.inference_mode(), part.in_use() as dit:
        return all(torch.equal(a, b) for a, b in zip(outputs(dit), expected, strict=True))


def outputs(dit: DiT, count: int = 3) -> list[Tensor]:
    """Two evaluations of ``count`` passes each, at two lengths."""
    found = []
    for lengths in (AV(24, 9), AV(50, 14)):
        passes = recipe(random_streams(dit, lengths))[:count]
        found += [tensor for velocity in dit.passes(passes) for tensor in (velocity.video, velocity.audio)]
    return found


@functools.cache
def plain_outputs(folder: Path, count: int = 3) -> list[Tensor]:
    return outputs(load_module(empty_dit(), folder, CPU, torch.float32), count)


@queues
@placements
def test_every_placement_gives_the_same_bits(placement: Placement, queue: Callable[[], Copies], folder: Path) -> None:
    expected = plain_outputs(folder)
    held = placed_module(folder, placement, queue)
    for _ in range(2 if placement.home == HOST or not placement.ahead else 1):
        assert gives(held, expected)
    held.drop()


class Pinning(Copies):
    """Notes what is pinned, and by which thread; ``begun`` is set with the first."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.pinned: list[tuple[int, str]] = []
        self.unpinned: list[int] = []
        self.begun = threading.Event()

    def unpin(self, memory: Tensor) -> None:
        self.unpinned.append(memory.nbytes)

    def pin(self, memory: Tensor) -> bool:
        self.pinned.append((memory.nbytes, threading.current_thread().name))
        self.begun.set()
        return True


def test_memory_is_pinned_in_stretches_while_the_next_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed, "STRETCH", 16 * PAGE)
    copies, reader = Pinning(), FileReader(Copies(CPU), read_bytes=1000, in_flight=2)
    known = digests(folder)
    read = PlacementReader(Placement(), ROOT, known, reader, copies, to_host=True)
    scatter, waited, last = DirectReader.scatter, list[bool](), list(known)[-1]

    def late(file: DirectReader, views: Sequence[memoryview], start: int) -> None:
        """The last bytes of all come only when something was pinned."""
        if file.path == last and start + sum(map(len, views)) == last.stat().st_size:
            waited.append(copies.begun.wait(HANG))
        scatter(file, views, start)

    monkeypatch.setattr(DirectReader, "scatter", late)
    part = loaded(folder, read)
    assert waited == [True]
    largest = max(math.prod(entry.shape) * 4 for entry in read_headers(folder).values())
    assert len(copies.pinned) > 3
    assert {name.rpartition("_")[0] for _, name in copies.pinned} == {"ltxpack-pin"}
    assert all(nbytes <= max(16 * PAGE, largest) + PAGE for nbytes, _ in copies.pinned)
    assert gives(part, plain_outputs(folder))


@queues
def test_memory_that_weights_have_left_serves_the_next(
    queue: Callable[[], Copies], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed, "STRETCH", 16 * PAGE)
    expected = plain_outputs(folder)
    spare, copies, seen = SpareMemory(), queue(), []
    for _ in range(3):
        reader = FileReader(queue())
        read = PlacementReader(Placement(), ROOT, digests(folder), reader, copies, to_host=True, spare=spare)
        part = loaded(folder, read)
        seen.append({source.memory.bytes.data_ptr() for source in read.memory})
        assert gives(part, expected)
        part.drop()
    assert len(seen[0]) > 3 and seen == seen[:1] * 3


@queues
def test_weights_that_stay_together_are_few_allocations(
    queue: Callable[[], Copies], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed, "STRETCH", 64 * PAGE)
    expected = plain_outputs(folder)
    counts = {}
    for together in (False, True):
        read = PlacementReader(Placement(), ROOT if together else "", digests(folder), FileReader(queue()), queue())
        part = loaded(folder, read)
        counts[together] = len({p.untyped_storage().data_ptr() for p in part.module.parameters()})
        assert gives(part, expected)
        part.drop()
    nbytes = sum(parameter.numel() * 4 for parameter in empty_dit().parameters())
    assert counts[False] == len(read_headers(folder))
    assert counts[True] < counts[False] / 4 and counts[True] <= 2 * nbytes / (64 * PAGE) + 1


def test_spare_memory_of_another_size_goes() -> None:
    spare, one, other = SpareMemory(), *(HostMemory(size, Copies(CPU)) for size in (PAGE, 2 * PAGE))
    for memory in (one, other):
        spare.give(memory)
    assert spare.take(2 * PAGE) is other
    assert spare.take(3 * PAGE) is None
    assert spare.take(PAGE) is None, "there is not more than the weights need"
    spare.give(one)
    spare.clear()
    assert spare.take(PAGE) is None


@placements
def test_weights_are_on_the_card_only_for_their_work(placement: Placement, folder: Path) -> None:
    held = placed_module(folder, placement, AT_ONCE)
    streamed = tuple(f"transformer_blocks.{number}." for number in placement.streamed)

    def away() -> set[str]:
        return {name for name, tensor in held.module.named_parameters() if tensor.is_meta}

    everything = set(dict(held.module.named_parameters()))
    before = (
        everything
        if HOST in (placement.home, "host" if placement.ahead else "")
        else {name for name in everything if name.startswith(streamed)}
    )
    assert away() == before
    seen: list[set[int]] = []
    with torch.inference_mode(), held.in_use() as dit:
        assert away() == {name for name in everything if name.startswith(streamed)}
        for block in dit.transformer_blocks:
            block.register_forward_hook(lambda *_: seen.append(whole_blocks(dit)))
        outputs(dit)
    # A hook of ours runs after the slots' own, so a streamed block has been let go again by then.
    assert len(seen) == 2 * LAYERS
    assert all(found == set(range(LAYERS)) - placement.streamed for found in seen)
    if placement.home == HOST or not placement.ahead:
        assert away() == before
    held.drop()


def whole_blocks(dit: DiT) -> set[int]:
    return {n for n, block in enumerate(dit.transformer_blocks) if not any(p.is_meta for p in block.parameters())}


class Chain(nn.Module):
    """Blocks of different sizes, called in order; each adds what its weight says."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=number % 2 == 0) for number in range(count))
        self.ends = nn.Linear(4, 4)

    def forward(self, x: Tensor, order: Sequence[int] | None = None) -> Tensor:
        for number in order if order is not None else range(len(self.blocks)):
            x = torch.tanh(self.blocks[number](x))
        return self.ends(x)


def chain(count: int) -> Chain:
    with torch.device("meta"):
        return Chain(count)


def chain_in(folder: Path, count: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(count)
    shapes = {name: tensor.shape for name, tensor in chain(count).state_dict().items()}
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / "m.safetensors"
    )
    return folder


def streamed_chain(
    folder: Path, count: int, queue: Callable[[], Copies], where: str, dtype: torch.dtype | None = None
) -> PlacedModule[Chain]:
    """A chain of ``count`` blocks, all of them streamed."""
    reader = FileReader(queue())
    read = PlacementReader(streaming(where, range(count)), "blocks", digests(folder), reader, queue())
    module = load_module(chain(count), folder, CPU, dtype, reader=read)
    reader.close()
    return PlacedModule(module, read)


@queues
@pytest.mark.parametrize("where", [HOST, FILE])
@pytest.mark.parametrize(
    ("count", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (3, torch.float32), (4, torch.bfloat16), (7, None)]
)
def test_any_number_of_blocks_in_any_order(
    count: int, dtype: torch.dtype | None, where: str, queue: Callable[[], Copies], tmp_path: Path
) -> None:
    """Also where a cast on the way makes them smaller than they are stored."""
    folder = chain_in(tmp_path / "chain", count)
    plain = load_module(chain(count), folder, CPU, dtype)
    held = streamed_chain(folder, count, queue, where, dtype)
    orders = [None, None, list(reversed(range(count))), [count - 1, count - 1, 0], None]
    x = torch.linspace(-1, 1, 4, dtype=dtype)
    with torch.inference_mode(), held.in_use() as streamed:
        for order in orders:
            assert torch.equal(streamed(x, order), plain(x, order)), order
    held.drop()


def test_work_that_fails_half_way_leaves_the_next_one_right(tmp_path: Path) -> None:
    folder = chain_in(tmp_path / "chain", 5)
    plain, held = load_module(chain(5), folder, CPU), streamed_chain(folder, 5, AT_ONCE, FILE)
    x = torch.ones(4)
    with torch.inference_mode():
        with pytest.raises(RuntimeError), held.in_use() as streamed:
            streamed.blocks[2](torch.ones(3))
        with held.in_use() as streamed:
            with pytest.raises(RuntimeError):
                streamed(torch.ones(3))
            assert torch.equal(streamed(x), plain(x))
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in held.module.blocks)
    held.drop()


def test_a_file_that_goes_away_while_it_is_streamed(tmp_path: Path) -> None:
    folder = chain_in(tmp_path / "chain", 5)
    held = streamed_chain(folder, 5, AT_ONCE, FILE)
    path = folder / "m.safetensors"
    with torch.inference_mode(), pytest.raises(OverlayError) as caught, held.in_use() as streamed:
        streamed(torch.ones(4))
        path.unlink()
        streamed(torch.ones(4))
        streamed(torch.ones(4))
    assert caught.value.file == str(path)
    before = threading.active_count()
    held.drop()
    assert threading.active_count() <= before


def test_the_layout_is_what_the_plan_counts(folder: Path) -> None:
    stored = read_headers(folder)
    tensors = [(name, entry.dtype, entry.shape) for name, entry in stored.items()]
    for dtype, itemsize in ((torch.bfloat16, 2), (torch.float32, 4)):
        part = sizes.part_of("transformer", tensors, itemsize)
        for number in range(LAYERS):
            layout = ByteLayout(dtype)
            for name, entry in stored.items():
                if name.startswith(f"transformer_blocks.{number}."):
                    layout.add(name, entry)
            assert layout.nbytes == part.blocks[number]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_share_their_graphs_wherever_weights_lie(folder: Path) -> None:
    """The hooks of the slots run at every call, and what they bring is used: no graph holds weights.

    Blocks from the file, from host memory and on the card.
    """
    placement = PLACEMENTS["some from the file, some held"]
    graphs, backend = tracing()
    expected = plain_outputs(folder, 1)
    held = placed_module(folder, placement, AT_ONCE)
    prepared: list[bool] = []

    def prepare(dit: DiT, streamed: bool) -> None:
        prepared.append(streamed)
        dit.compile_blocks(backend=backend, fullgraph=True)

    with torch.inference_mode(), held.in_use(prepare) as dit:
        found, again = outputs(dit, 1), outputs(dit, 1)
    for a, b, c in zip(found, again, expected, strict=True):
        assert relative_l2(a, c) <= 1e-6 and torch.equal(a, b)
    assert len(graphs) == 3, "text, attend and exchange: no block has graphs of its own"
    assert prepared == [bool(placement.streamed)]
    held.drop()


@pytest.mark.parametrize("where", [HOST, FILE])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_the_next_block_is_under_way_while_one_computes(count: int, where: str, tmp_path: Path) -> None:
    held = streamed_chain(chain_in(tmp_path / "chain", count), count, AT_ONCE, where)
    asked: list[int] = []
    computed: list[tuple[int, int]] = []
    for number, source in enumerate(held._slots.sources):
        held._slots.sources[number] = Watched(source, number, asked)
    with torch.inference_mode(), held.in_use() as streamed:
        for number, block in enumerate(streamed.blocks):
            block.register_forward_pre_hook(lambda *_, n=number: computed.append((n, len(asked))))
        for _ in range(3):
            streamed(torch.ones(4))
    calls = [number % count for number in range(3 * count)]
    assert [number for number, _ in computed] == calls
    # When the k-th block computes, exactly it and the next were asked for since the start, in order and once each.
    assert [done for _, done in computed] == [k + 2 for k in range(3 * count)]
    assert asked == [number % count for number in range(3 * count + 2)]
    held.drop()


class Watched:
    """A source that notes when its block was asked for."""

    def __init__(self, source: Any, number: int, asked: list[int]) -> None:
        self.layout, self.source, self.number, self.asked = source.layout, source, number, asked

    def start(self, slot: Tensor, after: Any) -> Any:
        self.asked.append(self.number)
        return self.source.start(slot, after)


@pytest.mark.parametrize("process_ends", [False, True])
def test_at_the_end_of_the_process_nothing_is_unpinned(process_ends: bool) -> None:
    """REVIEW 3.14: the kernel takes pinned memory back faster."""
    queue = Pinning()
    memory = HostMemory(PAGE, queue)
    assert memory.pin()
    (finalizer,) = [one for one in weakref.finalize._registry if one.peek()[0] is memory]  # type: ignore[attr-defined]
    assert finalizer.atexit is False
    queue.process_ends = process_ends
    del memory
    gc.collect()
    assert queue.unpinned == ([] if process_ends else [PAGE])


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, dict[str, Stored]]:
    """A folder of one file, whose twelve layers are there in the order of their names, among other tensors."""
    (tmp_path / "text").mkdir()
    names = ["embed", *(f"layers.{number}.w" for number in range(12)), "vision"]
    save_file({name: torch.randn(3000 + 7 * len(name)) for name in names}, tmp_path / "text" / "m.safetensors")
    return tmp_path / "text", read_headers(tmp_path / "text")


def streamed(folder: Path, stored: dict[str, Stored], expected: dict[Path, str], turns: int = 1) -> Counter[int]:
    """Read the layers in their order as they would stream, with a check of hashes; where reads began, how often."""
    own = {name: entry for name, entry in stored.items() if name != "vision"}
    check, begun = HashCheck(expected, (entry.source for entry in own.values())), Counter[int]()
    stream = FileStream(Copies(CPU), check=check)
    take = check.begin
    check.begin = lambda read, views: (begun.update([read.start]), take(read, views))[1]  # type: ignore[method-assign]
    for name in ["embed", *(f"layers.{number}.w" for number in range(12))] * turns:
        target = torch.empty(own[name].shape)
        stream.read([own[name].read_into(target)], None)()
    try:
        check.finish()
    finally:
        stream.close()
        check.close()
    return begun


@pytest.mark.parametrize("room", [0, 20_000, 10**9])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_files_are_hashed_as_their_blocks_stream(
    room: int, turns: int, layers: tuple[Path, dict[str, Stored]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another order than that of the file, with bytes that nobody reads (REVIEW 3.15)."""
    monkeypatch.setattr(reading, "WAITING", room)
    folder, stored = layers
    begun = streamed(folder, stored, digests(folder), turns)
    assert set(begun.values()) <= {turns} and len(begun) == (13 if turns else 0)


@pytest.mark.parametrize("name", ["embed", "layers.3.w", "layers.11.w", "vision"])
def test_what_changed_is_found_as_blocks_stream(name: str, layers: tuple[Path, dict[str, Stored]]) -> None:
    folder, stored = layers
    expected, path = digests(folder), folder / "m.safetensors"
    content = bytearray(path.read_bytes())
    content[stored[name].start + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(OverlayError, match="changed since the overlay was written"):
        streamed(folder, stored, expected)
