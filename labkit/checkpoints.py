"""What a checkpoint was made with: a run goes on only from one of its own.

A record is written last into each `checkpoint-<step>`, so a folder that has one is complete.
"""

from __future__ import annotations

import json
import re
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


def digest(examples: Sequence[Any]) -> int:
    """A checksum of the ids and masks of examples, also of those that pairs and rankings hold."""
    crc = 0
    for ids, mask in flat(examples):
        crc = zlib.crc32(mask.tobytes(), zlib.crc32(ids.tobytes(), crc))
    return crc


def fingerprint(model: nn.Module, examples: Sequence[Any] = ()) -> dict[str, Any]:
    """Of what a run starts from: examples, shapes of trained weights, sum of all that is frozen,
    and under its own name each number or text that layers have as a setting, such as `lora_alpha`.
    """
    crc, frozen = digest(examples), 0.0
    settings: dict[str, set[str]] = {}
    for item in examples:  # what other models said of a pair
        if (known := getattr(item, "reference", None)) is not None:
            crc = zlib.crc32(known.tobytes(), crc)
        if (label := getattr(item, "label", 1.0)) != 1.0:
            crc = zlib.crc32(repr(label).encode(), crc)
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.requires_grad:
            size = tensor.abs() if tensor.is_floating_point() else tensor
            frozen += float(size.sum(dtype=torch.float64))
    for module in model.modules():
        for name, value in [("layers", type(module)), *vars(module).items()]:
            value = getattr(value, "__name__", value)  # of a class, or of an activation
            kinds = {type(v) for v in (value.values() if isinstance(value, dict) else [value])}
            if kinds <= {int, float, str} and not re.search("^_|_cached$|_path$", name):
                settings.setdefault(f"model.{name}", set()).add(str(value))
    made = {"examples": crc, "frozen weights": f"{frozen:.6e}", "trained weights": trained}
    return {name: sorted(values) for name, values in settings.items()} | made


def complete(folder: Path, made: dict[str, Any]) -> None:
    """Marks a checkpoint as complete: what it was made with, and how large each file is."""
    files = {str(f.relative_to(folder)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    (folder / RECORD).write_text(json.dumps({"made": made, "files": files}), encoding="utf-8")


def newest(folder: str | Path, made: dict[str, Any]) -> Path:
    """The newest complete checkpoint in or below `folder`.

    Raises FileNotFoundError if there is none, ValueError, naming what differs, if it was made with
    anything else than `made`, or a file is damaged.
    """
    found = _complete(Path(folder).expanduser())
    if not found:
        raise FileNotFoundError(f"resume: expected a complete checkpoint in {folder}, found none")
    record = json.loads((found[0] / RECORD).read_text("utf-8"))
    kept, own = record.get("made", record), json.loads(json.dumps(made))
    for name in sorted({*kept, *own}):
        if kept.get(name) != own.get(name):
            was, now = str(kept.get(name))[:80], str(own.get(name))[:80]
            raise ValueError(f"resume: {found[0]} was made with {name} = {was}, got {now}")
    for name, size in record.get("files", {}).items():
        file = found[0] / name
        if (there := file.stat().st_size if file.exists() else 0) != size:
            expected = f"{size} bytes in {file}, got {there}"
            raise ValueError(f"resume: expected {expected}; take the folder of an older checkpoint")
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
    moments: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(newest(folder, made) / STATE, "pt") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for key in [key for key in tensors if "|" in key]:
        number, name = key.split("|")
        moments.setdefault(int(number), {})[name] = tensors.pop(key)
    model.load_state_dict(tensors, strict=False)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state


def check_folder(folder: str | Path | None, config: Any) -> None:
    """Raises ValueError where checkpoints have no folder, or one that has another run's."""
    if config.save_steps and folder is None:
        raise ValueError("save_steps: expected an output_dir to keep checkpoints in, got None")
    if config.save_steps and not config.resume:
        folder = Path(folder or "").expanduser()
        if found := [f.name for f in _complete(folder) if f.parent == folder]:
            raise ValueError(f"output_dir: {folder} has {found[0]} of another run; take a new one")


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints in or below `folder`, the last step's first."""
    found = [f.parent for f in (folder / RECORD, *folder.glob(f"**/checkpoint-*/{RECORD}"))]
    whole = [f for f in found if (f / RECORD).is_file() and f.name.rpartition("-")[2].isdigit()]
    return sorted(whole, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
