"""One attempt at tuning a picture: what of it is still to be done, and its end, the certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvinv_pl import certificate
from kvinv_pl.certificate import Demand
from kvinv_pl.curriculum import Pass, first_missing
from kvinv_pl.network import Network
from kvinv_pl.recipe import Recipe
from kvinv_pl.work import Work


@dataclass(frozen=True)
class Attempt:
    """The first attempt (0) lies in the run folder itself; each later one has twice the inner steps."""

    number: int
    recipe: Recipe
    demand: Demand

    def inner_steps(self, which: Pass) -> int:
        """Optimiser steps for one timestep at most, in this pass of the curriculum."""
        return self.recipe.steps_at_most(which) * 2**self.number

    @property
    def seed(self) -> int:
        """Of random starts, which are others in every attempt."""
        return self.recipe.seed + self.number

    def at(self, work: Work) -> Work:
        """The picture, with the phases of this attempt."""
        return replace(work, store=work.store.at_attempt(self.number))

    def take_up(
        self, work: Work, steps: int, tuning: Mapping[str, Any], editing: Mapping[str, Any]
    ) -> set[int] | None:
        """Which phases of a picture at this attempt are done; None: there is nothing left to do.

        Raises UserError where they were made otherwise; if phases are missing, run.json then says how they
        are made.

        Args:
            work: The picture, with the phases of this attempt.
            steps: T.
            tuning: What psi depends on.
            editing: What an edit takes where nothing else is said.
        """
        store, finished = work.store, work.store.done()
        if not self.number:
            run = store.read_run()
            if "tuning" in run and store.has_begun():
                store.require({"tuning": tuning}, ["tuning"])
            if first_missing(finished, steps) < steps:
                store.drop_attempts()
                run.pop("reconstruction", None)
                store.write_run({**run, "tuning": tuning, "editing": editing})
        return finished if self.is_due(work) else None

    def is_due(self, work: Work) -> bool:
        """Whether it is still to be made, or to be certified."""
        if self.number:
            return certificate.next_attempt(work.store, self.demand) == self.number
        return not certificate.is_certified(work.store)

    @property
    def inner_steps_at_most(self) -> int:
        """Optimiser steps for one timestep at most, before z-tilde rolls out for good."""
        return self.recipe.inner_steps * 2**self.number

    def certify(self, network: Network, work: Work) -> dict[str, Any]:
        """Write the certificate of a picture that is tuned; run.json's field "reconstruction"."""
        return certificate.certify(network, work.store, self.demand, self.number, self.inner_steps_at_most)

    def logged_as(self, work: Work) -> str:
        """The name of a picture in the logs; later attempts have curves of their own."""
        return work.store.folder.name + (f"-attempt-{self.number + 1}" if self.number else "")
