"""Plans: what fits where, what it takes, what is said when nothing fits; at the published sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from works import OFFICIAL, hq_work

from ltxpack.errors import DeviceError, OverlayError
from ltxpack.files.tensorfile import DTYPE_BITS
from ltxpack.ltx23.published import published_configs, published_tensors
from ltxpack.ltx23.releases import RELEASES
from ltxpack.runtime.codecs.tiles import Tiles, auto_tiling
from ltxpack.runtime.sampling.shape import VideoShape
from ltxpack.runtime.weights import advice, load, reading, report, sizes
from ltxpack.runtime.weights import plan as modes
from ltxpack.runtime.weights.activations import HIDDEN_BYTES, Widths, hidden_states
from ltxpack.runtime.weights.activations import contexts as contexts_of
from ltxpack.runtime.weights.machine import CONTEXT, Machine, this_machine
from ltxpack.runtime.weights.plan import MODES, Plan, Setup, Work
from ltxpack.runtime.weights.sizes import Model, Part

GB = 10**9
CONFIGS = published_configs()
TENSORS = published_tensors(CONFIGS)
MODEL = sizes.model_of(TENSORS, CONFIGS, OFFICIAL, "bfloat16")
WORK = hq_work(VideoShape(121, 1088, 1920, 24.0), OFFICIAL)
FIRST, SECOND = OFFICIAL
ALONE = hq_work(WORK.shape, ("base", "base"))
# The card's memory in GB -> the mode at the default video.
CARDS = {24: "stream", 32: "stream", 48: "swap", 80: "swap", 141: "resident"}


def card(vram: int, ram: int = 128) -> Machine:
    return this_machine(vram * GB, ram * GB)


def fits(plan: Plan, machine: Machine) -> bool:
    return modes.shortage(plan, machine) is None


def test_the_published_checkpoint_is_counted_to_its_last_tensor() -> None:
    """Its file is larger only by a header of a known size."""
    ours = [name for name in TENSORS if name not in ("text_encoder", "latent_upsampler")]
    tensors = [tensor for name in ours for tensor in TENSORS[name]]
    counted = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in tensors)
    release = next(release for release in RELEASES if release.name == "ltx-2.3-22b-dev")
    assert 0 < release.size - counted < 250 * len(tensors)


def test_parts_of_the_published_model() -> None:
    transformer = MODEL.transformers[FIRST]
    assert len(transformer.blocks) == 48 and len(set(transformer.blocks)) == 1
    assert sum(transformer.blocks) == pytest.approx(37.12e9, rel=1e-3)
    assert transformer.total == pytest.approx(2 * 18.989e9, rel=1e-3)
    assert len(MODEL.parts["text_encoder"].blocks) == 48
    assert MODEL.parts["vocoder"].total == 2 * MODEL.parts["vocoder"].stored
    doubled = sizes.model_of(TENSORS, CONFIGS, OFFICIAL, "float32")
    assert doubled.transformers[FIRST].total == pytest.approx(2 * transformer.total, rel=1e-5)
    assert doubled.parts["vocoder"].total == MODEL.parts["vocoder"].total


@pytest.mark.parametrize("vram", CARDS)
def test_the_mode_for_a_card(vram: int) -> None:
    machine = card(vram)
    plan = modes.best_plan(MODEL, WORK, machine)
    assert plan is not None and plan.mode == CARDS[vram]
    assert machine.card is not None and plan.card + CONTEXT < machine.card
    assert plan.host < machine.host
    assert {phase.name for phase in plan.phases} == {
        *("text", "connectors", "stage 1", "upsample", "stage 2", "sound", "video")
    }


@pytest.mark.parametrize(
    ("vram", "ram", "weights", "text_encoder"),
    [
        (24, 24, "file", "layers from file"),
        (24, 32, "blocks", "layers"),
        (24, 128, "kept", "layers"),
        (48, 32, "disk", "whole"),
        (48, 64, "staged", "whole"),
        (48, 128, "kept", "whole"),
        (96, 128, "disk", "layers"),
        (141, 32, "disk", "whole"),
    ],
)
def test_what_the_host_holds(vram: int, ram: int, weights: str, text_encoder: str) -> None:
    plan = modes.best_plan(MODEL, WORK, card(vram, ram))
    assert plan is not None
    assert (plan.setup.weights, plan.setup.text) == (weights, text_encoder)


def test_auto_fills_the_card_with_blocks_and_stream_alone_takes_least() -> None:
    machine = card(24)
    auto, least = (modes.best_plan(MODEL, WORK, machine, mode) for mode in ("auto", "stream"))
    assert auto is not None and least is not None
    assert least.setup.streamed == {FIRST: 48, SECOND: 48}
    first, second = auto.setup.streamed[FIRST], auto.setup.streamed[SECOND]
    assert 3 <= first < second < 48
    assert least.card < auto.card
    one_less = modes.plan_for(MODEL, WORK, replace(auto.setup, streamed={FIRST: first - 1, SECOND: second}))
    assert not fits(one_less, machine)


def test_images_and_longer_videos_take_more() -> None:
    def second_stage(work: Work) -> int:
        plan = modes.smallest_plan(MODEL, work)
        return next(phase.card for phase in plan.phases if phase.name == "stage 2")

    longer = hq_work(VideoShape(241, 1088, 1920, 24.0), OFFICIAL)
    assert second_stage(WORK) < second_stage(replace(WORK, images=1)) < second_stage(longer)
    assert any(phase.name == "images" for phase in modes.smallest_plan(MODEL, replace(WORK, images=1)).phases)


sizes_in_gb = st.integers(4, 200)


@settings(max_examples=60, deadline=None)
@given(vram=sizes_in_gb, ram=sizes_in_gb, more=st.integers(1, 100))
def test_more_memory_never_reads_more(vram: int, ram: int, more: int) -> None:
    small, large = (modes.best_plan(MODEL, WORK, card(*size)) for size in ((vram, ram), (vram + more, ram + more)))
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
        plan = advice.plan_or_refuse(MODEL, WORK, machine, mode)
    except DeviceError as error:
        assert "GB" in str(error.expected) and "GB free" in str(error.found)
        assert modes.best_plan(MODEL, WORK, machine, mode) is None
    else:
        assert fits(plan, machine)
        assert mode in ("auto", plan.mode)


def test_a_mode_that_does_not_fit_names_the_one_that_does() -> None:
    with pytest.raises(DeviceError, match="--residency resident") as caught:
        advice.plan_or_refuse(MODEL, WORK, card(48), "resident", "cuda:0")
    assert caught.value.problem.startswith("cuda:0 has too little free memory")
    assert caught.value.next == "the same command with --residency swap"
    assert str(caught.value.found) == "48.0 GB free"


def test_a_card_for_no_mode_gets_a_smaller_video_that_fits() -> None:
    work = hq_work(VideoShape(721, 1088, 1920, 24.0), OFFICIAL)
    machine = card(16)
    with pytest.raises(DeviceError) as caught:
        advice.plan_or_refuse(MODEL, work, machine, "auto")
    words = caught.value.next.split()
    flags = {name: int(words[words.index(name) + 1].strip(",")) for name in ("--height", "--width", "--num-frames")}
    smaller = hq_work(VideoShape(flags["--num-frames"], flags["--height"], flags["--width"], 24.0), OFFICIAL)
    assert modes.best_plan(MODEL, smaller, machine) is not None
    with pytest.raises(DeviceError, match="a card with more memory"):
        advice.plan_or_refuse(MODEL, work, card(8), "auto")


def test_a_small_host_is_named_as_such() -> None:
    with pytest.raises(DeviceError, match="the host has too little free memory") as caught:
        advice.plan_or_refuse(MODEL, WORK, Machine(GB, 141 * GB), "auto", "cuda:0")
    assert "--ram" in caught.value.next and "--vram" not in caught.value.next


@pytest.mark.parametrize("mode", ["auto", "resident"])
@pytest.mark.parametrize("vram", [2.0, 5.77])
def test_what_is_said_to_be_needed_is_enough(vram: float, mode: str) -> None:
    with pytest.raises(DeviceError) as caught:
        advice.plan_or_refuse(MODEL, WORK, Machine(500 * GB, int(vram * GB)), mode)
    needed = float(str(caught.value.expected).split()[0])
    assert float(str(caught.value.found).split()[0]) < needed
    assert advice.plan_or_refuse(MODEL, WORK, Machine(500 * GB, int(needed * GB)), mode)


def test_on_a_cpu_nobody_is_sent_to_the_cpu() -> None:
    with pytest.raises(DeviceError) as caught:
        advice.plan_or_refuse(MODEL, WORK, Machine(GB), "auto", "cpu")
    assert "--fps" in caught.value.next and "--device" not in caught.value.next


def test_without_a_card_both_share_the_host() -> None:
    plan = modes.best_plan(MODEL, WORK, Machine(200 * GB))
    assert plan is not None and plan.mode == "resident"
    most = max(phase.needed + phase.host for phase in plan.phases)
    assert fits(plan, Machine(most)) and not fits(plan, Machine(most - 1))
    assert modes.best_plan(MODEL, WORK, Machine(60 * GB)) is not None


def test_two_stages_of_one_transformer_hold_it_once() -> None:
    model = replace(MODEL, transformers={"base": MODEL.transformers[FIRST]})
    resident = modes.plan_for(model, ALONE, Setup("resident"))
    assert modes.plan_for(MODEL, WORK, Setup("resident")).card - resident.card == pytest.approx(38 * GB, rel=0.01)
    filled = modes.best_plan(model, ALONE, card(24))
    assert filled is not None and list(filled.setup.streamed) == ["base"]


def test_after_memory_ran_out_a_smaller_mode_is_named() -> None:
    chain = [Setup("resident"), Setup("swap"), Setup("stream", streamed={FIRST: 3, SECOND: 3})]
    found = [advice.after_shortage(setup, "auto") for setup in chain]
    assert ["swap" in found[0], "stream" in found[1], "stream" in found[2]] == [True] * 3
    assert "--num-frames" in advice.after_shortage(chain[2], "stream")


def test_what_is_read_from_disk() -> None:
    text_encoder, small = (
        MODEL.parts["text_encoder"].stored,
        sum(part.stored for name, part in MODEL.parts.items() if name != "text_encoder"),
    )
    transformers = sum(part.stored for part in MODEL.transformers.values())
    resident = modes.plan_for(MODEL, WORK, Setup("resident", keep_parts=True))
    assert resident.first_read == text_encoder + small + transformers
    assert resident.next_read == text_encoder
    swap = modes.plan_for(MODEL, WORK, Setup("swap"))
    assert swap.next_read == swap.first_read == resident.first_read
    with_image = modes.plan_for(MODEL, replace(WORK, images=1), Setup("swap"))
    assert with_image.first_read == swap.first_read + MODEL.parts["vae"].stored
    kept = modes.plan_for(MODEL, WORK, Setup("swap", weights="kept"))
    assert kept.next_read == swap.next_read - transformers
    streamed = modes.plan_for(MODEL, WORK, Setup("stream", weights="file", streamed={FIRST: 48, SECOND: 48}))
    passes = sum(stage.evaluations for stage in WORK.stages)
    blocks = sum(MODEL.transformers[FIRST].blocks) / MODEL.transformers[FIRST].total
    assert streamed.first_read - swap.first_read == pytest.approx(passes * blocks * transformers / 2, rel=1e-6)


# What a plan puts into the room it finds


def text_phase(plan: Plan) -> modes.Phase:
    return next(phase for phase in plan.phases if phase.name == "text")


def best(work: Work, machine: Machine, mode: str = "auto") -> Plan:
    found = modes.best_plan(MODEL, work, machine, mode)
    assert found is not None
    return found


@pytest.mark.parametrize(("vram", "ram"), [(141, 128), (141, 96), (48, 128), (48, 256)])
def test_what_has_room_in_the_page_cache(vram: int, ram: int) -> None:
    machine = card(vram, ram)
    plan = best(WORK, machine)
    taken = plan.host + modes.CACHE_MARGIN
    assert modes.cacheable(plan, machine) == min(max(machine.host - taken, 0), plan.first_read)
    for room in (-1, 0, 1, plan.first_read - 1, plan.first_read, plan.first_read + 1):
        expected = min(max(room, 0), plan.first_read)
        assert modes.cacheable(plan, Machine(taken + room, machine.card)) == expected


def test_how_files_are_read_is_told() -> None:
    machine = card(48, 256)
    plan = best(WORK, machine)
    rooms = (plan.first_read, plan.first_read - 30 * GB, 0)
    machines = [Machine(plan.host + modes.CACHE_MARGIN + room, machine.card) for room in rooms]
    start = "reads auto: past the page cache, but for what is there; "
    assert [report.reading(plan, "auto", each) for each in machines] == [
        start + "all 108.7 GB are brought there while the device computes, for the next run",
        start + "78.7 GB of 108.7 GB are brought there while the device computes, for the next run",
        start + "it has no room for more",
    ]
    for asked in ("direct", "cached"):
        assert report.reading(plan, asked, machine) == f"reads {asked}: as asked for"


def test_without_a_card_the_page_cache_shares_the_host_with_everything() -> None:
    plan = modes.best_plan(MODEL, WORK, Machine(400 * GB))
    assert plan is not None
    most = max(phase.host + phase.needed for phase in plan.phases) + modes.CACHE_MARGIN
    assert modes.cacheable(plan, Machine(most + plan.first_read)) == plan.first_read
    assert modes.cacheable(plan, Machine(most + 5)) == 5


def test_blocks_stay_on_the_host_between_videos_as_far_as_it_goes() -> None:
    machine = card(24, 64)
    plan = best(WORK, machine)
    first, second = plan.setup.held[FIRST], plan.setup.held[SECOND]
    assert plan.setup.weights == "blocks" and first == plan.setup.streamed[FIRST]
    assert 0 < second <= plan.setup.streamed[SECOND]
    block = MODEL.transformers[FIRST].largest
    assert plan.first_read - plan.next_read == pytest.approx((first + second) * block, rel=1e-3)
    assert plan.next_read < 0.7 * plan.first_read
    room = machine.host - plan.host
    assert modes.HELD_MARGIN <= room < modes.HELD_MARGIN + block
    without = modes.plan_for(MODEL, WORK, replace(plan.setup, held={}))
    assert text_phase(plan).host - text_phase(without).host == (first + second) * block
    # Streamed blocks of a stage that are held need no second place while it runs.
    stage = {p.name: p.host for p in plan.phases}["stage 1"]
    assert stage - {p.name: p.host for p in without.phases}["stage 1"] == second * block


def test_with_still_more_memory_the_others_are_held_too() -> None:
    setup = best(WORK, card(32, 64)).setup
    assert setup.held[FIRST] == 48 and setup.streamed[SECOND] < setup.held[SECOND] < 48
    assert best(WORK, card(32, 128)).setup.weights == "kept"


def test_for_one_video_nothing_is_held_that_is_read_once() -> None:
    once = replace(WORK, once=True)
    assert best(once, card(24, 64)).setup.held == best(once, card(32, 64)).setup.held == {}


def test_what_would_be_read_at_every_step_is_held_even_for_one_video() -> None:
    plan = best(replace(WORK, once=True), card(24, 22))
    assert plan.setup.weights == "file"
    first = plan.setup.held[FIRST]
    assert 0 < first < plan.setup.streamed[FIRST] and plan.setup.held[SECOND] == 0
    without = modes.plan_for(MODEL, WORK, replace(plan.setup, held={}))
    saved = WORK.evaluations(FIRST) * first * MODEL.transformers[FIRST].largest
    assert without.first_read - plan.first_read == pytest.approx(saved, rel=1e-3)


def test_two_stages_of_one_transformer_hold_its_blocks_once() -> None:
    model = replace(MODEL, transformers={"base": MODEL.transformers[FIRST]})
    plan = modes.best_plan(model, ALONE, card(24, 40))
    assert plan is not None and plan.setup.weights == "blocks"
    first = plan.setup.held["base"]
    assert first > 0
    without = modes.plan_for(model, ALONE, replace(plan.setup, held={}))
    assert text_phase(plan).host - text_phase(without).host == first * MODEL.transformers[FIRST].largest
    for ram in range(12, 70):
        for once in (False, True):
            found = modes.best_plan(model, replace(ALONE, once=once), card(24, ram))
            assert found is not None and found.setup.held.get("base", 0) <= (
                found.setup.streamed["base"] if once else 48
            )


@pytest.mark.parametrize("vram", [16, 24, 40])
def test_a_larger_host_never_reads_more(vram: int) -> None:
    plans = [plan for ram in range(8, 140) if (plan := modes.best_plan(MODEL, WORK, card(vram, ram))) is not None]
    assert len({plan.setup.weights for plan in plans}) >= 3
    for small, large in pairwise(plans):
        assert large.first_read <= small.first_read and large.next_read <= small.next_read, (small.setup, large.setup)


def test_many_prompts_encoded_together_are_counted_and_one_is_not() -> None:
    machine = card(48, 128)
    alone, many = best(WORK, machine), best(replace(WORK, prompts=64), machine)
    assert alone.hidden == 0 and many.hidden == HIDDEN_BYTES
    contexts = 63 * contexts_of(MODEL.widths, MODEL.itemsize)
    assert contexts == pytest.approx(1.6e9, rel=0.02)
    assert text_phase(many).host - text_phase(alone).host == HIDDEN_BYTES + contexts
    for one, other in zip(alone.phases, many.phases, strict=True):
        more = HIDDEN_BYTES if one.name in ("text", "connectors") else 0
        assert other.host - one.host == more + contexts and other.card == one.card
    few = best(replace(WORK, prompts=3), machine)
    assert few.hidden == 2 * hidden_states(MODEL.widths, MODEL.itemsize) < HIDDEN_BYTES


def test_hidden_states_take_what_is_free_and_never_another_mode() -> None:
    machine = card(24, 30)
    alone, many = best(WORK, machine), best(replace(WORK, prompts=64), machine)
    assert alone.setup == many.setup and alone.setup.text == "layers"
    assert 0 <= many.hidden < HIDDEN_BYTES and fits(many, machine)


@pytest.mark.parametrize(("vram", "tiles"), [(24, 2), (48, 1), (141, 1)])
def test_larger_tiles_where_the_card_has_room(vram: int, tiles: int) -> None:
    machine = card(vram)
    official, fast = best(WORK, machine), best(replace(WORK, decode="fast"), machine)
    assert fast.setup == official.setup and official.tiling == auto_tiling(34, 60)
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
    swap = Setup("swap")
    plenty = modes.fitting_plan(MODEL, work, Machine(60 * GB, 48 * GB), swap)
    assert plenty is not None and plenty.host == plenty.phases[-1].host
    tight = modes.fitting_plan(MODEL, work, Machine(plenty.host - 1, 48 * GB), swap)
    assert tight is not None and tight.tiling == auto_tiling(34, 60) != plenty.tiling


@settings(max_examples=60, deadline=None)
@given(vram=st.integers(8, 140), blocks=st.integers(1, 40), seconds=st.integers(1, 20))
def test_fast_tiles_fit_whatever_the_size(vram: int, blocks: int, seconds: int) -> None:
    work = hq_work(VideoShape(24 * seconds + 1, 64 * blocks, 64 * (blocks + 3), 24.0), OFFICIAL, decode="fast")
    machine = card(vram)
    plan = modes.best_plan(MODEL, work, machine)
    if plan is not None:
        assert fits(plan, machine)
        grid, official = work.shape.grid, auto_tiling(*work.shape.grid[1:])
        assert Tiles.of(grid, plan.tiling).count <= Tiles.of(grid, official).count


def test_without_a_card_the_host_has_the_tiles() -> None:
    plan = best(replace(WORK, decode="fast"), Machine(400 * GB))
    assert Tiles.of(WORK.shape.grid, plan.tiling).count == 1 and fits(plan, Machine(400 * GB))


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


def test_numbers_that_stand_in_two_rooms_are_the_same() -> None:
    """Planning imports no torch, so it has its own copy."""
    assert modes.READ_BUFFERS == 3 * (reading.IN_FLIGHT + reading.LANDING) * reading.PIECE
    assert set(load.FLOATS) == sizes.FLOATS
    names = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in load.FLOATS.values()}
    assert sizes.DTYPES.items() <= names.items()


def test_blocks_are_spread_and_counted() -> None:
    from ltxpack.runtime.weights.keeper import spread

    for total in (1, 5, 48):
        for count in range(total + 1):
            chosen = sorted(spread(count, total))
            assert len(chosen) == count
            assert all(0 <= number < total for number in chosen)
            gaps = [b - a for a, b in pairwise(chosen)]
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_part_with_other_dtypes() -> None:
    tensors = [("transformer_blocks.0.w", "F32", (10, 10)), ("scale", "F32", (3,)), ("count", "I64", (2,))]
    part = sizes.part_of("transformer", tensors, 2)
    assert part == Part(stored=400 + 12 + 16, rest=6 + 16, blocks=(sizes.aligned(200),))
    assert isinstance(MODEL, Model)
