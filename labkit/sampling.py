"""Batched sampling of token ids with a cache, each row from random numbers of its own.

    x_t = min {i : sum over j <= i of p(j | x_<t) > u_t}        u_t uniform in [0, 1)

This inverts the cumulative distribution, so a row depends on its own u and on no other row.
Batches can be cut in any way, rows that have ended can leave their batch, and several processes
can share the rows: the samples stay the same, up to the rounding of the probabilities. `sample` is for
training loops, which need the ids; `responses` gives texts. Greedy answers, a server, and
prompts that are ready are `generate`'s.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.logprobs import position_ids
from labkit.speed import base_model
from labkit.templates import Row, renderer, turns

# A mask of zeros and ones is looked at by the model at every token, for which the host waits.
READY_MASK = {"cpu": False}
TAKE_READY_MASK = ("gemma", "gpt2", "llama", "mistral", "qwen2")  # tried, without windows
# Asking whether rows have ended makes the host wait for a GPU; on a CPU it costs nothing.
STEPS_BETWEEN_QUESTIONS = {"cpu": 1}
STEPS_ON_A_DEVICE = 16
WORTH_DROPPING = 0.2  # share of a batch that must have ended before the rest is copied together


@dataclass(frozen=True)
class Prompt:
    """A prompt: its row, what a reward sees, the text in its template, and that text's ids."""

    row: Row
    shown: Any
    text: str
    ids: list[int]


def encode(
    prompts: Sequence[Row | str], model: Any, tokenizer: Any, template: str, room: int
) -> list[Prompt]:
    """Texts, or rows with `prompt` or `messages`, in their template; counted from 0 in errors.

    Raises ValueError for no prompts, one without a token, one of a wrong kind, and one that
    leaves less than `room` tokens of the model's context to a response.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts: expected a list of texts or rows, got {prompts!r}")
    render, encoded = renderer(tokenizer, template), []
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    for number, given in enumerate(prompts):
        row = {"prompt": given} if isinstance(given, str) else given
        if not isinstance(row, dict) or not {"prompt", "messages"} & set(row):
            raise ValueError(f"prompts: prompt {number}: expected a text or a row with 'prompt' or "
                             f"'messages', got {given!r}")  # fmt: skip
        shown = row["prompt"] if "prompt" in row else turns(row)
        text = render({**row, "prompt": shown, "completion": ""})[0]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not 0 < len(ids) <= context - room:
            raise ValueError(f"prompts: prompt {number}: expected 1 to {context - room} tokens (the "
                             f"model's context less {room} new ones), got {len(ids)}")  # fmt: skip
        encoded.append(Prompt(row, shown, text, ids))
    return encoded


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: np.ndarray,
    *,
    ends: set[int],
    pad_id: int,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[list[int]]:
    """Responses to `prompts` (ids), each up to and with its end token, if it has one.

    `uniforms` is (prompts, T) in [0, 1), with T the greatest length of a response. Sampling is
    pure: no top-k, no top-p. Prompts of like length share a batch, padded on the left, with
    positions that count real tokens only.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[]] * len(prompts)
    last = torch.tensor(sorted(ends), device=model.device)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = left_padded([prompts[i] for i in rows], pad_id)
        chances = torch.from_numpy(uniforms[rows]).to(model.device)
        found = _sample_batch(
            model, ids.to(model.device), mask.to(model.device), chances, last, temperature
        )
        for i, response in zip(rows, found.tolist(), strict=True):
            responses[i] = _up_to_end(response, ends)
    return responses


def responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Row | str],
    *,
    each: int = 1,
    seed: int | tuple[int, ...] = 0,
    max_new_tokens: int = 48,
    template: str = "auto",
    temperature: float = 1.0,
) -> list[list[str]]:
    """`each` sampled responses to every prompt, as texts; prompts and errors as in `encode`.

    With one seed, two models meet the same random numbers, and so differ only where their
    probabilities do.
    """
    asked = encode(prompts, model, tokenizer, template, max_new_tokens)
    several = [prompt.ids for prompt in asked for _ in range(each)]
    chances = np.random.default_rng(seed).random((len(several), max_new_tokens))
    ids = sample(
        model, several, chances, ends=end_ids(model, tokenizer), pad_id=tokenizer.pad_token_id,
        temperature=temperature,
    )  # fmt: skip
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those of the model's own settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or ())}


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (1 = token), both (B, T), padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def ready_mask(seen: Tensor, queries: int) -> Tensor:
    """Who may look at whom, for the last `queries` positions: (B, K) → bool (B, 1, queries, K).

    At earlier real tokens and at oneself, so that padding has somewhere to look, too.
    """
    keys = torch.arange(seen.shape[1], device=seen.device)
    own = keys[-queries:, None]
    return (seen.bool()[:, None, None] & (keys <= own)) | (keys == own)


def _takes_ready_mask(model: Any) -> bool:
    config = base_model(model).config
    plain = {*(getattr(config, "layer_types", None) or ())} <= {"full_attention"}
    windows = getattr(config, "sliding_window", None) is not None or not plain
    known = config.model_type in TAKE_READY_MASK and not windows
    return known and config._attn_implementation == "sdpa"


def invert(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """The tokens (B,) at which the cumulative distributions of `logits` (B, V) pass `uniforms`.

    A token of probability 0 is never taken. Sums are in float64: float32 would lose the tail.
    """
    cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    wanted = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _sample_batch(
    model: Any, ids: Tensor, mask: Tensor, uniforms: Tensor, ends: Tensor, temperature: float
) -> Tensor:
    from transformers import DynamicCache

    (count, width), length = ids.shape, uniforms.shape[1]
    pause = STEPS_BETWEEN_QUESTIONS.get(ids.device.type, STEPS_ON_A_DEVICE)
    positioned = "position_ids" in inspect.signature(base_model(model).forward).parameters
    mask = torch.cat([mask, mask.new_ones(count, length)], dim=1)
    ready = READY_MASK.get(ids.device.type, True) and _takes_ready_mask(model)
    cache, rows = DynamicCache(), torch.arange(count, device=ids.device)
    tokens = ids.new_zeros(count, length)
    ended = torch.zeros(count, dtype=torch.bool, device=ids.device)
    for t in range(length):
        seen = mask[:, : width + t]
        extra = {"position_ids": position_ids(seen)[:, -ids.shape[1] :]} if positioned else {}
        attention = ready_mask(seen, ids.shape[1]) if ready else seen
        output = model(input_ids=ids, attention_mask=attention, past_key_values=cache, use_cache=True,
                       logits_to_keep=1, **extra)  # fmt: skip
        drawn = invert(output.logits[:, -1], uniforms[:, t], temperature)
        tokens[rows, t], ids = drawn, drawn[:, None]
        ended |= torch.isin(drawn, ends)
        if (t + 1) % pause == 0:
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) <= (1 - WORTH_DROPPING) * len(rows):
                cache.batch_select_indices(going)
                ids, mask, uniforms = ids[going], mask[going], uniforms[going]
                rows, ended = rows[going], ended[going]
    return tokens


def _up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]
