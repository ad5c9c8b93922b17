"""Plans: what fits where, what it takes, what is said when nothing fits; at the published sizes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from works import OFFICIAL, hq_work

from ltxpack.errors import DeviceError, OverlayError
from ltxpack.files.tensorfile import DTYPE_BITS
from ltxpack.ltx23.codes import with_codes
from ltxpack.ltx23.expected import published_configs, published_tensors
from ltxpack.ltx23.releases import RELEASES
from ltxpack.runtime.codecs.tiles import Tiles, auto_tiling
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.settings import MODES
from ltxpack.runtime.weights import plan as planner
from ltxpack.runtime.weights import report, sizes
from ltxpack.runtime.weights.activations import Widths
from ltxpack.runtime.weights.activations import contexts as contexts_of
from ltxpack.runtime.weights.machine import Machine, this_machine
from ltxpack.runtime.weights.plan import CARD, FILE, HOST, Placement, Plan, Work
from ltxpack.runtime.weights.sizes import PartSizes

GB = 10**9
CONFIGS = published_configs()
TENSORS = published_tensors(CONFIGS)
MODEL = sizes.model_sizes(None, OFFICIAL, "bfloat16")
WORK = hq_work(VideoShape(121, 1088, 1920, 24.0), OFFICIAL)
FIRST, SECOND = WORK.transformer_parts
ALONE = hq_work(WORK.shape, ("base", "base"))
# The same with one transformer for both stages.
ONE = replace(MODEL, parts={**MODEL.parts, "transformer": MODEL.parts[FIRST]})
LINEAR = re.compile(r"transformer_blocks\.2\..*\.weight")


def card(vram: int, ram: int = 128) -> Machine:
    return this_machine(vram * GB, ram * GB)


def placed(plan: Plan, part: str = FIRST) -> Placement:
    return plan.placements[part]


def counts(plan: Plan, field: str = "streamed") -> list[int]:
    """How many blocks of both transformers are streamed, or held."""
    return [len(getattr(plan.placements[part], field)) for part in plan.work.transformer_parts]


def everywhere(transformer: Placement, small: str = FILE, text: Placement | None = None) -> dict[str, Placement]:
    """A placement for every part."""
    found = dict.fromkeys(sizes.SMALL_PARTS, Placement(small))
    return {**found, "text_encoder": text or Placement(), FIRST: transformer, SECOND: transformer}


def with_placements(plan: Plan, **changes: Any) -> Plan:
    """``plan`` with its transformers placed otherwise."""
    parts = plan.work.transformer_parts
    changed = {part: replace(plan.placements[part], **changes) for part in parts}
    return planner.plan_for(MODEL, plan.work, plan.mode, {**plan.placements, **changed})


def fits(plan: Plan, machine: Machine) -> bool:
    return planner.shortage(plan, machine) is None


def test_the_published_checkpoint_is_counted_to_its_last_tensor() -> None:
    """Its file is larger only by a header of a known size."""
    ours = [name for name in TENSORS if name not in ("text_encoder", "latent_upsampler")]
    tensors = [tensor for name in ours for tensor in TENSORS[name]]
    counted = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in tensors)
    release = next(release for release in RELEASES if release.name == "ltx-2.3-22b-dev")
    assert 0 < release.size - counted < 250 * len(tensors)


def test_parts_of_the_published_model() -> None:
    transformer, vocoder = MODEL.parts[FIRST], MODEL.parts["vocoder"]
    assert len(transformer.blocks) == len(MODEL.parts["text_encoder"].blocks) == 48
    assert transformer.total == pytest.approx(2 * 18.989e9, rel=1e-3)
    doubled = sizes.model_sizes(None, OFFICIAL, "float32").parts
    assert doubled[FIRST].total == pytest.approx(2 * transformer.total, rel=1e-5)
    assert doubled["vocoder"].total == vocoder.total == 2 * vocoder.stored


def test_codes_halve_the_blocks_that_have_them() -> None:
    """44 of 48; the scales are float32 whatever the run's dtype is; blocks of two sizes are counted one by one."""
    names = [f"distilled-0.5{form}" for form in ("", "-fp8", "-int8")]
    found, doubled = (sizes.model_sizes(None, names, dtype).parts for dtype in ("bfloat16", "float32"))
    plain, fp8, int8 = (found[f"bakes/{name}"] for name in names)
    assert [number for number in range(48) if fp8.blocks[number] == plain.blocks[number]] == [0, 1, 46, 47]
    shapes = [shape for name, _, shape in TENSORS["transformer"] if LINEAR.fullmatch(name) and len(shape) == 2]
    assert len(shapes) == 34
    assert plain.blocks[2] - fp8.blocks[2] == sum(map(math.prod, shapes)) - 34 * 2 * sizes.ALIGNMENT
    scales = sum(sizes.aligned(4 * rows) for rows, _ in shapes)
    assert plain.blocks[2] - int8.blocks[2] == sum(map(math.prod, shapes)) - scales
    rounded = with_codes([(name, "BF16", shape) for name, _, shape in TENSORS["transformer"]], "F8_E4M3")
    assert sizes.part_of("transformer", rounded, 2).stored == 20_973_193_408, "spec 09, section 8"
    assert [part.codes for part in (plain, fp8, int8)] == ["", "F8_E4M3", "I8"]
    wide = doubled["bakes/distilled-0.5-fp8"]
    assert wide.blocks[0] > 1.99 * plain.blocks[0] and wide.blocks[2] < 1.01 * fp8.blocks[2]
    some = Placement(FILE, HOST, frozenset({0, 2, 3}), frozenset({2}))
    model = sizes.ModelSizes({"part": fp8}, MODEL.widths, 2)
    assert planner._on_card(fp8, some.streamed) == fp8.total + fp8.blocks[0] - 2 * fp8.blocks[2]
    assert planner._pinned(model, {"part": some}) == fp8.blocks[2]


@pytest.mark.parametrize(
    ("vram", "ram", "once", "home", "source", "ahead", "text_source"),
    [
        (24, 24, False, FILE, FILE, False, FILE),
        (24, 32, False, FILE, HOST, False, FILE),
        (24, 128, False, HOST, HOST, False, FILE),
        (48, 32, False, FILE, "", False, ""),
        (48, 64, False, FILE, "", True, ""),
        (32, 64, False, FILE, HOST, False, ""),
        (48, 128, False, HOST, "", False, ""),
        (96, 128, False, CARD, "", False, FILE),
        (141, 32, False, CARD, "", False, ""),
        # One video does not pay for a second: nothing is pinned for it (REVIEW 3.5).
        (24, 128, True, FILE, HOST, False, FILE),
        (48, 128, True, FILE, "", True, ""),
        (80, 128, True, FILE, "", True, ""),
        (80, 32, True, FILE, "", False, ""),
    ],
)
def test_what_the_host_holds(
    vram: int, ram: int, once: bool, home: str, source: str, ahead: bool, text_source: str
) -> None:
    plan = best(replace(WORK, once=once), card(vram, ram))
    found = placed(plan)
    assert (found.home, found.source, found.ahead) == (home, source, ahead)
    assert placed(plan, "text_encoder").source == text_source
    if once:
        assert counts(plan, "held") == [0, 0] and plan.host < 42 * GB


def test_layers_are_pinned_only_where_several_prompts_pass_through_them() -> None:
    one, many = (best(replace(WORK, prompts=prompts), card(24, 64)) for prompts in (1, 8))
    text_encoder = MODEL.parts["text_encoder"]
    assert (placed(one, "text_encoder").source, placed(many, "text_encoder").source) == (FILE, HOST)
    assert one.first_read == sum(part.stored for part in MODEL.parts.values()), "what streams once is read once"
    from_file = {**many.placements, "text_encoder": one.placements["text_encoder"]}
    again = planner.plan_for(MODEL, many.work, many.mode, from_file).first_read - many.first_read
    assert again == pytest.approx(7 * sum(text_encoder.blocks), rel=1e-3), "of the layers alone"


def test_auto_fills_the_card_with_blocks_and_stream_alone_takes_least() -> None:
    machine = card(24)
    auto, least = (planner.best_plan(MODEL, WORK, machine, mode) for mode in ("auto", "stream"))
    assert auto is not None and least is not None
    assert counts(least) == [48, 48]
    first, second = counts(auto)
    assert 3 <= first < second < 48
    assert least.card < auto.card
    fewer = {**auto.placements, FIRST: replace(placed(auto), streamed=planner.spread(first - 1, 48))}
    one_less = planner.plan_for(MODEL, WORK, auto.mode, fewer)
    assert not fits(one_less, machine)


def test_images_and_longer_videos_take_more() -> None:
    def second_stage(work: Work) -> int:
        plan = planner.smallest_plan(MODEL, work)
        return next(phase.card for phase in plan.phases if phase.name == "stage 2")

    longer = hq_work(VideoShape(241, 1088, 1920, 24.0), OFFICIAL)
    assert second_stage(WORK) < second_stage(replace(WORK, images=1)) < second_stage(longer)
    assert any(phase.name == "images" for phase in planner.smallest_plan(MODEL, replace(WORK, images=1)).phases)


sizes_in_gb = st.integers(4, 200)


@settings(max_examples=60, deadline=None)
@given(vram=sizes_in_gb, ram=sizes_in_gb, more=st.integers(1, 100))
def test_more_memory_never_reads_more(vram: int, ram: int, more: int) -> None:
    small, large = (planner.best_plan(MODEL, WORK, card(*size)) for size in ((vram, ram), (vram + more, ram + more)))
    if small is None:
        return
    assert large is not None
    order = (*reversed(MODES),)
    assert order.index(large.mode) >= order.index(small.mode)
    assert large.first_read <= small.first_read or large.mode != small.mode


@settings(max_examples=60, deadline=None)
@given(vram=sizes_in_gb, ram=sizes_in_gb, mode=st.sampled_from(("auto", *MODES)))
def test_a_plan_fits_or_is_refused_with_numbers(vram: int, ram: int, mode: str) -> None:
    machine = card(vram, ram)
    try:
        plan = report.plan_or_refuse(MODEL, WORK, machine, mode)
    except DeviceError as error:
        assert "GB" in str(error.expected) and "GB free" in str(error.found)
        assert planner.best_plan(MODEL, WORK, machine, mode) is None
    else:
        assert fits(plan, machine)
        assert mode in ("auto", plan.mode)


def refusal(machine: Machine, work: Work = WORK, mode: str = "auto", device: str = "the card") -> DeviceError:
    with pytest.raises(DeviceError) as caught:
        report.plan_or_refuse(MODEL, work, machine, mode, device)
    return caught.value


def test_a_mode_that_does_not_fit_names_the_one_that_does() -> None:
    error = refusal(card(48), mode="resident", device="cuda:0")
    assert error.problem.startswith("cuda:0 has too little free memory") and "--residency resident" in str(error)
    assert error.next == "the same command with --residency swap"
    assert str(error.found) == "48.0 GB free"


@pytest.mark.parametrize("mode", ["auto", "resident", "stream"])
def test_a_card_for_no_mode_gets_a_smaller_video_that_fits(mode: str) -> None:
    work = hq_work(VideoShape(721, 1088, 1920, 24.0), OFFICIAL)
    machine = card(16)
    words = refusal(machine, work, mode).next.replace(",", "").split()
    flags = {"--residency": mode, **dict(pairwise(words))}
    frames, height, width = (int(flags[name]) for name in ("--num-frames", "--height", "--width"))
    smaller = hq_work(VideoShape(frames, height, width, 24.0), OFFICIAL)
    assert planner.best_plan(MODEL, smaller, machine, flags["--residency"]) is not None
    assert "a card with more memory" in refusal(card(8), work).next


def test_the_smaller_video_is_the_next_one_that_fits() -> None:
    """Found by bisection; of the same size no longer one fits."""
    work, machine = hq_work(VideoShape(9_000_001, 576, 1024, 24.0), OFFICIAL), card(24)
    found = report.smaller_work(MODEL, work, machine)
    assert found is not None and (found.shape.height, found.shape.width) == (576, 1024)
    assert planner.best_plan(MODEL, found, machine) is not None
    longer = work.resized(replace(found.shape, frames=found.shape.frames + 8))
    assert planner.best_plan(MODEL, longer, machine) is None
    # At this rate what would fit is too short for any sound.
    fast = hq_work(VideoShape(9_000_001, 576, 1024, 1e8), OFFICIAL)
    assert report.smaller_work(MODEL, fast, machine) is None


def test_a_small_host_is_named_as_such() -> None:
    error = refusal(Machine(GB, 141 * GB), device="cuda:0")
    assert "the host has too little free memory" in error.problem
    assert "--ram" in error.next and "--vram" not in error.next


@pytest.mark.parametrize("mode", ["auto", "resident"])
@pytest.mark.parametrize("vram", [2.0, 5.77])
def test_what_is_said_to_be_needed_is_enough(vram: float, mode: str) -> None:
    error = refusal(Machine(500 * GB, int(vram * GB)), mode=mode)
    needed = float(str(error.expected).split()[0])
    assert float(str(error.found).split()[0]) < needed
    assert report.plan_or_refuse(MODEL, WORK, Machine(500 * GB, int(needed * GB)), mode)


def test_on_a_cpu_nobody_is_sent_to_the_cpu() -> None:
    error = refusal(Machine(GB), device="cpu")
    assert "--fps" in error.next and "--device" not in error.next


def test_without_a_card_both_share_the_host() -> None:
    plan = best(replace(WORK, decode="fast"), Machine(400 * GB))
    assert Tiles.of(WORK.shape.grid, plan.tiling).count == 1 and fits(plan, Machine(400 * GB))
    plan = best(WORK, Machine(200 * GB))
    assert plan.mode == "resident"
    most = max(phase.needed + phase.host for phase in plan.phases)
    assert fits(plan, Machine(most)) and not fits(plan, Machine(most - 1))
    assert planner.best_plan(MODEL, WORK, Machine(60 * GB)) is not None


def test_two_stages_of_one_transformer_hold_it_once() -> None:
    both = planner.plan_for(MODEL, WORK, "resident", everywhere(Placement(CARD)))
    alone = {part: each for part, each in both.placements.items() if part not in (FIRST, SECOND)}
    resident = planner.plan_for(ONE, ALONE, "resident", {**alone, "transformer": Placement(CARD)})
    assert both.card - resident.card == pytest.approx(38 * GB, rel=0.01)
    filled = planner.best_plan(ONE, ALONE, card(24))
    assert filled is not None and len(counts(filled)) == 1
    by_name = {phase.name: phase for phase in filled.phases}
    between = by_name["upsample"].weights - MODEL.parts["latent_upsampler"].total
    assert between == by_name["stage 2"].weights, "what both stages use stays between them"


def test_after_memory_ran_out_a_smaller_mode_is_named() -> None:
    found = [report.after_shortage(mode, "auto") for mode in MODES]
    assert ["swap" in found[0], "stream" in found[1], "stream" in found[2]] == [True] * 3
    assert "--num-frames" in report.after_shortage("stream", "stream")


def test_what_is_read_from_disk() -> None:
    parts = MODEL.parts
    text_encoder, transformers = parts["text_encoder"].stored, parts[FIRST].stored + parts[SECOND].stored

    def reads(work: Work, transformer: Placement, small: str = FILE) -> tuple[int, int]:
        plan = planner.plan_for(MODEL, work, "any", everywhere(transformer, small))
        return plan.first_read, plan.next_read

    everything = sum(part.stored for part in parts.values())
    assert reads(WORK, Placement(CARD), CARD) == (everything, text_encoder)
    assert reads(WORK, Placement(FILE)) == (everything, everything)
    assert reads(replace(WORK, images=1), Placement(FILE))[0] == everything + parts["vae"].stored
    assert reads(WORK, Placement(HOST)) == (everything, everything - transformers)
    streamed, _ = reads(WORK, Placement(FILE, source=FILE, streamed=frozenset(range(48))))
    passes = sum(stage.evaluations for stage in WORK.stages)
    blocks = sum(parts[FIRST].blocks) / parts[FIRST].total
    assert streamed - everything == pytest.approx(passes * blocks * transformers / 2, rel=1e-6)


# What a plan puts into the room it finds


def best(work: Work, machine: Machine, mode: str = "auto") -> Plan:
    found = planner.best_plan(MODEL, work, machine, mode)
    assert found is not None
    return found


@pytest.mark.parametrize(("vram", "ram"), [(141, 128), (141, 96), (48, 128), (48, 256)])
def test_what_has_room_in_the_page_cache(vram: int, ram: int) -> None:
    machine = card(vram, ram)
    plan = best(WORK, machine)
    taken = plan.host + planner.CACHE_MARGIN
    assert planner.cacheable(plan, machine) == min(max(machine.host - taken, 0), plan.first_read)
    for room in (-1, 0, 1, plan.first_read - 1, plan.first_read, plan.first_read + 1):
        expected = min(max(room, 0), plan.first_read)
        assert planner.cacheable(plan, Machine(taken + room, machine.card)) == expected
    plan = best(WORK, Machine(400 * GB))
    most = max(phase.host + phase.needed for phase in plan.phases) + planner.CACHE_MARGIN
    assert planner.cacheable(plan, Machine(most + 5)) == 5


def test_how_files_are_read_is_told() -> None:
    machine = card(48, 256)
    plan = best(WORK, machine)
    rooms = (plan.first_read, plan.first_read - 30 * GB, 0)
    machines = [Machine(plan.host + planner.CACHE_MARGIN + room, machine.card) for room in rooms]
    start = "reads auto: past the page cache, but for what is there; "
    assert [report.reading(plan, "auto", each, warm=True) for each in machines] == [
        start + "all 109.5 GB come into the page cache while the device computes, for the next run",
        start + "79.5 GB of 109.5 GB come into the page cache while the device computes, for the next run",
        start + "the page cache has no room for more",
    ]
    for asked in ("direct", "cached"):
        assert report.reading(plan, asked, machine) == f"reads {asked}: as asked for"
    assert report.reading(plan, "auto", machine) == start.removesuffix("; ")


def test_between_two_stages_of_one_transformer_the_upsampler_fits_beside_it() -> None:
    """In a small video the upsampler, while the transformer stays, takes more than a stage does."""
    small = hq_work(VideoShape(9, 256, 384, 24.0), ("base", "base"))
    plan = report.plan_or_refuse(ONE, small, card(24, 160), "auto")
    assert plan.mode == "stream" and fits(plan, card(24, 160))


def test_blocks_stay_on_the_host_between_videos_as_far_as_it_goes() -> None:
    machine = card(24, 64)
    plan = best(WORK, machine)
    first, second = counts(plan, "held")
    assert (placed(plan).home, placed(plan).source) == (FILE, HOST) and first >= counts(plan)[0]
    assert 0 < second <= counts(plan)[1]
    block = MODEL.parts[FIRST].blocks[0]
    assert plan.first_read - plan.next_read == pytest.approx((first + second) * block, rel=1e-3)
    assert plan.next_read < 0.7 * plan.first_read
    room = machine.host - plan.host
    assert planner.HELD_MARGIN <= room < planner.HELD_MARGIN + block
    without = with_placements(plan, held=frozenset())
    assert plan.phases[0].host - without.phases[0].host == (first + second) * block
    # Streamed blocks of a stage that are held need no second place while it runs.
    stage = {p.name: p.host for p in plan.phases}["stage 1"]
    more = stage - {p.name: p.host for p in without.phases}["stage 1"]
    assert more == (first - counts(plan)[0] + second) * block


def test_with_still_more_memory_the_others_are_held_too() -> None:
    plan = best(WORK, card(32, 64))
    assert counts(plan, "held")[0] == 48 and counts(plan)[1] < counts(plan, "held")[1] < 48
    assert placed(best(WORK, card(32, 128))).home == HOST


def test_what_would_be_read_at_every_step_is_held_even_for_one_video() -> None:
    plan = best(replace(WORK, once=True), card(24, 22))
    first, second = counts(plan, "held")
    assert placed(plan).source == FILE and 0 < first < counts(plan)[0] and second == 0
    without = with_placements(plan, held=frozenset())
    saved = WORK.evaluations(FIRST) * first * MODEL.parts[FIRST].blocks[0]
    assert without.first_read - plan.first_read == pytest.approx(saved, rel=1e-3)


def test_two_stages_of_one_transformer_hold_its_blocks_once() -> None:
    for ram in range(12, 70, 3):
        for once in (False, True):
            found = planner.best_plan(ONE, replace(ALONE, once=once), card(24, ram))
            assert found is not None and counts(found, "held")[0] <= (counts(found)[0] if once else 48)
            without = {part: replace(each, held=frozenset()) for part, each in found.placements.items()}
            bare = planner.plan_for(ONE, found.work, found.mode, without)
            block = MODEL.parts[FIRST].blocks[0]
            assert found.phases[-1].host - bare.phases[-1].host == counts(found, "held")[0] * block


@pytest.mark.parametrize("vram", [16, 24, 40])
def test_a_larger_host_never_reads_more(vram: int) -> None:
    plans = [plan for ram in range(8, 140) if (plan := planner.best_plan(MODEL, WORK, card(vram, ram))) is not None]
    assert len({(placed(plan).home, placed(plan).source) for plan in plans}) >= 3
    for small, large in pairwise(plans):
        assert large.first_read <= small.first_read and large.next_read <= small.next_read


def test_many_prompts_encoded_together_are_counted_and_one_is_not() -> None:
    machine = card(48, 128)
    alone, many = best(WORK, machine), best(replace(WORK, prompts=64), machine)
    contexts = 63 * contexts_of(MODEL.widths, MODEL.itemsize)
    assert contexts == pytest.approx(1.6e9, rel=0.02)
    for one, other in zip(alone.phases, many.phases, strict=True):
        assert other.host - one.host == contexts
        # Text encoder and connectors are on the card together.
        others = {"text": "connectors", "connectors": "text_encoder"}
        absent = others.get(one.name, "") if placed(alone, "vae").home == FILE else ""
        assert other.card - one.card == (MODEL.parts[absent].total if absent else 0)


def test_what_is_loaded_stays_unless_the_card_is_short_or_the_video_larger() -> None:
    """REVIEW 3.9: the host's free memory is another each time it is looked at."""
    machine = card(48, 128)
    plan = best(WORK, machine)
    assert placed(plan).home == HOST
    tight = replace(machine, host=plan.host - GB)
    kept = planner.continued(plan, MODEL, WORK, tight)
    assert kept is not None and kept.placements == plan.placements
    assert planner.best_plan(MODEL, WORK, tight) != plan
    smaller = hq_work(VideoShape(9, 512, 512, 24.0), OFFICIAL)
    assert planner.continued(plan, MODEL, smaller, tight) is not None
    assert planner.continued(plan, MODEL, WORK, replace(tight, card=30 * GB)) is None
    longer = hq_work(VideoShape(241, 1088, 1920, 24.0), OFFICIAL, prompts=9)
    assert planner.continued(plan, MODEL, longer, machine) is not None
    assert planner.continued(plan, MODEL, longer, tight) is None
    alone = Machine(200 * GB)
    plan = best(WORK, alone)
    assert planner.continued(plan, MODEL, WORK, Machine(GB)) is not None
    assert planner.continued(plan, MODEL, longer, Machine(GB)) is None


@pytest.mark.parametrize(("vram", "ram", "home"), [(180, 64, CARD), (48, 256, HOST), (48, 64, FILE)])
def test_further_transformers_stay_beside_the_first_where_there_is_room(vram: int, ram: int, home: str) -> None:
    plan, machine = best(WORK, card(vram, ram)), card(vram, ram)
    assert placed(plan).home == home
    wider = replace(MODEL, parts={**MODEL.parts, "bakes/third": MODEL.parts[FIRST]})
    third = hq_work(WORK.shape, (OFFICIAL[0], "third"))
    found = planner.continued(plan, wider, third, machine)
    if home == FILE:
        assert found is None
        return
    assert found is not None and found.placements == {**plan.placements, "bakes/third": placed(plan)}
    least = replace(machine, card=found.card, host=found.host)
    for short in (replace(least, card=plan.card) if home == CARD else replace(least, host=plan.host), least):
        assert planner.continued(plan, wider, third, replace(short, context=0)) is None


@pytest.mark.parametrize(("vram", "tiles"), [(24, 2), (48, 1), (141, 1)])
def test_larger_tiles_where_the_card_has_room(vram: int, tiles: int) -> None:
    machine = card(vram)
    official, fast = best(WORK, machine), best(replace(WORK, decode="fast"), machine)
    assert fast.placements == official.placements and official.tiling == auto_tiling(34, 60)
    assert (
        Tiles.of(WORK.shape.grid, fast.tiling).count == tiles < Tiles.of(WORK.shape.grid, official.tiling).count == 18
    )
    video, before = fast.phases[-1], official.phases[-1]
    assert video.name == "video" and video.activations > before.activations and video.host > before.host
    assert fits(fast, machine)
    assert report.decoding(official).startswith("decode official: 18 tiles of at most 73 frames of 448x768 pixels")
    assert report.decoding(fast).startswith("decode fast: ") and "(official: 18 tiles" in report.decoding(fast)


def test_where_no_larger_tiles_fit_the_official_ones_are_used_and_told() -> None:
    work = replace(WORK, decode="fast")
    small = card(10)
    plan = best(work, small)
    assert plan.tiling == auto_tiling(34, 60) and fits(plan, small)
    assert report.decoding(plan).startswith(
        "decode fast: no larger tiles than the official ones fit, which are used: 18"
    )
    # The frames of a larger group must have a place on the host too.
    swap = planner.plan_for(MODEL, work, "swap", everywhere(Placement(FILE)))
    plenty = planner.continued(swap, MODEL, work, Machine(60 * GB, 48 * GB))
    assert plenty is not None and plenty.host == plenty.phases[-1].host
    tight = planner.continued(swap, MODEL, work, Machine(plenty.host - 1, 48 * GB))
    assert tight is not None and tight.tiling == auto_tiling(34, 60) != plenty.tiling


@settings(max_examples=60, deadline=None)
@given(vram=st.integers(8, 140), blocks=st.integers(1, 40), seconds=st.integers(1, 20))
def test_fast_tiles_fit_whatever_the_size(vram: int, blocks: int, seconds: int) -> None:
    work = hq_work(VideoShape(24 * seconds + 1, 64 * blocks, 64 * (blocks + 3), 24.0), OFFICIAL, decode="fast")
    machine = card(vram)
    plan = planner.best_plan(MODEL, work, machine)
    if plan is not None:
        assert fits(plan, machine)
        grid, official = work.shape.grid, auto_tiling(*work.shape.grid[1:])
        assert Tiles.of(grid, plan.tiling).count <= Tiles.of(grid, official).count


def test_widths_come_from_the_configs_and_a_wrong_one_is_named() -> None:
    assert isinstance(MODEL.widths, Widths)
    for component, field, value in (
        ("transformer", "num_attention_heads", "32"),
        ("vae", "decoder_block_out_channels", []),
        ("latent_upsampler", "mid_channels", None),
        ("vocoder", "upsample_factors", [0, 2]),
    ):
        broken = {**CONFIGS, component: {**CONFIGS[component], field: value}}
        with pytest.raises(OverlayError, match=field):
            sizes.read_widths(broken, sizes.Path("out"))


def test_blocks_are_spread_and_counted() -> None:
    for total in (1, 5, 48):
        for count in range(total + 1):
            chosen = sorted(planner.spread(count, total))
            assert len(chosen) == count
            assert all(0 <= number < total for number in chosen)
            gaps = [b - a for a, b in pairwise(chosen)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_part_with_other_dtypes() -> None:
    tensors = [("transformer_blocks.0.w", "F32", (10, 10)), ("scale", "F32", (3,)), ("count", "I64", (2,))]
    part = sizes.part_of("transformer", tensors, 2)
    assert part == PartSizes(stored=400 + 12 + 16, rest=6 + 16, blocks=(sizes.aligned(200),))
