"""Folders as people have them: what is said of each, and that what it says to do next gets further."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from materialize import quantised_source as made
from materialize import tiny_source
from materialize.fake_hub import FakeHub
from support import Done, ltxpack, refused, tree

from ltxpack.errors import LtxpackError
from ltxpack.ltx23.releases import DEFAULT_FILES, OFFICIAL_REPO, TEXT_ENCODER_REPO
from ltxpack.ltx23.text_encoder import text_config
from ltxpack.materialize import access
from ltxpack.materialize.checkpoint import AGAIN
from ltxpack.runtime.text.gemma import another_encoder

CHECKPOINT, LORA, UPSAMPLER, GEMMA = (*tiny_source.NAMES.values(), tiny_source.GEMMA)


def move(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def in_turn(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def quantised(name: str) -> Callable[[Path], object]:
    return lambda folder: made.write(folder / name, made.fp8(), made.METADATA | made.marker())


def upsampler(**changes: object) -> Callable[[Path], object]:
    """The upsampler with other fields in its config, or without one."""

    def change(folder: Path) -> None:
        shapes = {
            name: info.shape for name, info in access.tensorfile.read_tensorfile(folder / UPSAMPLER).tensors.items()
        }
        config = tiny_source.UPSAMPLER_CONFIG | changes
        tiny_source.write_tensors(folder / UPSAMPLER, shapes, {"config": json.dumps(config)} if changes else {})

    return change


def earlier_generation(folder: Path) -> None:
    tensors = {name: entry for name, entry in made.plain().items() if "prompt_adaln" not in name}
    made.write(folder / CHECKPOINT, tensors, {"config": made.METADATA["config"]})


def dangling(folder: Path) -> None:
    (folder / CHECKPOINT).unlink()
    (folder / CHECKPOINT).symlink_to("../../blobs/7ab7225325bc40")


def whole_again(folder: Path) -> None:
    for path in folder.glob(f"{CHECKPOINT}*"):
        path.unlink()
    shutil.copy(tiny_source.make_source(folder.parent / "again") / CHECKPOINT, folder)


def diffusers_layout(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "transformer").mkdir()
    for name in ("model_index.json", "transformer/config.json"):
        (folder / name).write_text("{}")


GONE = write(CHECKPOINT, b"")
OTHER = "ltx-2.3-mini.safetensors"
BF16 = f"next: {AGAIN}--checkpoint {CHECKPOINT}\n"
ENCODER = f"next: {AGAIN}--text-encoder {TEXT_ENCODER_REPO}\n"
HUB = f"next: ltxpack materialize {OFFICIAL_REPO} OVERLAY"
# What a folder holds -> the change to a sound one, words of the message, and for a `next` in plain words what it says.
KINDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], Callable[[Path], object] | None]] = {
    "bf16 beside fp8 and int8": (
        in_turn(quantised("a-dev-fp8.safetensors"), quantised("mini-dev_scaled.safetensors")),
        ("several files", "a-dev-fp8.safetensors (fp8-scaled)", f"{CHECKPOINT} (bf16)", BF16),
        None,
    ),
    "fp8 alone": (in_turn(GONE, quantised(CHECKPOINT)), ("is quantised (scaled fp8)", HUB), None),
    "a name without dev": (
        move(CHECKPOINT, OTHER), ("holds no file for the checkpoint", f"next: {AGAIN}--checkpoint {OTHER}\n"), None
    ),
    "other names of all": (
        in_turn(move(CHECKPOINT, OTHER), move(LORA, "speed.safetensors"), move(UPSAMPLER, "up.safetensors")),
        (f"--checkpoint {OTHER} --lora speed.safetensors --upsampler up.safetensors\n",),
        None,
    ),
    "a link that leads nowhere": (dangling, ("a link to ../../blobs/7ab7225325bc40, which is not there",), whole_again),
    "a download under way": (
        move(CHECKPOINT, f"{CHECKPOINT}.incomplete"),
        (f"{CHECKPOINT}.incomplete: a download that did not finish",),
        whole_again,
    ),
    "half a file": (
        lambda folder: (folder / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes()[:30_000]),
        ("is truncated", "next: fetch or copy the file again"),
        whole_again,
    ),
    "zeros": (write(CHECKPOINT, bytes(5000)), ("found zeros",), whole_again),
    "nothing": (GONE, ("is empty",), whole_again),
    "a word of a server": (write(CHECKPOINT, b"Entry not found"), ("plain text: Entry not found",), whole_again),
    "a 7z archive": (write(CHECKPOINT, b"7z\xbc\xaf\x27\x1c" + bytes(99)), ("a 7z archive", "unpack it"), whole_again),
    "a pickle": (write(CHECKPOINT, b"\x80\x02}q\0" + bytes(99)), ("is a Python pickle", HUB), None),
    "GGUF": (
        in_turn(GONE, lambda f: (f / CHECKPOINT).unlink(), write("mini-dev-Q4.gguf", b"GGUF\3\0\0\0" + bytes(9))),
        ("is a GGUF file", HUB),
        None,
    ),
    "checkpoint and LoRA swapped": (
        in_turn(move(CHECKPOINT, "x"), move(LORA, "a-dev.safetensors"), move("x", "a-distilled-lora.safetensors")),
        ("the checkpoint and the LoRA are swapped", "a-dev.safetensors: a LoRA"),
        None,
    ),
    "a LoRA as the checkpoint": (
        lambda folder: shutil.copy(folder / LORA, folder / CHECKPOINT), ("is a LoRA, no checkpoint", HUB), None
    ),
    "an earlier generation": (earlier_generation, ("another generation (LTX-2 or earlier)", HUB), None),
    "a later generation": (
        lambda f: made.write(f / CHECKPOINT, made.plain(), made.METADATA | {"model_version": "2.5.0"}),
        ("another generation", "found model_version 2.5.0", HUB),
        None,
    ),
    "diffusers' layout": (diffusers_layout, ("is a folder in diffusers' layout", HUB), None),
    "a temporal upsampler": (
        upsampler(spatial_upsample=False, temporal_upsample=True),
        ("config.temporal_upsample", "--upsampler Light"),
        None,
    ),
    "an x1.5 upsampler": (upsampler(spatial_scale=1.5), ("config.spatial_scale", "expected 2.0, found 1.5"), None),
    "an upsampler without config": (upsampler(), ("upsampler without the `config`", "--upsampler Light"), None),
    "a checkpoint as the upsampler": (
        lambda folder: shutil.copy(folder / CHECKPOINT, folder / UPSAMPLER), ("is not a", "--upsampler Light"), None
    ),
    "a text encoder of another model": (
        write(f"{GEMMA}/config.json", b'{"model_type": "gemma3", "text_config": {}, "vision_config": {}}'),
        ("num_hidden_layers in its config is not that of its weights", ENCODER),
        None,
    ),
    "a text encoder without its tokenizer": (
        lambda folder: (folder / GEMMA / "tokenizer.json").unlink(), ("tokenizer.json", ENCODER), None
    ),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published repositories, in miniature."""
    repo = tiny_source.make_source(tmp_path / "repo")
    for role, name in DEFAULT_FILES.items():
        (repo / tiny_source.NAMES[role]).rename(repo / name)
    repos = {OFFICIAL_REPO: repo, TEXT_ENCODER_REPO: repo / GEMMA}
    monkeypatch.setattr(access, "Hub", lambda reporter: FakeHub(repos))


def next_of(message: str) -> str:
    return message.rpartition("next: ")[2].strip()


def type_next(message: str, command: list[str | Path], source: Path, mend: Callable[[Path], object] | None) -> Done:
    """Plan what the message says: the same command with flags, another command, or what plain words say."""
    told, plan = next_of(message), ("--plan", "--json")
    if mend is not None:
        assert not told.startswith((AGAIN, "ltxpack"))
        mend(source)
        return ltxpack(*command, *plan)
    if told.startswith(AGAIN):
        return ltxpack(*command, *plan, *shlex.split(told.removeprefix(AGAIN)))
    words = shlex.split(told.partition(" (")[0].replace("OVERLAY", shlex.quote(str(command[-1]))))
    assert words[0] == "ltxpack"
    return ltxpack(*words[1:], *plan)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_and_that_its_next_gets_there(kind: str, source: Path, out: Path) -> None:
    change, named, mend = KINDS[kind]
    change(source)
    command: list[str | Path] = ["materialize", source, out]
    message = refused(ltxpack(*command), 1)
    assert all(words in message for words in named), message
    assert not out.exists()
    done = type_next(message, command, source, mend)
    assert done.returncode == 0 and not json.loads(done.stdout)["missing"], done.stderr


@pytest.mark.usefixtures("hub")
def test_what_a_run_says_of_an_encoder_it_cannot_use_gets_there(source: Path, out: Path) -> None:
    assert ltxpack("materialize", source, out).returncode == 0
    sound = (out / "text_encoder/config.json").read_bytes()
    with pytest.raises(LtxpackError) as caught:
        text_config({"model_type": "t5"}, out / "text_encoder/config.json", another_encoder(out / "text_encoder"))
    (out / "text_encoder/config.json").write_text("{}")
    words = shlex.split(str(caught.value.next).partition(" (")[0])
    done = ltxpack(*(str(source) if word == "SOURCE" else word for word in words[1:]))
    assert done.returncode == 0, done.stderr
    assert (out / "text_encoder/config.json").read_bytes() == sound


@pytest.mark.parametrize(
    "names",
    [(CHECKPOINT.upper(), LORA.upper(), UPSAMPLER.upper()), (CHECKPOINT.replace("dev", "DEV"), LORA, UPSAMPLER),
     ("mini-dev (1).safetensors", "Mini-Distilled-LoRA (2).safetensors", "Spatial-Upscaler-X2.safetensors")],
)  # fmt: skip
def test_names_in_any_case(names: tuple[str, ...], source: Path, out: Path) -> None:
    for old, new in zip((CHECKPOINT, LORA, UPSAMPLER), names, strict=True):
        (source / old).rename(source / new)
    done = ltxpack("materialize", source, out)
    assert done.returncode == 0, done.stderr
    [kept] = (out / "loras").iterdir()
    assert kept.name == names[1].replace(".SAFETENSORS", ".safetensors")
    before = tree(out)
    kept.unlink()
    assert ltxpack("verify", out, "--repair", "--source", source).returncode == 0 and tree(out) == before


def test_an_overlay_as_source_is_told(source: Path, out: Path) -> None:
    assert ltxpack("materialize", source, out).returncode == 0
    message = refused(ltxpack("materialize", out, out.parent / "other"), 1)
    assert "is an overlay already" in message and next_of(message) == f"ltxpack run {out} --prompt TEXT"


def test_lists_of_files_end_after_ten(source: Path, out: Path) -> None:
    (source / CHECKPOINT).unlink()
    for number in range(30):
        shutil.copy(source / LORA, source / f"style-{number:02d}.safetensors")
    assert "and 22 more" in refused(ltxpack("materialize", source, out), 1)
