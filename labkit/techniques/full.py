"""Full fine-tuning: every weight trains, and what can be done about what is forgotten meanwhile.

The standard procedure is `training.fit` on a model as it is. Here are the remedies of chapter
5.2.3, which change which weights train, the loss, or the examples:

    L = L_task + alpha · mean_i (p_i - p0_i)²        the L2-SP penalty, p0 the pretrained weights

(Li, Grandvalet and Davoine 2018), replay of pretraining text, and frozen lower layers. The penalty
is a mean over all N weights, so that one alpha suits small and large models: it is N times the
chapter's, whose penalty is a sum. Left out: weighted penalties (EWC), distillation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from labkit import models
from labkit.config import Natural, NonNegative, Share, settings


@settings
class FullConfig:
    """What trains and what holds it back; the defaults are plain full fine-tuning.

    `alpha` weighs the penalty, `replay` is the share of pretraining text among all examples.
    Frozen are the `frozen_layers` lowest layers, with `frozen_embeddings` the input embedding (and
    a tied head). `reference_dtype` "bfloat16" keeps p0 in half the memory.
    """

    alpha: NonNegative = 0.0
    replay: Share = 0.0
    frozen_layers: Natural = 0
    frozen_embeddings: bool = False
    reference_dtype: Literal["same", "bfloat16"] = "same"


def reference_weights(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of the weights that train, by name. What `dtype` rounds is a penalty from the start."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.detach().to(dtype or p.dtype, copy=True) for name, p in trained}


def l2_sp(model: nn.Module, reference: Mapping[str, Tensor]) -> Tensor:
    """mean_i (p_i - p0_i)² over all N weights in `reference`, float32; its gradient 2 (p - p0) / N."""
    squares = [
        (model.get_parameter(name).float() - p0.float()).square().sum()
        for name, p0 in reference.items()
    ]
    return torch.stack(squares).sum() / sum(p0.numel() for p0 in reference.values())


def penalty(model: nn.Module, config: FullConfig) -> Callable[[nn.Module], Tensor] | None:
    """alpha · L2-SP towards the weights of now, for `training.fit(extra_loss=…)`; None for alpha 0."""
    if config.alpha == 0:
        return None
    half = config.reference_dtype == "bfloat16"
    reference = reference_weights(model, torch.bfloat16 if half else None)
    return lambda current: config.alpha * l2_sp(current, reference)


def attach(model: Any, config: FullConfig) -> Any:
    """`model`, in place, with every weight trainable but those that `config` freezes."""
    stack = layers(model)
    if config.frozen_layers > len(stack):
        raise ValueError(f"frozen_layers: expected at most {len(stack)}")
    model.requires_grad_(True)
    for layer in stack[: config.frozen_layers]:
        layer.requires_grad_(False)
    if config.frozen_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model


def layers(model: Any) -> list[nn.Module]:
    """The transformer's layers, lowest first."""
    return list(models.blocks(model).values())


def mix_replay(rows: Sequence[dict], texts: Sequence[str], share: float, seed: int = 0) -> list:
    """All of `rows` and so many of `texts` as {"text": …} that these are `share` of the mixture.

    Drawn without replacement, shuffled by `seed`. A text carries loss on all of its tokens, a row
    on its response only, so the share of the loss is larger.
    """
    count, rng = round(len(rows) * share / (1 - share)), random.Random(seed)
    mixed = [*rows, *({"text": text} for text in rng.sample(list(texts), count))]
    if count:
        rng.shuffle(mixed)
    return mixed
