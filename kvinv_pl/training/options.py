"""Options of Lightning's Trainer that mean nothing here, or something else; each is refused with a remedy."""

from kvinv_pl.errors import UserError
from kvinv_pl.training.devices.strategy import ImageParallelStrategy


def check_options(
    strategy: str,
    devices: int,
    num_nodes: int,
    max_epochs: int,
    gradient_clip_val: float | None,
    accumulate_grad_batches: int,
    x_0_every: int,
) -> None:
    """Refuse what would couple pictures, or what the curriculum decides; see `KVTrainer`."""
    if max_epochs != -1:
        raise UserError(
            f"max_epochs: got {max_epochs}, but an epoch is one timestep, and model.steps says how many "
            "there are; leave it at -1"
        )
    if gradient_clip_val is not None or accumulate_grad_batches != 1:
        raise UserError(
            "gradient_clip_val and accumulate_grad_batches would couple the pictures of a batch: "
            "leave them out"
        )
    if strategy not in ("auto", ImageParallelStrategy.strategy_name):
        raise UserError(
            f"strategy: expected auto or image_parallel, got {strategy}: data parallelism would average "
            "the psi of different pictures, and psi is of one picture alone"
        )
    if (devices < 1 and devices != -1) or num_nodes < 1:
        raise UserError(f"devices and num_nodes: expected 1 or more, got {devices} and {num_nodes}")
    if x_0_every < 0:
        raise UserError(f"x_0_every: expected 0 or more, got {x_0_every}")
