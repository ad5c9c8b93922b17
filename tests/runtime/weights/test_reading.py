"""Files into tensors: every byte to its place, whatever the size of a read; hashes compared; nothing left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.late_copies import LateCopies
from safetensors.torch import save_file
from torch import Tensor

from ltxpack.errors import OverlayError
from ltxpack.files.direct import CACHED, HUGE_PAGE, PAGE, READS, VIEWS_PER_READ
from ltxpack.files.reader import Range, plan_reads
from ltxpack.runtime.weights import load, reading
from ltxpack.runtime.weights.copies import Copies, HostMemory
from ltxpack.runtime.weights.machine import own_memory
from ltxpack.runtime.weights.reading import FileReader, TensorRead

CPU = torch.device("cpu")
SHAPES = [(), (1,), (0,), (3, 5), (13, 7), (2, 2, 2), (33,)]
queues = pytest.mark.parametrize("queue", [lambda: Copies(CPU), LateCopies], ids=["at once", "late"])
reads_all = pytest.mark.parametrize("reads", READS)
read_sizes = pytest.mark.parametrize("read_bytes", [16, 100, reading.READ_BYTES])


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {f"t{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(SHAPES)}
    return {**found, "half": torch.randn(33, generator=generator).bfloat16(), "count": torch.arange(7)}


def written(folder: Path, *states: dict[str, Tensor]) -> dict[str, load.Stored]:
    folder.mkdir(exist_ok=True)
    stored: dict[str, load.Stored] = {}
    for number, state in enumerate(states):
        own = folder / f"file{number}"
        own.mkdir()
        save_file({f"{number}.{name}": tensor for name, tensor in state.items()}, own / "model.safetensors")
        stored.update(load.read_headers(own))
    return stored


def digests(stored: dict[str, load.Stored]) -> dict[Path, str]:
    """The hash of each file with these tensors."""
    return {entry.file: blake3(entry.file.read_bytes()).hexdigest() for entry in stored.values()}


def fill(
    reader: FileReader,
    stored: dict[str, load.Stored],
    dtype: torch.dtype | None = None,
    *,
    on_host: bool,
    **how: object,
) -> dict[str, Tensor]:
    found = {name: torch.full(entry.shape, 9).to(entry.arriving_as(dtype)) for name, entry in stored.items()}
    wanted = [entry.read_into(found[name], on_host) for name, entry in stored.items()]
    reader.copies.before_computing(reader.fill(wanted, **how))
    return found


@queues
@read_sizes
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("hashed", [False, True])
@reads_all
def test_every_tensor_arrives(
    queue: Callable[[], Copies],
    read_bytes: int,
    on_host: bool,
    dtype: torch.dtype | None,
    hashed: bool,
    reads: str,
    tmp_path: Path,
) -> None:
    states = tensors(0), tensors(1)
    stored = written(tmp_path, *states)
    reader = FileReader(queue(), reads=reads, read_bytes=read_bytes, in_flight=3)
    found = fill(reader, stored, dtype, on_host=on_host, digests=digests(stored) if hashed else None)
    reader.close()
    for number, state in enumerate(states):
        for name, tensor in state.items():
            wanted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            assert torch.equal(found[f"{number}.{name}"], wanted), name


class Marked(Copies):
    """Keeps which mark each copy had to come after; ``now`` is another one each time."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.asked, self.waited = 0, list[int]()

    def now(self) -> int:
        self.asked += 1
        return self.asked

    def run(self, work: Callable[[], None], after: int | None = None) -> None:
        self.waited.append(after or 0)
        super().run(work)


@pytest.mark.parametrize("given", [None, 7])
def test_copies_wait_for_what_was_computed_before_the_reading_alone(given: int | None, tmp_path: Path) -> None:
    """A transformer that is read ahead does not stand in line behind the stage that runs meanwhile."""
    stored = written(tmp_path, tensors())
    copies = Marked()
    reader = FileReader(copies, read_bytes=100)
    fill(reader, stored, on_host=False, after=given)
    reader.close()
    assert len(copies.waited) > 3 and set(copies.waited) == {given or 1}


@read_sizes
@reads_all
def test_some_straight_to_their_place_and_some_through_buffers(read_bytes: int, reads: str, tmp_path: Path) -> None:
    state = tensors()
    stored = written(tmp_path, state)
    found = {name: torch.zeros(entry.shape, dtype=entry.arriving_as(None)) for name, entry in stored.items()}
    chosen = list(stored)[::2]
    skipped = list(stored)[1]
    wanted = [stored[name].read_into(found[name], name in chosen) for name in stored if name != skipped]
    reader = FileReader(Copies(CPU), reads=reads, read_bytes=read_bytes)
    reader.fill(wanted, digests(stored))
    reader.close()
    for name in stored:
        expected = torch.zeros_like(found[name]) if name == skipped else state[name.removeprefix("0.")]
        assert torch.equal(found[name], expected)


@read_sizes
@pytest.mark.parametrize("where", [0, 9, 200, -1])
@reads_all
def test_a_changed_byte_anywhere_is_refused(read_bytes: int, where: int, reads: str, tmp_path: Path) -> None:
    stored = written(tmp_path, tensors(0), tensors(1))
    path = next(iter(stored.values())).file
    known = digests(stored)
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    reader = FileReader(Copies(CPU), reads=reads, read_bytes=read_bytes)
    with pytest.raises(OverlayError, match="changed since the overlay was written") as caught:
        fill(reader, stored, on_host=False, digests=known)
    assert caught.value.file == str(path) and "blake3" in str(caught.value.expected)
    # The reader is as good as before.
    fill(reader, stored, on_host=False, digests=digests(stored))
    reader.close()


def test_a_file_without_wanted_tensors_is_hashed_too(tmp_path: Path) -> None:
    stored = written(tmp_path, tensors(0), tensors(1))
    known = digests(stored)
    first = {name: entry for name, entry in stored.items() if name.startswith("0.")}
    other = next(entry.file for name, entry in stored.items() if name.startswith("1."))
    reader = FileReader(Copies(CPU))
    fill(reader, first, on_host=True, digests=known)
    with pytest.raises(OverlayError):
        fill(reader, first, on_host=True, digests={**known, other: "0" * 64})
    reader.close()


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("damage", ["shorter", "gone"])
@reads_all
def test_a_file_that_changes_while_it_is_read(damage: str, on_host: bool, reads: str, tmp_path: Path) -> None:
    stored = written(tmp_path, tensors())
    path = next(iter(stored.values())).file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])
    reader = FileReader(Copies(CPU), reads=reads, read_bytes=64)
    with pytest.raises(OverlayError) as caught:
        fill(reader, stored, on_host=on_host)
    assert caught.value.file == str(path) and caught.value.next.startswith("ltxpack verify")
    reader.close()
    assert caught.value.__context__ is not None and caught.value.__context__.__traceback__ is None, "a cycle"


def test_reading_can_be_stopped(tmp_path: Path) -> None:
    stored = written(tmp_path, tensors())
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt

    copies = LateCopies()
    reader = FileReader(copies, read_bytes=16, in_flight=2)
    with pytest.raises(KeyboardInterrupt):
        fill(reader, stored, on_host=False, stop=stop)
    assert copies.left == 0, "the tensors may be freed now"
    found = fill(reader, stored, on_host=False)
    assert all(torch.equal(found[f"0.{name}"], tensor) for name, tensor in tensors().items())
    reader.close()


@reads_all
def test_threads_and_pinned_memory_are_given_back(reads: str, tmp_path: Path) -> None:
    stored = written(tmp_path, tensors())
    copies = LateCopies()
    before = threading.active_count()
    reader = FileReader(copies, reads=reads, read_bytes=64, in_flight=3)
    fill(reader, stored, on_host=False)
    assert copies.pinned == (3 + reading.SPARE_BUFFERS) * PAGE * (1 if reads == CACHED else 3)
    assert threading.active_count() > before
    reader.close()
    del reader
    gc.collect()
    assert copies.pinned == 0
    assert threading.active_count() == before


def test_memory_is_unpinned_before_it_is_freed() -> None:
    copies = LateCopies()
    memory = HostMemory(PAGE + 1, copies)
    assert memory.bytes.nbytes == PAGE + 1 and memory.bytes.data_ptr() % PAGE == 0
    assert memory.pin() and memory.pin()
    assert copies.pinned == 2 * PAGE
    view = memory.bytes[:8]
    del memory
    gc.collect()
    assert copies.pinned == 0
    view.fill_(1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), max_size=12), st.integers(1, 64), st.booleans())
def test_reads_cover_what_is_wanted_once(gaps: list[tuple[int, int]], limit: int, whole: bool) -> None:
    path, sources, end = Path("covered"), [], 0
    for gap, size in gaps:
        sources.append(Range(path, end + gap, size))
        end += gap + size
    size = end + 5
    wanted = [TensorRead(source, torch.uint8, torch.empty(source.nbytes, dtype=torch.uint8)) for source in sources]
    planned = list(plan_reads(wanted, [Range(path, 0, size)] if whole else [], limit))
    read = [0] * size
    for each in planned:
        assert 0 < each.nbytes <= limit
        for stretch in each.stretches:
            for position in range(stretch.start, stretch.start + stretch.nbytes):
                read[position] += 1
            if stretch.target is not None:
                assert stretch.start == stretch.target.source.start + stretch.offset
    expected = [int(whole) for _ in read]
    for source in sources:
        expected[source.start : source.start + source.nbytes] = [1] * source.nbytes
    assert read == expected


def test_more_tensors_than_the_system_takes_in_one_call(tmp_path: Path) -> None:
    state = {f"{number:04}": torch.tensor([number]) for number in range(2 * VIEWS_PER_READ + 3)}
    stored = written(tmp_path, state)
    reader = FileReader(Copies(CPU))
    found = fill(reader, stored, on_host=True)
    reader.close()
    assert all(found[f"0.{name}"] == tensor for name, tensor in state.items())


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_large_memory_begins_on_a_huge_page(nbytes: int) -> None:
    memory = HostMemory(nbytes, Copies(CPU))
    assert memory.bytes.nbytes == nbytes and memory.bytes.data_ptr() % PAGE == 0
    if nbytes >= HUGE_PAGE:
        assert memory.bytes.data_ptr() % HUGE_PAGE == 0
    before = own_memory()
    memory.bytes.fill_(7)
    assert own_memory() - before <= -(-nbytes // PAGE) * PAGE + 2**20, "no more than asked for"
    assert not nbytes or memory.bytes.max() == memory.bytes.min() == 7


def test_memory_that_is_not_to_be_had() -> None:
    with pytest.raises(MemoryError, match="bytes of host memory"):
        HostMemory(1 << 60, Copies(CPU))
