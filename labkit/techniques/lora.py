"""LoRA: a weight stays as it is and learns a correction of low rank (Hu et al. 2021).

    h = W0 x + (alpha / r) B A x        W0 (d, k) frozen, B (d, r) and A (r, k) trained

B starts at zero, so a model starts as itself; B A can be added to W0, and then costs nothing.
`LoRALinear` and `inject` are the method to read; `attach` is the same by PEFT.
"""

from __future__ import annotations

import inspect
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
    """`targets`: "all-linear" (but the output head), or such as ("q_proj",) or "q_proj,v_proj"."""

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Share = 0.0
    targets: Annotated[str | tuple[str, ...], Field(min_length=1)] = ALL


class LoRALinear(nn.Module):
    """A frozen linear layer `base` and its update, (…, in) to (…, out): h = W0 x + b + scale · B A x.

    `A` is (r, in), `B` (out, r), float32 also where W0 is half precision, whose steps of 1/128
    would swallow small updates.
    """

    def __init__(self, base: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        weight = out_in(base)
        half = weight.dtype in (torch.float16, torch.bfloat16)
        kind = {"dtype": torch.float32 if half else weight.dtype, "device": weight.device}
        self.base, self.merged = base.requires_grad_(False), False
        self.scale = config.alpha / config.rank
        self.A = nn.Parameter(torch.empty(config.rank, weight.shape[1], **kind))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], config.rank, **kind))
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


def out_in(layer: Any) -> torch.Tensor:
    """A layer's weight as (out, in); GPT-2's `Conv1D` stores it transposed."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def inject(model: nn.Module, config: LoraConfig) -> nn.Module:
    """`model`, in place, with every parameter frozen and a `LoRALinear` around each target layer.

    Raises ValueError for a model with adapters, and for targets that are missing or not linear.
    """
    found = find_targets(model, config.targets).values()
    model.requires_grad_(False)
    return replace(model, {layer: LoRALinear(layer, config) for layer in found})


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`model`, in place, with modules exchanged for new ones, in the same train or eval mode."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in new:
                setattr(parent, name, new[child].train(child.training))
    return new.get(model, model)


def find_targets(model: nn.Module, targets: str | tuple[str, ...] = ALL) -> dict[str, nn.Module]:
    """The layers that `targets` mean, by full name, of which a target is an ending, as in PEFT."""
    if hasattr(model, "peft_config") or _wrapped(model):
        raise ValueError("model: expected no adapters, got some; merge them, or load it again")
    linear = _adaptable(model)
    if targets == ALL:
        return {name: linear[name] for name in models.linear_layers(model) if name in linear}
    embedding = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "weight", None)
    chosen: set[str] = set()
    for target in targets.split(",") if isinstance(targets, str) else targets:
        ending = f".{target.strip()}"
        names = {name for name, _ in model.named_modules() if f".{name}".endswith(ending)}
        if not names or any(n not in linear or linear[n].weight is embedding for n in names):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"targets: expected linear, untied ones of {known}, got {target!r}")
        chosen |= names
    return {name: layer for name, layer in linear.items() if name in chosen}


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers that can have an update: a state-space model reads some weights itself, some
    routers give more than a product, and PEFT would exchange layers named as a mixture's experts
    once were for these, 3-D parameters now.
    """
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    linear = models.linear_layers(model, head=True)
    for name in list(linear):
        path, _, own = name.rpartition(".")
        parent, kind = model.get_submodule(path), type(linear[name]).__name__
        read = hasattr(parent, "A_log") and f"self.{own}.weight" in inspect.getsource(type(parent))
        if read or kind.endswith("Router"):
            del linear[name]
    config = peft.LoraConfig(target_modules=list(linear))
    convert_peft_config_for_transformers(config, model, None)
    return {name: layer for name, layer in linear.items() if name in config.target_modules}


def _wrapped(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds each update to its weight, W = W0 + scale · B A, so inference costs nothing more.

    Raises ValueError, with nothing merged, for a sum of inf or NaN: it could not be undone.
    """
    layers = {name: layer for name, layer in _wrapped(model).items() if not layer.merged}
    for write in (False, True):
        for name, layer in layers.items():
            weight = layer.base.get_parameter("weight")  # a quantized layer has none
            total = weight + layer.delta().to(weight.dtype)
            if write:
                weight.copy_(total)
                layer.merged = True
            elif not total.isfinite().all():
                raise ValueError(f"model: expected finite weights and adapters, not so in {name}")
    return model


def lora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all A and B by name: the whole adapter, small enough to keep one per task."""
    state = model.state_dict().items()
    return {name: t.clone() for name, t in state if name.rpartition(".")[2] in ("A", "B")}


def load_lora_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copies an adapter into `model`. Raises ValueError unless names and shapes all fit."""
    if any(layer.merged for layer in _wrapped(model).values()):
        raise ValueError("model: expected separate updates, got merged ones; load it again")
    expected, got = ({n: t.shape for n, t in s.items()} for s in (lora_state(model), state))
    if wrong := expected.items() ^ got.items():
        raise ValueError(f"state: names or shapes do not fit the model: {min(wrong)}")
    model.load_state_dict(state, strict=False)


def attach(model: Any, config: LoraConfig) -> Any:
    """`model` as a PEFT model with the same adapters as `inject`; only they train."""
    import peft

    found = find_targets(model, config.targets)
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(found),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in found.values()),
        task_type="CAUSAL_LM",
    )
    with models.quiet_peft():
        return peft.get_peft_model(model, peft_config)
