"""The studio's server: this machine alone unless told otherwise, and nothing outside its folder."""

import os
from pathlib import Path
from typing import Any

from kvinv_pl.app.studio.workbench.frames import STUDIO_DIR
from kvinv_pl.app.studio.workbench.workbench import Workbench
from kvinv_pl.errors import UserError


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int | None = None,
    sam: str = "menagerie",
    wait: bool = True,
    **settings: Any,
) -> Any:
    """Serve the page until Ctrl-C; or go on at once, and return what was launched.

    Without a port it is the first free one from 7860 on. The settings are arguments of `load`.
    """
    keep = str(folder.resolve() / STUDIO_DIR / "uploads")
    os.environ["GRADIO_TEMP_DIR"] = keep  # read as gradio is imported, and later
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from gradio.themes import Default
    except ImportError as error:
        raise UserError(
            "kvinv studio needs gradio, which is not installed: pip install 'kvinv-pl[studio]'"
        ) from error
    from kvinv_pl.app.studio.page import CSS, page

    bench = Workbench(folder, **settings)
    blocks = page(bench, str(settings.get("checkpoint", "menagerie")), sam)
    fonts = ["system-ui", "sans-serif"]
    try:
        blocks.queue(default_concurrency_limit=4).launch(
            server_name=host, server_port=port, share=False, quiet=not wait, prevent_thread_lock=True,
            allowed_paths=[str(bench.folder)], footer_links=[], run_history=False, ssr_mode=False, css=CSS,
            theme=Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port: expected a free one, got {port}: {error}") from error
    if wait:
        print(f"the runs are in {bench.folder}; Ctrl-C ends it, and what is begun goes on next time")
        blocks.block_thread()
        bench.jobs.close()
    return blocks, bench
