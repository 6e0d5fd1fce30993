"""Log-probabilities of responses, and masked statistics: their one home.

    log p(y | x) = sum over response tokens t of log p(x_t | x_<t)

Every loss and every comparison of models (SFT, DPO, ORPO, PPO, perplexity) reads them from here,
so that masks and shifts cannot drift apart. Only the N positions that predict a response token
enter the output head: neither prompts nor padding cost logits. Logits are float32, masks are
1 = keep. Shapes: E examples, N response tokens, V vocabulary entries, H hidden size.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.batching import Batch, Example, pack
from labkit.models import base_model

# Right padding needs no mask in a causal model; older ones, such as GPT-2, ask for one all the same.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)


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

    The model runs as usual, wrapped or not; only what enters its output head is narrowed from
    (B, T, H) to (N, H), so whatever it does to its logits still holds.
    """
    ids, kept = batch.input_ids, []
    if batch.position_ids is not None:
        options["position_ids"] = batch.position_ids

    def narrow(module: nn.Module, args: tuple) -> tuple:
        soft = args[0].shape[1] - ids.shape[1]  # tokens that a soft prompt puts in front
        row = batch.positions.div(ids.shape[1], rounding_mode="floor")
        kept.append(args[0].flatten(0, 1).index_select(0, batch.positions + soft * (row + 1)))
        return kept[0], *args[1:]

    head = base_model(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(narrow)
    try:
        output = model(input_ids=ids, use_cache=False, **options)
    finally:
        handle.remove()
    return kept[0], output


def router_coefficient(model: nn.Module) -> float:
    """The weight of a mixture of experts' auxiliary loss; 0 for other models."""
    base = base_model(model)
    return getattr(base, "router_aux_loss_coef", 0.0) if hasattr(base, "num_experts") else 0.0


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


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether packed examples do not see each other, tried exactly on two short ones.

    The first is exchanged; the second's hidden states must stay what they are to the last bit. A soft
    prompt stands before a sequence's first example only, and some architectures carry positions
    or a state of their own across position ids that restart.
    """
    if has_soft_prompt(model):
        return False
    backbone, device = base_model(model).base_model, next(model.parameters()).device
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return False
    last = backbone.get_input_embeddings().num_embeddings - 1

    def second(first: list[int]) -> Tensor:
        texts = [np.minimum(ids, last) for ids in (first, [3, 4, 5, 6])]
        batch = pack([Example(ids, np.ones_like(ids)) for ids in texts]).to(device)
        hidden = backbone(batch.input_ids, position_ids=batch.position_ids, use_cache=False)[0]
        return hidden.flatten(0, 1)[batch.starts[1] : batch.ends[1] + 1]

    with evaluating(model), torch.autocast(device.type, enabled=False):
        return torch.equal(second([1, 2, 3, 4, 5, 6]), second([6, 5, 1, 2, 2, 1]))


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


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x (float32) where `mask`, of x's shape, is set, over `dim` or everything.

    NaN where nothing is set: there is no mean of nothing.
    """
    if x.shape != mask.shape:
        raise ValueError(f"mask: expected shape {tuple(x.shape)} of x, got {tuple(mask.shape)}")
    kept, count = _kept(x.float(), mask), mask.bool()
    if dim is None:
        return kept.sum() / count.sum()
    return kept.sum(dim) / count.sum(dim)


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(variance + eps) over the kept entries; 0 elsewhere.

    The kept entries then have mean 0 and mean square 1 (population variance, as in
    openai/lm-human-preferences).
    """
    centred = x.float() - masked_mean(x, mask)
    variance = masked_mean(centred**2, mask)
    return _kept(centred * torch.rsqrt(variance + eps), mask)


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is set, 0 elsewhere; a product would let a masked NaN through."""
    return x.masked_fill(~mask.bool(), 0.0)
