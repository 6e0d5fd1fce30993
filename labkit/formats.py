"""Recognizes how a row is laid out and converts it to TRL's columns.

| format | columns | becomes |
| --- | --- | --- |
| self_instruct | instruction, instances[{input, output}] | prompt, completion, one an instance |
| coig | instruction, conversations[{question, answer}] | messages |
| sharegpt | conversations[{from, value}] | messages |
| ranking | prompt, responses, ranks (1 = best) | the same |
| preference | prompt, chosen, rejected | the same |
| transcripts | chosen, rejected (hh-rlhf's text, or messages) | prompt, chosen, rejected |
| messages | messages[{role, content}] | the same |
| alpaca | instruction, output (input) | prompt, completion; instruction and input are kept |
| pairs | prompt/completion, prompt/response, question/answer, … | prompt, completion |
| text | text | the same |

The first row decides the format for all. Further columns (an id, a task name) are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

CANONICAL = ("prompt", "completion", "chosen", "rejected", "messages", "text", "responses", "ranks")
# In this order: a row with `messages` and `text` beside its preference columns is a preference.
FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("self_instruct", ("instruction", "instances")),
    ("coig", ("instruction", "conversations")),
    ("sharegpt", ("conversations",)),
    ("ranking", ("prompt", "responses", "ranks")),
    ("preference", ("prompt", "chosen", "rejected")),
    ("transcripts", ("chosen", "rejected")),
    ("messages", ("messages",)),
    ("alpaca", ("instruction", "output")),
    ("pairs", ("prompt", "completion")),
    ("pairs", ("prompt", "response")),
    ("pairs", ("question", "answer")),
    ("pairs", ("inputs_pretokenized", "targets_pretokenized")),
    ("pairs", ("inputs", "targets")),
    ("text", ("text",)),
)
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool",
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def recognize(row: Row) -> str:
    """The name of the row's format; ValueError with its columns if no format fits."""
    return _recognize(row, "row")[0]


def convert(rows: Iterable[Row], source: str) -> list[Row]:
    """Rows of any known format as rows with TRL's columns.

    `source` is what errors call the rows (a file, a hub id); rows are counted from 1. Raises
    ValueError for a row without its columns, with a value of the wrong type, or with an empty
    answer (nothing to learn from). An empty reply in a preference pair is allowed: hh-rlhf has
    some.
    """
    return [row for group in convert_groups(rows, source) for row in group]


def convert_groups(
    rows: Iterable[Row], source: str, rejected: list[str] | None = None
) -> list[list[Row]]:
    """Like `convert`, but keeps together what came from one row, so that a cut cannot part it.

    With a list for `rejected`, a row that does not convert is left out and its message appended.
    """
    groups: list[list[Row]] = []
    layout: tuple[str, tuple[str, ...]] | None = None
    for number, row in enumerate(rows, start=1):
        where = f"data: {source}, row {number}"
        try:
            if layout is None:
                layout = _recognize(row, where)
            groups.append(_convert_row(row, layout, where))
        except ValueError as error:
            if rejected is None:
                raise
            rejected.append(str(error))
    return groups


def _recognize(row: Row, where: str) -> tuple[str, tuple[str, ...]]:
    for name, columns in FORMATS:
        if all(row.get(column) is not None for column in columns):
            return name, columns
    known = "; ".join(dict.fromkeys(" + ".join(columns) for _, columns in FORMATS))
    raise ValueError(f"{where}: no known format has the columns {_names(row)}; expected {known}")


def _convert_row(row: Row, layout: tuple[str, tuple[str, ...]], where: str) -> list[Row]:
    name, columns = layout
    for column in columns:
        if row.get(column) is None:
            raise ValueError(
                f"{where}: expected the columns {', '.join(columns)} ({name}, as the first row), "
                f"got no {column!r} among {_names(row)}; complete the row or take it out"
            )
    used = {*columns, *CANONICAL}
    rest = {key: value for key, value in row.items() if key not in used}
    return [{**rest, **new} for new in _CONVERTERS[name](row, columns, where)]


def _self_instruct(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    instances = row["instances"]
    if not isinstance(instances, list) or not instances:
        raise ValueError(f"{where}: 'instances': expected a list of {{input, output}}, got "
                         f"{instances!r}")  # fmt: skip
    shared = {"instruction": row["instruction"]}
    converted = []
    for instance in instances:
        if not isinstance(instance, dict) or "output" not in instance:
            raise ValueError(f"{where}: 'instances': expected {{input, output}}, got {instance!r}")
        converted += _alpaca({**shared, **instance}, columns, where)
    return converted


def _alpaca(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    instruction = _text(row, "instruction", where)
    given = _text({"input": row.get("input") or ""}, "input", where)
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    completion = _answer(row, "output", where)
    return [{"prompt": prompt, "completion": completion, "instruction": instruction,
             "input": given}]  # fmt: skip


def _pairs(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    prompt, completion = columns
    if isinstance(row[prompt], list):
        return [{"prompt": _messages(row[prompt], prompt, where),
                 "completion": _messages(row[completion], completion, where)}]  # fmt: skip
    return [{"prompt": _text(row, prompt, where), "completion": _answer(row, completion, where)}]


def _plain(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    return [{"text": _answer(row, "text", where)}]


def _chat(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    column = columns[-1]
    messages = _messages(row[column], column, where)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or not answers[-1]["content"].strip():
        raise ValueError(f"{where}: {column!r}: expected an answer of the assistant, got none")
    return [{"messages": messages}]


def _coig(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    turns = _list(row["conversations"], "conversations", where)
    if not turns or not all(isinstance(turn, dict) and "question" in turn for turn in turns):
        return _chat({"conversations": turns}, ("conversations",), where)
    messages: list[Message] = []
    for turn in turns:
        messages.append({"role": "user", "content": _text(turn, "question", where)})
        messages.append({"role": "assistant", "content": _answer(turn, "answer", where)})
    instruction = _text(row, "instruction", where)
    if instruction.strip():
        messages[0]["content"] = f"{instruction}\n\n{messages[0]['content']}".strip()
    return [{"messages": messages}]


def _preference(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    if isinstance(row["prompt"], list):
        names = ("prompt", "chosen", "rejected")
        return [{name: _messages(row[name], name, where) for name in names}]
    if isinstance(row["chosen"], list):
        return _transcripts(row, columns, where)
    return [{name: _text(row, name, where) for name in ("prompt", "chosen", "rejected")}]


def _transcripts(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    """Two conversations with a common beginning: that is the prompt, the rest the two replies."""
    chosen, rejected = (_conversation(row, name, where) for name in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    replies = chosen[shared:], rejected[shared:]
    if not shared or not all(reply and reply[0]["role"] == "assistant" for reply in replies):
        raise ValueError(
            f"{where}: expected chosen and rejected to share their beginning and to differ in a "
            f"reply of the assistant; they share {shared} turns of {len(chosen)} and "
            f"{len(rejected)}, and what follows is no pair of replies"
        )
    return [{"prompt": chosen[:shared], "chosen": replies[0], "rejected": replies[1]}]


def _conversation(row: Row, column: str, where: str) -> list[Message]:
    if isinstance(row[column], list):
        return _messages(row[column], column, where)
    parts = _TURN.split(_text(row, column, where))
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(
            f"{where}: {column!r}: expected a transcript of turns '\\n\\nHuman: …' and "
            f"'\\n\\nAssistant: …', got {row[column][:60]!r}"
        )
    turns: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = ROLES[speaker.lower()]
        # Many chat templates refuse two turns of the same role in a row; hh-rlhf has some.
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content.strip()}".strip()
        else:
            turns.append({"role": role, "content": content.strip()})
    return turns


def _ranking(row: Row, columns: tuple[str, ...], where: str) -> list[Row]:
    prompt, responses, ranks = (row[column] for column in columns)
    fits = isinstance(responses, list) and isinstance(ranks, list)
    if not fits or len(responses) != len(ranks) or len(responses) < 2:
        raise ValueError(
            f"{where}: expected two or more responses and as many ranks (1 = best), got "
            f"{_count(responses)} responses and {_count(ranks)} ranks"
        )
    if not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
        raise ValueError(f"{where}: 'ranks': expected whole numbers from 1 (best), got {ranks!r}")
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"{where}: 'ranks': expected no ties (decide them, or leave a response out), "
                         f"got {ranks!r}")  # fmt: skip
    for response in responses:
        _text({"responses": response}, "responses", where)
    _ = prompt if isinstance(prompt, list) else _text(row, "prompt", where)
    return [{"prompt": prompt, "responses": responses, "ranks": ranks}]


_CONVERTERS: dict[str, Callable[[Row, tuple[str, ...], str], list[Row]]] = {
    "self_instruct": _self_instruct, "coig": _coig, "sharegpt": _chat, "ranking": _ranking,
    "preference": _preference, "transcripts": _transcripts, "messages": _chat,
    "alpaca": _alpaca, "pairs": _pairs, "text": _plain,
}  # fmt: skip


def _messages(turns: Any, column: str, where: str) -> list[Message]:
    messages = []
    for turn in _list(turns, column, where):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: {column!r}: expected role and content, got {turn!r}")
        role = turn.get("role", turn.get("from"))
        if role not in ROLES:
            raise ValueError(
                f"{where}: {column!r}: expected a role among {', '.join(ROLES)}, got {role!r}"
            )
        content = _text({column: turn.get("content", turn.get("value"))}, column, where)
        messages.append({"role": ROLES[role], "content": content})
    if not messages:
        raise ValueError(f"{where}: {column!r}: expected at least one message, got none")
    return messages


def _list(turns: Any, column: str, where: str) -> list[Any]:
    # Arrow hands a sequence of structs over as one dict of lists.
    if isinstance(turns, dict) and turns and all(isinstance(v, list) for v in turns.values()):
        return [
            dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)
        ]
    if not isinstance(turns, list):
        raise ValueError(f"{where}: {column!r}: expected a list of messages, got {_type(turns)}")
    return turns


def _text(row: Row, column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r}: expected text, got {_type(value)}")
    if _SURROGATE.search(value):
        raise ValueError(f"{where}: {column!r}: holds half a Unicode pair (\\ud800…\\udfff); "
                         "write the whole character")  # fmt: skip
    return value


def _answer(row: Row, column: str, where: str) -> str:
    value = _text(row, column, where)
    if not value.strip():
        raise ValueError(f"{where}: {column!r} is empty, so nothing could be learned from it; "
                         "complete the row or take it out")  # fmt: skip
    return value


def _names(row: Row) -> str:
    return ", ".join(str(key) for key, value in row.items() if value is not None) or "(none)"


def _type(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]}"


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else _type(value)
