"""Tables of a bench: means with intervals, differences case by case, ranks, and how rows are typed."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.functional.regression import spearman_corrcoef

from kvinv_pl.bench.ablation import LIKENESS
from kvinv_pl.bench.bench import COSTS
from kvinv_pl.bench.benchmarks.cases import IDENTITY
from kvinv_pl.bench.benchmarks.metrics import UNEDITED, clip_score, lpips, structure_distance
from kvinv_pl.bench.reports.page import page
from kvinv_pl.bench.reports.ranks import METRICS, as_csv, as_markdown, ranks, spearman
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.tables.columns import MEANINGS
from kvinv_pl.bench.tables.summary import summary
from kvinv_pl.bench.tables.table import Mean, Report, markdown
from kvinv_pl.errors import UserError

NAN = math.nan


def cells(table: str) -> dict[str, dict[str, str]]:
    """A Markdown table by row and column."""
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}


def content_of(page: str) -> dict[str, Any]:
    """What the page's script is given."""
    return json.loads(re.search(r"const content = (.*);\n", page)[1])  # pyright: ignore[reportOptionalSubscript]


@pytest.fixture
def report() -> Report:
    rows: dict[str, Any] = {
        "ours": {"a": {"dB": 3.0, "marks": NAN}, "b": {"dB": 5.0, "marks": 1.0}},
        "theirs": {"a": {"dB": 1.0, "marks": 1.0}, "b": {"dB": 4.0, "marks": 1.0}},
        "short": {"b": {"dB": 9.0}},
    }
    failed = {"short": {"a": "out of | memory"}}
    return Report(rows, ("dB", "marks", "none"), {"a": "pose", "b": "style"}, "ours", failed)


def test_a_csv_of_many_cases_takes_no_interval(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mean, "of", lambda values: pytest.fail("an interval for each line takes minutes"))
    assert len(report.csv().splitlines()) == 1 + 5 * 2


def test_a_mean_has_its_interval_and_leaves_out_what_is_not_known() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    mean = Mean.of([*values, NAN])
    half = 1.96 * values.std() / 20
    assert mean.value == pytest.approx(values.mean()) and mean.count == 400
    assert (mean.low, mean.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert str(Mean.of([1.5])) == "1.50" and str(Mean.of([NAN])) == ""
    assert str(Mean.of([2.0, 2.0])) == "2.00 [2.00, 2.00]"


def test_differences_are_of_the_cases_that_both_have(report: Report) -> None:
    assert report.difference("theirs", "dB") == Mean.of([-2.0, -1.0])
    assert report.difference("short", "dB").value == 4.0
    assert report.difference("theirs", "marks").count == 1


def test_the_tables_have_all_cases_then_kinds_in_their_order_then_differences_and_failures(
    report: Report,
) -> None:
    head, *parts = report.markdown().split("## ")
    titles = [part.partition("\n")[0] for part in parts]
    assert not head
    assert titles == ["All cases", "pose", "style", "Less ours, case by case", "Failed"]
    everything, pose, *_ = (cells(part.partition("\n\n")[2].strip()) for part in parts[:4])
    assert everything["ours"]["dB"].startswith("4.00 [3") and "none" not in everything["ours"]
    assert everything["short"] == {"cases": "1 (1 failed)", "dB": "9.00", "marks": ""}
    assert pose["theirs"] == {"cases": "1", "dB": "1.00", "marks": "1.00"}
    assert "short, a: out of | memory" in parts[-1]
    assert markdown(["x|y"], [["r", 1]]).splitlines()[0] == r"|  | x\|y |"


def test_a_figure_that_may_be_below_0_or_depends_on_the_machine_is_explained_beside_the_table() -> None:
    rows = {"ours": {"a": {"second recall": -0.3, "second precision": 0.1, "time x": 0.9}}}
    report = Report(rows, ("second recall", "second precision", "time x"))
    recall, _, time = report.notes
    assert "beyond chance" in recall and "below 0" in recall and "other work on the machine" in time
    assert all(note in report.markdown() for note in report.notes)
    assert content_of(page("", [], report, lambda row, case: pytest.fail(row)))["notes"] == report.notes
    assert not Report({"ours": {"a": {"dB": 1.0}}}, ("dB",)).notes


def test_every_column_has_its_line_in_the_page_the_tables_and_the_docs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for model in ("Clip", "Dino", "Lpips"):
        monkeypatch.setattr(f"kvinv_pl.bench.benchmarks.metrics.{model}.load", lambda *_: None)
    metrics = [IDENTITY, UNEDITED, clip_score("x"), structure_distance("x"), lpips("x")]
    columns = [*(name for metric in metrics for name in metric.columns), *COSTS, LIKENESS]
    assert set(columns) == MEANINGS.keys() and METRICS.keys() <= MEANINGS.keys()
    report = Report({"ours": {"a": dict.fromkeys(columns, 1.0)}}, columns)
    assert len(report.notes) == len(columns)
    content = content_of(page("", [], report, lambda row, case: pytest.fail(row)))
    assert content["columns"] == {name: MEANINGS[name] for name in columns}
    assert content["notes"] == report.notes
    docs = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    table = docs.partition("| column | |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| {name} | {meaning} |" for name, meaning in MEANINGS.items()]


def test_a_psnr_of_equal_pictures_is_exact_in_tables_and_100_in_files() -> None:
    scores = {"a": {"PIE PSNR": 100.0, "scene %": 100.0}, "b": {"PIE PSNR": 100.0, "scene %": 100.0}}
    near = {"a": {"PIE PSNR": 100.0, "scene %": 50.0}, "b": {"PIE PSNR": 60.0, "scene %": 50.0}}
    report = Report({"same": scores, "near": near}, ("PIE PSNR", "scene %"), ours="same")
    everything = cells(report.markdown().partition("All cases\n\n")[2].partition("\n\n")[0])
    assert everything["same"] == {"cases": "2", "PIE PSNR": "exact", "scene %": "100.00 [100.00, 100.00]"}
    assert everything["near"]["PIE PSNR"] == "80.00 [60.00, exact]"
    assert "| near | -20.00 [" in report.markdown() and "exact: nothing differs" in report.markdown()
    assert "exact" in summary(report, 80)
    content = content_of(page("", [], report, lambda row, case: pytest.fail(row)))
    assert content["psnr"] == ["PIE PSNR"] and content["capped"] == content["rows"][0]["means"][0][0] == 100
    assert "same,a,,PIE PSNR,100.0" in report.csv() and "exact" not in report.csv() + report.json()
    assert not any("exact" in note for note in Report({"x": {"a": {"scene %": 100.0}}}, ("scene %",)).notes)


def test_a_terminal_is_shown_the_figures_that_decide_in_its_own_width() -> None:
    figures = dict.fromkeys(
        ("same animal %", "right action %", "accent %", "animal dB", "background dB", "PIE PSNR"), 12.34
    )
    rows = {
        "another animal of the same words, through the VAE": {"a": figures},
        "kv_inversion(attention=recorded)": {"a": {**figures, "reconstruction dB": 49.2, "seconds": 7.0}},
    }
    report = Report(rows, ("reconstruction dB", "seconds", *figures))
    heads = ["same", "right", "animal", "background", "reconstruction", "seconds"]
    for width in (200, 80, 60, 40):
        lines = summary(report, width).splitlines()
        assert all(len(line) <= width for line in lines)
        shown = [head for head in heads if any(head in line.split() for line in lines[:3])]
        assert shown == heads[: len(shown)] and (len(shown) == 6) == (width >= 80)
        assert "".join(rows).replace(" ", "") in re.sub(r"\d+\.\d|\s", "", "".join(lines[3:]))
    (line,) = (line for line in summary(report, 200).splitlines() if line.startswith("kv_inversion"))
    assert line.split()[1:] == ["12.3", "12.3", "12.3", "12.3", "49.2", "7.0"]
    photographs = {"ours": {"a": {"PIE PSNR": 20.0, "unedited PSNR": 21.0, "seconds": 7.0}}}
    head = summary(Report(photographs, ("seconds", "PIE PSNR", "unedited PSNR")), 80).splitlines()
    assert " ".join(head[:2]).split() == ["PIE", "PSNR", "seconds"]


def test_csv_and_json_have_every_figure_and_no_number_that_is_none(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(report.csv())))
    assert len(lines) == 10
    assert next(line for line in lines if line["row"] == "ours" and line["figure"] == "marks")["value"] == ""
    read = json.loads(report.json(), parse_constant=lambda name: pytest.fail(name))
    assert read["rows"]["ours"]["cases"]["a"] == {"dB": 3.0, "marks": None}
    assert read["rows"]["theirs"]["less ours"]["dB"]["mean"] == -1.5
    assert read["rows"]["short"]["failed"] == {"a": "out of | memory"}


def test_spearman_is_of_ranks_and_shares_ties() -> None:
    assert spearman([1, 2, 3], [10, 1000, 1001]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    x, y = [1.0, 2, 2, 4], [1.0, 3, 2, 4]
    by_hand = np.corrcoef([0, 1.5, 1.5, 3], [0, 2, 1, 3])[0, 1]
    assert spearman(x, y) == pytest.approx(by_hand)
    assert math.isnan(spearman([1, 1], [1, 2]))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2, 40).astype(float), rng.integers(0, 9, 40).astype(float)
    theirs = spearman_corrcoef(torch.from_numpy(x), torch.from_numpy(y))
    assert spearman(x, y) == pytest.approx(float(theirs), abs=1e-4)


def test_a_metric_that_orders_as_the_truth_has_rank_1_and_less_error_is_better() -> None:
    """Of three methods; PSNR follows the truth, and the error of structure goes against it."""
    rows = {}
    for n, name in enumerate("xyz"):
        right = [100.0 * (case < 2 * n) for case in range(4)]
        rows[name] = {
            str(case): {
                "same animal %": right[case], "right action %": 100.0,
                "PIE PSNR": n + right[case] / 50, "PIE structure x10^3": n + right[case] / 50,
            }
            for case in range(4)
        }  # fmt: skip
    columns, kinds = ("same animal %", "right action %", *METRICS), {str(case): "" for case in range(4)}
    structure, psnr = ranks(Report(rows, columns, kinds))
    assert (psnr.metric, psnr.methods.value, psnr.methods.count) == ("PIE PSNR", pytest.approx(1), 3)
    assert structure.methods.value == pytest.approx(-1) and structure.edits.count == 12
    assert 0.5 < psnr.edits.value < 1 and psnr.edits.low <= psnr.edits.value <= psnr.edits.high
    table = cells(as_markdown([psnr]))
    assert table["PIE PSNR"]["over methods"].startswith("1.00 [")
    assert as_csv([structure]).splitlines()[1].startswith("PIE structure x10^3,methods,3,-1.0,")
    assert not ranks(Report(rows, ("PIE PSNR",), {}))
    assert not ranks(Report({name: rows[name] for name in "xy"}, columns, kinds))


def test_ranks_are_of_methods_alone_and_of_cases_whose_truth_is_known() -> None:
    """Rows that no method makes, and a case without a verdict, would turn the order round."""
    rows: dict[str, Any] = {
        name: {
            case: {"same animal %": 100.0 * (n > limit), "right action %": 100.0, "CLIP whole": float(n)}
            for limit, case in enumerate("abc")
        }
        for n, name in enumerate("wxyz")
    }
    columns, kinds = ("same animal %", "right action %", "CLIP whole"), dict.fromkeys("abcd", "")
    (plain,) = ranks(Report(rows, columns, kinds))
    assert plain.methods.value == pytest.approx(1) and plain.edits.count == 12
    wrong = {case: {"same animal %": 0.0, "right action %": 100.0, "CLIP whole": 99.0} for case in "abc"}
    references = {"source": wrong, "truth through the VAE": wrong}
    assert ranks(Report({**references, **rows}, columns, kinds)) == [plain]
    for n, name in enumerate("wxyz"):
        rows[name]["d"] = {"same animal %": NAN, "right action %": 100.0, "CLIP whole": 99.0 - n}
    assert ranks(Report(rows, columns, kinds)) == [plain]
    constant = {
        name: {case: {**each, "CLIP whole": 1.0} for case, each in cases.items()}
        for name, cases in rows.items()
    }
    (unknown,) = ranks(Report(constant, columns, kinds))
    assert not unknown.methods.count and as_csv([unknown]).splitlines()[1] == "CLIP whole,methods,0,,,"


def test_a_row_is_typed_as_it_is_read() -> None:
    row = Row.parse("fixed_point(rounds=2)+masactrl(start=0.2, word=cat, empty_source=False)@16")
    assert (row.inversion, row.editor, row.cases) == ("fixed_point", "masactrl", 16)
    assert row.options["fixed_point"] == {"rounds": 2}
    assert row.options["masactrl"] == {"start": 0.2, "word": "cat", "empty_source": False}
    assert row.text == "fixed_point(rounds=2)+masactrl(start=0.2, word=cat, empty_source=False)"
    inversion, editor = row.make_methods()
    assert (getattr(inversion, "rounds", None), getattr(editor, "word", None)) == (2, "cat")
    ours = Row.parse("kv_inversion(attention=low_rank, inner_steps=5)")
    assert ours.settings == {"attention": "low_rank", "inner_steps": 5} and ours.inversion is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("masactl", "did you mean masactrl"),
        ("direct+kv_inversion", "no edit 'kv_inversion'"),
        ("direct-masactrl", "expected EDIT, INVERSION"),
        ("plain@none", "expected EDIT, INVERSION"),
        ("plain(1)", "expected EDIT, INVERSION"),
        ("masactrl(threshold=0.1", "expected EDIT, INVERSION"),
    ],
)
def test_a_row_that_cannot_be_is_refused_in_one_line(text: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        Row.parse(text)
