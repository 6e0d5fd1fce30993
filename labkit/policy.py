"""A language model with a value function and a reference: what reinforcement learning trains.

One pass gives log-probabilities and values, with logits at response positions only. The loop that
uses it is `techniques/ppo`; sampling from it is `sampling`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import models
from labkit.batching import Collator, lines, parts, room_of
from labkit.speed import base_model

log = logging.getLogger("labkit")

PRECISIONS = ("auto", "bf16", "fp32")


class PolicyWithValue(nn.Module):
    """A policy, its reference, and a value function.

    The value head reads the policy's last hidden state, or that of a critic of its own
    (`separate_critic`), and starts at 0. The reference is the policy with its adapters off, or a
    frozen copy where it has none. Dropout is off in every pass. Raises ValueError for a model
    with a soft prompt, or without weights that train.
    """

    def __init__(self, model: Any, separate_critic: bool = False, precision: str = "auto") -> None:
        super().__init__()
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("model: expected one without a soft prompt or prefix; use LoRA")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: expected weights that train, got only frozen ones")
        if any(p.requires_grad and p.itemsize == 2 for p in model.parameters()):
            log.warning("model: its trained weights are of half precision, in which small steps "
                        "are lost; load it with dtype='float32'")  # fmt: skip
        half = {"auto": models.autocast_dtype(model), "bf16": torch.bfloat16, "fp32": None}
        self.dtype, self.model = half[precision], model
        self.critic = copy.deepcopy(base_model(model).base_model) if separate_critic else None
        adapters = hasattr(model, "disable_adapter")
        self.reference = None if adapters else copy.deepcopy(model).requires_grad_(False)
        width = model.get_output_embeddings().weight.shape[1]
        self.value_head = nn.utils.skip_init(nn.Linear, width, 1, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.eval()
        self.cut = model.device.type == "cpu"
        self.packing = model.device.type == "cpu" and self._keeps_apart()

    def batch(
        self, ids: Any, lengths: Any, rows: Sequence[int]
    ) -> tuple[list[int], dict[str, Any]]:
        """A batch of `rows`, for `forward`, and the order in which it has their responses.

        `ids[i]` holds a prompt and a response of `lengths[i]` tokens. On a CPU short rows share a
        line where the model keeps them apart; else they are padded on the right, where nothing
        sees it, so any id can stand there.
        """
        cut = self.cut and not self.packing
        rows = sorted(map(int, rows), key=lambda i: len(ids[i]))
        sizes = [len(ids[i]) for i in rows]
        collator = Collator(0, packing=self.packing, cut=cut)
        found = collator([(ids[i], np.arange(len(ids[i])) >= len(ids[i]) - lengths[i])
                          for i in rows])  # fmt: skip
        if self.packing:
            rows = [rows[i] for line in lines(sizes, room_of(sizes)) for i in line]
        kept = ("input_ids", "position_ids", "positions", "targets")
        batch = {name: found[name].to(self.device) for name in kept if name in found}
        return rows, batch | ({"parts": found["parts"]} if cut else {})

    def forward(self, batch: dict[str, Any], temperature: float) -> tuple[Tensor, ...]:
        """Log-probabilities (N,), values (N,), logits (N, V) of a batch's N response tokens."""
        with self.autocast():
            found = [self._part(part, temperature) for part in parts(batch)]
        return tuple(torch.cat(column) for column in zip(*found, strict=True))

    @torch.no_grad()
    def score(self, batch: dict[str, Any], temperature: float) -> Tensor:
        """(4, N): log-probabilities, the reference's, values, and entropies in nats."""
        logp, values, logits = self.forward(batch, temperature)
        entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
        off = self.model.disable_adapter() if self.reference is None else contextlib.nullcontext()
        with self.autocast(), off:
            model = self.reference or self.model
            known = torch.cat([_head(model, part, temperature)[1] for part in parts(batch)])
        return torch.stack([logp, known, values, entropy])

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def autocast(self) -> Any:
        """The precision of every pass; None is that of the weights."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _part(self, part: dict, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        hidden, logp, logits = _head(self.model, part, temperature)
        if self.critic is not None:
            hidden = self.critic(**_inputs(part))[0].flatten(0, 1)[part["positions"]]
        with torch.autocast(hidden.device.type, enabled=False):
            return logp, self.value_head(hidden.float())[:, 0], logits

    @torch.no_grad()
    def _keeps_apart(self) -> bool:
        """Whether rows that share a line have the log-probabilities that they have alone."""
        ids, found = [np.arange(1, 7), np.arange(3, 7)], []
        for self.packing in (True, False):
            order, batch = self.batch(ids, [4, 2], [0, 1])
            pieces = self.forward(batch, 1.0)[0].float().split([(4, 2)[i] for i in order])
            found.append(torch.cat([pieces[order.index(i)] for i in (0, 1)]))
        return torch.allclose(*found, atol=1e-3 if self.dtype is None else 0.1, rtol=0)


def _inputs(part: dict) -> dict[str, Any]:
    placed = {"position_ids": part["position_ids"]} if "position_ids" in part else {}
    return {"input_ids": part["input_ids"], "use_cache": False} | placed


def _head(model: Any, part: dict, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, log-probabilities and logits of the positions that predict a response token.

    What enters the output head is narrowed to them, so prompts and padding cost no logits.
    """
    kept = []

    def narrow(module, args):
        kept.append(args[0].flatten(0, 1).index_select(0, part["positions"]))
        return kept[0], *args[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        logits = model(**_inputs(part)).logits.float() / temperature
    finally:
        handle.remove()
    return kept[0], -F.cross_entropy(logits, part["targets"], reduction="none"), logits
