import pytest
import torch

from kvinv_pl.algorithm.editing import Guidance, guided


def test_with_one_scale_it_is_classifier_free_guidance_between_the_negative_prompt_and_the_target() -> None:
    negative, target = torch.randn(2, 1, 4, 2, 2)
    guidance = Guidance(7.5, 7.5)
    assert guidance.branches == ("negative", "target")
    assert torch.equal(guidance.mix(torch.stack([negative, target])), negative + 7.5 * (target - negative))


def test_with_two_scales_the_source_prompt_is_guided_by_one_and_the_change_of_words_by_the_other() -> None:
    negative, source, target = torch.randn(3, 1, 4, 2, 2)
    guidance = Guidance(6.0, 2.0)
    assert guidance.branches == ("negative", "source", "target")
    expected = negative + 2 * (source - negative) + 6 * (target - source)
    torch.testing.assert_close(guidance.mix(torch.stack([negative, source, target])), expected)


def test_what_is_read_is_guided_away_from_a_target_that_attends_to_itself() -> None:
    source, target, alone = torch.randn(3, 1, 4, 2, 2)
    mixed = Guidance(3.0, 1.0, 2.5).mix(torch.stack([source, target]), alone)
    torch.testing.assert_close(mixed, source + 3 * (target - source) + 1.5 * (target - alone))


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        (Guidance(1.0, 1.0), ("target",)),
        (Guidance(5.0, 1.0), ("source", "target")),
        (Guidance(0.0, 0.0), ("negative", "target")),
        (Guidance(1.0, 3.0), ("negative", "source", "target")),
    ],
)
def test_a_branch_that_makes_no_difference_does_not_run(
    guidance: Guidance, branches: tuple[str, ...]
) -> None:
    eps = {name: torch.randn(1, 4, 2, 2, dtype=torch.float64) for name in ("negative", "source", "target")}
    assert guidance.branches == branches
    whole = eps["negative"] + guidance.source_scale * (eps["source"] - eps["negative"])
    whole = whole + guidance.scale * (eps["target"] - eps["source"])
    mixed = guidance.mix(torch.stack([eps[name] for name in branches]))
    torch.testing.assert_close(mixed, whole)


def test_one_epsilon_alone_stays_as_it_is_bit_for_bit() -> None:
    eps = torch.randn(1, 3, 4, 2, 2)
    assert guided(eps, (1.0,)) is not eps and torch.equal(guided(eps, (1.0,)), eps[0])
