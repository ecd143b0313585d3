"""Which part of the page makes which call, on what, and where its answer is shown."""

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr

from kvinv_pl.app.studio.picture_handlers import PictureHandlers
from kvinv_pl.app.studio.run_handlers import RunHandlers
from kvinv_pl.errors import UserError

TICK = 1.0
"""Seconds between two looks at the work."""


def wire(
    blocks: gr.Blocks,
    of_picture: PictureHandlers,
    of_run: RunHandlers,
    left: dict[str, Any],
    right: dict[str, Any],
) -> None:
    """Connect the parts of both sides to their calls."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
    hidden: dict[str, Any] = {"api_visibility": "private", **quiet}
    picture, source, word, mask, tinted = (
        left[name] for name in ("picture", "source", "word", "mask", "tinted")
    )
    run, target, knobs, progress = (right[name] for name in ("run", "target", "knobs", "progress"))
    names = ("progress", "certificate", "compare", "edits", "frames", "get_picture", "get_settings", "picked")
    results = [right[name] for name in names]
    picture_outputs = [picture, source, left["target"], word, mask, tinted]
    left["animals"].select(show_errors(of_picture.take), None, picture_outputs, **hidden)
    picture.select(show_errors(of_picture.point), picture, [mask, tinted], api_visibility="private")
    gr.on(
        [picture.upload, picture.clear, left["forget"].click],
        of_picture.unmask,
        None,
        [mask, tinted],
        **hidden,
    )
    left["find"].click(
        show_errors(of_picture.by_word), [picture, word, source], [mask, tinted], api_name="subject"
    )
    left["tune"].click(
        show_errors(of_picture.begin), [picture, source, left["target"], mask], run, api_name="tune"
    )

    run.change(show_errors(of_run.choose), run, [target, *knobs, *results], api_name="open", **quiet)
    right["edits"].select(show_errors(of_run.pick), run, [target, *knobs, *results], **hidden)
    right["resume"].click(show_errors(of_run.resume), run, None, api_name="resume", **quiet)
    right["stop"].click(show_errors(of_run.stop), run, None, api_name="stop", **quiet)
    clicked, given = [right["edit"].click, target.submit], [run, target]
    edited = gr.on(
        clicked, show_errors(of_run.edit), [*given, *knobs], [progress, right["picked"]],
        api_name="edit", **quiet,
    )  # fmt: skip
    tried = right["several"].click(
        show_errors(of_run.several), [*given, right["vary"], right["values"], *knobs],
        [progress, right["picked"]],
        api_name="candidates", **quiet,
    )  # fmt: skip
    for done in (edited, tried):
        done.success(show_errors(of_run.refresh), [run, right["picked"]], results, **hidden)
    moved = [knob.release for knob in knobs if isinstance(knob, gr.Slider)]
    gr.on(
        [right["vary"].change, run.change, *moved],
        of_run.suggest,
        [right["vary"], *knobs],
        right["values"],
        **hidden,
    )
    right["pack"].click(show_errors(of_run.pack), run, right["get_run"], api_name="pack")

    # a page that was closed finds the work again: it is asked for by the run's name
    seen = right["seen"]
    gr.Timer(TICK).tick(of_run.tick, [run, seen], [progress, seen], api_name="progress", **quiet)
    seen.change(show_errors(of_run.refresh), run, results, **hidden)
    blocks.load(of_run.open_page, run, run, api_name="runs", **quiet)


def show_errors(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, whose UserErrors become a line on the page."""

    def as_gradio_error(error: UserError) -> gr.Error:
        return gr.Error(" ".join(str(error).split()), print_exception=False)

    @wraps(call)
    def steps(*args: Any) -> Iterator[Any]:
        try:
            yield from call(*args)
        except UserError as error:
            raise as_gradio_error(error) from None

    @wraps(call)
    def once(*args: Any) -> Any:
        try:
            return call(*args)
        except UserError as error:
            raise as_gradio_error(error) from None

    return steps if inspect.isgeneratorfunction(call) else once
