"""`kvinv bench`. The docstring is the help."""

from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from kvinv_pl.errors import SomeFailedError
from kvinv_pl.models.load_options import Precision

OURS = "kv_inversion"
ALIKE = "negative_prompt+masactrl(layer=3, start=0.0, empty_source=False, guidance=3.0)"
METHODS = ["ddim+plain", "direct+masactrl", ALIKE, f"{OURS}(attention=recorded)", OURS]
"""What `make bench` compares: the rows of the README's table, ALIKE with the embedded model's layers."""


def bench(
    method: list[str] = METHODS,
    also: list[str] = [],  # noqa: B006
    out: str = "bench",
    data: str = "world",
    cases: int | None = None,
    seed_base: int = 1_000_000,
    checkpoint: str = "menagerie",
    steps: int = 50,
    guidance: float | None = None,
    settings: dict[str, Any] = {},  # noqa: B006
    ours: str = OURS,
    clip: str | None = None,
    dino: str | None = None,
    lpips: str | None = None,
    shown: int = 24,
    workers: int = 1,
    accelerator: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Compare methods on the same cases: tables, pictures, and one page to look at.

    A bench that was stopped resumes when it is given again, and takes more methods and cases; only what is
    asked for is computed, and rows from before stay in the tables, behind those asked for. What fails is
    reported at the end, and tried again then.

    Args:
        method: INVERSION+EDIT, or a method that is both, as `kvinv methods` lists them; repeatable. Options
            in brackets, 'direct+masactrl(layer=3)'; what is not an option of the method is a setting of the
            model, 'kv_inversion(attention=low_rank)'. With @16 at the end, only on the first 16 cases.
            Of the default rows, the third is for the embedded model alone.
        also: Additional rows, in the same form as method.
        out: The folder to write to (also -o): page.html, table.md, figures.csv, figures.json, pictures.
        data: world (the drawn world, where the truth is known), a folder of PIE-Bench or EditBench, or a list
            of your own as `kvinv run` takes it (or a folder with one in it), with masks of the part to edit.
        cases: Number of cases; default: 64 of the world, all of a folder or list.
        seed_base: The first animal of the world: below 1,000,000 to choose settings, from there on to report.
        checkpoint: As for `kvinv run`.
        steps: Number of DDIM steps of every method.
        guidance: Guidance scale of the target in every method; default: each method's published one, and for
            KV Inversion the checkpoint's default.
        settings: More settings of the model, as JSON, such as '{"inner_steps": 5}'.
        ours: The row that the others are compared with, case by case; if it is not there, none is by default.
        clip: A transformers CLIP folder, or menagerie, for CLIP scores.
        dino: A transformers folder of a DINO ViT, for the structure distance.
        lpips: The weights of torchvision's SqueezeNet 1.1 (squeezenet1_1-b8a52dc0.pth), for LPIPS.
        shown: How many cases are shown as pictures.
        workers: Number of processes that share the cases, each on its own GPU if there are enough.
        accelerator: cpu, gpu, mps or auto.
        precision: As for `kvinv run`.
    """
    from kvinv_pl.bench.bench import Setup
    from kvinv_pl.bench.plan import Plan
    from kvinv_pl.bench.reports.results import write_results
    from kvinv_pl.bench.rows import Row
    from kvinv_pl.bench.tables.summary import summary

    setup = Setup(checkpoint, steps, guidance, settings, accelerator, precision)
    folder = Path(out).expanduser()
    if method == METHODS and checkpoint != "menagerie":
        method = [row for row in METHODS if row != ALIKE]
    known = None if ours == OURS else ours
    plan = Plan((*method, *also), folder, setup, data, cases, seed_base, clip, dino, lpips, known)
    found = plan.run(workers)
    report = found.report(Row.name_of(ours))
    files = write_results(found, report, shown)
    print(summary(report, get_terminal_size().columns))
    print(f"all figures with their intervals, and what failed: {files[1]}; look at {files[0]}")
    if failures := report.failures_now:
        everything = [(row, cases) for found in (report.rows, report.failed) for row, cases in found.items()]
        count = sum(len(cases) for row, cases in everything if row not in report.earlier)
        raise SomeFailedError(failures, count)
