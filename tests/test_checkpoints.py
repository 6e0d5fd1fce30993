"""A run goes on only from a checkpoint of its own: what differs is named."""

import numpy as np
import pytest
import torch
from torch import nn

from labkit import checkpoints
from labkit.batching import Example
from labkit.pairs import Pair
from labkit.techniques import adapter, lora, prefix


def tuned(make, **settings):
    config = lora.LoraConfig(**{"rank": 4, "alpha": 8, "dropout": 0.1, **settings})
    return lora.attach(make(), config)


CHANGES = [
    ({"alpha": 16}, "lora_alpha"),
    ({"dropout": 0.2}, "p"),
    ({"targets": "q_proj"}, "weights"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_other_settings_of_an_adapter_are_refused_by_name(tiny_model, tmp_path, change, named):
    made = checkpoints.fingerprint(tuned(tiny_model))
    (tmp_path / "checkpoint-3").mkdir()
    checkpoints.complete(tmp_path / "checkpoint-3", made)
    assert checkpoints.newest(tmp_path, checkpoints.fingerprint(tuned(tiny_model)))
    with pytest.raises(ValueError, match=named):
        checkpoints.newest(tmp_path, checkpoints.fingerprint(tuned(tiny_model, **change)))


def test_other_adapters_and_buffers_have_other_fingerprints(tiny_model):
    made = [
        lora.inject(tiny_model(), lora.LoraConfig(rank=4, alpha=8)),
        lora.inject(tiny_model(), lora.LoraConfig(rank=4, alpha=16)),
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
