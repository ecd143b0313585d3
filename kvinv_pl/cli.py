"""The command line: `kvinv run | invert | fit | edit` through LightningCLI, and the verbs without a model."""

import inspect
import json
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentError
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from kvinv_pl import wording
from kvinv_pl.errors import SomeFailedError, UserError

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
USAGE = {
    "run": '--image PICTURE --source "what it shows" --target "what it becomes" [--target ...] --out DIR',
    "invert": '--image PICTURE --source "what it shows" --out DIR',
    "fit": '--image PICTURE --source "what it shows" --out DIR',
    "edit": '(--run DIR | --image PICTURE --source "what it shows" --out DIR) --target "what it becomes"',
}
SHORT = {
    "--image": ("data.image", "FILE", "a picture, a folder of pictures, or a .csv or .jsonl list"),
    "--source": ("data.source", "TEXT", "what the picture shows; may be empty"),
    "--target": ("data.targets", "TEXT", "what it should become; repeatable"),
    "--mask": ("data.mask", "FILE", "a mask of the subject, for variants that take one"),
    "--out": ("data.out", "DIR", "the run folder; also -o"),
    "--overwrite": ("data.overwrite", "", "start anew where the folder holds another run"),
    "--checkpoint": ("model.checkpoint", "NAME", "menagerie, a folder as diffusers saves it, or a hub id"),
    "--steps": ("model.steps", "N", "DDIM steps"),
    "--guidance": ("model.guidance", "W", "classifier-free guidance scale"),
    "--start": ("model.start", "S", "share of the steps that an edit makes before CP-attn is active"),
    "--reading": ("model.reading", "NAME", "frozen or blend"),
    "--seed": ("model.seed", "N", "of random starts of psi"),
    "--negative": ("model.negative", "TEXT", "what the unconditional branch is told"),
}
"""Flags of every stage, and what they are short for."""
RUN = ("data.run", "DIR", "a run folder (or a folder of them): its checkpoint, variant and settings")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Exit codes: 0; 1 where some of many pictures failed, with a line for each of them; 2 with one line for a
    user's mistake, or where all pictures failed; 130 if interrupted.
    """
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        _dispatch(argv)
        sys.stdout.flush()
    except UserError as error:
        if debug:
            traceback.print_exc()
        for picture, reason in error.reasons.items() if isinstance(error, SomeFailedError) else ():
            sys.stderr.write(f"kvinv: {picture}: {reason}\n")
        line = " ".join(str(error).split())
        sys.stderr.write(f"kvinv: error: {line}\n")
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning gave it a code of its own
            _interrupted()
        raise
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _interrupted() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # which Lightning leaves so
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr.write("\nkvinv: stopped; the same command goes on where it was\n")
    raise SystemExit(130) from None


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
        _other(verb, argv[1:])
    else:
        known = [*STAGES, *OTHERS]
        guess = wording.near(verb, known)
        raise UserError(f"no command {verb!r}{guess}: expected one of {', '.join(known)}; see kvinv --help")


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


# ------------------------------------------------------------------------------ the commands without a model


def _other(verb: str, argv: list[str]) -> None:
    from jsonargparse import auto_cli

    from kvinv_pl import verbs

    command: Callable[..., None] = getattr(verbs, verb)
    line = _Line(["--out" if arg == "-o" else arg for arg in argv])
    line.read_rest(argv)
    with _in_words(verb, line, _kinds({"": command})):
        auto_cli(
            command,
            args=line.argv,
            as_positional=False,
            prog=f"kvinv {verb}",
            exit_on_error=False,
            allow_abbrev=False,
        )


# ------------------------------------------------------------------------------------------------ the stages


def _stage(verb: str, argv: list[str]) -> None:
    """One stage through LightningCLI, with the short flags spelled out."""
    line = _long(verb, argv)
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from kvinv_pl.data import SourceImages
    from kvinv_pl.failures import MEMORY
    from kvinv_pl.module import KVInversion
    from kvinv_pl.registry import load_all
    from kvinv_pl.trainer import KVTrainer

    # a variant may lie beside the YAML that names it
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    load_all()
    kinds = _kinds({"trainer.": KVTrainer, "model.": KVInversion, "data.": SourceImages})
    kinds["seed_everything"] = bool | int

    class Parser(LightningArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            return _help(
                verb, super().format_help(*args, **kwargs), {"data": SourceImages, "model": KVInversion}
            )

    class SaveConfig(SaveConfigCallback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            if trainer.logger is not None:  # otherwise it would be saved in the working directory
                super().setup(trainer, pl_module, stage)

    class KVCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            loaders = {"train_dataloaders", "val_dataloaders", "ckpt_path", "weights_only"}
            return {verb: {"model", "datamodule", *(loaders if verb == "fit" else ())}}

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            with _in_words(verb, line, kinds):
                self.config = parser.parse_args(args)

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"the settings do not fit together: {error}") from error
            # a rank for each further device is this command once more
            cast(KVTrainer, self.trainer).ranks.command = [sys.executable, "-m", "kvinv_pl", verb, *argv]

    strict = {"exit_on_error": False}
    try:
        with warnings.catch_warnings(), _threads_heard():
            warnings.simplefilter("ignore", DeprecationWarning)  # between Lightning and jsonargparse
            KVCLI(
                KVInversion,
                SourceImages,
                trainer_class=KVTrainer,
                args=cast(Any, [verb, *line.argv]),
                parser_class=Parser,
                parser_kwargs={**strict, "prog": "kvinv", "allow_abbrev": False, verb: strict},
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(f"out of memory ({str(error).partition('. ')[0]}): {MEMORY}") from error
    except SomeFailedError:
        raise
    except UserError as error:
        raise UserError(wording.of_setting(str(error), line.typed)) from error


@contextmanager
def _threads_heard() -> Iterator[None]:
    """What a thread that writes logs could not write is said once, without a traceback, and not lost."""
    before, failed = threading.excepthook, list[OSError]()

    def hear(told: threading.ExceptHookArgs) -> None:
        if isinstance(told.exc_value, OSError):
            failed.append(told.exc_value)
        else:
            before(told)

    threading.excepthook = hear
    try:
        yield
    finally:
        threading.excepthook = before
    if failed:
        raise UserError(
            f"cannot write the logs: {failed[0].strerror or failed[0]}; make room for the next ones"
        )


def _help(verb: str, text: str, classes: Mapping[str, type]) -> str:
    """The help of a stage with the short flags first, and without the lists of everybody's subclasses."""
    text = text.partition("\n\n")[2]  # the usage that names every option
    text = re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", text)
    description, _, rest = text.partition("\n\n")
    rows = []
    for flag, (target, metavar, what) in {**({"--run": RUN} if verb == "edit" else {}), **SHORT}.items():
        section, _, name = target.partition(".")
        default = inspect.signature(classes[section]).parameters[name].default
        hidden = default is None or default is False or default == "" or isinstance(default, list)
        shown = "" if hidden else f" (default: {default})"
        rows.append(f"  {f'{flag} {metavar}':<20}{what}{shown}")
    head = [f"usage: kvinv {verb} {USAGE[verb]} [options]", "", description, "", "the usual options:", *rows]
    return "\n".join([*head, "", rest.replace("options:", "every option, by its name in a YAML file:", 1)])


# -------------------------------------------------------------------------------------------- what was typed


@dataclass
class _Line:
    """A command line for the parser, and what the person typed for each option, by the option's full name."""

    argv: list[str]
    flags: Sequence[str] = ()
    typed: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    def note(self, key: str, flag: str, value: str) -> None:
        self.typed[key], self.values[key] = flag, value

    def read_rest(self, argv: Sequence[str]) -> None:
        """Note the options that are passed on as they are."""
        for arg, following in zip(argv, [*argv[1:], ""], strict=False):
            if arg.startswith("-"):
                flag, equals, value = arg.partition("=")
                key = {"-c": "config", "-o": "out"}.get(flag, flag.lstrip("-"))
                self.note(key, flag, value if equals else following)


def _long(verb: str, argv: Sequence[str]) -> _Line:
    """Short flags as the options they stand for; --run as the settings that the run was made with."""
    short = {**SHORT, **({"--run": RUN} if verb == "edit" else {})}
    line, targets, left = _Line([], [*short]), list[str](), deque(argv)
    first, passed = list[str](), list[str]()  # what YAML says comes first, so that flags override it
    while left:
        arg = left.popleft()
        flag, equals, value = arg.partition("=")
        flag = {"-o": "--out", "-c": "--config"}.get(flag, flag)
        if flag not in short and flag != "--config":
            passed.append(arg)
            continue
        value = value if equals else _value_of(verb, flag, left)
        key = short[flag][0] if flag in short else "config"
        line.note(key, flag, value)
        if flag == "--target":
            targets.append(value)
        elif flag == "--run":
            first[:0] = ["--config", json.dumps(_settings_of(Path(value).expanduser()))]
        elif flag == "--config":
            first += ["--config", value]
        else:
            line.argv.append(f"--{key}={value}")
    line.read_rest(passed)
    if "data.run" in line.typed and (also := {"--source", "--mask", "--out"} & set(line.typed.values())):
        raise UserError(
            f"{', '.join(sorted(also))} does not go with --run: the run folder knows; leave it out"
        )
    if targets:
        line.argv.append(f"--data.targets={json.dumps(targets, ensure_ascii=False)}")
    line.argv[:0] = [*first, *_variant_by_name(passed)]
    return line


def _value_of(verb: str, flag: str, left: deque[str]) -> str:
    """What follows a flag; the next flag does not."""
    ours = ("--model.", "--data.", "--trainer.")
    following = left[0] if left else None
    flags = {*SHORT, "--run", "-o", "--config", "-c", "--help"}
    is_flag = following is not None and (following.partition("=")[0] in flags or following.startswith(ours))
    if flag == "--overwrite" and (following is None or following.startswith("-")):
        return "true"
    if following is None or is_flag:
        raise UserError(f"{flag} expects a value, got {following or 'nothing'}; see kvinv {verb} --help")
    return left.popleft()


def _variant_by_name(argv: list[str]) -> list[str]:
    """--model.attention full_kv, as `kvinv variants` lists it, by the class that it stands for."""
    out = list(argv)
    for at, arg in enumerate(argv):
        flag, equals, name = arg.partition("=")
        name = name if equals else next(iter(argv[at + 1 : at + 2]), "")
        if flag == "--model.attention" and name.isidentifier() and name != "null":
            from kvinv_pl.registry import resolve

            cls = resolve(name)
            out[at : at + (1 if equals else 2)] = [f"{flag}={cls.__module__}.{cls.__qualname__}"]
    return out


def _kinds(classes: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """The type of every option, by its full name."""
    return {
        f"{prefix}{name}": parameter.annotation
        for prefix, cls in classes.items()
        for name, parameter in inspect.signature(cls).parameters.items()
    }


@contextmanager
def _in_words(verb: str, line: _Line, kinds: Mapping[str, Any]) -> Iterator[None]:
    """Turn what jsonargparse says of a command line into one line."""
    try:
        yield
    except ArgumentError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            cause = cause.__cause__ or cause.__context__
        told = wording.of_parser(str(error), line.typed, kinds, line.values, line.flags)
        raise UserError(f"{told.rstrip(';. ')}; see kvinv {verb} --help") from error


# ------------------------------------------------------------------------------------------ kvinv edit --run


def _settings_in(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model that a run.json says its run was made with."""
    if "tuning" not in run:
        raise UserError(f"{folder} is not tuned: go on with `kvinv fit` before editing")
    tuning = run["tuning"]
    return {
        "checkpoint": run["model"]["checkpoint"],
        "attention": tuning["attention"],
        "target_modules": tuning["sites"],
        "steps": run["scheduler"]["steps"],
        "negative": tuning["negative"],
        # psi of the conditional branch alone says nothing of the edit's guidance
        **({"guidance": tuning["guidance"]} if tuning["guidance"] != 1 else {}),
    }


def _settings_of(folder: Path) -> dict[str, Any]:
    """The configuration of a run folder (or of all runs in a folder, which must agree), for its next edit."""
    from kvinv_pl.data import reading, stores_in

    settings, refused = [], list[UserError]()
    for store in stores_in(folder):
        try:
            with reading(store):
                settings.append(_settings_in(store.folder, store.read_run()))
        except UserError as error:  # one of many is reported when the others are done
            refused.append(error)
    if not settings:
        raise refused[0]
    if any(other != settings[0] for other in settings):
        raise UserError(f"the runs in {folder} were made with unlike settings: edit them one by one")
    return {"model": settings[0], "data": {"run": str(folder)}}
