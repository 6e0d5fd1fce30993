"""LoRA: a weight stays as it is and learns a correction of low rank (Hu et al. 2021).

    h = W0 x + (alpha / r) B A x        W0 (d, k) frozen, B (d, r) and A (r, k) trained

A starts random and B at zero, so a model starts as itself; r (d + k) numbers train instead of
d·k; and B A can be added to W0, which leaves no trace at inference. `LoRALinear` and `inject`
are the method to read; `attach` is the same by PEFT. Left out: quantized weights (`qlora`),
embeddings, DoRA and other variants (PEFT has them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from transformers.pytorch_utils import Conv1D

from labkit import models
from labkit.config import Count, Positive, Share, settings

ALL = "all-linear"


@settings
class LoraConfig:
    """`rank` r of the update, `alpha` of its scale alpha / r, `dropout` before A.

    `targets`: "all-linear" (every linear layer except the output head), or names of layers, such
    as ("q_proj", "v_proj") or "q_proj,v_proj".
    """

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Share = 0.0
    targets: Annotated[str | tuple[str, ...], Field(min_length=1)] = ALL


class LoRALinear(nn.Module):
    """A frozen linear layer and its trainable update: h = W0 x + b + scale · B A x.

    `base` is an `nn.Linear`, or GPT-2's `Conv1D`, which stores W0 transposed. `A` is (r, in),
    `B` is (out, r); they are float32 where W0 has half precision, whose steps of 1/128 would
    swallow small updates. Maps (…, in) to (…, out).
    """

    def __init__(self, base: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        weight = base.weight
        out, width = weight.T.shape if isinstance(base, Conv1D) else weight.shape
        dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        self.base, self.merged = base.requires_grad_(False), False
        self.scale = config.alpha / config.rank
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


def inject(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freezes every parameter of `model` and wraps its target layers, in place.

    Returns the model (or, if it is itself a linear layer, its wrapper). Raises ValueError for
    a model that already has adapters, and for targets that are missing or not linear.
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
    if hasattr(model, "peft_config") or _wrapped(model):
        raise ValueError("model: expected no adapters, got some; merge them, or load it again")
    known = dict(model.named_modules())
    linear = {name: m for name, m in known.items() if isinstance(m, nn.Linear | Conv1D)}
    if targets == ALL:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return {name: layer for name, layer in linear.items() if layer is not head}
    embedding = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    chosen: set[str] = set()
    for target in targets.split(",") if isinstance(targets, str) else targets:
        target = target.strip()
        names = {name for name in known if f".{name}".endswith(f".{target}")}
        if not names or any(n not in linear or linear[n].weight is embedding for n in names):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"targets: expected linear layers, not tied, of {ends}, got {target!r}"
            )
        chosen |= names
    return {name: layer for name, layer in linear.items() if name in chosen}


def _wrapped(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def merge(model: nn.Module) -> nn.Module:
    """Adds each update to its weight, W = W0 + scale · B A, so inference costs nothing more.

    In half precision the sum is rounded, so the merged model differs by that rounding. Raises
    ValueError, with nothing merged, for inf or NaN in an adapter: it could not be undone.
    """
    for name, tensor in lora_state(model).items():
        if not tensor.isfinite().all():
            raise ValueError(f"model: {name}: expected finite numbers, got inf or NaN")
    return _set_merged(model, True)


def unmerge(model: nn.Module) -> nn.Module:
    """Takes the updates out again; W0 comes back up to rounding."""
    return _set_merged(model, False)


@torch.no_grad()
def _set_merged(model: nn.Module, merged: bool) -> nn.Module:
    for layer in _wrapped(model):
        if layer.merged != merged:
            weight = layer.base.get_parameter("weight")  # a quantized layer has none
            weight.add_(layer.delta().to(weight.dtype), alpha=1 if merged else -1)
            layer.merged = merged
    return model


def lora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all A and B by name: the whole adapter, small enough to keep one per task."""
    state = model.state_dict().items()
    return {name: t.clone() for name, t in state if name.rpartition(".")[2] in ("A", "B")}


def load_lora_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies an adapter into `model`. Raises ValueError unless names and shapes all fit."""
    if any(layer.merged for layer in _wrapped(model)):
        raise ValueError("model: expected separate updates, got merged ones; call unmerge first")
    expected, got = ({n: (*t.shape,) for n, t in s.items()} for s in (lora_state(model), state))
    if expected != got:
        name, _ = min(expected.items() ^ got.items())
        raise ValueError(f"state: {name}: expected {expected.get(name)}, got {got.get(name)}")
    model.load_state_dict(state, strict=False)


def attach(model: Any, config: LoraConfig) -> Any:
    """`model` as a PEFT model with the same adapters as `inject`; only they train.

    PEFT gets the layers by name: its own "all-linear" takes other ones in mixtures of experts.
    Raises the same errors, before PEFT is imported.
    """
    found = find_targets(model, config.targets)
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(found),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in found.values()),
        task_type="CAUSAL_LM",
    )
    with models.quiet_peft():
        return get_peft_model(model, peft_config)
