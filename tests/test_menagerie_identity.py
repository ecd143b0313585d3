"""Figures of identity: a picture of the very animal passes, and each thing that is lost is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kvinv_pl.errors import UserError
from kvinv_pl.menagerie import ACTIONS, Animal, Twice
from kvinv_pl.menagerie.bootstrap import bootstrap_interval
from kvinv_pl.menagerie.drawn.drawing import PARTS
from kvinv_pl.menagerie.identity import Identity, identity

CHOOSING = 900_000
SIZES = (64, 128)


def animal_with(**wanted: object) -> Animal:
    """The first animal of the choosing seeds that has these attributes."""
    animals = (Animal.sample(CHOOSING + number) for number in range(1000))
    return next(one for one in animals if all(getattr(one, name) == value for name, value in wanted.items()))


def target_of(animal: Animal) -> str:
    return next(action for action in ACTIONS if action != animal.action)


def blurred(picture: Image.Image, seed: int = 0) -> Image.Image:
    """About what an autoencoder of 30 dB on the animal does to a picture."""
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(picture.width / 160)), float)
    noise = np.random.default_rng(seed).normal(0, 4, soft.shape)
    return Image.fromarray(np.clip(soft + noise, 0, 255).astype(np.uint8))


def named(found: Identity) -> set[str]:
    return {reason.split()[0] for reason in found.reasons}


# --- what is known of a drawing ----------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
def test_every_pixel_of_a_picture_is_of_one_part(action: str) -> None:
    animal = animal_with(coat="striped", accent="collar")
    parts = animal.parts(action, 256)
    assert set(parts) == set(PARTS)
    assert np.array_equal(np.sum(list(parts.values()), axis=0), np.ones((256, 256)))
    shown = np.asarray(animal.render(action, 256), float) / 255
    assert np.allclose(np.median(shown[parts["marks"]], 0), animal.second, atol=0.05)
    assert np.allclose(np.median(shown[parts["accent"]], 0), animal.second, atol=0.05)


def test_the_scenery_is_the_picture_without_the_animal_and_its_shadow() -> None:
    animal = animal_with(coat="spotted")
    parts = animal.parts(size=64)
    scene = np.any([parts[part] for part in ("sky", "sun", "hill", "ground")], axis=0)
    scene &= ~np.array(animal.mask(size=64).filter(ImageFilter.MaxFilter(5)))
    error = np.abs(np.asarray(animal.render(size=64), float) / 255 - animal.scenery(64)).max(-1)
    assert error[scene].max() < 0.03


def test_another_animal_has_the_very_same_words_and_other_colours() -> None:
    animal = Animal.sample(CHOOSING)
    for same_scene in (True, False):
        other = animal.another(same_scene)
        assert other.prompt("lying") == animal.prompt("lying")
        assert not np.allclose(other.second, animal.second)
        assert np.array_equal(other.scenery(32), animal.scenery(32)) == same_scene


# --- the verdict -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("number", range(4))
def test_a_true_picture_is_of_the_same_animal_sharp_or_blurred(number: int, size: int) -> None:
    animal = Animal.sample(CHOOSING + number)
    true = animal.render(target_of(animal), size)
    for picture in (true, blurred(true)):
        assert identity(picture, animal, target_of(animal)).reasons == ()


@pytest.mark.parametrize("size", SIZES)
def test_the_source_and_other_animals_of_the_same_words_are_not_the_same_animal(size: int) -> None:
    for number in range(3):
        animal = Animal.sample(CHOOSING + number)
        target = target_of(animal)
        others = [animal.another(same_scene).render(target, size) for same_scene in (True, False)]
        for picture in [animal.render(size=size), *others]:
            assert not identity(picture, animal, target).same_animal


def test_an_animal_drawn_a_little_aside_is_still_the_same() -> None:
    animal = animal_with(coat="striped")
    moved = replace(animal, place=(animal.place[0] + 1 / 64, animal.place[1]), scale=animal.scale * 1.02)
    assert identity(moved.render(target_of(animal), 64), animal, target_of(animal)).same_animal


RED, YELLOW = np.array([0.9, 0.1, 0.1], np.float32), np.array([0.8, 1.0, 0.4], np.float32)
CHANGES: dict[str, tuple[dict[str, object], Callable[[Animal], Animal], set[str]]] = {
    "another body": (
        {"coat": "plain", "colour": "blue"},
        lambda animal: replace(animal, body=animal.body * 0.8),
        {"body"},
    ),
    "marks of another colour": (
        {"coat": "striped", "colour": "blue"},
        lambda animal: replace(animal, second=RED),
        {"second_colour", "second_recall"},
    ),
    "no marks": (
        {"coat": "striped", "accent": "tail"},
        lambda animal: replace(animal, coat="plain"),
        {"second_recall", "marks_off"},
    ),
    "one spot instead of several": (
        {"coat": "spotted", "accent": "tail"},
        lambda animal: replace(animal, spots=animal.spots[:1]),
        {"marks_off"},
    ),
    "no collar": (
        {"coat": "plain", "accent": "collar", "species": "dog"},
        lambda animal: replace(animal, accent="none"),
        {"accent"},
    ),
    "ears of another colour in place of a collar": (
        {"coat": "plain", "accent": "collar", "species": "cat", "colour": "green"},
        lambda animal: replace(animal, accent="ears", second=YELLOW),
        {"accent", "second_colour"},
    ),
    "ears coloured in place of the tail": (
        {"coat": "plain", "accent": "tail", "colour": "yellow"},
        lambda animal: replace(animal, accent="ears"),
        {"accent", "accent_elsewhere", "second_recall"},
    ),
    "half as large": (
        {"coat": "plain", "accent": "tail"},
        lambda animal: replace(animal, scale=animal.scale * 0.7),
        {"size", "outline"},
    ),
    "at another place": (
        {"coat": "plain", "accent": "tail"},
        lambda animal: replace(animal, place=(animal.place[0] + 0.1, animal.place[1])),
        {"place"},
    ),
    "no sun": (
        {"action": "lying"},
        lambda animal: replace(animal, scene=replace(animal.scene, sun=(*animal.scene.sun[:2], 0.0))),
        {"sun"},
    ),
    "a darker sky": (
        {"action": "lying"},
        lambda animal: replace(
            animal,
            scene=replace(
                animal.scene, sky_top=animal.scene.sky_top * 0.7, sky_low=animal.scene.sky_low * 0.7
            ),
        ),
        {"sky"},
    ),
    "other ground": (
        {"ground": "snow"},
        lambda animal: replace(
            animal, scene=replace(animal.scene, ground_colour=np.array([0.55, 0.74, 0.4], np.float32))
        ),
        {"ground"},
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_lost_is_named(change: str, size: int) -> None:
    wanted, lose, reasons = CHANGES[change]
    animal = animal_with(**wanted)
    target = target_of(animal)
    found = identity(blurred(lose(animal).render(target, size)), animal, target)
    assert reasons <= named(found)
    assert not found.same_animal


def test_what_a_picture_shows_too_little_of_counts_for_nothing() -> None:
    animal = animal_with(coat="plain")
    below = replace(animal, scene=replace(animal.scene, sun=(0.5, -1.0, 0.05)))
    found = identity(below.render("lying", 64), below, "lying")
    assert math.isnan(found.sun)
    assert found.same_animal


def test_a_picture_that_is_not_square_is_refused() -> None:
    with pytest.raises(UserError, match="square, got 64 x 48"):
        identity(Image.new("RGB", (64, 48)), Animal.sample(CHOOSING), "lying")


# --- intervals ---------------------------------------------------------------------------------------


def test_an_interval_holds_the_mean_and_narrows_with_more_values() -> None:
    values = np.random.default_rng(0).normal(3, 1, 1000)
    few, many = bootstrap_interval(values[:30]), bootstrap_interval(values)
    assert few[0] < values[:30].mean() < few[1]
    assert many[0] < values.mean() < many[1]
    assert many[1] - many[0] == pytest.approx(2 * 1.96 / math.sqrt(1000), rel=0.1)
    assert many[1] - many[0] < few[1] - few[0]


def test_an_interval_leaves_out_what_is_not_known() -> None:
    assert bootstrap_interval([1.0, math.nan, 1.0]) == (1.0, 1.0)
    assert all(math.isnan(edge) for edge in bootstrap_interval([math.nan]))


# --- the same animal twice ---------------------------------------------------------------------------


def test_two_of_a_kind_are_one_animal_in_two_actions_and_stand_apart() -> None:
    for number in range(12):
        two = Twice.sample(CHOOSING + number)
        one, other = two.first, two.second
        assert one.action != other.action
        assert one.body is other.body
        assert one.action in two.prompt()
        assert f"the same {other.species} {other.action}" in two.prompt()
        both = np.array(two.mask(64))
        alone = [np.array(each.mask(size=64)) for each in (one, other)]
        assert np.array_equal(both, alone[0] | alone[1])
        assert (alone[0] & alone[1]).sum() < 0.1 * both.sum()
