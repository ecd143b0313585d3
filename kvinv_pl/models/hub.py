"""Where the files of a checkpoint are, fetched from the hub if need be."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from kvinv_pl import menagerie
from kvinv_pl.errors import UserError
from kvinv_pl.models.folder import NEEDED, read_json, refuse_other_kinds
from kvinv_pl.models.loading import first_line, located, quiet


def place_of(checkpoint: str, configs_alone: bool = False) -> Path:
    """The folder or file of a checkpoint, fetched from the hub if need be."""
    needed = f"{NEEDED} or in one file, or a hub id (owner/name), or menagerie"
    if (folder := located(checkpoint, menagerie.checkpoint, needed, files=True)) is not None:
        return folder
    try:
        with quiet(bars=True):
            from diffusers.pipelines.pipeline_utils import DiffusionPipeline

            path = Path(hf_hub_download(checkpoint, "model_index.json"))
            refuse_other_kinds(checkpoint, read_json(path.parent, path.name))
            if configs_alone:
                for part in ("unet", "vae"):
                    hf_hub_download(checkpoint, f"{part}/config.json")
                return path.parent
            unused = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
            return Path(DiffusionPipeline.download(checkpoint, **unused))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"no folder {checkpoint} here, and not available from the hub: {_of_hub(error)}"
        ) from error


def _of_hub(error: Exception) -> str:
    """Why a download from the hub failed; the first line of the hub's own errors is only a number."""
    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page, and log in by `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no public model has that name; check it, or log in by `hf auth login`"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"the model of that name lacks files; {NEEDED}"
    return first_line(error)
