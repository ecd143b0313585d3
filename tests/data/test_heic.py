"""The pictures of iPhones, with and without the library that reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import fits
import pytest
from PIL import Image

from kvinv_pl.data.pictures import is_picture, open_picture
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


def test_without_pillow_heif_it_is_told_what_it_takes(heic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert is_picture(heic)
    with pytest.raises(UserError, match=r"a\.heic is a HEIC picture.*pip install 'kvinv-pl\[heic\]'"):
        open_picture(heic)
