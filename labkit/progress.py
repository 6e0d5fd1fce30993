"""How far a training run is: its history, and one view that keeps up with it.

In a notebook all trainings of a cell share one display: a bar, the loss, the time left, and curves
with those of the cell's earlier trainings in grey. On a terminal a line replaces itself, in a log
file a new one comes every ten seconds; `labkit run` shows the line of its kernel.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback

ENTRIES = 200  # of a history, each the mean over as many steps, so that a record stays small
SMOOTH = 10  # entries of which the shown loss is the mean: single batches are noisy
_HINT = "<small>■ (interrupt) ends it and keeps the model</small>"
STOPPED = "stopped at step {} of {}: the model keeps what it learned"


def cell() -> int | None:
    """A number of the notebook cell that runs, another at each run; None outside of a notebook."""
    if type(sys.stderr).__module__ != "ipykernel.iostream":
        return None
    from IPython import get_ipython

    return get_ipython().execution_count


class Live(AbstractContextManager):
    """The view of one training; use it in a `with`, so that the last state is shown.

    In a notebook it also lets the reader stop: the interrupt button, or the view's own where
    the kernel hears it while it works, sets `stopping`, which the training obeys at the next
    step. A second interrupt is a KeyboardInterrupt, as ever.
    """

    _views: list[Live] = []  # of the cell that runs

    def __init__(self, label: str = "", show: bool = True) -> None:
        self.label, self._enabled, self.stopping = label, show, False
        self.points: dict[str, list[tuple[int, float]]] = {}
        self.begun, self._start, self._shown = 0, time.perf_counter(), -math.inf
        self._last, self._share, self._sample, self._cell = (0, 0, "", 0.0), 0.0, "", cell()
        self._id, self._drawn, self._button = uuid.uuid4().hex, False, None
        self._handler: Any = None
        self._terminal = sys.stderr.isatty()
        self._pause = 0.5 if self._cell is not None else 0.2 if self._terminal else 10.0

    def __enter__(self) -> Live:
        if self._enabled and self._cell is not None:
            if Live._views and Live._views[0]._cell != self._cell:
                Live._views = []
            Live._views = [*Live._views, self]
            if threading.current_thread() is threading.main_thread():
                self._handler = signal.signal(signal.SIGINT, self._interrupted)
            self._button = self._stop_button()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._button is not None:
            self._display({"text/plain": ""}, "stop", update=True)
            self._button.close()
        if self._last[1]:
            self._share = 0.0
            self._draw(end="\n")

    @property
    def text(self) -> str:
        step, last, shown, seconds = self._last
        where, when = f"step {step}/{last}", duration(seconds)
        if self.stopping and step < last:
            where = STOPPED.format(step, last)
        elif step < last:
            when = f"{duration(seconds / max(step - self.begun, 1) * (last - step))} left"
        text = " · ".join(filter(None, (where, shown, when)))
        return f"{self.label}: {text}" if self.label else text

    def _interrupted(self, *_: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    def _stop_button(self) -> Any:
        """A button, where a click is heard while the cell runs: by a subshell (ipykernel 7)."""
        from IPython import get_ipython

        kernel = get_ipython().kernel
        jupyter = "deletedCells" in (kernel.get_parent("shell") or {}).get("metadata", {})
        if not (jupyter and getattr(kernel, "_supports_kernel_subshells", False)):
            return None
        import ipywidgets

        button = ipywidgets.Button(description="Stop", tooltip="ends here and keeps the model")
        button.on_click(lambda _: setattr(self, "stopping", True))
        # ipykernel sends replies to the thread that made the button, which is busy.
        button.comm.__dict__.pop("_reply_subshell_id", None)
        self._display(button._repr_mimebundle_(), "stop", update=len(Live._views) > 1)
        return button

    def _display(self, data: Any, name: str, update: bool) -> None:
        from IPython.display import display

        display(data, raw=True, display_id=f"{Live._views[0]._id}-{name}", update=update)

    def show(
        self, step: int, last: int, values: dict[str, float], note: str = "", sample: str = ""
    ) -> None:
        """Adds a point to each curve, and draws them unless that was done a moment ago."""
        for name, value in values.items():
            self.points.setdefault(name, []).append((step, value))
        if not self._enabled:
            return
        shown = [f"{name} {points[-1][1]:.3f}" for name, points in self.points.items()]
        shown += [note] if note else []
        self._last = step, last, " · ".join(shown), time.perf_counter() - self._start
        self._share = step / last
        self._sample = sample
        if time.perf_counter() - self._shown >= self._pause:
            self._draw(end="" if self._terminal else "\n")

    def _draw(self, end: str) -> None:
        self._shown = time.perf_counter()
        if file := os.environ.get("LABKIT_PROGRESS"):
            with suppress(OSError):
                Path(file).write_text(self.text, "utf-8")
        if self._cell is None:
            start = "\r\x1b[K" if self._terminal else ""
            print(f"{start}{self.text}", end=end, file=sys.stderr, flush=True)
            return
        views = [view for view in Live._views if view._last[1]]
        data = {"text/plain": "\n".join(view.text for view in views), "text/html": _page(views)}
        self._display(data, "view", update=Live._views[0]._drawn)
        Live._views[0]._drawn = True


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _page(views: Sequence[Live]) -> str:
    """A line for each training of the cell, then their curves, the last one's in colour."""
    *_, view = views
    lines = "<br>".join(escape(v.text) for v in views)
    if view._share:
        lines += f'<br><progress value="{view._share:.3f}" style="width:30em"></progress> {_HINT}'
    curves = [[v.points[name] for v in views if name in v.points] for name in view.points]
    svgs = "".join(map(_curve, view.points, curves))
    sample = f"<br>newest sample: {escape(view._sample[:400])}" if view._sample else ""
    return f'<div aria-live="polite" style="text-align:left">{lines}<br>{svgs}{sample}</div>'


def _curve(name: str, curves: Sequence[Sequence[tuple[int, float]]]) -> str:
    xs, ys = zip(*(point for curve in curves for point in curve), strict=True)
    low, across, up = min(ys), 280 / max(*xs, 1), 70 / (max(ys) - min(ys) or 1)
    svg = ""
    for number, curve in enumerate(curves, start=1):
        colour = "#2563a8" if number == len(curves) else "#aaaaaa"
        path = " ".join(f"{x * across:.0f},{75 - (y - low) * up:.1f}" for x, y in curve)
        svg += f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    label = f"{name}, from {min(ys):.3g} to {max(ys):.3g}"
    svg = f'<svg width="284" height="80" role="img" aria-label="{escape(label)}">{svg}</svg>'
    style = "display:inline-block;margin:.3em 1em 0 0"
    return f'<figure style="{style}">{svg}<figcaption>{escape(label)}</figcaption></figure>'


class History(TrainerCallback):
    """Losses, metrics, tokens and time of a run, read off the device once an entry."""

    def __init__(
        self,
        log: Callable[[dict, int], Any] | None,
        live: Live,
        held_out: Callable[[], float] | None = None,
    ) -> None:
        self.entries: list[dict] = []
        self.tokens, self._log, self._live, self._held_out = 0, log, live, held_out
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
        self._live.begun = self._next = state.global_step
        self._entry_tokens = 0
        self._start = self._entry_start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._steps.append(self._step)
        self._step = {}
        step, last = state.global_step, state.max_steps
        control.should_training_stop |= self._live.stopping
        ends = step == last or control.should_training_stop or control.should_save
        if step % max(1, last // ENTRIES) and not ends:
            return  # a checkpoint must not be written before its losses were looked at
        entry = self._close(step)
        state.log_history.append(entry)
        values = {"loss": fmean(entry["loss"] for entry in self.entries[-SMOOTH:])}
        speed = self.tokens / (time.perf_counter() - self._start)
        if self._held_out and step >= self._next:
            values["held-out loss"], self._next = self._held_out(), step + last / 4
        self._live.show(step, last, values, f"{speed:,.0f} tokens/s")

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
