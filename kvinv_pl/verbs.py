"""The commands that need no model. Their docstrings are their help."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, SIZE, Animal

if TYPE_CHECKING:
    from kvinv_pl.pictures import Picture

LARGEST = 4096  # pixels a side
MOST = 1000  # animals on a page


def world(out: str = "world", seed: int = 7, sheet: int = 0, size: int = SIZE) -> None:
    """Draw an animal of the embedded world: its picture, mask and prompt in every action.

    Args:
        out: The folder to write to (also -o).
        seed: Which animal.
        sheet: Write one page of this many animals, from seed on, in all actions, in place of pictures.
        size: Pixels a side.
    """
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, got {seed}")
    if not 0 <= sheet <= MOST:
        raise UserError(f"sheet: expected a number of animals, 1 to {MOST}, got {sheet}")
    if not 8 <= size <= LARGEST:
        raise UserError(f"size: expected 8 to {LARGEST} pixels a side, got {size}")
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = _page(folder, seed, sheet, size) if sheet else _pictures(folder, seed, size)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; name another folder") from error
    print("\n".join(lines))


def _page(out: Path, seed: int, count: int, size: int) -> list[str]:
    page = Image.new("RGB", (size * len(ACTIONS), size * count))
    for row in range(count):
        animal = Animal.sample(seed + row)
        for column, action in enumerate(ACTIONS):
            page.paste(animal.render(action, size), (column * size, row * size))
    return [str(_save(page, out / "sheet.png"))]


def _pictures(out: Path, seed: int, size: int) -> list[str]:
    animal = Animal.sample(seed)
    lines = []
    for action in ACTIONS:
        file = _save(animal.render(action, size), out / f"{action}.png")
        _save(animal.mask(action, size), out / f"{action}-mask.png")
        lines.append(f"{file}\t{animal.prompt(action)}")
    (out / "prompts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def _save(picture: Image.Image, file: Path) -> Path:
    """Write a picture as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        picture.save(temporary, format="PNG")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def check(target: str, options: dict[str, Any] | None = None) -> None:
    """Check that an attention variant does what every variant must; the exit code is 1 if it does not.

    Args:
        target: FILE.py:CLASS, a class path, or a name that `kvinv variants` lists; `kvinv check NAME` does as
            well.
        options: What to make the variant with, such as '{"rank": 4}'; left out, its defaults are checked, and
            each other choice among its options.
    """
    from kvinv_pl import naming, registry, testing

    cls = registry.locate(target)
    record = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": options}
    lines, failed = testing.report(testing.trials(naming.build(record) if options else cls))
    print("\n".join(lines))
    if failed:
        print(f"{cls.__name__} fails {failed} of {len(testing.CHECKS)} checks")
        raise SystemExit(1)
    print(f"{cls.__name__} passes {len(testing.CHECKS)} checks")


def new_variant(name: str, out: str = ".") -> None:
    """Write an attention variant to start from, its configuration and its test; they work as they are.

    Args:
        name: What to call it, in small letters, such as my_variant; the class is MyVariant then.
            `kvinv new-variant NAME` does as well.
        out: The folder to write to (also -o).
    """
    from kvinv_pl import scaffold

    for file in scaffold.write(name, Path(out).expanduser()):
        print(file)


def mask(
    image: str,
    out: str = "mask.png",
    point: list[str] = [],  # noqa: B006  (jsonargparse shows it)
    box: str | None = None,
    sam: str | None = None,
    word: str | None = None,
    source: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Find the subject of a picture, write its mask, and show it over the picture, to look at before tuning.

    Without a point, box or word it is the largest, most central object that SAM finds.

    Args:
        image: The picture; `kvinv mask FILE` does as well.
        out: The PNG file to write to (also -o); NAME-shown.png comes beside it.
        point: X,Y in pixels from the upper left corner, on the subject; repeatable.
        box: X0,Y0,X1,Y1 in pixels: left, top, right and bottom of a box around the subject.
        sam: A SAM folder as transformers saves it, a hub id, or menagerie, which is also the default.
        word: Where there is no SAM: a word of --source; the mask is where the model itself looks for it.
        source: With --word: what the picture shows.
        checkpoint: With --word: a Stable Diffusion folder, a hub id, or menagerie, which is also the default.
    """
    file, prompted = Path(out).expanduser(), {"--point": point, "--box": box, "--sam": sam}
    if word is not None and (also := [flag for flag, value in prompted.items() if value]):
        raise UserError(f"{', '.join(also)} is for SAM and does not go with --word: leave one of them out")
    if word is None and (source is not None or checkpoint is not None):
        raise UserError("--source and --checkpoint go with --word, which names the subject: give that too")
    if word is not None and not source:
        raise UserError("--word needs --source, what the picture shows: give that too")
    if file.suffix.lower() != ".png":
        raise UserError(f"out: expected the name of a .png file, got {out}")
    points = [(x, y) for x, y in (_numbers("--point", text, "X,Y") for text in point)]
    edges = None
    if box is not None:
        left, top, right, bottom = _numbers("--box", box, "X0,Y0,X1,Y1")
        edges = left, top, right, bottom
    from kvinv_pl import masks
    from kvinv_pl.files import write_png
    from kvinv_pl.pictures import open_picture
    from kvinv_pl.sheet import sheet

    picture = open_picture(Path(image).expanduser())
    if file.exists() and file.samefile(Path(image).expanduser()):
        raise UserError(f"out: {out} is the picture itself: name another file")
    if word is not None:
        found = _mask_of_word(picture, word, source or "", checkpoint or "menagerie")
    else:
        from kvinv_pl.segmenter import Segmenter

        found = Segmenter.load(sam or "menagerie").segment(picture.image, points, edges)
    if len(set(found.getextrema())) == 1:
        raise UserError("no subject was found: give another --point, a --box around it, or another --word")
    share = found.histogram()[255] / (found.width * found.height)
    shown = [picture.image, masks.shown(picture.image, found)]
    page = sheet(shown, [Path(image).name, f"mask: {share:.0%} of it"])
    print(write_png(file, found))
    print(write_png(file.with_name(f"{file.stem}-shown.png"), page))


def _mask_of_word(picture: "Picture", word: str, source: str, checkpoint: str) -> Image.Image:
    """The mask of a word of the prompt, in the picture's size."""
    from kvinv_pl import masks, pictures
    from kvinv_pl.backbone import Backbone

    backbone = Backbone.load(checkpoint)
    geometry = pictures.fit_geometry(picture.image.size, backbone.sample_size, backbone.multiple, "keep")
    mask = masks.from_word(backbone, pictures.to_pixels(picture.image, geometry), source, word)
    enlarged = pictures.to_image(mask.expand(3, -1, -1) * 2 - 1, geometry)
    return enlarged.convert("L").point([0] * 128 + [255] * 128)


def _numbers(flag: str, text: str, wanted: str) -> tuple[float, ...]:
    """Numbers between commas, as many as `wanted` has."""
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != wanted.count(",") + 1:
        raise UserError(f"{flag}: expected {wanted} in pixels, got {text!r}")
    return numbers
