"""Loading a component folder: everything is held against the module before a byte of weights is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ltxpack.errors import FormatError, LtxpackError, OtherFormatError, OverlayError, UnsupportedError
from ltxpack.runtime.weights import load

CPU = torch.device("cpu")
NAMES = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


class Small(nn.Module):
    """Two layers, a stored buffer, and one that is in no file."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, 4)
        self.second = nn.Linear(4, 2, bias=False)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("steps", torch.arange(5.0), persistent=False)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first.weight": (4, 3), "first.bias": (4,), "second.weight": (2, 4), "scale": (4,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def on_meta() -> Small:
    with torch.device("meta"):
        return Small()


def write_single(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_shards(folder: Path, state: dict[str, Tensor], places: dict[str, str] | None = None) -> Path:
    """Layer ``first`` in the one shard, the rest in the other; ``places`` overrides what the index says."""
    folder.mkdir(parents=True)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in NAMES.values()}
    for name, tensor in state.items():
        groups[NAMES["a" if name.startswith("first") else "b"]][name] = tensor
    for name, group in groups.items():
        save_file(group, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, group in groups.items() for tensor in group} | (places or {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def loaded(folder: Path, dtype: torch.dtype | None = None) -> Small:
    return load.load_module(on_meta(), folder, CPU, dtype, {"steps": torch.arange(5.0)})


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a tensor is read."""

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "read_tensors", read)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("write", [write_single, write_shards])
def test_every_tensor_arrives(tmp_path: Path, write: object, dtype: torch.dtype | None) -> None:
    state = tensors()
    module = loaded(write(tmp_path / "part", state), dtype)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == (dtype or torch.bfloat16)
        assert torch.equal(tensor, state[name].to(tensor.dtype))
    assert module.steps.dtype == torch.float32
    assert torch.equal(module.steps, torch.arange(5.0))
    assert "steps" not in module.state_dict()
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert module.second(module.first(torch.ones(1, 3, dtype=dtype or torch.bfloat16))).shape == (1, 2)


def test_shards_may_be_symlinks(tmp_path: Path) -> None:
    real = write_shards(tmp_path / "real", tensors())
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in NAMES.values():
        (linked / name).symlink_to(Path("..") / "real" / name)
    (linked / "model.safetensors.index.json").write_bytes((real / "model.safetensors.index.json").read_bytes())
    assert torch.equal(loaded(linked).first.weight, tensors()["first.weight"])


def test_float32_weights_are_rounded_on_the_way(tmp_path: Path) -> None:
    state = tensors() | {"first.bias": torch.tensor([1 + 2**-12, 0, 0, 0])}
    module = loaded(write_single(tmp_path / "part", state), torch.bfloat16)
    assert module.first.bias[0] == 1


def refused(folder: Path, kind: type[LtxpackError]) -> LtxpackError:
    with pytest.raises(kind) as caught:
        loaded(folder)
    assert type(caught.value) is kind
    assert caught.value.next == f"ltxpack verify {folder.parent}"
    return caught.value


@pytest.mark.usefixtures("no_reading")
class TestRefusedBeforeReading:
    def test_missing_and_unknown_tensors_are_named_together(self, tmp_path: Path) -> None:
        state = tensors()
        state["third.weight"] = state.pop("second.weight")
        error = refused(write_single(tmp_path / "part", state), OverlayError)
        assert error.items == ("missing: second.weight", "unknown: third.weight")

    def test_another_shape(self, tmp_path: Path) -> None:
        state = tensors() | {"second.weight": torch.zeros(4, 2, dtype=torch.bfloat16)}
        error = refused(write_shards(tmp_path / "part", state), OverlayError)
        assert error.file == str(tmp_path / "part" / NAMES["b"])
        assert error.tensor == "second.weight"
        assert (error.expected, error.found) == ("bf16 [2, 4]", "bf16 [4, 2]")

    @pytest.mark.parametrize(("dtype", "word"), [(torch.int8, "i8"), (torch.float8_e4m3fn, "f8_e4m3")])
    def test_a_dtype_that_needs_more_than_a_cast(self, tmp_path: Path, dtype: torch.dtype, word: str) -> None:
        state = tensors() | {"second.weight": torch.zeros(2, 4).to(dtype)}
        error = refused(write_single(tmp_path / "part", state), UnsupportedError)
        assert error.tensor == "second.weight"
        assert str(error.found) == f"{word} [2, 4]"

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        path = write_single(tmp_path / "part", tensors()) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
        assert refused(path.parent, FormatError).file == str(path)

    def test_a_file_of_something_else(self, tmp_path: Path) -> None:
        path = write_single(tmp_path / "part", tensors()) / "model.safetensors"
        path.write_text("<!doctype html>")
        assert refused(path.parent, OtherFormatError).file == str(path)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "part", tensors())
        (folder / NAMES["b"]).unlink()
        assert refused(folder, OverlayError).file == str(folder / NAMES["b"])

    def test_a_dangling_symlink(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "part", tensors())
        (folder / NAMES["b"]).unlink()
        (folder / NAMES["b"]).symlink_to("gone.safetensors")
        assert refused(folder, OverlayError).file == str(folder / NAMES["b"])

    def test_a_tensor_in_another_shard_than_the_index_says(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "part", tensors(), {"first.bias": NAMES["b"]})
        error = refused(folder, OverlayError)
        assert (error.tensor, error.found) == ("first.bias", NAMES["a"])

    def test_a_tensor_the_index_does_not_know(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "part", tensors())
        save_file(tensors(), folder / NAMES["b"], {"format": "pt"})
        assert refused(folder, OverlayError).tensor == "first.bias"

    def test_a_tensor_only_the_index_knows(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "part", tensors(), {"third.bias": NAMES["b"]})
        assert refused(folder, OverlayError).items == (f"third.bias ({NAMES['b']})",)

    @pytest.mark.parametrize("name", ["../real.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 3])
    def test_an_index_that_leaves_the_folder(self, tmp_path: Path, name: object) -> None:
        folder = write_shards(tmp_path / "part", tensors(), {"first.bias": name})
        assert refused(folder, FormatError).tensor == "first.bias"

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
    def test_an_index_that_is_none(self, tmp_path: Path, text: str) -> None:
        folder = write_shards(tmp_path / "part", tensors())
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, FormatError)

    def test_no_weights_or_several_without_an_index(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path / "part", tensors())
        (folder / "model.safetensors.index.json").unlink()
        assert refused(folder, OverlayError).items == tuple(sorted(NAMES.values()))
        (tmp_path / "empty").mkdir()
        assert refused(tmp_path / "empty", OverlayError).problem == "no weights"

    def test_buffers_in_no_file_must_be_given(self, tmp_path: Path) -> None:
        folder = write_single(tmp_path / "part", tensors())
        for buffers in ({}, {"steps": torch.zeros(4)}, {"steps": torch.zeros(5), "more": torch.zeros(1)}):
            with pytest.raises(ValueError, match="non-persistent"):
                load.load_module(on_meta(), folder, CPU, None, buffers)


def test_the_overlay_is_named_even_from_a_bake(tmp_path: Path) -> None:
    (tmp_path / "ltxpack.json").write_text("{}")
    assert load.verify_command(tmp_path / "bakes" / "distilled-0.5") == f"ltxpack verify {tmp_path}"


def test_config_of_another_class_or_with_unknown_fields_is_refused(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "part", tensors())
    with pytest.raises(OverlayError, match="does not exist"):
        load.read_config(folder, "Small")
    (folder / "config.json").write_text('{"_class_name": "Large", "width": 3}')
    with pytest.raises(OverlayError, match="expected Small, found Large"):
        load.read_config(folder, "Small")
    (folder / "config.json").write_text('{"_class_name": "Small", "_diffusers_version": "1", "width": 3, "depth": 1}')
    config = load.read_config(folder, "Small")
    assert config == {"width": 3, "depth": 1}
    with pytest.raises(UnsupportedError, match="depth"):
        load.build_on_meta(Small, config, folder)
    assert load.build_on_meta(Small, {"width": 3}, folder).first.weight.is_meta
