"""Recognizes how rows are laid out and converts them to TRL's columns.

These are `prompt`, `completion` · `prompt`, `chosen`, `rejected` · `prompt`, `responses`, `ranks` ·
`messages` · `text`; prompts and replies are texts or lists of messages. Further columns are kept,
`system` becomes a message, and what would be lost (tool calls, images) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

# The first layout whose columns a row has is its own: preferences may have `messages` as well.
FORMATS = {
    "self_instruct": ["instruction instances"],
    "ranking": ["prompt responses ranks"],
    "preference": [f"{q} chosen rejected" for q in ("prompt", "instruction", "question", "query")]
    + ["conversations chosen rejected"],
    "coig": ["instruction conversations"],
    "sharegpt": ["conversations"],
    "transcripts": ["chosen rejected"],  # hh-rlhf: two whole conversations
    "messages": ["messages"],
    "alpaca": ["instruction output"],
    "pairs": ["prompt completion", "prompt response", "question answer", "question response"]
    + ["question std_answer", "query response", "inputs_pretokenized targets_pretokenized"]
    + ["inputs targets", "instruction response"],
    "text": ["text"],
}
CANONICAL = {"prompt", "completion", "chosen", "rejected", "messages", "text", "responses", "ranks"}
ROLES = {role: role for role in ("user", "assistant", "system", "tool")}
ROLES |= {"human": "user", "developer": "system"}
ROLES |= dict.fromkeys(["gpt", "chatgpt", "bing", "bard", "model"], "assistant")
LOST: tuple[str, ...] = (
    "tools",
    "functions",
    "tool_calls",
    "function_call",
    "reasoning_content",
    "history",
)
LOST += ("images", "videos", "audios")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Located(Row):
    """A row that knows its place in its file, for errors; else like any other dict."""

    where: str


def where(row: Row, number: int) -> str:
    """What errors call a row: its place in its file if known, else its number in the list."""
    return getattr(row, "where", f"rows: row {number}")


def recognize(row: Row) -> str:
    """The name of the row's format; ValueError with its columns if no format fits."""
    return _layout(row)[0]


def convert(
    rows: Iterable[Row],
    source: str,
    numbers: Iterable[int] | None = None,
    rejected: list[str] | None = None,
) -> list[Row]:
    """Rows of any known format, decided by the first, as rows with TRL's columns.

    Errors name `source` (a file, a hub id) and the row's number, from 1 if not given. Raises
    ValueError for a row without its columns, with a value of the wrong type, or with an empty
    answer (in a preference pair it may be empty: hh-rlhf has some). With a list for `rejected`, such
    a row is left out and its error appended.
    """
    converted: list[Row] = []
    layout = None
    for number, row in zip(numbers or count(1), rows, strict=False):
        place = f"data: {source}, row {number}"
        try:
            layout = layout or _layout(row)
            for new in map(Located, _convert_row(row, *layout)):
                new.where = place
                converted.append(new)
        except ValueError as error:
            if rejected is None:
                raise ValueError(f"{place}: {error}") from error
            rejected.append(f"{place}: {error}")
    return converted


def _layout(row: Row) -> tuple[str, list[str]]:
    for name, layouts in FORMATS.items():
        for columns in map(str.split, layouts):
            if all(row.get(column) is not None for column in columns):
                return name, columns
    known = "; ".join(layout.replace(" ", " + ") for group in FORMATS.values() for layout in group)
    raise ValueError(f"no known format has the columns {', '.join(row)}; expected {known}")


def _convert_row(row: Row, name: str, columns: list[str]) -> list[Row]:
    if missing := [column for column in columns if row.get(column) is None]:
        raise ValueError(
            f"expected {', '.join(columns)} as in the first row, got no {missing[0]!r}"
        )
    _check_lost(row)
    if str(row.get("label")).lower() == "false":
        raise ValueError("'label' is false: a bad answer would be learned; take the row out")
    rest = {key: value for key, value in row.items() if key not in CANONICAL | {*columns}}
    if name == "self_instruct":
        task, pair = {"instruction": row["instruction"]}, ["instruction", "output"]
        converted = [_pair(task | instance, pair) for instance in _objects(row, "instances")]
    else:
        converted = [_CONVERTERS.get(name, _chat)(row, columns)]
    system = row.get("system") or row.get("system_prompt")
    return [{**rest, **(_with_system(new, system) if system else new)} for new in converted]


def _check_lost(row: Row) -> None:
    if lost := [column for column in LOST if row.get(column)]:
        raise ValueError(f"{lost[0]!r} cannot be used and would be lost; take it out of the row")


def _with_system(row: Row, system: str) -> Row:
    column = "messages" if "messages" in row else "prompt"
    turns = _turns(row, column, "user")
    if turns[0]["role"] != "system":
        turns.insert(0, _message({"role": "system", "content": system}, "system"))
    return row | {column: turns, "instruction": None, "input": None}


def _pair(row: Row, columns: list[str]) -> Row:
    row, kept = _join_input(row, columns)
    prompt, completion = _alike(row, columns)
    if isinstance(completion, str) and not completion.strip():
        raise ValueError(f"{columns[-1]!r} is empty: nothing to learn; take the row out")
    return {"prompt": prompt, "completion": completion, **kept}


def _join_input(row: Row, columns: list[str]) -> tuple[Row, Row]:
    """Alpaca's instruction and input (Dolly's context) as one; both are kept for its template."""
    if columns[0] != "instruction":
        return row, {}
    context = None if columns[-1] == "output" else row.get("context")
    kept = {"instruction": row["instruction"], "input": row.get("input") or context or ""}
    instruction, given = _text(kept, "instruction"), _text(kept, "input")
    joined = f"{instruction}\n\n{given}" if given.strip() else instruction
    return {**row, "instruction": joined}, kept


def _alike(row: Row, columns: list[str]) -> list[Any]:
    """A question and its replies: as texts if all are texts, else as messages."""
    if all(isinstance(row[column], str) for column in columns):
        return [_text(row, column) for column in columns]
    return [_turns(row, c, "assistant" if i else "user") for i, c in enumerate(columns)]


def _preference(row: Row, columns: list[str]) -> Row:
    row, kept = _join_input(row, columns)
    prompt, chosen, rejected = _alike(row, columns)
    if isinstance(prompt, str) and kept and row.get("output"):
        kept["completion"] = _text(row, "output")  # the row is Alpaca's as well
    if not isinstance(prompt, str) and chosen[0]["role"] != "assistant":  # whole conversations
        given = isinstance(row[columns[0]], str) or chosen[: len(prompt)] == prompt
        before = [] if given else prompt
        return _transcripts({"chosen": before + chosen, "rejected": before + rejected}, columns)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **kept}


def _transcripts(row: Row, columns: list[str]) -> Row:
    """Two conversations with a common beginning: that is the prompt, the rest the two replies."""
    chosen, rejected = (_conversation(row, name) for name in ("chosen", "rejected"))
    turns = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in turns if a != b), min(len(chosen), len(rejected)))
    replies = chosen[shared:], rejected[shared:]
    if not shared or not all(reply and reply[0]["role"] == "assistant" for reply in replies):
        raise ValueError(
            "expected chosen and rejected to share their beginning and to differ in a reply of "
            f"the assistant; they share {shared} turns of {len(chosen)} and {len(rejected)}"
        )
    return {"prompt": chosen[:shared], "chosen": replies[0], "rejected": replies[1]}


def _conversation(row: Row, column: str) -> list[Message]:
    if not isinstance(row[column], str):
        return _turns(row, column, "user")
    start, *parts = _SPEAKER.split(_text(row, column))
    if start.strip() or not parts:
        raise ValueError(
            f"{column!r}: expected turns 'Human: …', 'Assistant: …', got {start[:60]!r}"
        )
    turns: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = ROLES[speaker.lower()]
        # Many chat templates refuse two turns of the same role in a row; hh-rlhf has some.
        if turns and turns[-1]["role"] == role:
            content = f"{turns.pop()['content']}\n\n{content.strip()}"
        turns.append({"role": role, "content": content.strip()})
    return turns


def _ranking(row: Row, columns: list[str]) -> Row:
    responses, ranks = row["responses"], row["ranks"]
    texts = isinstance(responses, list) and all(isinstance(text, str) for text in responses)
    whole = isinstance(ranks, list) and all(isinstance(rank, int) and rank >= 0 for rank in ranks)
    if not texts or not whole or not 2 <= len(responses) == len(ranks) == len(set(ranks)):
        raise ValueError(
            "expected two or more texts in 'responses' and as many different whole numbers in "
            f"'ranks' (least = best), got {str(responses)[:60]} and {str(ranks)[:60]}"
        )
    return {name: row[name] for name in columns}


def _plain(row: Row, columns: list[str]) -> Row:
    return {"text": _pair(row, ["text", "text"])["completion"]}


def _chat(row: Row, columns: list[str]) -> Row:
    messages = _turns(row, columns[-1], "user")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers or not answers[-1].strip():
        raise ValueError(f"{columns[-1]!r}: expected an answer of the assistant, got none")
    return {"messages": messages}


def _coig(row: Row, columns: list[str]) -> Row:
    turns = _objects(row, "conversations")
    if "question" not in turns[0]:
        return _chat(row, columns)
    names = (("user", "question"), ("assistant", "answer"))
    messages = [{"role": role, "content": _text(t, name)} for t in turns for role, name in names]
    if _text(row, "instruction").strip():
        first = f"{row['instruction']}\n\n{messages[0]['content']}"
        messages[0]["content"] = first.strip()
    return _chat({"messages": messages}, ["messages"])


_CONVERTERS = {"coig": _coig, "ranking": _ranking, "preference": _preference, "alpaca": _pair}
_CONVERTERS |= {"transcripts": _transcripts, "pairs": _pair, "text": _plain}


def _turns(row: Row, column: str, role: str) -> list[Message]:
    """Messages as they are, or a text as one message of `role`."""
    if isinstance(row[column], str):
        return [{"role": role, "content": _text(row, column)}]
    return [_message(turn, column) for turn in _objects(row, column)]


def _message(turn: Row, column: str) -> Message:
    _check_lost(turn)
    role = str(turn.get("role") or turn.get("from")).lower()
    if role not in ROLES:
        raise ValueError(f"{column!r}: expected a role of {', '.join(ROLES)}, got {role[:60]}")
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    if isinstance(content, list):
        content = "".join(_text(part, "text") for part in _objects({"content": content}, "content"))
    return {"role": ROLES[role], "content": _text({column: content}, column)}


def _objects(row: Row, column: str) -> list[Row]:
    value = row[column]
    # Arrow hands a sequence of structs over as one dict of lists.
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [
            dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)
        ]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise ValueError(f"{column!r}: expected a list of objects, got {str(value)[:60]}")
    return value


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{column!r}: expected text, got {type(value).__name__} {str(value)[:60]}")
    if _SURROGATE.search(value):
        raise ValueError(f"{column!r}: holds half a Unicode pair; write the whole character")
    return value
