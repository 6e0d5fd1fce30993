"""Responses to prompts: token ids sampled with a KV cache, and texts from them.

    x_t = min {i : sum over j <= i of p(j | x_<t) > u_t}        u_t uniform in [0, 1)

This inverts the cumulative distribution, so an example depends on its own u only: however batches
are cut or processes share the work, samples stay the same, up to rounding. Temperature 0 takes the
most probable token. Of the model's own generation settings only the EOS tokens count.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from labkit import models, templates
from labkit.logprobs import evaluating, has_soft_prompt
from labkit.models import eos_ids
from labkit.templates import Row

log = logging.getLogger("labkit")

# To learn whether examples have ended, the host must wait for a GPU; on a CPU it costs nothing.
STEPS_BETWEEN_CHECKS = {"cpu": 1}
WORTH_DROPPING = 0.2  # share of a batch that must have ended before the others are copied together


@torch.no_grad()
def sample(
    model: Any,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: set[int],
    uniforms: np.ndarray | None = None,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[list[int]]:
    """Token ids of a response to each prompt, up to and with its EOS (of `ends`), if it has one.

    `uniforms` is (prompts, max_new_tokens) in [0, 1), by default new random numbers. Prompts of
    similar length share a batch, padded on the left. Dropout is off. Raises ValueError.
    """
    if max_new_tokens < 1 or batch_size < 1 or not temperature >= 0:
        given = f"got {max_new_tokens}, {batch_size}, {temperature}"
        raise ValueError(f"max_new_tokens, batch_size, temperature: expected 1, 1, 0 up, {given}")
    if uniforms is None:
        uniforms = np.random.default_rng().random((len(ids), max_new_tokens))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    responses: list[list[int]] = [[]] * len(ids)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            u = torch.from_numpy(uniforms[batch]).to(model.device)
            tokens = _sample_batch(model, [ids[i] for i in batch], u, ends, temperature)
            for i, found in zip(batch, tokens.tolist(), strict=True):
                stop = next((t + 1 for t, x in enumerate(found) if x in ends), None)
                responses[i] = found[:stop]
    return responses


def invert(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """The tokens (B,) at which the cumulative distributions of `logits` (B, V) pass `uniforms`.

    A token of probability 0 is never taken. Sums are in float64: float32 would lose the tail.
    """
    if temperature == 0:
        return logits.float().argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    wanted = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _sample_batch(
    model: Any, prompts: list[Sequence[int]], uniforms: Tensor, ends: set[int], temperature: float
) -> Tensor:
    """Tokens (B, T); those after an EOS are arbitrary."""
    count, length = uniforms.shape
    forward, cache, virtual = _begin(model, count)
    accepted = inspect.signature(models.base_model(model).forward).parameters
    width = max(map(len, prompts))  # what stands under padding is never seen
    new = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts]).to(model.device)
    real = new.new_ones(count, virtual + width + length)
    for row, ids in enumerate(prompts):
        real[row, virtual : virtual + width - len(ids)] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)  # count real tokens only
    last = torch.tensor(sorted(ends), dtype=torch.long, device=model.device)
    tokens, rows = new.new_zeros(count, length), torch.arange(count, device=model.device)
    ended = rows < 0
    for t, end in enumerate(range(virtual + width, real.shape[1])):
        inputs = {"input_ids": new, "attention_mask": real[:, :end], "use_cache": cache is not None}
        optional = {"position_ids": positions[:, end - new.shape[1] : end], "logits_to_keep": 1}
        inputs |= {name: value for name, value in optional.items() if name in accepted}
        inputs |= {"past_key_values": cache} if cache is not None else {}
        drawn = invert(forward(**inputs).logits[:, -1], uniforms[:, t], temperature)
        tokens[rows, t] = drawn
        new = drawn[:, None] if cache is not None else torch.cat([new, drawn[:, None]], 1)
        ended |= torch.isin(drawn, last)
        if (t + 1) % STEPS_BETWEEN_CHECKS.get(model.device.type, 16):
            continue
        going = (~ended).nonzero()[:, 0]
        if len(going) == 0:
            break
        if len(going) <= (1 - WORTH_DROPPING) * len(rows):
            state = (new, real, positions, uniforms, rows, ended)
            new, real, positions, uniforms, rows, ended = (x[going] for x in state)
            if cache is not None:
                cache.reorder_cache(going)
    return tokens


def _begin(model: Any, count: int) -> tuple[Any, DynamicCache | None, int]:
    """What to call, its KV cache (none for Mamba), and the virtual tokens that it holds already.

    PEFT would put a soft prompt or prefix in front at every call; here it is read once.
    """
    base: Any = models.base_model(model)
    if "past_key_values" not in inspect.signature(base.forward).parameters:
        return model, None, 0
    if not has_soft_prompt(model):
        return model, DynamicCache(config=base.config), 0
    cache = model.get_prompt(count)
    if isinstance(cache, Tensor):
        inputs, cache = {"inputs_embeds": cache.to(base.dtype)}, DynamicCache(config=base.config)
        base(**inputs, past_key_values=cache, use_cache=True)
    return base, cache, model.active_peft_config.num_virtual_tokens


def texts(tokenizer: Any, responses: Sequence[Sequence[int]], ends: set[int]) -> list[str]:
    """Token ids as texts, without EOS and special tokens."""
    kept = [ids[:-1] if ids[-1] in ends else ids for ids in responses]
    return tokenizer.batch_decode(kept, skip_special_tokens=True) if kept else []


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 64,
    seed: int | None = None,
) -> list[str]:
    """One response to each prompt, a final string: no template and no special token is added.

    Prompts too long for the model's context lose their beginning, with a warning. Raises
    ValueError for a prompt without a token, and for `max_new_tokens` beyond the context.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: expected a list of strings, got one string; write [prompt]")
    ids, _ = _tokens(prompts, model, tokenizer, max_new_tokens, cut=True)
    options = {"temperature": temperature, "batch_size": batch_size}
    return _sample_texts(model, tokenizer, ids, "auto", seed, max_new_tokens, **options)


def _sample_texts(
    model: Any, tokenizer: Any, ids: list, template: str, seed: Any, length: int, **options: Any
) -> list[str]:
    options |= {"max_new_tokens": length, "ends": eos_ids(model, tokenizer, template)}
    options["uniforms"] = np.random.default_rng(seed).random((len(ids), length))
    return texts(tokenizer, sample(model, ids, **options), options["ends"])


def _tokens(
    prompts: Sequence[str], model: Any, tokenizer: Any, max_new_tokens: int, cut: bool
) -> tuple[list[list[int]], int]:
    """Token ids, and how many of them the context has room for; `cut` takes beginnings away."""
    ids = templates.tokenize(prompts, tokenizer)
    if [] in ids:
        raise ValueError(f"prompts: prompt {ids.index([]) + 1}: expected a token or more, got none")
    capacity = (models.context_length(model) or sys.maxsize) - max_new_tokens
    if capacity < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} leave the context no prompt")
    if cut and (long := sum(len(prompt) > capacity for prompt in ids)):
        log.warning("%d of %d prompts cut to their last %d tokens", long, len(ids), capacity)
        ids = [prompt[-capacity:] for prompt in ids]
    return ids, capacity


@dataclass(frozen=True)
class Prompt:
    """A prompt: its row, what a reward sees of it, its text in the template, that text's ids."""

    row: Row
    content: Any
    text: str
    ids: list[int]


def encode_prompts(
    prompts: Sequence[Prompt | Row | str],
    model: Any,
    tokenizer: Any,
    template: str,
    max_new_tokens: int,
    long: Literal["refused", "cut", "left out"] = "refused",
) -> list[Prompt]:
    """Texts, or rows with `prompt` or `messages`, in their template; `Prompt`s stay as they are.

    `long`: what becomes of one that leaves less than `max_new_tokens` of the context to a response;
    "cut" takes its beginning away. A warning says how many are cut or left out. Raises ValueError,
    with its number, for a prompt that is refused, one of another kind, and one without a token.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts: expected a list of texts or rows, got {prompts!r}")
    if len(done := [prompt for prompt in prompts if isinstance(prompt, Prompt)]) == len(prompts):
        return done
    rows: list[Any] = [{"prompt": p} if isinstance(p, str) else p for p in prompts]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not {"prompt", "messages"} & set(row):
            raise ValueError(f"prompts: prompt {number}: expected text or a row, got {row!r}")
    contents = [row["prompt"] if "prompt" in row else templates.turns(row) for row in rows]
    asked = [row | {"prompt": c, "completion": ""} for row, c in zip(rows, contents, strict=True)]
    rendered = [text for text, _ in map(templates.renderer(tokenizer, template), asked)]
    ids, capacity = _tokens(rendered, model, tokenizer, max_new_tokens, cut=long == "cut")
    found = [Prompt(*fields) for fields in zip(rows, contents, rendered, ids, strict=True)]
    fitting = [prompt for prompt in found if len(prompt.ids) <= capacity]
    if long == "left out" and fitting:
        if out := len(found) - len(fitting):
            log.warning("%d of %d prompts left out: over %d tokens", out, len(found), capacity)
        return fitting
    for number, tokens in enumerate(ids, 1):
        if len(tokens) > capacity:
            expected = f"expected at most {capacity} tokens (context less max_new_tokens)"
            raise ValueError(f"prompts: prompt {number}: {expected}, got {len(tokens)}")
    return found


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
    """`each` sampled responses to every prompt, as texts; see `encode_prompts` (long ones are cut).

    With one seed, two models get the same random numbers, and so differ only where their
    probabilities do.
    """
    encoded = encode_prompts(prompts, model, tokenizer, template, max_new_tokens, "cut")
    ids = [prompt.ids for prompt in encoded for _ in range(each)]
    found = _sample_texts(
        model, tokenizer, ids, template, seed, max_new_tokens, temperature=temperature
    )
    return [found[i : i + each] for i in range(0, len(found), each)]
