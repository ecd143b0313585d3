"""The entry point: picks the command, and turns errors into exit codes."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvinv_pl.errors import SomeFailedError, UserError, near

STAGES = {
    "run": "all three stages for a picture: invert, tune and edit",
    "invert": "stage 1: find the trajectory of every picture by DDIM inversion",
    "fit": "stage 2: learn psi_t of every picture, timestep by timestep",
    "edit": "stage 3: render tuned pictures as their targets say",
}
PLANNING = {
    "plan": "estimate what the three stages of a picture need: slots, memory, disk, forward passes, time"
}
"""With the options of a stage, and nothing made."""
COMMANDS = {
    "studio": "serve a page in the browser: tune, edit, compare, download",
    "report": "write one HTML file of a run, or of a folder of runs, to look at and share",
    "world": "draw animals of the embedded world in all their actions",
    "variants": "list the attention variants that are installed, or show one with its options",
    "sites": "show the self-attentions of a checkpoint, and the size of psi in each",
    "check": "check that an attention variant, or a method to compare with, meets its requirements",
    "methods": "list the published methods to compare with, or show one with its options",
    "bench": "compare methods on the same cases: tables, pictures, and one page",
    "ablate": "edit from every start, with CP-attn at every place: the paper's ablation, with figures",
    "new-variant": "write a variant to start from, its configuration and its test",
    "mask": "find the subject of a picture, by SAM or by a word, and show it",
    "completion": "print a completion script for bash, zsh or tcsh",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Exit codes: 0; 1 where some of many pictures failed, with a line for each of them; 2 with one line for a
    user's mistake, or where all pictures failed; 130 if interrupted, and 143 if terminated (SIGTERM).
    """
    # Before torch is loaded: its threads, when they wait for one that another program holds up, would else
    # keep a core busy for milliseconds at every layer. So many turns of libgomp's are some ten microseconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises those who train networks
    argv = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _explain_missing_home():
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
        _exit_by_signal(signal.SIGINT)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns it into an exit code
            _exit_by_signal(signal.SIGINT)
        if error.code == 128 + signal.SIGTERM:
            _exit_by_signal(signal.SIGTERM)
        raise
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


@contextmanager
def _explain_missing_home() -> Iterator[None]:
    """A path with the ~ of a user that there is not, which pathlib does not take for a name, in one line."""
    try:
        yield
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        raise UserError(
            "a path starts with ~NAME, but this machine has no such user: write it in full, or as ./~..."
        ) from error


def _exit_by_signal(number: signal.Signals) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as Lightning leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr.write("\nkvinv: stopped; run the same command to resume\n")
    raise SystemExit(128 + number) from None


def _dispatch(argv: list[str]) -> None:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        print(_overview())
    elif verb == "--version":
        from importlib.metadata import version

        print(f"kvinv {version('kvinv-pl')}")
    elif verb in {**STAGES, **PLANNING}:
        from kvinv_pl.cli.lightning_cli import stage

        stage(verb, argv[1:])
    elif verb in COMMANDS:
        from kvinv_pl.cli.auto_cli import command

        command(verb, argv[1:])
    else:
        known = [*STAGES, *PLANNING, *COMMANDS]
        guess = near(verb, known)
        raise UserError(f"no command {verb!r}{guess}; expected one of {', '.join(known)}; see kvinv --help")


def _overview() -> str:
    rows = [f"  {name:<13}{text}" for name, text in {**STAGES, **PLANNING, **COMMANDS}.items()]
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
