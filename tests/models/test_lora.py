"""LoRA files: merged as diffusers does it, in every layout the same; what is not understood is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fits
import huggingface_hub.constants
import pytest
import torch
from checkpoints import cached, make, text_encoder
from commands import QUICK, kvinv
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import save_file
from single_files import FAMILIES, Family, unet_name
from torch import Tensor, nn

from kvinv_pl.errors import UserError
from kvinv_pl.models.adapters.lora import name_and_weight
from kvinv_pl.models.adapters.lora_names import layers_by_name, role_of
from kvinv_pl.models.checkpoints.families import CONFIGS
from kvinv_pl.models.checkpoints.loading import quiet
from kvinv_pl.models.load_options import LoadOptions
from kvinv_pl.models.stable_diffusion import Backbone

RANK, ALPHA = 2, 3.0
UP = "up_blocks.0.attentions.0.transformer_blocks.0"
CONV = "down_blocks.0.attentions.0.proj_in"
UNET = (f"{UP}.attn1.to_q", f"{UP}.attn2.to_out.0", f"{UP}.ff.net.0.proj", CONV)
TEXT = tuple(f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"))
Matrices = dict[tuple[str, str], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("tiny", tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Backbone:
    return Backbone.load(str(checkpoint))


@pytest.fixture(scope="module")
def lora(plain: Backbone) -> Matrices:
    """Matrices for some layers of both models, as (model, path): (down, up)."""
    torch.manual_seed(0)
    found: Matrices = {}
    for model, paths in (("unet", UNET), ("text_encoder", TEXT)):
        for path in paths:
            weight = layer(plain, model, path).weight
            down = torch.randn(RANK, *weight.shape[1:])
            found[model, path] = (down, torch.randn(weight.shape[0], RANK, *(1,) * (weight.ndim - 2)))
    return found


def layer(backbone: Backbone, model: str, path: str) -> Any:
    whole: Any = getattr(backbone, model)
    return getattr(whole, "text_model", whole).get_submodule(path)


def kohya(lora: Matrices, alpha: float | None = ALPHA) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (model, path), (down, up) in lora.items():
        start = "lora_unet_" if model == "unet" else "lora_te_text_model_"
        name = start + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    return tensors


def peft(lora: Matrices, start: str = "") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for (model, path), (down, up) in lora.items():
        name = start or ("unet." if model == "unet" else "text_encoder.text_model.")
        tensors |= {f"{name}{path}.lora_A.weight": down, f"{name}{path}.lora_B.weight": up}
    return tensors


def old(lora: Matrices) -> dict[str, Tensor]:
    """As diffusers wrote them before it used peft; without an alpha."""
    tensors: dict[str, Tensor] = {}
    for (model, path), pair in lora.items():
        name = f"unet.{path}.lora" if model == "unet" else f"text_encoder.text_model.{path}.lora_linear_layer"
        if ".attn" in path:
            block, _, which = path.rpartition(".to_")
            name = f"unet.{block}.processor.to_{which.removesuffix('.0')}_lora"
        tensors |= {f"{name}.{role}.weight": each for role, each in zip(("down", "up"), pair, strict=True)}
    return tensors


def saved(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or None)
    return str(path)


def load(checkpoint: Path, *loras: str, dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
    return Backbone.load(str(checkpoint), dtype, LoadOptions(loras=list(loras), **options))


def weights(backbone: Backbone) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value
        for part in ("unet", "text_encoder")
        for name, value in getattr(backbone, part).state_dict().items()
    }


def same(one: Backbone, other: Backbone, **tolerance: float) -> bool:
    ours, theirs = weights(one), weights(other)
    within: dict[str, Any] = {"rtol": 0, "atol": 0, **tolerance}
    return all(torch.allclose(ours[name], theirs[name], **within) for name in ours)


def test_what_is_merged_is_what_diffusers_fuses(
    checkpoint: Path, plain: Backbone, lora: Matrices, tmp_path: Path
) -> None:
    path = saved(tmp_path / "style.safetensors", kohya(lora))
    with quiet():
        pipe: Any = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
        pipe.load_lora_weights(path)
        pipe.fuse_lora(lora_scale=0.7)
        pipe.unload_lora_weights()
    ours = load(checkpoint, f"{path}:0.7")
    for part in ("unet", "text_encoder"):
        theirs = getattr(pipe, part).state_dict()
        for name, value in getattr(ours, part).state_dict().items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)
    changed = [name for name, value in weights(ours).items() if not torch.equal(value, weights(plain)[name])]
    assert len(changed) == len(lora)
    counts = "4 layers of the U-Net, 3 of the text model"
    assert ours.notes == [f"merged into the weights: {path} at 0.7 ({counts})"]


def test_every_layout_is_the_same_lora(checkpoint: Path, lora: Matrices, tmp_path: Path) -> None:
    expected = load(checkpoint, saved(tmp_path / "kohya.safetensors", kohya(lora)))
    alphas = {"unet.lora_alpha": ALPHA, "text_encoder.lora_alpha": 1}
    said = json.dumps(alphas | {"text_encoder.alpha_pattern": {"mlp.fc1": ALPHA, "self_attn.*": ALPHA}})
    with_metadata = saved(tmp_path / "peft.safetensors", peft(lora), lora_adapter_metadata=said)
    assert same(load(checkpoint, with_metadata), expected)

    (tmp_path / "unet").mkdir()
    (tmp_path / "text").mkdir()
    for folder, model in (("unet", "unet"), ("text", "text_encoder")):
        part = {key: value for key, value in lora.items() if key[0] == model}
        saved(tmp_path / folder / "adapter_model.safetensors", peft(part, "base_model.model."))
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK}))
    assert same(load(checkpoint, str(tmp_path / "unet"), str(tmp_path / "text")), expected)

    without_alpha = load(checkpoint, saved(tmp_path / "none.safetensors", kohya(lora, alpha=None)))
    assert same(load(checkpoint, saved(tmp_path / "old.safetensors", old(lora))), without_alpha)
    assert same(load(checkpoint, saved(tmp_path / "new.safetensors", peft(lora))), without_alpha)
    torch.save(kohya(lora), tmp_path / "kohya.pt")
    assert same(load(checkpoint, str(tmp_path / "kohya.pt"), allow_pickle=True), expected)
    assert not same(expected, without_alpha)


FIRST = {
    "lora_unet_up_blocks_0_attentions_0": "lora_unet_output_blocks_0_1",
    "lora_unet_down_blocks_0_attentions_0": "lora_unet_input_blocks_1_1",
}


def in_first_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What kohya writes of a U-Net of Stable Diffusion's first code."""
    found = dict[str, Tensor]()
    for name, tensor in tensors.items():
        start = next((start for start in FIRST if name.startswith(start)), None)
        found[name if start is None else name.replace(start, FIRST[start])] = tensor.clone()
    return found


def test_a_lora_in_the_names_of_the_first_code_is_the_same_lora(
    checkpoint: Path, lora: Matrices, tmp_path: Path
) -> None:
    named, other = kohya(lora), in_first_names(kohya(lora))
    assert not any("up_blocks" in name or "down_blocks" in name for name in other)
    expected = load(checkpoint, saved(tmp_path / "kohya.safetensors", named))
    assert same(load(checkpoint, saved(tmp_path / "first.safetensors", other)), expected)
    with pytest.raises(UserError, match=r"changes unet\.\S+ twice, as lora_unet_\S+ and as lora"):
        load(checkpoint, saved(tmp_path / "both.safetensors", named | other))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_true_size_is_known_by_its_name_in_the_first_code(family: Family) -> None:
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config["unet"])
    layers = layers_by_name(unet, text_encoder("tiny"))
    paths = [path for path, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    names = [f"lora_unet_{unet_name(f'{path}.weight').removesuffix('.weight')}" for path in paths]
    names = [name.replace(".", "_") for name in names]
    assert [layers[name][0] for name in names] == [f"unet.{path}" for path in paths]
    # diffusers' converter is right where there are attentions alone
    state = dict[str, Tensor]()
    for n, (name, path) in enumerate(zip(names, paths, strict=True)):
        if ".attentions." in path:
            state |= {f"{name}.lora_{role}.weight": torch.tensor(n) for role in ("down", "up")}
    diffusers: Any = StableDiffusionPipeline
    converted, _ = diffusers.lora_state_dict(dict(state), unet_config=unet.config)
    assert len(converted) == len(state)
    for name, number in converted.items():
        key, role = role_of(name)
        assert role and layers[key][0] == f"unet.{paths[int(number)]}"


def test_a_rank_stabilised_lora_is_scaled_by_the_root_of_its_rank(
    checkpoint: Path, lora: Matrices, tmp_path: Path
) -> None:
    said = json.dumps({"unet.lora_alpha": 4, "unet.use_rslora": True})
    in_unet = {key: value for key, value in lora.items() if key[0] == "unet"}
    ours = load(checkpoint, saved(tmp_path / "rs.safetensors", peft(in_unet), lora_adapter_metadata=said))
    plainly = load(checkpoint, saved(tmp_path / "plain.safetensors", peft(in_unet)) + f":{4 / RANK**0.5}")
    assert same(ours, plainly, atol=1e-6)


@pytest.mark.parametrize("decomposed", [False, True])
def test_convolutions_of_3_x_3_are_merged(
    decomposed: bool, checkpoint: Path, plain: Backbone, tmp_path: Path
) -> None:
    path, x = "down_blocks.0.resnets.0.conv1", torch.randn(1, 16, 5, 5)
    name, base = f"lora_unet_{path.replace('.', '_')}", layer(plain, "unet", path)
    chain = [nn.Conv2d(16, RANK, 1 if decomposed else 3, padding=0 if decomposed else 1, bias=False)]
    chain += [nn.Conv2d(RANK, RANK, 3, padding=1, bias=False)] if decomposed else []
    chain += [nn.Conv2d(RANK, 16, 1, bias=False)]
    roles = ("down", "mid", "up") if decomposed else ("down", "up")
    parts = zip(roles, chain, strict=True)
    tensors = {f"{name}.lora_{role}.weight": part.weight.data for role, part in parts}
    merged = load(checkpoint, saved(tmp_path / "locon.safetensors", tensors))
    with torch.no_grad():
        expected = base(x) + nn.Sequential(*chain)(x)
        torch.testing.assert_close(layer(merged, "unet", path)(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_merged_in_fp32_is_rounded_once(checkpoint: Path, lora: Matrices, tmp_path: Path) -> None:
    path = saved(tmp_path / "style.safetensors", kohya(lora))
    full, half = load(checkpoint, path), load(checkpoint, path, dtype=torch.bfloat16)
    for name, value in weights(half).items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, weights(full)[name].bfloat16()), name
    nothing = load(checkpoint, f"{path}:0", dtype=torch.bfloat16)
    assert same(nothing, Backbone.load(str(checkpoint), torch.bfloat16))


def test_the_identity_is_of_the_file_and_its_weight(
    checkpoint: Path, plain: Backbone, lora: Matrices, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.safetensors", kohya(lora))
    copy = saved(tmp_path / "b.safetensors", kohya(lora))
    changed = saved(tmp_path / "c.safetensors", kohya(lora, alpha=1.0))

    def digest(*loras: str) -> str:
        return load(checkpoint, *loras).identity["sha256"]

    assert digest(path) == digest(f"{path}:1.0") == digest(copy)
    others = {digest(f"{path}:0.5"), digest(changed), digest(path, path)}
    assert len({plain.identity["sha256"], digest(path), *others}) == 5
    assert load(checkpoint, f"{path}:0.5").identity["loras"] == [f"{path}:0.5"]


def test_a_file_and_its_weight_are_told_apart() -> None:
    assert name_and_weight("a.safetensors") == ("a.safetensors", 1.0)
    assert name_and_weight("a.safetensors:-0.5") == ("a.safetensors", -0.5)
    assert name_and_weight(r"C:\a.safetensors") == (r"C:\a.safetensors", 1.0)
    assert name_and_weight("owner/name/a:2.safetensors:1e-1") == ("owner/name/a:2.safetensors", 0.1)
    for wrong in ("a:nan", ":0.5", "a:inf"):
        with pytest.raises(UserError, match="expected FILE or FILE:WEIGHT with a finite weight"):
            name_and_weight(wrong)


Q = f"lora_unet_{UP.replace('.', '_')}_attn1_to_q"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q}.dora_scale": (32, 1)}, "contains a DoRA, which is not supported"),
        ({f"{Q}.hada_w1_a": (32, 2)}, "contains a LoHa"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "contains a LoRA for SDXL"),
        ({"lora_unet_elsewhere.lora_up.weight": (2, 2)}, "of this checkpoint: lora_unet_elsewhere.lora_up"),
        ({f"lora_unet_{n}.alpha": () for n in range(5)}, "and 2 more"),
        ({f"{Q}.lora_up.bias": (32,)}, f"{Q}.lora_up.bias"),
        ({f"{Q}.alpha": (), f"{Q}.lora_down.weight": (2, 32)}, "incomplete or damaged"),
        ({f"{Q}.lora_up.weight": (32, 3), f"{Q}.lora_down.weight": (2, 32)}, "incomplete or damaged"),
        ({f"{Q}.lora_up.weight": (32, 2), f"{Q}.lora_down.weight": (2, 48)}, "for another model"),
        ({}, "no tensors"),
    ],
    ids=lambda given: str(given)[:40],
)  # fmt: skip
def test_what_is_not_understood_to_the_last_tensor_is_refused(
    tensors: dict[str, tuple[int, ...]], words: str, plain: Backbone, lora: Matrices, tmp_path: Path
) -> None:
    from kvinv_pl.models.adapters.lora import merge_loras

    whole = {name: torch.ones(shape) for name, shape in tensors.items()}
    if words not in ("incomplete or damaged", "for another model", "no tensors"):
        whole |= kohya({key: value for key, value in lora.items() if "to_q" not in key[1]})
    path = saved(tmp_path / "x.safetensors", whole)
    with pytest.raises(UserError) as caught:
        merge_loras([path], plain.unet, plain.text_encoder, allow_pickle=False)
    assert words in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


def test_other_ways_in_which_a_lora_cannot_be_had(checkpoint: Path, lora: Matrices, tmp_path: Path) -> None:
    broken = {name: value * torch.nan for name, value in kohya(lora).items()}
    lone = peft({key: value for key, value in lora.items() if key[0] == "unet"}, "base_model.model.")
    torch.save(kohya(lora), tmp_path / "x.pt")
    (tmp_path / "several").mkdir()
    for name in ("a", "b"):
        saved(tmp_path / "several" / f"{name}.safetensors", kohya(lora))
    said = json.dumps({"unet.lora_alpha": 1, "unet.use_dora": True})
    for given, words in [
        (saved(tmp_path / "nan.safetensors", broken), "is not finite"),
        (saved(tmp_path / "lone.safetensors", lone), "adapter_config.json"),
        (saved(tmp_path / "dora.safetensors", peft(lora), lora_adapter_metadata=said), "a DoRA"),
        (str(tmp_path / "x.pt"), "can run code"),
        (str(tmp_path / "several"), "has several: a.safetensors, b.safetensors"),
        (str(tmp_path / "nowhere.safetensors"), "there is no file"),
    ]:
        with pytest.raises(UserError, match=words):
            load(checkpoint, given)


def test_a_lora_is_had_from_the_hub(
    checkpoint: Path, lora: Matrices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    path = saved(cached("somebody/style", tmp_path) / "style.safetensors", kohya(lora))
    expected = load(checkpoint, f"{path}:0.5").identity["sha256"]
    for given in ("somebody/style:0.5", "somebody/style/style.safetensors:0.5"):
        assert load(checkpoint, given).identity["sha256"] == expected
    with pytest.raises(UserError, match="no file somebody/other here, and not available from the hub"):
        load(checkpoint, "somebody/other")


def test_a_run_keeps_to_its_loras(checkpoint: Path, lora: Matrices, tmp_path: Path) -> None:
    picture, out = fits.picture(tmp_path / "cat.png"), tmp_path / "run"
    path = saved(tmp_path / "style.safetensors", kohya(lora))
    fit = ("fit", "--checkpoint", checkpoint, "--image", picture, "--source", "a cat", "--out", out, *QUICK)
    fit = (*fit, "--model.required_psnr", 0)
    fitted = kvinv(*fit, "--model.loras", f"{path}:0.01")
    assert fitted.code == 0, fitted.err
    assert f"merged into the weights: {path} at 0.01" in fitted.out + fitted.err
    assert json.loads((out / "run.json").read_text())["model"]["loras"] == [f"{path}:0.01"]
    edited = kvinv("edit", "--run", out, "--target", "a dog")
    assert edited.code == 0, edited.err
    for other in ((), ("--model.loras", f"[{path}:0.02]"), ("--model.loras", f"[{path}:0.01, {path}]")):
        answer = kvinv(*fit, *other)
        assert answer.code == 2 and "was made with" in answer.err, answer
