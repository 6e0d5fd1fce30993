"""Recognizes how rows are laid out and converts them to TRL's columns.

These are `prompt`, `completion` · `prompt`, `chosen`, `rejected` · `prompt`, `responses`, `ranks` ·
`messages` · `text` · `prompt` alone; prompts and replies are texts or lists of messages. Further
columns are kept, `system` becomes a message, and a row that would lose something is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]

CANONICAL = {"prompt", "completion", "chosen", "rejected", "messages", "text", "responses", "ranks"}
_LOST = """tools functions tool_calls function_call reasoning_content thinking history documents
    images videos audios""".split()
_ROLES = dict.fromkeys("assistant gpt chatgpt bing bard model".split(), "assistant")
_ROLES |= {"user": "user", "human": "user", "system": "system", "developer": "system"}
_ROLES["tool"] = "tool"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Located(Row):
    """A row that knows its place in its file, for errors; else like any other dict."""

    where: str


def where(row: Row, number: int) -> str:
    """What errors call a row: its place in its file if known, else its number in the list."""
    return getattr(row, "where", f"rows: row {number}")


def convert(rows: Iterable[Row], source: str, rejected: list[str] | None = None) -> list[Row]:
    """Rows of any known format, decided by the first, as rows with TRL's columns.

    A ValueError names `source` (a file, a hub id) and the row, from 1, with missing columns, a
    value of the wrong type, or an empty answer (hh-rlhf has some in preferences: there it may
    be). With a list for `rejected`, such a row is left out and its error appended.
    """
    converted: list[Row] = []
    columns: list[str] = []
    for number, row in enumerate(rows, start=1):
        place = f"data: {source}, row {number}"
        try:
            columns = columns or _recognize(row)
            for new in map(Located, _convert(row, columns)):
                new.where = place
                converted.append(new)
        except ValueError as error:
            if rejected is None:
                raise ValueError(f"{place}: {error}") from error
            rejected.append(f"{place}: {error}")
    return converted


def _recognize(row: Row) -> list[str]:
    for columns in map(str.split, FORMATS):
        if all(row.get(column) is not None for column in columns):
            return columns
    raise ValueError(f"no known format has the columns {[*row]}; known are {', '.join(FORMATS)}")


def _convert(row: Row, columns: list[str]) -> list[Row]:
    if missing := [column for column in columns if row.get(column) is None]:
        raise ValueError(f"expected {', '.join(columns)} as in row 1, got no {missing[0]!r}")
    _check_lost(row)
    if str(row.get("label")).lower() == "false":
        raise ValueError("'label' is false: a bad answer would be learned; take the row out")
    rest = {key: value for key, value in row.items() if key not in CANONICAL | {*columns}}
    convert_part, parts = FORMATS[" ".join(columns)], [row]
    if "instances" in columns:  # Self-Instruct: several examples of one task
        columns = ["instruction", "output"]
        parts = [{**row, **part} for part in _objects(row, "instances")]
    if "vote" in columns and row["vote"] not in ("A", "B"):
        return []  # a tie or a pair that was skipped
    converted = [{**rest, **convert_part(part, columns)} for part in parts]
    system = row.get("system") or row.get("system_prompt")
    for new in converted if system else ():
        if "text" in new:
            raise ValueError("'system' has no place in a plain text; take it out of the row")
        column = "messages" if "messages" in new else "prompt"
        turns = _turns(new, column, "user")
        first = _message({"role": "system", "content": system}, "system")
        new[column] = turns if turns[0] == first else [first, *turns]
        new.pop("instruction", None)  # Alpaca's template would use it, without the message
    return converted


def _check_lost(row: Row) -> None:
    if lost := [column for column in _LOST if row.get(column)]:
        raise ValueError(f"{lost[0]!r} cannot be used and would be lost; take it out of the row")


def _replies(row: Row, columns: list[str]) -> Row:
    """A question with a completion, or with two replies: texts if all are texts, else messages."""
    first, *names = columns
    kept: Row = {}  # the parts of the question, for Alpaca's template
    given = row.get("input") if first == "instruction" else ""
    if first in ("instruction", "question", "query"):
        given = given or row.get("context") or ""
    if first == "instruction" or given:
        kept = {"instruction": _string(row, first), "input": _string({"context": given}, "context")}
        row = {**row, first: "\n\n".join(part for part in kept.values() if part.strip())}
    if all(isinstance(row[column], str) for column in columns):
        parts: list[Any] = [_string(row, name, filled=names == [name]) for name in columns]
    else:
        parts = [_turns(row, first, "user"), *(_turns(row, name, "assistant") for name in names)]
    prompt, *replies = parts
    if len(replies) == 1:
        return {"prompt": prompt, "completion": replies[0], **kept}
    if kept and row.get("output"):
        kept["completion"] = _string(row, "output")  # the row is Alpaca's as well
    if not isinstance(prompt, str) and replies[0][0]["role"] != "assistant":  # whole conversations
        if not isinstance(row[first], str) and replies[0][: len(prompt)] != prompt:
            replies = [prompt + turns for turns in replies]
        return _transcripts(dict(zip(names, replies, strict=True)), names)
    return {"prompt": prompt, **dict(zip(names, replies, strict=True)), **kept}


def _transcripts(row: Row, columns: list[str]) -> Row:
    """Two conversations with a common beginning: that is the prompt, the rest the two replies."""
    chosen, rejected = (_conversation(row, name) for name in ("chosen", "rejected"))
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1] != []:
        shared += 1
    prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    roles = {turns[0]["role"] if turns else "" for turns in (chosen, rejected)}
    if not prompt or roles != {"assistant"}:
        raise ValueError(f"'rejected': expected another reply than 'chosen'; {shared} turns agree")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _conversation(row: Row, column: str) -> list[Message]:
    if not isinstance(row[column], str):
        return _turns(row, column, "user")
    start, *parts = _SPEAKER.split(_string(row, column))
    if start.strip() or not parts:
        raise ValueError(f"{column!r}: expected 'Human: …', 'Assistant: …', got {start!r:.60}")
    turns: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        # Many chat templates refuse two turns of the same role in a row; hh-rlhf has some.
        if turns and turns[-1]["role"] == role:
            content = f"{turns.pop()['content']}\n\n{content.strip()}"
        turns.append({"role": role, "content": content.strip()})
    return turns


def _prompt(row: Row, columns: list[str]) -> Row:
    """A prompt alone, for what a model answers itself."""
    text = isinstance(row["prompt"], str)
    return {"prompt": _string(row, "prompt", True) if text else _turns(row, "prompt", "user")}


def _ranking(row: Row, columns: list[str]) -> Row:
    responses, ranks = row["responses"], row["ranks"]
    whole = isinstance(ranks, list) and all(isinstance(rank, int) for rank in ranks)
    texts = isinstance(responses, list) and all(isinstance(text, str) for text in responses)
    if not whole or not texts or not 2 <= len(responses) == len(ranks) == len(set(ranks)):
        raise ValueError(f"'ranks': expected numbers of texts, no ties, got {ranks!r:.60}")
    return {name: row[name] for name in columns}


def _vote(row: Row, columns: list[str]) -> Row:
    """A person's vote on two responses, as `labkit.rating` writes it."""
    responses = row["responses"]
    if not isinstance(responses, list) or [type(text) for text in responses] != [str, str]:
        raise ValueError(f"'responses': expected two texts, got {responses!r:.60}")
    chosen, rejected = responses if row["vote"] == "A" else responses[::-1]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def _chat(row: Row, columns: list[str]) -> Row:
    """The conversation up to its last answer, the one that is learned."""
    column = columns[-1]
    turns = _objects(row, column)
    if "question" in turns[0]:  # COIG
        names = (("user", "question"), ("assistant", "answer"))
        turns = [{"role": r, "content": _string(turn, name)} for turn in turns for r, name in names]
    messages = [_message(turn, column) for turn in turns]
    if "instruction" in columns and _string(row, "instruction").strip():
        messages[0]["content"] = f"{row['instruction']}\n\n{messages[0]['content']}".strip()
    learned = [i for i, turn in enumerate(turns) if turn.get("weight") != 0]
    answers = [i for i in learned if messages[i]["role"] == "assistant"]
    if not answers or not messages[answers[-1]]["content"].strip():
        raise ValueError(f"{column!r}: expected an answer of the assistant, got none")
    return {"messages": messages[: answers[-1] + 1]}


def _turns(row: Row, column: str, role: str) -> list[Message]:
    """Messages as they are, or a text as one message of `role`."""
    if isinstance(row.get(column), str):
        return [{"role": role, "content": _string(row, column)}]
    return [_message(turn, column) for turn in _objects(row, column)]


def _message(turn: Row, column: str) -> Message:
    _check_lost(turn)
    role = str(turn.get("role") or turn.get("from")).lower()
    if role not in _ROLES:
        raise ValueError(f"{column!r}: expected a role of {', '.join(_ROLES)}, got {role:.60}")
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    if isinstance(content, list):
        content = "".join(_string(part, "text") for part in _objects({column: content}, column))
    return {"role": _ROLES[role], "content": _string({column: content}, column)}


def _objects(row: Row, column: str) -> list[Row]:
    value = row.get(column)
    if isinstance(value, dict):
        # Arrow hands a sequence of structs over as one dict of lists.
        lengths = {len(part) if isinstance(part, list) else -1 for part in value.values()}
        parts = zip(*value.values(), strict=True) if len(lengths) == 1 and -1 not in lengths else ()
        value = [dict(zip(value, part, strict=True)) for part in parts] or [value]
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise ValueError(f"{column!r}: expected a list of objects, got {value!r:.60}")
    return value


def _string(row: Row, column: str, filled: bool = False) -> str:
    value = row.get(column)
    if not isinstance(value, str) or _SURROGATE.search(value):
        what = "half a Unicode pair" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{column!r}: expected text, got {what}: {value!r:.60}")
    if filled and not value.strip():
        raise ValueError(f"{column!r} is empty: nothing to learn; take the row out")
    return value


_PAIRS = (
    "instruction output, prompt completion, prompt response, question answer, question response, "
    "question std_answer, query response, inputs_pretokenized targets_pretokenized, "
    "inputs targets, instruction response, instruction answer, prompt answer, input output, "
    "user assistant"
)
_QUESTIONS = ("prompt", "instruction", "question", "query", "input", "conversations")
# A row's format is the first whose columns it has: preferences may have `messages` as well.
FORMATS: dict[str, Callable[[Row, list[str]], Row]] = {
    "instruction instances": _replies,  # Self-Instruct
    "prompt responses ranks": _ranking,
    "prompt responses vote": _vote,
    **dict.fromkeys([f"{question} chosen rejected" for question in _QUESTIONS], _replies),
    **dict.fromkeys(("instruction conversations", "conversations"), _chat),  # COIG, ShareGPT
    "chosen rejected": _transcripts,  # hh-rlhf: two whole conversations
    "messages": _chat,
    **dict.fromkeys(_PAIRS.split(", "), _replies),
    "text": lambda row, columns: {"text": _string(row, "text", filled=True)},
    "prompt": _prompt,
}
