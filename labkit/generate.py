"""Batched responses to prompts, from a model in this process or from a server.

Prompts are final strings: templates are applied before (`data.render`), and no special
token is added here. Sampling is pure: nothing is inherited from the model's own generation
settings but its end tokens. Left out: streaming, beam search.
"""

import contextlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from labkit import models

log = logging.getLogger("labkit")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    batch_size: int = 64,
    seed: int | None = None,
) -> list[str]:
    """Return one response for each prompt, in order, without special tokens.

    Temperature 0 is greedy. Prompts of similar length share a batch, padded on the left.
    With `seed` the global random state is left as it was; samples then depend on the seed
    and on `batch_size`. Prompts too long for the model's context lose their beginning,
    counted in a warning. Train or eval mode is restored. Raises `ValueError`.
    """
    _check(prompts, max_new_tokens, temperature, top_p, top_k)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    rows = [_encode(tokenizer, prompt, number) for number, prompt in enumerate(prompts)]
    rows = _fit_context(model, rows, max_new_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p, top_k)
    responses = [""] * len(rows)
    with _eval_mode(model), _pure_sampling(model), _seeded(seed):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts = _generate_batch(model, tokenizer, [rows[i] for i in batch], settings)
            for i, text in zip(batch, texts, strict=True):
                responses[i] = text
    return responses


def _check(
    prompts: list[str], max_new_tokens: int, temperature: float, top_p: float, top_k: int = 0
) -> None:
    if isinstance(prompts, str):
        raise ValueError("prompts: expected a list of strings, got one string; write [prompt]")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and up to 1, got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 (off) or more, got {top_k}")


def _encode(tokenizer: Any, prompt: str, number: int) -> list[int]:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"prompts: prompt {number} is empty; the model needs at least one token to go on from"
        )
    return ids


def _fit_context(model: Any, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    context = models.context_length(model)
    if context is None:
        return rows
    room = context - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens: expected less than the model's context of {context} tokens, "
            f"got {max_new_tokens}"
        )
    cut = sum(len(row) > room for row in rows)
    if cut:
        log.warning(
            "%d of %d prompts are longer than %d tokens (context %d less %d new): beginning cut",
            *(cut, len(rows), room, context, max_new_tokens),
        )
    return [row[-room:] for row in rows]


def _settings(
    model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float, top_k: int
) -> Any:
    from transformers import GenerationConfig

    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        if temperature > 0
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )


def _generate_batch(model: Any, tokenizer: Any, rows: list[list[int]], settings: Any) -> list[str]:
    import torch

    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    if pad is None:
        raise ValueError("tokenizer: expected a pad token, got none; see models.check_tokenizer")
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
    ends = set(settings.eos_token_id)
    replies = [_until_end(reply, ends) for reply in output[:, width:].tolist()]
    return tokenizer.batch_decode(replies, skip_special_tokens=True)


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Each module gets its own mode back: a frozen part may differ from the whole."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _pure_sampling(model: Any) -> Iterator[None]:
    """The library fills unset fields from the model's own settings (penalties, top-k)."""
    from transformers import GenerationConfig

    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    former = owner.generation_config
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = former


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    import torch

    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def generate_server(
    base_url: str,
    model: str,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    api_key_env: str = "OPENAI_API_KEY",
) -> list[str]:
    """Return one response for each prompt, in order, from an OpenAI-compatible server.

    Posts to `<base_url>/completions`, `concurrency` at a time; `base_url` ends in `/v1`
    (added if missing). The key is read from the environment variable `api_key_env` and
    sent only if set. `timeout` is in seconds a request; a busy server (429, 503) is asked
    three times. Raises `ValueError`, or `ConnectionError` naming the server and the answer.
    """
    _check(prompts, max_new_tokens, temperature, top_p)
    url = _completions_url(base_url)
    body = {
        "model": model,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    if seed is not None:
        body["seed"] = seed
    key = os.environ.get(api_key_env)
    pool = ThreadPoolExecutor(max_workers=max(1, concurrency))
    try:
        jobs = [pool.submit(_post, url, {**body, "prompt": p}, key, timeout) for p in prompts]
        return [job.result() for job in jobs]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _completions_url(base_url: str) -> str:
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(
            f"base_url: expected an address such as http://localhost:8000/v1, got {base_url!r}"
        )
    base = base_url.rstrip("/")
    return (base if base.endswith("/v1") else base + "/v1") + "/completions"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(url: str, body: dict, key: str | None, timeout: float) -> str:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    opener = urllib.request.build_opener(_NoRedirect)
    for wait in (0.5, 1.0, None):
        try:
            with opener.open(request, timeout=timeout) as answer:
                return _text(json.loads(answer.read()), url)
        except urllib.error.HTTPError as error:
            if error.code not in (429, 503) or wait is None:
                detail = error.read(300).decode(errors="replace").strip()
                raise ConnectionError(
                    f"base_url: {url} answered {error.code} {error.reason}: {detail}; check the "
                    "model's name, the key and the server's log"
                ) from error
            time.sleep(wait)
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"base_url: no usable answer from {url} ({error}); expected an OpenAI-compatible "
                "server there; check that it runs"
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _text(answer: Any, url: str) -> str:
    try:
        return answer["choices"][0]["text"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"expected choices[0].text, got {str(answer)[:200]}") from error
