"""How well the figures of identity distinguish animals, to choose their tolerances.

    python tools/calibrate_identity.py --cases 200

prints, for every figure and for the verdict, how many pictures are within the tolerance: true pictures of the
target action, another animal of the very same words in this animal's scene, one in its own, and the source
left as it is; all through the VAE. Beside the tolerance stands what 98 % of the true pictures keep within.
Pictures that the verdict gets wrong are written to `--out`, each with the true one.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calling import call
from menagerie_training.pictures import CHOOSING_SEED, REPORTING_SEED
from PIL import Image
from report_menagerie import pages

from kvinv_pl.data.images.geometry import Geometry, to_image, to_pixels
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import checkpoint
from kvinv_pl.menagerie.analysis.truth import Truth
from kvinv_pl.menagerie.bootstrap import bootstrap_interval
from kvinv_pl.menagerie.case import Case
from kvinv_pl.menagerie.identity import AT_LEAST, AT_MOST, Identity, compare
from kvinv_pl.stages.progress import Progress

TRUE, OTHER = "truth", "another, same scene"
KINDS = (TRUE, OTHER, "another", "source")
TRUE_BAR, OTHER_BAR = 98.0, 5.0  # percent of true pictures at least, of another animal's at most
TOLERANCES = {**AT_LEAST, **AT_MOST}
COLUMNS, SHOWN = 5, 40  # of a sheet


def drawn(case: Case, size: int) -> list[Image.Image]:
    """A picture of every kind."""
    animal, target = case.animal, case.target
    return [
        animal.render(target, size),
        animal.another(same_scene=True).render(target, size),
        animal.another().render(target, size),
        animal.render(size=size),
    ]


@torch.no_grad()
def through(vae: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The round trips of pictures of one size."""
    geometry = Geometry(pictures[0].size, pictures[0].size)
    pixels = torch.stack([to_pixels(picture, geometry) for picture in pictures])
    trips = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    return [to_image(trip.clamp(-1, 1), geometry) for trip in trips]


def percent(hits: Sequence[bool]) -> str:
    """A share with its interval."""
    low, high = bootstrap_interval([100.0 * hit for hit in hits])
    return f"{100 * np.mean(hits):.1f} [{low:.1f}, {high:.1f}]"


def table(found: dict[str, list[Identity]]) -> str:
    """Figures down, kinds of pictures across."""
    lines = ["| within tolerance, % | tolerance | 98 % of truth | " + " | ".join(KINDS) + " |"]
    lines.append("|---" * (len(KINDS) + 3) + "|")
    for name in (field.name for field in fields(Identity) if field.name in TOLERANCES):
        sign, share = ("≥", 0.02) if name in AT_LEAST else ("≤", 0.98)
        most = np.nanquantile([getattr(one, name) for one in found[TRUE]], share)
        cells = [percent([one.passes(name) for one in found[kind]]) for kind in KINDS]
        lines.append(f"| {name} | {sign} {TOLERANCES[name]} | {most:.3f} | " + " | ".join(cells) + " |")
    cells = [percent([one.same_animal for one in found[kind]]) for kind in KINDS]
    lines.append("| **same animal** | | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def wrong(kind: str, ids: list[Identity], pictures: list[Image.Image], cases: list[Case], file: Path) -> None:
    """Write a sheet of what the verdict gets wrong, if anything."""
    size = pictures[0].width
    at = [n for n, one in enumerate(ids) if one.same_animal != (kind == TRUE)][:SHOWN]
    rows = []
    for first in range(0, len(at), COLUMNS):
        shown: list[Image.Image] = []
        captions: list[str] = []
        for n in at[first : first + COLUMNS]:
            shown += [cases[n].animal.render(cases[n].target, size), pictures[n]]
            captions += [f"{cases[n].animal.seed}", "\n".join(ids[n].reasons) or kind]
        rows.append((shown, captions))
    if rows:
        pages(rows).save(file)
        print(f"{file}: {kind}, where the verdict is wrong, each on the right of the true picture")


def calibrate(
    cases: int = 200,
    seed_base: int = CHOOSING_SEED,
    vae: Path | None = None,
    out: Path = Path("runs/calibrate_identity"),
) -> None:
    """Print how often each figure and the verdict are right, and write sheets of what is wrong.

    Args:
        cases: How many animals.
        seed_base: The first seed, 900,000 to 999,999: tolerances are not chosen on what is reported.
        vae: Folder of the autoencoder that the pictures go through, and of whose size they are; None: the
            menagerie's.
        out: Folder of the sheets.
    """
    if cases < 1 or seed_base < CHOOSING_SEED or seed_base + cases > REPORTING_SEED:
        raise UserError(
            f"seeds for choosing are {CHOOSING_SEED} to {REPORTING_SEED - 1}, "
            f"got {cases} cases from {seed_base}; change --cases or --seed-base"
        )
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    trained: Any = AutoencoderKL.from_pretrained(vae or checkpoint() / "vae", torch_dtype=torch.float32)
    size = trained.config.sample_size
    sampled = [Case.of_seed(seed) for seed in range(seed_base, seed_base + cases)]
    found: dict[str, list[Identity]] = {kind: [] for kind in KINDS}
    shown: dict[str, list[Image.Image]] = {kind: [] for kind in KINDS}
    progress = Progress()
    progress.begin("measuring", f"{cases} cases of {size} pixels", cases)
    for case in sampled:
        truth = Truth(case.animal, case.target, size)
        for kind, picture in zip(KINDS, through(trained, drawn(case, size)), strict=True):
            found[kind].append(compare(picture, truth))
            shown[kind].append(picture)
        progress.advance("cases")
    progress.finish()
    print(table(found))
    for kind, bar, met in ((TRUE, TRUE_BAR, np.greater_equal), (OTHER, OTHER_BAR, np.less_equal)):
        share = 100 * float(np.mean([one.same_animal for one in found[kind]]))
        print(f"{kind}: {share:.1f} %, bar {bar} %: {'met' if met(share, bar) else 'MISSED'}")
    out.mkdir(parents=True, exist_ok=True)
    for kind in (TRUE, OTHER):
        wrong(
            kind, found[kind], shown[kind], sampled, out / f"{kind.replace(', ', '_').replace(' ', '_')}.png"
        )


if __name__ == "__main__":
    call(calibrate)
