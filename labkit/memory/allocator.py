"""A device's memory: what is free on it, and the most that a run really took.

The peak is the allocator's own record, so that neither Python nor an earlier run counts. On a CPU
the profiler keeps that record and slows down what it watches: a few steps are enough.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Measured:
    """`peak_bytes`: the most that was allocated at a time, the model included."""

    peak_bytes: int = 0


@contextlib.contextmanager
def measured(model: Any) -> Iterator[Measured]:
    """Measures what runs inside `with`, on the device of `model`, whose own bytes are added.

    `peak_bytes` of what it gives is known when the block has ended.
    """
    import torch

    found = Measured()
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
        others = torch.cuda.memory_allocated() - held(model)
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.peak_bytes = torch.cuda.max_memory_allocated() - others
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces each start otherwise
    before = held(model)
    with torch.autograd.profiler.profile(profile_memory=True) as record:
        yield found
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes = itertools.accumulate(event.nbytes() for event in events)
    found.peak_bytes = before + max(sizes, default=0)


def held(model: Any) -> int:
    """Bytes of a model: parameters, buffers and constants of quantization, shared ones once."""
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    inner = [s.state2.absmax for s in states if s.nested]
    tensors = [*model.parameters(), *model.buffers(), *(s.absmax for s in states), *inner]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def free(device: str) -> float | None:
    """Bytes that a run may take on "cpu" or "cuda"; None without such a device.

    On a GPU what is free now, on a CPU what the system, or the container, can still give.
    """
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    import psutil

    return float(min(psutil.virtual_memory().available, *_container()))


def _container() -> list[float]:
    """What a control group (version 2) leaves, if it sets a limit."""
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return [float(limit - used)]
    return [float("inf")]
