"""The same on a GPU: pinned copies on a stream of their own, while the card computes; and memory against the plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from dit_parts import SMALL, random_streams, random_weights
from ltxpack.runtime.weights.offload import CARD, FILE, MEMORY, Offloaded, Placement, PlacingReader
from safetensors.torch import save_file
from torch import Tensor

from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT, Stream
from ltxpack.runtime.model.rope import RopeTables, Rotation
from ltxpack.runtime.sampling.av import AV
from ltxpack.runtime.weights.copies import CudaCopies, HostMemory
from ltxpack.runtime.weights.device import machine_of
from ltxpack.runtime.weights.load import load_module
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
EVERY = frozenset(range(LAYERS))
PLACEMENTS = {
    "staged": Placement(rest=MEMORY),
    "kept in memory": Placement(rest=MEMORY, keep=True),
    "every block from memory": Placement(CARD, MEMORY, "transformer_blocks", EVERY),
    "some blocks from memory": Placement(CARD, MEMORY, "transformer_blocks", frozenset({1, 3, 5})),
    "every block from the file": Placement(CARD, FILE, "transformer_blocks", EVERY),
    "all in memory, some streamed": Placement(MEMORY, MEMORY, "transformer_blocks", frozenset({0, 2, 4}), keep=True),
    "some from memory, some held": Placement(
        CARD, MEMORY, "transformer_blocks", frozenset({1, 3, 5}), held=frozenset({0, 1, 3})
    ),
    "some from the file, some held": Placement(
        CARD, FILE, "transformer_blocks", frozenset({0, 2, 3, 4}), held=frozenset({1, 2})
    ),
}


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


def moved(stream: Stream, device: torch.device) -> Stream:
    def turned(rotation: Rotation) -> Rotation:
        return Rotation(*(part.to(device, torch.bfloat16) for part in rotation))

    return Stream(
        latents=stream.latents.to(device, torch.bfloat16),
        timesteps=stream.timesteps.to(device),
        timestep_index=None,
        sigma=stream.sigma.to(device),
        context=stream.context.to(device, torch.bfloat16),
        rope=RopeTables(turned(stream.rope.self_attention), turned(stream.rope.cross_attention)),
    )


def outputs(dit: DiT, device: torch.device) -> list[Tensor]:
    """Several evaluations without a wait between them."""
    streams = random_streams(empty_dit(), AV(512, 64)).map(lambda stream: moved(stream, device))
    found = [dit(streams) for _ in range(4)]
    return [tensor.cpu() for velocity in found for tensor in (velocity.video, velocity.audio)]


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
def test_every_placement_gives_the_same_bits(placement: Placement, folder: Path, device: torch.device) -> None:
    expected = outputs(load_module(empty_dit(), folder, device, torch.bfloat16), device)
    digests = {path: blake3(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    reader = FileReader(CudaCopies(device), read_bytes=1 << 20)
    read = PlacingReader(placement, digests, reader, CudaCopies(device))
    with torch.inference_mode():
        module = load_module(empty_dit(), folder, device, torch.bfloat16, reader=read)
    reader.close()
    assert read.unpinned == 0
    held = Offloaded(module, read)
    for _ in range(2 if placement.keep or placement.rest == CARD else 1):
        with torch.inference_mode(), held.on_card() as dit:
            found = outputs(dit, device)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    held.drop()


def test_memory_is_pinned_and_given_back(device: torch.device) -> None:
    copies = CudaCopies(device)
    for size in (1, 5000, 1 << 22):
        memory = HostMemory(size, copies)
        assert memory.pin()
        assert memory.bytes.is_pinned()
        bare = memory.bytes
        del memory
        assert not bare.is_pinned()


def test_streaming_takes_two_slots_and_not_the_blocks(folder: Path, device: torch.device) -> None:
    reader = FileReader(CudaCopies(device))
    read = PlacingReader(PLACEMENTS["every block from memory"], {}, reader, CudaCopies(device))
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        held = Offloaded(load_module(empty_dit(), folder, device, torch.bfloat16, reader=read), read)
    reader.close()
    rest = torch.cuda.memory_allocated(device) - before
    blocks = sum(source.layout.nbytes for source in read.sources.values())
    with torch.inference_mode(), held.on_card():
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
