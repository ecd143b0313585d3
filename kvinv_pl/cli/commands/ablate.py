"""`kvinv ablate`. The docstring is the help."""

from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from kvinv_pl.models.load_options import Precision

PLACES = ["encoder", "middle", "decoder", "all", "masactrl"]
STARTS = [0.1, 0.3, 0.5, 0.7, 0.9]
READINGS = ["frozen", "blend"]


def ablate(
    out: str = "ablation",
    data: str = "world",
    cases: int = 8,
    seed_base: int = 1_000_000,
    place: list[str] = PLACES,
    start: list[float] = STARTS,
    reading: list[str] = READINGS,
    sharpness: list[float] = [1.0],  # noqa: B006  (jsonargparse shows it)
    checkpoint: str = "menagerie",
    steps: int = 50,
    guidance: float | None = None,
    settings: dict[str, Any] = {},  # noqa: B006
    clip: str | None = None,
    dino: str | None = None,
    lpips: str | None = None,
    shown: int = 8,
    accelerator: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Tune pictures once for each place, and edit them from every start, by every reading and sharpness.

    That is the ablation of the paper's Fig. 6, with figures, and the predicted x_0 of its Fig. 3. What was
    stopped resumes when it is given again.

    Args:
        out: The folder to write to (also -o): page.html, table.md, figures.csv, figures.json, grids, strips.
        data: world (the drawn world, where the truth is known), or what `kvinv bench` takes.
        cases: Number of cases.
        seed_base: The first animal of the world: below 1,000,000 to choose settings, from there on to report.
        place: Where CP-attn is: encoder, middle, decoder, all, or masactrl (the layers that MasaCtrl takes
            over); repeatable.
        start: The share of the steps before CP-attn becomes active; repeatable.
        reading: frozen or blend; repeatable.
        sharpness: Factor of the attention scores, with reading frozen; repeatable.
        checkpoint: As for `kvinv run`.
        steps: As for `kvinv run`.
        guidance: As for `kvinv run`.
        settings: More settings of the model, as JSON, such as '{"inner_steps": 5}'.
        clip: A transformers CLIP folder, or menagerie, for CLIP scores.
        dino: A transformers folder of a DINO ViT, for the structure distance.
        lpips: The weights of torchvision's SqueezeNet 1.1 (squeezenet1_1-b8a52dc0.pth), for LPIPS.
        shown: How many cases are shown as pictures.
        accelerator: cpu, gpu, mps or auto.
        precision: As for `kvinv run`.
    """
    from kvinv_pl.bench.ablation import Ablation
    from kvinv_pl.bench.bench import Setup
    from kvinv_pl.bench.plan import Plan
    from kvinv_pl.bench.reports.results import write_ablation
    from kvinv_pl.bench.tables.summary import summary

    setup = Setup(checkpoint, steps, guidance, settings, accelerator, precision)
    folder = Path(out).expanduser()
    plan = Plan((), folder, setup, data, cases, seed_base, clip, dino, lpips)
    found = Ablation(setup, plan.load_cases(), folder, place, reading, sharpness, start)
    found.run()
    report = found.report()
    lines, files = write_ablation(found, report, shown)
    print(summary(report, get_terminal_size().columns))
    print("\n".join(lines))
    if report.failures:
        print(f"{len(report.failures)} edits failed or were not measured: {files[1]} says why")
    print(f"all figures with their intervals, and the front: {files[1]}; look at {files[0]}")
