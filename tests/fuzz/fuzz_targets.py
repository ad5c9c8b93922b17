"""Every place where a file from outside is read, each with valid files to start from and the real way in.

A target puts bytes where such a file lies and calls what a command calls. It may succeed or raise LtxpackError; an
attempt that does anything else, takes long, takes much memory or writes outside its folder is a finding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from PIL import Image

from ltxpack.activations import ActivationsFile
from ltxpack.cli import COMMANDS
from ltxpack.demo.checkpoint import write_source
from ltxpack.errors import LtxpackError
from ltxpack.files.tensorfile import build_header, read_index, read_tensorfile, tensor_nbytes
from ltxpack.lora_bake import BakeOptions, plan_bake
from ltxpack.lora_bake.adapter import Adapter, open_adapter
from ltxpack.lora_bake.find import locate, scan
from ltxpack.lora_bake.fuse import fuse_rows
from ltxpack.lora_bake.stream import FactorReader
from ltxpack.manifest import MANIFEST_NAME, Bake, BakedLora, Manifest, read_manifest
from ltxpack.materialize import Options, inspect_path, materialize, plan_overlay
from ltxpack.materialize.access import Access, local_folder
from ltxpack.materialize.checkpoint import read_lora, read_upsampler
from ltxpack.materialize.inputs import read_text_encoder
from ltxpack.repack.verify import verify
from ltxpack.reporter import SilentReporter
from ltxpack.runtime.media.pictures import MAX_PIXELS, ORIENTATION, read_image
from ltxpack.runtime.prompts_file import read_lines
from ltxpack.runtime.settings import SettingsGiven

# Twenty times what a sound file takes: to be read, and where a whole command is gone through for it.
SECONDS, COMMAND_SECONDS = 1.0, 5.0
# Many times what the largest file tried here takes (200 KB of JSON).
MEMORY = 64 * 1024 * 1024
TRIES = 3
LONGEST_MESSAGE = 8000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
QUIET = SilentReporter()

Shapes = Mapping[str, tuple[int, ...]]


class Finding(AssertionError):
    """An attempt that ended in no way it may end."""


class Costly(Finding):
    """An attempt that took long, or much memory. What is so by itself is so each time; a busy machine is not."""


@dataclass(frozen=True)
class Target:
    """``path`` is where the bytes are put, with ``tail`` zero bytes of payload after them; ``call`` reads them, within
    ``seconds`` and ``memory``.
    """

    name: str
    path: Path
    call: Callable[[], object]
    seeds: tuple[bytes, ...]
    tail: int = 0
    seconds: float = SECONDS
    memory: int = MEMORY

    def put(self, data: bytes) -> None:
        """Write ``data`` with its payload; the payload is a hole in the file."""
        with self.path.open("wb") as file:
            file.write(data)
            file.truncate(len(data) + self.tail)

    def begin(self) -> None:
        """Read a sound file once: what a process imports for the first of them is no file's fault."""
        before = self.path.read_bytes() if self.path.exists() else None
        self.put(self.seeds[0])
        self.call()
        if before is not None:
            self.path.write_bytes(before)

    def attempt(self, data: bytes) -> str | None:
        """What was refused, or None. Raises Finding; what lay at ``path`` before is put back."""
        before = self.path.read_bytes() if self.path.exists() else None
        self.put(data)
        try:
            for _ in range(TRIES - 1):
                with contextlib.suppress(Costly):
                    return _watched(self)
            return _watched(self)
        finally:
            if before is not None:
                self.path.write_bytes(before)


class Guard:
    """Tells of files written, made or removed outside ``allowed`` and of programs started, while it is on.

    An audit hook: it cannot be taken off again, so one serves the whole process.
    """

    CHANGING = frozenset(
        f"os.{name}" for name in ("rename", "remove", "rmdir", "mkdir", "symlink", "link", "truncate", "chmod")
    )
    FORBIDDEN = frozenset(
        [
            "pickle.find_class",
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
            "socket.getaddrinfo",
        ]
    )

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by Python for everything it does."""
        if self.allowed is None:
            return
        changed: tuple[Any, ...] = ()
        if event in self.FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event in self.CHANGING:
            # What a symbolic link says is no place that changes.
            changed = arguments[1:2] if event == "os.symlink" else arguments[:2]
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            changed = arguments[:1]
        for path in changed:
            if isinstance(path, str | bytes | os.PathLike):
                real = os.path.realpath(Path(os.fsdecode(path)).parent)
                if real != self.allowed and not real.startswith(self.allowed + os.sep):
                    self.seen.append(f"{event} {path!r}")


@functools.cache
def guard() -> Guard:
    """The process's guard. The commands, which every ``next`` is compared with, are imported before, not under it."""
    for command in COMMANDS:
        import_module(f"ltxpack.cli.{command.replace('-', '_')}")
    return Guard()


def _watched(target: Target) -> str | None:
    watch, before = guard(), _begin_peak()
    watch.seen, watch.allowed = [], os.path.realpath(target.path.parent)
    began = time.thread_time()
    message = None
    try:
        target.call()
    except LtxpackError as error:
        message = str(error)
    except BaseException as error:
        raise Finding(f"{target.name}: {type(error).__name__}: {error!s:.300}") from error
    finally:
        spent = time.thread_time() - began
        watch.allowed = None
    peak = _status("VmHWM") - before
    if watch.seen:
        raise Finding(f"{target.name}: {watch.seen[:3]}")
    if spent > target.seconds or peak > target.memory:
        raise Costly(f"{target.name}: {spent:.2f} s, {peak / 1e6:.0f} MB")
    if message is not None and (len(message) > LONGEST_MESSAGE or not message.replace("\n", "").isprintable()):
        raise Finding(f"{target.name}: a message that no terminal should show: {message[:300]!r}")
    return message


def _begin_peak() -> int:
    """Resident bytes now, from which on the kernel notes the peak anew (tracemalloc would take ten times as long)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not permitted: only growth beyond the highest peak so far is seen
        return _status("VmHWM")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def make_targets(folder: Path, made: Path | None = None) -> dict[str, Target]:
    """All targets, working in ``folder``, which must be empty. ``made``: the demo's source, which is copied."""
    source, overlay = folder / "source", folder / "overlay"
    write_source(source) if made is None else shutil.copytree(made, source)
    materialize(Options(str(source), overlay, max_shard_size=150_000), QUIET)
    targets = [
        *_loose(folder / "loose"),
        *_of_a_run(folder / "run"),
        *_source(source, folder),
        *_overlay(overlay),
        *_adapters(folder, overlay),
    ]
    for target in targets:
        target.begin()
    return {target.name: target for target in targets}


def _loose(folder: Path) -> Iterator[Target]:
    """Files read for themselves."""
    folder.mkdir()
    path = folder / "x.safetensors"
    tensors = [("a.weight", "BF16", (2, 3)), ("b", "F32", ()), ("c", "I64", (0, 4)), ("d.é", "F8_E4M3", (5,))]
    header = build_header(tensors, {"format": "pt", "config": '{"a": 1}'})
    data = bytes(sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors))

    def read() -> None:
        file, library = read_tensorfile(path), dict(safetensors.deserialize(path.read_bytes()))
        found = {name: (info.dtype, list(info.shape)) for name, info in file.tensors.items()}
        assert found == {name: (info["dtype"], info["shape"]) for name, info in library.items()}
        inspect_path(path)

    yield Target("header", path, read, (header + data, build_header([], {}), _quantised()))
    index = folder / "x.safetensors.index.json"
    names = {"a.weight": "x-1.safetensors", "b": "x-2.safetensors"}
    text = json.dumps({"metadata": {"total_size": 16}, "weight_map": names}).encode()
    yield Target("index", index, lambda: read_index(index), (text,))
    largest = folder / "activations.safetensors"
    met = (
        ActivationsFile("2.3.0", "0" * 64)
        .with_larger("base", (), {"a": 1.0})
        .with_larger("x", (("1", 0.5),), {"a": 2.0})
    )
    yield Target("activations", largest, lambda: ActivationsFile.read(largest).dump(), (met.dump(),))


def _of_a_run(folder: Path) -> Iterator[Target]:
    """What ``ltxpack run`` is given besides an overlay: a prompts file in any form, and pictures."""
    folder.mkdir()
    (folder / "a.png").write_bytes(next(_pictures()))
    videos = [
        {"prompt": "a boat", "seed": 1, "images": [{"path": "a.png", "frame": "last", "strength": 0.5}]},
        {"prompt": "é", "negative_prompt": "x", "recipe": "hq", "output": "b.mp4", "fps": 24.0, "num_frames": 17},
    ]
    lines = "\n".join(json.dumps(video, ensure_ascii=False) for video in videos)
    size = SettingsGiven(height=64, width=64, num_frames=9)
    listed = (lines, "\ufeff" + lines.replace("\n", ",\r\n"), json.dumps(videos), json.dumps(videos, indent=1))
    for name, seeds in (
        ("prompts.jsonl", (*(text.encode() for text in listed), lines.encode("utf-16"))),
        ("prompts.txt", (b"A boat, at sea.\n\nA dog.\r\n", "Ein Fähnchen.\n".encode("utf-16"))),
    ):
        path = folder / name
        yield Target(name, path, functools.partial(read_lines, path, size), seeds)
    picture = folder / "picture"
    # A header may claim as many pixels as are taken at all.
    most = {"seconds": 20.0, "memory": 20 * MAX_PIXELS}
    yield Target("picture", picture, functools.partial(read_image, picture), tuple(_pictures()), **most)


def _pictures() -> Iterator[bytes]:
    """Small pictures of the usual formats, with EXIF data and 16 bits where they may have them."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    ramp = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    deep = Image.fromarray(ramp[..., 0].astype(np.uint16) * 257)
    for image, form in (
        *(
            (Image.fromarray(ramp), form)
            for form in ("png", "jpeg", "webp", "bmp", "tiff", "gif", "ppm", "tga", "avif")
        ),
        *((deep, form) for form in ("png", "tiff", "ppm")),
    ):
        file = io.BytesIO()
        image.save(file, form, **({"exif": exif} if form in ("png", "jpeg", "webp") else {}))
        yield file.getvalue()


def _quantised() -> bytes:
    """An fp8 linear with all that may say so."""
    name, text = "model.diffusion_model.transformer_blocks.0.attn1.to_q", b'{"format": "float8_e4m3fn"}'
    entries = {"weight_scale": ("F32", ()), "input_scale": ("F32", ()), "weight": ("F8_E4M3", (2, 3))}
    entries["comfy_quant"] = ("U8", (len(text),))
    layers = {"format_version": "1.0", "layers": {name: {"format": "float8_e4m3fn"}}}
    metadata = {"_quantization_metadata": json.dumps(layers), "model_version": "2.3.0", "ltxpack": '{"bake": "x"}'}
    return build_header(((f"{name}.{end}", *entry) for end, entry in entries.items()), metadata) + bytes(14) + text


def _source(source: Path, folder: Path) -> Iterator[Target]:
    """Inputs of ``materialize``: the checkpoint through the whole plan, the others through their part of it."""
    options = Options(str(source), folder / "out")

    readers: dict[str, tuple[str, Callable[[Path], object]]] = {
        "checkpoint": ("*-dev.*", lambda path: plan_overlay(options, QUIET)),
        "lora": ("*-lora-*", lambda path: read_lora(read_tensorfile(path))),
        "upsampler": ("*-upscaler-*", lambda path: read_upsampler(read_tensorfile(path), 128, path)),
    }

    def look(path: Path, read: Callable[[Path], object]) -> None:
        inspect_path(path)
        read(path)

    for name, (pattern, call) in readers.items():
        [path] = source.glob(pattern)
        head, tail = _split(path)
        seconds = COMMAND_SECONDS if name == "checkpoint" else SECONDS
        yield Target(name, path, functools.partial(look, path, call), (head,), tail, seconds)
    yield from _text_encoder(source / "gemma")


def _text_encoder(gemma: Path) -> Iterator[Target]:
    def read() -> None:
        read_text_encoder(local_folder(gemma), Access(QUIET), None)

    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        yield Target(f"gemma {name}", gemma / name, read, ((gemma / name).read_bytes(),))
    head, tail = _split(gemma / "model.safetensors")
    yield Target("gemma weights", gemma / "model.safetensors", read, (head,), tail)
    names = dict.fromkeys(read_tensorfile(gemma / "model.safetensors").tensors, "model.safetensors")
    index = gemma / "model.safetensors.index.json"
    text = json.dumps({"metadata": {}, "weight_map": names}).encode()
    index.write_bytes(text)
    yield Target("gemma index", index, read, (text,))


def _overlay(overlay: Path) -> Iterator[Target]:
    """An overlay edited by hand, as ``verify``, ``inspect`` and ``bake-lora`` read it."""
    bake = functools.partial(plan_bake, BakeOptions(overlay, (0.5,)), QUIET)

    def look() -> None:
        read_manifest(overlay)
        inspect_path(overlay)
        verify(overlay, QUIET)

    path = overlay / MANIFEST_NAME
    manifest = read_manifest(overlay)
    baked = dataclasses.replace(manifest, bakes={"x-1": _bake_entry(manifest)}).dump()
    most = {"seconds": COMMAND_SECONDS}
    yield Target("manifest, verify", path, look, (manifest.dump(), baked), **most)
    yield Target("manifest, bake", path, bake, (manifest.dump(), baked), **most)
    transformer = overlay / "transformer"
    for one in ("config.json", "diffusion_pytorch_model.safetensors.index.json"):
        yield Target(f"transformer {one}", transformer / one, bake, ((transformer / one).read_bytes(),), **most)
    shard = next(transformer.glob("*-00001-of-*.safetensors"))
    head, tail = _split(shard)
    yield Target("transformer shard", shard, bake, (head,), tail, **most)


def _bake_entry(manifest: Manifest) -> Bake:
    """A bake as a manifest may list it: all of it links."""
    files = manifest.components["transformer"].files
    links = tuple(
        dataclasses.replace(file, path=f"bakes/x-1/{Path(file.path).name}", link=f"../../{file.path}") for file in files
    )
    lora = BakedLora("x", "x.safetensors", 9, "ab" * 32, 1.0, None)
    return Bake((lora,), "fp32", "addmm", "cpu", links, ("proj_in.weight",))


def _adapters(folder: Path, overlay: Path) -> Iterator[Target]:
    """LoRAs in every naming, fitted to the transformer and looked through as ``bake-lora`` does."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted((overlay / "transformer").glob("*.safetensors")):
        shapes |= {name: info.shape for name, info in read_tensorfile(shard).tensors.items()}
    work = folder / "adapters"
    work.mkdir()
    path = work / "adapter.safetensors"

    def fit(place: Path) -> Callable[[], None]:
        def call() -> None:
            for allowed in (False, True):
                adapter = open_adapter(locate(str(place), Access(QUIET), str), shapes, allowed)
                scan(adapter, QUIET)
                _use(adapter, shapes)

        return call

    yield Target("adapter", path, fit(path), tuple(_adapter_files(shapes)))
    peft = work / "peft"
    peft.mkdir()
    (peft / "adapter_model.safetensors").write_bytes(next(_adapter_files(shapes, ("base_model.model.",))))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "init_lora_weights": True}
    patterns = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_out.0": 8.0}}
    text = json.dumps({**config, **patterns, "target_modules": ["to_q"]}).encode()
    yield Target("peft config", peft / "adapter_config.json", fit(peft), (text,))


def _use(adapter: Adapter, shapes: Shapes) -> None:
    """What a bake does with an adapter that was taken."""
    assert adapter.targets
    with contextlib.closing(FactorReader(adapter)) as reader:
        for name in adapter.targets:
            fuse_rows(torch.zeros(shapes[name]), [reader.term(name)], [[0.5]], "fp32")


PREFIXES = ("diffusion_model.", "transformer.", "base_model.model.", "lora_unet_", "model.diffusion_model.")


def _adapter_files(shapes: Shapes, prefixes: tuple[str, ...] = PREFIXES) -> Iterator[bytes]:
    modules = [f"transformer_blocks.{name}" for name in ("0.attn1.to_q", "1.attn2.to_out.0", "1.ff.net.2")]
    random_bytes = random.Random(1)
    for prefix in prefixes:
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        for module in modules:
            rows, columns = shapes[f"{module}.weight"]
            flat = prefix == "lora_unet_"
            key = prefix + (module.replace(".", "_") if flat else module)
            down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
            tensors += [(f"{key}.{down}.weight", "BF16", (2, columns)), (f"{key}.{up}.weight", "F32", (rows, 2))]
            if flat:
                tensors.append((f"{key}.alpha", "F32", ()))
        if prefix == "diffusion_model.":
            tensors.append((f"{prefix}{modules[0]}.dora_scale", "F16", (shapes[f"{modules[0]}.weight"][0], 1)))
            tensors.append((f"{prefix}transformer_blocks.0.ff.net.2.diff_b", "BF16", shapes["proj_in.bias"]))
            tensors.append((f"{prefix}{modules[2]}.diff_b", "F32", shapes[f"{modules[2]}.bias"]))
            fused = "transformer_blocks.0.audio_attn1.to_q"
            rows, columns = shapes[f"{fused}.weight"]
            tensors.append((f"{prefix}{fused}kv.lora_A.weight", "F8_E5M2", (2, columns)))
            tensors.append((f"{prefix}{fused}kv.lora_B.weight", "F16", (3 * rows, 2)))
            tensors.append((f"{prefix}proj_in.diff", "BF16", shapes["proj_in.weight"]))
            tensors += _of_other_methods(f"{prefix}transformer_blocks.1.attn1.to_", shapes)
        stated = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4.0})
        metadata = {"lora_adapter_metadata": stated} if prefix == "transformer." else {"format": "pt"}
        # Small numbers: bf16 and fp32 of 0x3c.. are about 0.01.
        count = sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors)
        yield build_header(tensors, metadata) + bytes(random_bytes.choice((0x3C, 0x3D)) for _ in range(count))


def _of_other_methods(root: str, shapes: Shapes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """LoKr, LoHa, OFT, BOFT and modules saved whole, with scales and adapters' names here and there."""
    rows, columns = shapes["transformer_blocks.1.attn1.to_q.weight"]
    yield from ((f"{root}k.lokr_w1_{side}", "BF16", (2, 2)) for side in "ab")
    yield f"{root}k.lokr_w2.default", "F8_E4M3", (rows // 2, columns // 2)
    yield f"{root}k.lokr_w2.scale_weight", "F32", (1,)
    for pair in "12":
        yield f"{root}v.hada_w{pair}_a", "F32", (rows, 2)
        yield f"{root}v.hada_w{pair}_b", "F16", (2, columns)
    yield f"{root}v.dora_scale", "F32", (1, columns)
    other = root.replace("attn1", "attn2")
    yield from (
        (f"{other}q.{name}", "F32", shape) for name, shape in (("oft_blocks", (2, rows // 4, 4, 4)), ("alpha", ()))
    )
    yield f"{other}q.rescale", "BF16", (rows, 1)
    yield f"{other}k.oft_R.weight", "F32", (columns // 4, 6)
    yield f"{other}v.boft_R", "F32", (1, columns // 2, 2, 2)
    yield f"{other}v.boft_s", "F32", (rows, 1)
    yield f"{root.removesuffix('to_')}norm_q.w_norm", "F32", shapes["transformer_blocks.1.attn1.norm_q.weight"]
    yield "base_model.model.proj_out.modules_to_save.default.weight", "F32", shapes["proj_out.weight"]
    yield "scaled_fp8", "F8_E4M3", (0,)


def _split(path: Path) -> tuple[bytes, int]:
    """A file's header, and how many bytes follow it."""
    file = read_tensorfile(path)
    start = min((info.start for info in file.tensors.values()), default=file.size)
    with path.open("rb") as stream:
        return stream.read(start), file.size - start
