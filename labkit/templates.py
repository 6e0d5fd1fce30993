"""Renders a row as the two texts that a model reads: the prompt and the completion.

Loss falls on the completion only, which ends with the EOS, so that the model learns to stop.
Templates: the tokenizer's own chat template, Alpaca's (chapter 5.4.2) in English and Chinese, and
plain text. Prompt and completion together are what the chat template itself renders; what it puts
before an answer (an empty block of thoughts) belongs to the prompt, and is no part of the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .formats import Message, Row

Rendered = tuple[str, str]

TEMPLATES = ("auto", "chat", "alpaca", "alpaca_zh", "plain")
_ENGLISH = "Below is an instruction that describes a task{}. Write a response that appropriately "
_ENGLISH += "completes the request.\n\n### Instruction:\n{{instruction}}\n\n"
_CHINESE = (
    "以下是一条描述任务的指令{}。请写出恰当完成该请求的回复。\n\n### 指令：\n{{instruction}}\n\n"
)
ALPACA = {
    "en": _ENGLISH.format("") + "### Response:\n",
    "en_input": _ENGLISH.format(", paired with an input that provides further context")
    + "### Input:\n{input}\n\n### Response:\n",
    "zh": _CHINESE.format("") + "### 回复：\n",
    "zh_input": _CHINESE.format("，并附有提供更多背景的输入")
    + "### 输入：\n{input}\n\n### 回复：\n",
}
_MARK = "THE-ANSWER-STANDS-HERE"


def render(row: Row, tokenizer: Any, template: str = "auto") -> Rendered:
    """The row's prompt text and completion text, to be tokenized without special tokens.

    template: "chat" (the tokenizer's chat template), "alpaca", "alpaca_zh", "plain" (the texts
    as they are, the answer on a new line), or "auto": "chat" if the tokenizer has a chat
    template, else "alpaca". The completion ends with the EOS: what the chat template puts after
    an answer, else `eos_token`. The prompt begins with the BOS where the tokenizer adds one.
    `messages`: the last answer is the completion. `text`: all of it is the completion.

    Raises ValueError for an unknown template, "chat" without a chat template, a template that
    drops or rewrites an answer, a conversation in an Alpaca template, or a row without an answer.
    """
    return renderer(tokenizer, template)(row)


def renderer(tokenizer: Any, template: str = "auto") -> Callable[[Row], Rendered]:
    """`render` for many rows: what depends on the tokenizer only is found out once."""
    template = _resolve(tokenizer, template)
    ids = tokenizer("a")["input_ids"]
    begin = tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""
    end = _eos(tokenizer)
    chat = _chat_renderer(tokenizer) if template == "chat" else None

    def rendered(row: Row) -> Rendered:
        if is_text(row):
            return begin, row["text"] + end
        return chat(row) if chat else (begin + _prompt(row, template), response(row) + end)

    return rendered


def eos_ids(tokenizer: Any, template: str = "auto") -> set[int]:
    """The ids of tokens that end a response: the template's own end and the tokenizer's EOS."""
    ids = {tokenizer.eos_token_id} - {None}
    if _resolve(tokenizer, template) == "chat":
        end = _answer_frame(tokenizer)[2]
        ids.add(tokenizer(end, add_special_tokens=False)["input_ids"][-1])
    return ids


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
        f"expected a row with prompt and completion, messages, or text, got {', '.join(row)}; of a "
        "preference take {'prompt': row['prompt'], 'completion': row['chosen']}"
    )


def prompt_text(row: Row) -> str:
    """The prompt as a reader sees it, without any template."""
    messages = [] if is_text(row) else turns(row)
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}:\n{m['content']}" for m in messages)


def _last_answer(row: Row) -> int:
    roles = [message["role"] for message in row["messages"]]
    if "assistant" not in roles:
        raise ValueError("messages: expected a turn of the assistant, got none")
    return len(roles) - 1 - roles[::-1].index("assistant")


def _prompt(row: Row, template: str) -> str:
    messages = [] if row.get("instruction") is not None and template != "plain" else turns(row)
    if template == "plain":
        text = prompt_text(row) + ("\n\nAssistant:" if len(messages) > 1 else "")
        return text if not text or text[-1].isspace() else text + "\n"
    if len(messages) > 1:
        raise ValueError(
            f"template: {template!r} takes one question, got a conversation of {len(messages)} "
            "messages; use template='plain', or 'chat' with a tokenizer that has a chat template"
        )
    instruction, given = row.get("instruction"), row.get("input") or ""
    if messages:
        instruction, given = messages[0]["content"], ""
    language = "zh" if template == "alpaca_zh" else "en"
    form = ALPACA[f"{language}_input" if given.strip() else language]
    return form.format(instruction=instruction, input=given)


def _resolve(tokenizer: Any, template: str) -> str:
    if template not in TEMPLATES:
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "template: 'chat' needs a tokenizer with a chat template, and this one has none; "
            "use template='alpaca' or 'plain', or an instruction-tuned model's tokenizer"
        )
    return template


def _chat_renderer(tokenizer: Any) -> Callable[[Row], Rendered]:
    space, tail, end = _answer_frame(tokenizer)

    def chat(row: Row) -> Rendered:
        answer = response(row)
        shown = answer if answer.strip() else _MARK  # a template may leave out an empty answer
        whole = _apply(tokenizer, [*turns(row), {"role": "assistant", "content": shown}])
        for text in (shown, shown.strip()):
            if whole.endswith(text + tail):
                prompt = whole[: -len(text + tail)].removesuffix(space)
                return prompt, space + (text if answer.strip() else answer) + end
        raise ValueError(
            "template: the tokenizer's chat template drops or rewrites this answer, or parts of "
            f"it: {answer[:60]!r}; change the row, or use template='plain'"
        )

    return chat


def _answer_frame(tokenizer: Any) -> tuple[str, str, str]:
    """Space that belongs to an answer, all that follows one, and that up to the EOS."""
    question = [{"role": "user", "content": "?"}]
    prompt = _apply(tokenizer, question, add_generation_prompt=True)
    whole = _apply(tokenizer, [*question, {"role": "assistant", "content": _MARK}])
    head, found, tail = whole.rpartition(_MARK)
    if not found:
        raise ValueError("template: the tokenizer's chat template leaves the assistant's text out")
    space = head.removeprefix(prompt)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [tail.find(token) + len(token) for token in special if token and token in tail]
    return space if space.isspace() else "", tail, tail[: min(ends)] if ends else _eos(tokenizer)


def _apply(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"template: the tokenizer's chat template refuses messages of {roles}: {error}"
        ) from error


def _eos(tokenizer: Any) -> str:
    if not tokenizer.eos_token:
        raise ValueError("tokenizer: expected an eos_token, got none: nothing could learn to stop")
    return tokenizer.eos_token
