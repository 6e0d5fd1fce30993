"""Rollouts: responses that a policy samples, their rewards, and the scores of their tokens.

Several processes each sample a shard and then all hold the whole, so what `techniques.ppo`
computes from it is the same on all ranks.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from labkit import logprobs, models
from labkit.batching import Batch, Example, join, pack
from labkit.generate import Prompt, encode_prompts, eos_ids, sample, texts
from labkit.templates import Row

SAMPLING = 0  # what random numbers are for; `ppo` has the others

Reward = Callable[..., Sequence[float]]  # of prompts, responses, and rows if it takes them


def compute_rewards(
    reward: Reward, prompts: Sequence[Any], responses: Sequence[str], rows: Sequence[Row]
) -> list[float]:
    """A finite number for each response: `reward(prompts, responses)`, and `rows` if it takes them.

    Raises RuntimeError from what the reward raises, ValueError for another count and for numbers
    that are not finite; both name a prompt and its response.
    """
    takes_rows, count = "rows" in inspect.signature(reward).parameters, len(responses)

    def call(part: slice) -> np.ndarray:
        extra = {"rows": list(rows[part])} if takes_rows else {}
        given = reward(list(prompts[part]), list(responses[part]), **extra)
        given = given.tolist() if hasattr(given, "tolist") else given
        return np.array([x.item() if hasattr(x, "item") else x for x in given], dtype=float)

    def where(i: int) -> str:
        return f"prompt {prompts[i]!r}, response {responses[i]!r}"

    try:
        values = call(slice(None))
    except Exception as error:
        first = 0  # whose reward fails on its own, if there is one
        with contextlib.suppress(Exception):
            for first in range(count):
                call(slice(first, first + 1))
            first = 0
        raise RuntimeError(f"reward: {type(error).__name__}: {error}; {where(first)}") from error
    if values.shape != (count,):
        got = f"an array of shape {values.shape}; the first: {where(0)}"
        raise ValueError(f"reward: expected {count} numbers, got {got}")
    if bad := np.flatnonzero(~np.isfinite(values)).tolist():
        raise ValueError(f"reward: expected a number, got {values[bad[0]]}; {where(bad[0])}")
    return values.tolist()


class PolicyWithValue(nn.Module):
    """A policy, its reference, and a value function; dropout is off in every pass.

    The value head reads the policy's last hidden state, or that of a critic of its own
    (`separate_critic`), and starts at 0. The reference is the policy with its adapters off, or a
    frozen copy where it has none. ValueError for a soft prompt, or without trained weights.
    """

    def __init__(self, model: Any, separate_critic: bool = False, precision: str = "auto") -> None:
        super().__init__()
        if logprobs.has_soft_prompt(model):
            raise ValueError("model: expected one without a soft prompt or prefix; use LoRA")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: expected weights that train, got only frozen ones")
        models.warn_of_half_precision(model)
        half = {"auto": models.autocast_dtype(model), "bf16": torch.bfloat16, "fp32": None}
        self.dtype, self.model = half[precision], model
        backbone, adapters = models.base_model(model).base_model, hasattr(model, "disable_adapter")
        self.critic = copy.deepcopy(backbone) if separate_critic else None
        self.reference = None if adapters else copy.deepcopy(model).requires_grad_(False)
        width = model.get_output_embeddings().weight.shape[1]
        self.value_head = nn.utils.skip_init(nn.Linear, width, 1, device=model.device)
        for p in self.value_head.parameters():
            nn.init.zeros_(p)
        self.eval()
        self.packing = logprobs.keeps_apart(model)

    def pack(self, examples: Sequence[Example]) -> Batch:
        """A batch for `forward`, packed where that is right and pays."""
        return pack(examples, packing=self.packing).to(self.device)

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities (N,), values (N,), logits (N, V) of a batch's response tokens."""
        with self.autocast():
            hidden, logits, logp = logprobs.response_outputs(self.model, batch, temperature)
            if self.critic is not None:
                inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
                given = {name: ids for name, ids in inputs.items() if ids is not None}
                hidden = self.critic(**given, use_cache=False)[0].flatten(0, 1)[batch.positions]
        return logp, self.value_head(hidden.float())[:, 0], logits

    @torch.no_grad()
    def score(self, batch: Batch, temperature: float) -> Tensor:
        """(N, 4): log-probabilities, the reference's, values, and entropies in nats."""
        logp, values, logits = self.forward(batch, temperature)
        entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
        off = self.model.disable_adapter() if self.reference is None else contextlib.nullcontext()
        with self.autocast(), off:
            ref_logp = logprobs.response_logps(self.reference or self.model, batch, temperature)
        return torch.stack([logp, ref_logp, values, entropy], dim=1)

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def autocast(self) -> Any:
        """The precision of every pass; None is that of the weights."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


@dataclass(frozen=True)
class Rollout:
    """B prompts with a response each, the same on all ranks; `seconds` are this process's.

    `rewards` and `ended`, whether there is an EOS, are (B,). `mask` (1 = response token, its EOS
    too), `logp`, `ref_logp`, `values` and `entropy` are (B, T). All are on the CPU.
    """

    prompts: list[Any]
    responses: list[str]
    rows: list[Row] = field(repr=False)
    rewards: Tensor
    ended: Tensor
    examples: list[Example] = field(repr=False)
    mask: Tensor = field(repr=False)
    logp: Tensor = field(repr=False)
    ref_logp: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    seconds: dict[str, float] = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """Means over responses (`entropy`: over tokens, in nats), and seconds per stage."""
        empty = [not response.strip() for response in self.responses]
        return {
            "reward": float(self.rewards.mean()),
            "reward_std": float(self.rewards.std(correction=0)),
            "entropy": float(logprobs.masked_mean(self.entropy, self.mask)),
            "length": float(self.mask.sum(1).float().mean()),
            "end_rate": float(self.ended.float().mean()),
            "empty_rate": sum(empty) / len(empty),
            **{f"seconds_{stage}": seconds for stage, seconds in self.seconds.items()},
        }


def rollout(
    policy: PolicyWithValue,
    tokenizer: Any,
    prompts: Sequence[Prompt | Row | str],
    reward: Reward,
    config: Any,
    step: int = 0,
) -> Rollout:
    """A response to each prompt, its reward, and its tokens' scores; `config` is a `PPOConfig`.

    Log-probabilities come from a pass of their own, over the minibatches that `ppo.update` begins
    with, so that its first ratio is exactly 1. Errors: `encode_prompts`, `compute_rewards`.
    """
    times, model, limit = [time.perf_counter()], policy.model, config.max_new_tokens
    encoded = encode_prompts(prompts, model, tokenizer, config.template, limit)
    size, count = config.minibatch_size, len(encoded)
    minibatches = np.split(np.arange(count), range(size, count, size))
    shards = [local_shard(rows).tolist() for rows in minibatches]
    mine = [i for shard in shards for i in shard]
    own, ends = [encoded[i] for i in mine], eos_ids(model, tokenizer, config.template)
    # One stream for all prompts: which process samples a response does not matter.
    random = np.random.default_rng((config.seed, SAMPLING, step))
    options = {"temperature": config.temperature, "batch_size": config.sampling_batch}
    options["uniforms"] = random.random((count, limit))[mine]
    with policy.autocast():
        replies = sample(model, [p.ids for p in own], max_new_tokens=limit, ends=ends, **options)
    responses = texts(tokenizer, replies, ends)
    times.append(time.perf_counter())
    contents, rows = [prompt.content for prompt in own], [prompt.row for prompt in own]
    rewards = on_all_ranks(lambda: compute_rewards(reward, contents, responses, rows))
    times.append(time.perf_counter())
    both = zip(own, replies, strict=True)
    examples = [join(prompt.ids, reply, len(prompt.ids) + limit, None) for prompt, reply in both]
    scored, rest = [], iter(examples)
    for shard in shards:
        batch = policy.pack([next(rest) for _ in shard])
        scored.append(batch.in_order(policy.score(batch, config.temperature)))
    lengths = [len(reply) for reply in replies]  # one synchronization with the device
    scores = [score.numpy() for score in torch.cat(scored).cpu().split(lengths)]
    ended = [reply[-1] in ends for reply in replies]
    local = list(zip(mine, responses, rewards, ended, examples, scores, strict=True))
    whole = sorted(gather_object(local), key=lambda entry: entry[0])
    _, responses, rewards, ended, examples, scores = map(list, zip(*whole, strict=True))
    times.append(time.perf_counter())
    tensors = [torch.from_numpy(score) for score in scores]
    columns = nn.utils.rnn.pad_sequence(tensors, batch_first=True).unbind(-1)
    last = torch.tensor([len(tensor) for tensor in tensors])[:, None]
    return Rollout(
        prompts=[prompt.content for prompt in encoded],
        rows=[prompt.row for prompt in encoded],
        responses=responses,
        rewards=torch.tensor(rewards),
        ended=torch.tensor(ended),
        examples=examples,
        mask=torch.arange(columns[0].shape[1]) < last,
        seconds=dict(zip(("sample", "reward", "score"), map(float, np.diff(times)), strict=True)),
        **dict(zip(("logp", "ref_logp", "values", "entropy"), columns, strict=True)),
    )


# Several processes


def check_processes(minibatch_size: int) -> None:
    """Raises ValueError unless all started processes work together, with an example for each."""
    together, started = PartialState().num_processes, int(os.environ.get("WORLD_SIZE", 1))
    if together != started:
        remedy = "on a CPU call accelerate.PartialState(cpu=True) before anything of accelerate"
        raise ValueError(f"expected {started} processes to work together, got {together}; {remedy}")
    if minibatch_size < together:
        raise ValueError(f"minibatch_size: expected {together} up, one for each process")


def local_shard(rows: np.ndarray) -> np.ndarray:
    """Those of `rows` that are this process's."""
    state = PartialState()
    return rows[state.process_index :: state.num_processes]


def batch_indices(count: int, size: int, step: int, seed: tuple[int, ...]) -> list[int]:
    """The `size` of `count` prompts that a step takes: all in a new order, time and again."""
    rounds, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {r: np.random.default_rng((*seed, r)).permutation(count) for r in np.unique(rounds)}
    return [int(orders[r][p]) for r, p in zip(rounds, places, strict=True)]


def on_all_ranks(call: Callable[[], Any]) -> Any:
    """`call()`; what it raises in one process is raised in all, which would wait for ever."""
    result = failure = None
    try:
        result = call()
    except Exception as error:
        failure = error
    failures = [one for one in gather_object([failure and str(failure)]) if one is not None]
    if failures:
        raise failure or RuntimeError(failures[0])
    return result
