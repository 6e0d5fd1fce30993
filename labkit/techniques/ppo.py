"""PPO for language models: raise a reward, stay near a reference (Schulman et al. 2017).

    maximize  E[r(x, y)] - beta KL(pi || pi_ref)             over y sampled from pi at prompts x

Each token is an action. Its reward is its share of the KL penalty, and the last token's also the
score of the whole response (Ziegler et al. 2019, Stiennon et al. 2020, Ouyang et al. 2022):

    r_t = -beta (log pi(y_t) - log pi_ref(y_t)) + [t = T] (score - penalty [no end token])
    A_t = sum over l of (gamma lambda)^l delta_{t+l},    delta_t = r_t + gamma V_{t+1} - V_t
    L   = -mean min(rho A, clip(rho, 1 - c, 1 + c) A) + c_v · value loss,     rho = pi / pi_old

The chapter's loop (5.5.4) has no values, advantages, masks or end of sequence, takes the old
log-probabilities from generation, and gives the KL penalty to responses, not to tokens. Here the
mathematics comes first, then the loop: `rollout`, `update`, and `train`, which repeats the two;
details as in Huang et al. 2024 ("The N+ implementation details"). What a step does depends on
its number and the seed, so a resumed run goes on as if it had never stopped, and several
processes (torchrun, accelerate) share a step's prompts and minibatches and learn what one would.
Left out: sharded weights, gradient checkpointing, soft prompts, conversations of several turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from labkit import models, rollouts, sampling
from labkit.logprobs import masked_mean, masked_whiten
from labkit.loop import Loop, Result
from labkit.policy import PRECISIONS, PolicyWithValue
from labkit.progress import check_finite
from labkit.rewards import Reward
from labkit.rollouts import Rollout
from labkit.speed import as_before, quicken_attention
from labkit.templates import TEMPLATES, Row

SAMPLING, SHUFFLING, DRAWING = range(3)  # what random numbers are for
FREE = ("resume", "save_steps", "sampling_batch", "kl_limit")  # may change when a run is resumed


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a run; the defaults suit a small model on a CPU.

    `steps` times, `batch_size` prompts (of all processes together) are answered and learned from
    in `epochs` passes over minibatches, at a rate that falls to 0. `beta` weighs the KL penalty,
    in the reward, or as k2 in the loss (`kl_in_loss`); with `kl_target` (nats a response) it is
    adapted, over `kl_horizon` episodes. Beyond `kl_limit` (nats a response) the run stops.
    `sampling_batch` responses are sampled at once. A checkpoint is written every `save_steps`
    steps (0: never); `resume` names their folder, or one above it.
    """

    steps: int = 50
    batch_size: int = 128
    minibatch_size: int = 32
    epochs: int = 4
    learning_rate: float = 1e-4
    max_new_tokens: int = 48
    temperature: float = 1.0
    beta: float = 0.05
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_limit: float | None = None
    kl_in_loss: bool = False
    missing_end_penalty: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    max_grad_norm: float = 1.0
    separate_critic: bool = False
    template: str = "auto"
    precision: str = "auto"
    sampling_batch: int = 256
    seed: int = 0
    save_steps: int = 0
    resume: str = ""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "batch_size", "minibatch_size", "epochs"), 1)
        least |= dict.fromkeys(("max_new_tokens", "kl_horizon", "sampling_batch"), 1)
        for name, low in (least | {"save_steps": 0, "seed": 0}).items():
            whole = type(getattr(self, name)) is int and getattr(self, name) >= low
            self._require(name, whole, f"a whole number from {low}")
        for name in ("learning_rate", "temperature", "clip", "value_clip", "max_grad_norm"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("beta", "missing_end_penalty", "value_coefficient"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0")
        for name in ("gamma", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        for name in ("kl_target", "kl_limit"):
            limit = getattr(self, name)
            self._require(name, limit is None or 0 < limit < math.inf, "None or a number above 0")
        self._require("epochs", self.epochs <= 4, "at most 4, or one rollout is overfitted")
        whole = self.batch_size % self.minibatch_size == 0
        self._require("minibatch_size", whole, f"a divisor of batch_size, {self.batch_size}")
        self._require("template", self.template in TEMPLATES, f"one of {TEMPLATES}")
        self._require("precision", self.precision in PRECISIONS, f"one of {PRECISIONS}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


# The mathematics. Tensors are (B, T), B responses of up to T tokens; masks are bool, True = keep.


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log p - log q: over samples of p its mean is KL(p || q), though one may be negative."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log p - log q)² / 2: biased, but the mean of its gradient is the gradient of KL(p || q)."""
    return (logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """q / p - 1 - log(q / p): unbiased as k1 is, never negative, less spread (Schulman 2020)."""
    return torch.expm1(ref_logp - logp) - (ref_logp - logp)


def token_rewards(
    scores: Tensor, ended: Tensor, kl: Tensor, mask: Tensor, beta: float, penalty: float
) -> Tensor:
    """-beta KL at each token; at the last one also the score, less `penalty` if not `ended`.

    `scores` and `ended` (bool) are (B,), `kl` is (B, T); 0 where the mask is.
    """
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


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and A + V before whitening: what the values should have been."""
    advantages = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(advantages, mask), (advantages + values).masked_fill(~mask, 0.0)


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
    logp: Tensor, values: Tensor, old: dict[str, Tensor], beta: float, config: PPOConfig
) -> dict[str, Tensor]:
    """`loss`, to be minimized, and what is reported: all means over a minibatch's tokens.

    `old` has the rollout's `mask`, `logp`, `ref_logp`, `values`, `advantages` and `returns`.
    """
    mask, ratio = old["mask"], (logp.detach() - old["logp"]).exp()
    policy = policy_loss(logp, old["logp"], old["advantages"], mask, config.clip)
    value = value_loss(values, old["values"], old["returns"], mask, config.value_clip)
    penalty = beta * masked_mean(k2(logp, old["ref_logp"]), mask) if config.kl_in_loss else 0.0
    return {
        "loss": policy + config.value_coefficient * value + penalty,
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


def adapted(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next beta: greater if `kl` is above `target`, else less (Ziegler et al. 2019)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


# The loop: sample, score, learn. Each process does its share of every minibatch.


def rollout(
    policy: PolicyWithValue,
    tokenizer: Any,
    prompts: Sequence[Row | str],
    reward: Reward,
    config: PPOConfig,
    step: int = 0,
) -> Rollout:
    """A response to each prompt, its reward, and its tokens' scores; see `rollouts.collect`.

    Log-probabilities come from a pass of their own, over the minibatches that `update` begins
    with, so that its first ratio is exactly 1.
    """
    seed = (config.seed, SAMPLING, step)
    return rollouts.collect(policy, tokenizer, prompts, reward, config, seed)


def update(
    policy: nn.Module,
    rollout: Rollout,
    config: PPOConfig,
    optimizer: torch.optim.Optimizer,
    step: int = 0,
    beta: float | None = None,
) -> dict[str, float]:
    """Passes over the rollout in minibatches, shuffled anew each time; gives means over them.

    `policy` is a PolicyWithValue, or DistributedDataParallel around one. Raises
    FloatingPointError for a loss that is not finite.
    """
    beta = config.beta if beta is None else beta
    old = _old(rollout, beta, config)
    random = np.random.default_rng((config.seed, SHUFFLING, step))
    weights = [p for p in policy.parameters() if p.requires_grad]
    count, found = len(rollout.ids), []
    for epoch in range(config.epochs):
        order = random.permutation(count) if epoch else np.arange(count)
        for rows in rollouts.minibatches(order, config.minibatch_size):
            stats = _losses_of(policy, rollout, rows, old, beta, config)
            optimizer.zero_grad()
            stats["loss"].backward()
            norm = nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
            optimizer.step()
            found.append({name: x.detach() for name, x in stats.items()} | {"gradient_norm": norm})
    metrics = rollouts.means(found)
    for value in (metrics["loss"], metrics["gradient_norm"]):  # a step with either spoils weights
        check_finite(value, step + 1, optimizer.param_groups[0]["lr"])
    explained = explained_variance(rollout.values, old["returns"], rollout.mask)
    return metrics | {"explained_variance": explained}


def _old(rollout: Rollout, beta: float, config: PPOConfig) -> dict[str, Tensor]:
    """What stays as it is during the passes over a rollout."""
    old = {name: getattr(rollout, name) for name in ("mask", "logp", "ref_logp", "values")}
    rewards = token_rewards(
        rollout.rewards,
        rollout.ended,
        k1(rollout.logp, rollout.ref_logp),
        rollout.mask,
        0.0 if config.kl_in_loss else beta,
        config.missing_end_penalty,
    )
    advantages, returns = advantages_and_returns(
        rewards, rollout.values, rollout.mask, config.gamma, config.lam
    )
    return old | {"advantages": advantages, "returns": returns}


def _losses_of(
    policy: nn.Module, rollout: Rollout, rows: np.ndarray, old: dict, beta: float, config: PPOConfig
) -> dict[str, Tensor]:
    """`losses` of this process's share of `rows`, weighted by its tokens: DDP takes the mean."""
    inner = getattr(policy, "module", policy)
    share, batch = inner.batch(rollout.ids, rollout.lengths.tolist(), rollouts.share(rows))
    weight = rollout.mask[share].sum() / rollout.mask[rows].sum() * PartialState().num_processes
    known = {name: column[share].to(inner.device) for name, column in old.items()}
    logp, values = (torch.zeros_like(known["logp"]).masked_scatter(known["mask"], tokens)
                    for tokens in policy(batch, config.temperature)[:2])  # fmt: skip
    found = losses(logp, values, known, beta, config)
    return {name: value * weight.to(inner.device) for name, value in found.items()}


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
) -> Result:
    """Trains `model` in place: `config.steps` times a rollout and an update.

    `prompts` are texts, or rows with `prompt` or `messages`; `reward(prompts, responses)` gives
    one number each (see `rewards`). The reference is `model` as it comes, or with its adapters
    off; so a run is resumed with the model it began with. The first process calls
    `log(metrics, step)` and, with all texts and tokens, `on_rollout(rollout, metrics)`.

    Raises ValueError before any work for what cannot work, what `rewards.ask` raises when the
    reward fails, FloatingPointError when the loss does; checkpoints in `output_dir` stay.
    """
    config = config or PPOConfig()
    state = PartialState(cpu=model.device.type == "cpu")
    rollouts.check_processes(config.minibatch_size)
    models.check_tokenizer(tokenizer, None)
    sampling.encode(prompts, model, tokenizer, config.template, config.max_new_tokens)
    if config.save_steps and output_dir is None:
        raise ValueError("save_steps: expected an output_dir to keep checkpoints in, got None")
    with as_before(model):
        policy, wrapped, optimizer = _prepare(model, config, state)
        settings = {name: x for name, x in asdict(config).items() if name not in FREE}
        loop = Loop(policy, optimizer, config.steps, settings, output_dir=output_dir,
                    save_steps=config.save_steps, resume=config.resume, log=log,
                    progress=progress, first=state.is_main_process)  # fmt: skip
        for step in loop:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * (1 - step / config.steps)
            rows = rollouts.drawn(len(prompts), config.batch_size, step, (config.seed, DRAWING))
            asked = [prompts[row] for row in rows]
            sampled = rollout(policy, tokenizer, asked, reward, config, step)
            metrics = _learn(loop, wrapped, sampled, step, config, optimizer)
            rollouts.everywhere(partial(_close, loop, sampled, metrics, on_rollout))
    return loop.result()


def _close(loop: Loop, rollout: Rollout, metrics: dict[str, float], on_rollout: Any) -> None:
    if on_rollout and loop.first:
        on_rollout(rollout, metrics)
    loop.record(metrics, f"reward {metrics['reward']:.3f} · KL {metrics['kl']:.2f}")


def _learn(
    loop: Loop, policy: nn.Module, rollout: Rollout, step: int, config: PPOConfig, optimizer: Any
) -> dict[str, float]:
    """Metrics of the rollout and, unless it stops the loop, of the update."""
    started, logps = time.perf_counter(), (rollout.logp, rollout.ref_logp)
    beta, rate = loop.state.get("beta", config.beta), optimizer.param_groups[0]["lr"]
    metrics = rollout.metrics() | {"beta": beta, "learning_rate": rate}
    for name, estimator in (("kl", k3), ("kl_k1", k1)):
        metrics[name] = float(rollout.sums(estimator(*logps)).mean())
    for kind, remark in rollouts.remarks(rollout, config.max_new_tokens).items():
        loop.note(kind, f"step {step + 1}: {remark}")
    if config.kl_limit and metrics["kl"] > config.kl_limit:
        loop.stop(f"step {step + 1}: stopped, KL {metrics['kl']:.3g} nats a response is above "
                  f"kl_limit {config.kl_limit:.3g}; a greater beta keeps nearer to the reference")  # fmt: skip
        return metrics
    metrics |= update(policy, rollout, config, optimizer, step, beta)
    if config.kl_target:
        given = (config.kl_target, config.batch_size, config.kl_horizon)
        loop.state["beta"] = adapted(beta, metrics["kl_k1"], *given)
    return metrics | {"seconds_update": time.perf_counter() - started}


def _prepare(
    model: Any, config: PPOConfig, state: PartialState
) -> tuple[PolicyWithValue, nn.Module, torch.optim.Optimizer]:
    """The policy, the policy as several processes train it, and its optimizer."""
    model.to(state.device if state.num_processes > 1 else model.device)
    if model.device.type == "cpu":
        quicken_attention(model)
    policy = PolicyWithValue(model, config.separate_critic, config.precision)
    weights = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=config.learning_rate, eps=1e-5, fused=True)
    if state.num_processes == 1:
        return policy, policy, optimizer
    return policy, nn.parallel.DistributedDataParallel(policy).eval(), optimizer
