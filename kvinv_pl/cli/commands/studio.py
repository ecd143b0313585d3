"""`kvinv studio`. The docstring is the help."""

from pathlib import Path
from typing import Any

from kvinv_pl.models.load_options import Precision


def studio(
    out: str = "studio",
    checkpoint: str = "menagerie",
    config: str | None = None,
    sam: str = "menagerie",
    accelerator: str = "auto",
    precision: Precision = "auto",
    host: str = "127.0.0.1",
    port: int | None = None,
) -> None:
    """Serve a page to work on in the browser: tune pictures, edit them, compare, and download.

    Args:
        out: The folder of its runs (also -o), including those already in it; nothing is written elsewhere.
        checkpoint: A diffusers folder, a .safetensors file, a hub id, or menagerie.
        config: A YAML file like those of `kvinv run`; only its section model is read.
        sam: The SAM that finds a subject by a click: a transformers folder, a hub id, or menagerie.
        accelerator: cpu, gpu, mps or auto.
        precision: 32-true, bf16-mixed or (on a GPU) 16-mixed; auto: depends on checkpoint and device.
        host: The address to listen on; 0.0.0.0 accepts every machine in the network.
        port: The port; default: the first free one from 7860.
    """
    from kvinv_pl.app.studio.serve import serve

    settings: dict[str, Any] = {"accelerator": accelerator, "precision": precision}
    if config is not None:
        settings |= read_model_settings(Path(config).expanduser())
    if config is None or checkpoint != "menagerie":
        settings["checkpoint"] = checkpoint
    serve(Path(out).expanduser(), host, port, sam, **settings)


def read_model_settings(file: Path) -> dict[str, Any]:
    """What a file says of the model, as `kvinv_pl.load` takes it; variants and optimisers are made."""
    from argparse import ArgumentError

    import yaml
    from jsonargparse import ArgumentParser

    from kvinv_pl.cli.variant_names import make_importable, name_variants_in_yaml
    from kvinv_pl.data.runs.files import explaining_os_errors
    from kvinv_pl.errors import UserError
    from kvinv_pl.training.module import KVInversion

    make_importable([str(file)])
    with explaining_os_errors("read", file):
        text = file.read_text(encoding="utf-8")
    parser: Any = ArgumentParser(exit_on_error=False, parser_mode=name_variants_in_yaml())
    parser.add_class_arguments(KVInversion, "model", instantiate=False)
    try:
        found = yaml.safe_load(text)
        if not isinstance(found, dict) or "model" not in found:
            raise UserError(f"{file}: expected a section model, as the stages read it, got none")
        section = yaml.safe_dump({"model": found["model"]})
        read = parser.instantiate(parser.parse_string(section)).model
    except (ArgumentError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())
        raise UserError(f"{file}: {first}") from error
    return {name: getattr(read, name) for name in found["model"]}
