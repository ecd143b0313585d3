"""The stages: KVTrainer, KVInversion and SourceImages through LightningCLI."""

import re
import sys
import warnings
from argparse import Action
from collections.abc import Iterable
from textwrap import wrap
from typing import Any, cast

from kvinv_pl.cli.arguments import (
    IGNORED_FLAGS,
    RUN_FLAG,
    SHORT_FLAGS,
    expand_short_flags,
    option_types,
    readable_errors,
)
from kvinv_pl.cli.messages import explain_setting_error, without_null
from kvinv_pl.cli.utf8 import open_files_as_utf8
from kvinv_pl.cli.variant_names import make_importable, name_variants_in_yaml
from kvinv_pl.errors import SomeFailedError, UserError

USAGE = {
    "run": '--image PICTURE --source "what it shows" --target "what it becomes" [--target ...] --out DIR',
    "invert": '--image PICTURE --source "what it shows" --out DIR',
    "fit": '--image PICTURE --source "what it shows" --out DIR',
    "plan": "[--image PICTURE ...] [--config FILE]",
    "edit": '(--run DIR | --image PICTURE --source "what it shows" --out DIR) [--target "what it becomes"]',
}


def stage(verb: str, argv: list[str]) -> None:
    """One stage through LightningCLI, with the short flags expanded."""
    line = expand_short_flags(verb, argv)
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from kvinv_pl.data.failures import is_out_of_memory, reason
    from kvinv_pl.training.datamodule import PlannedImages, SourceImages
    from kvinv_pl.training.module import KVInversion
    from kvinv_pl.training.trainer import KVTrainer

    open_files_as_utf8()
    make_importable(line.configs)
    images = PlannedImages if verb == "plan" else SourceImages
    types = option_types({"trainer.": KVTrainer, "model.": KVInversion, "data.": images})
    types["seed_everything"] = bool | int

    # the classes are in here because their bases are imported late, for a quick `--help`
    class Parser(LightningArgumentParser):
        def format_help(self, *args: Any, **kwargs: Any) -> str:
            return _help(verb, super().format_help(*args, **kwargs), self._actions)

    class SaveConfig(SaveConfigCallback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            if trainer.logger is not None:  # otherwise it would be saved in the working directory
                super().setup(trainer, pl_module, stage)

    class KVCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            loaders = {"train_dataloaders", "val_dataloaders", "ckpt_path", "weights_only"}
            ours = {"fit": loaders, "edit": {"settings"}}.get(verb, set[str]())
            return {verb: {"model", "datamodule", *ours}}

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            with readable_errors(verb, line, types):
                self.config = parser.parse_args(args)

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"the settings do not fit together: {error}") from error
            # ranks on other devices run the same command
            cast(KVTrainer, self.trainer).ranks.command = [sys.executable, "-m", "kvinv_pl", verb, *argv]

    strict = {"exit_on_error": False, "parser_mode": name_variants_in_yaml()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # between Lightning and jsonargparse
            KVCLI(
                KVInversion,
                images,
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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(reason(error)) from error
    except SomeFailedError as error:
        error.reasons = {
            name: explain_setting_error(why, line.typed, types) for name, why in error.reasons.items()
        }
        raise
    except UserError as error:
        raise UserError(explain_setting_error(str(error), line.typed, types)) from error


def _help(verb: str, text: str, options: Iterable[Action]) -> str:
    """The help of a stage with the short flags first, and without jsonargparse's lists of subclasses."""
    text = without_null(text).partition("\n\n")[2]  # the usage that names every option
    text = re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", text)
    description, _, rest = text.partition("\n\n")
    known = {option.dest: option for option in options}
    if "data.image" not in known:  # the help of a class, such as that of --model.attention.help
        return text
    used = {flag: short for flag, short in SHORT_FLAGS.items() if flag not in IGNORED_FLAGS.get(verb, ())}
    rows = list[str]()
    for flag, (target, metavar) in {**({"--run": RUN_FLAG} if verb == "edit" else {}), **used}.items():
        default = known[target].default
        hidden = default is None or default is False or default == "" or isinstance(default, list)
        shown = "" if hidden else f" (default: {default})"
        what = re.split(r"\. (?=[A-Z])", known[target].help or "")[0].rstrip(".")  # the first sentence
        start = f"  {f'{flag} {metavar}':<20}"
        rows += wrap(f"{what}{shown}", 110, initial_indent=start, subsequent_indent=" " * len(start))
    rows.append(f"  {'-c, --config FILE':<20}Options from a YAML file, which flags override; repeatable")
    head = [f"usage: kvinv {verb} {USAGE[verb]} [options]", "", description, "", "the usual options:", *rows]
    return "\n".join([*head, "", rest.replace("options:", "every option, by its name in a YAML file:", 1)])
