"""Packed projections: the same numbers under the same names, nothing stored twice, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dit_parts import SMALL, built, random_streams, random_weights
from support import relative_l2
from test_dit_golden import FP32_LIMIT, Recorded
from torch import Tensor

from ltxpack.reporter import SilentReporter
from ltxpack.runtime.model import DiT, DiTConfig, Stream
from ltxpack.runtime.sampling.av import AV
from ltxpack.runtime.tuning import Tuning, tune

UNBIASED = SMALL | {"attention_bias": False}
LENGTHS = AV(24, 9)


def fresh(config: dict[str, Any] = SMALL, seed: int = 0) -> DiT:
    return built(config, random_weights(config, seed))


def packed(config: dict[str, Any] = SMALL) -> DiT:
    dit = fresh(config)
    dit.pack()
    return dit


def distance(found: AV[Tensor], expected: AV[Tensor]) -> float:
    return max(relative_l2(found.video, expected.video), relative_l2(found.audio, expected.audio))


def stored_bytes(dit: DiT) -> int:
    """Of every storage a tensor of the model lies in, packed ones included."""
    tensors = [*dit.parameters(), *dit.buffers()]
    for module in dit.modules():
        tensors += [part for part in getattr(module, "packed", None) or () if part is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("config", [SMALL, UNBIASED], ids=["biased", "unbiased"])
@pytest.mark.parametrize("isolated", [False, True])
def test_the_same_numbers(config: dict[str, Any], isolated: bool) -> None:
    plain, dit = fresh(config), packed(config)
    streams = random_streams(plain, LENGTHS)
    perturbed = AV(frozenset({1}), frozenset[int]())
    for arguments in ({"isolated": isolated}, {"isolated": isolated, "perturbed": perturbed}):
        assert distance(dit(streams, **arguments), plain(streams, **arguments)) <= 1e-6


def test_one_product_for_what_has_one_input() -> None:
    dit = packed()
    for block in dit.blocks():
        video, audio = dit.config.streams.video.dim, dit.config.streams.audio.dim
        found = [module.packed.weight.shape for module in block.children() if hasattr(module, "packed")]
        queries_too = [(3 * video, video), (3 * audio, audio)]  # self-attentions
        text, across = [(2 * video, video), (2 * audio, audio)], [(2 * audio, audio), (2 * audio, video)]
        assert sorted(map(tuple, found)) == sorted([*queries_too, *text, *across])


def test_names_and_values_stay_and_nothing_is_stored_twice() -> None:
    plain, dit = fresh(), fresh()
    before = stored_bytes(dit)
    dit.pack()
    assert stored_bytes(dit) == before == sum(value.nbytes for value in plain.state_dict().values())
    found, expected = dit.state_dict(), plain.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_later_are_used(assign: bool) -> None:
    dit, other = packed(), fresh(seed=1)
    streams = random_streams(dit, LENGTHS)
    before = dit(streams)
    dit.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
    assert distance(dit(streams), other(streams)) <= 1e-6
    assert distance(dit(streams), before) > 1e-3
    assert stored_bytes(dit) == stored_bytes(other)


def test_a_model_that_is_cast_or_moved_goes_as_a_whole() -> None:
    dit, plain = packed().to(torch.float64), fresh().to(torch.float64)
    streams = random_streams(plain, LENGTHS)
    wide = streams.map(_double)
    assert distance(dit(wide), plain(wide)) <= 1e-12
    assert stored_bytes(dit) == stored_bytes(plain)
    gone = dit.to("meta")
    assert all(tensor.is_meta for tensor in gone.parameters())
    assert all(block.attn1.packed is None for block in gone.blocks()), "no memory is held"


def _double(stream: Stream) -> Stream:
    def cast(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    rope = type(stream.rope)(*(type(turn)(*map(cast, turn)) for turn in vars(stream.rope).values()))
    return Stream(**{name: cast(value) for name, value in vars(stream).items()} | {"rope": rope})


def test_weights_that_are_not_there_yet_cannot_be_packed() -> None:
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(SMALL))
    with pytest.raises(ValueError, match="after they are loaded"):
        dit.pack()


def test_packed_and_compiled() -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    dit, plain = packed(), fresh()
    dit.compile_blocks(backend=backend, fullgraph=True)
    for lengths in (LENGTHS, AV(50, 14)):
        streams = random_streams(plain, lengths)
        assert distance(dit(streams), plain(streams)) <= 1e-6
    torch.compiler.reset()
    # text: 1 each. attend: qkv, gate, out; q, gate, out each. exchange: kv, q, gate, out each; 2 of feed-forward each.
    assert graphs == [2, 12, 12]


def test_every_recorded_forward(latents_golden: Path) -> None:
    recorded = Recorded.read(latents_golden, "fp32")
    tune(recorded.dit, Tuning(pack=True), SilentReporter())
    assert all(block.attn1.packed is not None for block in recorded.dit.blocks())
    errors = {
        name: relative_l2(value, recorded.tensors[name])
        for case in recorded.cases()
        for name, value in recorded.run(case)
    }
    assert len(errors) >= 4
    assert {name: error for name, error in errors.items() if not error <= FP32_LIMIT} == {}
