"""`kvinv bench`: what it leaves, what it goes on from, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from time import sleep
from typing import Any

import checkpoints
import fits
import numpy as np
import pytest
from commands import Answer, kvinv, refused

from kvinv_pl.bench.bench import PROCESS_ENDED, Bench, Setup
from kvinv_pl.bench.benchmarks.cases import Case, Metric
from kvinv_pl.bench.costs import Cost
from kvinv_pl.bench.plan import Plan
from kvinv_pl.bench.records import Records, slug
from kvinv_pl.bench.renderers.kv_inversion import KVInversionEdit
from kvinv_pl.bench.reports.page import filled, page
from kvinv_pl.bench.reports.results import write_results
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.tables.table import Report
from kvinv_pl.cli.commands.bench import ALIKE, METHODS
from kvinv_pl.cli.commands.bench import bench as command
from kvinv_pl.errors import UserError
from kvinv_pl.stages.progress import Progress

QUICK = {"inner_steps": 1, "retries": 0, "required_psnr": 0.0}
BROKEN = "direct+masactrl(layer=99)@1"


def bench(out: Path, *methods: str, **others: Any) -> Answer:
    """Two animals, one step, on the tiny checkpoint."""
    options = {
        "checkpoint": fits.checkpoint(), "cases": 2, "steps": 1, "accelerator": "cpu", "out": out,
        "settings": json.dumps(QUICK), **others,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    return kvinv("bench", *flags, *(f"--method={method}" for method in methods))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """A bench with a row that fails."""
    home = tmp_path_factory.mktemp("bench")
    clip = checkpoints.clip(home / "clip")
    out = home / "out"
    return out, bench(out, "direct+plain", BROKEN, "kv_inversion", clip=clip)


@pytest.fixture
def copy(done: tuple[Path, Answer], tmp_path: Path) -> Path:
    return Path(shutil.copytree(done[0], tmp_path / "copy"))


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "figures.json").read_text())["rows"]


def content_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r"const content = (.*);\n", page)[1])  # pyright: ignore[reportOptionalSubscript]


def times(out: Path) -> dict[str, int]:
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in out.rglob("pictures/*/*.png")}


def test_a_bench_has_its_references_and_every_figure_and_a_row_that_fails_says_so(
    done: tuple[Path, Answer],
) -> None:
    out, answer = done
    assert answer.code == 1
    assert "kvinv: direct+masactrl(layer=99), 1000000: " in answer.err and "1 of " in answer.err
    assert "bench source: 2 cases in " in answer.err
    rows = metrics(out)
    assert list(rows) == [
        *("source", "truth through the VAE", "another animal of the same words, through the VAE"),
        *("direct+plain", "direct+masactrl(layer=99)", "kv_inversion"),
    ]
    means = rows["kv_inversion"]["means"]
    for name in ("same animal %", "right action %", "body", "scene %", "animal dB", "PIE PSNR", "CLIP whole"):
        assert means[name]["count"] == 2 and means[name]["low"] <= means[name]["mean"] <= means[name]["high"]
    assert rows["direct+plain"]["means"]["reconstruction dB"]["mean"] > 60
    assert {"seconds", "time x"} <= means.keys() and "reconstruction dB" not in rows["source"]["cases"]
    assert rows["source"]["means"]["PIE PSNR"]["mean"] == 100
    assert rows["direct+plain"]["less ours"]["animal dB"]["count"] == 2
    assert rows["direct+masactrl(layer=99)"]["failed"].keys() == {"1000000"}
    table = (out / "table.md").read_text()
    assert f"{out / 'table.md'}; look at {out / 'page.html'}" in answer.out
    assert answer.out.splitlines()[2].split() == ["%", "%", "dB", "dB", "dB", "seconds"]
    assert "steps 1: with so few, many edits miss the action" in answer.err
    assert (
        "## All cases" in table and "## Failed" in table and "metrics order edits" not in table
    )  # of two methods that are there
    assert (out / "sheets" / "1000001.png").exists() and (out / "figures.csv").exists()


def test_the_pictures_are_of_the_models_size_and_those_of_the_cases(done: tuple[Path, Answer]) -> None:
    out, _ = done
    edited = fits.opened(out / "pictures" / "direct+plain" / "1000000.png")
    assert edited.size == (16, 16)
    assert fits.levels(edited, fits.opened(out / "pictures" / "source" / "1000000.png")) > 0


def test_how_metrics_rank_is_in_the_table_in_the_page_and_in_a_file_of_its_own(copy: Path) -> None:
    setup = Setup(str(fits.checkpoint()), 1, None, QUICK, "cpu")
    bench = Plan((), copy, setup, cases=2).bench(quiet=True)
    right = {"x": (0.0, 0.0), "y": (100.0, 0.0), "z": (100.0, 100.0)}
    rows: dict[str, Any] = {
        name: {
            str(case): {"same animal %": value, "right action %": 100.0, "PIE PSNR": n + value / 50}
            for case, value in enumerate(values)
        }
        for n, (name, values) in enumerate(right.items())
    }
    report = Report(rows, ("same animal %", "right action %", "PIE PSNR"), {"0": "", "1": ""})
    write_results(bench, report, 0)
    assert "| PIE PSNR | 1.00 [" in (copy / "table.md").read_text()
    first, methods, edits = (copy / "ranks.csv").read_text().splitlines()
    assert first == "metric,over,count,rank correlation,low,high"
    assert methods.startswith("PIE PSNR,methods,3,1.0,") and edits.startswith("PIE PSNR,edits,6,0.904534,")
    ((name, over_methods, _),) = content_of((copy / "page.html").read_text())["ranks"]
    assert name == "PIE PSNR" and over_methods[0] == 1.0


def test_the_page_needs_nothing_beside_it(done: tuple[Path, Answer]) -> None:
    text = (done[0] / "page.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(http|//)|@import|url\(", text)
    content = content_of(text)
    assert len(content["cases"]) == 2 and content["axes"] == ["right action %", "same animal %"]
    assert all(uri.startswith("data:image/png") for uri in content["cases"][0]["pictures"].values())
    assert [row["name"] for row in content["rows"]][-1] == content["ours"] == "kv_inversion"
    assert "</script><b>" not in filled("<b>", {"name": "</script><b>"})


def test_the_pages_script_finds_what_it_asks_for_and_every_bracket_is_closed() -> None:
    """The page is clicked through in a browser by tools/look_at_studio.py."""
    text = filled("", {})
    inside, ids, void = list[str](), set[str](), {"meta", "img", "input"}

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            ids.update(str(value) for name, value in attrs if name == "id")
            inside.extend([tag] if tag not in void else [])

        def handle_endtag(self, tag: str) -> None:
            assert inside.pop() == tag

    Tags().feed(text)
    assert not inside
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert set(re.findall(r'\bat\("(\w+)"\)', script)) <= ids
    code = re.sub(r'"(?:\\.|[^"\\\n])*"', "", script)  # without texts
    opened = list[str]()
    for sign in re.findall(r"[(){}\[\]]", code):
        if sign in "({[":
            opened.append(sign)
        else:
            assert opened.pop() + sign in ("()", "{}", "[]")
    assert not opened and code.count("`") % 2 == 0


def test_what_is_done_is_not_computed_again_and_what_failed_is(copy: Path) -> None:
    before = times(copy)
    (copy / "pictures" / "direct+plain" / "1000001.json").unlink()  # as after a kill
    answer = bench(copy, "direct+plain", "kv_inversion", BROKEN, also="ddim+plain")
    after = times(copy)
    assert answer.code == 1 and "direct+masactrl(layer=99), 1000000" in answer.err
    changed = {name for name, time in before.items() if after[name] != time}
    assert changed == {"pictures/direct+plain/1000001.png"}
    assert after.keys() - before.keys() == {f"pictures/ddim+plain/100000{n}.png" for n in range(2)}
    assert metrics(copy)["direct+plain"]["means"]["PIE PSNR"]["count"] == 2
    given = ["direct+plain", "kv_inversion", BROKEN.removesuffix("@1"), "ddim+plain"]
    assert list(metrics(copy))[3:] == given


def test_rows_of_the_folder_stay_behind_those_that_are_asked_for_and_are_not_computed(copy: Path) -> None:
    (copy / "pictures" / "direct+plain" / "1000001.json").unlink()  # as after a kill
    before, had = times(copy), metrics(copy)
    answer = bench(copy, "ddim+plain")
    assert answer.code == 0, answer.err  # what failed before was not asked for
    after = times(copy)
    assert after.keys() - before.keys() == {f"pictures/ddim+plain/100000{n}.png" for n in range(2)}
    assert all(after[name] == time for name, time in before.items())
    rows = metrics(copy)
    assert list(rows)[3:] == ["ddim+plain", "direct+plain", "direct+masactrl(layer=99)", "kv_inversion"]
    assert rows["kv_inversion"]["cases"].keys() == had["kv_inversion"]["cases"].keys()
    assert rows["direct+plain"]["cases"].keys() == {"1000000"} and not rows["direct+plain"]["failed"]
    assert rows["direct+masactrl(layer=99)"]["failed"].keys() == {"1000000"}
    assert "less ours" in rows["ddim+plain"]
    content = content_of((copy / "page.html").read_text())
    assert [row["name"] for row in content["rows"]] == list(rows)
    assert "kv_inversion" in content["cases"][0]["pictures"]


def test_a_figure_that_is_new_is_measured_of_the_rows_of_before_as_well(tmp_path: Path) -> None:
    setup = Setup(str(fits.checkpoint()), 1, 2.0, QUICK, "cpu")
    Plan(("ddim+plain",), tmp_path, setup, cases=1).run()
    plan = Plan(("direct+plain",), tmp_path, setup, cases=1)
    data = plan.load_cases()
    new = Metric("new", ("one",), lambda case, picture: {"one": 1.0})
    data = replace(data, metrics=[new, *data.metrics])
    bench = Bench(setup, data, [Row.parse("direct+plain")], Records(tmp_path), Progress(quiet=True))
    bench.run()
    assert bench.report().mean("ddim+plain", "one").count == 1


def test_a_bench_with_other_settings_is_refused(copy: Path) -> None:
    refused(bench(copy, "direct+plain", steps=2), "has a bench with steps 1, not 2", "--out")
    refused(bench(copy, "direct+plain", clip=checkpoints.clip(copy / "other")), "has a bench with clip")


def test_every_row_is_timed_beside_plain_sampling_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a row that the machine was busy with would be compared with an idle machine's sampling."""
    seconds = iter((1.0, 1e6))
    monkeypatch.setattr("kvinv_pl.bench.bench.plain_sampling", lambda *_: Cost(next(seconds)))
    setup = Setup(str(fits.checkpoint()), 1, 2.0, QUICK, "cpu")
    bench = Plan(("ddim+plain", "direct+plain"), tmp_path, setup, cases=2).bench(quiet=True)
    bench.run()
    slow, quick = (bench.report().rows[row] for row in ("ddim+plain", "direct+plain"))
    assert all(slow[case]["time x"] == slow[case]["seconds"] for case in slow)
    assert all(quick[case]["time x"] < 1e-3 for case in quick)
    assert not Setup(steps=50).advice


def test_two_parts_are_a_whole(tmp_path: Path) -> None:
    setup = Setup(str(fits.checkpoint()), 1, 2.0, QUICK, "cpu")
    plan = Plan(("ddim+plain", "direct+plain@1"), tmp_path, setup, cases=2)
    plan.bench(quiet=True).run(0, 2)
    halves = plan.bench(quiet=True)
    assert set(halves.report().rows["ddim+plain"]) == {"1000000"}
    assert halves.report().failed["ddim+plain"] == {"1000001": "it was not computed"}
    halves.run(1, 2)
    report = plan.bench(quiet=True).report()
    assert set(report.rows["ddim+plain"]) == {"1000000", "1000001"}
    assert set(report.rows["direct+plain"]) == {"1000000"} and not any(report.failed.values())


def test_a_metric_that_breaks_costs_its_own_figures_alone_and_is_tried_again(tmp_path: Path) -> None:
    setup = Setup(str(fits.checkpoint()), 1, 2.0, QUICK, "cpu")
    plan = Plan(("ddim+plain",), tmp_path, setup, cases=2)

    def breaks(case: Case, picture: Any) -> dict[str, float]:
        if broken and case.name == "1000001":
            raise ZeroDivisionError("division\nby zero")
        return {"one": 1.0, "two": 2.0}

    def run() -> tuple[Bench, Report]:
        data = plan.load_cases()
        data = replace(data, metrics=[Metric("breaks", ("one", "two"), breaks), *data.metrics])
        bench = Bench(setup, data, [Row.parse("ddim+plain")], Records(tmp_path), Progress(quiet=True))
        bench.run()
        return bench, bench.report()

    broken = True
    bench, report = run()
    why = "ZeroDivisionError: division by zero"
    assert bench.records.unmeasured("ddim+plain", "1000001") == {"one": why, "two": why}
    assert report.failures["ddim+plain, 1000001"] == f"one, two not measured: {why}"
    assert not any(report.failed.values()) and report.mean("ddim+plain", "PIE PSNR").count == 2
    assert "1.00 (1 not measured)" in report.markdown() and why in report.markdown()
    assert json.loads(report.json())["rows"]["ddim+plain"]["not measured"]["1000001"]["two"] == why
    row = content_of(page("", [], report, bench.records.open))["rows"][-1]
    assert row["lost"][row["means"].index([2.0, 2.0, 2.0])] == 1
    broken = False
    bench, report = run()
    assert not report.failures and report.mean("ddim+plain", "two").count == 2
    assert "not measured" not in report.markdown()


def test_a_mask_of_another_size_is_told_at_the_end_and_stops_nothing(tmp_path: Path) -> None:
    fits.picture(tmp_path / "cat.png", (20, 16))
    fits.picture(tmp_path / "mask.png", (8, 8))
    rows = f"image,source,targets,mask\ncat.png,{fits.SOURCE},{fits.TARGET},mask.png\n"
    (tmp_path / "list.csv").write_text(rows)
    answer = bench(tmp_path / "out", "ddim+plain", data=tmp_path / "list.csv", cases=1)
    assert answer.code == 1 and "3 of 3 pictures" in answer.err
    assert "mask.png is 8x8, its picture is 20x16 pixels" in answer.err
    assert "(1 not measured)" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "page.html").exists()


DIES = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Dies:
    \"\"\"Ends its process at a picture of the colour that a file beside this one names.\"\"\"

    def render(self, model, picture, source, target, steps=None, guidance=None):
        if source == Path(__file__).with_name("deadly.txt").read_text():
            os.kill(os.getpid(), signal.SIGKILL)
        return picture
"""


@pytest.mark.slow
def test_a_killed_process_is_reported_with_its_case_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes are started anew, each of which imports everything: some ten seconds."""
    info = tmp_path / "dying-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dying\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvinv_pl.methods]\ndies = dying_method:Dies\n")
    (tmp_path / "dying_method.py").write_text(DIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    setup = Setup(str(fits.checkpoint()), 1, 2.0, QUICK, "cpu")
    plan = Plan(("ddim+plain", "dies"), tmp_path / "two", setup, cases=3)
    (tmp_path / "deadly.txt").write_text(plan.load_cases().cases[1].source)
    report = plan.run(2).report()
    assert "process 2 of 2 ended before its cases were done" in capsys.readouterr().err
    assert report.failures == {"dies, 1000001": PROCESS_ENDED}
    assert set(report.rows["ddim+plain"]) == {"1000000", "1000001", "1000002"}
    before = times(tmp_path / "two")
    (tmp_path / "deadly.txt").write_text("")
    assert not plan.run(1).report().failures
    after = times(tmp_path / "two")
    assert after.keys() - before.keys() == {"pictures/dies/1000001.png"}
    assert all(after[name] == before[name] for name in before)
    alone = replace(plan, out=tmp_path / "one")
    one, two = (json.loads(each.run(1).report().json())["rows"] for each in (alone, plan))
    for row in one:
        for case, metrics in one[row]["cases"].items():
            untimed = metrics.keys() - {"seconds", "time x", "memory +MiB"}
            assert {name: metrics[name] for name in untimed} == {
                name: two[row]["cases"][case][name] for name in untimed
            }


def test_a_bench_on_pictures_of_ones_own(tmp_path: Path) -> None:
    fits.picture(tmp_path / "cat.png", (20, 16))
    (tmp_path / "mask.png").write_bytes(_half(tmp_path))
    (tmp_path / "list.csv").write_text(
        f"image,source,targets,mask\ncat.png,{fits.SOURCE},{fits.TARGET},mask.png\n"
    )
    answer = bench(tmp_path / "out", "ddim+plain", data=tmp_path / "list.csv", cases=1)
    assert answer.code == 0, answer.err
    rows = metrics(tmp_path / "out")
    assert list(rows) == ["source", "source through the VAE", "ddim+plain"]
    assert rows["ddim+plain"]["means"]["unedited PSNR"]["count"] == 1
    assert "same animal %" not in rows["ddim+plain"]["means"]


def test_a_method_is_given_a_mask_where_it_asks_for_one_and_the_table_says_so(tmp_path: Path) -> None:
    method = "kv_inversion(attention=masked, mask_given=True)"
    answer = bench(tmp_path / "out", method, "ddim+plain@1", cases=1)
    assert answer.code == 0, answer.err
    rows = metrics(tmp_path / "out")
    assert rows[method]["cases"]["1000000"]["mask given %"] == 100
    assert rows["ddim+plain"]["cases"]["1000000"].get("mask given %") is None
    assert (
        "* mask given %: edits whose method was given a mask" in (tmp_path / "out" / "table.md").read_text()
    )


def test_a_method_that_asks_for_a_mask_and_gets_none_says_what_to_do(tmp_path: Path) -> None:
    fits.picture(tmp_path / "cat.png", (20, 16))
    (tmp_path / "list.csv").write_text(f"image,source,targets\ncat.png,{fits.SOURCE},{fits.TARGET}\n")
    given, not_given = (f"kv_inversion(attention=masked{more})" for more in (", mask_given=True", ""))
    answer = bench(tmp_path / "out", given, not_given, data=tmp_path / "list.csv", cases=1)
    assert answer.code == 1
    assert "mask_given: expected a mask with the picture, got none: add one, or leave it out" in answer.err
    assert "Masked needs a mask of the subject: give --mask" in answer.err
    assert "or mask_given=True in a row of a bench" in answer.err


def test_a_list_may_grow_and_is_refused_with_other_pictures_prompts_or_masks(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fits.picture(tmp_path / f"{name}.png", (20, 16), seed=len(name))
    (tmp_path / "mask.png").write_bytes(_half(tmp_path))

    def told(*rows: str) -> Answer:
        (tmp_path / "list.csv").write_text("image,source,targets,mask\n" + "\n".join(rows))
        return bench(tmp_path / "out", "ddim+plain", data=tmp_path / "list.csv", cases=9)

    cat, dog = (f"{name}.png,{fits.SOURCE},{fits.TARGET}," for name in ("cat", "dog"))
    assert told(cat).code == 0 and told(cat, dog).code == 0
    before = times(tmp_path / "out")
    changed = "another picture, prompt or mask of the case 0001-cat"
    refused(told(cat.replace("running", "sitting"), dog), changed)
    refused(told(f"{cat}mask.png", dog), changed)
    fits.picture(tmp_path / "cat.png", (20, 16), seed=9)
    refused(told(cat, dog), changed)
    assert times(tmp_path / "out") == before


def test_a_picture_that_is_missing_is_told_at_once_and_a_damaged_one_with_the_table(tmp_path: Path) -> None:
    fits.picture(tmp_path / "cat.png", (20, 16))
    row = f"{fits.SOURCE},{fits.TARGET}"
    (tmp_path / "list.csv").write_text(f"image,source,targets\ncat.png,{row}\nnone.png,{row}\n")
    options = {"data": tmp_path / "list.csv", "cases": 2}
    refused(
        bench(tmp_path / "out", "ddim+plain", **options), f"list.csv names {tmp_path / 'none.png'}, which is"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "none.png").write_bytes(b"no picture")
    answer = bench(tmp_path / "out", "ddim+plain", **options)
    assert answer.code == 1 and "ddim+plain, 0002-none: " in answer.err
    assert "| ddim+plain | 1 (1 failed) |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "sheets" / "0001-cat.png").exists()


def test_one_row_has_one_name_however_it_is_typed() -> None:
    names = {
        Row.parse(text).text for text in ("masactrl( layer = 3,start=0.5)@4", "masactrl(layer=3, start=0.5)")
    }
    assert names == {"masactrl(layer=3, start=0.5)"}
    quoted = Row.parse("""ddim + masactrl(word='cat', empty_source=False)""")
    assert quoted.text == 'ddim+masactrl(word="cat", empty_source=False)' == Row.name_of(quoted.text)
    assert Row.name_of("truth through the VAE") == "truth through the VAE"


def _half(folder: Path) -> bytes:
    from PIL import Image

    mask = np.zeros((16, 20), np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save(folder / "half.png")
    return (folder / "half.png").read_bytes()


def test_mistakes_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    refused(bench(tmp_path / "a", "masactl"), "did you mean masactrl")
    refused(bench(tmp_path / "a", also="masactl"), "did you mean masactrl")
    refused(bench(tmp_path / "a", "plain", cases=0), "cases: expected 1 or more, got 0")
    refused(bench(tmp_path / "a", "plain", workers=0), "workers: expected 1 or more, got 0")
    refused(bench(tmp_path / "a", "plain", "plain@1"), "plain is given twice")
    refused(bench(tmp_path / "a", "plain", ours="direct+plain"), "ours: expected one of the rows, source; ")
    refused(
        bench(tmp_path / "a", "masactrl(layr=3)"),
        "neither masactrl nor the model has 'layr': did you mean layer",
    )
    refused(
        bench(tmp_path / "a", "masactrl(layer=x)"),
        "masactrl: layer: expected a whole number or None, got 'x'",
    )
    refused(bench(tmp_path / "a", "masactrl(start=4)"), "start: expected a share of the steps, 0 to 1, got 4")
    refused(bench(tmp_path / "a", "kv_inversion(attention=maskd)"), "did you mean masked")
    refused(bench(tmp_path / "a", "elite(clip=a.bin)"), 'is in quotes, weights="a.bin"')
    refused(bench(tmp_path / "a", "plain", settings='{"inner_stps": 1}'), "did you mean inner_steps")
    refused(bench(tmp_path / "a", "plain", data=tmp_path), "expected world, a folder of PIE-Bench")
    refused(bench(tmp_path / "a", "plain", clip=tmp_path), "has no config.json")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="has no setting"):
        Setup(str(fits.checkpoint()), settings={"stepz": 1}).load({})


def test_the_default_rows_of_another_checkpoint_have_none_of_the_embedded_models_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = list[Plan]()

    def run(plan: Plan, workers: int) -> None:
        plans.append(plan)
        raise UserError("enough")

    monkeypatch.setattr(Plan, "run", run)
    for checkpoint in ("menagerie", str(fits.checkpoint())):
        with pytest.raises(UserError, match="enough"):
            command(checkpoint=checkpoint, out=str(tmp_path))
    assert [len(plan.methods) for plan in plans] == [len(METHODS), len(METHODS) - 1]
    assert set(METHODS) - set(plans[1].methods) == {ALIKE} and plans[1].ours is None


def test_what_a_method_loads_is_no_part_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = list[float]()
    monkeypatch.setattr(
        KVInversionEdit, "prepare", lambda *_: loaded.append(sleep(0.3) or 0.3), raising=False
    )
    monkeypatch.setattr(KVInversionEdit, "render", lambda self, model, picture, *_: picture)
    setup = Setup(str(fits.checkpoint()), 1, 2.0, QUICK, "cpu")
    bench = Plan(("kv_inversion",), tmp_path, setup, cases=1).bench(quiet=True)
    bench.run()
    assert loaded and bench.report().rows["kv_inversion"]["1000000"]["seconds"] < 0.3


def test_weights_that_are_not_there_are_asked_for_once_and_named_by_their_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()

    def fetch(name: str, needed: str) -> Path:
        asked.append(name)
        raise UserError(f"no file {name} here")

    monkeypatch.setattr("kvinv_pl.models.published.fastcomposer.resolve_file", fetch)
    bench = Plan(("fastcomposer",), tmp_path, Setup(str(fits.checkpoint()), 1, 2.0, QUICK, "cpu"), cases=2)
    computed = bench.bench(quiet=True)
    computed.run()
    reasons = computed.report().failed["fastcomposer"]
    assert len(asked) == 1 and len(reasons) == 2
    assert all('fastcomposer takes it as weights="..."' in why for why in reasons.values())


def test_pictures_of_ones_own_and_the_embedded_model_are_told_apart(tmp_path: Path) -> None:
    plan = Plan(("plain",), tmp_path, Setup(), data="list.csv")
    assert "for photographs, give --checkpoint" in plan._advice
    assert not replace(plan, data="world")._advice and not replace(plan, setup=Setup("sd15"))._advice


def test_names_are_files_names_and_no_two_are_one() -> None:
    assert slug("direct+masactrl") == "direct+masactrl"
    names = ["a/b", "a_b", "a b", "../a", "ü" * 300]
    assert len({slug(name) for name in names}) == len(names)
    assert all(re.fullmatch(r"[^/ ]{1,90}", slug(name)) and not slug(name).startswith(".") for name in names)
