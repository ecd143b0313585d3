"""The command line: `kvinv invert | fit | edit | run` through LightningCLI, and the verbs that need no model."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvinv_pl.errors import UserError

STAGES = {
    "run": "all three stages for a picture: invert, tune and edit",
    "invert": "stage 1: find the trajectory of every picture by DDIM inversion",
    "fit": "stage 2: learn psi_t of every picture, timestep by timestep",
    "edit": "stage 3: render tuned pictures as their targets say",
}
OTHERS = {
    "world": "draw animals of the embedded world in all their actions",
    "variants": "list the attention variants that are installed",
}
SHORT = {
    "--image": ("data.image", "a picture, a folder of pictures, or a .csv or .jsonl list"),
    "--source": ("data.source", "what the picture shows"),
    "--target": ("data.targets", "what it should become; repeatable"),
    "--mask": ("data.mask", "a mask of the subject, for variants that take one"),
    "--out": ("data.out", "the run folder"),
    "--overwrite": ("data.overwrite", "true: start anew where the folder holds another run"),
    "--checkpoint": ("model.checkpoint", "menagerie, a folder as diffusers saves it, or a hub id"),
    "--steps": ("model.steps", "DDIM steps"),
    "--guidance": ("model.guidance", "classifier-free guidance scale"),
    "--start": ("model.start", "share of the steps that an edit makes before CP-attn is active"),
    "--reading": ("model.reading", "frozen or blend"),
    "--seed": ("model.seed", "of random starts of psi"),
    "--negative": ("model.negative", "what the unconditional branch is told"),
}
"""Flags of every stage, and what they are short for."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; exit code 0, or 2 with one line for a user's mistake."""
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        _dispatch(argv)
    except UserError as error:
        if debug:
            raise
        _exit(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("\nkvinv: stopped; the same command goes on where it was\n")
        raise SystemExit(130) from None


def _exit(message: str) -> None:
    line = " ".join(message.split())
    sys.stderr.write(f"kvinv: error: {line}\n")
    raise SystemExit(2)


def _dispatch(argv: list[str]) -> None:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        from importlib.metadata import version

        print(f"kvinv {version('kvinv-pl')}")
    elif verb in STAGES:
        _stage(verb, argv[1:])
    elif verb in OTHERS:
        from jsonargparse import auto_cli

        from kvinv_pl import verbs

        with _parsing(verb):
            auto_cli(getattr(verbs, verb), args=argv[1:], as_positional=False, prog=f"kvinv {verb}", exit_on_error=False)  # pyright: ignore
    else:
        from difflib import get_close_matches

        near = get_close_matches(verb, [*STAGES, *OTHERS], 1)
        hint = f"did you mean {near[0]}?" if near else "see kvinv --help"
        raise UserError(f"no command {verb!r}: expected one of {', '.join([*STAGES, *OTHERS])}; {hint}")


def _overview() -> str:
    rows = [f"  {name:<10}{text}" for name, text in {**STAGES, **OTHERS}.items()]
    return "\n".join(
        [
            "usage: kvinv COMMAND [options]      (kvinv COMMAND --help for its options)",
            "",
            "Change what the subject of a picture is doing, by text (KV Inversion, arXiv 2309.16608):",
            "",
            '  kvinv run --image cat.png --source "a cat standing" --target "a cat running" --out DIR',
            "",
            "commands:",
            *rows,
            "",
            "  --debug   with any command: show where an error came from",
        ]
    )


class _parsing:  # noqa: N801
    """Turn what jsonargparse says of a bad command line into one line."""

    def __init__(self, verb: str) -> None:
        self.verb = verb

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import argparse

        if isinstance(error, argparse.ArgumentError):
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from error
                cause = cause.__cause__ or cause.__context__
            raise UserError(f"{error}; see kvinv {self.verb} --help") from error


def _stage(verb: str, argv: list[str]) -> None:
    """One stage through LightningCLI, with the short flags spelled out."""
    argv = _long(verb, argv)
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from kvinv_pl.data import SourceImages
    from kvinv_pl.module import KVInversion
    from kvinv_pl.registry import load_all
    from kvinv_pl.trainer import KVTrainer

    # a variant may lie beside the YAML that names it
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    load_all()

    class KVCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            loaders = {"train_dataloaders", "val_dataloaders", "ckpt_path", "weights_only"}
            return {name: {"model", "datamodule", *(loaders if name == "fit" else ())} for name in STAGES}

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            with _parsing(verb):
                self.config = parser.parse_args(args)

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            group = parser.add_argument_group("short flags")
            for flag, (target, text) in SHORT.items():
                group.add_argument(flag, default="==SUPPRESS==", help=f"{text} (= --{target})")
            if verb == "edit":
                group.add_argument("--run", default="==SUPPRESS==", help="a run folder: its checkpoint, variant and settings")

    from typing import cast

    KVCLI(
        KVInversion, SourceImages, trainer_class=KVTrainer, args=cast(Any, [verb, *argv]),
        save_config_callback=SaveConfigCallback, save_config_kwargs={"overwrite": True},
        seed_everything_default=False, auto_configure_optimizers=False, load_from_checkpoint_support=False,
        parser_kwargs={"prog": "kvinv", "exit_on_error": False, **{name: {"exit_on_error": False} for name in STAGES}},
    )  # fmt: skip


def _long(verb: str, argv: list[str]) -> list[str]:
    """Short flags as the options they stand for; --run as the settings that the run was made with."""
    out: list[str] = []
    targets: list[str] = []
    base: dict[str, Any] = {}
    rest = iter(argv)
    for arg in rest:
        flag, _, value = arg.partition("=")
        if flag not in SHORT and not (flag == "--run" and verb == "edit"):
            out.append(arg)
            continue
        if "=" not in arg:
            value = next(rest, "")
            if not value and flag != "--source" and flag != "--negative" and flag != "--target":
                raise UserError(f"{flag} expects a value; see kvinv {verb} --help")
        if flag == "--target":
            targets.append(value)
        elif flag == "--run":
            base = _settings_of(Path(value))
        else:
            out.append(f"--{SHORT[flag][0]}={value}")
    if targets:
        out.append(f"--data.targets={json.dumps(targets)}")
    return [*(["--config", json.dumps(base)] if base else []), *out]


def _settings_of(folder: Path) -> dict[str, Any]:
    """The configuration of a run folder (or of all runs in a folder, which must agree), for its next edit."""
    from kvinv_pl.store import RunStore

    stores = [RunStore(folder)] if RunStore(folder).has_run() else [RunStore(file.parent) for file in sorted(folder.glob("*/run.json"))]
    if not stores:
        raise UserError(f"{folder} is no run folder: it has no run.json, nor has a folder in it")
    settings = []
    for store in stores:
        run = store.read_run()
        if "tuning" not in run:
            raise UserError(f"{store.folder} is inverted but not tuned: go on with `kvinv fit` before editing")
        tuning = run["tuning"]
        settings.append(
            {
                "checkpoint": run["model"]["checkpoint"],
                "attention": tuning["attention"],
                "target_modules": tuning["sites"],
                "steps": run["scheduler"]["steps"],
                "guidance": tuning["guidance"] if tuning["guidance"] != 1 else 4.0,
                "negative": tuning["negative"],
            }
        )
    if any(other != settings[0] for other in settings):
        raise UserError(f"the runs in {folder} were made with unlike settings: edit them one by one")
    return {"model": settings[0], "data": {"run": str(folder)}}
