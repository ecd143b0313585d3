import pytest
import torch

from kvinv_pl.algorithm.ddim import StepTable

jaxtyping = pytest.importorskip("jaxtyping")
pytest.importorskip("beartype")


def test_a_shape_that_is_not_as_the_signature_says_is_noticed():
    with pytest.raises(jaxtyping.TypeCheckError, match="alphas"):
        StepTable(torch.tensor([2, 1, 0]), torch.ones(3, dtype=torch.float64))


def test_a_shape_that_is_returned_is_held_to_those_of_the_arguments():
    from jaxtyping import Float, jaxtyped
    from shapes import check

    @jaxtyped(typechecker=check)
    def doubled(z: Float[torch.Tensor, "n c"]) -> Float[torch.Tensor, "n c"]:
        return torch.cat([z, z]) if len(z) > 1 else z

    assert doubled(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        doubled(torch.ones(2, 2))


def test_the_first_calls_in_a_test_are_held_to_it_and_those_of_the_next_again():
    import shapes
    from jaxtyping import Float

    @jaxtyping.jaxtyped(typechecker=shapes.check)
    def width(z: Float[torch.Tensor, "n c"]) -> int:
        return z.shape[-1]

    for _ in range(2):
        for _ in range(shapes.CALLS):
            with pytest.raises(jaxtyping.TypeCheckError):
                width(torch.ones(3))
        assert width(torch.ones(3)) == 3
        shapes.new_test()


def test_what_states_no_shape_is_left_as_it_is_written():
    import shapes

    def width(z: torch.Tensor) -> int:
        return z.shape[-1]

    assert jaxtyping.jaxtyped(width, typechecker=shapes.check) is width


def test_the_command_line_s_classes_are_left_as_they_are_written():
    data = pytest.importorskip("kvinv_pl.training.datamodule")
    assert not hasattr(data.SourceImages.__init__, "__wrapped__")
