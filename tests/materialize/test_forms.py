"""Forms told apart: what inspect says of quantised and partial files, and which of them are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from materialize import quantised_source as made
from materialize import tiny_source
from materialize.quantised_source import LINEARS, METADATA, ROOT, SHAPES
from support import ltxpack, refused, tree

from ltxpack.files.tensorfile import build_header
from ltxpack.materialize import inspect_path
from ltxpack.materialize.takers import PROGRAMS, VERDICTS

BUILDER, SCALED_MM, FP8_CAST, LOADER, UNET = PROGRAMS[:5]
MATERIALIZE = "ltxpack materialize"
QUERY = LINEARS[0]


def inspected(path: Path) -> dict[str, Any]:
    """What the command says as JSON, which is also what it prints."""
    done = ltxpack("inspect", path, "--json")
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    told = ltxpack("inspect", path).stdout
    assert all(f"  {name}:" in told for name in (*facts.get("faults", {}), *facts["takes"]))
    return facts


def verdicts(facts: Mapping[str, Any]) -> list[str]:
    """Those of the official code, of ComfyUI and of materialize."""
    cells = [facts["takes"][program].partition(":")[0] for program in (*PROGRAMS[:5], MATERIALIZE)]
    assert set(cells) <= set(VERDICTS)
    return cells


ALONE = made.transformer_alone
BARE = {"prefix": "", "parts": "transformer"}
# Kind -> tensors, metadata beside the usual, what inspect says of it, and who takes it: the official code in its three
# ways, ComfyUI's two loaders, materialize.
KINDS: dict[str, tuple[Any, dict[str, str], dict[str, Any], str]] = {
    "bf16": (made.plain, {}, {"form": "bf16", "parts": "all", "converts": True}, "yes no yes yes yes yes"),
    "fp16": (lambda: made.plain("F16"), {}, {"form": "fp16", "converts": True},
             "unknown unknown unknown unknown unknown yes"),
    "official fp8": (made.fp8, made.marker(), {"form": "fp8-scaled", "parts": "all"}, "no yes yes yes yes no"),
    "cast": (lambda: made.without(made.fp8(), {f"{linear}.{end}" for linear in LINEARS for end in
                                              ("weight_scale", "input_scale")}), {},
             {"form": "fp8-cast", "faults": {}}, "unknown no unknown yes yes no"),
    "rotated int8": (made.int8, made.marker(layer=made.INT8), {"form": "int8-rotated", "faults": {}},
                     "no no no yes yes no"),
    "int8 by its tensors": (lambda: made.renamed(made.int8(), ALONE) | made.markers(made.INT8), {},
                            {"form": "int8-rotated", "parts": "transformer", "faults": {}}, "no no no yes yes no"),
    "fp8 transformer": (lambda: made.renamed(made.fp8(), ALONE) | made.markers(), {},
                        {"form": "fp8-scaled", "parts": "transformer", "prefix": ROOT, "faults": {}},
                        "no yes yes yes yes no"),
    "bare transformer": (lambda: made.renamed(made.plain(), lambda name: ALONE(name) and name.removeprefix(ROOT)), {},
                         BARE | {"kind": "checkpoint"}, "no no no unknown yes no"),
    "split off": (lambda: made.renamed(made.plain(), lambda name: ALONE(name) and name.removeprefix("model.")), {},
                  {"parts": "transformer", "prefix": "diffusion_model."}, "no no no unknown unknown no"),
    "codecs": (lambda: made.renamed(made.plain(), lambda name: name if name.startswith(("vae.", "voc")) else None), {},
               {"form": "bf16", "parts": "codecs"}, "no no no no no no"),
    "bare codec": (lambda: made.renamed(made.plain(), lambda name: name[4:] if name.startswith("vae.") else None), {},
                   {"form": "bf16", "parts": "codecs"}, "no no no no no no"),
    "nf4": (lambda: made.plain() | {f"{QUERY}.weight.quant_map": made.scalar(1)}, {}, {"form": "nf4"},
            "unknown unknown unknown unknown unknown no"),
    "ComfyUI's earlier fp8": (lambda: made.fp8() | {"scaled_fp8": ("F8_E4M3", (2,), bytes(2))}, {},
                              {"form": "fp8-legacy"}, "unknown unknown unknown unknown unknown no"),
    "other generation": (made.plain, {"model_version": "2.5.0"}, {"generation": "LTX-2.5"}, "no"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_form_is_told_with_who_takes_it(kind: str, tmp_path: Path) -> None:
    tensors, metadata, expected, takes = KINDS[kind]
    facts = inspected(made.write(tmp_path / "x.safetensors", tensors(), METADATA | metadata))
    assert {name: facts[name] for name in expected} == expected
    assert not facts["quantised"] or "is quantised" in facts["problem"]
    assert ", 0 linears" not in facts["summary"]
    if takes == "no":
        assert list(facts["takes"]) == [MATERIALIZE] and facts["takes"][MATERIALIZE].startswith("no: ")
    else:
        assert verdicts(facts) == takes.split()


@pytest.mark.parametrize(
    ("roots", "config", "sound", "text"),
    [
        (("vae.", "audio_vae.", "vocoder.", ROOT, "text_"), True, "yes", "yes"),
        (("audio_vae.", "vocoder."), True, "yes", "no: lacks text_embedding_projection."),
        (("audio_vae.", "text_"), False, "no: lacks vocoder., `config`", "yes"),
    ],
)
def test_comfyuis_loaders_of_one_part(
    roots: tuple[str, ...], config: bool, sound: str, text: str, tmp_path: Path
) -> None:
    tensors = made.renamed(made.plain(), lambda name: name if name.startswith(roots) else None)
    facts = inspected(made.write(tmp_path / "x.safetensors", tensors, METADATA if config else {}))
    assert [facts["takes"][f"ComfyUI LTX{name}Loader"] for name in ("VAudioVAE", "AVTextEncoder")] == [sound, text]


def rows(linear: str) -> made.Tensors:
    (count, _) = SHAPES[f"{linear}.weight"]
    return {f"{linear}.weight_scale": ("F32", (count, 1), bytes(4 * count))}


KEYS = [linear.removeprefix(ROOT) for linear in LINEARS]
# Fault -> what makes it of the official fp8 file, its metadata, where it is found, and the verdicts that it changes.
FAULTS: dict[str, tuple[made.Tensors, dict[str, str], list[str], dict[str, str]]] = {
    "a scale for each row": (rows(QUERY), made.marker(), [QUERY],
                             {SCALED_MM: "no", FP8_CAST: "no", LOADER: "no", UNET: "no"}),
    "scales of shape [1]": ({f"{QUERY}.input_scale": ("F32", (1,), bytes.fromhex("0000803f"))}, made.marker(), [QUERY],
                            {FP8_CAST: "no"}),
    "scales that no loader reads": ({f"{QUERY}.weight_scale": ("BF16", (), b"\0\0")}, made.marker(), [QUERY],
                                    {SCALED_MM: "unknown", LOADER: "unknown"}),
    "input_scale is no positive number": ({f"{QUERY}.input_scale": made.scalar(float("nan"))}, made.marker(), [QUERY],
                                          {SCALED_MM: "wrong", LOADER: "wrong"}),
    "scales without codes": ({f"{ROOT}proj_out.weight_scale": made.scalar(1)}, made.marker(), [f"{ROOT}proj_out"], {}),
    "codes that cannot be right": ({f"{QUERY}.weight": ("F8_E5M2", (2, 3), bytes(6))}, made.marker(), [QUERY],
                                   {SCALED_MM: "unknown", LOADER: "unknown"}),
    "neither in _quantization_metadata nor marked by comfy_quant": ({}, made.marker(LINEARS[3:]), LINEARS[:3],
                                                                    {SCALED_MM: "yes", LOADER: "wrong", UNET: "wrong"}),
    "_quantization_metadata that cannot be read": ({}, {"_quantization_metadata": '{"layers": 3}'},
                                                   ["_quantization_metadata"], {LOADER: "wrong", UNET: "wrong"}),
    "keys of _quantization_metadata that begin otherwise than the tensors": ({}, made.marker(KEYS), KEYS,
                                                                             {LOADER: "wrong", UNET: "yes"}),
    "layers of _quantization_metadata without codes": ({}, made.marker([*LINEARS, f"{ROOT}proj_out"]),
                                                       [f"{ROOT}proj_out"], {}),
    "no config in the metadata": ({}, made.marker() | {"config": ""}, ["config"], {LOADER: "no"}),
    "no model_version in the metadata": ({}, made.marker() | {"model_version": ""}, ["model_version"], {}),
    "model_version that is a number": ({}, made.marker() | {"model_version": "2.3"}, ["model_version"],
                                       {SCALED_MM: "no", LOADER: "yes"}),
    "no licence in the metadata": ({}, made.marker() | {"license": ""}, ["license"], {}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_where_it_is(fault: str, tmp_path: Path) -> None:
    tensors, metadata, where, changed = FAULTS[fault]
    facts = inspected(made.write(tmp_path / "x.safetensors", made.fp8() | tensors, METADATA | metadata))
    assert facts["faults"][fault] == {"count": len(where), "names": sorted(where)}
    right = dict(zip(PROGRAMS, ["no", "yes", "yes", "yes", "yes"], strict=False))
    found = dict(zip((*PROGRAMS[:5], MATERIALIZE), verdicts(facts), strict=True))
    assert {name: found[name] for name in (changed or right)} == (changed or right)


def test_a_scale_of_one_everywhere_is_not_calibrated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for scale, told in ((1.0, "not calibrated"), (0.5, "calibrated")):
        facts = inspected(made.write(path, made.fp8(scale), METADATA | made.marker()))
        assert (facts["quantised"]["calibration"], facts["faults"]) == (told, {})
        assert facts["summary"].endswith(f"34 linears in 1 block quantised, {told}")
        assert facts["quantised"] | {"calibration": told, "linears": 34, "blocks": [1]} == facts["quantised"]


SCALES = [f"{linear}.{ending}" for linear in LINEARS for ending in ("weight_scale", "input_scale")]


@given(st.sets(st.sampled_from(SCALES)) | st.just(set(SCALES)), st.booleans())
@settings(max_examples=25, deadline=None)
def test_exactly_the_linears_without_scales_are_named(tmp_path_factory: Any, gone: set[str], by_tensors: bool) -> None:
    path = tmp_path_factory.mktemp("scales") / "x.safetensors"
    tensors = made.without(made.fp8(), gone) | (made.markers() if by_tensors else {})
    made.write(path, tensors, METADATA | ({} if by_tensors else made.marker()))
    faults = inspect_path(path)["faults"]
    for ending in ("weight_scale", "input_scale"):
        names = faults.pop(f"no {ending}", {"names": []})["names"]
        assert names == sorted(name.removesuffix(f".{ending}") for name in gone if name.endswith(f".{ending}"))
    assert not faults


OTHERS = {"x.gguf": b"GGUF\3\0\0\0" + bytes(100), "x.ckpt": b"PK\3\4" + bytes(100), "x.pt": b"\x80\2}q\0" + bytes(9)}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_told_and_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(OTHERS[name])
    facts = inspected(tmp_path / name)
    assert facts["kind"] == ("gguf" if name == "x.gguf" else "pickle")
    assert facts["next"].startswith("ltxpack materialize Lightricks/LTX-2.3 ")
    assert [file["kind"] for file in inspect_path(tmp_path)["files"]] == [facts["kind"]]
    (tmp_path / "x.safetensors").write_bytes(OTHERS[name])
    assert "is not a safetensors file" in refused(ltxpack("inspect", tmp_path / "x.safetensors"), 1)


def test_a_small_header_may_begin_like_a_pickle(tmp_path: Path) -> None:
    shapes = [("a.weight", "F32", (2, 3))]
    header = build_header(shapes, {"x": "." * (0x280 - len(build_header(shapes, {"x": ""})) + 8)})
    assert header.startswith(b"\x80\2")
    (tmp_path / "x.pt").write_bytes(header + bytes(24))
    assert inspect_path(tmp_path / "x.pt")["kind"] == "tensors"


# Refusals

UNUSABLE = [
    "official fp8",
    "cast",
    "rotated int8",
    "fp8 transformer",
    "bare transformer",
    "codecs",
    "nf4",
    "x.gguf",
    "x.pt",
]


def unusable(kind: str, folder: Path, stem: str) -> Path:
    if kind in OTHERS:
        path = folder / f"{stem}{Path(kind).suffix}"
        path.write_bytes(OTHERS[kind])
        return path
    tensors, metadata, _, _ = KINDS[kind]
    return made.write(folder / f"{stem}.safetensors", tensors(), METADATA | metadata)


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("alone", [False, True], ids=["in a folder", "alone"])
def test_an_unusable_checkpoint_is_refused_with_what_to_take(kind: str, alone: bool, source: Path, out: Path) -> None:
    """Alone: without the other inputs, which nobody should fetch to learn that this one is of no use."""
    (source / tiny_source.CHECKPOINT).unlink()
    path = unusable(kind, source, "x-distilled-dev" if kind == "cast" else "x-dev")
    if alone:
        path = Path(shutil.copy(path, out.parent))
    before = tree(source)
    message = refused(ltxpack("materialize", path if alone or kind in OTHERS else source, out), 1)
    further = "--part FILE" if kind == "bare transformer" else "ltxpack materialize Lightricks/LTX-2.3 OVERLAY"
    assert path.name in message and further in message
    assert ("--checkpoint ltx-2.3-22b-distilled-1.1.safetensors" in message) == (kind == "cast")
    assert not out.exists() and tree(source) == before


@pytest.mark.parametrize("kind", ["bf16", *UNUSABLE])
@pytest.mark.parametrize("flags", [("--lora", "{}", "--name", "x"), ("--add", "{}=0.5")], ids=["lora", "add"])
def test_a_model_in_the_place_of_a_lora_is_refused_by_name(
    kind: str, flags: tuple[str, ...], overlay: Path, tmp_path: Path
) -> None:
    path = unusable(kind, tmp_path, "lora")
    before = tree(overlay)
    message = refused(ltxpack("bake-lora", overlay, "--strength", "1", *(flag.format(path) for flag in flags)), 1)
    assert str(path) in message
    if kind in OTHERS:
        assert "is not a safetensors file" in message and "take the same weights as a .safetensors file" in message
    else:
        assert "is no LoRA but " in message and "next: ltxpack bake-lora OVERLAY --strength 0.5" in message
    assert tree(overlay) == before
