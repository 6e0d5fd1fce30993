"""Full fine-tuning: every weight trains, and what can be done about what is forgotten meanwhile.

The standard procedure is `training.sft` on a model as it is. This room holds the remedies of
chapter 5.2.3, which change which weights train, the loss, or the rows:

    L = L_task + alpha · mean_i (p_i - p0_i)²         the pull to the pretrained weights p0

(L2-SP: Li, Grandvalet and Davoine 2018), replay of pretraining text among the tuning rows, and
frozen lower layers. The pull is a mean over all N weights, not a sum as in the chapter, so its
value at a given typical step away from p0, and with it alpha, is the same for small and large
models: alpha here is N times the chapter's. A lower learning rate needs no code; LoRA has a room
of its own. Left out: penalties weighted by importance (EWC) and distillation from the old model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

DTYPES = {"same": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FullConfig:
    """What trains and what holds it back; the defaults are plain full fine-tuning.

    `alpha`: weight of the pull. `replay`: share of pretraining text among all rows, from 0 to
    below 1. `frozen_layers`: how many of the lowest layers stay as they are;
    `frozen_embeddings`: whether the input embedding does (with it a head that shares its
    weight). `reference_dtype`: "same", or "bfloat16", which keeps p0 in half the memory.
    """

    alpha: float = 0.0
    replay: float = 0.0
    frozen_layers: int = 0
    frozen_embeddings: bool = False
    reference_dtype: str = "same"

    def __post_init__(self) -> None:
        _require("alpha", self.alpha, 0 <= self.alpha < math.inf, "a number from 0")
        _require("replay", self.replay, 0 <= self.replay < 1, "a share from 0 to below 1")
        whole = isinstance(self.frozen_layers, int) and not isinstance(self.frozen_layers, bool)
        _require("frozen_layers", self.frozen_layers, whole and self.frozen_layers >= 0,
                 "a whole number from 0")  # fmt: skip
        _require("reference_dtype", self.reference_dtype, self.reference_dtype in DTYPES,
                 f"one of {', '.join(DTYPES)}")  # fmt: skip


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def keep(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Detached copies of the weights that train, by name, each on the device of its weight.

    `dtype` stores them in fewer bytes. What rounding changes is a pull that is there at the
    start already, unless the weights were stored in that type before, as published ones are.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require("model", type(model).__name__, bool(trained), "one with weights that train")
    return {n: p.detach().to(dtype or p.dtype, copy=True) for n, p in trained.items()}


def l2_pull(model: nn.Module, reference: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """mean_i (p_i - p0_i)² over all N weights named in `reference`: a float32 scalar.

    Its gradient is 2 (p - p0) / N. Raises ValueError for a weight the model does not have.
    """
    weights = dict(model.named_parameters())
    for name, p0 in reference.items():
        found = tuple(weights[name].shape) if name in weights else "no such weight"
        _require(f"reference: {name}", found, found == tuple(p0.shape), str(tuple(p0.shape)))
    squares = [(weights[name].float() - p0.float()).square().sum()
               for name, p0 in reference.items()]  # fmt: skip
    return torch.stack(squares).sum() / sum(p0.numel() for p0 in reference.values())


def regularized(
    loss: torch.Tensor, model: nn.Module, reference: Mapping[str, torch.Tensor], alpha: float
) -> torch.Tensor:
    """loss + alpha · l2_pull, as a new tensor: the caller's loss stays what it was."""
    return loss + alpha * l2_pull(model, reference)


def pull(model: nn.Module, config: FullConfig) -> Callable[[nn.Module], torch.Tensor] | None:
    """The pull to the weights that `model` has now, for `training.sft(extra_loss=…)`.

    None where alpha is 0, so that no copy is made.
    """
    if config.alpha == 0:
        return None
    reference = keep(model, DTYPES[config.reference_dtype])
    return lambda current: config.alpha * l2_pull(current, reference)


def attach(model: Any, config: FullConfig) -> Any:
    """`model`, in place, with every weight trainable but those that `config` freezes."""
    stack = layers(model)
    _require("frozen_layers", config.frozen_layers, config.frozen_layers <= len(stack),
             f"at most {len(stack)}, the layers of this model")  # fmt: skip
    model.requires_grad_(True)
    for layer in stack[: config.frozen_layers]:
        layer.requires_grad_(False)
    if config.frozen_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model


def layers(model: Any) -> list[nn.Module]:
    """The transformer's layers, lowest first, whatever the architecture calls them."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ValueError(f"model: expected a list of {depth} layers, as its configuration says, "
                     f"got a {type(model).__name__} without one")  # fmt: skip


def mix_replay(
    rows: Sequence[dict], texts: Sequence[str], share: float, seed: int = 0
) -> list[dict]:
    """All of `rows` and so many of `texts` as {"text": …} that these are `share` of the mixture.

    Rounded to whole rows, drawn without replacement, shuffled by `seed`. A text carries loss on
    all of its tokens, a row on its response only, so the share of the loss is larger.
    Raises ValueError if there are too few texts.
    """
    _require("share", share, 0 <= share < 1, "a share from 0 to below 1")
    count = round(len(rows) * share / (1 - share))
    _require("texts", len(texts), len(texts) >= count, f"at least {count} for a share of {share}")
    chance = random.Random(seed)
    mixed = [*rows, *({"text": text} for text in chance.sample(list(texts), count))]
    if count:
        chance.shuffle(mixed)
    return mixed
