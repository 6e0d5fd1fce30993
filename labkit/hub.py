"""Fetching a model's files from the hub, file by file, with bounded patience.

Only the hub's file protocol is used (`/<id>/resolve/<revision>/<file>`), so a mirror that
serves nothing else will do. The libraries ask again for up to minutes, and for ever if a
server cuts a file and cannot resume it; here the same request is sent three times at most.
Left out: adapters and data sets.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

log = logging.getLogger("labkit")

TRIES = 3
TIMEOUT = 10.0
SIDE_FILES = (
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
OLD_TOKENIZER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


class HubError(ConnectionError):
    """The hub did not deliver: unreachable, an error status, or a cut connection."""


def fetch(model: str, revision: str | None = None, *, with_code: bool = False) -> Path:
    """Download what loading `model` needs (safetensors only) and return its local folder.

    Without a network a complete copy in the cache is used, and said so by logging.
    `with_code` also takes the repository's Python files (for `trust_remote_code`).

    Raises `FileNotFoundError` for an unknown id or revision or a missing file,
    `PermissionError` for a gated model, `HubError` when the hub does not deliver.
    """
    from huggingface_hub import errors

    try:
        with bounded_patience():
            return _fetch_files(model, revision, local_only=False, with_code=with_code)
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"model: {model!r} is gated; accept its licence on the hub and log in "
            "(`hf auth login`), or give a local folder"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"model: expected a folder or a hub id, got {model!r}, which is neither a folder "
            f"here nor a model at {_endpoint()}; check the spelling (private models: log in)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"revision: {model!r} has no revision {revision!r}; give a branch, tag or commit"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise FileNotFoundError(_missing_file_message(model)) from error
    except Exception as error:
        return _cached_or_raise(model, revision, with_code, error)


def _cached_or_raise(model: str, revision: str | None, with_code: bool, error: Exception) -> Path:
    try:
        folder = _fetch_files(model, revision, local_only=True, with_code=with_code)
    except Exception:
        raise HubError(
            f"model: the hub ({_endpoint()}) did not deliver {model!r}: {_reason(error)}; check "
            "the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder"
        ) from error
    log.warning("hub: %s; using the cached copy of %s", _reason(error), model)
    return folder


def _fetch_files(model: str, revision: str | None, local_only: bool, with_code: bool) -> Path:
    """Config first, weights last: a copy with weights is a copy with all the rest."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if with_code:
        patterns = ["*.json", "*.safetensors", "*.py", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, local_files_only=local_only
            )
        )
    config = Path(
        hf_hub_download(model, "config.json", revision=revision, local_files_only=local_only)
    )
    commit = config.parent.name
    found = {name for name in SIDE_FILES if _optional(model, name, commit, local_only)}
    if "tokenizer.json" not in found:
        for name in OLD_TOKENIZER_FILES:
            _optional(model, name, commit, local_only)
    _fetch_weights(model, commit, local_only)
    return config.parent


def _fetch_weights(model: str, commit: str, local_only: bool) -> None:
    from huggingface_hub import hf_hub_download

    if _optional(model, "model.safetensors", commit, local_only):
        return
    index = hf_hub_download(
        model, "model.safetensors.index.json", revision=commit, local_files_only=local_only
    )
    shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(shards):
        hf_hub_download(model, name, revision=commit, local_files_only=local_only)


def _optional(model: str, name: str, commit: str, local_only: bool) -> bool:
    """Fetch one file that a model may lack; whether it is there now."""
    from huggingface_hub import errors, hf_hub_download

    absent = errors.LocalEntryNotFoundError if local_only else errors.RemoteEntryNotFoundError
    try:
        hf_hub_download(model, name, revision=commit, local_files_only=local_only)
    except absent:
        return False
    return True


@contextlib.contextmanager
def bounded_patience(tries: int = TRIES, timeout: float = TIMEOUT) -> Iterator[None]:
    """Within it, hub calls give up (`HubError`) after `tries` equal requests.

    Equal means method, address and byte range: a download that is cut but moves forward
    may resume as often as it needs. One attempt waits `timeout` seconds at most for an
    answer. The libraries' own warnings of each attempt are held back.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    former = _http._GLOBAL_CLIENT_FACTORY  # no public way to ask for it
    asked: Counter = Counter()
    failures = ["no answer"]

    def factory():
        client = former()
        send = client.send

        def send_bounded(request, **kwargs):
            key = (request.method, str(request.url), request.headers.get("range"))
            asked[key] += 1
            if asked[key] > tries:
                raise HubError(f"{failures[-1]} ({tries} times)")
            limits = request.extensions.get("timeout", {})
            request.extensions["timeout"] = {
                k: min(v or timeout, timeout) for k, v in limits.items()
            }
            try:
                response = send(request, **kwargs)
            except Exception as error:
                failures.append(_reason(error))
                raise
            if response.status_code >= 429:
                failures.append(f"HTTP {response.status_code}")
            return response

        client.send = send_bounded
        return client

    set_client_factory(factory)
    try:
        with _quiet("huggingface_hub"):
            yield
    finally:
        set_client_factory(former)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the innermost error: what happened, without the library's layers."""
    seen = error
    while (inner := seen.__cause__ or seen.__context__) is not None:
        seen = inner
    text = str(seen) or str(error)
    return text.splitlines()[0][:200] if text else type(seen).__name__


def _endpoint() -> str:
    """Host of the hub; the full address could hold a password."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _missing_file_message(model: str) -> str:
    return (
        f"model: {model!r} is on the hub but lacks config.json or safetensors weights "
        "(pickled weights are not read); choose a model or revision that has both"
    )
