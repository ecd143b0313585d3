"""The progress of a stage on a bar as diffusers has it."""

import logging
from collections.abc import Callable
from typing import Any

from kvinv_pl.stages.progress import Progress

log = logging.getLogger(__name__)


class ProgressBar(Progress):
    """A bar of tqdm for each stage; what the terminal would be told besides is logged."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """Take a pipeline's `progress_bar`, which knows what `set_progress_bar_config` was told."""
        super().__init__(quiet=True)
        self._make, self._bar = make, None

    def begin(self, stage: str, picture: str, total: int) -> None:
        """A new bar."""
        super().begin(stage, picture, total)
        self._close()
        self._bar = self._make(total=total)
        self._bar.set_description(stage)

    def show(self, detail: str) -> None:
        """What stands behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)

    def advance(self, detail: str, steps: int = 1) -> None:
        """Move the bar."""
        super().advance(detail, steps)
        if self._bar is not None:
            self._bar.update(steps)

    def finish(self, detail: str = "") -> None:
        """The bar stays, as far as it came."""
        self.show(detail)
        self._close()

    def note(self, text: str) -> None:
        """Log a line."""
        log.info("%s", text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
