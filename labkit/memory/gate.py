"""What `labkit run` asks before it starts a notebook: does the main training fit?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit.memory.planner import Plan, plan

TECHNIQUES = {  # by the name of the notebook, without its number
    "full_finetuning": "full",
    "instruction_tuning": "full",
    "lora": "lora",
    "qlora": "qlora",
    "prefix_tuning": "prefix",
    "adapter": "adapter",
    "rlhf": "full",  # its reward model; PPO, which holds a reference and a reward besides, needs more
}
NAMES = {  # a notebook's parameter: the planner's setting
    "model": "model",
    "batch_size": "batch_size",
    "max_length": "sequence_length",
    "rank": "rank",
    "targets": "targets",
    "length": "prefix_length",
    "bottleneck": "bottleneck",
    "placement": "placement",
    "device": "device",
}


def plan_of(notebook: str, values: Mapping[str, Any]) -> Plan | None:
    """The plan of the main training of `notebook` (02_lora) with these parameters.

    None for a notebook whose training the planner does not know, and for the embedded model, which
    fits wherever a notebook runs. Rows are taken to be as long as they may be, responses only.
    """
    technique = TECHNIQUES.get(notebook.partition("_")[2])
    if technique is None or values.get("model", "tinytown") == "tinytown":
        return None
    settings = {ours: values[theirs] for theirs, ours in NAMES.items() if theirs in values}
    if (
        "minibatch_size" in values
    ):  # the notebook's batch is what PPO samples, not what trains at once
        settings |= {"batch_size": min(16, values["minibatch_size"]), "precision": "mixed"}
    elif values.get("dtype") == "bfloat16":
        settings["precision"] = "bf16"
    elif values.get("dtype") == "float32":
        settings["precision"] = "mixed"
    if values.get("optimizer", "auto") != "auto":
        settings["optimizer"] = values["optimizer"]
    return plan(technique=technique, **settings)


def refuse(notebook: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError, with the numbers and what would fit, for a run that cannot fit."""
    found = plan_of(notebook, values)
    if found is not None and found.fits is False:
        raise ValueError(
            f"{notebook}: {found.title}. {found.advice} To run it all the same: --force"
        )
