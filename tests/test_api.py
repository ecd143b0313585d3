import gc
import shutil
from pathlib import Path
from typing import Any, Literal, cast

import fits
import numpy as np
import pytest
import torch
from fits import SOURCE, TARGET
from kvinv_plugins.masked import Masked  # pyright: ignore[reportMissingImports]
from PIL import Image

import kvinv_pl
from kvinv_pl.api import KVInverter, Run, open_run
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import Animal
from kvinv_pl.stages.progress import Progress

SETTINGS: dict[str, Any] = {**fits.QUICK, "optimizer": fits.adam()}


@pytest.fixture(scope="module")
def kv() -> KVInverter:
    return kvinv_pl.load(fits.checkpoint(), accelerator="cpu", **SETTINGS)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fits.picture(tmp_path_factory.mktemp("pictures") / "cat.png", (45, 30))


@pytest.fixture(scope="module")
def run(kv: KVInverter, image: Path) -> Run:
    return kv.tune(image, SOURCE)


def test_three_lines_give_a_picture_in_the_size_of_the_source_and_say_nothing(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kv = kvinv_pl.load(fits.checkpoint(), accelerator="cpu", **SETTINGS)
    run = kv.tune(image, SOURCE)
    edited = run.edit(TARGET)
    assert edited.size == run.reconstruction.size == (45, 30) and edited.mode == "RGB"
    assert edited.tobytes() != run.reconstruction.tobytes()
    assert capsys.readouterr() == ("", "")


def test_it_is_the_same_tuning_as_the_trainers(run: Run, image: Path, tmp_path: Path) -> None:
    store = fits.fit(image, tmp_path / "run")
    assert fits.tensors(RunStore(run.folder)) == fits.tensors(store)


def test_an_edit_may_ask_for_other_settings_which_are_forgotten_after_it(kv: KVInverter, run: Run) -> None:
    plain, loaded = run.edit(TARGET).tobytes(), kv.model.editing
    others = [
        run.edit(TARGET, reading="blend"),
        run.edit(TARGET, start=1.0),
        run.edit(TARGET, guidance=3.0),
        run.edit(TARGET, negative="a dog"),
    ]
    assert len({plain, *(other.tobytes() for other in others)}) == 5
    with pytest.raises(UserError, match="start: expected a share"):
        run.edit(TARGET, guidance=5.0, start=2.0)
    with pytest.raises(UserError, match=r"^edit has no setting guidence: did you mean guidance$"):
        run.edit(TARGET, guidence=5.0)
    assert kv.model.editing is loaded
    assert run.edit(TARGET).tobytes() == plain


def test_who_is_told_of_an_edit_and_sees_its_steps_is_of_that_call_alone(kv: KVInverter, run: Run) -> None:
    begun, seen = list[str](), list[int]()

    class JobProgress(Progress):
        def begin(self, stage: str, picture: str, total: int) -> None:
            begun.append(stage)

    run.edits([TARGET], progress=JobProgress(), after_step=lambda i, t, z: seen.append(i))
    run.edit(TARGET)
    assert begun == ["editing"]
    assert seen == list(range(kv.model.steps))


def test_a_run_folder_opens_with_what_it_was_tuned_with(run: Run) -> None:
    opened = open_run(run.folder, accelerator="cpu")
    assert opened.edit(TARGET).tobytes() == run.edit(TARGET).tobytes()
    assert opened.owner.model.editing == run.owner.model.editing


def test_a_model_changed_in_memory_is_another_model_until_the_change_is_undone(
    image: Path, tmp_path: Path
) -> None:
    kv = kvinv_pl.load(fits.checkpoint(), accelerator="cpu", **{**SETTINGS, "steps": 1, "inner_steps": 1})
    run = kv.tune(image, SOURCE)
    before, backbone = run.edit(TARGET).tobytes(), kv.model.denoiser.backbone
    unet: Any = backbone.unet
    unet.conv_out.weight.data *= -1
    other = kv.tune(image, SOURCE, tmp_path / "other")
    model = RunStore(other.folder).read_run()["model"]
    assert model["changed_in_memory"] == ["unet"] and "changed in memory" in backbone.notes[-1]
    assert other.edit(TARGET).tobytes() != before
    with pytest.raises(UserError, match=r"another checkpoint \(changed_in_memory = nothing, not \['unet'\]"):
        run.edit(TARGET)
    unet.conv_out.weight.data *= -1
    assert run.edit(TARGET).tobytes() == before and not backbone.notes
    with pytest.raises(UserError, match=r"another checkpoint \(changed_in_memory = \['unet'\], not nothing"):
        kv.tune(image, SOURCE, tmp_path / "other")


def test_an_edit_may_replay_what_it_reads(kv: KVInverter, run: Run) -> None:
    stored, replayed = run.edit(TARGET), run.edit(TARGET, kv="replayed")
    assert fits.levels(stored, replayed) <= 1 and kv.model.editing.kv == "stored"
    assert {record["kv"] for record, _ in RunStore(run.folder).edits() if record["reading"] == "frozen"} >= {
        "stored",
        "replayed",
    }
    wrong: Any = "kept"
    with pytest.raises(UserError, match="kv: expected stored or replayed, got 'kept'"):
        run.edit(TARGET, kv=wrong)
    with pytest.raises(
        UserError, match="subject: got 'cat', but FullKV does not use a subject: leave it out"
    ):
        run.edit(TARGET, subject="cat")


@pytest.mark.parametrize("given", ["picture", "path"])
def test_a_masked_picture_is_edited_with_its_mask_and_the_word_for_its_subject(
    given: str, image: Path, tmp_path: Path
) -> None:
    mask = Image.new("L", (45, 30))
    mask.paste(255, (10, 10, 30, 20))
    mask.save(tmp_path / "mask.png")
    kv = kvinv_pl.load(fits.checkpoint(), accelerator="cpu", attention=Masked, **SETTINGS)
    with pytest.raises(UserError, match="Masked needs a mask of the subject"):
        kv.tune(image, SOURCE)
    run = kv.tune(image, SOURCE, mask=mask if given == "picture" else str(tmp_path / "mask.png"))
    assert run.edit("the cat running", subject="running").size == (45, 30)
    with pytest.raises(UserError, match="cannot tell which word of 'a dog' is the subject"):
        run.edit("a dog")
    with pytest.raises(UserError, match="'horse' is not in the prompt 'a dog'"):
        run.edit("a dog", subject="horse")
    assert run.edit("a dog", subject="dog") and kv.model.editing.subject is None


def test_a_search_is_asked_for_when_the_model_is_loaded(run: Run) -> None:
    with pytest.raises(UserError, match=r"start: expected a value, got auto; pass it to load\(\)"):
        run.edit("a dog running", start="auto")


def test_a_picture_that_the_embedded_model_does_not_know_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    known = Animal.sample(3).render()
    kv = kvinv_pl.load("menagerie", steps=1, inner_steps=1, retries=0, quiet=False, accelerator="cpu")
    for picture, told in ((Image.fromarray(rows), True), (known, False)):
        kv.tune(picture, "a cat standing")
        assert ("the embedded model knows its drawn animals alone" in capsys.readouterr().err) == told


def test_an_empty_target_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="an empty target"):
        run.edit("  ")


def test_a_temporary_run_goes_with_its_object(kv: KVInverter, image: Path, tmp_path: Path) -> None:
    run = kv.tune(image, SOURCE)
    folder = run.folder
    assert RunStore(folder).done() == {0, 1, 2}
    del run
    gc.collect()
    assert not folder.exists()


def test_a_run_in_a_folder_of_its_own_stays_and_is_gone_on_with(
    kv: KVInverter, image: Path, tmp_path: Path
) -> None:
    first = kv.tune(image, SOURCE, out=tmp_path / "run").edit(TARGET)
    gc.collect()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "steps").iterdir()}
    again = kv.tune(image, SOURCE, out=str(tmp_path / "run"))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "steps").iterdir()} == times
    assert again.edit(TARGET).tobytes() == first.tobytes()


def test_a_run_may_be_in_the_home_folder(
    kv: KVInverter, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    shutil.copy(image, tmp_path / "cat.png")
    run = kv.tune("~/cat.png", SOURCE, out="~/run")
    assert run.folder == tmp_path / "run" and run.reconstruction.size == run.edit(TARGET).size


def test_a_picture_in_memory_is_the_same_as_one_on_disk(kv: KVInverter, run: Run, image: Path) -> None:
    other = kv.tune(fits.opened(image), SOURCE)
    pictures = [RunStore(each.folder).read_run()["picture"]["sha256"] for each in (run, other)]
    assert pictures[0] == pictures[1]
    assert other.edit(TARGET).tobytes() == run.edit(TARGET).tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_a_picture_in_memory_may_be_of_any_mode_that_a_file_may_have(mode: str, tmp_path: Path) -> None:
    from kvinv_pl.api import as_file
    from kvinv_pl.data.images.pictures import open_picture

    rgb = fits.opened(fits.picture(tmp_path / "cat.png", (24, 16)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
        assert image.mode == "I;16"
    else:
        image = rgb.convert(mode)
    opened = open_picture(as_file(image, tmp_path, "picture")).image
    expected = rgb.convert("L") if mode in ("L", "LA", "I;16") else image.convert("RGB")
    assert opened.size == (24, 16)
    assert fits.levels(opened, expected.convert("RGB")) <= (1 if mode != "CMYK" else 60)


def test_a_picture_in_memory_that_no_file_can_hold_is_refused(kv: KVInverter) -> None:
    with pytest.raises(UserError, match="picture: expected a picture, got one of mode HSV"):
        kv.tune(Image.new("HSV", (16, 16)))


def test_a_picture_in_memory_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    from kvinv_pl.api import as_file

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    fits.opened(fits.picture(tmp_path / "cat.png", (24, 16))).save(tmp_path / "cat.jpg", exif=exif)
    with Image.open(tmp_path / "cat.jpg") as image:
        turned = fits.opened(as_file(image, tmp_path, "picture"))
    assert turned.size == (16, 24)


def test_a_mask_may_be_a_picture_in_memory(kv: KVInverter, image: Path) -> None:
    with pytest.raises(UserError, match="a mask was given, but FullKV takes none"):
        mask = Image.new("L", (45, 30))
        mask.paste(255, (10, 10, 30, 20))
        kv.tune(image, SOURCE, mask=mask)


def test_the_crop_is_returned_as_the_crop(kv: KVInverter, image: Path) -> None:
    assert kv.tune(image, SOURCE, geometry="crop").edit(TARGET).size == (30, 30)


@pytest.mark.parametrize("name", [".", "list.csv", "list.jsonl"])
def test_tune_takes_one_picture(name: str, kv: KVInverter, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tune takes one picture"):
        kv.tune(tmp_path / name, SOURCE)


def test_what_is_missing_or_wrong_is_said_in_a_sentence(kv: KVInverter, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.png"):
        kv.tune(tmp_path / "nowhere.png", SOURCE, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"^load has no setting guidence: did you mean guidance$"):
        kvinv_pl.load(fits.checkpoint(), guidence=4.0)
    with pytest.raises(UserError, match="steps: expected 1 or more"):
        kvinv_pl.load(fits.checkpoint(), steps=0)
    precision: Literal["16-mixed"] = "16-mixed"
    with pytest.raises(UserError, match="16-mixed needs a GPU"):
        kvinv_pl.load(fits.checkpoint(), accelerator="cpu", precision=precision)


def test_a_variant_may_be_given_by_its_name() -> None:
    kv = kvinv_pl.load(fits.checkpoint(), accelerator="cpu", attention="v_only", **SETTINGS)
    assert kv.model.variant is kvinv_pl.load(attention="VOnly").model.variant
    with pytest.raises(UserError, match=r"no attention variant 'v_onli': .*did you mean v_only"):
        kvinv_pl.load(attention="v_onli")


def test_an_array_of_8_bits_is_a_picture(kv: KVInverter, image: Path, run: Run, tmp_path: Path) -> None:
    with Image.open(image) as opened:
        array = np.asarray(opened.convert("RGB"))
    tuned = kv.tune(array, SOURCE, out=tmp_path / "run")
    assert fits.tensors(RunStore(tuned.folder)) == fits.tensors(RunStore(run.folder))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((16, 16, 3)), r"got float64 of \(16, 16, 3\)"),
        (np.zeros((3, 16, 16), np.uint8), r"\(height, width, 3\), got \(3, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"got torch.float32 of \(3, 16, 16\)"),
        (None, "got NoneType"),
        ([], "got list"),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(kv: KVInverter, image: Any, says: str) -> None:
    with pytest.raises(UserError, match=rf"^picture: expected .*{says}") as caught:
        kv.tune(image, SOURCE)
    assert "\n" not in str(caught.value)


def test_an_open_file_is_told_how_it_becomes_a_picture(kv: KVInverter, image: Path) -> None:
    not_a_picture: Any = image.open("rb")
    with not_a_picture, pytest.raises(UserError, match=r"got BufferedReader; PIL.Image.open"):
        kv.tune(not_a_picture, SOURCE)


def test_what_is_no_prompt_is_told_in_one_line(kv: KVInverter, image: Path, run: Run) -> None:
    several, nothing = cast(Any, [TARGET, SOURCE]), cast(Any, None)
    with pytest.raises(UserError, match=r"^target: expected a prompt, got .*; call it once for each$"):
        run.edit(several)
    with pytest.raises(UserError, match=r"^target: expected a prompt, got None$"):
        run.edit(nothing)
    with pytest.raises(UserError, match=r"^source: expected a prompt, got None$"):
        kv.tune(image, nothing)


def test_tasks_of_slurm_that_are_not_those_of_a_node_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "tune")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(UserError, match=r"^SLURM: expected --ntasks-per-node, got --ntasks=4"):
        kvinv_pl.load(fits.checkpoint(), accelerator="cpu")
