"""Asking a reward for its numbers, and saying which text it failed on.

A reward is any callable of (prompts, responses) that gives one number each: a reward model, a
function of texts, a judge. If it has a parameter `rows`, it is given the prompts' rows, too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

Reward = Callable[..., Sequence[float]]


def ask(
    reward: Reward, prompts: Sequence[Any], responses: Sequence[str], rows: Sequence[dict]
) -> list[float]:
    """One finite number for each response, in order.

    Raises RuntimeError if the reward raises, or gives what cannot be listed (its own error is the
    cause), ValueError if it gives another count, or something that is no finite number; all name a
    prompt and its response.
    """
    extra = {"rows": list(rows)} if "rows" in inspect.signature(reward).parameters else {}
    try:
        given = reward(list(prompts), list(responses), **extra)
        values = list(given.tolist() if hasattr(given, "tolist") else given)
    except Exception as error:
        i = _culprit(reward, prompts, responses, extra)
        raise RuntimeError(f"reward: raised {type(error).__name__}: {error}; "
                           f"{_where(prompts[i], responses[i])}") from error  # fmt: skip
    if len(values) != len(responses):
        raise ValueError(f"reward: expected {len(responses)} numbers, one for each response, got "
                         f"{len(values)}; the first: {_where(prompts[0], responses[0])}")  # fmt: skip
    for prompt, response, value in zip(prompts, responses, values, strict=True):
        if not _finite(value):
            raise ValueError(f"reward: expected a finite number, got {value!r}; "
                             f"{_where(prompt, response)}")  # fmt: skip
    return [float(value) for value in values]


def _culprit(reward: Reward, prompts: Sequence[Any], responses: Sequence[str], extra: dict) -> int:
    """The first row that the reward fails on when asked alone; 0 if it fails on none."""
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            list(reward([prompt], [response], **{name: [rows[i]] for name, rows in extra.items()}))
        except Exception:
            return i
    return 0


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def _where(prompt: Any, response: str) -> str:
    return f"prompt {prompt!r}, response {response!r}"
