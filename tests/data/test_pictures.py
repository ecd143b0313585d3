import itertools
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from kvinv_pl.data.images.geometry import Geometry, fit_geometry, to_image, to_mask, to_pixels, working_size
from kvinv_pl.data.images.pictures import is_picture, open_picture
from kvinv_pl.errors import UserError

WIDTH, HEIGHT = 24, 16


def drawn(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[:height, :width]
    red, green = 230 * x / width, 200 * y / height
    return Image.fromarray(np.stack([red, green, (red + 2 * green) / 3], axis=-1).astype(np.uint8))


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(open_picture(path).image).astype(int)


def saved(tmp_path: Path, image: Image.Image, name: str = "picture.png", **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_a_plain_picture_is_read_as_it_is(tmp_path: Path) -> None:
    picture = open_picture(saved(tmp_path, drawn()))
    assert picture.image.mode == "RGB" and picture.notes == []
    assert picture.image.tobytes() == drawn().tobytes()


def test_the_digest_is_of_the_pixels_and_not_of_the_file(tmp_path: Path) -> None:
    a = open_picture(saved(tmp_path, drawn()))
    b = open_picture(saved(tmp_path, drawn(), "other.tiff"))
    c = open_picture(saved(tmp_path, drawn().transpose(Image.Transpose.ROTATE_180)))
    flat = [open_picture(saved(tmp_path, Image.new("RGB", size))).sha256 for size in ((8, 16), (16, 8))]
    assert a.sha256 == b.sha256 != c.sha256 and len(a.sha256) == 64
    assert flat[0] != flat[1]


# how each EXIF orientation stores an upright picture
LAID_DOWN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("orientation", LAID_DOWN)
@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.webp"])
def test_every_exif_orientation_comes_out_upright(tmp_path: Path, orientation: int, name: str) -> None:
    upright = np.asarray(drawn())
    stored = Image.fromarray(np.ascontiguousarray(LAID_DOWN[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, stored, name, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
    assert np.array_equal(pixels_of(path), upright)


def test_a_turn_is_noted_and_done_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = open_picture(saved(tmp_path, drawn(), "a.jpg", exif=exif))
    assert picture.image.size == (HEIGHT, WIDTH)
    assert picture.notes == ["turned upright (EXIF orientation 6)"]
    assert open_picture(saved(tmp_path, picture.image)).image.size == (HEIGHT, WIDTH)


def test_broken_or_senseless_exif_does_not_matter(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 42
    assert open_picture(saved(tmp_path, drawn(), "a.png", exif=exif)).image.size == drawn().size
    broken = saved(tmp_path, drawn(), "b.jpg", exif=b"Exif\0\0nothing of the kind")
    assert open_picture(broken).image.size == drawn().size


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    image = drawn()
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, 8:] = 128
    alpha[:, 16:] = 0
    image.putalpha(Image.fromarray(alpha))
    picture = open_picture(saved(tmp_path, image))
    share = alpha[..., None] / 255
    expected = np.asarray(drawn()) * share + 255 * (1 - share)
    assert np.abs(np.asarray(picture.image) - expected).max() <= 1
    assert picture.notes == ["transparency laid over white"]


def test_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    picture = open_picture(saved(tmp_path, drawn().convert("RGBA")))
    assert picture.image.tobytes() == drawn().tobytes() and picture.notes == []


def test_grey_with_and_without_alpha_and_black_and_white_become_rgb(tmp_path: Path) -> None:
    grey = drawn().convert("L")
    for mode, expected in (("L", grey), ("LA", grey), ("1", grey.convert("1"))):
        picture = open_picture(saved(tmp_path, grey.convert(mode)))
        assert picture.image.tobytes() == expected.convert("RGB").tobytes()
        assert picture.notes[0].endswith("turned into RGB")
    clear = grey.convert("LA")
    clear.putalpha(0)
    assert pixels_of(saved(tmp_path, clear)).min() == 255


def test_a_palette_with_transparent_colours_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (16, 8))
    image.putpalette([200, 10, 20, 30, 40, 50, 0, 0, 100])
    image.paste(1, (4, 0, 8, 8))
    image.paste(2, (8, 0, 16, 8))
    for transparency, half in ((0, (30, 40, 50)), (bytes([0, 255, 128]), (30, 40, 50))):
        pixels = pixels_of(saved(tmp_path, image, transparency=transparency))
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels[0, 5].tolist() == list(half)
    assert np.abs(pixels[0, 12] - [127, 127, 177]).max() <= 1
    assert pixels_of(saved(tmp_path, image))[0, 0].tolist() == [200, 10, 20]
    assert pixels_of(saved(tmp_path, image, "a.gif", transparency=0))[0, 0].tolist() == [255, 255, 255]


def test_a_transparent_colour_of_an_rgb_picture_is_laid_over_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), (10, 20, 30))
    image.paste((1, 2, 3), (0, 0, 8, 8))
    pixels = pixels_of(saved(tmp_path, image, transparency=(1, 2, 3)))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 12].tolist() == [10, 20, 30]


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)
    picture = open_picture(saved(tmp_path, Image.fromarray(values), name))
    expected = np.round(values / 257)[..., None].repeat(3, -1)
    assert np.array_equal(np.asarray(picture.image), expected)
    assert picture.notes == ["16-bit grey turned into 8-bit RGB"]


def test_grey_values_of_other_ranges_are_refused(tmp_path: Path) -> None:
    for values in (np.full((9, 9), 0.5, np.float32), np.full((9, 9), 70000, np.int32)):
        with pytest.raises(UserError, match=r"a\.tiff cannot be read.* not of 8 or 16 bit"):
            open_picture(saved(tmp_path, Image.fromarray(values), "a.tiff"))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    picture = open_picture(saved(tmp_path, drawn(64, 64).convert("CMYK"), "a.jpg", quality=100))
    assert np.abs(np.asarray(picture.image).astype(int) - np.asarray(drawn(64, 64))).mean() < 3
    assert picture.notes == ["CMYK turned into RGB"]


def lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def linear_profile(description: str = "Linear, red and green exchanged") -> bytes:
    """A matrix profile made by hand: sRGB's primaries with red and green exchanged, and no gamma."""
    columns = {
        "rXYZ": (0.3851, 0.7169, 0.0971),
        "gXYZ": (0.4361, 0.2225, 0.0139),
        "bXYZ": (0.1431, 0.0606, 0.7141),
    }
    columns["wtpt"] = (0.9642, 1.0, 0.8249)
    text = description.encode()
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + b"\0" * 78}
    tags["cprt"] = b"text\0\0\0\0none\0"
    for name, xyz in columns.items():
        tags[name] = b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in xyz)
    tags |= {f"{c}TRC": b"curv\0\0\0\0\0\0\0\0" for c in "rgb"}
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = offset + len(body)
    illuminant = b"".join(struct.pack(">i", round(v * 65536)) for v in columns["wtpt"])
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + illuminant
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_another_profile_become_srgb(tmp_path: Path, alpha: bool) -> None:
    image = Image.new("RGBA" if alpha else "RGB", (16, 8), (0, 128, 0))
    picture = open_picture(saved(tmp_path, image, icc_profile=linear_profile()))
    red, green, blue = np.asarray(picture.image)[0, 0].astype(int)
    assert abs(red - 188) <= 3 and max(green, blue) <= 12  # half the light is 188 in sRGB
    assert picture.notes == ["colours turned from 'Linear, red and green exchanged' into sRGB"]
    assert "icc_profile" not in picture.image.info


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = open_picture(saved(tmp_path, drawn(), icc_profile=srgb))
    assert picture.image.tobytes() == drawn().tobytes() and picture.notes == []


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("profile", [b"no profile at all", lab_profile(), linear_profile()[:200]])
def test_a_profile_that_is_broken_or_does_not_fit_is_ignored(
    tmp_path: Path, mode: str, profile: bytes
) -> None:
    picture = open_picture(saved(tmp_path, drawn().convert(mode), icc_profile=profile))
    assert picture.image.tobytes() == drawn().convert(mode).convert("RGB").tobytes()
    assert picture.notes[-1].startswith("its colour profile was ignored")


def test_of_several_frames_the_first_is_taken(tmp_path: Path) -> None:
    path = saved(
        tmp_path, drawn(), "a.tiff", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]
    )
    picture = open_picture(path)
    assert picture.image.tobytes() == drawn().tobytes()
    assert picture.notes == ["only the first frame was taken"]


@pytest.mark.parametrize("name", ["a.jfif", "a.jp2", "a.tga", "a.ppm", "a.avif", "a.png", "a.bmp", "a.tiff"])
def test_every_format_that_pillow_writes_is_read_and_known_by_its_content(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path, drawn(), name, quality=100)
    assert is_picture(file)
    assert file.rename(tmp_path / "without suffix") and is_picture(tmp_path / "without suffix")
    picture = open_picture(tmp_path / "without suffix").image
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(drawn(), dtype=int)).mean() < 6


def test_other_files_are_not_taken_for_pictures(tmp_path: Path) -> None:
    contents = {"a.txt": b"a cat", "a.json": b"{}", "a.mpg": b"\0\0\1\xb3" + bytes(99), "empty": b""}
    contents |= {"a.mp4": b"\0\0\0\x18ftypisom" + bytes(99), "a.zip": b"PK\3\4" + bytes(99)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert not is_picture(tmp_path / name), name


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("a cat\n")
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match="found nothing"):
        open_picture(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="found a folder: check the path"):
        open_picture(tmp_path)
    for name in ("text.png", "empty.png"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a picture"):
            open_picture(tmp_path / name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_a_cut_picture_is_refused(tmp_path: Path, kind: str) -> None:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    (tmp_path / "cut").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        open_picture(tmp_path / "cut")


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20000, 20000), (10001, 10000), (100_000_001, 1)])
def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    (tmp_path / "large.png").write_bytes(png_header(*size))
    with pytest.raises(UserError, match=r"large\.png has more than 100 million pixels"):
        open_picture(tmp_path / "large.png")


def test_the_size_just_below_the_limit_passes_without_a_warning(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png_header(10000, 10000))
    with pytest.raises(UserError, match="cannot be read"):  # the size is let through, the pixels are missing
        open_picture(tmp_path / "large.png")


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_a_picture_that_is_too_small_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"is {size[0]}x{size[1]}, expected 8"):
        open_picture(saved(tmp_path, Image.new("RGB", size)))
    assert open_picture(saved(tmp_path, Image.new("RGB", (8, 8)))).image.size == (8, 8)


SIZES = [(512, 512), (8, 8), (64, 8), (4000, 3000), (333, 777), (1000, 125), (65, 64)]
MODELS = [((512, 512), 64), ((64, 64), 16), ((48, 80), 16), ((768, 512), 8)]


def test_a_working_size_is_the_shorter_side_in_the_model_s_own_shape() -> None:
    assert working_size((64, 96), None, 16) == (64, 96)
    assert working_size((64, 96), 32, 16) == (32, 48)
    assert fit_geometry((300, 200), working_size((64, 64), 32, 16), 16, "keep").resized == (48, 32)
    assert fit_geometry((300, 200), working_size((64, 64), 40, 16), 16, "crop").resized == (48, 48)
    with pytest.raises(UserError, match="size: expected 16 pixels or more, got 8"):
        working_size((64, 64), 8, 16)


@pytest.mark.parametrize(("size", "model"), list(itertools.product(SIZES, MODELS)))
def test_keep_keeps_the_aspect_as_far_as_the_multiple_allows(size, model) -> None:
    sample_size, multiple = model
    geometry = fit_geometry(size, sample_size, multiple, "keep")
    assert geometry.box is None and geometry.result == size
    assert min(geometry.resized) == min(sample_size)
    scale = min(sample_size) / min(size)
    for side, resized in zip(size, geometry.resized, strict=True):
        assert resized % multiple == 0 and abs(resized - side * scale) <= multiple / 2


@pytest.mark.parametrize(("size", "model"), list(itertools.product(SIZES, MODELS)))
def test_crop_takes_the_largest_middle_of_the_models_shape(size, model) -> None:
    (height, width), multiple = model
    geometry = fit_geometry(size, (height, width), multiple, "crop")
    assert geometry.resized == (width, height) and geometry.box is not None
    left, top, right, bottom = geometry.box
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert abs(left - (size[0] - right)) <= 1 and abs(top - (size[1] - bottom)) <= 1
    assert geometry.result[0] == size[0] or geometry.result[1] == size[1]
    assert abs(geometry.result[0] * height - geometry.result[1] * width) <= max(height, width) / 2


def test_a_long_picture_is_refused_with_advice() -> None:
    fit_geometry((800, 100), (64, 64), 16, "keep")
    for size in ((801, 100), (100, 801)):
        with pytest.raises(UserError, match=r"at most 8:1: crop it"):
            fit_geometry(size, (64, 64), 16, "keep")


def test_at_the_models_own_size_a_picture_comes_back_bit_for_bit() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    for mode in ("keep", "crop"):
        geometry = fit_geometry(noise.size, (64, 96), 16, mode)
        pixels = to_pixels(noise, geometry)
        assert pixels.shape == (3, 64, 96) and pixels.dtype == torch.float32 and pixels.is_contiguous()
        assert -1 <= pixels.min() < pixels.max() <= 1
        assert to_image(pixels, geometry).tobytes() == noise.tobytes()


def test_a_picture_comes_back_in_the_size_it_came_in() -> None:
    image = drawn(150, 100)
    geometry = fit_geometry(image.size, (64, 64), 16, "keep")
    pixels = to_pixels(image, geometry)
    assert pixels.shape == (3, 64, 96)
    back = to_image(pixels, geometry)
    assert back.size == image.size
    assert np.abs(np.asarray(back).astype(int) - np.asarray(image)).mean() < 2


def test_a_crop_comes_back_as_the_crop() -> None:
    image = drawn(150, 100)
    geometry = fit_geometry(image.size, (64, 64), 16, "crop")
    back = to_image(to_pixels(image, geometry), geometry)
    assert geometry.box == (25, 0, 125, 100) and back.size == (100, 100)
    assert np.abs(np.asarray(back).astype(int) - np.asarray(image.crop(geometry.box))).mean() < 2


def test_pixels_out_of_range_are_clamped() -> None:
    geometry = Geometry((8, 8), (16, 16))
    image = to_image(torch.full((3, 16, 16), 3.0, dtype=torch.bfloat16, requires_grad=True), geometry)
    assert image.size == (8, 8) and image.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("mode", ["keep", "crop"])
def test_a_mask_lies_over_its_picture(mode) -> None:
    image = Image.new("RGB", (150, 100))
    image.paste("white", (40, 20, 90, 80))
    geometry = fit_geometry(image.size, (64, 64), 16, mode)
    mask = to_mask(image.convert("1"), geometry)
    assert mask.shape == to_pixels(image, geometry).shape[1:]
    assert mask.min() == 0 and mask.max() == 1
    shown = (to_pixels(image, geometry)[0] + 1) / 2
    assert (mask - shown).abs().mean() < 0.02
