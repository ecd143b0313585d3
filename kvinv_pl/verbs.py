"""The commands that need no model. Their docstrings are their help."""

from pathlib import Path

from PIL import Image

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, SIZE, Animal
from kvinv_pl.registry import variants as found_variants


def world(out: Path = Path("world"), seed: int = 7, sheet: int = 0, size: int = SIZE) -> None:
    """Draw an animal of the embedded world: its picture, mask and prompt in every action.

    Args:
        out: The folder to write to (-o).
        seed: Which animal.
        sheet: Write one page of this many animals, from `seed` on, in all actions, in place of single pictures.
        size: Pixels a side.
    """
    if seed < 0 or sheet < 0 or size < 8:
        raise UserError(f"expected seed and sheet of 0 or more and a size of 8 or more; got {seed}, {sheet}, {size}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lines = _page(out, seed, sheet, size) if sheet else _pictures(out, seed, size)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; name another folder") from error
    print("\n".join(lines))


def _page(out: Path, seed: int, count: int, size: int) -> list[str]:
    page = Image.new("RGB", (size * len(ACTIONS), size * count))
    for row in range(count):
        animal = Animal.sample(seed + row)
        for column, action in enumerate(ACTIONS):
            page.paste(animal.render(action, size), (column * size, row * size))
    page.save(out / "sheet.png")
    return [str(out / "sheet.png")]


def _pictures(out: Path, seed: int, size: int) -> list[str]:
    animal = Animal.sample(seed)
    for action in ACTIONS:
        animal.render(action, size).save(out / f"{action}.png")
        animal.mask(action, size).save(out / f"{action}-mask.png")
    lines = [f"{out / action}.png\t{animal.prompt(action)}" for action in ACTIONS]
    (out / "prompts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def variants() -> None:
    """List the attention variants that are installed: name, class, where it comes from, what it does."""
    for variant in found_variants().values():
        where = f"{variant.cls.__module__}.{variant.cls.__qualname__}" if variant.cls else "broken"
        print(f"{variant.name:<12}{where}  ({variant.distribution})\n{'':<12}{variant.error or variant.summary}")
