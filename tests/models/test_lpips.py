"""LPIPS against torchmetrics' own computation, on a SqueezeNet of random weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.functional.image import lpips as theirs

from kvinv_pl.errors import UserError
from kvinv_pl.models.vision.lpips import Lpips, spread, squeezenet

LINEAR = Path(str(files("torchmetrics"))) / "functional" / "image" / "lpips_models" / "squeeze.pth"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torchvision writes it, with the classifier that is not read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = {f"features.{name}": tensor for name, tensor in squeezenet().state_dict().items()}
    place = tmp_path_factory.mktemp("squeezenet") / "squeezenet1_1-b8a52dc0.pth"
    torch.save({**weights, "classifier.1.weight": torch.zeros(3, 512, 1, 1)}, place)
    return place


def test_it_is_what_torchmetrics_computes_over_the_frame_and_at_each_pixel(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Lpips.load(file, LINEAR)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: ours.features)
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 3, 40, 56, generator=draw) * 2 - 1 for _ in range(2))
    maps = ours.distances(a, b)
    whole: Any = theirs._NoTrainLpips(net="squeeze")
    found = torch.stack([each.mean((1, 2, 3)) for each in maps]).sum(0)
    assert torch.allclose(found, whole(a, b).flatten(), atol=1e-6) and bool((found > 0.01).all())
    pixels: Any = theirs._NoTrainLpips(net="squeeze", spatial=True)
    assert torch.allclose(spread(maps, (40, 56)), pixels(a, b), atol=1e-6)
    assert all(bool((each == 0).all()) for each in ours.distances(a, a))


def test_the_network_has_the_tensors_of_torchvisions() -> None:
    sizes = {name: tensor.numel() for name, tensor in squeezenet().state_dict().items()}
    assert sum(sizes.values()) == 722_496  # SqueezeNet 1.1 has 1,235,496 with its classifier of 513,000
    assert {"0.weight", "3.squeeze.bias", "12.expand3x3.weight"} <= sizes.keys()


def test_what_is_no_such_file_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none.pth; expected the file of torchvision's"):
        Lpips.load(tmp_path / "none.pth", LINEAR)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth is another network; expected the file of torchvision's"):
        Lpips.load(tmp_path / "other.pth", LINEAR)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text.pth cannot be read"):
        Lpips.load(tmp_path / "text.pth", LINEAR)
