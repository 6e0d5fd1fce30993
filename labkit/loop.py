"""A loop of numbered steps that logs, shows how far it is, writes checkpoints, and resumes.

For loops of our own (`techniques/ppo`); the trainers of `training` have transformers' loop. All
that a step needs from earlier ones is the model, the optimizer and `state`, so random numbers
must come from the step's number.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit import checkpoints
from labkit.progress import Line

logger = logging.getLogger("labkit")


@dataclass(frozen=True)
class Result:
    """What a run gave: an entry of `history` a step, `stopped`, why it ended early, if it did.

    `notes` are warnings that were given; `seconds` count this call only, also after resuming.
    """

    history: list[dict] = field(repr=False)
    steps: int
    seconds: float
    stopped: str = ""
    notes: tuple[str, ...] = ()


class Loop:
    """Steps 0 to `total` - 1 of training `model`; iterate over it, and `record` each step.

    `settings` shape the run: a checkpoint written with others is refused. Only the process with
    `first` writes, logs and shows. `state` is for what else steps hand on, in JSON's types.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total: int,
        settings: dict[str, Any],
        *,
        output_dir: str | Path | None = None,
        save_steps: int = 0,
        resume: str = "",
        log: Callable[[dict, int], Any] | None = None,
        progress: bool = True,
        first: bool = True,
    ) -> None:
        self.model, self.optimizer, self.total, self.settings = model, optimizer, total, settings
        self.folder, self.save_steps, self.first = output_dir, save_steps, first
        self.log, self.line = log if first else None, Line() if progress and first else None
        self.state: dict[str, Any] = {}
        self.history: list[dict] = []
        self.notes: dict[str, str] = {}
        self.stopped = ""
        if resume:
            self._resume(resume)
        elif save_steps and output_dir is not None:
            checkpoints.check_unused(output_dir)
        self.begun, self.started = len(self.history), time.perf_counter()

    def _resume(self, folder: str) -> None:
        kept = checkpoints.load(folder, self.model, self.optimizer, self.settings)
        self.history, self.state, self.notes = kept["history"], kept["state"], kept["notes"]

    @property
    def seconds(self) -> float:
        """Since this call began, not counting what was done before resuming."""
        return time.perf_counter() - self.started

    def __iter__(self) -> Iterator[int]:
        with contextlib.ExitStack() as stack:
            if self.line:
                stack.callback(self.line.close)
            while len(self.history) < self.total and not self.stopped:
                yield len(self.history)

    def stop(self, reason: str) -> None:
        """Ends the loop with this step, and says so."""
        self.stopped = reason
        self._warn(reason)

    def note(self, kind: str, remark: str) -> None:
        """Says `remark` the first time that something of its kind happens."""
        if kind not in self.notes:
            self.notes[kind] = remark
            self._warn(remark)

    def _warn(self, text: str) -> None:
        if self.first:
            logger.warning("%s", text)

    def result(self) -> Result:
        notes = tuple(self.notes.values())
        return Result(self.history, len(self.history), self.seconds, self.stopped, notes)

    def record(self, metrics: dict[str, float], shown: str) -> None:
        """Closes a step: its entry in the history, the line, a checkpoint if due.

        A step that stops the loop leaves no checkpoint.
        """
        self.history.append({"step": len(self.history) + 1, **metrics})
        done = len(self.history)
        if self.log:
            self.log(metrics, done)
        if self.line:
            left = self.seconds / (done - self.begun) * (self.total - done)
            self.line.show(f"step {done}/{self.total} · {shown} · {left:.0f} s left")
        due = self.save_steps and (done % self.save_steps == 0 or done == self.total)
        if due and self.first and self.folder is not None and not self.stopped:
            kept = {"history": self.history, "state": self.state, "notes": self.notes}
            checkpoints.save(self.folder, done, self.model, self.optimizer, self.settings, kept)
