"""The page: its parts."""

from typing import Any

import gradio as gr

from kvinv_pl.app.edit_options import EditOption, edit_options
from kvinv_pl.app.studio.events import wire
from kvinv_pl.app.studio.picture_handlers import ANIMALS, PictureHandlers
from kvinv_pl.app.studio.run_handlers import RunHandlers
from kvinv_pl.app.studio.workbench.workbench import Workbench
from kvinv_pl.menagerie import Animal

CSS = """
.kv-bar { height: .6rem; border-radius: .3rem; background: var(--border-color-primary); overflow: hidden }
.kv-bar div { height: 100%; background: var(--color-accent); transition: width .3s }
.kv-line { margin: .35rem 0 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
footer { display: none !important }
"""
TITLE = "# KV Inversion studio\nTune a picture once, then change by words what its subject is doing."


def page(bench: Workbench, checkpoint: str = "menagerie", sam: str = "menagerie") -> gr.Blocks:
    """The page over a workbench; its calls have names for gradio's client, too."""
    with gr.Blocks(title="KV Inversion studio", analytics_enabled=False) as blocks:
        gr.Markdown(TITLE)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                of_picture = _picture_parts(checkpoint == "menagerie")
            with gr.Column(scale=3, min_width=300):
                of_run = _run_parts()
        wire(blocks, PictureHandlers(bench, checkpoint, sam), RunHandlers(bench), of_picture, of_run)
    return blocks


def _picture_parts(has_animals: bool) -> dict[str, Any]:
    """The left side: a picture and what is said of it."""
    gr.Markdown("## 1. A picture")
    picture = gr.Image(
        label="Drop a picture; a click on its subject finds it",
        type="filepath", image_mode=None, sources=["upload", "clipboard"], height=320, elem_id="picture",
    )  # fmt: skip
    # the file goes as it is to open_picture, which takes more kinds and says what is wrong with one
    picture.preprocess = lambda payload: payload.path if payload else None  # pyright: ignore[reportAttributeAccessIssue]
    shown = [(animal.render(), animal.prompt()) for animal in map(Animal.sample, ANIMALS)]
    animals = gr.Gallery(
        shown, label="Or take an animal of the embedded world", columns=3, height=190, elem_id="animals",
        allow_preview=False, object_fit="contain", visible=has_animals, interactive=False,
    )  # fmt: skip
    source = gr.Textbox(label="What it shows", placeholder="a cat standing on the beach")
    with gr.Accordion("Its subject, where it and the background are to be kept apart", open=False):
        word = gr.Textbox(label="The word of the subject, or click on it above", placeholder="cat")
        with gr.Row():
            find = gr.Button("Find it", min_width=90)
            forget = gr.Button("No mask", min_width=90)
    tinted = gr.Image(label="The subject", interactive=False, visible=False, height=240, elem_id="tinted")
    target = gr.Textbox(label="What it should become", placeholder="a cat running on the beach")
    tune = gr.Button("Tune", variant="primary")
    return {
        "picture": picture, "animals": animals, "source": source, "word": word, "find": find,
        "forget": forget, "tinted": tinted, "target": target, "tune": tune, "mask": gr.State(None),
    }  # fmt: skip


def _run_parts() -> dict[str, Any]:
    """The right side: a run and its edits."""
    gr.Markdown("## 2. Its edits")
    run = gr.Dropdown(label="Runs of this folder", choices=[], allow_custom_value=True, elem_id="run")
    progress = gr.HTML(elem_id="progress")
    with gr.Row():
        resume = gr.Button("Go on tuning", min_width=110)
        stop = gr.Button("Stop", variant="stop", min_width=110)
    certificate = gr.Markdown(elem_id="certificate")
    compare = gr.ImageSlider(label="Before and after", interactive=False, elem_id="compare", format="png")
    target = gr.Textbox(label="What it should become", elem_id="target")
    edit = gr.Button("Edit", variant="primary")
    with gr.Accordion("Dials, which need no new tuning", open=False):
        knobs = [_component(option) for option in edit_options()]
    ranged = [(option.label, option.name) for option in edit_options() if option.range]
    with gr.Row():
        vary = gr.Dropdown(ranged, value="start", label="Try several values of", min_width=110)
        values = gr.Textbox(label="Values", min_width=110)
        several = gr.Button("Try them", min_width=110)
    edits = gr.Gallery(
        label="Candidates: pick one", columns=4, height=280, allow_preview=False, object_fit="contain",
        elem_id="edits", interactive=False, format="png",
    )  # fmt: skip
    frames = gr.Gallery(
        label="Along the process: the predicted picture", columns=5, height=230, allow_preview=False,
        object_fit="contain", interactive=False, elem_id="frames", format="png",
    )  # fmt: skip
    with gr.Row():
        get_picture = gr.DownloadButton("Picture", interactive=False, min_width=110, elem_id="get-picture")
        get_settings = gr.DownloadButton("Settings", interactive=False, min_width=110, elem_id="get-settings")
        pack = gr.Button("Pack the run folder", min_width=110)
        get_run = gr.DownloadButton("Run folder", interactive=False, min_width=110, elem_id="get-run")
    return {
        "run": run, "progress": progress, "resume": resume, "stop": stop, "certificate": certificate,
        "compare": compare, "target": target, "edit": edit, "knobs": knobs, "vary": vary, "values": values,
        "several": several, "edits": edits, "frames": frames, "get_picture": get_picture,
        "get_settings": get_settings, "pack": pack, "get_run": get_run,
        "picked": gr.State(None), "seen": gr.State(None),
    }  # fmt: skip


def _component(option: EditOption) -> Any:
    """An option as a component of gradio."""
    given: dict[str, Any] = {"label": option.label, "info": option.help, "elem_id": f"dial-{option.name}"}
    if option.kind == "slider":
        low, high = option.range or (0.0, 1.0)
        return gr.Slider(low, high, step=option.step, **given)
    if option.kind in ("number", "whole number"):
        return gr.Number(value=None, precision=0 if option.kind == "whole number" else None, **given)
    if option.kind == "choice":
        return gr.Radio(list(option.choices), **given)
    return gr.Checkbox(**given) if option.kind == "switch" else gr.Textbox(**given)
