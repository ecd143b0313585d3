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


def test_the_command_line_s_classes_are_left_as_they_are_written():
    data = pytest.importorskip("kvinv_pl.training.datamodule")
    assert not hasattr(data.SourceImages.__init__, "__wrapped__")
