"""The settings of the stages: what they refuse, and what the records say of an option added later."""

import json
import re
from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import fits
import numpy as np
import pytest
from fits import SOURCE, TARGET

from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.data.source_image import settings_of
from kvinv_pl.errors import UserError
from kvinv_pl.stages.editing.reader import Reader
from kvinv_pl.stages.settings import IDLE, EditSettings, InversionSettings, TuningSettings, options_of
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return fits.finished(tmp_path_factory.mktemp("runs") / "run")


def records(store: RunStore) -> list[dict[str, Any]]:
    return [record for record, _ in store.edits()]


def test_every_setting_is_a_parameter_of_the_module_and_has_its_default_there() -> None:
    parameters = signature(KVInversion).parameters
    by_checkpoint: dict[str, Any] = {"guidance": 9.0, "ahead": 0.2, "reading_guidance": 1.5}
    module = KVInversion("owner/name", **by_checkpoint)
    defaults = {name: parameter.default for name, parameter in parameters.items()} | by_checkpoint
    for settings in (module.inverting, module.tuning, module.editing):
        for setting in fields(settings):
            chosen = [defaults[name] for name in options_of(setting)]
            given = next((default for default in chosen if default is not None), None)
            assert getattr(settings, setting.name) == given


def test_guidance_is_that_of_tuning_too_unless_tuning_has_its_own() -> None:
    assert KVInversion("owner/name", guidance=4).tuning.guidance == 4.0
    module = KVInversion(guidance=4, tuning_guidance=1, inversion_guidance=2)
    assert (module.editing.guidance, module.tuning.guidance, module.inverting.guidance) == (4.0, 1.0, 2.0)


@pytest.mark.parametrize(("checkpoint", "w", "w_s"), [("menagerie", 3.0, 1.0), ("owner/name", 7.5, None)])
def test_left_out_guidance_is_that_of_the_kind_of_checkpoint(
    checkpoint: str, w: float, w_s: float | None
) -> None:
    module = KVInversion(checkpoint)
    assert (module.editing.guidance, module.editing.source_guidance) == (w, w_s)
    assert module.tuning.guidance == (w_s or w)
    assert module.editing.ahead == (0.7 if checkpoint == "menagerie" else 0.0)
    assert KVInversion(checkpoint, ahead=0.1).editing.ahead == 0.1
    assert module.editing.reading_guidance == (2.0 if checkpoint == "menagerie" else 1.0)
    assert KVInversion(checkpoint, guidance=0.0).editing.guidance == 0.0
    assert KVInversion(checkpoint, source_guidance=2.0).tuning.guidance == 2.0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"guidance": "high"}, "guidance: expected a number, got 'high'"),
        ({"source_guidance": [2]}, "source_guidance: expected a number or None, got [2]"),
        ({"inversion_guidance": None}, "inversion_guidance: expected a number, got None"),
        ({"steps": "50"}, "steps: expected a whole number, got '50'"),
        ({"slots": "many"}, "slots: expected a whole number, got 'many'"),
        ({"clip_skip": 1.5}, "clip_skip: expected a whole number, got 1.5"),
        ({"inner_steps": True}, "inner_steps: expected a whole number, got True"),
        ({"carry": 1}, "carry: expected True or False, got 1"),
        ({"negative": None}, "negative: expected a text, got None"),
        ({"subject": 3}, "subject: expected a text or None, got 3"),
        ({"reading": 3}, "reading: expected one of 'frozen', 'blend', got 3"),
    ],
)
def test_a_setting_of_another_kind_is_told_in_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        KVInversion(**given)
    of_numpy: dict[str, Any] = {"guidance": np.float32(5), "steps": np.int64(3)}
    of_numpy |= {"clip_skip": np.int64(2), "max_grid": np.int64(8)}
    module = KVInversion(**of_numpy, start=1)
    assert json.dumps([module.load_options.record(), module.selection.max_grid]) == '[{"clip_skip": 2}, 8]'
    assert module.editing.guidance == 5.0 and module.steps == 3 and isinstance(module.editing.start, float)


@pytest.mark.parametrize("kind", [InversionSettings, TuningSettings, EditSettings])
def test_settings_are_changed_by_making_others(kind: Any) -> None:
    module = KVInversion()
    settings = next(
        each for each in (module.inverting, module.tuning, module.editing) if isinstance(each, kind)
    )
    with pytest.raises(FrozenInstanceError):
        settings.guidance = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(settings, guidance=2.0).guidance == 2.0
    with pytest.raises(UserError, match="guidance: expected a finite number of 0 or more, got -1"):
        replace(settings, guidance=-1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sharpness": 0.0}, "sharpness: expected a finite number above 0, got 0.0"),
        ({"sharpness": float("nan")}, "sharpness: expected a finite number above 0, got nan"),
        ({"sharpness": 2.0, "reading": "blend"}, "sharpness: expected 1 with reading blend, got 2.0"),
        ({"mixing": "both"}, "mixing: expected replace or concat, got 'both'"),
        ({"mixing": "concat", "reading": "blend"}, "mixing: expected replace with reading blend, got concat"),
        ({"background": "mine"}, "background: expected free or kept, got 'mine'"),
        ({"reading_guidance": -1.0}, "reading_guidance: expected a finite number of 0 or more, got -1.0"),
        ({"ahead": 1.5}, "ahead: expected a share of the steps, 0 to 1, got 1.5"),
    ],
)
def test_an_option_of_an_edit_that_means_nothing_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        KVInversion(**changes)
    with pytest.raises(UserError, match=f"^{says}"):
        replace(KVInversion().editing, **changes)


def test_a_sharper_edit_is_another_edit_that_its_record_tells_of(tuned: RunStore) -> None:
    """At 1 no record has it: an edit made before there was the option is that edit still."""
    (plain,) = fits.edit(tuned)
    assert "sharpness" not in records(tuned)[-1] and "sharpness" not in tuned.read_run()["editing"]
    (sharp,), (replayed,) = (fits.edit(tuned, sharpness=4.0, kv=kv) for kv in ("stored", "replayed"))
    assert [record.get("sharpness") for record in records(tuned)] == [None, 4.0, 4.0]
    assert fits.levels(sharp, replayed) <= 1 < fits.levels(sharp, plain)


def test_a_mixed_edit_is_another_edit_and_the_same_whether_stored_or_replayed(tuned: RunStore) -> None:
    (plain,) = fits.edit(tuned)
    (stored,), (replayed,) = (fits.edit(tuned, kv=kv, mixing="concat") for kv in ("stored", "replayed"))
    assert records(tuned)[-1]["mixing"] == "concat"
    assert fits.levels(stored, replayed) <= 1 < fits.levels(stored, plain)


def test_an_edit_that_reads_ahead_reads_later_timesteps_whether_stored_or_replayed(
    tuned: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[int]()
    step = RunStore.step
    monkeypatch.setattr(RunStore, "step", lambda self, i, *on: (read.append(i), step(self, i, *on))[1])
    (plain,) = fits.edit(tuned)
    steps = sorted(set(read))
    half = round(0.5 * len(steps))
    read.clear()
    (stored,) = fits.edit(tuned, ahead=0.5)
    assert sorted(read) == steps[half:] and "ahead" not in records(tuned)[0]
    (replayed,) = fits.edit(tuned, ahead=0.5, kv="replayed")
    assert records(tuned)[-1]["ahead"] == 0.5
    assert fits.levels(stored, replayed) <= 1 < fits.levels(stored, plain)
    (blend,), (no_other,) = (fits.edit(tuned, reading="blend", ahead=ahead) for ahead in (0.0, 0.5))
    assert blend == no_other and "ahead" not in records(tuned)[-1]


def test_what_is_read_is_guided_against_a_forward_that_attends_to_itself(
    tuned: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = list[int]()
    eps = Reader.eps_alone
    monkeypatch.setattr(Reader, "eps_alone", lambda self, z, t: (alone.append(len(z)), eps(self, z, t))[1])
    (plain,) = fits.edit(tuned)
    assert not alone and "reading_guidance" not in records(tuned)[-1]
    (stored,), (replayed,) = (fits.edit(tuned, kv=kv, reading_guidance=3.0) for kv in ("stored", "replayed"))
    steps = len(tuned.trajectory()) - 1
    assert alone == [1] * 2 * steps and records(tuned)[-1]["reading_guidance"] == 3.0
    assert fits.levels(stored, replayed) <= 1 < fits.levels(stored, plain)
    (late,) = fits.edit(tuned, reading_guidance=3.0, start=1.0)  # nothing is read, so nothing is guided
    assert len(alone) == 2 * steps and late == fits.edit(tuned, start=1.0)[0]
    (blend,), (no_other,) = (fits.edit(tuned, reading="blend", reading_guidance=w) for w in (1.0, 3.0))
    assert blend == no_other and "reading_guidance" not in records(tuned)[-1]
    # attention maps to the subject are of the edit alone
    assert fits.edit(tuned, background="kept", subject="cat", reading_guidance=3.0)[0].size == plain.size


def test_keeping_the_background_changes_an_edit_and_needs_to_know_the_subject(tuned: RunStore) -> None:
    """The tiny picture has four tokens, of which a subject's margin leaves none or some."""
    (kept,) = fits.edit(tuned, background="kept", subject="cat")
    assert records(tuned)[-1]["background"] == "kept" and kept.size == fits.edit(tuned)[0].size
    with pytest.raises(UserError, match="'dog' is not in the prompt"):
        fits.edit(tuned, background="kept", subject="dog")


def test_a_run_remembers_the_sharpness_for_its_next_edit(tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = SourceImages(str(fits.picture(tmp_path / "cat.png")), SOURCE, [TARGET], out=str(out))
    fits.trainer().run(fits.model(steps=1, inner_steps=1, sharpness=2.0), data)
    found = settings_of(out, IDLE)["model"]
    assert found["sharpness"] == 2.0 and records(RunStore(out))[0]["sharpness"] == 2.0
    # what the run leaves out is not what the embedded model has by default
    assert (found["ahead"], found["reading_guidance"]) == (0.0, 1.0)
