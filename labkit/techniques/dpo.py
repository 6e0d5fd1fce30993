"""DPO: preferences learned by a loss, without a reward model (Rafailov et al. 2023).

RLHF maximizes E[r(x, y)] - beta · KL(pi, pi_ref). Its best policy is pi(y|x) ∝ pi_ref(y|x) ·
exp(r(x, y) / beta), which says what the reward is: r = beta · log(pi / pi_ref) + a term of x
alone. Put into Bradley and Terry's probability that y_w is preferred to y_l, that term cancels:

    L = -log sigma(beta · h),   h = log(pi(y_w|x) / pi_ref(y_w|x)) - log(pi(y_l|x) / pi_ref(y_l|x))

Log-probabilities are sums over the response and its EOS. The reference is the model as it comes,
with the adapter that it may have: its log-probabilities are computed once, before training, so no
second model is held. Left out: other divergences, other losses of more than two responses.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from labkit import checkpoints, logprobs, models, training
from labkit.config import Count, NonNegative, Positive, settings
from labkit.formats import Row
from labkit.pairs import Pair, PairBatch, encode_pairs, pack_pairs


@settings
class DPOConfig(training.TrainConfig):
    """How pairs are read and learned; the other names are those of `training.TrainConfig`.

    `beta`: the larger, the closer to the reference. `variant`: "dpo"; "ipo" (Azar et al. 2023),
    (h - 1/(2 beta))², and "dpo_norm", both with h of means per token; "simpo" (Meng et al. 2024),
    means per token without a reference, less `margin`. `label_smoothing`: the fraction of pairs
    taken to be the wrong way round (conservative DPO). `nll` weighs the chosen response's mean
    negative log-likelihood per token, which keeps its probability from falling. `batch_size`
    counts pairs.
    """

    learning_rate: Positive = 1e-4
    batch_size: Count = 16
    beta: Positive = 0.1
    variant: Literal["dpo", "ipo", "dpo_norm", "simpo"] = "dpo"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    margin: NonNegative = 0.0
    nll: NonNegative = 0.0
    template: str = "auto"
    max_length: Annotated[int, Field(ge=2)] = 256


def loss(
    logps: Tensor, reference: Tensor, lengths: Tensor, config: DPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of P pairs, and metrics.

    `logps`, `reference` (P, 2): log-probabilities of the chosen and the rejected response under
    the policy and the reference, in nats; `lengths` (P, 2): their tokens. Metrics: what the
    policy implies as `reward_chosen` and `reward_rejected`, beta · log(pi / pi_ref); `accuracy`,
    the fraction of pairs in which the first is larger; `margin`, their difference; and the
    log-probabilities themselves.
    """
    ratios = logps if config.variant == "simpo" else logps - reference
    scores = ratios if config.variant == "dpo" else ratios / lengths
    h = scores[:, 0] - scores[:, 1]
    if config.variant == "ipo":
        value = (h - 1 / (2 * config.beta)) ** 2
    else:
        logits = config.beta * h - config.margin
        value = -(1 - config.label_smoothing) * F.logsigmoid(logits)
        value = value - config.label_smoothing * F.logsigmoid(-logits)
    value = value - config.nll * logps[:, 0] / lengths[:, 0]
    rewards, seen = config.beta * ratios.detach(), logps.detach().mean(0)
    metrics = {"reward_chosen": rewards[:, 0].mean(), "reward_rejected": rewards[:, 1].mean()}
    metrics["accuracy"] = (rewards[:, 0] > rewards[:, 1]).float().mean()
    metrics["margin"] = (rewards[:, 0] - rewards[:, 1]).mean()
    return value.mean(), metrics | {"logp_chosen": seen[0], "logp_rejected": seen[1]}


def pair_loss(
    model: nn.Module, batch: PairBatch, config: DPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` of a batch of pairs: what `training.fit` minimizes."""
    logps = logprobs.response_logps(model, batch)
    sums = logprobs.sum_by_example(logps, batch).view(-1, 2)
    lengths = logprobs.sum_by_example(torch.ones_like(logps), batch).view(-1, 2)
    if batch.reference is None and config.variant != "simpo":
        raise ValueError("pairs: expected reference log-probabilities; see with_reference")
    reference = torch.zeros_like(sums) if batch.reference is None else batch.reference
    return loss(sums, reference, lengths, config)


def with_reference(
    pairs: Sequence[Pair], model: Any, folder: str | Path | None = None
) -> list[Pair]:
    """The pairs with their log-probabilities under `model` as it is now, in eval mode.

    With a `folder` they are kept in a file there, whose name is a digest of the pairs' token ids
    (so of tokenizer and template, too) and of all weights and adapters of `model`; what is there
    is not computed again. They depend on `model`, so call it before training.
    """
    name = f"reference-{_digest(pairs, model)}.safetensors"
    file = Path(folder).expanduser() / name if folder is not None else None
    if file is not None and file.is_file():
        known = load_file(file)["logps"]
    else:
        known = _reference(pairs, model)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logps": known}, file)
    return [pair._replace(reference=row) for pair, row in zip(pairs, known, strict=True)]


@torch.no_grad()
def _reference(pairs: Sequence[Pair], model: Any, batch_size: int = 32) -> np.ndarray:
    device = next(model.parameters()).device
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].chosen.ids))
    known: np.ndarray = np.zeros((len(pairs), 2), dtype=np.float32)
    with logprobs.evaluating(model), models.autocast(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pack_pairs([pairs[i] for i in rows], packing=False).to(device)
            logps = logprobs.response_logps(model, batch)
            known[rows] = logprobs.sum_by_example(logps, batch).view(-1, 2).cpu().numpy()
    return known


def _digest(pairs: Sequence[Pair], model: nn.Module) -> str:
    crc = checkpoints.digest(pairs)
    for name, p in model.named_parameters():
        weights = p.detach().double()
        crc = zlib.crc32(f"{name} {weights.sum():.9e} {weights.abs().sum():.9e}".encode(), crc)
    return f"{crc:08x}"


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    config: DPOConfig | None = None,
    *,
    eval_rows: Sequence[Row] | None = None,
    output_dir: str | Path | None = None,
    **options: Any,
) -> training.TrainResult:
    """Trains `model` in place on rows with `chosen` and `rejected`, or `responses` and `ranks`.

    The reference is `model` as it comes; its log-probabilities of `rows` and `eval_rows` are kept
    in `output_dir`, and taken from there, or from where a run is resumed. There is no dropout.
    What is raised and `options` (`log`, `progress`, `label`, `again`) are as in `encode_pairs` and
    `training.fit`.
    """
    config = config or DPOConfig()
    limit = models.fitting(model, config.max_length)
    folder = config.resume or output_dir

    def encoded(rows: Sequence[Row]) -> list[Pair]:
        pairs = encode_pairs(rows, tokenizer, max_length=limit, template=config.template)
        return pairs if config.variant == "simpo" else with_reference(pairs, model, folder)

    pairs, held = encoded(rows), None if eval_rows is None else encoded(eval_rows)
    options |= dict(eval_examples=held, output_dir=output_dir, collate=pack_pairs, dropout=False)
    return training.fit(model, pairs, partial(pair_loss, config=config), config, **options)
