"""PPO for language models: raise a reward, stay near a reference (Schulman et al. 2017).

    maximize  E[r(x, y)] - beta KL(pi || pi_ref)             over y sampled from pi at prompts x

Each token is an action; the last one's reward has the score of the response (Ziegler et al. 2019):

    r_t = -beta (log pi(y_t) - log pi_ref(y_t)) + [t = T] (score - penalty [no EOS])
    A_t = sum over l of (gamma lambda)^l delta_{t+l},    delta_t = r_t + gamma V_{t+1} - V_t
    L   = -mean min(rho A, clip(rho, 1 - c, 1 + c) A) + c_v · value loss,     rho = pi / pi_old

The chapter's loop (5.5.4) has no values, advantages, masks or EOS, takes the old log-probabilities
from generation, and gives the KL penalty to responses, not to tokens. Details as in Huang et al.
2024 ("The N+ implementation details"). What a step does depends on its number and the seed: a
resumed run goes on as if it had never stopped, and several processes (torchrun) learn what one
would. Left out: an adaptive beta, sharded weights, gradient checkpointing, soft prompts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor, nn

from labkit import checkpoints, models
from labkit.batching import Example
from labkit.config import Count, Natural, NonNegative, Positive, Probability, settings
from labkit.generate import encode_prompts
from labkit.logprobs import masked_mean, masked_whiten
from labkit.progress import STOPPED, Live, check_finite
from labkit.techniques import rollout as rollouts
from labkit.techniques.rollout import PolicyWithValue, Reward, Rollout, rollout
from labkit.templates import Row
from labkit.training import train_once

logger = logging.getLogger("labkit")

SHUFFLING, DRAWING = 1, 2  # what random numbers are for; `rollout` has 0
FREE = ("resume", "save_steps", "sampling_batch", "kl_limit")  # may change when a run is resumed
REMARKS = (  # on a metric that has this value
    ("empty_rate", 1, "all responses are empty: is the reward highest for saying nothing?"),
    ("end_rate", 0, "no response ended: raise max_new_tokens, or tune on responses with their EOS"),
)


@settings
class PPOConfig:
    """Settings of a run; the defaults suit a small model on a CPU.

    `batch_size` counts prompts in all processes, `sampling_batch` those sampled at once. `beta`
    weighs the KL penalty; beyond `kl_limit` (nats per response) the run stops. Checkpoints come
    every `save_steps` steps (0: never); `resume` names their folder, or one above it.
    """

    steps: Count = 50
    batch_size: Count = 128
    minibatch_size: Count = 32
    epochs: Annotated[int, Field(ge=1, le=4)] = 4  # more would overfit one rollout
    learning_rate: Positive = 1e-4
    max_new_tokens: Count = 48
    temperature: Positive = 1.0
    beta: NonNegative = 0.05
    kl_limit: Positive | None = None
    missing_end_penalty: NonNegative = 1.0
    gamma: Probability = 1.0
    lam: Probability = 0.95
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    value_coefficient: NonNegative = 0.1
    max_grad_norm: Positive = 1.0
    separate_critic: bool = False
    template: Literal["auto", "chat", "alpaca", "alpaca_zh", "plain"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    sampling_batch: Count = 256
    seed: Natural = 0
    save_steps: Natural = 0
    resume: str = ""

    def __post_init__(self) -> None:
        if self.batch_size % self.minibatch_size:
            raise ValueError(f"minibatch_size: {self.minibatch_size} does not divide batch_size")


# The mathematics. Tensors are (B, T), B responses of up to T tokens; masks are bool, True = keep.


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log p - log q: over samples of p its mean is KL(p || q), though one may be negative."""
    return logp - ref_logp


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """q / p - 1 - log(q / p): unbiased as k1 is, never negative, less spread (Schulman 2020)."""
    return torch.expm1(ref_logp - logp) - (ref_logp - logp)


def token_rewards(
    scores: Tensor, ended: Tensor, kl: Tensor, mask: Tensor, beta: float, penalty: float
) -> Tensor:
    """-beta KL (B, T) at each token; at the last also the score (B,), less `penalty` if not `ended`."""
    rewards = (-beta * kl).masked_fill(~mask, 0.0)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores - penalty * (~ended).float()
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2016); 0 where the mask is.

    After a response's last token the value is 0: a response that was cut off counts as over.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages, running = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """-min(rho A, clip(rho, 1 - c, 1 + c) A), rho = exp(logp - old_logp): mean of kept tokens."""
    ratio = (logp - old_logp).masked_fill(~mask, 0.0).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> Tensor:
    """Half the greater squared error, of the value or of it kept within `clip` of the old one."""
    values = values.masked_fill(~mask, 0.0)
    near = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (near - returns).square())
    return masked_mean(errors, mask) / 2


def losses(
    logp: Tensor, values: Tensor, old: dict[str, Tensor], config: PPOConfig
) -> dict[str, Tensor]:
    """`loss`, to be minimized, and what is reported: all means over a minibatch's tokens.

    `old` has the rollout's `mask`, `logp`, `values`, `advantages` and `returns`.
    """
    mask, ratio = old["mask"], (logp.detach() - old["logp"]).exp()
    policy = policy_loss(logp, old["logp"], old["advantages"], mask, config.clip)
    value = value_loss(values, old["values"], old["returns"], mask, config.value_clip)
    return {
        "loss": policy + config.value_coefficient * value,
        "policy_loss": policy.detach(),
        "value_loss": value.detach(),
        "ratio": masked_mean(ratio, mask),
        "clip_fraction": masked_mean((ratio - 1).abs() > config.clip, mask),
        "approximate_kl": masked_mean(k3(old["logp"], logp.detach()), mask),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns): 1 is perfect, 0 no better than a constant."""
    spread = returns[mask].var(correction=0)
    return float(1 - (returns - values)[mask].var(correction=0) / spread) if spread > 0 else 0.0


# A step: a rollout, then passes over it


def old_scores(sampled: Rollout, config: PPOConfig) -> dict[str, Tensor]:
    """What stays as it is during the passes over a rollout: all (B, T)."""
    mask, values, kl = sampled.mask, sampled.values, k1(sampled.logp, sampled.ref_logp)
    weights = config.beta, config.missing_end_penalty
    rewards = token_rewards(sampled.rewards, sampled.ended, kl, mask, *weights)
    advantages = gae(rewards, values, mask, config.gamma, config.lam)
    old = {"mask": mask, "logp": sampled.logp, "values": values}
    old["returns"] = (advantages + values).masked_fill(~mask, 0.0)
    return old | {"advantages": masked_whiten(advantages, mask)}


def minibatch_losses(
    policy: nn.Module, sampled: Rollout, rows: np.ndarray, old: dict, config: PPOConfig
) -> dict[str, Tensor]:
    """`losses` of this process's shard of `rows`, weighted by its tokens: DDP takes the mean."""
    inner, shard = getattr(policy, "module", policy), rollouts.local_shard(rows)
    batch = inner.pack([sampled.examples[i] for i in shard])
    weight = sampled.mask[shard].sum() / sampled.mask[rows].sum() * PartialState().num_processes
    known = {name: column[shard].to(inner.device) for name, column in old.items()}
    table = torch.zeros_like(known["logp"])
    outputs = policy(batch, config.temperature)[:2]
    logp, values = (table.masked_scatter(known["mask"], batch.in_order(x)) for x in outputs)
    found = losses(logp, values, known, config)
    return {name: value * weight.to(inner.device) for name, value in found.items()}


def update(
    policy: nn.Module,
    sampled: Rollout,
    config: PPOConfig,
    optimizer: torch.optim.Optimizer,
    step: int = 0,
) -> dict[str, float]:
    """Passes over the rollout in minibatches, shuffled anew each time; gives means over them.

    `policy` may be wrapped by DDP. FloatingPointError for a loss that is not finite.
    """
    old, random = old_scores(sampled, config), np.random.default_rng((config.seed, SHUFFLING, step))
    weights = [p for p in policy.parameters() if p.requires_grad]
    count, size, found = len(sampled.examples), config.minibatch_size, []
    for epoch in range(config.epochs):
        order = random.permutation(count) if epoch else np.arange(count)
        for rows in np.split(order, range(size, count, size)):
            stats = minibatch_losses(policy, sampled, rows, old, config)
            optimizer.zero_grad()
            stats["loss"].backward()
            norm = nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            found.append({name: x.detach() for name, x in stats.items()} | {"gradient_norm": norm})
    # Means over all minibatches and processes; one synchronization with the device.
    table = torch.stack([torch.stack(list(stats.values())) for stats in found])
    means = np.mean(gather_object([table.mean(0).tolist()]), axis=0)
    metrics = dict(zip(found[0], means.tolist(), strict=True))
    for name in ("loss", "gradient_norm"):  # a step with either not finite spoils weights
        check_finite(metrics[name], step + 1, optimizer.param_groups[0]["lr"])
    explained = explained_variance(sampled.values, old["returns"], sampled.mask)
    return metrics | {"explained_variance": explained}


@dataclass(frozen=True)
class Result:
    """`stopped` says why, if early; `seconds` are those of this call only."""

    history: list[dict] = field(repr=False)
    steps: int
    seconds: float
    stopped: str = ""


def train(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Row | str],
    reward: Reward,
    config: PPOConfig | None = None,
    *,
    output_dir: str | Path | None = None,
    log: Callable[[dict, int], Any] | None = None,
    on_rollout: Callable[[Rollout, dict], Any] | None = None,
    progress: bool = True,
    label: str = "",
    again: bool = False,
) -> Result:
    """Trains `model` in place: `config.steps` times a rollout and an update.

    Prompts are as in `rollout`. The reference is `model` as it comes, or with its adapters off; so
    a run is resumed with the model it began with. The main process calls `log(metrics, step)` and
    `on_rollout(rollout, metrics)`; what the latter adds to the metrics is shown too. Raises
    ValueError before any work for what cannot work, what `compute_rewards` raises,
    FloatingPointError for a loss; checkpoints in `output_dir` stay. `label`, `again` and an
    interrupt are as in `training.fit`.
    """
    config, started = config or PPOConfig(), time.perf_counter()
    state = PartialState(cpu=model.device.type == "cpu")
    main, several = state.is_main_process, state.num_processes > 1
    rollouts.check_processes(config.minibatch_size)
    models.check_tokenizer(tokenizer, None)
    form, limit = config.template, config.max_new_tokens
    encoded = encode_prompts(prompts, model, tokenizer, form, limit, "left out")
    checkpoints.check_folder(output_dir, config)
    with models.unchanged(model), Live(label, progress and main) as live:
        model.to(state.device if several else model.device)
        if model.device.type == "cpu":
            models.use_float32_attention(model)
        policy = PolicyWithValue(model, config.separate_critic, config.precision)
        wrapped = nn.parallel.DistributedDataParallel(policy).eval() if several else policy
        weights = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=config.learning_rate, eps=1e-5, fused=True)
        made = {name: value for name, value in asdict(config).items() if name not in FREE}
        made |= checkpoints.fingerprint(policy, [Example(*2 * [np.array(p.ids)]) for p in encoded])
        history: list[dict] = []
        if config.resume:
            history = checkpoints.load(config.resume, policy, optimizer, made)["history"]
        train_once(model, "PPO", again or bool(config.resume))
        live.begun, stopped = len(history), ""

        def finish() -> None:
            own = {*metrics}
            if on_rollout and main:
                on_rollout(sampled, metrics)
            history.append({"step": step + 1, **metrics})
            if log and main:
                log(metrics, step + 1)
            shown = {k: v for k, v in metrics.items() if k in ("reward", "kl") or k not in own}
            newest = f"{sampled.prompts[-1]} → {sampled.responses[-1]}"
            live.show(step + 1, config.steps, shown, sample=newest)
            every, last = config.save_steps, step + 1 == config.steps
            if every and main and not stopped and (last or (step + 1) % every == 0):
                state = {"history": history}
                checkpoints.save(str(output_dir), step + 1, policy, optimizer, state, made)

        while len(history) < config.steps and not stopped:
            step, draw = len(history), (config.seed, DRAWING)
            numbers = rollouts.batch_indices(len(encoded), config.batch_size, step, draw)
            chosen = [encoded[i] for i in numbers]
            sampled = rollout(policy, tokenizer, chosen, reward, config, step)
            metrics, stopped = _step(wrapped, sampled, config, optimizer, history)
            rollouts.on_all_ranks(finish)
            if live.stopping and len(history) < config.steps:
                stopped = stopped or STOPPED.format(len(history), config.steps)
    return Result(history, len(history), time.perf_counter() - started, stopped)


def _step(
    policy: nn.Module, sampled: Rollout, config: PPOConfig, optimizer: Any, history: list[dict]
) -> tuple[dict[str, float], str]:
    """Metrics of the rollout and of the update, or why the run stops before the update."""
    step, started = len(history), time.perf_counter()
    rate = config.learning_rate * (1 - step / config.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    metrics, reason = sampled.metrics() | {"learning_rate": rate}, ""
    for name, estimator in (("kl", k3), ("kl_k1", k1)):
        kl = estimator(sampled.logp, sampled.ref_logp).masked_fill(~sampled.mask, 0.0)
        metrics[name] = float(kl.sum(1).mean())
    for name, value, remark in REMARKS:
        if metrics[name] == value and all(entry[name] != value for entry in history):
            logger.warning("step %d: %s", step + 1, remark)
    if config.kl_limit and metrics["kl"] > config.kl_limit:
        reason = f"KL {metrics['kl']:.3g} is above kl_limit {config.kl_limit:.3g}: raise beta"
        logger.warning("step %d: stopped, %s", step + 1, reason)
    else:
        metrics |= update(policy, sampled, config, optimizer, step)
        metrics["seconds_update"] = time.perf_counter() - started
    return metrics, reason
