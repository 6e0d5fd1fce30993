"""Whoever continues prompts, a model or a server, behind one call; its answers can be kept.

A run of many calls is resumed by asking again: what was answered comes from a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

Respond = Callable[[list[str]], list[str]]  # prompts → one continuation each


def respond_to(respond: Respond, prompts: list[str], batch: int) -> Iterator[str]:
    """The continuations of `prompts`, asked for `batch` at a time."""
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        replies = list(respond(part))
        if len(replies) != len(part):
            raise ValueError(f"respond: expected {len(part)} continuations, got {len(replies)}")
        yield from replies


def resumable(respond: Respond, file: str | Path) -> Respond:
    """`respond` whose answers are kept in `file`: a killed run, started again, pays for none twice.

    Calls are answered in their order. ValueError for a prompt other than in the run before.
    """
    path = Path(file).expanduser()
    text = path.read_text("utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a killed write leaves half a line
    if whole != text:
        path.write_text(whole, "utf-8")
    known = [json.loads(line) for line in whole.split("\n")[:-1]]

    def answer(prompts: list[str]) -> list[str]:
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        if known:
            entry = known.pop(0)
            if entry["prompts"] != digest:
                raise ValueError(
                    f"{path}: expected the prompts of the run that wrote it, got others"
                )
            return entry["replies"]
        replies = list(respond(prompts))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as out:
            line = json.dumps({"prompts": digest, "replies": replies}, ensure_ascii=False)
            out.write(line + "\n")
        return replies

    return answer
