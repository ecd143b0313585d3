"""`kvinv world`: draw animals of the embedded world. The docstring is the help."""

from pathlib import Path

from PIL import Image

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, SIZE, Animal

LARGEST = 4096  # pixels a side
MOST = 1000  # animals on a page


def world(out: str = "world", seed: int = 7, sheet: int = 0, size: int = SIZE) -> None:
    """Draw an animal of the embedded world: its picture, mask and prompt in every action.

    Args:
        out: The folder to write to (also -o).
        seed: The number of the animal.
        sheet: Instead of pictures, write one page of this many animals, from seed on, in all actions.
        size: Side length in pixels.
    """
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, got {seed}")
    if not 0 <= sheet <= MOST:
        raise UserError(f"sheet: expected a number of animals, 1 to {MOST}, got {sheet}")
    if not 8 <= size <= LARGEST:
        raise UserError(f"size: expected 8 to {LARGEST} pixels a side, got {size}")
    folder = Path(out).expanduser()
    from kvinv_pl.data.runs.files import explaining_os_errors

    with explaining_os_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lines = _page(folder, seed, sheet, size) if sheet else _pictures(folder, seed, size)
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
    lines, rows = list[str](), ["image\tsource\tmask"]  # a list that --image takes
    for action in ACTIONS:
        file = _save(animal.render(action, size), out / f"{action}.png")
        mask = _save(animal.mask(action, size), out / f"{action}-mask.png")
        lines.append(f"{file}\t{animal.prompt(action)}")
        rows.append(f"{file.name}\t{animal.prompt(action)}\t{mask.name}")
    (out / "prompts.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return lines


def _save(picture: Image.Image, file: Path) -> Path:
    picture.save(file)
    return file
