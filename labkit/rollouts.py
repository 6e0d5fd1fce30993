"""Rollouts: responses that a policy samples, their rewards, and what each token was worth.

Reinforcement learning alternates between this and learning from it (`techniques/ppo`). Several
processes each sample their share and then all hold the whole, so what is computed from it is
the same everywhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from labkit import sampling
from labkit.logprobs import masked_mean
from labkit.policy import PolicyWithValue
from labkit.rewards import Reward, ask
from labkit.templates import Row


@dataclass(frozen=True)
class Rollout:
    """B prompts with a response each, the same in every process.

    `rewards` is what the reward gave and `ended` whether there is an end token, (B,). `mask`
    (1 = response token, its end token too), `logp`, `ref_logp`, `values` and `entropy` are
    (B, T), on the CPU. `ids` holds prompt and response. `seconds` are this process's.
    """

    prompts: list[Any]
    responses: list[str]
    rows: list[Row] = field(repr=False)
    rewards: Tensor
    ended: Tensor
    ids: list[np.ndarray] = field(repr=False)
    mask: Tensor = field(repr=False)
    logp: Tensor = field(repr=False)
    ref_logp: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    entropy: Tensor = field(repr=False)
    seconds: dict[str, float] = field(repr=False)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, (B,)."""
        return self.mask.sum(1)

    def sums(self, tokens: Tensor) -> Tensor:
        """Of values (B, T) for tokens, each response's sum, (B,)."""
        return tokens.masked_fill(~self.mask, 0.0).sum(1)

    def metrics(self) -> dict[str, float]:
        """Means over responses (`entropy`: over tokens, in nats), and seconds a stage."""
        empty = [not response.strip() for response in self.responses]
        return {
            "reward": float(self.rewards.mean()),
            "reward_std": float(self.rewards.std(correction=0)),
            "entropy": float(masked_mean(self.entropy, self.mask)),
            "length": float(self.lengths.float().mean()),
            "end_rate": float(self.ended.float().mean()),
            "empty_rate": sum(empty) / len(empty),
        } | {f"seconds_{stage}": seconds for stage, seconds in self.seconds.items()}


def remarks(rollout: Rollout, room: int) -> dict[str, str]:
    """What is wrong with all responses at once, by kind; `room` is their greatest length."""
    found = {}
    if not any(text.strip() for text in rollout.responses):
        found["empty"] = (
            f"all {len(rollout.responses)} responses are empty; is the reward highest for saying "
            "nothing, or did the model never learn to answer?"
        )
    if not rollout.ended.any():
        found["end"] = (
            f"no response ended within {room} tokens; raise max_new_tokens, or tune the model on "
            "responses with their end token first"
        )
    return found


def check_processes(minibatch_size: int) -> None:
    """Raises ValueError unless all processes that were started work together, with rows for each."""
    together, started = PartialState().num_processes, int(os.environ.get("WORLD_SIZE", 1))
    if together != started:
        raise ValueError(
            f"expected {started} processes to work together, got {together}; on a CPU call "
            "accelerate.PartialState(cpu=True) before anything else of accelerate"
        )
    if minibatch_size < together:
        raise ValueError(
            f"minibatch_size: expected a row or more for each of {together} processes, got "
            f"{minibatch_size}"
        )


def collect(
    policy: PolicyWithValue,
    tokenizer: Any,
    prompts: Sequence[Row | str],
    reward: Reward,
    config: Any,
    seed: tuple[int, ...],
) -> Rollout:
    """Samples a response to each prompt, asks for its reward, and scores its tokens.

    `prompts` are texts, or rows with `prompt` or `messages`, before any template; the reward
    gets them as they are. `config` has `max_new_tokens`, `temperature`, `template`,
    `minibatch_size` (rows scored together) and `sampling_batch` (rows sampled together). Raises
    what `sampling.encode` and `rewards.ask` raise, in every process.
    """
    clock, room = _Clock(), config.max_new_tokens
    asked = sampling.encode(prompts, policy.model, tokenizer, config.template, room)
    shares = [share(rows) for rows in minibatches(np.arange(len(asked)), config.minibatch_size)]
    mine = np.concatenate(shares).tolist()
    replies = _sample(policy, tokenizer, asked, mine, config, seed)
    texts = tokenizer.batch_decode([replies[i] for i in mine], skip_special_tokens=True)
    clock.stop("sample")
    shown, rows = [asked[i].shown for i in mine], [asked[i].row for i in mine]
    rewards = everywhere(lambda: ask(reward, shown, texts, rows))
    clock.stop("reward")
    ids = {i: np.array(asked[i].ids + reply) for i, reply in replies.items()}
    scores = _score(policy, ids, replies, shares, config.temperature)
    ends = sampling.end_ids(policy.model, tokenizer)
    own = [(i, ids[i], text, float(r), replies[i][-1] in ends, scores[i].numpy())
           for i, text, r in zip(mine, texts, rewards, strict=True)]  # fmt: skip
    everyone = sorted(gather_object(own), key=lambda one: one[0])
    clock.stop("score")
    return _whole(asked, everyone, clock.seconds)


def _sample(
    policy: PolicyWithValue,
    tokenizer: Any,
    asked: list[sampling.Prompt],
    mine: list[int],
    config: Any,
    seed: tuple[int, ...],
) -> dict[int, list[int]]:
    # One stream for all rows: which process samples a row does not matter.
    uniforms = np.random.default_rng(seed).random((len(asked), config.max_new_tokens))
    with policy.autocast():
        found = sampling.sample(
            policy.model,
            [asked[i].ids for i in mine],
            uniforms[mine],
            ends=sampling.end_ids(policy.model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            temperature=config.temperature,
            batch_size=config.sampling_batch,
        )
    return dict(zip(mine, found, strict=True))


def _score(
    policy: PolicyWithValue, ids: dict, replies: dict, shares: list, temperature: float
) -> dict[int, Tensor]:
    """What `policy.score` gives for each row, (4, T) on the CPU; the device is waited for once."""
    lengths, order, found = {i: len(reply) for i, reply in replies.items()}, [], []
    for rows in shares:
        rows, batch = policy.batch(ids, lengths, rows)
        found.append(policy.score(batch, temperature))
        order += rows
    pieces = torch.cat(found, dim=1).cpu().split([lengths[i] for i in order], dim=1)
    return dict(zip(order, pieces, strict=True))


def _whole(asked: list, everyone: list[tuple], seconds: dict[str, float]) -> Rollout:
    _, ids, texts, rewards, ended, scores = zip(*everyone, strict=True)
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(s.T) for s in scores], batch_first=True)
    logp, ref_logp, values, entropy = padded.unbind(-1)
    lengths = torch.tensor([score.shape[1] for score in scores])
    return Rollout(
        prompts=[prompt.shown for prompt in asked],
        responses=list(texts),
        rows=[prompt.row for prompt in asked],
        rewards=torch.tensor(rewards),
        ended=torch.tensor(ended),
        ids=list(ids),
        mask=torch.arange(logp.shape[1]) < lengths[:, None],
        logp=logp,
        ref_logp=ref_logp,
        values=values,
        entropy=entropy,
        seconds=seconds,
    )


def minibatches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """`order` in pieces of `size`."""
    return (order[start : start + size] for start in range(0, len(order), size))


def share(rows: np.ndarray) -> np.ndarray:
    """Those of `rows` that are this process's."""
    state = PartialState()
    return rows[state.process_index :: state.num_processes]


def drawn(count: int, size: int, step: int, seed: tuple[int, ...]) -> list[int]:
    """The `size` of `count` prompts that a step takes: all in a new order, time and again."""
    rounds, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {r: np.random.default_rng((*seed, r)).permutation(count) for r in set(rounds.tolist())}
    return [int(orders[r][p]) for r, p in zip(rounds.tolist(), places, strict=True)]


def means(found: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Of scalars with the same names, over all entries and processes; the device is asked once."""
    table = torch.stack([torch.stack(list(entry.values())) for entry in found])
    mean = np.mean(gather_object([table.mean(0).tolist()]), axis=0)
    return dict(zip(found[0], mean.tolist(), strict=True))


def everywhere(call: Callable[[], Any]) -> Any:
    """`call()`; what it raises in one process is raised in all, which would wait for ever."""
    found = failure = None
    try:
        found = call()
    except Exception as error:
        failure = error
    failures = [one for one in gather_object([failure and str(failure)]) if one is not None]
    if failures:
        raise failure or RuntimeError(failures[0])
    return found


class _Clock:
    """Seconds of stages that follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def stop(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._start = now - self._start, now
