"""One line that keeps up with a run.

In a notebook it replaces itself in the cell's output, on a terminal it replaces itself, and in a
log file a new one comes every ten seconds.
"""

from __future__ import annotations

import sys
import time
from typing import Any


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
