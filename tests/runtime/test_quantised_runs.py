"""Videos from bakes in codes: near those of the bf16 bakes, the same in every residency mode, as chosen and told."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import works
from dit_parts import SMALL
from support import Notes, distance, load, ltxpack
from torch import Tensor, nn

from ltxpack import Pipeline
from ltxpack.demo.checkpoint import TEXT_LAYERS
from ltxpack.errors import DeviceError
from ltxpack.runtime.model import quantised
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.model.model import DiT
from ltxpack.runtime.model.quantised import quantised_linears
from ltxpack.runtime.model.weights import load_dit
from ltxpack.runtime.overlay import Overlay, transformer_part
from ltxpack.runtime.recipe_run import sample
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling.guidance import Denoiser
from ltxpack.runtime.sampling.shape import AV
from ltxpack.runtime.session import Session
from ltxpack.runtime.settings import SessionSettings, Settings
from ltxpack.runtime.weights import keeper
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights.plan import CARD, FILE, HOST, Placement
from ltxpack.runtime.weights.sizes import aligned, model_sizes

pytestmark = pytest.mark.usefixtures("short_prompts")
PLAIN = ("distilled-0.25", "distilled-0.5")
FP8, INT8 = (tuple(f"{name}-{form}" for name in PLAIN) for form in ("fp8", "int8"))
# Placement of both transformers, and how many of their two blocks are streamed and held.
MODES: dict[str, tuple[Placement, int, int]] = {
    "resident": (Placement(CARD), 0, 0),
    "swap, ahead": (Placement(ahead=True), 0, 0),
    "swap, kept": (Placement(HOST), 0, 0),
    "stream from memory": (Placement(HOST, source=HOST), 2, 0),
    "stream from the file": (Placement(FILE, source=FILE), 2, 0),
    "stream, held": (Placement(FILE, source=HOST), 1, 2),
}


@pytest.fixture(scope="module")
def coded(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's overlay, with its bakes in both forms beside those in bf16; the first of two blocks is kept."""
    folder = tmp_path_factory.mktemp("coded") / "overlay"
    shutil.copytree(demo / "overlay", folder, symlinks=True, copy_function=os.link)
    forms = ("--format", "fp8", "--format", "int8", "--keep-blocks", "0")
    done = ltxpack("bake-lora", folder, "--strength", "0.25", "--strength", "0.5", *forms)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.filterwarnings("ignore")
def test_diffusers_refuses_codes_which_it_took_for_weights(coded: Path) -> None:
    from diffusers import LTX2VideoTransformer3DModel

    for form in ("fp8", "int8"):
        with pytest.raises(ValueError, match=f"Unknown quantization type, got ltxpack-{form}"):
            LTX2VideoTransformer3DModel.from_pretrained(coded, subfolder=f"bakes/distilled-0.5-{form}")


def run(overlay: Path, stages: tuple[str, ...], mode: str = "", recipe: str = "hq", **more: Any) -> dict[str, Tensor]:
    """The first guided x0 and the latents of each stage; ``more``: settings of the session, or of the video."""
    sizes = {"height": 64, "width": 64, "num_frames": 9, **({"steps": 2} if recipe == "hq" else {})}
    of_video = {name: more.pop(name) for name in tuple(more) if name in Settings.__dataclass_fields__}
    wanted, reporter = Request.of("a boat", recipe=recipe, **sizes, **of_video), more.pop("reporter", None)
    given = {"device": "cpu", "dtype": "float32", **dict(zip(("stage1", "stage2"), stages, strict=False)), **more}
    found: dict[str, Tensor] = {}
    denoise = Denoiser.__call__

    def noted(*arguments: Any) -> AV[Tensor]:
        x0 = denoise(*arguments)
        found.setdefault("x0.video", x0.video.clone())
        found.setdefault("x0.audio", x0.audio.clone())
        return x0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "__call__", noted)
        if mode:
            forced = partial(planner.plan_for, mode=mode, placements=placed(stages, mode))
            patch.setattr(keeper.report, "plan_or_refuse", lambda model, work, *_: forced(model, work))
        with Session(overlay, SessionSettings(**given), reporter) as make:
            make.prepare([wanted.work(make.transformers(wanted.recipe).stages)])
            for number, latents in enumerate(sample(make, wanted).stages):
                found |= {f"{number}.video": latents.video, f"{number}.audio": latents.audio}
    assert all(tensor.isfinite().all() for tensor in found.values())
    return found


def placed(stages: tuple[str, ...], mode: str) -> dict[str, Placement]:
    """Every part's placement, those of the official transformers for ``stages``."""
    transformer, streamed, held = MODES[mode]
    counts: Any = {"blocks": 2, "layers": TEXT_LAYERS, "streamed": (streamed,) * 2, "held": (held,) * 2}
    usual = works.placements(transformer, CARD if mode == "resident" else FILE, **counts)
    names = {transformer_part(name): transformer_part(other) for name, other in zip(PLAIN, stages, strict=True)}
    return {names.get(part, part): placement for part, placement in usual.items()}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> float:
    """Relative L2, the worse of the two modalities."""
    return max(distance(found[name], expected[name]) for name in (f"{prefix}.video", f"{prefix}.audio"))


UNGUIDED = {"video_cfg": 1.0, "audio_cfg": 1.0, "modality": 1.0}


@pytest.mark.parametrize(
    ("recipe", "forms", "more"),
    [
        ("hq", (FP8, INT8), {}),
        # Guidance multiplies differences of passes, and with them what codes lose: usually its first step is kept.
        ("hq", (INT8,), {"keep_steps": "none"}),
        ("hq", (FP8,), {"keep_steps": "none", **UNGUIDED}),
        ("distilled", (FP8, INT8), {}),
        ("two-stage", (FP8,), {}),
        ("one-stage", (FP8,), {}),
    ],
)
def test_the_first_x0_is_near_that_of_the_bf16_bakes(
    recipe: str, forms: tuple[tuple[str, ...], ...], more: dict[str, Any], coded: Path
) -> None:
    count = 1 if recipe == "one-stage" else 2
    unguided = {name: value for name, value in more.items() if name in UNGUIDED}
    plain = run(coded, PLAIN[:count], recipe=recipe, **unguided)
    for stages in forms:
        found = run(coded, stages[:count], recipe=recipe, **more)
        assert 1e-3 < worst(found, plain, "x0") <= 6e-2
        assert worst(found, plain, f"{count - 1}") > 1e-3


@pytest.mark.parametrize("stages", [FP8, (INT8[0], PLAIN[1])], ids="+".join)
def test_every_residency_mode_gives_the_same_bits(stages: tuple[str, str], coded: Path) -> None:
    """Blocks of two sizes and kinds pass through the same slots, and so do those of mixed stages."""
    expected = run(coded, stages, "resident", **UNGUIDED)
    for mode in list(MODES)[1:]:
        found = run(coded, stages, mode, **UNGUIDED)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), mode


@pytest.mark.parametrize("name", [FP8[0], INT8[0]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plan_counts_the_bytes_that_are_loaded(name: str, dtype: str, coded: Path) -> None:
    """Block by block, and the rest; codes and scales are loaded as they are stored, whatever the dtype."""
    overlay = Overlay.open(coded)
    part = model_sizes(overlay, [name], dtype).parts[transformer_part(name)]
    dit = load_dit(overlay.folder(transformer_part(name)), torch.device("cpu"), getattr(torch, dtype))
    found = [sum(aligned(value.nbytes) for value in block.state_dict().values()) for block in dit.blocks()]
    assert list(part.blocks) == found and part.blocks[1] < part.blocks[0]
    blocks = sum(value.nbytes for block in dit.blocks() for value in block.state_dict().values())
    assert part.rest == sum(value.nbytes for value in dit.state_dict().values()) - blocks


def test_steps_that_are_kept_decode_the_weights_and_only_these(coded: Path) -> None:
    usual, decoded = run(coded, FP8, keep_steps="none", **UNGUIDED), run(coded, FP8, fp8="weights", **UNGUIDED)
    every, first = (run(coded, FP8, keep_steps=steps, **UNGUIDED) for steps in ("first, 2,3", "first"))
    assert torch.equal(first["0.video"], run(coded, FP8, **UNGUIDED)["0.video"]), "the first is kept where not told"
    assert all(torch.equal(every[name], tensor) for name, tensor in decoded.items())
    assert torch.equal(first["x0.video"], decoded["x0.video"]) and worst(first, decoded, "0") > 1e-4
    assert worst(first, usual, "x0") > 1e-3


def test_what_is_picked_and_how_it_computes_is_told(coded: Path, tmp_path: Path) -> None:
    """On the command line; without calibration stored scales are told to be 1."""
    size = ("--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2", "--device", "cpu")
    given = ("--prompt", "a boat", *size, "-o", tmp_path / "v.mp4", "--save-tensors", tmp_path / "t.safetensors")
    done = ltxpack(
        "run", coded, *given, "--dtype", "float32", "--format", "fp8", "--fp8", "static", "--keep-steps", "last"
    )
    assert done.returncode == 0, done.stderr
    assert "stage 1: distilled-0.25-fp8, stage 2: distilled-0.5-fp8" in done.stdout
    assert done.stderr.count("fp8: inputs in codes, with the scales of the bake") == 1
    for name in FP8:
        assert done.stderr.count(f"{name} is not calibrated: --fp8 static uses 1 as every input scale") == 1
    assert all(tensor.isfinite().all() for tensor in load(tmp_path / "t.safetensors").values())
    notes = Notes()
    run(coded, (), reporter=notes)
    assert not any("codes" in line for line in notes.notes), "bf16 unless --format says otherwise"


def test_what_a_card_does_not_multiply_is_decoded_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that are no multiples of what it takes, or no codes at all."""
    card = torch.device("cuda")
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(SMALL))
    block = "transformer_blocks.1."
    names = (name for name, module in dit.named_modules() if name.startswith(block) and isinstance(module, nn.Linear))
    quantised.put_quantised(dit, dict.fromkeys(names, "F8_E4M3"))
    linears = quantised_linears(dit)
    monkeypatch.setattr(quantised, "fault", lambda *_: None)
    odd = [linear for linear in linears if linear.in_features % 16 or linear.out_features % 16]
    told = quantised.use_codes(dit, "token", card, torch.bfloat16)
    assert told[1].startswith(f"fp8: {len(odd)} of 34 linears with weights decoded") and 0 < len(odd) < 34
    assert {linear.mode for linear in odd} == {"weights"}
    assert {linear.mode for linear in linears if linear not in odd} == {"token"}
    monkeypatch.setattr(quantised, "fault", lambda *_: "it is too old")
    (told,) = quantised.use_codes(dit, "token", card, torch.bfloat16)
    assert told.endswith("cuda does not multiply these codes: it is too old")
    assert {linear.mode for linear in linears} == {"weights"}


@pytest.mark.usefixtures("warm_workers")
def test_ranks_decode_where_rank_0_does_not_multiply_codes(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are processes that would multiply them; one that cannot where rank 0 can refuses by name."""

    def video(**given: Any) -> Tensor:
        with Pipeline.from_overlay(coded, dtype="float32", stage1=FP8[0], stage2=FP8[1], **given) as make:
            return make("a boat", height=64, width=64, num_frames=9, steps=2).latents.stages[-1].video

    expected = video(device="cpu", fp8="weights")
    assert not torch.equal(video(device="cpu"), expected), "which of the two shows in a video"
    with monkeypatch.context() as patch:
        patch.setattr(quantised, "fault", lambda *_: "it is too old")
        assert torch.equal(video(devices="cpu:2", parallel="guidance"), expected)
    with torch.device("meta"):
        dit = DiT(DiTConfig.from_dict(SMALL))
    quantised.put_quantised(dit, {"transformer_blocks.1.attn1.to_q": "F8_E4M3"})
    monkeypatch.setattr(quantised, "fault", lambda *_: "it is too old")
    with pytest.raises(DeviceError, match="cpu does not multiply fp8 codes, which rank 0 does"):
        quantised.use_codes(dit, "token", torch.device("cpu"), torch.float32, {"F8_E4M3": None, "I8": None})


@pytest.mark.parametrize("codes", ["F8_E4M3", "I8"])
def test_a_product_that_is_wrong_or_not_there_is_found_out(codes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.device("cpu"), torch.float32
    modes = ("token", "static")[: 1 + (codes == "F8_E4M3")]
    assert [quantised.fault(codes, mode, *where) for mode in modes] == [None] * len(modes)
    product = quantised.KINDS[codes].product
    for wrong, why in ((lambda *a: 2 * product(*a), "100% off"), (lambda *a: _missing(), "no such kernel")):
        quantised.fault.cache_clear()
        monkeypatch.setattr(quantised.KINDS[codes], "product", wrong)
        assert why in (quantised.fault(codes, "token", *where) or "")
    quantised.fault.cache_clear()


def _missing() -> Tensor:
    raise NotImplementedError("no such kernel\nmore")
