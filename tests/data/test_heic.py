"""The pictures of iPhones, with and without the library that reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import fits
import pytest
from PIL import ExifTags, Image

from kvinv_pl.api import as_file
from kvinv_pl.data.images.pictures import is_picture, open_picture
from kvinv_pl.errors import UserError

pillow_heif = pytest.importorskip("pillow_heif", reason="in the extra heic, which the extra dev has")


@pytest.fixture
def heic(tmp_path: Path) -> Path:
    """A HEIC picture, in a process that has not opened one yet."""
    pillow_heif.register_heif_opener()  # which writes, too
    picture = fits.opened(fits.picture(tmp_path / "a.png", (64, 32)))
    picture.save(tmp_path / "a.heic", quality=100)
    Image.ID[:] = [name for name in Image.ID if name != "HEIF"]
    del Image.OPEN["HEIF"]
    return tmp_path / "a.heic"


def test_a_heic_picture_is_read_whatever_it_is_called(heic: Path) -> None:
    assert is_picture(heic)
    opened = open_picture(heic.rename(heic.with_suffix(""))).image
    assert opened.size == (64, 32)
    assert fits.levels(opened, fits.opened(heic.with_name("a.png"))) < 40


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_heic_picture_is_turned_upright_exactly_once(tmp_path: Path, orientation: int) -> None:
    pillow_heif.register_heif_opener()
    taken, exif = fits.opened(fits.picture(tmp_path / "a.png", (64, 32))), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    taken.save(tmp_path / "a.heic", quality=100, exif=exif.tobytes())
    taken.save(tmp_path / "turned.png", exif=exif)
    written = (tmp_path / "a.heic").read_bytes()
    with Image.open(tmp_path / "a.heic") as file:  # as cameras do, it says so twice: in EXIF and by itself
        assert file.info["original_orientation"] == orientation
        assert b"irot" in written or b"imir" in written
    upright, expected = (open_picture(tmp_path / name).image for name in ("a.heic", "turned.png"))
    assert upright.size == expected.size == ((32, 64) if orientation > 4 else (64, 32))
    assert fits.levels(upright, expected) < 40 < fits.levels(upright, taken.resize(upright.size))
    # and one that is given opened, from Python
    given = as_file(Image.open(tmp_path / "a.heic"), tmp_path, "given")
    assert fits.levels(open_picture(given).image, upright) == 0


def test_without_pillow_heif_it_is_told_what_it_takes(heic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert is_picture(heic)
    with pytest.raises(UserError, match=r"a\.heic is a HEIC picture.*pip install 'kvinv-pl\[heic\]'"):
        open_picture(heic)
