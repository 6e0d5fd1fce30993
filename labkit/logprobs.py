"""Log-probabilities of tokens and sequences, and masked statistics: their one home.

Every technique that compares models (DPO, ORPO, PPO) reads them from here, so that masks
and shifts cannot drift apart. Everything is computed in float32. Masks are 1 = keep.
Shapes: B sequences, T tokens, V vocabulary entries.
"""

import inspect

import torch
from torch import Tensor


def token_logps(logits: Tensor, input_ids: Tensor) -> Tensor:
    """log p(token t+1 | tokens up to t), for every token but the first.

    `logits` (B, T, V), `input_ids` (B, T) → (B, T-1), float32.
    """
    if logits.shape[:-1] != input_ids.shape:
        raise ValueError(
            f"logits: expected shape (B, T, V) matching input_ids {tuple(input_ids.shape)}, "
            f"got {tuple(logits.shape)}; pass the unshifted tensors"
        )
    logits = logits[:, :-1].float()
    chosen = logits.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def sequence_logps(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    average: bool = False,
) -> Tensor:
    """Sum (or mean, `average`) of the response tokens' log-probabilities: (B,), float32.

    All inputs are (B, T), padded left or right. A sequence's first token has no context,
    so it is not scored. A response without a scored token gives 0, and NaN as a mean.
    """
    logits = _forward(model, input_ids, attention_mask).logits
    context = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
    mask = response_mask[:, 1:].bool() & context
    logps = token_logps(logits, input_ids)
    return masked_mean(logps, mask, dim=-1) if average else _kept(logps, mask).sum(-1)


def _forward(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    extra = {}
    # models with relative positions (BLOOM, MPT) take none
    if "position_ids" in inspect.signature(inner.forward).parameters:
        extra["position_ids"] = position_ids(attention_mask)
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, from 0: (B, T) → (B, T), int64.

    Without them left padding would shift a sequence's positions. Padding gets a valid
    position that nothing attends to.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is set, 0 elsewhere; a product would let a masked NaN through."""
    return x.masked_fill(~mask.bool(), 0.0)


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
