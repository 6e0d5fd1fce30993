"""LoRA: a weight stays as it is and learns a correction of low rank (Hu et al. 2021).

    h = W0 x + (alpha / r) B A x        W0 (d, k) frozen, B (d, r) and A (r, k) trained

A starts random and B at zero, so a model begins as itself; r (d + k) numbers train in place of
d·k; and since B A has the shape of W0 it can be added into it, which leaves no trace at
inference. `LoRALinear` and `inject` are the method to read; `attach` hands the everyday work to
PEFT, with the same checks. Left out: quantized weights (`qlora`), embeddings, DoRA and other
variants (PEFT has them).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

ALL = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """`rank` r of the update, `alpha` of its scale alpha / r, `dropout` of what enters A.

    `targets`: "all-linear" (every linear layer but the output head), or names of layers, such
    as ("q_proj", "v_proj") or "q_proj,v_proj".
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL

    def __post_init__(self) -> None:
        targets = self.targets
        if isinstance(targets, str) and targets != ALL:
            targets = tuple(name.strip() for name in targets.split(",") if name.strip())
        object.__setattr__(self, "targets", targets if targets == ALL else tuple(targets))
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        _require("rank", self.rank, whole and self.rank >= 1, "a whole number from 1")
        _require("alpha", self.alpha, 0 < self.alpha < math.inf, "a number above 0")
        _require("dropout", self.dropout, 0 <= self.dropout < 1, "a share from 0 to below 1")
        _require("targets", self.targets, bool(self.targets), f"{ALL!r} or names of layers")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable update: h = W0 x + b + scale · B A x.

    `base` is an `nn.Linear`, or GPT-2's `Conv1D`, which stores W0 transposed. `A` is (r, in),
    `B` is (out, r); they are kept in float32 where W0 has half precision, whose steps of
    1/128 would swallow small updates. Maps (…, in) to (…, out).
    """

    def __init__(self, base: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        out, width = weight_shape(base)
        weight = base.weight
        dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        self.base, self.scale, self.merged = base.requires_grad_(False), config.scale, False
        self.A = nn.Parameter(torch.empty(config.rank, width, dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(out, config.rank, dtype=dtype, device=weight.device))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)
        if self.merged:
            return h
        update = self.dropout(x.to(self.A.dtype)) @ self.A.T @ self.B.T
        return (h + self.scale * update).to(h.dtype)

    def delta(self) -> torch.Tensor:
        """The update of the weight, scale · B A, in the layout in which `base` stores it."""
        delta = self.scale * self.B @ self.A
        return delta.T if isinstance(self.base, Conv1D) else delta


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, however it stores its weight."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def inject(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freezes every parameter of `model` and wraps its target layers, in place.

    Returns the model (or, if it is itself a linear layer, its wrapper). Raises ValueError for
    a model that already has adapters, and for targets that are not there or not linear.
    """
    found = find_targets(model, config.targets)
    model.requires_grad_(False)
    for name, layer in found.items():
        wrapped = LoRALinear(layer, config).train(layer.training)
        if name == "":
            return wrapped
        parent, _, child = name.rpartition(".")  # a top-level layer's parent is the model, ""
        setattr(model.get_submodule(parent), child, wrapped)
    return model


def find_targets(model: nn.Module, targets: str | tuple[str, ...] = ALL) -> dict[str, nn.Module]:
    """The layers that `targets` mean, by full name; see `inject` for what is refused.

    A target is a layer's last name or a longer ending of its full name, as in PEFT.
    """
    if hasattr(model, "peft_config") or any(_wrapped(model)):
        raise ValueError("model: expected one without adapters, got one that has them already; "
                         "merge them, or load the model again")  # fmt: skip
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if targets == ALL:
        head = _head(model)
        found = {name: layer for name, layer in linear.items() if layer is not head}
        _require("targets", targets, bool(found), "a model with linear layers")
        return found
    known = dict(model.named_modules())
    chosen = {n: known[n] for target in targets for n in _matching(target, known, linear)}
    embedding = _embedding(model)
    for name, layer in chosen.items():
        if embedding is not None and layer.weight is embedding.weight:
            raise ValueError(f"targets: {name!r} shares its weight with the input embedding, which "
                             "would change with it; leave it out")  # fmt: skip
    return {name: layer for name, layer in known.items() if name in chosen}


def _matching(target: str, known: Mapping[str, Any], linear: Mapping[str, Any]) -> list[str]:
    names = [name for name in known if name == target or name.endswith("." + target)]
    wrong = [name for name in names if name not in linear]
    if names and not wrong:
        return names
    got = f"{wrong[0]!r} is a {type(known[wrong[0]]).__name__}" if wrong else "no layer has it"
    available = sorted({name.rpartition(".")[2] for name in linear})
    raise ValueError(f"targets: expected names of linear layers, got {target!r}, and {got}; "
                     f"this model has {', '.join(available)}")  # fmt: skip


def _head(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _embedding(model: nn.Module) -> nn.Module | None:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def _wrapped(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear))


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds each update into its weight, W = W0 + scale · B A, so inference costs nothing more.

    In half precision the sum is rounded, so the merged model differs by that rounding.
    """
    for _, layer in _wrapped(model):
        _require("model", layer.base.weight.dtype, layer.base.weight.is_floating_point(),
                 "weights that are not quantized")  # fmt: skip
        if not layer.merged:
            layer.base.weight += layer.delta().to(layer.base.weight.dtype)
            layer.merged = True
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Takes the updates out again; W0 comes back up to rounding."""
    for _, layer in _wrapped(model):
        if layer.merged:
            layer.base.weight -= layer.delta().to(layer.base.weight.dtype)
            layer.merged = False
    return model


def lora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all A and B by name: the whole adapter, small enough to keep one per task."""
    state = {f"{name}.{part}".lstrip("."): getattr(layer, part).detach().clone()
             for name, layer in _wrapped(model) for part in "AB"}  # fmt: skip
    _require("model", type(model).__name__, bool(state), "a model prepared by inject")
    return state


@torch.no_grad()
def load_lora_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies an adapter into `model`. Raises ValueError unless names and shapes all fit."""
    shapes = {name: tuple(tensor.shape) for name, tensor in lora_state(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted({*shapes, *given}):
        expected, got = shapes.get(name, "no such layer"), given.get(name, "nothing")
        _require(f"state: {name}", got, expected == got, str(expected))
    if any(layer.merged for _, layer in _wrapped(model)):
        raise ValueError("model: expected separate updates, got merged ones; call unmerge first")
    for name, layer in _wrapped(model):
        for part in "AB":
            getattr(layer, part).copy_(state[f"{name}.{part}".lstrip(".")])


def swap(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Puts another adapter into `model` and returns the one that was there."""
    former = lora_state(model)
    load_lora_state(model, state)
    return former


def attach(model: Any, config: LoraConfig) -> Any:
    """`model` as a PEFT model with the same adapters as `inject`; only they train.

    Raises the same errors, before PEFT is imported.
    """
    found = find_targets(model, config.targets)
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    targets = ALL if config.targets == ALL else list(config.targets)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in found.values()),
        task_type="CAUSAL_LM",
    )
    with _without_renaming_warning():
        return get_peft_model(model, peft_config)


def restore(model: Any, folder: str | Path) -> Any:
    """`model` with the adapter that `models.save` or PEFT wrote to `folder`, in eval mode."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"folder: expected a saved adapter (adapter_config.json), found "
                                f"none in {folder}")  # fmt: skip
    from peft import PeftModel

    with _without_renaming_warning():
        return PeftModel.from_pretrained(model, folder).eval()


@contextlib.contextmanager
def _without_renaming_warning() -> Iterator[None]:
    """PEFT asks the model for an attribute that transformers has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield
