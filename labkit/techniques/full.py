"""Full fine-tuning: every weight trains, and what can be done about what is forgotten meanwhile.

The standard procedure is `training.fit` on a model as it is. The remedies of chapter 5.2.3:

    L = L_task + alpha · mean_i (p_i - p0_i)²        the L2-SP penalty, p0 the pretrained weights

(Li, Grandvalet and Davoine 2018), replay of pretraining text, and frozen lower layers. A mean over
all N weights lets one alpha suit small and large models: it is N times that of the chapter's sum.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit import models
from labkit.config import Natural, NonNegative, Share, settings


@settings
class FullConfig:
    """What trains and what holds it back; the defaults are plain full fine-tuning.

    `alpha` weighs the penalty, `replay` is the share of pretraining text among all examples. Frozen
    are the `frozen_layers` lowest layers, and the input embedding with its tied head.
    """

    alpha: NonNegative = 0.0
    replay: Share = 0.0
    frozen_layers: Natural = 0
    frozen_embeddings: bool = False


def reference_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that train, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def l2_sp(model: nn.Module, reference: Mapping[str, Tensor]) -> Tensor:
    """mean_i (p_i - p0_i)² over all N weights in `reference`, float32; its gradient 2 (p - p0) / N."""
    changes = [model.get_parameter(name).float() - p0.float() for name, p0 in reference.items()]
    squares = torch.stack([change.square().sum() for change in changes])
    return squares.sum() / sum(change.numel() for change in changes)


def penalty(model: nn.Module, config: FullConfig) -> Callable[[nn.Module], Tensor] | None:
    """alpha · L2-SP towards the weights of now, for `training.fit(extra_loss=…)`; None for alpha 0."""
    if config.alpha == 0:
        return None
    reference = reference_weights(model)
    return lambda current: config.alpha * l2_sp(current, reference)


def layers(model: Any) -> list[nn.Module]:
    """The transformer's layers, lowest first."""
    return list(models.blocks(model).values())


def attach(model: Any, config: FullConfig) -> Any:
    """`model`, in place, with every weight trainable but those that `config` freezes."""
    stack = layers(model)
    if config.frozen_layers > len(stack):
        raise ValueError(f"frozen_layers: expected at most {len(stack)}")
    model.requires_grad_(True)
    embedding = [model.get_input_embeddings()] if config.frozen_embeddings else []
    for frozen in (*stack[: config.frozen_layers], *embedding):
        frozen.requires_grad_(False)
    return model


def mix_replay(rows: Sequence[dict], texts: Sequence[str], share: float, seed: int = 0) -> list:
    """All of `rows` and so many of `texts` as {"text": …} that these are `share` of the mixture.

    Drawn without replacement. A text carries loss on all tokens, so the share of the loss is larger.
    """
    count, rng = round(len(rows) * share / (1 - share)), random.Random(seed)
    mixed = [*rows, *({"text": text} for text in rng.sample(list(texts), count))]
    if count:
        rng.shuffle(mixed)
    return mixed
