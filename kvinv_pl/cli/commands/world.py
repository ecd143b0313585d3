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
    from kvinv_pl.data.runs.files import write_atomically, write_png

    if sheet:
        print(write_png(folder / "sheet.png", _page(seed, sheet, size)))
        return
    animal = Animal.sample(seed)
    lines, rows = list[str](), ["image\tsource\tmask"]  # a list that --image takes
    for action in ACTIONS:
        file = write_png(folder / f"{action}.png", animal.render(action, size))
        mask = write_png(folder / f"{action}-mask.png", animal.mask(action, size))
        lines.append(f"{file}\t{animal.prompt(action)}")
        rows.append(f"{file.name}\t{animal.prompt(action)}\t{mask.name}")
    write_atomically(folder / "prompts.tsv", "".join(f"{row}\n" for row in rows).encode())
    print("\n".join(lines))


def _page(seed: int, count: int, size: int) -> Image.Image:
    page = Image.new("RGB", (size * len(ACTIONS), size * count))
    for row in range(count):
        animal = Animal.sample(seed + row)
        for column, action in enumerate(ACTIONS):
            page.paste(animal.render(action, size), (column * size, row * size))
    return page
