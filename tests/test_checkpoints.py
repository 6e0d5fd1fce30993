"""A run goes on only from a checkpoint of its own: what differs is named."""

import numpy as np
import pytest
import torch
from torch import nn

from labkit import checkpoints
from labkit.batching import Example
from labkit.pairs import Pair
from labkit.techniques import adapter, lora, prefix


def test_other_adapters_and_buffers_have_other_fingerprints(tiny_model):
    """The same model has the same one, and what differs is named."""
    changes = ({}, {"alpha": 16}, {"dropout": 0.2}, {"targets": "q_proj"})
    configs = [lora.LoraConfig(**{"rank": 4, "alpha": 8, "dropout": 0.1} | c) for c in changes]
    plain, *others = (checkpoints.fingerprint(lora.attach(tiny_model(), c)) for c in configs)
    assert plain == checkpoints.fingerprint(lora.attach(tiny_model(), configs[0]))
    for other, named in zip(others, ("lora_alpha", "p", "trained weights"), strict=True):
        assert {name for name in plain if plain[name] != other[name]} & {named, f"model.{named}"}
    made = [
        *(lora.inject(tiny_model(), config) for config in configs[:2]),
        adapter.attach(tiny_model(), adapter.AdapterConfig(activation="relu")),
        adapter.attach(tiny_model(), adapter.AdapterConfig(activation="gelu")),
        prefix.attach(tiny_model(), prefix.PrefixConfig(length=4)),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, eps=0.1),
    ]
    with torch.no_grad():
        made.append(nn.BatchNorm1d(4))
        made[-1].running_mean += 1
    found = [str(checkpoints.fingerprint(model)) for model in made]
    assert len(set(found)) == len(made)


def test_other_labels_of_the_same_pairs_are_another_run(tiny_model):
    one = Example(np.arange(4), np.ones(4, dtype=int))
    known = np.zeros(2)
    pairs = [Pair(one, one, known), Pair(one, one, known, 0.7), Pair(one, one, known, 0.3)]
    pairs.append(Pair(one, one, known + 1))
    assert len({checkpoints.fingerprint(tiny_model(), [p])["examples"] for p in pairs}) == 4


@pytest.mark.parametrize("content", [None, b"", b"ab"])
def test_a_damaged_file_is_named(tmp_path, content):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"abc")
    checkpoints.complete(folder, {})
    assert checkpoints.newest(tmp_path, {}) == folder
    (folder / "optimizer.pt").unlink()
    if content is not None:
        (folder / "optimizer.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer\.pt"):
        checkpoints.newest(tmp_path, {})
