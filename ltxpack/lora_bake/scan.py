"""Looks through an adapter from end to end before anything is fused: its content hash, and no NaN or infinity in it.

Needs no torch, so that torch can be imported meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from blake3 import blake3

from ltxpack.errors import AdapterError
from ltxpack.files.tensorfile import open_source, read_tensorfile
from ltxpack.lora_bake.adapter import Adapter
from ltxpack.lora_bake.reading import blocks, with_config
from ltxpack.reporter import Reporter

# A value is NaN or infinite exactly where all of these bits are set; F8_E4M3 has no infinity, and one NaN per sign.
_NOT_FINITE: Mapping[str, tuple[type[np.unsignedinteger], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E5M2": (np.uint8, 0x7C),
}
_PART = 1 << 17  # elements looked at together: what stays in a core's cache


def scan(adapter: Adapter, reporter: Reporter) -> str:
    """The adapter's blake3 (of the weights, and of a PEFT configuration if there is one), every factor looked at.

    Raises AdapterError listing the tensors that hold NaN or infinity.
    """
    wanted = {part.key for target in adapter.targets.values() for part in target.parts}
    tensors = [info for info in read_tensorfile(adapter.path).tensors.values() if info.name in wanted]
    hasher, bad, position = blake3(), [], 0
    reporter.begin(f"read {adapter.path.name}", adapter.size, "B")
    with open_source(adapter.path) as file:
        for info in tensors:
            for data in blocks(file.fileno(), position, info.start, adapter.path):
                hasher.update(data)
                reporter.advance(len(data))
            finite = True
            for data in blocks(file.fileno(), info.start, info.start + info.nbytes, adapter.path):
                hasher.update(data)
                finite = finite and all_finite(data, info.dtype)
                reporter.advance(len(data))
            position = info.start + info.nbytes
            if not finite:
                bad.append(info.name)
        for data in blocks(file.fileno(), position, adapter.size, adapter.path):
            hasher.update(data)
            reporter.advance(len(data))
    reporter.end()
    if bad:
        raise AdapterError(f"holds NaN or infinity in {len(bad)} tensors", file=adapter.path, items=bad)
    return with_config(hasher.hexdigest(), adapter.config)


def all_finite(data: memoryview, dtype: str) -> bool:
    """Whether no value among ``data``, whole values of ``dtype`` (as safetensors names it), is NaN or infinite."""
    kind, pattern = _NOT_FINITE[dtype]
    bits, mask = np.frombuffer(data, kind), kind(pattern)
    masked = np.empty(min(_PART, bits.size), kind)
    for start in range(0, bits.size, _PART):
        part = bits[start : start + _PART]
        if np.bitwise_and(part, mask, out=masked[: part.size]).max() == mask:
            return False
    return True
