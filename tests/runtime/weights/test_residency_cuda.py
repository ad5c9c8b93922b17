"""The same on a GPU: pinned copies on a stream of their own, while the card computes; and memory against the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from dit_parts import SMALL, cast, random_streams, random_weights
from safetensors.torch import save_file
from torch import Tensor
from works import digests, of_blocks

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.weights.copies import Copies, HostMemory
from ltxpack.runtime.weights.device import machine_of
from ltxpack.runtime.weights.load import load_module
from ltxpack.runtime.weights.placed import PlacedModule, PlacementReader
from ltxpack.runtime.weights.plan import Placement
from ltxpack.runtime.weights.reading import FileReader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LAYERS = 6
# Wide enough that a block takes longer to copy and to compute than to ask for.
WIDE = SMALL | {
    "num_attention_heads": 16,
    "attention_head_dim": 64,
    "cross_attention_dim": 1024,
    "audio_num_attention_heads": 16,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 512,
    "num_layers": LAYERS,
}
PLACEMENTS = of_blocks(LAYERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "transformer"
    folder.mkdir()
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(WIDE).items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def device() -> Iterator[torch.device]:
    yield torch.device("cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def empty_dit() -> DiT:
    with torch.device("meta"):
        return DiT(DiTConfig.from_dict(WIDE))


def outputs(dit: DiT, device: torch.device) -> list[Tensor]:
    """Several evaluations without a wait between them."""
    streams = cast(random_streams(empty_dit(), AV(512, 64)), torch.bfloat16, device)
    found = [dit(streams) for _ in range(4)]
    return [tensor.cpu() for velocity in found for tensor in (velocity.video, velocity.audio)]


def load(
    placement: Placement, known: Mapping[Path, str], reader: FileReader, folder: Path, device: torch.device
) -> tuple[PlacedModule[DiT], PlacementReader]:
    read = PlacementReader(placement, "transformer_blocks", known, reader, Copies(device), to_host=placement.ahead)
    with torch.inference_mode():
        return PlacedModule(load_module(empty_dit(), folder, device, torch.bfloat16, reader=read), read), read


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_every_placement_gives_the_same_bits(placement: Placement, folder: Path, device: torch.device) -> None:
    expected = outputs(load_module(empty_dit(), folder, device, torch.bfloat16), device)
    reader = FileReader(Copies(device), read_bytes=1 << 20)
    placed, _ = load(placement, digests(folder), reader, folder, device)
    reader.close()
    assert placed.unpinned == 0
    for _ in range(1 if placement.ahead else 2):
        with torch.inference_mode(), placed.in_use() as dit:
            found = outputs(dit, device)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    placed.drop()


def test_memory_is_pinned_and_given_back(device: torch.device) -> None:
    copies = Copies(device)
    for size in (1, 5000, 1 << 22):
        memory = HostMemory(size, copies)
        assert memory.pin()
        assert memory.bytes.is_pinned()
        bare = memory.bytes
        del memory
        assert not bare.is_pinned()


def test_streaming_takes_two_slots_and_not_the_blocks(folder: Path, device: torch.device) -> None:
    reader = FileReader(Copies(device))
    before = torch.cuda.memory_allocated(device)
    placed, read = load(PLACEMENTS["every block from the file"], {}, reader, folder, device)
    reader.close()
    rest = torch.cuda.memory_allocated(device) - before
    blocks = sum(source.layout.nbytes for source in read.sources.values())
    with torch.inference_mode(), placed.in_use():
        slots = torch.cuda.memory_allocated(device) - before - rest
    assert slots == pytest.approx(2 * blocks / LAYERS, rel=0.02)
    assert rest < blocks
    assert torch.cuda.memory_allocated(device) - before == rest


def test_what_the_machine_has_counts_what_we_hold(device: torch.device) -> None:
    before = machine_of(device).card
    held = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    after = machine_of(device).card
    assert before is not None and after is not None
    assert abs(before - after) < held.nbytes / 4
