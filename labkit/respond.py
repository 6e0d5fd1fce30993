"""Responses to prompts, texts in and texts out, from a model in this process or on a server.

    response = f(settings, prompt, number)        number: how often the same prompt came before

What decides a response is also its name in a cache on disk (`cached`). So a generation that was
interrupted goes on where it stopped, and the same prompt twice gives two samples, not one twice.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import torch

from labkit.generate import encode_prompts, sample, texts
from labkit.models import eos_ids

log = logging.getLogger("labkit")

Respond = Callable[[list[str]], list[str]]
Ask = tuple[str, int]  # a prompt, and how often it came before
Found = Iterator[tuple[int, str]]  # responses as they come, each with the index of its `Ask`


@dataclass(frozen=True, repr=False)
class Responder:
    """A `Respond` that tells what decides its responses, and can yield them one by one."""

    ask: Callable[[list[Ask]], Found]
    settings: Callable[[], dict[str, Any]]  # without key and address
    _came: Counter[str] = field(default_factory=Counter)

    def __call__(self, prompts: list[str]) -> list[str]:
        if isinstance(prompts, str):
            raise ValueError("prompts: expected a list of texts, got one text; write [prompt]")
        came, asks = self._came.copy(), []
        for prompt in prompts:
            asks.append((prompt, came[prompt]))
            came[prompt] += 1
        found = dict(self.ask(asks))
        self._came.update(prompts)  # after a failure the same call asks the same
        return [found[i] for i in range(len(asks))]


def from_model(
    model: Any,
    tokenizer: Any,
    *,
    template: str = "auto",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    long: Literal["refused", "cut"] = "refused",
) -> Responder:
    """Responses sampled here. Random numbers are a prompt's own, so its batch does not matter.

    `long`, of a prompt too long for the context: cut, it loses its beginning, where examples
    stand. Raises ValueError, see `generate.encode_prompts`.
    """

    def ask(asks: list[Ask]) -> Found:
        limits: Any = {"template": template, "max_new_tokens": max_new_tokens, "long": long}
        prompts = [prompt for prompt, _ in asks]
        encoded = encode_prompts(prompts, model, tokenizer, **limits) if asks else []
        ends = eos_ids(model, tokenizer, template)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        order = sorted(range(len(asks)), key=lambda i: len(encoded[i].ids))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            seeds = [(seed, zlib.crc32(asks[i][0].encode()), asks[i][1]) for i in batch]
            u = np.stack([np.random.default_rng(each).random(max_new_tokens) for each in seeds])
            ids = [encoded[i].ids for i in batch]
            found = sample(model, ids, ends=ends, uniforms=u, batch_size=batch_size, **options)
            yield from zip(batch, texts(tokenizer, found, ends), strict=True)

    def settings() -> dict[str, Any]:
        weights = 0
        for tensor in model.state_dict().values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            weights = zlib.crc32(data.numpy(), weights)
        about = {"weights": weights, "template": template, "chat": tokenizer.chat_template}
        return about | {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}

    return Responder(ask, settings)


def from_server(
    model: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    chat: bool = True,
    max_tokens: int | None = 256,
    temperature: float | None = 0.0,
    seed: int | None = None,
    timeout: float = 60.0,
    retries: int = 5,
    concurrency: int = 8,
) -> Responder:
    """Responses of a server that speaks OpenAI's protocol, `concurrency` at a time.

    `base_url` and `api_key` default to OPENAI_BASE_URL and OPENAI_API_KEY. A prompt is the user's
    turn, or with `chat=False` (a base model) the text to continue. A setting that is None is not
    sent. Lost connections, time-outs (seconds), 429 and 5xx are tried `retries` times more with
    backoff, by the official client. Once a prompt has failed, only those on their way are waited
    for. Raises ConnectionError, TimeoutError, PermissionError, or ValueError for what the server
    rejects.
    """
    import openai

    url = base_url or os.environ.get("OPENAI_BASE_URL") or None
    key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
    if url and not url.startswith(("http://", "https://")):
        raise ValueError("base_url: expected http://… or https://…, most often with /v1 at the end")
    if not (key or url) or not (key.isascii() and key.isprintable()):
        expected = "a key in ASCII, or OPENAI_API_KEY, or the base_url of a server that needs none"
        raise ValueError(f"api_key: expected {expected}")
    limits: Any = {"timeout": timeout, "max_retries": retries}
    client = openai.OpenAI(base_url=url, api_key=key or "none", **limits)
    place = client.base_url.copy_with(userinfo=b"", query=None)
    create: Any = client.chat.completions.create if chat else client.completions.create
    sent = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    sent = {name: value for name, value in sent.items() if value is not None}

    def request(prompt: str, number: int, failed: Event) -> str | None:
        if failed.is_set():
            return None
        turn = {"role": "user", "content": prompt}
        own: Any = {"messages": [turn]} if chat else {"prompt": prompt}
        own |= {} if seed is None else {"seed": seed + number}
        try:
            return _text(create(**(sent | own)), chat)
        except (openai.OpenAIError, ValueError) as error:
            failed.set()
            raise _explained(error, f"{model} at {place}", key) from None

    def ask(asks: list[Ask]) -> Found:
        failed, errors = Event(), []
        with ThreadPoolExecutor(concurrency) as pool:
            futures = {pool.submit(request, *ask, failed): i for i, ask in enumerate(asks)}
            try:
                for future in as_completed(futures):
                    if error := future.exception():
                        errors.append(error)
                    elif (text := future.result()) is not None:
                        yield futures[future], text
            finally:  # also when whoever takes the responses has stopped
                failed.set()
        if errors:
            raise errors[0]

    return Responder(ask, lambda: sent | {"chat": chat})


def _text(reply: Any, chat: bool) -> str:
    """The client passes on whatever a server sends with status 200."""
    try:
        choice = reply.choices[0]
        text = choice.message.content if chat else choice.text
    except (AttributeError, IndexError, TypeError):
        raise ValueError(f"expected a completion, got {reply!r}") from None
    if text is None:
        log.warning("a response has no text (finish_reason %s)", choice.finish_reason)
    return text or ""


def _explained(error: Exception, who: str, key: str) -> Exception:
    """What to do, and what the server said, without the key, which some servers repeat."""
    import openai

    kind: type[Exception] = ValueError
    todo = "check base_url, the name of the model, and whether it takes these settings"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        kind, todo = PermissionError, "check api_key or OPENAI_API_KEY"
    elif isinstance(error, openai.APITimeoutError):
        kind, todo = TimeoutError, "take a longer timeout or less concurrency"
    elif isinstance(error, openai.APIConnectionError):
        kind, todo = ConnectionError, "see that the server runs, then call again"
    elif isinstance(error, openai.RateLimitError | openai.InternalServerError):
        kind, todo = ConnectionError, "call again later, with less concurrency or more retries"
    said = str(error)  # the client shows OpenAI's form only
    if isinstance(error, openai.APIStatusError) and error.body:
        said = f"{error.status_code}, {error.body}"
    said = said.replace(key, "…") if key else said
    return kind(f"{who}: {type(error).__name__}: {said[:300]}; {todo}")


def cached(respond: Respond, file: str | Path, key: Any = None) -> Responder:
    """`respond`, but a response that is in `file` is not asked for; new ones are added as they come.

    Each line names what decides its response by a checksum: of a `Responder`'s settings (a model's
    weights as they are now, but not which adapter is on), of `key`, and of the prompt and its
    number. A `respond` of another kind needs a `key`, in JSON, and is asked one prompt at a time.
    """
    if not isinstance(respond, Responder):
        if key is None:
            raise ValueError("key: expected what decides the responses (model, settings), got None")
        one: Respond = respond
        respond = Responder(lambda asks: ((i, one([p])[0]) for i, (p, _) in enumerate(asks)), dict)
    file, inner, decides = Path(file).expanduser(), respond.ask, [respond.settings(), key]
    kept = _read(file)

    def ask(asks: list[Ask]) -> Found:
        texts = [json.dumps([decides, *ask], sort_keys=True) for ask in asks]
        names = [blake2b(text.encode(), digest_size=16).hexdigest() for text in texts]
        new = [i for i, name in enumerate(names) if name not in kept]
        yield from [(i, kept[name]) for i, name in enumerate(names) if name in kept]
        try:
            for i, response in inner([asks[i] for i in new]) if new else ():
                name, prompt = names[new[i]], asks[new[i]][0]
                line = json.dumps({"id": name, "prompt": prompt, "response": response})
                with file.open("a", encoding="utf-8") as out:
                    out.write(line + "\n")
                kept[name] = response
                yield new[i], response
        except BaseException as error:
            have = f"{sum(name in kept for name in names)} of {len(names)} responses"
            error.add_note(f"{have} are kept in {file}: the same call asks for the others only")
            raise

    return Responder(ask, lambda: {"respond": decides})


def _read(file: Path) -> dict[str, str]:
    """Responses by checksum; of a line that a killed process left unfinished there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    if text and not text.endswith("\n"):
        with file.open("a", encoding="utf-8") as out:
            out.write("\n")
    kept: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            kept[row["id"]] = row["response"]
        except json.JSONDecodeError:
            log.warning("%s: line %d is damaged, its response is asked for again", file, number)
        except (KeyError, TypeError):
            raise ValueError(f"{file}: line {number}: expected one of a cache") from None
    return kept
