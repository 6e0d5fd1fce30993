"""How far a training run is: its history, and one line that keeps up with it.

In a notebook the line replaces itself in the cell's output, on a terminal it replaces itself, and in a
log file a new one comes every ten seconds.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback

ENTRIES = 200  # of a history, each the mean over as many steps, so that a record stays small


class Line(AbstractContextManager):
    """One line of text that is replaced; use it in a `with`, so that the last one is shown."""

    def __init__(self, show: bool = True) -> None:
        self._enabled, self._last, self._shown = show, "", 0.0
        self._id, self._drawn = uuid.uuid4().hex, False
        self._notebook = type(sys.stderr).__module__ == "ipykernel.iostream"
        self._terminal = sys.stderr.isatty()
        self._pause = 0.5 if self._notebook else 0.2 if self._terminal else 10.0

    def __exit__(self, *error: Any) -> None:
        if self._last:
            self._draw(end="\n")

    def show(self, text: str) -> None:
        """Replaces the line, unless the last time was a moment ago."""
        self._last = text if self._enabled else ""
        if self._last and time.monotonic() - self._shown >= self._pause:
            self._draw(end="" if self._terminal else "\n")

    def _draw(self, end: str) -> None:
        self._shown, shown = time.monotonic(), {"text/plain": self._last}
        if not self._notebook:
            start = "\r\x1b[K" if self._terminal else ""
            print(f"{start}{self._last}", end=end, file=sys.stderr, flush=True)
            return
        from IPython.display import display

        display(shown, raw=True, display_id=self._id, update=self._drawn)
        self._drawn = True


class History(TrainerCallback):
    """Losses, metrics, tokens and time of a run, read off the device once an entry."""

    def __init__(self, log: Callable[[dict, int], Any] | None, line: Line) -> None:
        self.entries: list[dict] = []
        self.tokens, self._log, self._line = 0, log, line
        self._steps: list[dict[str, Any]] = []
        self._step: dict[str, Any] = {}

    def add(self, metrics: dict[str, Any], tokens: int) -> None:
        """A batch's share of the metrics of a step, and its tokens."""
        for name, value in metrics.items():
            self._step[name] = self._step.get(name, 0.0) + value
        self.tokens += tokens
        self._entry_tokens += tokens

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.entries = [entry for entry in state.log_history if "seconds" in entry]
        self._before = self.entries[-1]["seconds"] if self.entries else 0.0
        self._begun, self._entry_tokens = state.global_step, 0
        self._start = self._entry_start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._steps.append(self._step)
        self._step = {}
        step, last = state.global_step, state.max_steps
        if step % max(1, last // ENTRIES) and step < last and not control.should_save:
            return  # a checkpoint must not be written before its losses were looked at
        entry = self._close(step)
        state.log_history.append(entry)
        seconds = time.perf_counter() - self._start
        left = seconds / (step - self._begun) * (last - step)
        now = f"loss {entry['loss']:.3f} · {self.tokens / seconds:,.0f} tokens/s"
        self._line.show(f"step {step}/{last} · {now} · {left:.0f} s left")

    def _close(self, step: int) -> dict[str, float]:
        names, now = list(self._steps[0]), time.perf_counter()
        table = torch.stack([torch.stack([s[n] for n in names]) for s in self._steps]).tolist()
        for number, values in enumerate(table, start=step - len(table) + 1):
            check_finite(values[0], number, self._learning_rate)
        columns = zip(names, zip(*table, strict=True), strict=True)
        metrics = {name: sum(column) / len(column) for name, column in columns}
        seconds = max(now - self._entry_start, 1e-9)
        metrics["tokens_per_second"] = self._entry_tokens / seconds
        metrics["learning_rate"] = self._learning_rate
        self._steps, self._entry_tokens, self._entry_start = [], 0, now
        entry = {"step": step, **metrics, "seconds": self._before + now - self._start}
        self.entries.append(entry)
        if self._log is not None:
            self._log(metrics, step)
        return entry


def check_finite(loss: float, step: int, learning_rate: float) -> None:
    """Raises FloatingPointError, naming the step and the learning rate, unless finite."""
    if not math.isfinite(loss):
        where = f"step {step}: loss {loss} at learning_rate {learning_rate:.3g}"
        advice = "earlier checkpoints are kept: try a lower learning_rate or more warm-up"
        raise FloatingPointError(f"{where}; training stopped, {advice}")
