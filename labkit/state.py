"""What a trainer leaves on a model, and how to take it off.

Trainers set `use_cache` and `output_router_logits` in the configuration (a mixture of experts then
fails in `generate`), put all modules in train mode and dropout at 0, patch `forward`, add hooks,
marks and an adapter "ref", and seed all generators.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Within it, a trainer may leave on `model` what it likes; afterwards only weights differ.

    Modules, configurations and `requires_grad` (see `snapshot`), random states and accelerate's
    precision are as before and gradients are cleared, also if the body raises.
    """
    from accelerate.state import AcceleratorState

    put_back, python, numpy = snapshot(model), random.getstate(), np.random.get_state()
    shared = AcceleratorState._shared_state
    AcceleratorState._shared_state = dict(shared)  # Accelerators of the body keep this one
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        put_back()
        model.zero_grad()
        AcceleratorState._shared_state = shared
        random.setstate(python)
        np.random.set_state(numpy)


def snapshot(model: Any) -> Callable[[], None]:
    """A function that puts all but the values of weights back as it is now."""
    kept: list[tuple[dict, dict, dict[str, Any], dict]] = []
    configs: dict[int, Any] = {}
    for module in model.modules():
        now = vars(module)
        boxes = {k: copy.copy(v) for k, v in now.items() if isinstance(v, dict | list)}
        trained = {k: p.requires_grad for k, p in now["_parameters"].items() if p is not None}
        kept.append((now, dict(now), boxes, trained))
        values = (*now.values(), *getattr(module, "peft_config", {}).values())
        configs |= {id(v): v for v in values if type(v).__name__.endswith("Config")}
    # Modules share configurations, so each is refilled itself, and stays the same object.
    states = [(vars(c), copy.deepcopy(vars(c), dict(configs))) for c in configs.values()]

    def put_back() -> None:
        for now, attributes, boxes, trained in kept:
            for group in ("_parameters", "_buffers"):  # these keep the values of today
                boxes[group] |= {k: v for k, v in now[group].items() if k in boxes[group]}
            _refill(now, attributes)
            for name, content in boxes.items():
                _refill(now[name], content)
            for name, flag in trained.items():
                now["_parameters"][name].requires_grad_(flag)
        for now, state in states:
            _refill(now, state)

    return put_back


def _refill(box: Any, content: Any) -> None:
    box.clear()
    (box.extend if isinstance(box, list) else box.update)(content)
