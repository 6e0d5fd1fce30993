"""What makes a training step fast, and how the model gets out of it as it was.

The response-only loss, attention in float32 where bfloat16 is slow, compiling when a run is
long enough to pay for it, and the removal of what a trainer leaves on a model. Batches
without padding are made in `batching`; the trainer that uses all this is in `training`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import torch
from transformers import AttentionInterface, AttentionMaskInterface, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


# Right padding needs no mask in a causal model; older ones, such as GPT-2, ask for one all the same.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)

COMPILE_SECONDS, COMPILE_GAIN = 60, 0.1  # what compiling costs at most and saves at least


def float32_attention(module, query, key, value, attention_mask, **kwargs):
    """The library's attention, in float32 also under autocast.

    On a CPU, bfloat16 attention takes up to eight times as long backward: at 37 tokens a
    forward and backward pass took 21.6 ms in bfloat16, 6.7 ms in float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return output.to(value.dtype), weights


def quicken_attention(model) -> None:
    """Lets `model` use `float32_attention` where it uses the library's `sdpa`."""
    base = base_model(model)
    if base.config._attn_implementation == "sdpa":
        base.set_attn_implementation("labkit_float32")


AttentionInterface.register("labkit_float32", float32_attention)
AttentionMaskInterface.register("labkit_float32", sdpa_mask)


@contextlib.contextmanager
def as_before(model) -> Iterator[None]:
    """Takes off the model what a trainer leaves on it: wrapped forwards, marks, its mode.

    Left on, the marks would make the next trainer skip autocast without a word.
    """
    base = base_model(model)
    kept = [
        (module, dict(module.__dict__)) for module in {id(m): m for m in (model, base)}.values()
    ]
    training, attention = model.training, base.config._attn_implementation
    try:
        yield
    finally:
        for module, attributes in kept:
            for name in set(module.__dict__) - set(attributes):
                del module.__dict__[name]
            if "forward" in attributes:
                module.__dict__["forward"] = attributes["forward"]
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        if base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
        model.train(training)
        model.zero_grad()


def base_model(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def compiled(trainer, when: bool | str) -> Iterator[None]:
    """Compiles the model below its head, for the time of training: at once or if it pays."""
    backbone = base_model(trainer.model).base_model
    if when == "auto":
        trainer.add_callback(_CompileIfLong(backbone))
    elif when:
        backbone.compile(dynamic=True)
    try:
        yield
    finally:
        backbone._compiled_call_impl = None


class _CompileIfLong(TrainerCallback):
    def __init__(self, backbone) -> None:
        self.backbone, self.steps, self.start = backbone, 0, 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps += 1
        if self.steps == 5:  # the first ones are slower
            self.start = time.perf_counter()
        elif self.steps == 15:
            left = (time.perf_counter() - self.start) / 10 * (state.max_steps - state.global_step)
            if left * COMPILE_GAIN > COMPILE_SECONDS:
                self.backbone.compile(dynamic=True)
