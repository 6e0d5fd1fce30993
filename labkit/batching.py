"""Encoded rows as batches: held in flat arrays, grouped by length, padded on the right.

Padding costs as much as text, and reading rows one by one out of a dataset costs more than
collating them. So the rows are taken out once, neighbours in length share a batch, and a
batch already names the positions whose next token is part of a response: the loss then
needs no other. In a causal model no token sees what follows it, so padding on the right
needs no attention mask. Preparing text is `data.encode`; the loss is in `training`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

POOL = 64  # batches that are sorted by length together


class Rows(torch.utils.data.Dataset):
    """Token ids and response masks of a dataset, flat, with the offsets of its rows."""

    def __init__(self, dataset) -> None:
        missing = {"input_ids", "completion_mask"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"dataset: expected the columns input_ids and completion_mask, got "
                f"{dataset.column_names}; encode the rows first: data.encode(rows, tokenizer)"
            )
        if len(dataset) == 0:
            raise ValueError("dataset: expected at least one row, got none")
        self.ids, self.offsets = _flat(dataset, "input_ids")
        self.mask, mask_offsets = _flat(dataset, "completion_mask")
        differing = np.flatnonzero(np.diff(self.offsets) != np.diff(mask_offsets))
        if len(differing):
            raise ValueError(
                f"row {differing[0]}: expected as many entries in completion_mask as in input_ids"
            )
        self.lengths = np.diff(self.offsets)
        self._check_responses()

    def _check_responses(self) -> None:
        counted: np.ndarray = self.mask.astype(np.int64)
        counted[self.offsets[:-1][self.lengths > 0]] = 0  # nothing predicts a first token
        sums = np.concatenate([[0], counted.cumsum()])
        empty = np.flatnonzero(sums[self.offsets[1:]] == sums[self.offsets[:-1]])
        if len(empty):
            raise ValueError(
                f"row {empty[0]}: expected at least one response token to learn, got a "
                "completion_mask without any; drop the row or give it a response"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.ids[part], self.mask[part]


def _flat(dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    if getattr(dataset, "_indices", None) is not None:
        dataset = dataset.flatten_indices()
    rows = dataset.with_format("arrow")[:][column].combine_chunks()
    offsets = np.asarray(rows.offsets, dtype=np.int64)
    values = rows.values.to_numpy(zero_copy_only=False)
    return values[offsets[0] : offsets[-1]].astype(np.int64), offsets - offsets[0]


class LengthSampler(torch.utils.data.Sampler):
    """Row numbers such that each `batch_size` in a row are of similar length.

    Rows are shuffled, sorted within pools of 64 batches, and the batches shuffled again; the
    order depends on the seed and the epoch only, so that a resumed run meets the same batches.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        full = len(order) // self.batch_size * self.batch_size
        rows, rest = order[:full], order[full:]
        size = POOL * self.batch_size
        pools = [rows[i : i + size] for i in range(0, full, size)]
        ordered = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate([*ordered, rest[:0]]).reshape(-1, self.batch_size)
        random.shuffle(batches)
        return iter([*batches.ravel().tolist(), *rest.tolist()])


class Collator:
    """Rows -> tensors of a batch.

    Gives `input_ids` (B, T), padded on the right; `positions` (N,), the flat indices into
    B·T whose next token is a response token; `shift_labels` (N,), those tokens; `tokens`, the
    count without padding. With `packing` all rows lie end to end in one, (1, ΣT), kept apart
    by their `position_ids`, so there is no padding at all.
    """

    def __init__(self, pad_id: int, packing: bool = False) -> None:
        self.pad_id, self.packing = pad_id, packing

    def __call__(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> dict:
        lengths = [len(ids) for ids, _ in rows]
        if self.packing:
            ids = np.concatenate([ids for ids, _ in rows])[None]
            mask = np.concatenate([_without_first(mask) for _, mask in rows])[None]
        else:
            ids = np.full((len(rows), max(lengths)), self.pad_id, dtype=np.int64)
            mask = np.zeros(ids.shape, dtype=bool)
            for i, (row_ids, row_mask) in enumerate(rows):
                ids[i, : lengths[i]] = row_ids
                mask[i, 1 : lengths[i]] = row_mask[1:]
        learned = np.flatnonzero(mask)
        targets = torch.from_numpy(ids.ravel()[learned])
        batch = {
            "input_ids": torch.from_numpy(ids),
            "positions": torch.from_numpy(learned - 1),
            "shift_labels": targets,
            "labels": targets,  # Trainer counts shift_labels only where there are labels
            "tokens": sum(lengths),
        }
        if self.packing:
            places = np.concatenate([np.arange(n) for n in lengths])[None]
            batch["position_ids"] = torch.from_numpy(places)
        return batch


def _without_first(mask: np.ndarray) -> np.ndarray:
    mask = mask.astype(bool)
    mask[:1] = False
    return mask
