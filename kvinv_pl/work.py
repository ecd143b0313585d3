"""What the stages are told of one picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvinv_pl.store import RunStore

Stage = Literal["invert", "fit", "edit"]


@dataclass(eq=False)
class Work:
    """One picture to be worked on, and the folder where all of it lies.

    Without an `image` the folder must hold what the earlier stages left.
    """

    name: str
    store: RunStore
    image: Path | None
    source: str
    targets: list[str]
    mask: Path | None = None
    geometry: Literal["keep", "crop"] = "keep"

    @property
    def label(self) -> str:
        """What the person knows the picture by: its path, or its run folder."""
        return str(self.image or self.store.folder)

    def remember_targets(self) -> None:
        """Note in run.json what the picture is to become, for an edit of the run that is not told."""
        run = self.store.read_run()
        if self.targets and run.get("targets") != self.targets:
            self.store.write_run({**run, "targets": self.targets})
