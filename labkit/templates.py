"""Renders a row as the two texts that a model reads: the prompt and the completion.

Loss falls on the completion only, which ends with the EOS. Together they are what the chat
template renders; what it puts before an answer (empty thoughts) belongs to the prompt. A special
token that a row's own text spells is cut in two by `BREAK`: only `tokenize` reads it as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken

from .formats import Message, Row

Rendered = tuple[str, str]

TEMPLATES = ("auto", "chat", "alpaca", "alpaca_zh", "plain", "bare")
BREAK, _FRAME = "\ufdd0", "\ufdd1"  # Unicode reserves both: no text holds them
_ENGLISH = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{{instruction}}\n\n{}### Response:\n"
)
_CHINESE = (
    "以下是一条描述任务的指令{}。请写出恰当完成该请求的回复。\n\n"
    "### 指令：\n{{instruction}}\n\n{}### 回复：\n"
)
_CONTEXT = ", paired with an input that provides further context"
ALPACA = {
    "en": _ENGLISH.format("", ""),
    "en_input": _ENGLISH.format(_CONTEXT, "### Input:\n{input}\n\n"),
    "zh": _CHINESE.format("", ""),
    "zh_input": _CHINESE.format("，并附有提供更多背景的输入", "### 输入：\n{input}\n\n"),
}
_MARK = "THE-ANSWER-STANDS-HERE"


def render(row: Row, tokenizer: Any, template: str = "auto") -> Rendered:
    """The row's prompt text and completion text, for `tokenize`.

    template: "chat" (the tokenizer's), "alpaca" or "alpaca_zh" (chapter 5.4.2), "plain" (the texts,
    the answer on a new line), "bare" (the answer on the prompt's last line, for a prompt such as
    "Q: …\\nA:"), or "auto": "chat" if the tokenizer has a template, else "alpaca".
    Of `messages`, the last answer is the completion; of `text`, all. ValueError for a template
    that does not fit the tokenizer or row, or drops or rewrites the answer.
    """
    return renderer(tokenizer, template)(row)


def renderer(tokenizer: Any, template: str = "auto") -> Callable[[Row], Rendered]:
    """`render` for many rows: what depends on the tokenizer only is found out once."""
    template, end = _resolve(tokenizer, template), tokenizer.eos_token
    special = _special(tokenizer), _special(tokenizer, "think")  # thoughts are part of an answer
    ids = tokenizer("a")["input_ids"]
    begin = tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""
    frame = _answer_frame(tokenizer) if template == "chat" else None

    def rendered(row: Row) -> Rendered:
        row = _break(row, special)
        if is_text(row):
            return begin, row["text"] + end
        if frame:
            return _chat(row, tokenizer, *frame)
        prompt, answer = _prompt(row, template), response(row) + end
        spaced = template == "bare" and re.search(r"[!-~]\Z", prompt)  # not behind 答：
        return begin + prompt, " " * bool(spaced) + answer

    return rendered


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of rendered texts; only the special tokens that a template wrote become such.

    A tokenizer without a Rust core reads `BREAK` as a character.
    """
    options = {"add_special_tokens": False, "verbose": False}
    ids = tokenizer(list(texts), **options)["input_ids"] if texts else []
    for i, text in enumerate(texts):
        if BREAK in text and tokenizer.is_fast:
            core, special = _literal(tokenizer, len(tokenizer))
            text = _special(tokenizer).sub(rf"{_FRAME}\g<0>", text).replace(BREAK, "")
            found = core.encode(text, add_special_tokens=False).ids
            ids[i] = [special.get(token, token) for token in found]
    return ids


def eos_ids(tokenizer: Any, template: str = "auto") -> set[int]:
    """The ids of tokens that end a response: the template's own end and the tokenizer's EOS."""
    ends = {tokenizer.eos_token_id} - {None}
    if _resolve(tokenizer, template) == "chat":
        ends.add(tokenize([_answer_frame(tokenizer)[2]], tokenizer)[0][-1])
    return ends


def is_text(row: Row) -> bool:
    """Whether the row is plain text, all of which is learned."""
    return "text" in row and "messages" not in row and "completion" not in row


def turns(row: Row) -> list[Message]:
    """The row's prompt as chat messages."""
    if "completion" not in row and "messages" in row:
        return row["messages"][: _last_answer(row)]
    prompt = row["prompt"]
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def response(row: Row) -> str:
    """The row's answer (for `text` rows: the text), without an EOS."""
    answer = row.get("completion", row.get("text"))
    if "completion" not in row and "messages" in row:
        answer = row["messages"][_last_answer(row)]["content"]
    if isinstance(answer, list) and len(answer) == 1 and answer[0]["role"] == "assistant":
        answer = answer[0]["content"]
    if not isinstance(answer, str):
        expected = "completion (a text or one answer; of a preference, `chosen`), messages, or text"
        raise ValueError(f"expected {expected}; got {', '.join(row)}")
    return answer


def prompt_text(row: Row) -> str:
    """The prompt as a reader sees it, without any template."""
    messages = [] if is_text(row) else turns(row)
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}:\n{m['content']}" for m in messages)


def _last_answer(row: Row) -> int:
    answers = [i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]
    if not answers:
        raise ValueError("messages: expected a turn of the assistant, got none")
    return answers[-1]


def _prompt(row: Row, template: str) -> str:
    messages, given = turns(row), row.get("input") or ""
    if template == "bare":
        return prompt_text(row)
    if template == "plain":
        text = prompt_text(row) + ("\n\nAssistant:" if len(messages) > 1 else "")
        return text if not text or text[-1].isspace() else text + "\n"
    instruction = row.get("instruction")
    if instruction is None:
        if len(messages) != 1:
            raise ValueError(f"template: {template} takes one question, got {len(messages)} turns")
        instruction, given = messages[0]["content"], ""
    form = ("zh" if template == "alpaca_zh" else "en") + ("_input" if given.strip() else "")
    return ALPACA[form].format(instruction=instruction, input=given)


def _resolve(tokenizer: Any, template: str) -> str:
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("template: 'chat' needs a tokenizer with a chat template; use 'alpaca'")
    return template if template != "auto" else "chat" if tokenizer.chat_template else "alpaca"


def _special(tokenizer: Any, spared: str = "(?!)") -> re.Pattern[str]:
    """Finds special tokens, the longest first, but those that are broken or match `spared`."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = [name for name in names if name and not re.search(spared, name, re.IGNORECASE)]
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
    return re.compile(f"(?:{either})(?!{BREAK})")


def _break(value: Any, special: Sequence[re.Pattern[str]], answer: bool = False) -> Any:
    """The same with special tokens cut in two: `special[0]`, or in an answer `special[1]`."""
    if isinstance(value, str):
        return special[answer].sub(lambda found: found[0][0] + BREAK + found[0][1:], value)
    if isinstance(value, list):
        return [_break(part, special, answer) for part in value]
    if isinstance(value, dict):
        answer = value.get("role") == "assistant"
        return {k: _break(v, special, answer or k == "completion") for k, v in value.items()}
    return value


@lru_cache(maxsize=1)
def _literal(tokenizer: Any, size: int) -> tuple[Any, dict[int, int]]:
    """A copy of the core (while `size` stays) to which special tokens are text but after `_FRAME`.

    Also the id of each such token, by the id that the copy gives it.
    """
    core = deepcopy(tokenizer.backend_tokenizer)
    core.encode_special_tokens = True
    framed = {
        number: AddedToken(_FRAME + t.content, lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)
        for number, t in tokenizer.added_tokens_decoder.items()
        if t.special
    }
    core.add_tokens([*framed.values()])
    return core, {core.token_to_id(token.content): number for number, token in framed.items()}


def _chat(row: Row, tokenizer: Any, space: str, tail: str, end: str) -> Rendered:
    messages, answer = turns(row), response(row)
    shown = answer if answer.strip() else _MARK  # a template may leave out an empty answer
    whole = _apply(tokenizer, [*messages, {"role": "assistant", "content": shown}])
    body = whole.removesuffix(tail)
    start = _start(body, shown) if whole.endswith(tail) else -1
    given = [turn["content"] for turn in messages if turn["role"] in ("system", "user")]
    lost = [text for text in given if text.strip() not in body] + [shown] * (start < 0)
    if lost:
        raise ValueError(f"template: the chat template drops or rewrites parts of {lost[0][:60]!r}")
    prompt, text = body[:start].removesuffix(space), answer if shown is _MARK else body[start:]
    return prompt, space + text + end


def _start(body: str, answer: str) -> int:
    """Where the answer at the end of `body` starts; -1 if more than white space differs."""
    for text in (answer, answer.rstrip(), answer.strip()):
        if body.endswith(text):
            return len(body) - len(text)
    letters = "".join(answer.split())
    places = [i for i, letter in enumerate(body) if not letter.isspace()][-len(letters) :]
    return places[0] if "".join(body[i] for i in places) == letters else -1


def _answer_frame(tokenizer: Any) -> tuple[str, str, str]:
    """Space that belongs to an answer, all that follows one, and that up to the EOS."""
    question = [{"role": "user", "content": "?"}]
    prompt = _apply(tokenizer, question, add_generation_prompt=True)
    whole = _apply(tokenizer, [*question, {"role": "assistant", "content": _MARK}])
    head, found, tail = whole.rpartition(_MARK)
    if not found:
        raise ValueError("template: the tokenizer's chat template leaves the assistant's text out")
    space, first = head.removeprefix(prompt), _special(tokenizer).search(tail)
    end = tail[: first.end()] if first else tail.rstrip() + tokenizer.eos_token
    return space if space.isspace() else "", tail, end


def _apply(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"template: the chat's refuses turns of {roles}: {error}") from error
