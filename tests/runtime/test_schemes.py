"""What several devices gain, by counting: the figures of the default video, and what moves between devices."""

from __future__ import annotations

import dataclasses

import pytest

from ltxpack.errors import UsageError
from ltxpack.ltx23.expected import published_configs
from ltxpack.runtime.model.config import DiTConfig
from ltxpack.runtime.overlay import official_transformers
from ltxpack.runtime.parallel import schemes
from ltxpack.runtime.parallel.schemes import (
    AUTO,
    BOTH,
    DATA,
    GUIDANCE,
    SEQUENCE,
    STAGES,
    Lengths,
    Rates,
    Split,
    forward_parts,
)
from ltxpack.runtime.request import Request
from ltxpack.runtime.weights.plan import Work

CONFIG = DiTConfig.from_dict(published_configs()["transformer"])
BF16 = 2


def work(recipe: str) -> Work:
    request = Request.of("", recipe=recipe)
    return request.work(official_transformers(request.recipe))


def gain(recipe: str, scheme: str, devices: int) -> float | None:
    found = schemes.counted(scheme, CONFIG, work(recipe), devices, BF16)
    return None if found is None else round(found.gain, 2)


def test_the_default_video_is_93_passes_of_8160_tokens_and_seven_of_32640() -> None:
    first, second = work("hq").stages
    assert (first.evaluations * first.passes, first.shape.tokens) == (93, 8160)
    assert (second.evaluations * second.passes, second.shape.tokens) == (7, 32640)
    found = schemes.counted(DATA, CONFIG, work("hq"), 2, BF16)
    assert found is not None and [round(share, 2) for share in found.shares] == [0.68, 0.32]
    # Spec 07, section 5: a pass without attention between the modalities is a little less.
    assert round(schemes.video_flops(CONFIG, work("hq")) / 1e15, 1) == 36.8
    stage = work("distilled").stages[0]
    alone = dataclasses.replace(work("distilled"), stages=(stage,))
    assert schemes.video_flops(CONFIG, alone) == schemes.stage_flops(CONFIG, alone, stage, Split())


@pytest.mark.parametrize(
    ("recipe", "scheme", "gains"),
    [
        # (0.68 · 2/3 + 0.32)⁻¹ and (0.68 / 3 + 0.32)⁻¹; a fourth device has no pass left to make.
        ("hq", GUIDANCE, {2: 1.29, 3: 1.83, 4: 1.83}),
        ("hq", BOTH, {2: 1.63, 3: 2.58, 4: 3.25, 8: 6.4}),
        ("hq", SEQUENCE, {2: 1.97, 3: None, 4: 3.84}),
        # 0.68⁻¹: the shorter stage waits for the longer one.
        ("hq", STAGES, {2: 1.47, 4: None}),
        ("hq", DATA, {2: 2, 8: 8}),
        ("distilled", GUIDANCE, {2: None}),
        ("distilled", BOTH, {2: None}),
        ("distilled", SEQUENCE, {2: 1.98}),
        ("two-stage", BOTH, {2: 2.0, 4: 3.99}),
        ("one-stage", GUIDANCE, {2: 2.0, 4: 4.0}),
        ("one-stage", STAGES, {2: None}),
    ],
)
def test_gains(recipe: str, scheme: str, gains: dict[int, float | None]) -> None:
    assert {devices: gain(recipe, scheme, devices) for devices in gains} == gains


def test_what_has_no_use_for_so_many_devices_says_why() -> None:
    def why(recipe: str, scheme: str, devices: int) -> str:
        return schemes.unused(scheme, CONFIG, work(recipe), devices)

    assert why("distilled", GUIDANCE, 2) == "no stage is guided"
    assert why("hq", SEQUENCE, 3) == "32 heads do not divide by 3"
    with pytest.raises(UsageError, match="cannot share 32 attention heads over 3 devices"):
        schemes.check_heads(SEQUENCE, CONFIG, 3)
    assert not why("hq", BOTH, 3), "one device is left over in stage 2"
    assert why("one-stage", BOTH, 2) == "guidance alone does as much"
    assert why("hq", STAGES, 3) == "there are 2 stages"
    assert not any(why("hq", scheme, 2) for scheme in (*schemes.OF_ONE, *schemes.OF_MANY))


def test_guided_stages_take_passes_first_and_a_single_pass_is_cut() -> None:
    assert [schemes.split_of(BOTH, CONFIG, work("hq"), stage, 8) for stage in work("hq").stages] == [
        Split(groups=4, shards=2), Split(groups=1, shards=8),
    ]  # fmt: skip


def test_bytes_that_move() -> None:
    whole = work("hq")
    first, second = whole.stages
    alone = schemes.stage_received(CONFIG, whole, first, Split(), BF16)
    assert alone == schemes.stage_received(CONFIG, whole, second, Split(), BF16) == 0
    # Of three passes a rank of two that makes one gets the velocities of the other two, in 31 evaluations.
    latents = (8160 * 128 + first.shape.audio_length * 128) * BF16
    assert schemes.stage_received(CONFIG, whole, first, Split(groups=2), BF16) == 31 * 2 * latents
    # Of the tokens of one pass over two ranks each gets half of the other's in queries, keys, values and what they
    # attended to, half of their keys and values for the sound, and half of what the sound attended to.
    own, sound = 32640 // 2, second.shape.audio_length
    block = (4 * own * 4096 // 2 + 2 * own * 2048 // 2 + sound * 2048 // 2) * BF16
    velocities = (own + sound) * 128 * BF16
    assert schemes.stage_received(CONFIG, whole, second, Split(shards=2), BF16) == 7 * (48 * block + velocities)


def test_tokens_that_do_not_divide_are_padded() -> None:
    uneven, even = (forward_parts(CONFIG, Lengths(count, 126, 1024), 32) for count in (8161, 8192))
    assert uneven["video feed-forward"] == even["video feed-forward"]


def test_auto_takes_the_fastest_ways_for_the_link_there_is() -> None:
    def splits(devices: int, link: float, recipe: str = "hq") -> tuple[Split, ...]:
        rates = Rates(flops=6e14, link=link)
        return schemes.shared(AUTO, CONFIG, work(recipe), devices, BF16, rates).splits

    fast, slow = 300e9, 6e9
    assert splits(2, fast) == (Split(1, 2), Split(1, 2))
    assert splits(4, fast) == (Split(1, 4), Split(1, 4))
    assert splits(2, slow) == (Split(2, 1), Split(1, 1)), "moving the tokens takes longer than all the work"
    assert splits(3, slow) == (Split(3, 1), Split(1, 1))
    assert splits(3, fast) == (Split(3, 1), Split(1, 2)), "three do not share 32 heads"
    assert splits(2, fast, "distilled") == (Split(1, 2), Split(1, 2))


def test_a_choice_in_words() -> None:
    assert list(map(str, (Split(), Split(3), Split(1, 2), Split(2, 4)))) == [
        "not shared out", "guidance over 3", "sequence over 2", "guidance over 2 x sequence over 4",
    ]  # fmt: skip
