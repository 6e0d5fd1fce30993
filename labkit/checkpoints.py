"""Checkpoints of a loop of our own: safetensors and JSON, whole or not at all, never a pickle.

    checkpoint-<step>/weights.safetensors  optimizer.safetensors  state.json

Only the trained weights are kept. The frozen ones must be those of the run's beginning, so a
sum of them is kept, too, and compared. The trainers of `training` write transformers' own.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

WEIGHTS, MOMENTS, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
KEEP = 2


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    state: dict[str, Any],
) -> Path:
    """Writes `checkpoint-<step>` into `folder`, then removes those before it but for one.

    Raises OSError if it cannot be written; earlier checkpoints then stay.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder).expanduser()
    target, scratch = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}-{os.getpid()}"
    about = {"settings": settings, "frozen": _frozen_sum(model), "state": state}
    try:
        scratch.mkdir(parents=True)
        save_file(_contiguous(_trained(model)), scratch / WEIGHTS)
        save_file(_contiguous(_moments(optimizer)), scratch / MOMENTS)
        (scratch / STATE).write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"output_dir: could not write {target}: {error}; free some space or choose a "
                      "folder that you may write to; earlier checkpoints are kept") from error  # fmt: skip
    earlier = [f for f in _whole(folder) if f.parent == folder and _step(f) < step]
    for old in earlier[KEEP - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def check_unused(folder: str | Path) -> None:
    """Raises ValueError if `folder` has checkpoints: they would be mixed up with a new run's."""
    folder = Path(folder).expanduser()
    if found := [f.name for f in _whole(folder) if f.parent == folder]:
        raise ValueError(f"output_dir: expected a folder without checkpoints for a new run, found "
                         f"{found[0]} in {folder}; name another, or go on from it by resume")  # fmt: skip


def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Puts the newest whole checkpoint in or below `folder` back, and returns its `state`.

    Raises FileNotFoundError if there is none, ValueError if it was written with other settings,
    another model, or other frozen weights; `model` is then as it was.
    """
    from safetensors.torch import load_file

    source = newest(folder)
    about = json.loads((source / STATE).read_text(encoding="utf-8"))
    weights, own = load_file(source / WEIGHTS), _trained(model)
    _same(source, about["settings"], settings)
    _same(source, _shapes(weights), _shapes(own))
    if not math.isclose(about["frozen"], _frozen_sum(model), rel_tol=1e-6):
        raise ValueError(f"resume: {source} was written with other frozen weights (the reference); "
                         "load the model that the run began with, not one trained since")  # fmt: skip
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(source / MOMENTS).items():
        index, _, part = name.partition(".")
        moments.setdefault(int(index), {})[part] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return about["state"]


def newest(folder: str | Path) -> Path:
    """The newest whole checkpoint in or below `folder`. Raises FileNotFoundError."""
    found = _whole(Path(folder).expanduser())
    if not found:
        raise FileNotFoundError(f"resume: expected a folder with a whole checkpoint, found none in "
                                f"{folder}; leave resume empty to start at step 0")  # fmt: skip
    return found[0]


def _whole(folder: Path) -> list[Path]:
    found = [f for f in (folder, *folder.glob("**/checkpoint-*"))
             if re.fullmatch(r"checkpoint-\d+", f.name)
             and all((f / name).is_file() for name in (WEIGHTS, MOMENTS, STATE))]  # fmt: skip
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _same(source: Path, kept: dict[str, Any], own: dict[str, Any]) -> None:
    for name in sorted({*kept, *own}):
        if kept.get(name) != own.get(name):
            raise ValueError(f"resume: {source} was written with {name} = {kept.get(name)!r}, got "
                             f"{own.get(name)!r}; resume with what the run began with")  # fmt: skip


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _frozen_sum(model: nn.Module) -> float:
    frozen = (p.detach() for p in model.parameters() if not p.requires_grad)
    return float(sum(p.abs().sum(dtype=torch.float64) for p in frozen))


def _shapes(tensors: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{part}": tensor for i, parts in state.items() for part, tensor in parts.items()}


def _contiguous(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
