"""Where the files of a checkpoint are, fetched from the hub if need be."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.models.checkpoints.folder import NEEDED, read_json, refuse_other_kinds, refuse_other_variants
from kvinv_pl.models.checkpoints.in_memory import IN_MEMORY
from kvinv_pl.models.checkpoints.loading import HUB_ID, find_checkpoint, first_line, quiet
from kvinv_pl.models.checkpoints.weight_files import weight_files

OFFLINE = "; --checkpoint also takes a folder or file of this machine"
"""What to do where the hub cannot be reached."""
STANDARD_STEMS = ("pytorch_lora_weights", "adapter_model", "learned_embeds")
"""How diffusers and peft name a LoRA and a textual inversion."""


def resolve_checkpoint(checkpoint: str, variant: str | None = None, configs_alone: bool = False) -> Path:
    """The folder or file of a checkpoint, fetched from the hub if need be, in one variant."""
    if (here := _here(checkpoint)) is not None:
        return here
    with _from_hub(f"folder {checkpoint}", OFFLINE):
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        path = _index_of(checkpoint)
        if configs_alone:
            for part in ("unet", "vae"):
                hf_hub_download(checkpoint, f"{part}/config.json")
            return path.parent
        names = _list_files(checkpoint, "unet/")
        refuse_other_variants(checkpoint, variant, names)
        found = weight_files(names, "unet", variant)
        unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        options = {**unused, "variant": found.variant or None if found else None}
        return Path(DiffusionPipeline.download(checkpoint, **options))


def require(checkpoint: str) -> None:
    """Refuse a checkpoint that is neither here nor on the hub, from which only its index is fetched."""
    if _here(checkpoint) is None:
        with _from_hub(f"folder {checkpoint}", OFFLINE):
            _index_of(checkpoint)


def _here(checkpoint: str) -> Path | None:
    """The folder or file of a checkpoint on this machine; None for a hub id."""
    needed = f"{NEEDED} or in one file, or a hub id (owner/name), or menagerie"
    if checkpoint == IN_MEMORY:
        raise UserError(
            "this run was tuned with a pipeline in memory: continue from Python with load(pipeline)"
        )
    return find_checkpoint(checkpoint, menagerie.checkpoint, needed, files=True)


def _index_of(checkpoint: str) -> Path:
    """The model_index.json of a repository; refuses kinds of models that are not supported."""
    path = Path(hf_hub_download(checkpoint, "model_index.json"))
    refuse_other_kinds(checkpoint, read_json(path.parent, path.name))
    return path


def resolve_vae(repository: str) -> Path:
    """The folder of a VAE in a repository, which may be a VAE alone, or its file."""
    with _from_hub(f"VAE {repository}"):
        top = _list_files(repository)
        if "config.json" not in top and "model_index.json" not in top:
            return Path(hf_hub_download(repository, _pick_file(repository, "a VAE", top)))
        folder = "" if "config.json" in top else "vae/"
        config = Path(hf_hub_download(repository, f"{folder}config.json"))
        found = weight_files(_list_files(repository, folder), "vae")
        for name in found.names if found else ():
            hf_hub_download(repository, folder + name)
        return config.parent


def resolve_file(name: str, what: str) -> Path:
    """One file: by its path, as the only one of a folder, or from the hub (owner/name or owner/name/FILE).

    `what` is what it should be, for errors.
    """
    place = Path(name).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        return place / _pick_file(name, what, [file.name for file in place.iterdir() if file.is_file()])
    if (found := re.fullmatch(rf"({HUB_ID})(?:/(.+))?", name)) is None:
        raise UserError(
            f"there is no file {name}; expected {what}: a file, or on the hub owner/name or owner/name/FILE"
        )
    repository, file = found.groups()
    with _from_hub(f"file {name}"):
        names = _list_files(repository) if file is None else []
        file = file or _pick_file(name, what, names)
        if "adapter_config.json" in names:  # which says how strong peft's own files are
            hf_hub_download(repository, "adapter_config.json")
        return Path(hf_hub_download(repository, file))


@contextmanager
def _from_hub(what: str, remedy: str = "") -> Iterator[None]:
    """Download something, with progress bars; an error says in one line why it is not there."""
    try:
        with quiet(bars=True):
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"no {what} here, and not available from the hub: {_explain_hub_error(error)}{remedy}"
        ) from error


def _list_files(repository: str, folder: str = "") -> list[str]:
    """The files in a folder of a repository; those in the cache, where the hub cannot be asked."""
    try:
        names = list_repo_files(repository)
    except Exception:
        try:
            place = Path(snapshot_download(repository, local_files_only=True))
        except LocalEntryNotFoundError:
            place = None
        if place is None:
            raise
        names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    inside = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    return [name for name in inside if "/" not in name]


def _pick_file(name: str, what: str, names: Sequence[str]) -> str:
    """The file that is meant, of all in a place: by the name that libraries give it, or the only one."""
    models = sorted(file for file in names if file.endswith(".safetensors"))
    models = models or sorted(file for file in names if file.endswith((".bin", ".pt")))
    usual = [file for file in models if Path(file).stem in STANDARD_STEMS]
    if len(usual or models) == 1:
        return (usual or models)[0]
    some = f"several: {', '.join(models[:4])}" if models else "no .safetensors file"
    raise UserError(f"{name} has {some}; expected {what}: give the file, as {name}/FILE")


def _explain_hub_error(error: Exception) -> str:
    """Why a download from the hub failed; the first line of the hub's own errors is only a number."""
    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page, and log in by `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no public model has that name; check it, or log in by `hf auth login`"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"the model of that name lacks files; {NEEDED}"
    if isinstance(error, LocalEntryNotFoundError):
        return "it cannot be reached, and its cache has no such files"
    return first_line(error)
