"""Puts the weights of a bake that is made on the way into an exported file; nothing else of it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ltxpack.export.plan import Unit
from ltxpack.lora_bake.bake import UnwrittenBake
from ltxpack.lora_bake.plan import BakePlan
from ltxpack.lora_bake.stream import Engine, ShardOutput
from ltxpack.lora_bake.trial import settled, tell_idle
from ltxpack.repack.write import TensorWriter
from ltxpack.reporter import Reporter


def bake_units(
    made: UnwrittenBake, units: Sequence[Unit], writer: Callable[[Unit], TensorWriter], reporter: Reporter
) -> None:
    """Raises AdapterError listing the weights that overflow, OverlayError for a base that changed."""
    plan = made.plan
    adapters = settled([lora.adapter for lora in plan.loras], plan.base, reporter)
    tell_idle([plan], plan.base, reporter)
    # No report of an export says how far its weights are from the sums.
    with Engine(adapters, made.arithmetic, reporter, measure=False) as engine:
        for unit in units:
            engine.fuse_shard(unit.shard, [_output(unit, plan, writer)])


def _output(unit: Unit, plan: BakePlan, writer: Callable[[Unit], TensorWriter]) -> ShardOutput:
    return ShardOutput(unit.shard.record.path, unit.entries, plan.strengths_in, lambda buffers: writer(unit))
