"""Rows of any known format → prompt/completion or preference rows → tokens with a loss mask.

`load` gets rows (`list[dict]` with TRL's columns) from Tinytown, a registered data set, the hub,
or a local file; `encode` tokenizes them so that loss falls on the response and its end token
only. Reading files is in `files.py`, recognizing formats in `formats.py`, prompt templates in
`templates.py`; their public names are exported here.
"""

from __future__ import annotations

import difflib
import html
import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .formats import Row, convert, convert_groups, recognize
from .templates import ALPACA, TEMPLATES, render, renderer, response

__all__ = [
    "ALPACA", "REGISTERED", "TEMPLATES", "Encoded", "Registered", "convert", "encode", "load",
    "recognize", "render", "show_masks",
]  # fmt: skip

_log = logging.getLogger("labkit")
_HELD_OUT = ("validation", "test")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Registered:
    """A public data set known by name: where it is, under which terms, how it is laid out."""

    hub: str
    licence: str
    size: str
    converter: str
    config: str | None = None
    files: str | None = None
    revision: str | None = None


# The chapter's table 5.4.3, and the preference data of 5.5. The licence is what the card states.
REGISTERED = {
    "alpaca": Registered("tatsu-lab/alpaca", "CC BY-NC 4.0", "52,002 rows, English", "alpaca"),
    "flan": Registered(
        "Muennighoff/flan", "none on the card; FLAN's code is Apache-2.0",
        "millions of rows of 62 data sets, English", "pairs",
    ),
    "p3": Registered(
        "bigscience/P3", "Apache-2.0",
        "660 sets, English; one at a time: bigscience/P3:NAME", "pairs",
        config="ag_news_classify",
    ),
    "belle": Registered("BelleGroup/train_2M_CN", "GPL-3.0", "2,000,000 rows, Chinese", "alpaca"),
    "coig": Registered(
        "BAAI/COIG", "Apache-2.0", "97,739 rows (those not translated), Chinese", "coig",
        files="NoTranslate/train/*.parquet", revision="refs/convert/parquet",
    ),
    "sharegpt": Registered(
        "anon8231489123/ShareGPT_Vicuna_unfiltered", "Apache-2.0 on the card",
        "about 94,000 conversations, many languages", "sharegpt",
        files="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
    "hh-rlhf": Registered("Anthropic/hh-rlhf", "MIT", "169,352 pairs, English", "transcripts"),
}  # fmt: skip


def load(
    data: str = "tinytown",
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> list[Row]:
    """Rows with TRL's columns, from Tinytown, a registered name, a hub id, or a local file.

    data: "tinytown"; a name in `REGISTERED`; a hub id `owner/name` or `owner/name:config`; or a
    .json, .jsonl, .csv (each also .gz) or .parquet file in a format that `formats.py` knows.
    split: a file, and a hub set that lacks a split of that name, is cut 90/5/5 into "train",
    "validation" and "test" (at least one row each). The cut is fixed, whatever `seed` is, so the
    parts never overlap; rows that came from one record stay together.
    limit: at most so many rows, sampled by `seed`, in their order (Tinytown: generated).

    Raises FileNotFoundError or ValueError naming `data`, the file, and the line or row;
    ConnectionError if the hub cannot be reached.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit: expected a whole number from 1, or None for all, got {limit!r}")
    if not isinstance(data, (str, Path)) or not str(data).strip():
        raise ValueError(f"data: expected a name, a hub id or a file, got {data!r}")
    data = str(data)
    if data == "tinytown":
        from .tinytown import instruction_rows

        return instruction_rows(split=split, n=limit, seed=seed)
    if _is_local(data):
        groups = convert_groups(files.read(data), data)
        rows = [row for index in _part(len(groups), split, data) for row in groups[index]]
        return _sample(rows, limit, seed)
    entry = REGISTERED.get(data) or _hub_entry(data)
    return _load_hub(entry, data, split, limit, seed, revision or entry.revision)


def _is_local(data: str) -> bool:
    path = Path(data).expanduser()
    looks_like_one = data.startswith((".", "/", "~")) or files.suffix(path) in files.SUFFIXES
    return data not in REGISTERED and (looks_like_one or path.exists())


def _hub_entry(data: str) -> Registered:
    if not _HUB_ID.fullmatch(data):
        names = ["tinytown", *REGISTERED]
        near = difflib.get_close_matches(data, names, 1)
        raise ValueError(
            f"data: expected {', '.join(names)}, a hub id owner/name, or an existing file, "
            f"got {data!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    hub, _, config = data.partition(":")
    return Registered(hub, "see its card", "", "", config=config or None)


def _load_hub(
    entry: Registered, data: str, split: str, limit: int | None, seed: int, revision: str | None
) -> list[Row]:
    import datasets

    try:
        sets = datasets.load_dataset(
            entry.hub, entry.config, data_files=entry.files, revision=revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"data: {data!r} could not be loaded from the hub ({type(error).__name__}: "
            f"{str(error)[:300]}); check the name and the network, or give a local file"
        ) from error
    rows, positions = _hub_part(sets, split, data)
    records = rows.select(_sample(positions, limit, seed))
    # Published sets hold a few empty answers and conversations; one's own data must be right.
    rejected: list[str] | None = [] if data in REGISTERED else None
    groups = convert_groups(records, f"{data} ({split})", rejected)
    if rejected:
        _log.warning("%s: %d of %d rows left out; the first: %s", data, len(rejected),
                     len(records), rejected[0])  # fmt: skip
    return [row for group in groups for row in group][:limit]


def _hub_part(sets: Any, split: str, data: str) -> tuple[Any, list[int]]:
    """The hub's own split, or a cut of its "train" for those that it lacks."""
    held_out = tuple(name for name in _HELD_OUT if name not in sets)
    if split in sets and not (split == "train" and held_out):
        return sets[split], list(range(len(sets[split])))
    if "train" not in sets or split not in ("train", *held_out):
        raise ValueError(f"split: {data!r} has {', '.join(sets)}, got {split!r}")
    return sets["train"], _part(len(sets["train"]), split, data, held_out)


def _part(count: int, split: str, data: str, held_out: tuple[str, ...] = _HELD_OUT) -> list[int]:
    """Positions of one part of `count` rows: 5 % each for the held-out parts, the rest train."""
    if split not in ("train", *held_out):
        raise ValueError(f"split: expected train, {' or '.join(held_out)}, got {split!r}")
    order = list(range(count))
    random.Random(0).shuffle(order)
    size = max(1, round(count * 0.05)) if count > len(held_out) else 0
    parts = {name: order[i * size : (i + 1) * size] for i, name in enumerate(held_out)}
    parts["train"] = order[len(held_out) * size :]
    if not parts[split]:
        raise ValueError(
            f"split: {data} has {count} rows, too few to hold any out for {split!r} (at least "
            f"{len(held_out) + 1}); add rows, or use split='train'"
        )
    return sorted(parts[split])


def _sample(rows: list, limit: int | None, seed: int) -> list:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows: `dataset` has the lists `input_ids` and `completion_mask` (1 = loss)."""

    dataset: Any
    truncated: int
    tokens: int
    response_tokens: int
    max_length: int

    def __len__(self) -> int:
        return len(self.dataset)

    def summary(self) -> str:
        """One line: rows, tokens, the share that carries loss, how many rows were cut."""
        rows = len(self)
        return (
            f"{rows:,} rows · {self.tokens:,} tokens ({self.tokens / rows:.1f} a row) · "
            f"{self.response_tokens:,} with loss ({self.response_tokens / self.tokens:.0%}) · "
            f"{self.truncated:,} cut to {self.max_length} tokens"
        )


def encode(
    rows: list[Row], tokenizer: Any, *, max_length: int = 512, template: str = "auto"
) -> Encoded:
    """Token ids and masks whose 1s are the response and its end token: where loss falls.

    Prompt and completion are tokenized apart, so no token straddles the border. A row longer
    than `max_length` (or the tokenizer's `model_max_length`, if smaller) loses the beginning of
    its prompt (a begin token stays); a response that is too long by itself loses its end. Both
    are counted in `truncated`. Plain `text` rows carry loss everywhere.

    Raises ValueError naming the row (counted from 1) for an empty response or a row that the
    template refuses, and for a tokenizer whose pad token is its end token.
    """
    from .models import check_tokenizer

    if not isinstance(max_length, int) or max_length < 2:
        raise ValueError(
            f"max_length: expected a whole number of tokens from 2, got {max_length!r}"
        )
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    check_tokenizer(tokenizer)
    limit = min(max_length, tokenizer.model_max_length)
    prompts, completions = _render_all(rows, renderer(tokenizer, template))
    tokens = (
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for texts in (prompts, completions)
    )
    examples = [_join(p, c, limit, tokenizer.bos_token_id) for p, c in zip(*tokens, strict=True)]
    return _encoded(examples, limit)


def _render_all(rows: list[Row], render_row: Any) -> tuple[list[str], list[str]]:
    prompts, completions = [], []
    for number, row in enumerate(rows, start=1):
        try:
            if not response(row).strip():
                raise ValueError(
                    "the response is empty, so its mask is all zero and nothing would be "
                    "learned; complete the row or take it out"
                )
            prompt, completion = render_row(row)
        except ValueError as error:
            raise ValueError(f"rows: row {number}: {error}") from error
        prompts.append(prompt)
        completions.append(completion)
    return prompts, completions


def _join(
    prompt: list[int], completion: list[int], limit: int, begin: int | None
) -> tuple[list[int], list[int], bool]:
    """Ids and mask of one example, cut to `limit`, and whether it was cut."""
    cut = len(prompt) + len(completion) > limit
    if cut:
        head = prompt[:1] if prompt and prompt[0] == begin else []
        completion = completion[: limit - len(head)]
        room = limit - len(head) - len(completion)
        prompt = head + prompt[len(prompt) - room :]
    return prompt + completion, [0] * len(prompt) + [1] * len(completion), cut


def _encoded(examples: list[tuple[list[int], list[int], bool]], limit: int) -> Encoded:
    import datasets

    ids, masks, cuts = (list(column) for column in zip(*examples, strict=True))
    return Encoded(
        dataset=datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks}),
        truncated=sum(cuts),
        tokens=sum(map(len, ids)),
        response_tokens=sum(map(sum, masks)),
        max_length=limit,
    )


@dataclass(frozen=True)
class MaskView:
    """Examples as lists of (token text, carries loss); shown coloured, all text escaped."""

    examples: list[list[tuple[str, bool]]]

    def _repr_html_(self) -> str:
        lines = []
        for number, pieces in enumerate(self.examples, start=1):
            spans = "".join(
                f'<span style="{_LOSS if loss else _NO_LOSS}">{_visible(text)}</span>'
                for text, loss in pieces
            )
            lines.append(f'<p style="line-height:1.9;text-align:left"><b>{number}</b> {spans}</p>')
        legend = f'<span style="{_NO_LOSS}">no loss</span> <span style="{_LOSS}">loss</span>'
        return f"<div>{legend}{''.join(lines)}</div>"

    def __repr__(self) -> str:
        lines = []
        for number, pieces in enumerate(self.examples, start=1):
            texts = (f"[{text}]" if loss else text for text, loss in pieces)
            lines.append(f"{number}  {''.join(texts)}")
        return "\n".join([*lines, "[…] carries loss"])


_NO_LOSS = "border:1px solid #8885;opacity:.65"
_LOSS = "border:1px solid #2a6;background:#2a63"


def show_masks(encoded: Encoded, tokenizer: Any, n: int = 3) -> MaskView:
    """The first n examples token by token, coloured by whether they carry loss."""
    chosen = encoded.dataset.select(range(min(n, len(encoded))))
    return MaskView(
        [_pieces(row["input_ids"], row["completion_mask"], tokenizer) for row in chosen]
    )


def _pieces(ids: list[int], mask: list[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """Token texts; tokens that only together make a character are shown as one."""
    pieces: list[tuple[str, bool]] = []
    group: list[int] = []
    for index, token in enumerate(ids):
        group.append(token)
        text = tokenizer.decode(group, clean_up_tokenization_spaces=False)
        last = index + 1 == len(ids) or mask[index + 1] != mask[index]
        if last or "\ufffd" not in text:
            pieces.append((text, bool(mask[index])))
            group = []
    return pieces


def _visible(text: str) -> str:
    return html.escape(text).replace("\n", "⏎<br>").replace(" ", "&nbsp;")
