import numpy as np
import pytest
from PIL import Image

from kvinv_pl.data.images.sheet import ACROSS, GAP, SIDES, sheet


def plain(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)


def places(page: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of what has this colour."""
    found = (np.asarray(page) == colour).all(-1)
    rows, columns = found.any(1).nonzero()[0], found.any(0).nonzero()[0]
    assert found.sum() == len(rows) * len(columns)  # one whole rectangle: no caption over it
    return int(columns[0]), int(rows[0]), len(columns), len(rows)


RED, GREEN, BLUE = (250, 1, 2), (3, 250, 4), (5, 6, 250)


def test_pictures_stand_in_one_row_in_their_order_whole_and_apart() -> None:
    page = sheet([plain((200, 300), RED), plain((300, 200), GREEN), plain((200, 200), BLUE)], ["a", "b", "c"])
    red, green, blue = (places(page, colour) for colour in (RED, GREEN, BLUE))
    assert (red[2:], green[2:], blue[2:]) == ((200, 300), (300, 200), (200, 200))
    assert red[1] == green[1] == blue[1] == GAP
    assert (red[0], green[0], blue[0]) == (GAP, GAP + 200 + GAP, GAP + 200 + GAP + 300 + GAP)
    assert page.width == blue[0] + 200 + GAP


def test_each_caption_is_written_below_its_own_picture() -> None:
    page = np.asarray(sheet([plain((200, 200), RED), plain((200, 200), GREEN)], ["source\na cat", ""]))
    below = page[GAP + 200 + 1 :]
    assert (below[:, GAP : GAP + 200] < 128).any()
    assert (below[:, GAP + 200 + GAP :] == 255).all()


def test_a_long_caption_is_broken_and_not_cut() -> None:
    words = "a very small cat running and jumping over an even smaller dog in deep snow under a red sky " * 3
    short, long = (sheet([plain((200, 200), RED)], [caption]) for caption in ("a", words))
    assert long.height > short.height
    assert (np.asarray(long)[:, -GAP:] == 255).all()


def test_small_pictures_are_enlarged_by_a_whole_number_so_that_a_pixel_stays_a_square() -> None:
    source = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 72, 3), dtype=np.uint8))
    page = sheet([source], ["a"])
    shown = page.crop((GAP, GAP, GAP + 72 * 3, GAP + 64 * 3))
    assert np.array_equal(np.asarray(shown), np.asarray(source).repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("size", [(4000, 3000), (900, 100)])
def test_large_pictures_are_reduced_with_their_shape(size: tuple[int, int]) -> None:
    _, _, width, height = places(sheet([plain(size, RED)], ["a"]), RED)
    assert max(width, height) == SIDES[1]
    assert abs(width / height - size[0] / size[1]) < 0.1


def test_many_pictures_go_on_in_further_rows() -> None:
    page = sheet([plain((200, 200), RED)] * ACROSS + [plain((200, 200), BLUE)], ["a"] * (ACROSS + 1))
    left, top, *_ = places(page, BLUE)
    assert left == GAP and top > GAP + 200 + GAP
    assert page.width == ACROSS * (200 + GAP) + GAP


def test_every_picture_has_its_caption() -> None:
    with pytest.raises(ValueError):
        sheet([plain((200, 200), RED)], ["a", "b"])
