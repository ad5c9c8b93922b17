"""The arithmetic: bit-equal to the official fuse, one rounding under the fp32 rule, on any number of threads."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_support import fuse_fp32

from ltxpack.lora_bake import fuse
from ltxpack.lora_bake.fuse import (
    Term,
    choose_kernel,
    cpu_has_bf16_unit,
    fuse_official,
    fuse_rows,
    row_chunks,
    row_parts,
)
from ltxpack.lora_bake.quantise import rotate


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def factors(out: int, columns: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Term:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, columns), generator=generator) * columns**-0.5
    up = torch.randn((out, rank), generator=generator) * 0.3
    return Term(1.0, down.to(dtype), up.to(dtype))


def matrix(out: int, columns: int, seed: int = 9, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn((out, columns), generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def exact(weight: torch.Tensor, terms: list[Term], scales: list[float]) -> torch.Tensor:
    total = weight.double()
    for term, scale in zip(terms, scales, strict=True):
        assert term.up is not None and term.down is not None
        total = total + scale * term.factor * (term.up.double() @ term.down.double())
    return total


def wrong_share(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of elements that are not the correctly rounded float64 result."""
    return (found != reference.float().to(found.dtype)).float().mean().item()


# The official rule


def test_official_rule_differs_from_fp32_only_by_rounding() -> None:
    weight, term = matrix(64, 96), factors(64, 96, 8)
    official, _ = fuse_official(weight, [term], [0.7])
    single = fuse_fp32(weight, [term], [0.7]).bfloat16()
    assert not torch.equal(official, single)
    assert torch.allclose(official.float(), single.float(), rtol=2**-6, atol=2**-9)


@pytest.mark.parametrize("rank", [4, 64])
def test_official_products_through_fp32_are_the_rounded_products_of_the_bf16_factors(rank: int) -> None:
    """Two LoRAs, so that the second is added to a rounded product; held against float64."""
    weight, terms, strengths = matrix(64, 96), [factors(64, 96, rank, seed=seed) for seed in (1, 2)], [0.3, -0.7]
    delta = torch.zeros(64, 96, dtype=torch.bfloat16)
    for i, (term, strength) in enumerate(zip(terms, strengths, strict=True)):
        up = (term.up * strength if i == 0 else term.up).double()
        product = up @ term.down.double()
        delta = (product if i == 0 else delta.double() + strength * product).float().bfloat16()
    expected = delta + weight
    found, _ = fuse_official(weight, terms, strengths, through=torch.float32)
    assert wrong_share(found, expected.double()) < 1e-3
    assert wrong_share(fuse_official(weight, terms, strengths)[0], found.double()) < 1e-3


def test_official_rule_ignores_alpha_and_has_no_dora() -> None:
    weight, term = matrix(32, 32), factors(32, 32, 4)
    twice = Term(2.0, term.down, term.up)
    assert torch.equal(fuse_official(weight, [term], [0.7])[0], fuse_official(weight, [twice], [0.7])[0])
    with pytest.raises(ValueError, match="DoRA"):
        fuse_official(weight, [Term(1.0, term.down, term.up, torch.ones(32, 1))], [1.0])


def test_official_rule_stores_a_float32_weight_rounded_to_bf16() -> None:
    weight = matrix(32, 32, dtype=torch.float32)
    found, _ = fuse_official(weight, [factors(32, 32, 4, dtype=torch.float32)], [1.0])
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())


# The fp32 rule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fp32_rule_rounds_once(dtype: torch.dtype, count: int) -> None:
    weight = matrix(96, 160, dtype=torch.bfloat16)
    terms = [factors(96, 160, 8, seed, dtype) for seed in range(count)]
    scales = [0.7, -0.3, 1.3][:count]
    total = fuse_fp32(weight, terms, scales)
    reference = exact(weight, terms, scales)
    assert ((total.double() - reference).norm() / reference.norm()).item() < 3e-7
    assert wrong_share(total.bfloat16(), reference) < 1e-3


SHAPES = [(512, 1024, 384), (32, 1024, 32), (128, 512, 128), (512, 128, 128), (256, 256, 256), (64, 64, 8), (4, 64, 4)]


@pytest.mark.skipif(not cpu_has_bf16_unit(), reason="this CPU has no bf16 matrix unit, so addmm is not chosen here")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_addmm_kernel_is_as_accurate(shape: tuple[int, int, int]) -> None:
    out, columns, rank = shape
    weight, term = matrix(out, columns), factors(out, columns, rank)
    [found] = fuse_rows(weight, [term], [[0.7]], "addmm")
    [plain] = fuse_rows(weight, [term], [[0.7]], "fp32")
    reference = exact(weight, [term], [0.7])
    assert wrong_share(found.weight, reference) <= 3e-4 and wrong_share(plain.weight, reference) <= 3e-4
    assert found.stat.changed == pytest.approx(plain.stat.changed, rel=1e-3)
    assert math.sqrt(found.stat.delta_square) == pytest.approx(math.sqrt(plain.stat.delta_square), rel=3e-3)


@pytest.mark.skipif(not cpu_has_bf16_unit(), reason="this CPU has no bf16 matrix unit, so fp32-bf16 is not chosen here")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bf16_unit_sums_in_fp32(shape: tuple[int, int, int]) -> None:
    out, columns, rank = shape
    weight, terms = matrix(out, columns), [factors(out, columns, rank, seed) for seed in (1, 2)]
    reference = exact(weight, terms, [0.7, -0.3])
    total, before = torch.empty(out, columns), torch.backends.mkldnn.matmul.fp32_precision
    with fuse.precision_of("fp32-bf16"):
        assert torch.backends.mkldnn.matmul.fp32_precision != before
        fuse_rows(weight, terms, [[0.7, -0.3]], "fp32-bf16", into=[total])
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert ((total.double() - reference).norm() / reference.norm()).item() < 3e-7
    assert wrong_share(total.bfloat16(), reference) < 1e-3


@pytest.mark.parametrize("inputs", [256 * 16, 64 * 3, 16 * 5, 4 * 7])
def test_the_bf16_unit_leaves_rotations_alone(inputs: int) -> None:
    rows, found = torch.randn(512, inputs), []
    for kernel in ("fp32", "fp32-bf16"):
        with fuse.precision_of(kernel):
            found.append(rotate(rows, fuse.Workspace()))
    assert torch.equal(*found)


@pytest.mark.parametrize("kernel", ["fp32", "fp32-bf16", "addmm", "official"])
def test_bits_do_not_depend_on_threads(kernel: str) -> None:
    weight, term = matrix(768, 1024), factors(768, 1024, 96)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with fuse.precision_of(kernel):
            results.append(fuse_rows(weight, [term], [[0.7]], kernel)[0])
    assert all(torch.equal(a.weight, b.weight) for a, b in itertools.pairwise(results))
    assert len({(result.stat.base_square, result.stat.changed) for result in results}) == 1


@pytest.mark.parametrize("kernel", ["fp32", "addmm", "official"])
def test_several_strengths_at_once_give_what_each_gives_alone(kernel: str) -> None:
    weight, terms = matrix(64, 96), [factors(64, 96, 8, 1)]
    if kernel != "addmm":
        terms.append(factors(64, 96, 4, 2))
    strengths = [row[: len(terms)] for row in ([0.25, 0.8], [1.0, 0.8], [0.7, -0.1])]
    together = fuse_rows(weight, [term.prepared(kernel, fuse.Workspace()) for term in terms], strengths, kernel)
    for row, found in zip(strengths, together, strict=True):
        [alone] = fuse_rows(weight, terms, [row], kernel)
        assert torch.equal(found.weight, alone.weight) and found.stat.changed == alone.stat.changed
        assert math.isclose(found.stat.delta_square, alone.stat.delta_square, rel_tol=1e-6)


def test_order_of_loras_is_kept() -> None:
    """With DoRA the order shows: the last term decides the norms."""
    weight, first, second = matrix(16, 16), factors(16, 16, 4, 1), factors(16, 16, 4, 2)
    scaled = Term(1.0, second.down, second.up, torch.ones(16, 1))
    last = fuse_fp32(weight, [first, scaled], [1.0, 1.0])
    not_last = fuse_fp32(weight, [scaled, first], [1.0, 1.0])
    assert torch.allclose(last.norm(dim=1), torch.ones(16), atol=1e-5)
    assert not torch.allclose(not_last.norm(dim=1), torch.ones(16), atol=1e-3)


def test_a_row_range_of_a_term_is_the_term_of_a_row_range() -> None:
    weight, term = matrix(48, 64), factors(48, 64, 8)
    term = Term(2.0, term.down, term.up, torch.rand(48, 1) + 0.5, matrix(48, 64, 3))
    whole = fuse_fp32(weight, [term], [0.7])
    cut = torch.cat([fuse_fp32(weight[a:b], [term.rows(a, b)], [0.7]) for a, b in [(0, 16), (16, 17), (17, 48)]])
    assert torch.allclose(whole, cut, rtol=1e-6, atol=1e-7)


def test_what_is_measured() -> None:
    weight, term = matrix(64, 96), factors(64, 96, 8)
    [found] = fuse_rows(weight, [term], [[0.7]], "fp32")
    assert found.stat.base_square == pytest.approx(weight.double().square().sum().item(), rel=1e-5)
    delta = exact(weight, [term], [0.7]) - weight.double()
    assert found.stat.delta_square == pytest.approx(delta.square().sum().item(), rel=1e-4)
    assert found.stat.changed == int((found.weight != weight).sum())
    assert found.finite


@pytest.mark.parametrize("over_base", [False, True])
@pytest.mark.parametrize("over_inputs", [False, True])
def test_a_row_of_zeros_stays_zero_under_dora(over_base: bool, over_inputs: bool) -> None:
    weight, size = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), (1, 2) if over_inputs else (2,)
    weight = weight.T.contiguous() if over_inputs else weight
    term = Term(magnitude=torch.full(size, 10.0), over_inputs=over_inputs, over_base=over_base, needs_whole=over_inputs)
    [found] = fuse_rows(weight, [term], [[1.0]], "fp32")
    assert torch.equal(found.weight, 2 * weight) and found.finite


@pytest.mark.parametrize("kernel", ["fp32", "addmm"])
def test_weights_are_the_same_where_nothing_is_measured(kernel: str) -> None:
    weight, term = matrix(64, 96), factors(64, 96, 8)
    known, bare = (
        fuse_rows(weight, [term.prepared(kernel, fuse.Workspace(), measure)], [[0.7], [0.0]], kernel, measure=measure)
        for measure in (True, False)
    )
    for measured, other in zip(known, bare, strict=True):
        assert torch.equal(measured.weight, other.weight) and measured.finite and other.finite
        assert other.largest == other.weight.abs().max() and not any(other.stat)


@pytest.mark.parametrize("measure", [True, False])
def test_overflow_of_the_stored_dtype_is_seen_in_any_row_chunk(measure: bool) -> None:
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    up = torch.zeros(8, 1, dtype=torch.bfloat16)
    up[7] = 3e38
    term = Term(1.0, torch.full((1, 8), 3.0, dtype=torch.bfloat16), up)
    for kernel in ("fp32", "addmm", "official"):
        ready = term.prepared(kernel, fuse.Workspace(), measure)
        first, last = (
            fuse_rows(weight[a : a + 4], [ready.rows(a, a + 4)], [[1.0]], kernel, measure=measure)[0] for a in (0, 4)
        )
        assert first.finite and not last.finite, kernel
    weight = torch.full((4, 4), 60000.0, dtype=torch.float16)
    term = Term(1.0, torch.full((1, 4), 100.0), torch.full((4, 1), 100.0))
    found = [fuse_rows(weight, [term], [[sign]], "fp32", measure=measure)[0].finite for sign in (1.0, -1.0)]
    assert found == [False, True]


def test_uneven_factors_do_not_overflow_the_norm() -> None:
    weight, term = matrix(64, 96), factors(64, 96, 100)
    assert term.up is not None and term.down is not None
    even = fuse_rows(weight, [term], [[0.7]], "addmm")[0]
    uneven = fuse_rows(weight, [Term(1.0, term.down * 2.0**-70, term.up * 2.0**70)], [[0.7]], "addmm")[0]
    assert uneven.finite and uneven.stat.delta_square == pytest.approx(even.stat.delta_square, rel=2e-2)
    exact = (0.7 * term.up.double() @ term.down.double()).square().sum().item()
    assert even.stat.delta_square == pytest.approx(exact, rel=2e-2)


def test_row_chunks_add_up_to_the_whole() -> None:
    weight, term = matrix(64, 96), factors(64, 96, 8)
    [whole] = fuse_rows(weight, [term], [[0.7]], "addmm")
    ready = term.prepared("addmm", fuse.Workspace())
    parts = [fuse_rows(weight[a : a + 16], [ready.rows(a, a + 16)], [[0.7]], "addmm")[0] for a in range(0, 64, 16)]
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
    assert sum(part.stat.delta_square for part in parts) == pytest.approx(whole.stat.delta_square)
    assert sum(part.stat.base_square for part in parts) == pytest.approx(whole.stat.base_square)
    assert sum(part.stat.changed for part in parts) == whole.stat.changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_changed_elements_are_counted_by_their_bits(dtype: torch.dtype) -> None:
    before = torch.zeros(300_001, dtype=dtype)
    after = before.clone()
    after[[0, 77, 300_000]] = 1
    after[5] = -0.0
    assert fuse.count_changed(before, after) == 4


@pytest.mark.parametrize("shape", [(1,), (5000,), (7, 3), (4096, 4096), (3, 9_000_000)])
def test_row_chunks_cover_every_row_once(shape: tuple[int, ...]) -> None:
    for ranges in (row_chunks(shape, "fp32"), row_chunks(shape, "addmm"), row_parts(shape)):
        assert list(itertools.chain.from_iterable(range(a, b) for a, b in ranges)) == list(range(shape[0]))
    assert list(row_chunks(shape, "official")) == [(0, shape[0])], "never cut"


def test_the_kernel_is_chosen_by_what_is_exact_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for unit, rule, loras, plain, device, kernel in (
        (True, "fp32", 1, True, "cpu", "addmm"), (True, "fp32", 2, True, "cpu", "fp32-bf16"),
        (True, "fp32", 2, False, "cpu", "fp32"), (True, "fp32", 2, True, "cuda", "fp32"),
        (True, "fp32", 1, False, "cuda", "fp32"), (True, "official", 1, True, "cpu", "official"),
        (False, "fp32", 1, True, "cpu", "fp32"), (False, "fp32", 1, True, "cuda", "addmm"),
        (False, "official", 2, True, "cpu", "official"), (False, "official", 1, True, "cuda", "official"),
    ):  # fmt: skip
        monkeypatch.setattr(fuse, "cpu_has_bf16_unit", lambda unit=unit: unit)
        assert choose_kernel(rule, loras, plain, device) == kernel
        slow = rule == "official" and not unit and device == "cpu"
        assert choose_kernel(rule, loras, plain, device, flop=14.6e12) == ("official-fp32" if slow else kernel)
    monkeypatch.setattr(fuse, "cpu_has_bf16_unit", lambda: True)
    assert choose_kernel("fp32", 1, True, "cpu", codes=True) == "fp32-bf16"
    assert choose_kernel("fp32", 1, True, "cuda", codes=True) == "fp32"


@pytest.mark.parametrize(
    ("text", "has"),
    [("flags\t\t: fpu sse2 avx512_bf16 ht\n", True),
     ("flags\t: fpu amx_bf16 amx_tile\n", True), ("flags : fpu avx2\n", False),
     ("model name: amx_bf16\n", False), ("", False)],
)  # fmt: skip
def test_the_bf16_unit_is_read_from_the_cpu_flags(text: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_has_bf16_unit(tmp_path / "cpuinfo") is (has and torch.backends.mkldnn.is_available())
    assert cpu_has_bf16_unit(tmp_path / "absent") is False


def test_square_sum_of_every_length() -> None:
    for count in (0, 1, 7, (1 << 18) + 3):
        values = torch.linspace(-1, 1, count).bfloat16()
        assert fuse.square_sum(values) == pytest.approx(np.square(values.double().numpy()).sum(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_beyond_float32_are_summed_too(dtype: torch.dtype) -> None:
    """A damaged LoRA has such factors; a report with Infinity would be no JSON."""
    assert fuse.square_sum(torch.full((3, 5000), -(2.0**127), dtype=dtype)) == 15000 * 2.0**254


def test_products_that_overflow_say_nothing_of_numpy(recwarn: pytest.WarningsRecorder) -> None:
    terms = [
        Term(1.0, term.down.float() * 1e30, term.up.float() * 1e30) for term in map(factors, (8, 8), (8, 8), (2, 2))
    ]
    [fused] = fuse_rows(matrix(8, 8), terms, [[1.0, -1.0]], "fp32")
    assert not fused.finite and not recwarn.list
