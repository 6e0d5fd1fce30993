"""How far a training run is: its history, and one line that keeps up with it.

In a notebook the line replaces itself in the cell's output, on a terminal it replaces
itself, and in a log file a new one comes every ten seconds. The history keeps at most about
200 entries, each the mean over as many steps, so that a record stays small.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

ENTRIES = 200


class Meter:
    """Losses, tokens and time of a run, read off the device once an entry, not each step."""

    def __init__(self, log: Callable[[dict, int], Any] | None = None) -> None:
        self.history: list[dict] = []
        self.tokens = 0
        self.seconds = 0.0
        self._log = log
        self._losses: list[torch.Tensor] = []
        self._rate, self._window_tokens = 0.0, 0
        self._start = self._window_start = time.perf_counter()

    def start(self, history: list[dict]) -> None:
        self.history = list(history)
        self._before = self.history[-1]["seconds"] if self.history else 0.0
        self._start = self._window_start = time.perf_counter()

    def add(self, loss: torch.Tensor, tokens: int, rate: float) -> None:
        """One step: its loss (a scalar left on its device), tokens and learning rate."""
        self._losses.append(loss)
        self.tokens += tokens
        self._window_tokens += tokens
        self._rate = rate

    def flush(self, step: int) -> dict | None:
        """Closes the entry that ends with `step`; raises on a loss that is not finite."""
        if not self._losses:
            return None
        losses = torch.stack(self._losses).tolist()
        for back, loss in enumerate(reversed(losses)):
            check_finite(loss, step - back, self._rate)
        now = time.perf_counter()
        entry = {
            "step": step,
            "loss": sum(losses) / len(losses),
            "tokens_per_second": self._window_tokens / max(now - self._window_start, 1e-9),
            "learning_rate": self._rate,
            "seconds": self._before + now - self._start,
        }
        self.seconds = now - self._start
        self._losses, self._window_tokens, self._window_start = [], 0, now
        self.history.append(entry)
        if self._log is not None:
            self._log({k: v for k, v in entry.items() if k not in ("step", "seconds")}, step)
        return entry


def check_finite(loss: float, step: int, rate: float) -> None:
    """Raises FloatingPointError, naming the step and the learning rate, unless finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step}: expected a finite loss, got {loss} at learning_rate {rate:.3g}; training "
            "stopped, and earlier checkpoints are kept: try a lower learning_rate or more warm-up"
        )


class Progress(TrainerCallback):
    """Closes the meter's entries during training and shows the line, if `show`."""

    def __init__(self, meter: Meter, show: bool) -> None:
        self.meter, self.line = meter, Line() if show else None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.meter.start([entry for entry in state.log_history if "seconds" in entry])
        self.first = state.global_step
        self.every = max(1, state.max_steps // ENTRIES)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        entry = self.meter.flush(state.global_step)
        if entry:
            state.log_history.append(entry)
            if self.line and state.is_world_process_zero:
                self.line.show(self._text(entry, state.max_steps))

    def _text(self, entry: dict, steps: int) -> str:
        done = entry["step"] - self.first
        left = self.meter.seconds / max(done, 1) * (steps - entry["step"])
        rate = self.meter.tokens / max(self.meter.seconds, 1e-9)
        speed = f"{rate / 1000:.1f} k" if rate >= 1000 else f"{rate:.0f}"
        return (
            f"step {entry['step']}/{steps} · loss {entry['loss']:.3f} · {speed} tokens/s · "
            f"{left:.0f} s left"
        )

    def close(self) -> None:
        """Shows the last line, whatever ended the run."""
        if self.line:
            self.line.close()


class Line:
    """One line of text that is replaced: in a notebook, on a terminal, or every 10 s in a log."""

    def __init__(self) -> None:
        self._shown, self._last, self._handle = 0.0, "", None
        self._notebook = in_notebook()
        self._pause = 0.5 if self._notebook else 0.2 if sys.stderr.isatty() else 10.0

    def show(self, text: str) -> None:
        self._last = text
        if time.monotonic() - self._shown >= self._pause:
            self._draw()

    def close(self) -> None:
        if self._last:
            self._draw()
            if not self._notebook and sys.stderr.isatty():
                sys.stderr.write("\n")

    def _draw(self) -> None:
        self._shown, text, self._width = time.monotonic(), self._last, len(self._last)
        if not self._notebook:
            start, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
            sys.stderr.write(f"{start}{text}{end}")
            sys.stderr.flush()
            return
        from IPython.display import display

        shown = {"text/plain": text}
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
