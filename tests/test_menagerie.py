"""The drawn world, its judges, and the stages that train the embedded model."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_words import learn_words
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, COATS, COLOURS, GROUNDS, SIZE, SPECIES, Animal
from kvinv_pl.menagerie.classifier import FILE, WORDS, Classifier, accuracy, nearest_action
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.models.vision.clip import Clip
from kvinv_pl.models.vision.sam import Segmenter

ROOT = Path(__file__).parents[1]
CHOOSING = 900_000
ANIMALS = [Animal.sample(CHOOSING + number) for number in range(24)]


def rgb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32) / 255


def grown(mask: Image.Image) -> np.ndarray:
    """The mask and all that anti-aliasing may have touched around it."""
    return np.array(mask.convert("L").filter(ImageFilter.MaxFilter(5))) > 0


@cache
def drawn(seed: int, action: str) -> tuple[np.ndarray, Image.Image]:
    """The picture and the mask of an animal, which several tests look at."""
    animal = Animal.sample(seed)
    return rgb(animal.render(action)), animal.mask(action)


def shadow_rows(animal: Animal, size: int) -> np.ndarray:
    """The rows of a picture that a shadow on the ground can reach."""
    up = 1 - (np.arange(size) + 0.5) / size
    return np.abs(up - animal.place[1]) < 0.2 * animal.scale + 1 / size


# --- the world ---------------------------------------------------------------------------------------


def test_a_seed_always_gives_the_same_animal_and_pictures() -> None:
    for animal in ANIMALS[:6]:
        again = Animal.sample(animal.seed)
        assert again.prompt() == animal.prompt()
        assert again.render().tobytes() == animal.render().tobytes()
        assert again.mask().tobytes() == animal.mask().tobytes()


def test_different_seeds_give_different_animals_and_every_word_occurs() -> None:
    assert len({animal.render(size=32).tobytes() for animal in ANIMALS}) == len(ANIMALS)
    many = [Animal.sample(CHOOSING + number) for number in range(400)]
    for words, seen in ((SPECIES, "species"), (COLOURS, "colour"), (COATS, "coat"), (GROUNDS, "ground")):
        assert {getattr(animal, seen) for animal in many} == set(words)
    assert {animal.action for animal in many} == set(ACTIONS)


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda animal: animal.prompt().replace(" ", "-"))
def test_every_action_is_another_picture_and_another_mask(animal: Animal) -> None:
    pictures = [drawn(animal.seed, action)[0] for action in ACTIONS]
    masks = [np.array(drawn(animal.seed, action)[1]) for action in ACTIONS]
    for one in range(len(ACTIONS)):
        for other in range(one):
            assert np.square(pictures[one] - pictures[other]).mean() > 1e-3
            assert (masks[one] != masks[other]).mean() > 0.02


def test_only_the_animal_and_its_shadow_differ_between_actions() -> None:
    for animal in ANIMALS:
        own, mask = rgb(animal.render()), grown(animal.mask())
        for action in ACTIONS:
            picture, there = drawn(animal.seed, action)
            elsewhere = ~(mask | grown(there))
            elsewhere[shadow_rows(animal, SIZE)] = False
            assert elsewhere.sum() > 0.3 * SIZE**2
            np.testing.assert_array_equal(picture[elsewhere], own[elsewhere])


def test_a_mask_holds_the_animal_without_its_shadow() -> None:
    for animal in ANIMALS:
        mask = np.array(animal.mask("jumping", 128))
        assert animal.mask("jumping").mode == "1"
        assert 0.04 < mask.mean() < 0.4
        # a jumping animal is off the ground, and its shadow is not
        ground = int((1 - animal.place[1]) * 128)
        middle = int(animal.place[0] * 128)
        assert not mask[ground - 2 : ground + 4, middle - 4 : middle + 4].any()
        picture = rgb(animal.render("jumping", 128))
        beside = picture[ground, [2, -3]].mean(0)
        assert picture[ground, middle].mean() < beside.mean() - 0.05


@pytest.mark.parametrize("size", [32, 48, 96, 256])
def test_any_size_is_the_same_picture(size: int) -> None:
    for animal in ANIMALS[:6]:
        small, large = sorted((size, SIZE))
        shrunk = animal.render(size=large).resize((small, small), Image.Resampling.BOX)
        assert animal.render(size=size).size == animal.mask(size=size).size == (size, size)
        assert np.abs(rgb(shrunk) - rgb(animal.render(size=small))).mean() < 0.01
        masks = (
            animal.mask(size=large).resize((small, small), Image.Resampling.NEAREST),
            animal.mask(size=small),
        )
        assert (np.array(masks[0]) != np.array(masks[1])).mean() < 0.06


def test_coats_are_seen_on_the_body_in_every_action() -> None:
    for animal in (Animal.sample(CHOOSING + number) for number in range(30)):
        assert np.abs(animal.body - animal.second).max() > 0.2, animal.prompt()
        if animal.coat == "plain":
            continue
        for action in ACTIONS:
            inside = np.array(animal.mask(action, 128))
            colours = rgb(animal.render(action, 128))[inside]
            towards = animal.second - animal.body
            along = (colours - animal.body) @ towards / (towards @ towards)
            off = np.abs(colours - animal.body - along[:, None] * towards).max(1)
            assert ((np.abs(along - 1) < 0.1) & (off < 0.05)).mean() > 0.015, (
                animal.prompt(action),
                animal.seed,
            )


def test_a_prompt_names_the_five_things() -> None:
    for animal in ANIMALS:
        for action in (None, *ACTIONS):
            words = animal.prompt(action).split()
            assert words[0] == "a"
            assert {animal.coat, animal.colour, animal.species, animal.ground} < set(words)
            assert (action or animal.action) in words


def test_an_unknown_action_is_refused_with_the_known_ones() -> None:
    for ask in (ANIMALS[0].prompt, ANIMALS[0].render, ANIMALS[0].mask):
        with pytest.raises(ValueError, match=r"standing, sitting, running, jumping, lying.*'flying'"):
            ask("flying")


def test_a_training_set_is_drawn_in_minutes() -> None:
    began = time.process_time()
    for number in range(50):
        Animal.sample(CHOOSING + number).render()
    assert time.process_time() - began < 50 * 0.1  # about 5 ms each on an idle core


def test_the_world_needs_no_torch() -> None:
    code = "import sys, kvinv_pl.menagerie; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False", ran.stderr


def test_missing_weights_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(menagerie, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=r"weights of the menagerie are missing: .*train_menagerie") as caught:
        menagerie.checkpoint()
    assert "\n" not in str(caught.value)


# --- the judges --------------------------------------------------------------------------------------


def test_the_nearest_true_picture_names_the_action_of_a_true_picture() -> None:
    animals = [Animal.sample(CHOOSING + number) for number in range(100)]
    right = [nearest_action(animal.render(size=64), animal) == animal.action for animal in animals]
    assert sum(right) >= 99


def test_the_nearest_true_picture_is_sought_at_the_size_of_the_picture() -> None:
    for action, size in zip(ACTIONS, (32, 48, 64, 96, 128), strict=True):
        assert nearest_action(ANIMALS[1].render(action, size), ANIMALS[1]) == action
    with pytest.raises(UserError, match="is square, got 40 x 32"):
        nearest_action(Image.new("RGB", (40, 32)), ANIMALS[0])


def test_a_judge_is_small_and_has_a_word_for_everything_that_a_prompt_names() -> None:
    classifier = Classifier()
    assert sum(parameter.numel() for parameter in classifier.parameters()) < 500_000
    scores = classifier(torch.rand(3, 3, 64, 64) * 2 - 1)
    assert {name: row.shape for name, row in scores.items()} == {
        name: (3, len(WORDS[name])) for name in WORDS
    }


def test_a_judge_names_pictures_of_any_size_and_mode() -> None:
    classifier = Classifier()
    pictures = [ANIMALS[0].render(size=size) for size in (32, 64, 100)]
    named = classifier.names([*pictures, pictures[0].convert("L"), pictures[1].convert("RGBA")])
    assert all(words[name] in WORDS[name] for words in named for name in WORDS)
    assert named[4] == named[1]
    assert set(accuracy(classifier, pictures, [ANIMALS[0]] * 3)) == set(WORDS)


def test_a_judge_that_is_missing_or_damaged_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no judge"):
        Classifier.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"not a judge")
    with pytest.raises(UserError, match="cannot be read as a judge") as caught:
        Classifier.load(tmp_path)
    assert "\n" not in str(caught.value)


# --- the training ------------------------------------------------------------------------------------

TINY: dict[str, list[str]] = {
    "vae": ["--count=24", "--size=32", "--channels=[8,8,8]", "--batch=4"],
    "unet": ["--count=24", "--size=32", "--channels=[16,16]", "--text_width=16", "--batch=4"],
    "judge": ["--count=24", "--size=32", "--batch=4", "--cases=4"],
    "sam": ["--count=24", "--size=32", "--width=16", "--layers=2", "--batch=4", "--cases=2"],
    "clip": ["--count=24", "--size=32", "--width=16", "--layers=1", "--batch=4", "--cases=1"],
}


@pytest.fixture(scope="module")
def command() -> Any:
    """tools/train_menagerie.py as a module."""
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "tools"))
    learn_words()
    yield importlib.import_module("train_menagerie")
    sys.path[:] = path


@pytest.fixture(scope="module")
def trained(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has trained for two steps."""
    work = tmp_path_factory.mktemp("work")
    for stage in TINY:
        run(command, stage, work, 2)
    return work


def run(command: Any, stage: str, work: Path, steps: int, *more: str) -> None:
    with torch.random.fork_rng(devices=[]):
        command.main([stage, f"--work={work}", f"--steps={steps}", *TINY[stage], *more])


def step_of(work: Path, stage: str) -> int:
    return torch.load(work / stage / "last.ckpt", weights_only=False, map_location="cpu")["global_step"]


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


@pytest.mark.parametrize("stage", TINY)
def test_a_stage_goes_on_where_it_was_and_does_not_train_again_when_finished(
    stage: str, command: Any, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_of(trained, stage) == 2
    run(command, stage, trained, 2)
    assert "finished, 2 steps" in capsys.readouterr().out
    run(command, stage, trained, 3)
    assert f"{stage}: resuming, to 3 steps" in capsys.readouterr().out
    assert step_of(trained, stage) == 3
    last = trained / stage / "last.ckpt"
    written = last.stat().st_mtime_ns
    run(command, stage, trained, 3)
    assert last.stat().st_mtime_ns == written


def test_a_stage_begun_with_other_settings_is_refused(
    command: Any, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(command, "vae", trained, 9, "--latent_channels=4")
    assert caught.value.code == 2
    assert "begun with --latent_channels 12, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "lacking"),
    [("unet", "the stage vae"), ("judge", "the stage vae"), ("export", "the stage unet")],
)
def test_a_stage_says_which_one_must_come_first(
    stage: str, lacking: str, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TINY.get(stage, [f"--to={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as caught:
        command.main([stage, f"--work={tmp_path / 'work'}", *options])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert lacking in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_export_is_an_ordinary_checkpoint_in_half_precision(
    command: Any, trained: Path, tmp_path: Path
) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    folder = tmp_path / "exported"
    command.main(["export", f"--work={trained}", f"--to={folder}"])
    command.main(["export", f"--work={trained}", f"--to={folder}"])  # over an earlier one
    for file in folder.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}, file
    for file in folder.rglob("*.json"):
        assert str(trained) not in file.read_text(encoding="utf-8"), file
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == [None, None]
    Classifier.load(folder)
    mask = Segmenter.load(str(folder / "sam")).segment(ANIMALS[0].render(), points=[(31, 40)])
    assert mask.size == (SIZE, SIZE)
    seen = Clip.load(folder / "clip")
    assert seen.size == 32 and 0 <= seen.score(ANIMALS[0].render(), ANIMALS[0].prompt()) <= 100
    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    assert processor(ANIMALS[0].render(), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)

    backbone = Backbone.load(str(folder))
    assert backbone.sample_size == (32, 32)
    z = backbone.encode(torch.zeros(1, 3, 32, 32))
    assert backbone.decode(z).shape == (1, 3, 32, 32)

    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *z.shape[1:])
    drawn = pipeline(["a red cat", "zebra!"], num_inference_steps=2, guidance_scale=4.0, latents=noise)
    assert [picture.size for picture in drawn.images] == [(32, 32)] * 2


def test_an_export_leaves_other_folders_alone(
    command: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit) as caught:
        command.main(["export", f"--work={trained}", f"--to={tmp_path}"])
    assert caught.value.code == 2
    assert "neither an earlier export nor an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["of the training", "of the weights"])
def test_every_word_of_the_world_is_one_token_and_any_other_text_is_read(which: str, command: Any) -> None:
    training = importlib.import_module("menagerie_training.denoiser")
    weights = menagerie.checkpoint() / "tokenizer"
    tokenizer = training.build_tokenizer()
    if which == "of the weights":
        tokenizer = training.CLIPTokenizer.from_pretrained(weights)
    for animal in ANIMALS:
        words = animal.prompt().split()
        assert len(tokenizer(animal.prompt())["input_ids"]) == len(words) + 2
        assert (
            tokenizer.decode(tokenizer(animal.prompt())["input_ids"], skip_special_tokens=True)
            == animal.prompt()
        )
    assert tokenizer("Äß zebra, 12 🐈")["input_ids"].count(tokenizer.eos_token_id) == 1


# --- the SAM -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmenting(command: Any) -> Any:
    """tools/menagerie_training/segmenting.py as a module."""
    return importlib.import_module("menagerie_training.segmenting")


def masks_of(animals: list[Animal]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(animal.mask())) for animal in animals])[:, None].byte()


def test_points_lie_on_what_is_asked_for_and_boxes_close_around_it(segmenting: Any) -> None:
    masks = masks_of(ANIMALS[:8])
    points, boxes = segmenting.points_on(masks, 20).long(), segmenting.boxes_of(masks).long()
    for mask, on, (x0, y0, x1, y1) in zip(masks[:, 0].bool(), points, boxes.tolist(), strict=True):
        assert mask[on[:, 1], on[:, 0]].all() and len(on.unique(dim=0)) > 1
        inside = mask[y0 : y1 + 1, x0 : x1 + 1]
        assert inside.sum() == mask.sum()
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_every_prompt_of_the_training_tells_the_truth(segmenting: Any) -> None:
    masks, seen = masks_of(ANIMALS[:8]), set[str]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for given in (segmenting.prompts(masks) for _ in range(30)):
            seen.add(" ".join(given))
            if "input_boxes" in given:
                off = given["input_boxes"][:, 0] - segmenting.boxes_of(masks)
                assert off.abs().max() <= segmenting.JITTER
            if "input_points" in given:
                x, y = given["input_points"][:, 0].long().unbind(-1)
                there = masks[torch.arange(len(masks))[:, None], 0, y, x]
                assert torch.equal(there.float(), given["input_labels"][:, 0])
    assert seen == {"input_boxes", "input_points input_labels", "input_boxes input_points input_labels"}


def test_the_loss_of_a_mask_is_least_at_the_truth(segmenting: Any) -> None:
    masks = masks_of(ANIMALS[:4])[:, None]  # (n, one prompt, 1, h, w)
    right = (masks.float() * 2 - 1) * 20
    sure, none = torch.ones(4, 1, 3), torch.zeros(4, 1, 3)
    logits = right.expand(-1, -1, 3, -1, -1)
    loss, iou = segmenting.mask_loss(logits, sure, masks)
    assert loss < 1e-3 and iou == 1
    for worse, scores in ((logits, none), (-logits, none), (logits.roll(3, -1), sure), (logits * 0, none)):
        assert segmenting.mask_loss(worse, scores, masks)[0] > loss + 0.1
    assert segmenting.mask_loss(-logits, none, masks)[1] == 0


# --- the CLIP ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contrasting(command: Any) -> Any:
    """tools/menagerie_training/contrasting.py as a module."""
    return importlib.import_module("menagerie_training.contrasting")


def test_a_caption_is_true_of_the_pictures_that_it_says_nothing_wrong_of(contrasting: Any) -> None:
    texts = ["a picture of a cat sitting", "a blue dog that is running on the sand", "a qqq cat lying"]
    words = [list(each) for each in WORDS.values()]
    told = [
        [kind[n] if n >= 0 else None for kind, n in zip(words, row, strict=True)]
        for row in contrasting.said(texts).tolist()
    ]
    assert told[0] == ["cat", None, None, "sitting", None] and told[2] == ["cat", None, None, "lying", None]
    assert told[1] == ["dog", "blue", None, "running", "sand"]
    own = contrasting.said([animal.prompt() for animal in ANIMALS])
    assert torch.equal(own, contrasting.facts(ANIMALS))
    changed = contrasting.others(texts, np.random.default_rng(0))
    for text, other in zip(texts, changed, strict=True):
        (before, after), *more = [
            pair for pair in zip(text.split(), other.split(), strict=True) if pair[0] != pair[1]
        ]
        assert not more and before in ACTIONS and after in ACTIONS


def test_the_loss_of_a_clip_is_least_where_only_true_captions_fit(contrasting: Any) -> None:
    true = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    right = torch.where(true, 20.0, -20.0)
    best = contrasting.contrastive_loss(right, true)
    for worse in (-right, right * 0, right.flip(0), right + torch.tensor([0.0, 0, 0, 60.0])):
        assert contrasting.contrastive_loss(worse, true) > best + 0.1
    two = true[:, :2]
    plain = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    by_hand = torch.nn.functional.cross_entropy
    clip_loss = (by_hand(plain, torch.arange(2)) + by_hand(plain.T, torch.arange(2))) / 2
    assert torch.allclose(contrasting.contrastive_loss(plain, two), clip_loss)


def test_the_shipped_size_of_a_clip_is_below_3_mb_in_half_precision(contrasting: Any) -> None:
    tokenizer = importlib.import_module("menagerie_training.denoiser").build_tokenizer()
    clip = contrasting.build_clip(tokenizer, 64, 96, 4)
    assert 2 * sum(each.numel() for each in clip.parameters()) < 3e6


def test_a_report_leaves_out_the_sam_of_a_folder_without_one(
    command: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporting = importlib.import_module("report_menagerie")
    report, seeds = reporting.Report(), range(CHOOSING, CHOOSING + 2)
    reporting.segmented(report, tmp_path, seeds, 32)
    assert "has no SAM" in capsys.readouterr().out and not report.figures
    (tmp_path / "sam").symlink_to(trained / "sam-trained")
    reporting.segmented(report, tmp_path, seeds, 32)
    assert len(report.figures) == 2 and all(0 <= value <= 100 for value in report.figures.values())
    assert capsys.readouterr().out.count("bar") == 2
