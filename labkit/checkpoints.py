"""What a checkpoint was made with: a run goes on only from one of its own.

A record is written last into each `checkpoint-<step>`, so a folder that has one is complete.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from labkit.batching import flat

RECORD, STATE = "made_with.json", "state.safetensors"


def fingerprint(model: nn.Module, examples: Sequence[Any] = ()) -> dict[str, Any]:
    """Of what a run starts from: examples, shapes of trained weights, sum of the frozen ones."""
    crc, frozen, shapes = 0, 0.0, {}
    for ids, mask in flat(examples):
        crc = zlib.crc32(mask.tobytes(), zlib.crc32(ids.tobytes(), crc))
    for name, p in model.named_parameters():
        if p.requires_grad:
            shapes[name] = list(p.shape)
        else:
            frozen += float(p.detach().abs().sum(dtype=torch.float64))
    return {"examples": crc, "frozen weights": f"{frozen:.6e}", "trained weights": shapes}


def complete(folder: Path, made: dict[str, Any]) -> None:
    """Marks a checkpoint as complete, with what it was made with."""
    (folder / RECORD).write_text(json.dumps(made), encoding="utf-8")


def newest(folder: str | Path, made: dict[str, Any]) -> Path:
    """The newest complete checkpoint in or below `folder`.

    Raises FileNotFoundError if there is none, ValueError, naming what differs, if it was made with
    anything else than `made`.
    """
    found = _complete(Path(folder).expanduser())
    if not found:
        raise FileNotFoundError(
            f"resume: expected a folder with a complete checkpoint, found none in {folder}; leave "
            "resume empty to start at step 0"
        )
    kept, own = json.loads((found[0] / RECORD).read_text("utf-8")), json.loads(json.dumps(made))
    for name in sorted({*kept, *own}):
        if kept.get(name) != own.get(name):
            raise ValueError(
                f"resume: {found[0]} was made with {name} = {str(kept.get(name))[:80]}, got "
                f"{str(own.get(name))[:80]}; resume with what the run began with"
            )
    return found[0]


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    made: dict[str, Any],
) -> None:
    """Writes `checkpoint-<step>`: one file of trained weights, optimizer's moments and `state`.

    It is there complete or not at all; the one before it is kept. Raises OSError if it cannot be
    written; earlier ones then stay.
    """
    folder = Path(folder).expanduser()
    target, scratch = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}"
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}|{name}": moment for name, moment in moments.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        save_file(tensors, scratch / STATE, {"state": json.dumps(state)})
        complete(scratch, made)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(f"output_dir: could not write {target}: {error}") from error
    for old in [f for f in _complete(folder) if f.parent == folder and _step(f) < step][1:]:
        shutil.rmtree(old, ignore_errors=True)


def load(
    folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, made: dict[str, Any]
) -> dict[str, Any]:
    """Puts what `save` wrote back, of the newest checkpoint, and returns its state; see `newest`."""
    with safe_open(newest(folder, made) / STATE, "pt") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key in [key for key in tensors if "|" in key]:
        number, name = key.split("|")
        moments.setdefault(int(number), {})[name] = tensors.pop(key)
    model.load_state_dict(tensors, strict=False)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state


def check_unused(folder: str | Path) -> None:
    """Raises ValueError if `folder` has checkpoints: they would be mixed up with a new run's."""
    folder = Path(folder).expanduser()
    if found := [f.name for f in _complete(folder) if f.parent == folder]:
        raise ValueError(
            f"output_dir: expected a folder without checkpoints for a new run, found {found[0]} in "
            f"{folder}; name another, or go on from it by resume"
        )


def _complete(folder: Path) -> list[Path]:
    found = [f.parent for f in (folder / RECORD, *folder.glob(f"**/checkpoint-*/{RECORD}"))]
    whole = [f for f in found if (f / RECORD).is_file() and f.name.rpartition("-")[2].isdigit()]
    return sorted(whole, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
