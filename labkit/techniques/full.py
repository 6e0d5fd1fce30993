"""Full fine-tuning: every weight trains, and what can be done about what is forgotten meanwhile.

The standard procedure is `training.fit` on a model as it is. Here are the remedies of chapter
5.2.3, which change which weights train, the loss, or the examples:

    L = L_task + alpha · mean_i (p_i - p0_i)²        the L2-SP penalty, p0 the pretrained weights

(Li, Grandvalet and Davoine 2018), replay of pretraining text among the examples, and frozen lower
layers. The penalty is a mean over all N weights, not a sum as in the chapter, so that one alpha
suits small and large models: it is N times the chapter's. A lower learning rate needs no code. Left
out: penalties weighted by importance (EWC) and distillation from the old model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    """Detached copies of the weights that train, by name, each on the device of its weight.

    `dtype` stores them in fewer bytes. What rounding changes is a penalty from the start, unless
    the weights were stored in that type before, as published ones are.
    """
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.detach().to(dtype or p.dtype, copy=True) for name, p in trained}


def l2_sp(model: nn.Module, reference: Mapping[str, Tensor]) -> Tensor:
    """mean_i (p_i - p0_i)² over all N weights named in `reference`: a float32 scalar.

    Its gradient is 2 (p - p0) / N. Raises ValueError for a weight the model does not have.
    """
    weights = dict(model.named_parameters())
    for name, p0 in reference.items():
        if name not in weights or weights[name].shape != p0.shape:
            raise ValueError(f"reference: {name} {tuple(p0.shape)} is no weight of the model")
    squares = [(weights[n].float() - p0.float()).square().sum() for n, p0 in reference.items()]
    return torch.stack(squares).sum() / sum(p0.numel() for p0 in reference.values())


def penalty(model: nn.Module, config: FullConfig) -> Callable[[nn.Module], Tensor] | None:
    """alpha · L2-SP towards the weights that `model` has now, for `training.fit(extra_loss=…)`.

    None where alpha is 0, so that no copy is made.
    """
    if config.alpha == 0:
        return None
    half = config.reference_dtype == "bfloat16"
    reference = reference_weights(model, torch.bfloat16 if half else None)
    return lambda current: config.alpha * l2_sp(current, reference)


def attach(model: Any, config: FullConfig) -> Any:
    """`model`, in place, with every weight trainable but those that `config` freezes."""
    stack = layers(model)
    if config.frozen_layers > len(stack):
        raise ValueError(
            f"frozen_layers: expected at most {len(stack)}, got {config.frozen_layers}"
        )
    model.requires_grad_(True)
    for layer in stack[: config.frozen_layers]:
        layer.requires_grad_(False)
    if config.frozen_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model


def layers(model: Any) -> list[nn.Module]:
    """The transformer's layers, lowest first, whatever the architecture calls them."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ValueError(f"model: expected a list of {depth} layers in a {type(model).__name__}")


def mix_replay(rows: Sequence[dict], texts: Sequence[str], share: float, seed: int = 0) -> list:
    """All of `rows` and so many of `texts` as {"text": …} that these are `share` of the mixture.

    Rounded to whole rows, drawn without replacement, shuffled by `seed`. A text carries loss on
    all of its tokens, a row on its response only, so the share of the loss is larger.
    """
    count = round(len(rows) * share / (1 - share))
    rng = random.Random(seed)
    mixed = [*rows, *({"text": text} for text in rng.sample(list(texts), count))]
    if count:
        rng.shuffle(mixed)
    return mixed
