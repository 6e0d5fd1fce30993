"""Rows of any known format → prompt/completion or preference rows → tokens with a loss mask.

`load` gets rows (`list[dict]` with TRL's columns) from Tinytown, a registered data set, the hub,
or a local file; `encode` tokenizes them so that loss falls on the response and its EOS only.
"""

from __future__ import annotations

import csv
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow.parquet

from labkit import models, templates, tinytown
from labkit.batching import Example, join
from labkit.formats import Row, convert, where
from labkit.templates import render as render

_HELD_OUT = ("validation", "test")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SUFFIX = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet)(\.(gz|bz2|xz))?$", re.IGNORECASE)


class Registered(NamedTuple):
    """A public data set known by name: where it is, under which terms, how large."""

    hub: str
    licence: str  # what the card states
    size: str
    config: str | None = None
    files: str | None = None
    revision: str | None = None


_COIG = ("NoTranslate/train/*.parquet", "refs/convert/parquet")  # those not translated
_VICUNA = "anon8231489123/ShareGPT_Vicuna_unfiltered"
_JSON = "ShareGPT_V3_unfiltered_cleaned_split.json"
# The chapter's table 5.4.3, and the preference data of 5.5. Other sets of P3: bigscience/P3:NAME.
REGISTERED = {
    "alpaca": Registered("tatsu-lab/alpaca", "CC BY-NC 4.0", "52,002 rows, English"),
    "flan": Registered("Muennighoff/flan", "none on the card", "62 sets, English"),
    "p3": Registered("bigscience/P3", "Apache-2.0", "660 sets, English", "ag_news_classify"),
    "belle": Registered("BelleGroup/train_2M_CN", "GPL-3.0", "2,000,000 rows, Chinese"),
    "coig": Registered("BAAI/COIG", "Apache-2.0", "97,739 rows, Chinese", None, *_COIG),
    "sharegpt": Registered(_VICUNA, "Apache-2.0 on the card", "94,000 conversations", None, _JSON),
    "hh-rlhf": Registered("Anthropic/hh-rlhf", "MIT", "169,352 pairs, English"),
}


def load(
    data: str = "tinytown",
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> list[Row]:
    """Rows with TRL's columns, from Tinytown, a registered name, a hub id, or a local file.

    data: "tinytown", a name in `REGISTERED`, `owner/name` or `owner/name:config`, or a file of
    JSON, JSON lines, CSV or Parquet in a format that `formats` knows.
    split: a file, and a hub set that lacks a split, is cut 90/5/5 into "train", "validation" and
    "test", whatever `seed` is; a file's rows that are equal, or from one record, stay together.
    Of a file, "all" is every row, in its order.
    limit: at most so many rows, sampled by `seed` (Tinytown: generated).
    Raises FileNotFoundError, ValueError naming the file and row, or ConnectionError (the hub).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a whole number from 1, or None for all, got {limit!r}")
    data = str(data)
    if data == "tinytown":
        return tinytown.instruction_rows(split=split, n=limit, seed=seed)
    if path := _local(data):
        return _sample(_file_part(convert(_read(path), data), split), limit, seed)
    return _load_hub(data, split, limit, seed, revision)


def _local(data: str) -> Path | None:
    """The path if `data` is a file, None if it may be Tinytown or a set on the hub."""
    names, path = ["tinytown", *REGISTERED], Path(data).expanduser()
    if data not in names and (data[:1] in "./~" or _SUFFIX.search(data) or path.exists()):
        return path
    if data not in names and not _HUB_ID.fullmatch(data):
        known, near = ", ".join(names), get_close_matches(data, names, 1)
        expected = f"expected {known}, owner/name, or a file"
        raise ValueError(f"data: {expected}, got {data!r}; the nearest is {near}")
    return None


def _read(path: Path) -> Iterator[Row]:
    """A file's rows, in its order; errors name the file, and the line if known."""
    suffix, empty = _SUFFIX.search(path.name), True
    if not path.exists():
        raise FileNotFoundError(f"data: expected a file, found none: {path}")
    if path.is_dir() or not suffix:
        kinds = "JSON, JSON lines, CSV, TSV (also .gz, .bz2, .xz) or Parquet"
        raise ValueError(f"data: expected {kinds}, got {path}")
    try:
        for row in _rows(path, suffix[1].lower()):
            empty = False
            yield row
    except Exception as error:  # whatever a library raises
        raise ValueError(f"data: {path}: {error}") from error
    if empty:
        raise ValueError(f"data: {path} holds no rows; expected at least one")


def _rows(path: Path, kind: str) -> Iterator[Row]:
    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches():
                yield from batch.to_pylist()
        return
    options = {"compression": "infer", "encoding": "utf-8-sig", "newline": ""}
    with fsspec.open(str(path), "rt", **options) as file:
        yield from {"json": _json, "csv": _table, "tsv": _table}.get(kind, _lines)(file)


def _json(file: IO[str]) -> Iterable[Row]:
    """A list of objects, or one with such a list as `data` or `train`, or JSON lines (BELLE)."""
    try:
        value = json.load(file)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        file.seek(0)
        return _lines(file)
    if isinstance(value, dict):
        parts = [key for key in ("data", "train", *_HELD_OUT) if isinstance(value.get(key), list)]
        if len(parts) > 1:
            raise ValueError(f"holds {', '.join(parts)}; save each as a file of its own")
        value = value[parts[0]] if parts else [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("expected a list of objects")
    return value


def _lines(file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", error)
                raise ValueError(f"line {number}: {why}; mend the line or take it out") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected an object, got {line:.60}")
            yield row


def _table(file: IO[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if "\t" in file.readline() else ","
    file.seek(0)
    reader = csv.DictReader(file, strict=True, delimiter=delimiter)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num}: expected {len(names)} columns as in line 1")
        yield row


def _file_part(rows: list[Row], split: str) -> list[Row]:
    """One part of a file, or all; equal records, and rows that came from one, stay together."""
    if split == "all":
        return rows
    records = [list(group) for _, group in groupby(rows, key=lambda row: where(row, 0))]
    equal: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        equal.setdefault(repr(record), []).append(position)
    groups, positions = _part({"train": list(equal.values())}, split)
    chosen = sorted(position for i in positions for position in groups[i])
    return [row for position in chosen for row in records[position]]


def _part(sets: Any, split: str) -> tuple[Any, list[int]]:
    """A set and positions in it: the split itself, or a cut of "train" for those that are missing.

    A held-out part is 5 % of the rows, at least one.
    """
    held_out = [name for name in _HELD_OUT if name not in sets]
    if split in sets and not (split == "train" and held_out):
        return sets[split], list(range(len(sets[split])))
    if "train" not in sets or split not in ("train", *held_out):
        known = dict.fromkeys(("train", *_HELD_OUT, *sets) if "train" in sets else sets)
        raise ValueError(f"split: expected one of {', '.join(known)}, got {split!r}")
    count = len(sets["train"])
    order = list(range(count))
    random.Random(0).shuffle(order)
    size = max(1, round(count * 0.05)) if count > len(held_out) else 0
    start = len(held_out) * size if split == "train" else held_out.index(split) * size
    part = order[start:] if split == "train" else order[start : start + size]
    if not part:
        raise ValueError(f"split: {count} different rows are too few to hold out a {split!r} part")
    return sets["train"], sorted(part)


def _sample(rows: list, limit: int | None, seed: int) -> list:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _load_hub(data: str, split: str, limit: Any, seed: int, revision: str | None) -> list[Row]:
    import datasets

    hub, _, config = data.partition(":")
    entry = REGISTERED.get(data) or Registered(hub, "see its card", "", config or None)
    options = {"data_files": entry.files, "revision": revision or entry.revision}
    try:
        sets = datasets.load_dataset(entry.hub, entry.config, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(f"data: {data!r} did not load from the hub: {error!r}") from error
    rows, positions = _part(sets, split)
    # Published sets hold a few empty answers and conversations; one's own data must be right.
    rejected: list[str] | None = [] if data in REGISTERED else None
    loaded = rows.select(_sample(positions, limit, seed))
    converted = convert(loaded, f"{data} ({split}, as loaded)", rejected)
    if rejected:
        message = "%s: %d rows left out; the first: %s"
        logging.getLogger("labkit").warning(message, data, len(rejected), rejected[0])
    return converted[:limit]


class Encoded(list[Example]):
    """Tokenized rows: a list of `Example`s, of token ids and masks (1 = loss)."""

    def __init__(self, examples: Iterable[Example], truncated: int, max_length: int) -> None:
        super().__init__(examples)
        self.truncated, self.max_length = truncated, max_length
        self.tokens = sum(len(example.ids) for example in self)
        self.response_tokens = sum(int(example.mask.sum()) for example in self)

    @cached_property
    def dataset(self) -> Any:
        """The examples as a `datasets.Dataset` with TRL's columns, input_ids and completion_mask."""
        import datasets

        ids, masks = zip(*self, strict=True)
        return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})

    def summary(self) -> str:
        """One line: rows, tokens, the share that carries loss, how many rows were cut."""
        learned = f"{self.response_tokens:,} with loss ({self.response_tokens / self.tokens:.0%})"
        lengths = f"{self.tokens:,} tokens, {learned}, {self.truncated:,} cut to {self.max_length}"
        return f"{len(self):,} rows: {lengths}"


def encode(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int = 512, template: str = "auto"
) -> Encoded:
    """Token ids and masks whose 1s are the response and its EOS: where loss falls.

    Prompt and completion are tokenized apart, so no token straddles the border. A row longer than
    `max_length` (or the tokenizer's `model_max_length`, if smaller) loses the beginning of its
    prompt (a BOS stays), then the end of its response, and counts as `truncated`. Plain `text`
    rows carry loss everywhere. Raises ValueError naming the row for an empty response or a row
    that the template refuses, and for a pad token that is the EOS.
    """
    if not rows or max_length < 2:
        raise ValueError("expected at least one of rows, and a max_length from 2")
    models.check_tokenizer(tokenizer)
    limit, bos = min(max_length, tokenizer.model_max_length), tokenizer.bos_token_id
    render_row, rendered = templates.renderer(tokenizer, template), []
    for number, row in enumerate(rows, start=1):
        try:
            if not templates.response(row).strip():
                raise ValueError("the response is empty: nothing to learn; take the row out")
            rendered.append(render_row(row))
        except ValueError as error:
            raise ValueError(f"{where(row, number)}: {error}") from error
    tokenized = [templates.tokenize(texts, tokenizer) for texts in zip(*rendered, strict=True)]
    both = list(zip(*tokenized, strict=True))
    truncated = sum(len(prompt) + len(completion) > limit for prompt, completion in both)
    examples = (join(prompt, completion, limit, bos) for prompt, completion in both)
    return Encoded(examples, truncated, limit)
