"""Conditioning images: recorded results, orientations, alpha, colour profiles, hostile files."""

from __future__ import annotations

import io
import logging
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_meter import Watch
from PIL import Image, ImageCms, ImageOps
from support import REPOSITORY, load, relative_l2

from ltxpack.errors import FormatError, UnsupportedError, UsageError
from ltxpack.runtime.media.images import ORIENTATION, compress, load_image, prepare_image, read_image

CPU, META = torch.device("cpu"), torch.device("meta")


def recorded_images(golden: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Every ``image_N.png`` of the fixture with its recorded tensors, the ``imageN.`` taken off."""
    recorded = load(golden / "golden" / "components_fp32.safetensors")
    found = []
    for path in sorted(golden.glob("image_*.png")):
        prefix = f"image{path.stem.split('_')[1]}."
        own = {key.removeprefix(prefix): tensor for key, tensor in recorded.items() if key.startswith(prefix)}
        if own:
            found.append((path, own))
    assert found
    return found


def test_images_equal_the_recorded_ones(golden: Path) -> None:
    """Compressed ones exactly with the PyAV of the constraints file (another brings another x264)."""
    pinned = re.search(r"^av==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    compared: Counter[str] = Counter()
    for path, recorded in recorded_images(golden):
        assert torch.equal(torch.from_numpy(read_image(path)), recorded["decoded_rgb"])
        for key, expected in recorded.items():
            if compressed := re.fullmatch(r"after_crf(\d+)_x264", key):
                difference = (load_image(path, int(compressed[1])).int() - expected.int()).abs()
                assert difference.max() == 0 if av.__version__ == pinned[1] else difference.float().mean() < 1
                compared["compressed"] += 1
            if prepared := re.fullmatch(r"preprocessed_crf(\d+)_(\d+)x(\d+)", key):
                crf, height, width = map(int, prepared.groups())
                found = prepare_image(load_image(path, crf), height, width, CPU, torch.float32)
                assert relative_l2(found, expected) <= 1e-6
                compared["prepared"] += 1
            assert compressed or prepared or not key.startswith(("after_crf", "preprocessed")), key
    assert compared["compressed"] >= 1 and compared["prepared"] >= 2


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_set_upright_and_mirrored_ones_left(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(noise(4, 6)), exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image) if orientation in (3, 6, 8) else image
        assert np.array_equal(read_image(path), np.asarray(expected))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGB", lambda pixels: pixels[..., :3]),
        ("RGBA", lambda pixels: pixels[..., :3]),
        ("LA", lambda pixels: np.repeat(pixels[..., :1], 3, axis=2)),
        ("L", lambda pixels: np.repeat(pixels[..., :1], 3, axis=2)),
    ],
)
def test_alpha_is_dropped_not_blended(tmp_path: Path, mode: str, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    pixels = noise(5, 6, 4)
    own = pixels[..., : len(mode)] if mode != "LA" else pixels[..., [0, 3]]
    image = Image.fromarray(own[..., 0] if mode == "L" else np.ascontiguousarray(own), mode=None)
    assert image.mode == mode
    assert np.array_equal(read_image(save(tmp_path / "a.png", image)), expected(pixels))


def test_palettes_bilevel_and_cmyk_become_rgb(tmp_path: Path) -> None:
    flat = Image.new("RGB", (8, 8), (255, 0, 0))
    for mode, name in (("P", "a.png"), ("CMYK", "a.tiff")):
        found = read_image(save(tmp_path / name, flat.convert(mode)))
        assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 1
    assert read_image(save(tmp_path / "b.png", Image.new("1", (8, 8), 1))).min() == 255


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(grey))
    assert read_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_picture_of_floats_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(UnsupportedError, match="floating-point"):
        read_image(path)


def swapped_profile() -> bytes:
    """An sRGB profile with the red and blue primaries exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)


def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 250, 40
    path = save(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=swapped_profile())
    assert np.abs(read_image(path).astype(int) - [0, 40, 250]).max() <= 2


def test_a_useless_profile_is_told_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = noise(4, 4)
    path = save(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=b"no profile at all")
    grey = save(tmp_path / "b.png", Image.fromarray(pixels[..., 0]), icc_profile=swapped_profile())
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_image(path), pixels)
        assert np.array_equal(read_image(grey)[..., 1], pixels[..., 0])
    assert [str(path) in record.getMessage() for record in caplog.records] == [True, False]
    assert len(caplog.records) == 2


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header states another size."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("side", [11_000, 20_000, 100_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(side, side))
    with pytest.raises(FormatError, match="too large a picture"):
        read_image(path)


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such image") as missing:
        read_image(tmp_path / "missing.png")
    assert missing.value.exit_status == 2
    with pytest.raises(UsageError):
        read_image(tmp_path)
    text = tmp_path / "a.png"
    text.write_text("hello")
    with pytest.raises(FormatError, match="known format"):
        read_image(text)
    whole = save(tmp_path / "b.png", Image.fromarray(noise(64, 64)))
    for path, size in ((whole, 3000), (whole, 60)):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(FormatError) as cut:
            read_image(path)
        assert cut.value.file == str(path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), start=st.integers(0, 120))
def test_damage_anywhere_is_one_of_our_errors_or_a_picture(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.png"
    file = io.BytesIO()
    Image.fromarray(noise(6, 6)).save(file, "png")
    whole = file.getvalue()
    path.write_bytes(whole[:start] + data + whole[start + len(data) :])
    try:
        assert read_image(path).shape[2] == 3
    except (FormatError, UnsupportedError) as error:
        assert error.file == str(path)


def test_compression_cuts_odd_sides_from_the_top_left_and_loses_detail() -> None:
    pixels = noise(33, 41)
    pixels[:, :, :] = np.linspace(0, 255, 41, dtype=np.uint8)[None, :, None]
    found = compress(pixels, 33)
    assert found.shape == (32, 40, 3)
    assert 0 < np.abs(found.astype(int) - pixels[:32, :40]).mean() < 6
    weak = compress(noise(32, 32), 1).astype(int) - noise(32, 32)
    strong = compress(noise(32, 32), 45).astype(int) - noise(32, 32)
    assert np.abs(weak).mean() < np.abs(strong).mean()


def test_compression_leaves_crf_zero_and_slivers_alone() -> None:
    for pixels, crf in ((noise(33, 41), 0), (noise(1, 40), 33), (noise(40, 1), 33)):
        assert compress(pixels, crf) is pixels


@pytest.mark.parametrize("crf", [-1, 52])
def test_a_crf_x264_does_not_take_is_refused(tmp_path: Path, crf: int) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(noise(4, 4)))
    with pytest.raises(UsageError, match="0 to 51"):
        load_image(path, crf)


def test_a_picture_of_the_right_size_is_only_put_in_range() -> None:
    pixels = torch.from_numpy(noise(32, 64))
    found = prepare_image(pixels, 32, 64, CPU, torch.float32)
    assert torch.equal(found, (pixels.permute(2, 0, 1)[None, :, None].float() / 127.5) - 1)
    assert prepare_image(pixels, 32, 64, CPU, torch.bfloat16).dtype == torch.bfloat16


def test_the_centre_is_kept() -> None:
    pixels = torch.zeros(32, 67, 3, dtype=torch.uint8)
    pixels[:, 17:49] = 255
    assert prepare_image(pixels, 32, 32, CPU, torch.float32).min() == 1
    assert prepare_image(pixels.transpose(0, 1), 32, 32, CPU, torch.float32).min() == 1


@settings(max_examples=60, deadline=None)
@given(*(st.integers(1, 300) for _ in range(2)), *(st.integers(1, 6) for _ in range(2)))
def test_any_picture_fills_any_size(height: int, width: int, rows: int, columns: int) -> None:
    pixels = torch.full((height, width, 3), 200, dtype=torch.uint8)
    found = prepare_image(pixels, rows * 32, columns * 32, CPU, torch.float32)
    assert found.shape == (1, 3, 1, rows * 32, columns * 32)
    assert torch.allclose(found, torch.full_like(found, 200 / 127.5 - 1), atol=1e-4)


@pytest.mark.parametrize("shape", [(2000, 3000), (3000, 20), (256, 384), (300, 256)])
def test_a_large_picture_is_scaled_before_it_goes_to_the_card(shape: tuple[int, int]) -> None:
    """Or one that becomes large as it is scaled to cover."""
    height, width = 128, 192
    largest = 0  # bytes on the meta device, which plays the card

    def note(given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        nonlocal largest
        largest = max(largest, *(0, *(x.untyped_storage().nbytes() for x in made if x.device == META)))

    with Watch(note):
        found = prepare_image(torch.zeros(*shape, 3, dtype=torch.uint8), height, width, META, torch.float32)
    assert (found.shape, found.device) == ((1, 3, 1, height, width), META)
    final = 3 * height * width * 4
    normal = max(*shape) < 500
    assert largest <= (4 * final if normal else final)
    assert (largest > final) == normal, "others are scaled where they will be used, as before"
