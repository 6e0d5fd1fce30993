"""Log-probabilities of responses, and masked statistics: their one home.

    log p(y | x) = sum over response tokens t of log p(x_t | x_<t)

Every loss and comparison of models reads them from here, so that masks and shifts cannot drift
apart. Only the N positions that predict a response token enter the output head: neither prompts
nor padding cost logits. Logits are float32, masks are 1 = keep. Shapes: E examples, N response
tokens, V vocabulary entries, H hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.batching import Batch, Example, pack
from labkit.models import base_model


def response_logps(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log p of each response token of a batch: (N,) float32, in the order of `batch.targets`."""
    return response_outputs(model, batch, temperature)[2]


def response_outputs(
    model: nn.Module, batch: Batch, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, H), logits (N, V) and log-probabilities (N,) of the response tokens."""
    hidden, output = forward(model, batch)
    return hidden, *token_logps(output, batch, temperature)


def token_logps(output: Any, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits (N, V) over the temperature, and log-probabilities (N,), of what `forward` gave."""
    logits = output.logits.float()
    logits = logits if temperature == 1.0 else logits / temperature
    return logits, -F.cross_entropy(logits, batch.targets, reduction="none")


def forward(model: nn.Module, batch: Batch, **options: Any) -> tuple[Tensor, Any]:
    """Hidden states (N, H) before the output head, and the model's output with logits (N, V).

    The model runs as usual, wrapped or not; only what enters its output head is narrowed to (N, H).
    """
    ids, kept = batch.input_ids, []
    if batch.position_ids is not None:
        options["position_ids"] = batch.position_ids

    def narrow(module: nn.Module, args: tuple) -> tuple:
        soft = args[0].shape[1] - ids.shape[1]  # tokens that a soft prompt puts in front
        places = batch.positions + soft * (batch.positions // ids.shape[1] + 1)
        kept.append(args[0].flatten(0, 1).index_select(0, places))
        return kept[0], *args[1:]

    with base_model(model).get_output_embeddings().register_forward_pre_hook(narrow):
        output = model(input_ids=ids, use_cache=False, **options)
    return kept[0], output


def router_coefficient(model: nn.Module) -> float:
    """The weight of a mixture of experts' auxiliary loss; 0 for other models."""
    base: Any = base_model(model)
    if not hasattr(base, "num_experts"):
        return 0.0
    return getattr(base, "router_aux_loss_coef", getattr(base, "aux_loss_coef", 0.0))


def router_loss(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    """The auxiliary loss that balances the experts, as in transformers, over real tokens."""
    base = base_model(model)
    balance = vars(sys.modules[type(base).__module__])["load_balancing_loss_func"]
    return balance(output.router_logits, base.num_experts, base.num_experts_per_tok, batch.mask)


def sum_by_example(values: Tensor, batch: Batch) -> Tensor:
    """Of values (N,) for response tokens, each example's sum: (E,)."""
    return values.new_zeros(batch.size).index_add(0, batch.example, values)


def mean_by_example(values: Tensor, batch: Batch) -> Tensor:
    """Of values (N,) for response tokens, each example's mean: (E,)."""
    return sum_by_example(values, batch) / sum_by_example(torch.ones_like(values), batch)


def keeps_apart(model: nn.Module) -> bool:
    """Whether packed examples do not see each other, tried on two short ones.

    The gradient of the second's hidden states in the first's embeddings must be 0 to the last bit.
    (The states themselves may move by rounding: the experts of a mixture share products.) A soft
    prompt stands before the first example only, some models see across restarted positions, and
    flash-attention in transformers does where a batch has several sequences. False without weights.
    """
    backbone, device = base_model(model).base_model, next(model.parameters()).device
    accepted = inspect.signature(backbone.forward).parameters
    if has_soft_prompt(model) or "position_ids" not in accepted or device.type == "meta":
        return False
    if "flash" in (getattr(backbone.config, "_attn_implementation", None) or ""):
        return False
    embedding, embedded = backbone.get_input_embeddings(), []
    texts = [np.arange(1, n) % embedding.num_embeddings for n in (7, 5)]
    batch = pack([Example(ids, np.ones_like(ids)) for ids in texts]).to(device)

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        embedded.append(output.requires_grad_())

    plain = torch.autocast(device.type, enabled=False)
    with embedding.register_forward_hook(keep), evaluating(model), torch.enable_grad(), plain:
        both = (t for t in (batch.input_ids, batch.position_ids) if t is not None)
        ids, places = (t[:, : batch.tokens] for t in both)  # without padding, to save memory
        hidden = backbone(ids, position_ids=places, use_cache=False)[0]
    second = hidden.flatten(0, 1)[batch.starts[1] : batch.ends[1] + 1]
    varied = torch.linspace(-1, 1, second.numel()).view_as(second).to(second)  # no norm cancels it
    (gradient,) = torch.autograd.grad(second, embedded, varied)
    return not gradient.flatten(0, 1)[batch.starts[0] : batch.ends[0] + 1].any()


def has_soft_prompt(model: nn.Module) -> bool:
    """Whether a PEFT method puts virtual tokens in front of the text."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its own mode back, which may differ by part."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (float32) where `mask`, of x's shape, is set; NaN where it is nowhere."""
    if x.shape != mask.shape:
        raise ValueError(f"mask: expected shape {tuple(x.shape)} of x, got {tuple(mask.shape)}")
    kept = mask.bool()  # a product with it would let a masked NaN through
    return x.float().masked_fill(~kept, 0.0).sum() / kept.sum()


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(variance + eps) over the kept entries; 0 elsewhere.

    The variance is the population's, as in openai/lm-human-preferences.
    """
    centred = x.float() - masked_mean(x, mask)
    variance = masked_mean(centred**2, mask)
    return (centred * torch.rsqrt(variance + eps)).masked_fill(~mask.bool(), 0.0)
