"""KV Inversion (arXiv 2309.16608): change what the subject of a real picture is doing, by text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvinv_pl.api import load
    from kvinv_pl.app.pipeline import KVInversionPipeline
    from kvinv_pl.attention import CPAttention, Site
    from kvinv_pl.data.runs.run_store import RunStore
    from kvinv_pl.training.datamodule import SourceImages
    from kvinv_pl.training.module import KVInversion

__all__ = ["CPAttention", "KVInversion", "KVInversionPipeline", "RunStore", "Site", "SourceImages", "load"]
_WHERE = {
    "load": "api",
    "CPAttention": "attention",
    "Site": "attention",
    "SourceImages": "training.datamodule",
    "KVInversion": "training.module",
    "KVInversionPipeline": "app.pipeline",
    "RunStore": "data.runs.run_store",
}


def __getattr__(name: str) -> Any:
    """Import lazily, so that `kvinv --help` is fast."""
    if name not in _WHERE:
        raise AttributeError(f"module 'kvinv_pl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"kvinv_pl.{_WHERE[name]}"), name)
