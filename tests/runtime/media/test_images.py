"""Conditioning images: recorded results, orientations, alpha, colour profiles, hostile files."""

from __future__ import annotations

import io
import logging
import math
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

from ltxpack.errors import FormatError, LtxpackError, UnsupportedError, UsageError
from ltxpack.runtime.media.images import compress, load_image, prepare_image
from ltxpack.runtime.media.pictures import ORIENTATION, read_image, tell_once

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


SIXTEEN = np.array([[0, 255, 256, 511, 32768, 65279, 65535, 257]], np.uint16)


def png16(colour: int, values: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel; ``values`` [H, W, channels]. Pillow writes grey ones alone."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_pngs_of_all_kinds_keep_their_high_bytes(tmp_path: Path, colour: int, channels: int) -> None:
    values = np.stack([np.roll(SIXTEEN, turn) for turn in range(channels)], axis=-1)
    path = tmp_path / "a.png"
    path.write_bytes(png16(colour, values))
    shown = [0, 1, 2] if channels > 2 else [0, 0, 0]
    assert np.array_equal(read_image(path), values[..., shown] >> 8)


def tiff(bits: int, photometric: int, data: bytes, sample_format: int = 1) -> bytes:
    """A TIFF of one row of grey, four pixels wide."""
    entries = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries[339] = sample_format
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + directory + bytes(4)


GREY = np.array([0, 256, 32768, 65535], "<u2").tobytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(16, 1, GREY), [0, 1, 128, 255]),
        (tiff(16, 0, GREY), [255, 254, 127, 0]),
        (tiff(12, 1, bytes.fromhex("000800fff010")), [0, 128, 255, 1]),
        (b"P5 4 1 65535\n" + np.array([0, 256, 32768, 65535], ">u2").tobytes(), [0, 1, 128, 255]),
    ],
    ids=["16 bits", "white is zero", "12 bits", "PGM"],
)
def test_deep_grey_of_other_formats_keeps_its_shades(tmp_path: Path, content: bytes, expected: list[int]) -> None:
    path = tmp_path / "a.picture"
    path.write_bytes(content)
    assert read_image(path)[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize("tags", [{50706: b"\1\4\0\0"}, {254: 1, 330: 8}])
def test_the_preview_in_a_raw_picture_is_not_taken_for_it(tmp_path: Path, tags: dict[int, object]) -> None:
    path = save(tmp_path / "a.dng", Image.fromarray(noise(4, 6)), format="tiff", tiffinfo=tags)
    with pytest.raises(UnsupportedError, match="a raw picture of a camera, of which only a preview"):
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
        read_image(path)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True, False], "once for each"
    assert len(caplog.records) == 2
    for number in range(1000):
        tell_once("%s: of a job of a server", number)
    assert tell_once.cache_info().currsize < 500


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header states another size."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(
    "exif",
    [b"\0\x08\0\x02\x01\x12\0\x03", b"nonsense", b"MM\0*\x7f\xff\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01", b""],
)
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_broken_exif_data_counts_as_none(
    tmp_path: Path, format: str, exif: bytes, recwarn: pytest.WarningsRecorder
) -> None:
    picture = Image.fromarray(noise(8, 16))
    plain = save(tmp_path / f"plain.{format}", picture)
    broken = save(tmp_path / f"broken.{format}", picture, exif=b"Exif\0\0" + exif)
    assert np.array_equal(read_image(broken), read_image(plain))
    assert not recwarn.list


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(side, side)).save(file, "png")
    return file.getvalue()


REFUSED: dict[type[LtxpackError], dict[bytes, str]] = {
    UnsupportedError: {
        tiff(32, 1, np.ones(4, "<f4").tobytes(), 3): "floating-point",
        tiff(32, 1, np.ones(4, "<u4").tobytes()): "32-bit",
        tiff(16, 1, GREY, 2): "signed",
        tiff(64, 1, np.ones(4, "<f8").tobytes(), 3): "TIFF file of a kind that is not read",
        b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(200): "HEIC",
        b"\0\0\0\x24ftypmif1\0\0\0\0mif1heic" + bytes(200): "HEIF",
        b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60): "JPEG XL",
        b"\xff\x0a" + bytes(60): "JPEG XL",
        b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>': "SVG",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n": "PostScript",
        b"%PDF-1.7\n": "PDF",
        b"v/1\x01" + bytes(60): "OpenEXR",
    },
    FormatError: {
        b"": "an empty file",
        bytes(10_000): "zero bytes",
        b"\0\0\0\x20ftypisom" + bytes(200): "a video",
        b"\x1aE\xdf\xa3" + bytes(200): "a video",
        b"RIFF\0\0\0\0AVI " + bytes(60): "a video",
        b"\0\0\x01\xba" + bytes(60): "a video",
        b"<!doctype html><title>Log in</title>": "a web page",
        b"version https://git-lfs.github.com/spec/v1\n": "git LFS",
        b"PK\3\4" + bytes(60): "an archive",
        b"hello": "known format",
        picture(8)[:20]: "a damaged picture",
        picture(8)[:30] + b"?" + picture(8)[31:]: "a PNG file",
        picture(64)[:3000]: "a damaged picture",
        picture(64)[:60]: "a damaged picture",
        **{png_claiming(side, side): "at most 100 million pixels" for side in (11_000, 20_000, 100_000)},
    },
}


@pytest.mark.parametrize(
    ("kind", "content", "says"), [(kind, *case) for kind, cases in REFUSED.items() for case in cases.items()]
)
def test_what_is_no_picture_that_can_be_read_is_named(
    tmp_path: Path, kind: type[LtxpackError], content: bytes, says: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(kind) as refused:
        read_image(path)
    assert says in refused.value.render() and refused.value.file == str(path)
    assert kind is FormatError or refused.value.next.startswith("convert it to"), "others are pictures"


def test_no_file_is_wrong_use(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(UsageError, match="no such image") as missing:
            read_image(path)
        assert missing.value.exit_status == 2


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


@pytest.mark.parametrize(("rows", "columns"), [(64, 20_000), (17_000, 30), (2, 30_000), (16_386, 16)])
def test_sides_that_x264_does_not_take_are_scaled_and_told(
    tmp_path: Path, rows: int, columns: int, caplog: pytest.LogCaptureFixture
) -> None:
    ramp = np.linspace(0, 255, max(rows, columns)).astype(np.uint8)
    ramp = ramp[:, None] if rows > columns else ramp[None]
    path = save(tmp_path / "a.png", Image.fromarray(np.broadcast_to(ramp[..., None], (rows, columns, 3)).copy()))
    with caplog.at_level(logging.WARNING):
        found = load_image(path, 10).float()
        assert load_image(path, 0).shape == (rows, columns, 3)
    assert max(found.shape[:2]) == 16_384 and min(found.shape[:2]) >= 2
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    along = found.mean((1, 2)) if rows > columns else found.mean((0, 2))
    assert (along - torch.linspace(0, 255, 16_384)).abs().max() < 4


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


@pytest.mark.parametrize("shape", [(3000, 20), (7, 9000), (1, 2000), (2000, 1), (601, 33)])
def test_of_a_narrow_picture_only_the_centre_is_scaled(shape: tuple[int, int]) -> None:
    """To what scaling the whole and cropping it gives, in the memory of the result."""
    height, width = 64, 96
    picture = torch.from_numpy(noise(*shape))
    found = prepare_image(picture, height, width, CPU, torch.float32)[0, :, 0]
    scale = max(height / shape[0], width / shape[1])
    covering = [math.ceil(side * scale) for side in shape]
    whole = picture.permute(2, 0, 1)[None].float()
    whole = torch.nn.functional.interpolate(whole, size=covering, mode="bilinear", align_corners=False)[0]
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    expected = whole[:, top : top + height, left : left + width] / 127.5 - 1
    assert (found - expected).abs().max() < 2e-4
    largest = 0

    def note(given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        nonlocal largest
        largest = max(largest, *(x.untyped_storage().nbytes() for x in made if x.data_ptr() != picture.data_ptr()))

    with Watch(note):
        prepare_image(picture, height, width, CPU, torch.float32)
    assert largest <= 2 * found.nbytes


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
