"""Quantised linears against what the official model and spec 09 give, alone and in whole forwards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from codec_parts import checkpoint_of
from dit_parts import SMALL, SMALL_WEIGHTS, cast, distance, random_streams, tracing
from hypothesis import assume, given
from hypothesis import strategies as st
from quantised_parts import ROOT, coded, kronecker, recorded_folder, write_transformer
from support import load, relative_l2
from test_dit_golden import Recorded, call_of
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch.nn import functional as F

from ltxpack.errors import OverlayError, UnsupportedError
from ltxpack.ltx23.codes import E4M3, I8
from ltxpack.runtime.model import quantised
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.layers import Linear, Made, modulate
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.quantised import KINDS, QuantisedLinear, quantised_linears
from ltxpack.runtime.model.weights import load_dit
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.settings import STATIC, TOKEN, WEIGHTS

CPU = torch.device("cpu")
# As in GOLDEN.md: how the recorded variants compute.
MODES = {"w8a16": WEIGHTS, "token": TOKEN, "unit": STATIC, "static": STATIC}
# A forward is no continuous function of its codes, so only decoded weights can be compared closely.
FORWARD_LIMITS = {"bf16": 1e-4, "w8a16": 1e-4, "int8.token": 1e-2, "static": 3e-2, "unit": 3e-2, "tensor.token": 3e-2}


def linear(form: str, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> QuantisedLinear:
    """A quantised linear that holds ``tensors``, its bias in ``dtype``."""
    with torch.device("meta"):
        found = KINDS[form](Linear(*reversed(tensors["weight"].shape)))
    for name, tensor in tensors.items():
        setattr(found, name, nn.Parameter(tensor.to(dtype) if name == "bias" else tensor, requires_grad=False))
    return found


def test_every_recorded_linear_is_reproduced(golden: Path) -> None:
    """A scale a row too, which no bake has; ``static_bf16``, the official linear, bit for bit."""
    tensors = load(golden / "golden" / "fp8_transformer_s0.5_fp32.safetensors")
    stored, base = load(golden / "golden" / "fp8_weights_s0.5.safetensors"), load(checkpoint_of(golden))
    found = []
    for where, expected in tensors.items():
        case = re.fullmatch(r"linear\.(.+)\.(tensor|row|int8)\.(\w+)", where)
        if case is None:
            continue
        name, scales, kind = case.groups()
        parts = ("weight", "weight_scale", "input_scale")
        own = {part: stored[key] for part in parts if (key := f"{scales}.{name}.{part}") in stored}
        if kind == "static_clipped":
            own["input_scale"] = own["input_scale"] / 3
        bias, x = base[f"{ROOT}{name}.bias"], tensors[f"linear.{name}.x"].to(expected.dtype)
        layer = linear(
            I8 if scales == "int8" else E4M3, x.dtype, bias=bias, **{k: v for k, v in own.items() if v is not None}
        )
        layer.mode = MODES[kind.split("_")[0]]
        with torch.inference_mode():
            (y,) = layer(x[None])
        assert relative_l2(y, expected) <= 1e-5, where
        assert kind != "static_bf16" or torch.equal(y, expected), where
        found.append(kind)
    assert len(found) == 8 * 7 + 8 * 2, found


@pytest.mark.parametrize("variant", ["bf16", "tensor", "int8"])
def test_every_recorded_forward_is_reproduced_from_a_loaded_folder(variant: str, golden: Path, tmp_path: Path) -> None:
    dit = load_dit(recorded_folder(golden, tmp_path / "bake", variant), CPU, torch.float32)
    inputs = load(golden / "golden" / "transformer_fp32.safetensors")
    expected = load(golden / "golden" / "fp8_transformer_s0.5_fp32.safetensors")
    names = {name.rsplit(".", 1)[0] for name in expected if re.match(rf"{variant}\..*velocity", name)}
    assert len(names) == {"bf16": 3, "tensor": 12, "int8": 6}[variant]
    linears = quantised_linears(dit)
    assert len(linears) == {"bf16": 0, "tensor": 68, "int8": 34}[variant]
    assert {layer.weight_scale.dtype for layer in linears} <= {torch.float32}
    scales = [layer.input_scale for layer in linears if variant == "tensor"]
    for name in sorted(names):
        kind, case = name.split(".")[-2:]
        for layer in linears:
            layer.mode = MODES[kind]
        for layer, scale in zip(linears, scales, strict=variant == "tensor"):
            layer.input_scale = nn.Parameter(torch.ones(()) if kind == "unit" else scale, requires_grad=False)
        recorded = Recorded(inputs, dit)
        velocity = recorded.forward(recorded.streams(case), call_of(case))["{}_velocity"]
        limit = FORWARD_LIMITS.get(kind) or FORWARD_LIMITS[f"{variant}.{kind}"]
        for modality in ("video", "audio"):
            assert relative_l2(getattr(velocity, modality), expected[f"{name}.{modality}_velocity"]) <= limit, name


def small(form: str, dtype: torch.dtype = torch.float32, blocks: tuple[int, ...] = (0, 1)) -> DiT:
    """The small DiT with these blocks in codes."""
    weights = coded({name: value.to(dtype) for name, value in SMALL_WEIGHTS.items()}, form, blocks)
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(SMALL))
    scales = (name.removesuffix(".weight_scale") for name in weights if name.endswith(".weight_scale"))
    quantised.put_quantised(dit, dict.fromkeys(scales, form))
    dit.load_state_dict(weights, strict=True, assign=True)
    return dit.requires_grad_(False)


def layers(form: str) -> tuple[nn.ModuleList, Callable[[Tensor, Tensor], Tensor]]:
    """Three linears, and a function of them: two share an input, as q and k do, the third takes what they give."""
    generator = torch.Generator().manual_seed(0)
    weights = {"0.weight": torch.randn(64, 64, generator=generator)}
    held = coded({f"transformer_blocks.{name}": weight for name, weight in weights.items()}, form, [0])
    parts = {name.rpartition(".")[2]: value for name, value in held.items()}
    linears = nn.ModuleList(linear(form, torch.bfloat16, bias=torch.ones(64), **parts) for _ in range(3))

    def function(x: Tensor, scale: Tensor) -> Tensor:
        made: Made = {}
        own = modulate(F.rms_norm(x, x.shape[-1:]), scale, scale)
        return linears[2](F.gelu(linears[0](own, made)) * linears[1](own, made))

    return linears, function


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, tokens, 64, generator=generator).bfloat16(), torch.ones(1, 1, 64).bfloat16()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("form", [E4M3, I8])
def test_some_steps_may_decode_and_every_mode_is_one_graph(form: str) -> None:
    linears, function = layers(form)
    graphs, backend = tracing()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    found = {}
    for count, flag in ((1, False), (2, True), (2, False)):
        quantised.decode_weights(linears, flag)
        for tokens in (48, 80):
            found[flag] = compiled(*inputs(tokens))
            assert torch.equal(found[flag], function(*inputs(tokens)))
        assert len(graphs) == count
    assert relative_l2(found[False], found[True]) > 1e-3


class Stop(Exception):
    """The code is there; nothing needs to be built."""


@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiler_makes_codes_where_it_makes_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number that becomes codes is written as a number, and linears that share an input share its codes."""
    code: list[str] = []

    def keep(graph: GraphLowering) -> None:
        code.append(graph.codegen()[0].value)
        raise Stop

    monkeypatch.setattr(GraphLowering, "compile_to_module", keep)
    with pytest.raises(InductorError), torch.inference_mode(), config.patch(allow_buffer_reuse=False):
        torch.compile(layers(E4M3)[1], fullgraph=True)(*inputs(48))
    assert code[0].count("extern_kernels._scaled_mm(") == 3
    written = Counter(re.findall(r"empty_strided_cpu\(\(48, 64\), .*torch\.(\w+)\)", code[0]))
    assert written == {"float8_e4m3fn": 2, "bfloat16": 3}, "two inputs of linears, and what three products give"


@given(st.integers(1, 3), st.sampled_from([1, 2, 3, 5]), st.integers(0, 3), st.data())
def test_int8_is_what_the_rotation_and_the_rounding_say(tokens: int, odd: int, power: int, data: st.DataObject) -> None:
    width, size = odd * 4**power, 4**power
    assume(width > 1)
    assert quantised.rotated_together(width) == size
    assert torch.equal(quantised.hadamard(size, CPU), kronecker(size))
    numbers = st.lists(st.integers(-9, 9), min_size=tokens * width, max_size=tokens * width)
    x = torch.tensor(data.draw(numbers), dtype=torch.float32).view(tokens, width)
    weight = torch.randint(-127, 128, (3, width), dtype=torch.int8)
    layer = linear(I8, weight=weight, weight_scale=torch.tensor([[0.5], [1.0], [2.0]]), bias=torch.ones(3))
    rotated = (x.unflatten(1, (-1, size)) @ kronecker(size)).flatten(1)
    scale = rotated.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    codes = (rotated / scale).round()
    expected = codes @ weight.float().t() * scale * layer.weight_scale.t() + 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", [E4M3, I8])
@pytest.mark.parametrize("mode", [TOKEN, STATIC, WEIGHTS])
def test_a_few_rows_at_a_time_give_the_same_bits(form: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dit = small(form, torch.bfloat16)
    for layer in quantised_linears(dit):
        layer.mode = mode
    streams = cast(random_streams(dit, AV(24, 9)), torch.bfloat16)
    expected = dit(streams)
    monkeypatch.setattr(quantised, "STRETCH", 100)
    assert distance(dit(streams), expected) == 0


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("ff.net.2.weight_scale", torch.tensor(1.0).bfloat16(), UnsupportedError),
        ("ff.net.2.weight_scale", torch.ones(32, 1), OverlayError),
        ("ff.net.2.input_scale", None, OverlayError),
        ("attn1.norm_q.weight", torch.ones(32).to(torch.float8_e4m3fn), UnsupportedError),
        ("scale_shift_table", torch.ones(9, 32).to(torch.float8_e4m3fn), UnsupportedError),
        ("attn1.to_q.weight", torch.ones(32, 32).to(torch.float8_e5m2), OverlayError),
    ],
)
def test_other_codes_and_scales_than_these_are_refused(
    name: str, value: Tensor | None, kind: type[Exception], tmp_path: Path
) -> None:
    weights = coded(SMALL_WEIGHTS, E4M3, [1])
    key = f"transformer_blocks.1.{name}"
    assert key in weights
    weights[key] = value
    if value is None:
        del weights[key]
    with pytest.raises(kind, match=r"ff\.net\.2|attn1|scale_shift_table"):
        load_dit(write_transformer(tmp_path / "out" / "transformer", SMALL, weights), CPU, torch.bfloat16)
