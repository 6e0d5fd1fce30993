"""How far a training run is: its history, and one line that keeps up with it.

In a notebook the line replaces itself in the cell's output, on a terminal it replaces itself, and in a
log file a new one comes every ten seconds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

ENTRIES = 200  # of a history, each the mean over as many steps, so that a record stays small


class Line:
    """One line of text that is replaced; use it in a `with`, so that the last one is shown."""

    def __init__(self, show: bool = True) -> None:
        self._enabled, self._notebook = show, in_notebook()
        self._shown, self._last, self._handle = 0.0, "", None
        self._pause = 0.5 if self._notebook else 0.2 if sys.stderr.isatty() else 10.0

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._last:
            self._draw()
            if not self._notebook and sys.stderr.isatty():
                sys.stderr.write("\n")

    def show(self, text: str) -> None:
        """Replaces the line, unless the last time was a moment ago."""
        if not self._enabled:
            return
        self._last = text
        if time.monotonic() - self._shown >= self._pause:
            self._draw()

    def _draw(self) -> None:
        self._shown, shown = time.monotonic(), {"text/plain": self._last}
        if not self._notebook:
            start, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
            sys.stderr.write(f"{start}{self._last}{end}")
            sys.stderr.flush()
            return
        from IPython.display import display

        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    if "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None


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
        self._every = max(1, state.max_steps // ENTRIES)
        self._start = self._entry_start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._steps.append(self._step)
        self._step = {}
        step, last = state.global_step, state.max_steps
        if step % self._every and step < last and not control.should_save:
            return  # a checkpoint must not be written before its losses were looked at
        entry = self._close(step)
        state.log_history.append(entry)
        left = (time.perf_counter() - self._start) / (step - self._begun) * (last - step)
        speed = self.tokens / (time.perf_counter() - self._start)
        self._line.show(
            f"step {step}/{last} · loss {entry['loss']:.3f} · {speed:,.0f} tokens/s · {left:.0f} s left"
        )

    def _close(self, step: int) -> dict[str, float]:
        names, now = list(self._steps[0]), time.perf_counter()
        table = torch.stack([torch.stack([s[n] for n in names]) for s in self._steps]).tolist()
        for number, values in enumerate(table, start=step - len(table) + 1):
            check_finite(values[0], number, self._learning_rate)
        means = dict(zip(names, (sum(c) / len(c) for c in zip(*table, strict=True)), strict=True))
        seconds = max(now - self._entry_start, 1e-9)
        rest = {
            "tokens_per_second": self._entry_tokens / seconds,
            "learning_rate": self._learning_rate,
        }
        self._steps, self._entry_tokens, self._entry_start = [], 0, now
        entry = {"step": step, **means, **rest, "seconds": self._before + now - self._start}
        self.entries.append(entry)
        if self._log is not None:
            self._log(means | rest, step)
        return entry


def check_finite(loss: float, step: int, learning_rate: float) -> None:
    """Raises FloatingPointError, naming the step and the learning rate, unless finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step}: loss {loss} at learning_rate {learning_rate:.3g}; training stopped, earlier "
            "checkpoints are kept: try a lower learning_rate or more warm-up"
        )
