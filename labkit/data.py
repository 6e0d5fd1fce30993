"""Rows of any known format → prompt/completion or preference rows → tokens with a loss mask.

`load` gets rows (`list[dict]` with TRL's columns) from Tinytown, a registered data set, the hub,
or a local file; `encode` tokenizes them so that loss falls on the response and its EOS only.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import logging
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .formats import Row, convert, recognize, where
from .show import show_masks
from .templates import ALPACA, TEMPLATES, render, renderer, response

if TYPE_CHECKING:  # torch takes two seconds to import
    from .batching import Example

__all__ = ["ALPACA", "REGISTERED", "TEMPLATES", "Encoded", "Registered", "convert", "encode"]
__all__ += ["load", "recognize", "render", "show_masks"]

_log = logging.getLogger("labkit")
_HELD_OUT = ("validation", "test")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class Registered(NamedTuple):
    """A public data set known by name: where it is, under which terms, how large."""

    hub: str
    licence: str  # what the card states
    size: str
    config: str | None = None
    files: str | None = None
    revision: str | None = None


# The chapter's table 5.4.3, and the preference data of 5.5.
REGISTERED = {
    "alpaca": Registered("tatsu-lab/alpaca", "CC BY-NC 4.0", "52,002 rows, English"),
    "flan": Registered(
        "Muennighoff/flan",
        "none on the card; FLAN's code is Apache-2.0",
        "millions of rows of 62 data sets, English",
    ),
    "p3": Registered(
        "bigscience/P3",
        "Apache-2.0",
        "660 sets, English; one at a time: bigscience/P3:NAME",
        config="ag_news_classify",
    ),
    "belle": Registered("BelleGroup/train_2M_CN", "GPL-3.0", "2,000,000 rows, Chinese"),
    "coig": Registered(
        "BAAI/COIG",
        "Apache-2.0",
        "97,739 rows (those not translated), Chinese",
        files="NoTranslate/train/*.parquet",
        revision="refs/convert/parquet",
    ),
    "sharegpt": Registered(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        "Apache-2.0 on the card",
        "about 94,000 conversations, many languages",
        files="ShareGPT_V3_unfiltered_cleaned_split.json",
    ),
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

    data: "tinytown"; a name in `REGISTERED`; a hub id `owner/name` or `owner/name:config`; or a
    file ending in one of `SUFFIXES` (or compressed, `.gz`), in a format that `formats` knows.
    split: a file, and a hub set that lacks a split of that name, is cut 90/5/5 into "train",
    "validation" and "test" (at least one row each). The cut is fixed, whatever `seed` is, so the
    parts never overlap; a file's rows that are equal, or from one record, stay together.
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
    if data not in REGISTERED and (
        _suffix(data) in SUFFIXES or data[0] in "./~" or Path(data).exists()
    ):
        return _sample(_file_part(convert(read(data), data), split, data), limit, seed)
    return _load_hub(data, split, limit, seed, revision)


def _suffix(path: str) -> str:
    path = path.lower()
    return Path(Path(path).stem if path.endswith(COMPRESSED) else path).suffix


def read(path: str) -> list[Row]:
    """All rows of a file, in its order; errors name the file, and the line if known."""
    import fsspec

    file, suffix = Path(path).expanduser(), _suffix(path)
    if not file.exists():
        raise FileNotFoundError(f"data: {path} does not exist (looked from {Path.cwd()})")
    if file.is_dir() or suffix not in SUFFIXES:
        raise ValueError(f"data: expected a file ending in {', '.join(SUFFIXES)}, got {path}")
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            with fsspec.open(str(file), "rb", compression="infer") as opened:
                text = _decode(opened.read())
            rows = _json(text) if suffix == ".json" else list(_parse(text, suffix))
    except (ValueError, OSError, EOFError, zlib.error, csv.Error, RecursionError) as error:
        raise ValueError(f"data: {path}: {error}") from error
    if not rows:
        raise ValueError(f"data: {path} holds no rows; expected at least one")
    return rows


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line}: expected UTF-8, got {raw[error.start : error.end]!r}"
        ) from error


def _json(text: str) -> list[Row]:
    """A list of objects, one object with such a list as `data` or `train`, or JSON lines (BELLE)."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[0] == "{":
            return list(_parse(text, ".jsonl"))
        raise
    if isinstance(value, dict):
        parts = [
            v for k, v in value.items() if k in ("data", "train", *_HELD_OUT) if isinstance(v, list)
        ]
        if len(parts) > 1:
            raise ValueError("holds several splits; save each as a file of its own")
        value = parts[0] if parts else [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("expected a list of objects")
    return value


def _parse(text: str, suffix: str) -> Iterator[Row]:
    """The rows of JSON lines, or of a table with a header."""
    if suffix in (".csv", ".tsv"):
        yield from _table(text, "," if suffix == ".csv" else "\t")
        return
    # Only \n ends a line: str.splitlines would also cut at U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected an object, got {line[:60]}")
            yield row


def _table(text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"line {reader.line_num}: expected {len(names)} columns, as in the header"
            )
        yield row


def _file_part(rows: list[Row], split: str, data: str) -> list[Row]:
    """One part of a file; equal records, and rows that came from one, stay together."""
    records = [list(group) for _, group in groupby(rows, key=lambda row: row.where)]
    equal: dict[str, list[int]] = {}
    for position, record in enumerate(records):
        equal.setdefault(repr(record), []).append(position)
    groups = list(equal.values())
    chosen = sorted(i for group in _part(len(groups), split, data) for i in groups[group])
    return [row for i in chosen for row in records[i]]


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
        raise ValueError(f"split: {data} has {count} different rows, too few for a {split!r} part")
    return sorted(parts[split])


def _sample(rows: list, limit: int | None, seed: int) -> list:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def _load_hub(
    data: str, split: str, limit: int | None, seed: int, revision: str | None
) -> list[Row]:
    if data not in REGISTERED and not _HUB_ID.fullmatch(data):
        names = ["tinytown", *REGISTERED]
        near = "".join(f"; did you mean {n!r}?" for n in difflib.get_close_matches(data, names, 1))
        raise ValueError(
            f"data: expected {', '.join(names)}, owner/name, or a file, got {data!r}{near}"
        )
    hub, _, config = data.partition(":")
    entry = REGISTERED.get(data) or Registered(hub, "see its card", "", config or None)
    import datasets

    try:
        sets = datasets.load_dataset(
            entry.hub, entry.config, data_files=entry.files, revision=revision or entry.revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"data: {data!r} could not be loaded from the hub ({type(error).__name__}: "
            f"{str(error)[:300]}); check the name and the network, or give a local file"
        ) from error
    rows, positions = _hub_part(sets, split, data)
    chosen = _sample(positions, limit, seed)
    # Published sets hold a few empty answers and conversations; one's own data must be right.
    rejected: list[str] | None = [] if data in REGISTERED else None
    converted = convert(rows.select(chosen), f"{data} ({split})", [i + 1 for i in chosen], rejected)
    if rejected:
        _log.warning("%s: %d rows left out; the first: %s", data, len(rejected), rejected[0])
    return converted[:limit]


def _hub_part(sets: Any, split: str, data: str) -> tuple[Any, list[int]]:
    """The hub's own split, or a cut of its "train" for those that it lacks."""
    held_out = tuple(name for name in _HELD_OUT if name not in sets)
    if split in sets and not (split == "train" and held_out):
        return sets[split], list(range(len(sets[split])))
    if "train" not in sets or split not in ("train", *held_out):
        raise ValueError(f"split: {data!r} has {', '.join(sets)}, got {split!r}")
    return sets["train"], _part(len(sets["train"]), split, data, held_out)


@dataclass(frozen=True, eq=False)
class Encoded(Sequence):
    """Tokenized rows: `Example`s of token ids and masks (1 = loss)."""

    examples: Sequence[Example]
    truncated: int
    max_length: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def response_tokens(self) -> int:
        return sum(int(example.mask.sum()) for example in self.examples)

    @cached_property
    def dataset(self) -> Any:
        """The examples as a `datasets.Dataset` with TRL's columns, input_ids and completion_mask."""
        import datasets

        ids, masks = zip(*self.examples, strict=True)
        return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})

    def summary(self) -> str:
        """One line: rows, tokens, the share that carries loss, how many rows were cut."""
        return (
            f"{len(self):,} rows · {self.tokens:,} tokens ({self.tokens / len(self):.1f} per row) · "
            f"{self.response_tokens:,} with loss ({self.response_tokens / self.tokens:.0%}) · "
            f"{self.truncated:,} cut to {self.max_length} tokens"
        )


def encode(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int = 512, template: str = "auto"
) -> Encoded:
    """Token ids and masks whose 1s are the response and its EOS: where loss falls.

    Prompt and completion are tokenized apart, so no token straddles the border. A row longer
    than `max_length` (or the tokenizer's `model_max_length`, if smaller) loses the beginning of
    its prompt (a BOS stays); a response that is too long by itself loses its end. Both are
    counted in `truncated`. Plain `text` rows carry loss everywhere.

    Raises ValueError naming the row (in its file, else from 1) for an empty response or a row that
    the template refuses, and for a tokenizer whose pad token is its EOS.
    """
    from .models import check_tokenizer

    if not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length: expected a whole number from 2, got {max_length!r}")
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    check_tokenizer(tokenizer)
    limit, render_row = min(max_length, tokenizer.model_max_length), renderer(tokenizer, template)
    rendered = []
    for number, row in enumerate(rows, start=1):
        try:
            if not response(row).strip():
                raise ValueError("the response is empty: nothing to learn; take the row out")
            rendered.append(render_row(row))
        except ValueError as error:
            raise ValueError(f"{where(row, number)}: {error}") from error
    prompts, completions = (
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for texts in map(list, zip(*rendered, strict=True))
    )
    pairs = list(zip(prompts, completions, strict=True))
    examples = [_join(*pair, limit, tokenizer.bos_token_id) for pair in pairs]
    return Encoded(examples, sum(len(p) + len(c) > limit for p, c in pairs), limit)


def _join(prompt: list[int], completion: list[int], limit: int, bos: int | None) -> Example:
    """Ids and mask of one example, cut to `limit`."""
    import numpy as np

    from .batching import Example

    if len(prompt) + len(completion) > limit:
        head = prompt[:1] if prompt and prompt[0] == bos else []
        completion = completion[: limit - len(head)]
        space = limit - len(head) - len(completion)
        prompt = head + prompt[len(prompt) - space :]
    ids = np.array(prompt + completion, dtype=np.int64)
    return Example(ids, (np.arange(len(ids)) >= len(prompt)).astype(np.int64))
