"""Small synthetic transformers, overlays and adapters for the tests of lora_bake."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file
from support import ltxpack

from ltxpack.errors import AdapterError
from ltxpack.files.tensorfile import TensorFile, read_tensorfile
from ltxpack.lora_bake.adapter import Adapter, open_adapter
from ltxpack.lora_bake.find import locate
from ltxpack.lora_bake.fuse import Term, fuse_rows
from ltxpack.lora_bake.stream import FactorReader
from ltxpack.ltx23.expected import inventory
from ltxpack.ltx23.renames import TRANSFORMER
from ltxpack.manifest import MANIFEST_NAME, Component, FileRecord, Lora, Manifest, Source
from ltxpack.materialize.access import Access
from ltxpack.reporter import SilentReporter

CONFIG = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
    "cross_attention_dim": 32, "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 3, "gated_attn": True,
    "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True, "use_prompt_embeddings": False,
    "rope_type": "split", "rope_double_precision": True, "perturbed_attn": True,
}  # fmt: skip
LORA_FILE = "loras/ltx-2.3-test-distilled-lora-4.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def fuse_fp32(weight: torch.Tensor, terms: Sequence[Term], strengths: Sequence[float]) -> torch.Tensor:
    """The fp32 rule before its one rounding: float32, shaped like ``weight``."""
    return fuse_rows(weight.float(), terms, [strengths], "fp32")[0].weight


def shapes(layers: int = 3, **changes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer."""
    return inventory("transformer", {**CONFIG, "num_layers": layers, **changes})


def linears(wanted: Mapping[str, tuple[int, ...]] | None = None) -> list[str]:
    """Module names of all linears (diffusers spelling)."""
    found = shapes() if wanted is None else wanted
    return [
        name.removesuffix(".weight") for name, shape in found.items() if name.endswith(".weight") and len(shape) == 2
    ]


def official(module: str) -> str:
    """``module`` in official spelling, without the checkpoint's root."""
    return TRANSFORMER.reverse().rename(module).removeprefix("model.diffusion_model.")


def random_weights(layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A transformer's tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes(layers).items()}


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def low_rank(modules: list[str], rank: int = 4, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Factors:
    """module -> (A [rank, in], B [out, rank])."""
    generator = torch.Generator().manual_seed(seed)
    sizes = shapes()
    factors = {}
    for module in modules:
        out, columns = sizes[f"{module}.weight"]
        down = torch.randn((rank, columns), generator=generator) * 0.2
        up = torch.randn((out, rank), generator=generator) * 0.2
        factors[module] = (down.to(dtype), up.to(dtype))
    return factors


# The factors of a user's own LoRA.
STYLE = low_rank([module for module in linears() if ".attn1." in module], 2, seed=5)


def official_keys(factors: Factors) -> dict[str, torch.Tensor]:
    """``diffusion_model.<official module>.lora_A.weight`` …"""
    return dotted(factors, lambda module: f"diffusion_model.{official(module)}")


def dotted(
    factors: Factors, spell: Callable[[str], str], down: str = "lora_A.weight", up: str = "lora_B.weight"
) -> dict[str, torch.Tensor]:
    """Keys of any dotted or flattened naming."""
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{spell(module)}.{down}"] = a.contiguous()
        tensors[f"{spell(module)}.{up}"] = b.contiguous()
    return tensors


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, path, metadata or {"format": "pt"})
    return path


def opened(path: Path, allow_unmatched: bool = False) -> Adapter:
    """The adapter at ``path``, a file or a folder of PEFT's, fitted to the transformer of :func:`shapes`."""
    return open_adapter(locate(str(path), Access(SilentReporter()), str), shapes(), allow_unmatched)


def unfit(path: Path, match: str | None = None, allow_unmatched: bool = False) -> AdapterError:
    """The error that refuses the adapter at ``path``."""
    with pytest.raises(AdapterError, match=match) as caught:
        opened(path, allow_unmatched)
    return caught.value


def fused_sums(
    adapter: Adapter, base: Mapping[str, torch.Tensor], strength: float, pieces: int = 1
) -> dict[str, torch.Tensor]:
    """The float32 sums of every tensor of ``base`` that ``adapter`` changes, in ``pieces`` if the rows can be apart."""
    sums = {}
    with contextlib.closing(FactorReader(adapter)) as reader:
        for name in adapter.targets:
            term, weight = reader.term(name), base[name].float()
            assert term is not None
            sums[name] = torch.empty_like(weight)
            step = len(weight) if term.needs_whole else max(1, len(weight) // pieces)
            for first in range(0, len(weight), step):
                cut = slice(first, first + step)
                fuse_rows(weight[cut], [term.rows(first, first + step)], [[strength]], "fp32", into=[sums[name][cut]])
    return sums


def nested(modules: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """A model with ``modules`` at their dotted names."""
    root = torch.nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.add_module(last, module)
    return root


def make_overlay(
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    shards: int = 1,
    distilled: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """An overlay that holds a transformer (in ``shards`` files, cut by name) and a distilled LoRA."""
    transformer = folder / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps(CONFIG))
    _write_shards(transformer, weights or random_weights(), shards)
    save(folder / LORA_FILE, distilled or official_keys(low_rank(linears())))
    files = tuple(record(folder, path) for path in sorted(transformer.iterdir()))
    components = {"transformer": Component("diffusers", "LTX2VideoTransformer3DModel", files)}
    loras = (Lora("distilled", record(folder, folder / LORA_FILE)),)
    manifest = Manifest("2.3.0", 33, None, Source(None, None, ()), components, loras, ())
    (folder / MANIFEST_NAME).write_bytes(manifest.dump())
    return folder


def baked(overlay: Path, *flags: object) -> list[str]:
    """The bakes that the command makes, by name."""
    done = ltxpack("bake-lora", overlay, "--json", *map(str, flags))
    assert done.returncode == 0, done.stderr
    return [report["name"] for report in json.loads(done.stdout)]


def exported(overlay: Path, output: Path, *flags: object) -> TensorFile:
    """The file that ``export`` writes."""
    done = ltxpack("export", overlay, "-o", output, *map(str, flags))
    assert done.returncode == 0, done.stderr
    return read_tensorfile(output)


def peft_folder(folder: Path, factors: Factors, stated: Mapping[str, object], prefix: str = "") -> Path:
    """A PEFT adapter of a wrapped model whose modules begin with ``prefix``, with the configuration ``stated``."""
    save(folder / "adapter_model.safetensors", dotted(factors, lambda module: f"base_model.model.{prefix}{module}"))
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def record(folder: Path, path: Path) -> FileRecord:
    """How a manifest lists ``path``."""
    data = path.read_bytes()
    return FileRecord(path.relative_to(folder).as_posix(), len(data), blake3(data).hexdigest())


def change_byte(path: Path, at: int = -1, mask: int = 1) -> None:
    """Damage the file at ``path``; again, and it is whole."""
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def goldens(folder: Path) -> list[tuple[Path, list[tuple[Path, float]]]]:
    """Each recorded fuse, and what its metadata says it was made of: LoRA file and strength, in order."""
    files = sorted(folder.glob("*.safetensors"))
    distilled = next(path for path in files if "distilled-lora" in path.name)
    found: list[tuple[Path, list[tuple[Path, float]]]] = []
    for file in (*sorted(folder.glob("golden/lora_fused_*")), *sorted(folder.glob("golden/lora_stacked_*"))):
        with safe_open(file, "pt") as opened:
            stated = dict(opened.metadata())
        if "strength" in stated:
            found.append((file, [(distilled, float(stated["strength"]))]))
            continue
        assert json.loads(stated["order"]) == "style then distilled"
        style = next(path for path in files if path.name.startswith("style-lora"))
        found.append((file, [(style, float(stated["style"])), (distilled, float(stated["distilled"]))]))
    assert len(found) >= 3
    return found


def _write_shards(folder: Path, weights: Mapping[str, torch.Tensor], shards: int) -> None:
    names = sorted(weights)
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        part = {name: weights[name] for name in names[i * size : (i + 1) * size]}
        number = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        file = save(folder / f"diffusion_pytorch_model{number}.safetensors", part)
        weight_map |= dict.fromkeys(part, file.name)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
