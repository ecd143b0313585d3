"""`kvinv new-variant`: a template of a variant, with its configuration and its test; all of them run."""

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from string import Template

from kvinv_pl.errors import UserError

TAKEN = {"CPAttention", "Float", "Site", "Tensor", "Trial", "UserError"}
"""Names that the templates import; the class must not have them."""
VARIANT = '''"""A variant of CP-attn: V is learned behind a gate for every head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvinv_pl import CPAttention, Site
from kvinv_pl.errors import UserError


class $cls(CPAttention):
    """A learned V-hat for every token, let in by one gate a head; K stays the model's own.

    Args:
        site: The self-attention to upgrade.
        gate: How far the gates are open at the start.
    """

    def __init__(self, site: Site, gate: float = 1.0):
        """Make psi for one site, at its start."""
        super().__init__(site)
        if gate == 0:
            raise UserError("gate: expected another number than 0, got 0: nothing could be learned")
        self.start = gate
        self.v_hat = nn.Parameter(torch.zeros(site.slots, site.tokens, site.dim))
        self.gate = nn.Parameter(torch.full((site.slots, 1, site.heads), gate))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Go back to the identity: V-hat is zero."""
        self.v_hat.zero_()
        self.gate.fill_(self.start)

    def forward(
        self, k: Float[Tensor, "branches slots tokens dim"], v: Float[Tensor, "branches slots tokens dim"]
    ) -> tuple[Float[Tensor, "branches slots tokens dim"], Float[Tensor, "branches slots tokens dim"]]:
        """Eq. 1 with lambda_k = lambda_v = 1 and gamma_k = 0: V-bar = V + gate V-hat."""
        gate = self.gate.repeat_interleave(self.site.dim // self.site.heads, dim=-1)  # for each channel
        return k, v + gate * self.v_hat
'''
CONFIG = """# The attention variant $cls of $name.py. In the folder of both:
#
#   kvinv run --config $name.yaml --image PICTURE --source "a cat standing" --target "a cat running" --out RUN
#
# Flags come after and win: --model.attention.gate 0.5.

model:
  attention:
    class_path: $name.$cls
    init_args:
      # How far the gates are open at the start.
      gate: 1.0
"""
TEST = '''"""$cls does what every variant must, and what it alone is for."""

import pytest
import torch
from $name import $cls

from kvinv_pl import Site
from kvinv_pl.testing import Trial, trials


@pytest.mark.parametrize("trial", trials($cls), ids=str)
def test_it_conforms(trial: Trial):
    trial()


def test_a_closed_gate_keeps_what_was_learned_out():
    cp = $cls(Site("attn1", slots=1, grid=(2, 3), dim=8, heads=2))
    k, v = torch.randn(2, 1, 1, 6, 8)
    with torch.no_grad():
        cp.v_hat.fill_(1)
        cp.gate[..., 1] = 0
    k_bar, v_bar = cp(k, v)
    assert torch.equal(k_bar, k)
    assert torch.equal(v_bar[..., :4], v[..., :4] + 1) and torch.equal(v_bar[..., 4:], v[..., 4:])
'''


def write(name: str, folder: Path) -> list[Path]:
    """Write NAME.py, NAME.yaml and test_NAME.py; raises UserError before anything is written."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"name: expected small letters, digits and _, such as my_variant, got {name!r}: it names a module"
        )
    cls = "".join(word.capitalize() for word in name.split("_"))
    if cls in TAKEN:
        raise UserError(f"name: the class of {name} would be {cls}, which is taken: choose another one")
    texts = {f"{name}.py": VARIANT, f"{name}.yaml": CONFIG, f"test_{name}.py": TEST}
    files = {folder / file: text for file, text in texts.items()}
    if existing := [file for file in files if file.exists()]:
        raise UserError(f"{existing[0]} already exists: choose another name or folder, or remove it")
    if (other := find_spec(name)) is not None:
        raise UserError(f"name: {name} is the name of another module ({other.origin}): choose another one")
    from kvinv_pl.data.runs.files import write_atomically

    for file, text in files.items():
        write_atomically(file, Template(text).substitute(name=name, cls=cls).encode())
    return list(files)


def new_variant(name: str, out: str = ".") -> None:
    """Write an attention variant to start from, its configuration and its test; they work as they are.

    Args:
        name: What to call it, in small letters, such as my_variant; the class is MyVariant then.
            `kvinv new-variant NAME` does as well.
        out: The folder to write to (also -o).
    """
    for file in write(name, Path(out).expanduser()):
        print(file)
