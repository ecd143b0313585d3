"""Each paper's own property, on a tiny checkpoint; a method is one of the registered ones."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
from fits import SOURCE, TARGET
from PIL import Image
from torch import Tensor

import kvinv_pl
from kvinv_pl.algorithm.method import Control, Inverted, Scene, sample
from kvinv_pl.attention.registry import arguments_of, resolve
from kvinv_pl.bench.methods import UNSUPPORTED, make, methods
from kvinv_pl.bench.rows import Row
from kvinv_pl.bench.running import Encoded, run_method, sample_edit
from kvinv_pl.errors import UserError
from kvinv_pl.testing import Trial, method_trials

FOUND = methods()
INVERSIONS = [name for name, method in FOUND.items() if method.kind == "inversion"]
EDITS = [name for name, method in FOUND.items() if method.kind == "edit"]


def loaded(**settings: Any) -> Any:
    return kvinv_pl.load(str(fits.checkpoint()), accelerator="cpu", **{**fits.QUICK, **settings})


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Image.Image:
    return fits.opened(fits.picture(tmp_path_factory.mktemp("picture") / "picture.png"))


@pytest.fixture(scope="module")
def encoded(picture: Image.Image) -> Encoded:
    return Encoded.encode(loaded(), picture)


@pytest.fixture(scope="module")
def brief(picture: Image.Image) -> Encoded:
    """Of two steps: the first, and one after another."""
    return Encoded.encode(loaded(steps=2), picture)


def close(got: Tensor, wanted: Tensor) -> bool:
    return float((got - wanted).abs().max()) < 1e-5 * (1 + float(wanted.abs().max()))


def test_every_method_is_one_and_says_what_it_is() -> None:
    for method in FOUND.values():
        assert method.error is None and method.kind and len(method.text) > 60
        assert method.options.keys() <= arguments_of(method.cls or object).keys()


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(trial, id=f"{name}: {trial}")
        for name, method in FOUND.items()
        if method.cls
        for trial in method_trials(method.cls)
    ],
)
def test_a_registered_method_conforms(trial: Trial) -> None:
    trial()


@pytest.mark.parametrize("inversion", INVERSIONS)
def test_every_pair_of_inversion_and_edit_runs(brief: Encoded, inversion: str) -> None:
    edits = [make(edit, "edit") for edit in EDITS]
    for source in {"" if edit.empty_source else SOURCE for edit in edits}:
        scene = brief.scene(source, TARGET, 5.0)
        with torch.no_grad():
            options = getattr(FOUND[inversion].cls, "brief", {})
            inverted = make(inversion, "inversion", **options).invert(scene)
        for edit in edits:
            if source == ("" if edit.empty_source else SOURCE):
                assert sample(scene, inverted, edit.control(scene, inverted)).isfinite().all()


def test_a_prompt_is_read_with_other_vectors_for_a_word_and_gradients_reach_them(encoded: Encoded) -> None:
    model = encoded.scene(SOURCE, TARGET, 2.0).model
    own = {word: model.vectors(word) for word in ("cat", "zebra")}
    assert len(own["cat"]) == 1 and len(own["zebra"]) == 5  # spelled in bytes
    prompts = [SOURCE, "a zebra running", "a dog sitting"]
    plain = model.embed(prompts)
    for word, vectors in own.items():
        assert torch.equal(model.embed_with(prompts, {word: vectors}), plain)
        other = vectors.roll(1, -1).requires_grad_(True)
        with torch.enable_grad():
            read = model.embed_with(prompts, {word: other})
            (gradient,) = torch.autograd.grad(read[..., 0].sum(), [other])
        assert gradient.abs().sum(1).all()
        changed = [not torch.equal(*pair) for pair in zip(read, plain, strict=True)]
        assert changed == [word in prompt for prompt in prompts]
    assert torch.equal(model.embed(prompts), plain)


def test_an_exception_in_a_control_leaves_the_network_as_it_was(encoded: Encoded) -> None:
    class Breaks(Control):
        def attend(self, i: int, at: Any) -> Tensor:
            raise ZeroDivisionError

    scene = encoded.scene(SOURCE, TARGET, 3.0)
    control, before = Breaks(), dict(encoded.denoiser.backbone.unet.attn_processors)
    control.attentions = scene.model.self_attentions
    with pytest.raises(ZeroDivisionError):
        sample(scene, make("ddim", "inversion").invert(scene), control)
    assert all(encoded.denoiser.backbone.unet.attn_processors[path] is one for path, one in before.items())


def test_attention_that_is_taken_over_and_left_alone_is_the_networks_own(encoded: Encoded) -> None:
    scene = encoded.scene(SOURCE, TARGET, 3.0)
    control, inverted = Control(), make("ddim", "inversion").invert(scene)
    control.attentions = (*scene.model.self_attentions, *scene.model.cross_attentions)
    assert close(sample(scene, inverted, control), sample(scene, inverted, Control()))


def test_edit_friendly_noise_keeps_the_picture_where_the_prompt_does_and_belongs_to_its_seed(
    encoded: Encoded,
) -> None:
    scene, plain = encoded.scene(SOURCE, SOURCE, 3.5), make("plain", "edit")
    assert close(sample_edit(scene, make("edit_friendly", "inversion"), plain)[1:], scene.z_0)
    scene = encoded.scene(SOURCE, TARGET, 3.5)
    one, other = (
        sample_edit(scene, make("edit_friendly", "inversion", seed=seed), plain)[1:] for seed in (0, 1)
    )
    assert not close(one, scene.z_0) and not close(one, other)


def test_masactrl_is_the_variant_recorded_read_at_its_layers_and_from_its_step(picture: Image.Image) -> None:
    encoded = Encoded.encode(loaded(), picture)
    layers = encoded.scene("", TARGET, 2.0).model.self_attentions[4:]
    recorded = loaded(
        attention=resolve("recorded"),
        target_modules=list(layers),
        kv="replayed",
        start=1 / 3,
        store_dtype="float32",
    )
    theirs = recorded.tune(picture, "").edit(TARGET)
    masactrl = make("masactrl", "edit", start=1 / 3, layer=4)
    ours = run_method(recorded, picture, SOURCE, TARGET, editor=masactrl, guidance=2.0)
    plain = run_method(recorded, picture, SOURCE, TARGET, guidance=2.0)
    assert fits.levels(ours, theirs) <= 1 < fits.levels(ours, plain)


def test_negative_prompt_inversion_reconstructs_at_any_guidance_as_ddim_does_at_1(encoded: Encoded) -> None:
    plain = make("plain", "edit")
    at_1 = sample_edit(encoded.scene(SOURCE, SOURCE, 1.0), make("ddim", "inversion"), plain)
    at_9 = encoded.scene(SOURCE, SOURCE, 9.0)
    assert close(sample_edit(at_9, make("negative_prompt", "inversion"), plain), at_1)
    assert not close(sample_edit(at_9, make("ddim", "inversion"), plain), at_1)


def test_negative_prompt_guidance_amplifies_no_map_that_prompt_to_prompt_replaced(encoded: Encoded) -> None:
    """With equal prompts both terms of the guidance are one, from wherever the target begins."""

    def target(guidance: float, negative: bool) -> Tensor:
        scene = encoded.scene(SOURCE, SOURCE, guidance)
        inverted = make("negative_prompt", "inversion").invert(scene)
        control = make("prompt_to_prompt", "edit", negative=negative).control(scene, inverted)
        control.before = lambda i, z: torch.stack([z[0], z[1] * 0.8]) if i == 0 else z
        return sample(scene, inverted, control)[1:]

    unguided = target(1.0, True)
    assert close(target(9.0, True), unguided) and not close(target(9.0, False), unguided)


def test_fixed_points_are_approached_by_every_round_and_reconstruct_better_than_ddim(
    encoded: Encoded,
) -> None:
    scene, plain = encoded.scene(SOURCE, TARGET, 7.5), make("plain", "edit")
    solved = make("fixed_point", "inversion", rounds=8).invert(scene)
    for moves in solved.residuals:
        assert all(after < before or after < 1e-6 for before, after in pairwise(moves))

    def missed(inversion: Any, scene: Scene = scene) -> float:
        return float((sample_edit(scene, inversion, plain)[:1] - scene.z_0).square().mean())

    ddim_at_1 = missed(make("ddim", "inversion"), encoded.scene(SOURCE, TARGET, 1.0))
    errors = [missed(make("fixed_point", "inversion", rounds=rounds)) for rounds in (0, 1, 3, 8)]
    assert errors[0] == pytest.approx(ddim_at_1, rel=1e-4)
    assert errors == sorted(errors, reverse=True) and errors[-1] < ddim_at_1 / 4


def test_null_text_learns_until_its_tolerance_and_reconstructs_better_than_ddim_at_a_guidance(
    encoded: Encoded,
) -> None:
    scene, plain = encoded.scene(SOURCE, TARGET, 7.5), make("plain", "edit")

    def missed(inversion: Any) -> float:
        return float((sample_edit(scene, inversion, plain)[:1] - scene.z_0).square().mean())

    null_text = make("null_text", "inversion")
    learned = null_text.invert(scene)
    assert all(losses[-1] < losses[0] for losses in learned.losses)
    assert close(sample(scene, learned, Control())[:1], learned.end)
    assert missed(null_text) < missed(make("ddim", "inversion")) * 0.8

    class Keeps(Control):
        def after(self, i: int, z: Tensor) -> Tensor:
            pivots.append(z[:1])
            return z

    # pivots that an embedding reaches
    drawn = torch.randn(scene.contexts[:1].shape, generator=torch.Generator().manual_seed(0))
    hidden = Inverted(scene, learned.start, negative=scene.contexts[:1] + 0.1 * drawn)
    pivots = [hidden.start]
    sample(scene, hidden, Keeps())
    found = make("null_text", "inversion", inner_steps=100).learn(scene, torch.stack(pivots))
    assert len(found.losses[0]) > 1
    assert all(losses[-1] < 1e-5 + 2e-5 * i for i, losses in enumerate(found.losses))


def test_masactrl_with_masks_of_everything_is_masactrl_without(encoded: Encoded) -> None:
    scene, ddim = encoded.scene(SOURCE, TARGET, 2.0), make("ddim", "inversion")
    plain = sample_edit(scene, ddim, make("masactrl", "edit", empty_source=False))
    whole = make("masactrl", "edit", empty_source=False, word="cat", threshold=-1.0)
    parts = make("masactrl", "edit", empty_source=False, word="cat", threshold=0.5)
    assert close(sample_edit(scene, ddim, whole), plain)
    assert not close(sample_edit(scene, ddim, parts), plain)


def test_prompt_to_prompt_scales_the_map_of_a_word(encoded: Encoded) -> None:
    scene, ddim = encoded.scene(SOURCE, SOURCE, 2.0), make("ddim", "inversion")
    options: dict[str, Any] = {"words": ("cat", "cat"), "threshold": -1.0}
    source, target = sample_edit(scene, ddim, make("prompt_to_prompt", "edit", weight=3.0, **options))
    assert not close(target, source)


def test_local_blend_keeps_the_source_outside_the_words(encoded: Encoded) -> None:
    scene, direct = encoded.scene(SOURCE, TARGET, 3.0), make("direct", "inversion")
    nowhere = make("prompt_to_prompt", "edit", words=("standing", "running"), threshold=2.0, blend_start=0.0)
    source, target = sample_edit(scene, direct, nowhere)
    assert close(target, source)


def test_words_of_a_prompt_are_replaced_one_by_one_and_refined_by_alignment() -> None:
    from kvinv_plugins.editors.prompt_to_prompt import (  # pyright: ignore[reportMissingImports]
        Tokens,
        aligned,
        refinement,
        replacement,
    )

    def tokens(names: list[str], length: int) -> Any:
        return Tokens(names, [range(1, 1 + len(names))], length)

    mapping, own = replacement(tokens(["a</w>", "c", "at</w>"], 7), tokens(["a</w>", "dog</w>"], 7))
    assert torch.equal(mapping[:, 2], torch.tensor([0.0, 0, 1, 1, 0, 0, 0])) and not own.any()
    assert mapping[4, 3] == 1  # the ends
    split, _ = replacement(tokens(["dog</w>"], 5), tokens(["c", "at</w>"], 5))
    assert torch.equal(split[1], torch.tensor([0, 0.5, 0.5, 0, 0]))
    assert aligned(["a", "cat", "sits"], ["a", "red", "cat", "sits"]) == [(0, 0), (1, 2), (2, 3)]
    mapping, own = refinement(tokens(["a", "cat"], 6), tokens(["a", "red", "cat"], 6))
    assert own.tolist() == [0, 0, 1, 0, 0, 0] and mapping[2, 3] == 1 and not mapping[:, 2].any()
    with pytest.raises(UserError, match="expected refine"):
        replacement(tokens(["a</w>"], 5), tokens(["a</w>", "dog</w>"], 5))


def test_words_of_a_second_chunk_are_aligned_with_those_of_the_first_and_no_attention_is_lost(
    encoded: Encoded,
) -> None:
    reader = encoded.denoiser.backbone.prompts
    encoded.denoiser.backbone.prompts = replace(reader, syntax="webui")
    try:
        long = "a cat on the grass, " * 5
        scene = encoded.scene(f"{long} standing", f"red {long} (running:1.3)", 2.0)
        ddim, ours = (
            make("ddim", "inversion"),
            make("prompt_to_prompt", "edit", words=("standing", "running")),
        )
        control: Any = ours.control(scene, ddim.invert(scene))
        assert scene.contexts.shape[1] == len(control.keeps_own) == 48
        assert control.positions == [[24 + 13], [24 + 13]]  # both chunks end at a comma
        moved = control.tokens.sum(0) + control.keeps_own
        assert torch.equal(moved, torch.ones(48))
        assert control.keeps_own[1] == 1 and control.tokens[1, 2] == 1  # red is new, and a stands after it
        for prompts in [(long, long), ("a cat", f"{long} running"), (f"{long} running", "a cat")]:
            pair = encoded.scene(*prompts, 2.0)
            control = make("prompt_to_prompt", "edit").control(pair, ddim.invert(pair))
            assert torch.equal(control.tokens[[0, 24]].sum(1), torch.ones(2))  # what the starts attract
            source, target = sample_edit(pair, ddim, make("prompt_to_prompt", "edit"))
            assert close(target, source) == (prompts[0] == prompts[1])
        masked = make("masactrl", "edit", word="grass", empty_source=False, start=0.0)
        assert sample_edit(scene, ddim, masked).isfinite().all()
    finally:
        encoded.denoiser.backbone.prompts = reader


def test_kv_inversion_is_among_the_methods(picture: Image.Image) -> None:
    model = loaded(attention=resolve("recorded"))
    ours = run_method(model, picture, SOURCE, TARGET, editor="kv_inversion", guidance=2.0)
    assert fits.levels(ours, model.tune(picture, SOURCE).edit(TARGET, guidance=2.0)) == 0
    with pytest.raises(UserError, match="expected none with kv_inversion, which inverts by itself"):
        run_method(model, picture, SOURCE, TARGET, editor="kv_inversion", inversion="direct")
    with pytest.raises(UserError, match="expected 3"):
        run_method(model, picture, SOURCE, TARGET, editor="kv_inversion", steps=4)


def test_a_method_runs_in_the_precision_that_the_model_was_loaded_with(picture: Image.Image) -> None:
    model = loaded(precision="bf16-mixed")
    half = run_method(model, picture, SOURCE, TARGET, editor="prompt_to_prompt", guidance=2.0)
    whole = run_method(loaded(), picture, SOURCE, TARGET, editor="prompt_to_prompt", guidance=2.0)
    assert model.model.denoiser.backbone.unet.dtype == torch.bfloat16
    assert fits.levels(half, whole) > 0


def test_a_method_and_a_tuning_choose_one_precision_so_that_nothing_is_loaded_twice(
    picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvinv_pl.training.trainer.precision_for", lambda checkpoint, device: "bf16-mixed")
    model = loaded(attention=resolve("recorded"), steps=1)
    unet = Encoded.encode(model, picture).denoiser.backbone.unet
    model.tune(picture, SOURCE)
    assert unet.dtype == torch.bfloat16 and model.model.denoiser.backbone.unet is unet


def test_a_picture_with_an_alpha_channel_is_read_as_it_is_for_tuning(picture: Image.Image) -> None:
    clear = picture.copy()
    clear.putalpha(0)
    white = Image.new("RGB", picture.size, "white")
    assert fits.levels(*(run_method(loaded(), image, SOURCE, TARGET) for image in (clear, white))) == 0


def test_the_page_on_methods_shows_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    fits.picture(tmp_path / "cat.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    mask.save(tmp_path / "mask.png")
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        exec(code.replace('"menagerie"', f'{str(fits.checkpoint())!r}, accelerator="cpu", steps=3'), {})
    assert {path.name for path in tmp_path.iterdir()} == {
        *("cat.png", "mask.png", "masactrl.png", "masked.png", "words.png")
    }
    assert all(f"`{name}`" in page for name in FOUND)
    missed = page.partition("## Methods that are not included")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", missed, re.M) == sorted(UNSUPPORTED)


@pytest.mark.parametrize(
    "row", [*UNSUPPORTED, f"ddim+{next(iter(UNSUPPORTED))}", f"{next(iter(UNSUPPORTED))}+plain"]
)
def test_a_method_that_is_missed_is_refused_by_what_it_lacks(row: str) -> None:
    name = next(name for name in UNSUPPORTED if name in row)
    with pytest.raises(UserError, match=f"^{name} is not among the methods, since .*docs/methods.md") as said:
        Row.parse(row)
    assert UNSUPPORTED[name] in str(said.value) and "\n" not in str(said.value)


def test_what_is_asked_wrongly_is_answered_in_one_line(picture: Image.Image, encoded: Encoded) -> None:
    with pytest.raises(UserError, match="did you mean direct"):
        run_method(loaded(), picture, SOURCE, TARGET, inversion="dirrect")
    with pytest.raises(UserError, match="no option 'layers'"):
        make("masactrl", "edit", layers=3)
    with pytest.raises(UserError, match="masactrl: guidance: expected a number or None, got 'high'"):
        make("masactrl", guidance="high")
    with pytest.raises(UserError, match="skip: expected 0 to less than 1, got 1"):
        make("edit_friendly", "inversion", skip=1)
    with pytest.raises(UserError, match="inner_steps: expected 1 or more, got 0"):
        make("null_text", "inversion", inner_steps=0)
    with pytest.raises(UserError, match="rounds: expected 0 or more, got -1"):
        make("fixed_point", "inversion", rounds=-1)
    with pytest.raises(UserError, match="expected 0 to 6, got 7"):
        make("masactrl", "edit", layer=7).control(encoded.scene(SOURCE, TARGET, 2.0), None)


def test_a_method_of_anybody_serves(picture: Image.Image) -> None:
    class Frozen:
        guidance, empty_source = 1.0, False

        def control(self, scene: Scene, inverted: Any) -> Control:
            return Control()

    model = loaded()
    assert (
        fits.levels(
            run_method(model, picture, SOURCE, TARGET, editor=Frozen()),
            run_method(model, picture, SOURCE, TARGET, guidance=1.0),
        )
        == 0
    )


def test_the_sentences_of_pix2pix_zero_may_be_of_more_chunks_than_the_prompts(picture: Image.Image) -> None:
    scene = Encoded.encode(loaded(prompt_syntax="webui"), picture).scene(SOURCE, TARGET, 3.0)
    about, other = ("a cat BREAK a dog", "a cat"), ("a dog BREAK a horse", "a red dog")
    found = list[Tensor]()
    for sentences in ((about, about), (about, other)):
        led = make("pix2pix_zero", "edit", amount=0.01, sentences=sentences)
        found += sample_edit(scene, make("ddim", "inversion"), led)
    assert close(found[0], found[1])  # no direction
    assert close(found[0], found[2]) and not close(
        found[2], found[3]
    )  # the source reads the same beside them
