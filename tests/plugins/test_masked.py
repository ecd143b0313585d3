"""Eq. 2 apart for subject and background: by itself, in a fit and its edits, and from the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
import yaml
from commands import QUICK, Answer, kvinv, photograph, refused
from fits import SOURCE, TARGET
from jaxtyping import TypeCheckError
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]
from kvinv_plugins.low_rank import LowRank  # pyright: ignore[reportMissingImports]
from kvinv_plugins.masked import Masked  # pyright: ignore[reportMissingImports]
from kvinv_plugins.recorded import Recorded  # pyright: ignore[reportMissingImports]
from kvinv_plugins.v_only import VOnly  # pyright: ignore[reportMissingImports]
from PIL import Image, ImageDraw
from torch import Tensor, nn

from kvinv_pl.algorithm.words import STRUCTURE
from kvinv_pl.attention import CPAttention, Site
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError
from kvinv_pl.models.prompts import subject_of
from kvinv_pl.stages.editing.reader import UNSETTLED
from kvinv_pl.testing.harness import attention, fused
from kvinv_pl.training.datamodule import SourceImages
from kvinv_pl.training.module import KVInversion

# Lightning's command line calls jsonargparse by an older name
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

SITE = Site("up_blocks.1.attn1", slots=3, grid=(4, 6), dim=8, heads=2)
SDPA = attention(SITE.heads, fused)
Make = Callable[[Site], CPAttention]
QUERIES = ("source", "words", "union", "agreed")
INNER: dict[str, Make] = {
    "full_kv": FullKV,
    "v_only": VOnly,
    "low_rank": partial(LowRank, rank=2),
    "recorded": Recorded,
}


class Near(Recorded):
    """Looks at itself and the token before it alone; by a mask that is bool, or added to the scores."""

    def __init__(self, site: Site, added: bool = False) -> None:
        super().__init__(site)
        self.added = added

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Callable[..., Tensor]) -> Tensor:
        near = torch.eye(q.shape[2], dtype=torch.bool)
        near |= near.roll(-1, 1)
        added = torch.zeros(near.shape).masked_fill(~near, -torch.inf)
        return sdpa(q, k, v, added if self.added else near)


# ------------------------------------------------------------------------------------------- Eq. 2 by itself


def features(seed: int, branches: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(branches, SITE.slots, SITE.tokens, SITE.dim, generator=generator)


def halves(height: int = 12, width: int = 18) -> Tensor:
    """A mask for each slot, of another size than the grid: the left third, the upper half, the right half."""
    masks = torch.zeros(3, height, width)
    masks[0, :, : width // 3] = masks[1, : height // 2] = masks[2, :, width // 2 :] = 1
    return masks


def on_grid() -> Tensor:
    """The same for tokens: (slots, tokens)."""
    return halves(*SITE.grid).flatten(1) > 0.5


def most(looks: Tensor) -> Tensor:
    """As many tokens of each slot as its mask has, those that are looked at most."""
    flat = looks.flatten(2)
    order = flat.sort(descending=True).values
    least = [order[:, slot, int(size) - 1] for slot, size in enumerate(on_grid().sum(1))]
    return flat >= torch.stack(least, 1)[..., None]


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subject: Tensor,
    background: Tensor,
    keys: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Every query by itself, from the keys that it may read: all, where it is in neither of the two."""
    out = torch.empty_like(q)
    mine, others = keys or (on_grid(), ~on_grid())
    size = SITE.dim // SITE.heads
    for branch, slot, token in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        read = torch.ones_like(mine[slot])
        if subject[branch, slot, token]:
            read = mine[slot]
        elif background[branch, slot, token]:
            read = others[slot]
        for head in range(SITE.heads):
            of = slice(head * size, (head + 1) * size)
            scores = k[branch, slot, read][:, of] @ q[branch, slot, token, of] / size**0.5
            out[branch, slot, token, of] = scores.softmax(0) @ v[branch, slot, read][:, of]
    return out


@pytest.mark.parametrize(
    ("inner", "queries", "separate"),
    [
        # the inner variant makes K-bar and V-bar, and what follows sees these alone
        *(("full_kv", queries, separate) for queries in QUERIES for separate in (True, False)),
        *((inner, "agreed", True) for inner in INNER if inner != "full_kv"),
    ],
)
def test_the_subjects_queries_read_the_subjects_keys_in_every_slot(
    inner: str, queries: Any, separate: bool
) -> None:
    cp = Masked(SITE, INNER[inner], queries, separate)
    with torch.no_grad():
        for value in cp.parameters():
            value.normal_(generator=torch.Generator().manual_seed(value.numel()))
    cp.bind(halves())
    q, (k, v) = features(0), cp(features(1), features(2))
    looks = torch.rand(4, SITE.slots, *SITE.grid, generator=torch.Generator().manual_seed(3))
    words, source = most(looks), on_grid()[None].expand(4, -1, -1)
    nowhere = torch.zeros_like(source)

    def expected(subject: Tensor, background: Tensor) -> Tensor:
        return written_out(q, k, v, subject, background if separate else nowhere)

    subject = {"source": source, "words": words, "union": words | source, "agreed": words & source}[queries]
    background = ~(words | source) if queries == "agreed" else ~subject
    torch.testing.assert_close(cp.attend_edit(q, k, v, SDPA, looks), expected(subject, background))
    # the source's own pass, in which psi is tuned
    torch.testing.assert_close(cp.attend(q, k, v, SDPA), expected(source, ~source))
    # until it is known where the edit will have its subject, its queries are not parted
    early = expected(source, ~source) if queries == "source" else expected(nowhere, nowhere)
    torch.testing.assert_close(cp.attend_edit(q, k, v, SDPA), early)
    assert cp.follows == (queries != "source")


@pytest.mark.parametrize("queries", QUERIES)
def test_the_outline_is_read_by_both_sides_and_reads_both(queries: Any) -> None:
    cp = Masked(SITE, Recorded, queries)
    share = torch.tensor([0.0, 0.05, 0.3, 0.7, 0.95, 1.0])[
        torch.randint(6, (SITE.slots, SITE.tokens), generator=torch.Generator().manual_seed(4))
    ]
    cp.bind(share.view(SITE.slots, *SITE.grid))
    mine, others, source = share > 0.1, share < 0.9, share > 0.5
    outline = (mine & others)[None].expand(4, -1, -1)
    q, k, v = features(0), features(1), features(2)
    looks = torch.rand(4, SITE.slots, *SITE.grid, generator=torch.Generator().manual_seed(3))
    flat = looks.flatten(2)
    least = flat.sort(descending=True).values[:, range(SITE.slots), source.sum(1) - 1]
    words, inside = flat >= least[..., None], source[None].expand(4, -1, -1)
    nowhere = torch.zeros_like(inside)
    found, unknown = {
        "source": (inside, outline),
        "words": (words, nowhere),
        "union": (words | inside, nowhere),
        "agreed": (words & inside, outline | (words ^ inside)),
    }[queries]
    expected = written_out(q, k, v, found & ~unknown, ~found & ~unknown, (mine, others))
    torch.testing.assert_close(cp.attend_edit(q, k, v, SDPA, looks), expected)
    own = written_out(q, k, v, inside & ~outline, ~inside & ~outline, (mine, others))
    torch.testing.assert_close(cp.attend(q, k, v, SDPA), own)


def test_where_the_model_looks_alike_everywhere_the_subject_is_no_larger() -> None:
    cp = Masked(SITE, Recorded, "words")
    cp.bind(halves())
    q, k, v = features(0), features(1), features(2)
    v[...] = on_grid()[None, ..., None]  # what a query reads says whose keys it was given
    found = cp.attend_edit(q, k, v, SDPA, torch.full((4, SITE.slots, *SITE.grid), 0.7))[..., 0]
    assert found.sum(2).round().tolist() == [on_grid().sum(1).tolist()] * 4


def test_the_paper_s_own_variant_is_inside_where_none_is_named() -> None:
    cp = Masked(SITE)
    assert type(cp.inner) is FullKV and cp.options["inner"] is FullKV
    assert (cp.queries, cp.separate) == ("agreed", True)


@pytest.mark.parametrize("added", [False, True])
def test_what_the_inner_variant_forbids_stays_forbidden(added: bool) -> None:
    cp = Masked(SITE, partial(Near, added=added), "source", separate=False)
    cp.bind(torch.ones(3, 4, 6) - torch.eye(4, 6))  # tokens 0, 7, 14 and 21 are not the subject's
    q, k, v = features(0), features(1), features(2)
    out = cp.attend_edit(q, k, v, SDPA)
    torch.testing.assert_close(out[:, :, 1], v[:, :, 1])
    for token in (2, 7):
        two = slice(token - 1, token + 1)
        torch.testing.assert_close(out[:, :, token], SDPA(q, k[:, :, two], v[:, :, two])[:, :, token])


def kept(mask: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which tokens are the subject's, and which the background's, on a grid."""
    site = Site("up_blocks.0.attn1", 1, grid, 4, 1)
    seen: list[Tensor] = []

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:  # those of the outline read all
            seen.append(mask.expand(1, 1, 1, -1).reshape(grid))
        return SDPA(q, k, v, mask)

    cp = Masked(site, Recorded, "source")
    cp.bind(mask[None])
    assert cp.attend_edit(*torch.randn(3, 1, 1, site.tokens, 4), sdpa).isfinite().all()
    subject, background = seen
    return subject, background


def test_a_token_that_shows_both_is_a_key_of_both() -> None:
    mask = torch.zeros(6, 12)
    mask[:3, :7] = 1
    for grid, subject, background in (
        ((2, 3), [[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [1, 1, 1]]),  # three quarters of the second column
        ((1, 3), [[1, 1, 0]], [[1, 1, 1]]),  # half of the first, three eighths of the second
        ((3, 2), [[1, 1], [1, 0], [0, 0]], [[0, 1], [1, 1], [1, 1]]),
        ((6, 12), mask.tolist(), (1 - mask).tolist()),
    ):
        found, others = kept(mask, grid)
        assert found.tolist() == torch.tensor(subject).bool().tolist()
        assert others.tolist() == torch.tensor(background).bool().tolist()


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (3, 5)])
def test_a_tiny_subject_and_a_tiny_background_have_a_key_on_every_grid(grid: tuple[int, int]) -> None:
    one = torch.zeros(32, 48)
    one[30, 45] = 1
    subject, background = kept(one, grid)
    assert subject.sum() == 1 and subject[-1, -1] and background.any()
    subject, background = kept(1 - one, grid)
    assert background.sum() == 1 and background[-1, -1] and subject.any()


class JobProgress(Recorded):
    """Keeps what it is told of the mask and of where the edit looks."""

    follows = True
    mask: Tensor | None = None
    subject: Tensor | None = None

    def bind(self, mask: Tensor | None) -> None:
        self.mask = mask

    def attend_edit(
        self, q: Tensor, k: Tensor, v: Tensor, sdpa: Callable[..., Tensor], subject: Tensor | None = None
    ) -> Tensor:
        self.subject = subject
        return sdpa(q, k, v)


def test_a_mask_comes_off_and_an_inner_variant_is_told_what_it_is() -> None:
    cp = Masked(SITE, JobProgress, "source")
    assert cp.follows and isinstance(cp.inner, JobProgress)
    q, k, v, looks = features(0), features(1), features(2), torch.rand(4, SITE.slots, *SITE.grid)
    masks = halves()
    cp.bind(masks)
    assert not torch.equal(cp.attend_edit(q, k, v, SDPA, looks), SDPA(q, k, v))
    assert cp.inner.mask is masks and cp.inner.subject is looks
    cp.bind(None)
    assert torch.equal(cp.attend_edit(q, k, v, SDPA, looks), SDPA(q, k, v))
    assert cp.inner.mask is None


def test_an_option_that_means_nothing_is_refused() -> None:
    wrong: Any = "target"
    with pytest.raises((UserError, TypeCheckError), match=r"(?s)queries.*'target'"):
        Masked(SITE, queries=wrong)
    with pytest.raises(UserError, match="inner: expected a variant to put the mask around, got Masked"):
        Masked(SITE, Masked)


class Registers(Recorded):
    """Adds two keys of its own to the source's, or leaves two out."""

    def __init__(self, site: Site, more: bool = True):
        super().__init__(site)
        self.more = more

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Callable[..., Tensor]) -> Tensor:
        if self.more:
            return sdpa(q, *(torch.cat([x, x[:, :, :2]], 2) for x in (k, v)))
        return sdpa(q, k[:, :, 2:], v[:, :, 2:])


@pytest.mark.parametrize(("more", "keys"), [(True, 26), (False, 22)])
def test_keys_of_which_the_mask_says_nothing_are_refused_in_one_line(more: bool, keys: int) -> None:
    cp = Masked(SITE, partial(Registers, more=more), "source")
    cp.bind(halves())
    says = f"inner: expected a variant whose keys are the 24 tokens of .*, got Registers, .* {keys}:"
    for attend in (cp.attend, cp.attend_edit):
        with pytest.raises(UserError, match=says):
            attend(features(0), features(1), features(2), SDPA)


class Narrow(Recorded):
    """Answers for the first slot alone."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sdpa: Callable[..., Tensor]) -> Tensor:
        return sdpa(q, k, v)[:, :1]


def test_an_inner_variant_that_returns_another_shape_is_refused_in_one_line() -> None:
    cp = Masked(SITE, Narrow, "source")
    cp.bind(halves())
    says = rf"inner: Narrow returned the shape .* at {SITE.path}; expected \(4, {SITE.slots}, 24, "
    with pytest.raises(UserError, match=says):
        cp.attend(features(0), features(1), features(2), SDPA)


def test_such_an_inner_variant_is_refused_before_anything_is_tuned(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got Registers, which attends to"):
        fit(folder, tmp_path / "run", fits.model(attention=partial(Masked, inner=Registers)))
    assert not list((tmp_path / "run").glob("steps/*"))


# ---------------------------------------------------------------------------------------- a fit and its edits


def mask_file(file: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """White in a box, its edges included."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    mask.save(file)
    return file


SIZE = (24, 16)  # 12x8 latents, and a middle of 6x4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that is not square, a.png, and its mask, a-mask.png; b likewise."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, box) in enumerate({"a": (0, 0, 9, 9), "b": (14, 2, 23, 15)}.items()):
        fits.picture(folder / f"{name}.png", SIZE, seed)
        mask_file(folder / f"{name}-mask.png", SIZE, box)
    return folder


def fit(folder: Path, out: Path, module: KVInversion, name: str = "a") -> RunStore:
    images = SourceImages(str(folder / f"{name}.png"), SOURCE, [], str(folder / f"{name}-mask.png"), str(out))
    fits.trainer().fit(module, datamodule=images)
    return RunStore(out)


Tuned = Callable[..., tuple[KVInversion, RunStore]]


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A masked variant's module and its run, tuned once; tests may edit it but not change it."""
    made: dict[tuple[str, Any], tuple[KVInversion, RunStore]] = {}

    def get(inner: str = "full_kv", queries: Any = "agreed") -> tuple[KVInversion, RunStore]:
        key = (inner, queries)
        if key not in made:
            module = fits.model(attention=partial(Masked, inner=INNER[inner], queries=queries))
            made[key] = module, fit(folder, tmp_path_factory.mktemp("runs") / "run", module)
        return made[key]

    return get


def latents(module: KVInversion, store: RunStore, *targets: str, **settings: Any) -> Tensor:
    """What the edits arrive at, before it is decoded."""
    seen: list[Tensor] = []
    decode = module.denoiser.backbone.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.denoiser.backbone, "decode", lambda z: seen.append(z) or decode(z))
        fits.edit(store, *targets, module=module, **settings)
    (z_0,) = seen
    return z_0


@pytest.mark.parametrize("inner", INNER)
def test_an_edit_to_the_source_prompt_is_the_reconstruction(inner: str, tuned: Tuned) -> None:
    """With the source's own queries, an edit finds K-bar and V-bar just as they were learned."""
    module, store = tuned(inner, "source")
    expected = store.step(len(module.denoiser.table) - 1).z
    found = latents(module, store, SOURCE, guidance=module.tuning.guidance)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-3)


def test_psi_is_tuned_under_the_mask(folder: Path, tmp_path: Path, tuned: Tuned) -> None:
    bare = fits.fit(folder / "a.png", tmp_path / "run", attention=FullKV)
    psi, other = tuned()[1].step(0).psi, bare.step(0).psi
    assert {name.replace(".inner.", ".") for name in psi} == other.keys()
    assert all(".inner." in name for name in psi)
    assert any(not torch.equal(value, other[name.replace(".inner.", ".")]) for name, value in psi.items())


def test_the_first_steps_of_an_edit_do_not_know_where_the_subject_will_be(tuned: Tuned) -> None:
    module, store = tuned()
    known: list[bool] = []

    def attend_edit(self: Masked, q: Tensor, k: Tensor, v: Tensor, sdpa: Any, subject: Any = None) -> Tensor:
        known.append(subject is not None)
        return sdpa(q, k, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masked, "attend_edit", attend_edit)
        latents(module, store, TARGET)
    steps, sites = len(module.denoiser.table), len(module.denoiser.cps)
    unsettled = math.ceil(UNSETTLED * steps) * sites
    assert len(known) == steps * sites and not any(known[:unsettled]) and all(known[unsettled:])


@pytest.mark.parametrize(
    ("inner", "queries"),
    [
        *((inner, "agreed") for inner in INNER),
        *(("full_kv", queries) for queries in ("source", "words", "union")),
    ],
)
def test_replayed_reads_what_stored_reads(inner: str, queries: str, tuned: Tuned) -> None:
    module, store = tuned(inner, queries)
    for start in (
        (0.0, 0.5) if inner == "full_kv" else (0.5,)
    ):  # what an edit reads first is the queries' matter
        stored, replayed = (
            latents(module, store, TARGET, "a cat jumping on grass", start=start, kv=kv)
            for kv in ("stored", "replayed")
        )
        torch.testing.assert_close(replayed, stored, rtol=0, atol=2e-5)


def test_the_mask_and_the_choice_of_queries_reach_an_edit(folder: Path, tmp_path: Path, tuned: Tuned) -> None:
    bare = fits.model(attention=FullKV)
    fits.fit(folder / "a.png", tmp_path / "run", bare)
    each = [latents(*tuned("full_kv", queries), TARGET) for queries in QUERIES]
    each.append(latents(bare, RunStore(tmp_path / "run"), TARGET))
    for n, one in enumerate(each):
        assert all((one - other).abs().max() > 1e-3 for other in each[:n])


def test_an_edit_does_not_depend_on_those_beside_it(tuned: Tuned) -> None:
    """Each follows its own word: they are as when rendered alone."""
    module, store = tuned()
    targets = (TARGET, "a cat jumping on the red grass")
    together = latents(module, store, *targets)
    for n, target in enumerate(targets):
        torch.testing.assert_close(latents(module, store, target), together[n : n + 1], rtol=0, atol=2e-5)


def test_another_word_is_followed_where_it_is_named(tuned: Tuned) -> None:
    module, store = tuned("full_kv", "words")
    default = latents(module, store, "a cat on grass running")
    for word, alike in (("cat", True), ("grass", False)):
        found = latents(module, store, "a cat on grass running", subject=word)
        assert torch.equal(found, default) == alike


def test_pictures_side_by_side_have_masks_of_their_own(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"image": f"{name}.png", "mask": f"{name}-mask.png", "source": SOURCE, "targets": [TARGET]}
        for name in "ab"
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make = partial(Masked, queries="source")
    beside, alone = fits.model(attention=make, slots=2), fits.model(attention=make)
    images = SourceImages(str(folder / "list.jsonl"), out=str(tmp_path / "list"))
    fits.trainer().fit(beside, datamodule=images)
    for name in "ab":
        expected = latents(alone, fit(folder, tmp_path / name, alone, name), TARGET)
        found = latents(beside, RunStore(tmp_path / "list" / name), TARGET)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def hooks(unet: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in unet.modules())


@pytest.fixture
def damaged(tuned: Tuned) -> Iterator[tuple[KVInversion, RunStore]]:
    """A run whose last step cannot be read."""
    module, store = tuned()
    file = store.folder / "steps" / "2.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + bytes(255 - byte for byte in whole[-8:]))
    yield module, store
    file.write_bytes(whole)


@pytest.mark.parametrize("kv", ["stored", "replayed"])
def test_nobody_watches_the_u_net_after_an_edit(kv: str, tuned: Tuned) -> None:
    module, store = tuned()
    first = latents(module, store, TARGET, kv=kv)
    assert hooks(module.denoiser.backbone.unet) == 0
    assert torch.equal(latents(module, store, TARGET, kv=kv), first)


def test_nobody_watches_the_u_net_after_an_edit_that_failed(damaged: tuple[KVInversion, RunStore]) -> None:
    module, store = damaged
    watched: list[int] = []
    unet = module.denoiser.backbone.unet
    hook = unet.conv_in.register_forward_hook(lambda *_: watched.append(hooks(unet) - 1))
    try:
        with pytest.raises(UserError, match=r"2\.safetensors"):
            fits.edit(store, TARGET, module=module)
    finally:
        hook.remove()
    assert watched and all(watched)  # while it went on, somebody did
    assert hooks(unet) == 0 and module.denoiser.attached()._subject_map is None


# ------------------------------------------------------------------------------------------------ the subject


@pytest.mark.parametrize(
    ("source", "target", "word"),
    [
        ("a cat standing on grass", "a cat running on grass", "cat"),
        ("a cat is standing", "a cat is running", "cat"),
        ("A striped blue cat, standing", "a striped blue cat running", "cat"),
        ("a photo of the dog that stands", "a photo of the dog that runs", "dog"),
        ("a cat", "a cat running", "cat"),
        ("a cat standing", "a cat", "cat"),
    ],
)
def test_the_subject_is_the_last_word_before_the_prompts_differ(source: str, target: str, word: str) -> None:
    assert subject_of(source, target) == word and word not in STRUCTURE


@pytest.mark.parametrize(
    ("source", "target"),
    [("a red cat", "a blue cat"), ("standing cat", "running cat"), ("", "a cat"), ("a cat on grass",) * 2],
)
def test_where_it_cannot_be_told_it_is_asked_for(source: str, target: str) -> None:
    with pytest.raises(UserError, match=r"^subject: cannot tell which word of .*: give --model\.subject$"):
        subject_of(source, target)


# ------------------------------------------------------------------------------------------- the command line

MASKED = ("--model.attention", "masked")


@pytest.fixture
def good(tmp_path: Path) -> list[object]:
    """A command without its variant, mask and target."""
    picture = photograph(tmp_path / "cat.png", SIZE)
    options = [*QUICK, "--checkpoint", fits.checkpoint(), "--out", tmp_path / "run"]
    return ["--image", picture, "--source", SOURCE, *options]


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return mask_file(tmp_path / "mask.png", SIZE, (0, 0, 9, 9))


def refused_before_work(answer: Answer, folder: Path, *words: str) -> None:
    refused(answer, *words)
    assert not (folder / "run" / "run.json").exists()


def test_a_run_without_a_mask_is_refused(good: list[object], tmp_path: Path) -> None:
    answer = kvinv("run", *good, *MASKED, "--target", TARGET)
    refused_before_work(answer, tmp_path, "Masked needs a mask of the subject: give --mask (`kvinv mask`")


def test_blend_is_refused(good: list[object], mask: Path, tmp_path: Path) -> None:
    answer = kvinv("run", *good, *MASKED, "--mask", mask, "--target", TARGET, "--reading", "blend")
    refused_before_work(answer, tmp_path, "expected frozen, got blend: with Masked the mask says")


def test_a_subject_is_refused_where_nobody_follows_it(good: list[object], mask: Path, tmp_path: Path) -> None:
    given = [*good, "--target", TARGET, "--model.subject", "cat"]
    answer = kvinv("run", *given)
    refused_before_work(answer, tmp_path, "got 'cat', but FullKV does not use a subject: leave it out")
    answer = kvinv("run", *given, *MASKED, "--model.attention.queries", "source", "--mask", mask)
    refused_before_work(answer, tmp_path, "got 'cat', but Masked does not use a subject: leave it out")


def test_a_subject_that_cannot_be_found_is_said_before_anything_is_tuned(
    good: list[object], mask: Path, tmp_path: Path
) -> None:
    given = [*good, *MASKED, "--mask", mask]
    answer = kvinv("run", *given, "--target", "the dog running")
    refused_before_work(answer, tmp_path, "cannot tell which word of 'the dog running' is the subject")
    answer = kvinv("run", *given, "--target", TARGET, "--model.subject", "horse")
    refused_before_work(answer, tmp_path, "'horse' is not in the prompt 'a cat running'")
    # where the source has it, nobody needs to be told
    answer = kvinv("run", *given, "--target", "the dog running", "--model.attention.queries", "source")
    assert answer.code == 0, answer.err


def taken(*args: object) -> Any:
    """The variant that a command would use."""
    answer = kvinv("fit", "--image", "cat.png", *args, "--print_config")
    assert answer.code == 0, answer.err
    return yaml.safe_load(answer.out)["model"]["attention"]


def test_the_inner_variant_has_a_short_name_and_its_options_are_flags(tmp_path: Path) -> None:
    for inner in (["--model.attention.inner", "low_rank"], ["--model.attention.inner=low_rank"]):
        found = taken(
            *MASKED, *inner, "--model.attention.inner.rank", 3, "--model.attention.separate", "false"
        )
        assert found["class_path"] == "kvinv_plugins.masked.Masked"
        assert found["init_args"]["inner"]["class_path"] == "kvinv_plugins.low_rank.LowRank"
        assert found["init_args"]["inner"]["init_args"]["rank"] == 3
        assert (found["init_args"]["queries"], found["init_args"]["separate"]) == ("agreed", False)
    refused(kvinv("fit", "--image", "cat.png", *MASKED, "--model.attention.inner", "v_onli"), "mean v_only")
    file = tmp_path / "masked.yaml"
    for inner, path in (
        ({"class_path": "recorded"}, "recorded.Recorded"),
        ("v_only", "v_only.VOnly"),
        ({"class_path": "low_rank", "init_args": {"rank": 3}}, "low_rank.LowRank"),
    ):
        attention = {"class_path": "masked", "init_args": {"inner": inner}}
        file.write_text(yaml.safe_dump({"model": {"attention": attention}}))
        assert taken("--config", file)["init_args"]["inner"]["class_path"] == f"kvinv_plugins.{path}"


def test_an_edit_of_a_run_folder_has_the_inner_variant_and_every_option_back(
    good: list[object], mask: Path, tmp_path: Path
) -> None:
    inner = ["--model.attention.inner", "low_rank", "--model.attention.inner.rank", 2]
    options = ["--model.attention.queries", "words", "--model.attention.separate", "false"]
    given = [*good, *MASKED, *inner, *options, "--mask", mask, "--model.subject", "grass"]
    assert kvinv("run", *given, "--target", "a cat running on grass").code == 0
    tuning = json.loads((tmp_path / "run" / "run.json").read_text())["tuning"]
    made = tuning["attention"]["init_args"]
    assert (made["queries"], made["separate"], made["inner"]["init_args"]["rank"]) == ("words", False, 2)
    assert made["inner"]["class_path"] == "kvinv_plugins.low_rank.LowRank"
    (tmp_path / "cat.png").unlink()
    mask.unlink()
    answer = kvinv("edit", "--run", tmp_path / "run", "--target", "a cat jumping on grass")
    assert answer.code == 0, answer.err
    edits = [json.loads(file.read_text()) for file in (tmp_path / "run" / "edits").glob("*.json")]
    assert [(edit["tuning"], edit["subject"]) for edit in edits] == [(tuning, "grass")] * 2
