"""The embedded world: drawn animals, their actions, and a small diffusion model trained on them."""

from pathlib import Path

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie.drawn.twice import Twice, acting_otherwise
from kvinv_pl.menagerie.drawn.world import ACTIONS, COATS, COLOURS, GROUNDS, SIZE, SPECIES, Animal

__all__ = [
    "ACTIONS",
    "COATS",
    "COLOURS",
    "GROUNDS",
    "SIZE",
    "SPECIES",
    "Animal",
    "Twice",
    "acting_otherwise",
    "checkpoint",
    "clip",
    "segmenter",
]


def checkpoint() -> Path:
    """The folder of the shipped model, an ordinary Stable Diffusion folder as diffusers saves it."""
    folder = Path(__file__).parent / "weights"
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"the weights of the menagerie are missing: expected them in {folder}; "
            "install the package again, or train them with tools/train_menagerie.py"
        )
    return folder


def segmenter() -> Path:
    """The folder of the shipped SAM, which knows the animals of this world, as transformers saves it."""
    return _beside("sam", "SAM")


def clip() -> Path:
    """The folder of the CLIP that knows the pictures and prompts of this world, as transformers saves it."""
    return _beside("clip", "CLIP")


def _beside(name: str, what: str) -> Path:
    folder = checkpoint() / name
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the {what} of the menagerie is missing: expected it in {folder}; "
            f"install the package again, train it with tools/train_menagerie.py {name}, or give another"
        )
    return folder
