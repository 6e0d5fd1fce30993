"""Benchmarks through lm-eval (EleutherAI's harness), which a plain install of labkit leaves out.

Tinytown's own tasks run offline: `tinytown_knowledge`, `tinytown_honesty` (questions that nobody
can answer, and statements true or false) and `tinytown_harm`. Those of lm-eval, such as `mmlu`,
`truthfulqa_mc2` and `ifeval`, are taken by name, and fetch their questions from the hub.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

from labkit import tinytown

TINYTOWN = ("tinytown_knowledge", "tinytown_honesty", "tinytown_harm")
FOLDER = Path(tinytown.__file__).parent / "lm_eval"  # task files, for lm-eval's --include_path


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = TINYTOWN,
    *,
    chat: bool | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """One row per task and metric: `value`, its standard error, and `n` questions.

    chat: ask in the tokenizer's chat template, by default if it has one; else Tinytown's tasks are
    asked as "Q: … A:" and others as lm-eval has them. limit: at most so many questions per task.
    Raises ImportError without lm-eval, ConnectionError where questions cannot be fetched, or
    ValueError for a task that is not known, or a template that is not there.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError("benchmarks need the package lm-eval: pip install lm-eval") from None
    if isinstance(tasks, str) or not tasks or (limit is not None and limit < 1):
        raise ValueError(f"tasks, limit: expected names, and 1 or more, got {tasks!r}, {limit!r}")
    chat = bool(tokenizer.chat_template) if chat is None else chat
    if chat and not tokenizer.chat_template:
        raise ValueError("chat: the tokenizer has no chat template; take chat=False")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = all(task.startswith("tinytown") for task in tasks)  # else all of lm-eval's are indexed
    about = {"own_form": not chat}
    manager = TaskManager(include_path=FOLDER, include_defaults=not own, metadata=about)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"tasks: lm-eval knows no {', '.join(unknown)}")
    training = model.training
    network = HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=32)
    options: dict[str, Any] = {"limit": limit, "apply_chat_template": chat, "log_samples": False}
    options |= dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    try:
        with redirect_stderr(StringIO()):  # lm-eval's many bars
            found = simple_evaluate(network, tasks=list(tasks), task_manager=manager, **options)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(f"tasks: questions not fetched from the hub: {error}") from error
    finally:
        model.train(training)
    rows = []
    for task, metrics in found["results"].items():
        parts = found.get("group_subtasks", {}).get(task) or [task]
        n = sum(found["n-samples"][part]["effective"] for part in parts)
        for name, value in metrics.items():
            metric, comma, rest = name.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                deviation = metrics.get(f"{metric}_stderr,{rest}")
                row = {"task": task, "metric": metric, "value": float(value)}
                rows.append(row | {"standard error": deviation, "n": n})
    return rows
