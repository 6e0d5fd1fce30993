"""Turns a canonical row into the two texts a model sees: the prompt and the completion.

The border between them is the whole point: loss falls on the completion only, and its last
token is the end token, so that the model learns to stop. Templates: the tokenizer's own chat
template, Alpaca's (chapter 5.4.2) in English and Chinese, and plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Rendered = tuple[str, str]

TEMPLATES = ("auto", "chat", "alpaca", "alpaca_zh", "plain")
ALPACA = {
    "en": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    ),
    "en_input": (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    "zh": (
        "以下是一条描述任务的指令。请写出恰当完成该请求的回复。\n\n"
        "### 指令：\n{instruction}\n\n### 回复：\n"
    ),
    "zh_input": (
        "以下是一条描述任务的指令，并附有提供更多背景的输入。请写出恰当完成该请求的回复。\n\n"
        "### 指令：\n{instruction}\n\n### 输入：\n{input}\n\n### 回复：\n"
    ),
}
_MARK = "THE-ANSWER-STANDS-HERE"


def render(row: Row, tokenizer: Any, template: str = "auto") -> Rendered:
    """The row's prompt text and completion text, ready to be tokenized without special tokens.

    template: "chat" (the tokenizer's chat template), "alpaca", "alpaca_zh", "plain" (the texts
    as they are, the answer on a new line), or "auto": "chat" if the tokenizer has a chat
    template, else "alpaca". The completion ends with the end token, as text: what the chat
    template puts after an assistant's turn, else `eos_token`. A begin token is part of the
    prompt where the tokenizer adds one. `messages`: the last turn of the assistant is the
    completion, everything before it the prompt. `text`: all of it is the completion.

    Raises ValueError for an unknown template, "chat" without a chat template, a conversation
    in an Alpaca template, or a row that has nothing to train on.
    """
    return renderer(tokenizer, template)(row)


def renderer(tokenizer: Any, template: str = "auto") -> Callable[[Row], Rendered]:
    """`render` for many rows: what depends on the tokenizer only is found out once."""
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "alpaca"
    if template == "chat":
        return _chat_renderer(tokenizer)
    begin, end = _begin(tokenizer), _end(tokenizer)

    def plain(row: Row) -> Rendered:
        if is_text(row):
            return begin, row["text"] + end
        return begin + _prompt(row, template), response(row) + end

    return plain


def is_text(row: Row) -> bool:
    """Whether the row is plain text, all of which is learned."""
    return "text" in row and "messages" not in row and "completion" not in row


def turns(row: Row) -> list[dict[str, str]]:
    """The row's prompt as chat messages."""
    if "completion" not in row and "messages" in row:
        return row["messages"][: _last_answer(row)]
    prompt = row["prompt"]
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def response(row: Row) -> str:
    """The row's answer (for `text` rows: the text), without an end token."""
    if "completion" in row:
        completion = row["completion"]
        if isinstance(completion, str):
            return completion
        if len(completion) == 1 and completion[0]["role"] == "assistant":
            return completion[0]["content"]
        raise ValueError(f"completion: expected text or one assistant message, got {completion!r}")
    if "messages" in row:
        return row["messages"][_last_answer(row)]["content"]
    if "text" in row:
        return row["text"]
    raise ValueError(
        f"expected a row with prompt and completion, messages, or text, got {', '.join(row)}; "
        "preference pairs become completions by {'prompt': row['prompt'], "
        "'completion': row['chosen']}"
    )


def prompt_text(row: Row) -> str:
    """The prompt as a reader sees it, without any template."""
    if is_text(row):
        return ""
    messages = turns(row)
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}:\n{m['content']}" for m in messages)


def _last_answer(row: Row) -> int:
    for index in range(len(row["messages"]) - 1, -1, -1):
        if row["messages"][index]["role"] == "assistant":
            return index
    raise ValueError("messages: expected a turn of the assistant, got none")


def _prompt(row: Row, template: str) -> str:
    if template == "plain":
        if len(turns(row)) > 1:
            return f"{prompt_text(row)}\n\nAssistant:\n"
        text = prompt_text(row)
        return text if not text or text[-1].isspace() else text + "\n"
    language = "zh" if template == "alpaca_zh" else "en"
    instruction, given = row.get("instruction"), row.get("input") or ""
    if instruction is None:
        messages = turns(row)
        if len(messages) != 1:
            raise ValueError(
                f"template: {template!r} takes one question, got a conversation of "
                f"{len(messages)} messages; use template='plain', or 'chat' with a tokenizer "
                "that has a chat template"
            )
        instruction, given = messages[0]["content"], ""
    form = ALPACA[f"{language}_input" if given.strip() else language]
    return form.format(instruction=instruction, input=given)


def _chat_renderer(tokenizer: Any) -> Callable[[Row], Rendered]:
    if not tokenizer.chat_template:
        raise ValueError(
            "template: 'chat' needs a tokenizer with a chat template, and this one has none; "
            "use template='alpaca' or 'plain', or an instruction-tuned model's tokenizer"
        )
    before, after = _answer_frame(tokenizer)
    text_begin, text_end = _begin(tokenizer), _end(tokenizer)

    def chat(row: Row) -> Rendered:
        if is_text(row):
            return text_begin, row["text"] + text_end
        return _apply(tokenizer, turns(row), True), before + response(row) + after

    return chat


def _answer_frame(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after an answer, up to its end token."""
    question = [{"role": "user", "content": "?"}]
    prompt = _apply(tokenizer, question, True)
    whole = _apply(tokenizer, [*question, {"role": "assistant", "content": _MARK}], False)
    head, found, tail = whole.rpartition(_MARK)
    if not found:
        raise ValueError("template: the tokenizer's chat template leaves the assistant's text out; "
                         "use template='alpaca' or 'plain'")  # fmt: skip
    before = head[len(prompt) :] if head.startswith(prompt) else ""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [tail.find(token) + len(token) for token in special if token and token in tail]
    return before, tail[: min(ends)] if ends else _end(tokenizer)


def _apply(tokenizer: Any, messages: list[dict[str, str]], generation: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"template: the tokenizer's chat template refuses messages of {roles}: {error}; "
            "change the row, or use another template"
        ) from error


def _begin(tokenizer: Any) -> str:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def _end(tokenizer: Any) -> str:
    if not tokenizer.eos_token:
        raise ValueError("tokenizer: expected an end token (eos_token), got none; set one, or the "
                         "model never learns to stop")  # fmt: skip
    return tokenizer.eos_token


def eos_ids(tokenizer: Any, template: str = "auto") -> set[int]:
    """The token ids that end a response under this template."""
    if template in ("auto", "chat") and tokenizer.chat_template:
        end = tokenizer(_answer_frame(tokenizer)[1], add_special_tokens=False)["input_ids"]
        return {tokenizer.eos_token_id, *end[-1:]}
    return {tokenizer.eos_token_id}
