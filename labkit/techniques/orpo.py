"""ORPO: instructions and preferences in one stage, without a reference (Hong et al. 2024).

    L = NLL(y_w) - lambda · log sigma(log odds(y_w|x) - log odds(y_l|x)),  odds = P / (1 - P)

P(y|x) is the geometric mean of the response's token probabilities, exp(mean log p): with sums, log
odds would be the log-probability itself, and explode. Near P = 1 the odds are infinite, and 1 - P
is lost in rounding: `log1mexp` is exact there, and P is held below 1 by a float32 step.
Left out: lengths other than the mean, schedules of lambda.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from labkit import logprobs, models, training
from labkit.config import Count, NonNegative, Positive, settings
from labkit.formats import Row
from labkit.pairs import PairBatch, encode_pairs, pack_pairs


@settings
class ORPOConfig(training.TrainConfig):
    """How pairs are read and learned; the other names are those of `training.TrainConfig`.

    `lam` is lambda, the weight of the odds ratio. `nll` falls on the chosen "response", or, as in
    TRL and the paper's code, on "all", its prompt included. `batch_size` counts pairs.
    """

    batch_size: Count = 16
    learning_rate: Positive = 1e-3
    lam: NonNegative = 0.1
    nll: Literal["response", "all"] = "response"
    template: str = "auto"
    max_length: Annotated[int, Field(ge=2)] = 256


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Mächler 2012)."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of mean log-probabilities: finite, and in float32, also where P is 1."""
    logp = logp.float().clamp(max=-torch.finfo(torch.float32).eps)
    return logp - log1mexp(logp)


def loss(mean_logps: Tensor, nll: Tensor, lam: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of P pairs, and metrics.

    `mean_logps` (P, 2): mean log-probabilities per token of the chosen and the rejected response,
    in nats; `nll` (P,): of the chosen example. Metrics: `nll`; `odds_ratio`, the mean of
    -log sigma(log odds ratio); `odds_share`, what it makes of the loss; `accuracy`, the
    fraction of pairs whose chosen response has the larger odds; `log_odds_ratio`.
    """
    ratio = log_odds(mean_logps[:, 0]) - log_odds(mean_logps[:, 1])
    penalty, likelihood = -F.logsigmoid(ratio).mean(), nll.mean()
    value = likelihood + lam * penalty
    seen = {"nll": likelihood, "odds_ratio": penalty, "odds_share": lam * penalty / value}
    seen |= {"accuracy": (ratio > 0).float().mean(), "log_odds_ratio": ratio.mean()}
    seen |= {"logp_chosen": mean_logps[:, 0].mean(), "logp_rejected": mean_logps[:, 1].mean()}
    return value, {name: tensor.detach() for name, tensor in seen.items()}


def pair_loss(
    model: nn.Module, batch: PairBatch, config: ORPOConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` of a batch of pairs: what `training.fit` minimizes."""
    logps, inside = logprobs.response_logps(model, batch), batch.in_response
    nll = -logprobs.mean_by_example(logps, batch)[::2]
    sums, counts = (
        logprobs.sum_by_example(values * inside, batch).view(-1, 2)
        for values in (logps, torch.ones_like(logps))
    )
    return loss(sums / counts, nll, config.lam)


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    config: ORPOConfig | None = None,
    *,
    eval_rows: Sequence[Row] | None = None,
    **options: Any,
) -> training.TrainResult:
    """Trains `model` in place on rows with `chosen` and `rejected`, or `responses` and `ranks`.

    There is no dropout. What is raised and `options` (`output_dir`, `log`, `progress`, `label`,
    `again`) are as in `encode_pairs` and `training.fit`.
    """
    config = config or ORPOConfig()
    limit = models.fitting(model, config.max_length)
    encode = partial(encode_pairs, max_length=limit, template=config.template)
    held = None if eval_rows is None else encode(eval_rows, tokenizer)
    collate = partial(pack_pairs, learn_prompts=config.nll == "all")
    options |= dict(eval_examples=held, collate=collate, dropout=False)
    loss = partial(pair_loss, config=config)
    return training.fit(model, encode(rows, tokenizer), loss, config, **options)
