"""Prompts that are longer than the model reads."""

from __future__ import annotations

from pathlib import Path

import fits
import pytest

from kvinv_pl.errors import UserError
from kvinv_pl.models.input_warnings import refuse_same_prompts, truncated_prompts, unknown_words
from kvinv_pl.models.stable_diffusion import Backbone
from kvinv_pl.training.datamodule import SourceImages

LONG = "a cat on the grass " * 4  # 20 of the 22 tokens that the tiny model reads


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(str(fits.checkpoint()))


def test_the_words_that_are_lost_are_said_once_for_each_prompt_that_is_cut(backbone: Backbone) -> None:
    source, target = LONG + "a dog standing on the grass", LONG + "a dog running"
    prompts = [("source prompt", source), ("target", target), ("target", target), ("target", "a cat")]
    assert list(truncated_prompts(backbone, prompts)) == [
        "the source prompt is longer than the model reads, and these words are lost "
        "(--model.prompt_syntax webui reads them): standing on the grass",
        "the target is longer than the model reads, and these words are lost "
        "(--model.prompt_syntax webui reads them): running",
    ]


def test_words_that_the_embedded_model_has_not_learned_are_said() -> None:
    backbone = Backbone.load("menagerie")
    source, target = "A photo of a Cat on the sand", "a cat flying on the moon, 2 of it"
    (line,) = unknown_words(backbone, [("source prompt", source), ("target", target)])
    assert line.startswith(
        "the target has words that the embedded model has not learned: flying, moon; it knows"
    )
    assert all(word in line for word in ("running", "rabbit", "purple", "snow"))
    backbone.prompts.tokenizer.add_tokens(["<odd-toy>"])  # as a textual inversion does
    assert not list(unknown_words(backbone, [("target", "a <odd-toy> running on sand")]))


def test_prompts_that_differ_only_where_the_model_does_not_read_are_refused(backbone: Backbone) -> None:
    source, one, other = (LONG + f"a dog {action}" for action in ("standing", "running", "jumping"))
    with pytest.raises(UserError, match=r"running' differs from the source prompt only after .*22 tokens"):
        refuse_same_prompts(backbone, source, [one])
    with pytest.raises(UserError, match=r"jumping' differs from the target .*running' only after"):
        refuse_same_prompts(backbone, "a cat", [one, other])
    with pytest.raises(UserError, match="differs from the source prompt only after"):
        refuse_same_prompts(backbone, LONG + "a dog", [one])


def test_prompts_that_differ_within_what_the_model_reads_or_not_at_all_are_taken(backbone: Backbone) -> None:
    refuse_same_prompts(backbone, "running " + LONG + "on the grass", ["jumping " + LONG + "on the grass"])
    refuse_same_prompts(backbone, LONG * 2, [LONG * 2])  # an edit to the source is the reconstruction
    refuse_same_prompts(backbone, "a cat", ["a cat", "A cat", "a dog"])


def test_a_command_says_what_is_cut_even_if_quiet_and_refuses_what_reads_alike_before_it_tunes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, model = fits.picture(tmp_path / "cat.png"), fits.model(steps=1, inner_steps=1, negative=LONG * 2)
    source, alike, other = LONG + "a dog standing", LONG + "a dog running", "a dog running"
    data = SourceImages(str(image), source, [alike], out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="only after what the model reads"):
        fits.trainer().run(model, data)
    assert not (tmp_path / "run").exists()
    fits.trainer().run(model, SourceImages(str(image), source, [other], out=str(tmp_path / "run")))
    said = [record.message for record in caplog.records if record.name.startswith("kvinv_pl")]
    assert [line.partition(" is longer")[0] for line in said] == ["the negative prompt", "the source prompt"]
    assert said[1].endswith("reads them): standing")
    with pytest.raises(UserError, match="only after what the model reads"):
        fits.trainer().edit(model, SourceImages(run=str(tmp_path / "run"), targets=[alike]))
