"""The bytes of one training step, part by part: the formulas behind `memory`.

A step holds weights, gradients, optimizer states, and what the backward pass needs of the forward
pass. How many numbers there are follows from the model's shape, how many bytes each has from the
precision, so these are exact; what the blocks keep is modelled in `activations`. Gradients appear
while activations go, so `moments` gives every part at each moment that can be the peak. Left out:
mixtures of experts, dropout, several devices, gaps between the allocator's blocks.
"""

from __future__ import annotations

from labkit.memory.activations import activations, adapters, once, spared, transient
from labkit.memory.shapes import Setting, Shape

Parts = dict[str, float]
PARTS = (
    "weights", "quantization constants", "adapters", "gradients", "optimizer states",
    "activations", "logits", "temporary", "framework",
)  # fmt: skip
FRAMEWORK = {"cpu": 550e6, "cuda": 600e6}  # Python with its libraries, measured; CUDA's context
WORKSPACE = {"cpu": 0, "cuda": 32 * 2**20}  # of cuBLAS, on Hopper
TILE = (4096, 32768)  # tokens and entries of the logits that TRL's fused head holds at a time


def trainable(shape: Shape, s: Setting) -> int:
    """How many numbers train.

    LoRA: r (in + out) a layer (Hu et al. 2021). Prefix: length · 2 · layers · width of the keys
    (Li and Liang 2021). Adapter: 2 d m + d + m each (Houlsby et al. 2019).
    """
    if s.technique in ("lora", "qlora"):
        found = shape.targeted(s.targets)
        return shape.layers * sum(s.rank * (out + width) for _, out, width in found)
    if s.technique == "prefix":
        return s.prefix_length * 2 * shape.layers * shape.keys
    if s.technique == "adapter":
        each = 2 * shape.hidden * s.bottleneck + shape.hidden + s.bottleneck
        return shape.layers * adapters(s) * each
    return shape.parameters


def state_bytes(s: Setting) -> float:
    """Optimizer states of one trained number.

    AdamW: two moments in the number's own type. In 8 bits: two codes and, for every 256, two
    float32 scales (Dettmers et al. 2022, arXiv:2110.02861).
    """
    if "8bit" in s.optimizer:
        return 2 + 2 * 4 / 256
    if "32bit" in s.optimizer:
        return 8
    return 0 if s.optimizer == "sgd" else 2 * trained_bytes(s)


def trained_bytes(s: Setting) -> int:
    return s.weight_bytes if s.full else 4


def quantization_constants(weights: int) -> float:
    """Double quantization: an 8-bit scale for 64 weights, a float32 one for 256 of those.

    8/64 + 32/(64 · 256) = 0.127 bits a weight (Dettmers et al. 2023, arXiv:2305.14314, section 3).
    """
    return weights / 64 + 4 * weights / (64 * 256)


def standing(shape: Shape, s: Setting) -> Parts:
    """What is there all the time: weights, constants, adapters, states, framework; exact."""
    quantized = shape.layers * shape.block_linear if s.technique == "qlora" else 0
    count, each = trainable(shape, s), trained_bytes(s)
    return dict.fromkeys(PARTS, 0.0) | {
        "weights": (shape.parameters - quantized) * s.weight_bytes + quantized / 2,
        "quantization constants": quantization_constants(quantized),
        "adapters": 0.0 if s.full else float(count * each),
        "gradients": float(count * each if s.gradient_accumulation > 1 else 0),
        "optimizer states": count * state_bytes(s),
        "temporary": float(WORKSPACE[s.device]),
        "framework": FRAMEWORK[s.device],
    }


def logits(shape: Shape, s: Setting) -> tuple[float, float]:
    """While the loss is computed, and while it goes back.

    Labkit computes logits only where a token is predicted. On a CPU they are there in the type of
    the arithmetic, in float32 and as log-probabilities; then with the gradients of the last two.
    On a GPU there is one tile of them, with the gradient of the hidden states (and of the head).
    """
    numbers, c = s.predicted * shape.vocabulary, s.compute_bytes
    if s.device == "cpu" or s.technique == "prefix":
        return (10 if c == 2 else 8) * numbers, 12 * numbers
    tile = c * min(s.predicted, TILE[0]) * TILE[1]
    return tile, tile + (4 + c) * s.predicted * shape.hidden + (4 * shape.head if s.full else 0)


def casts(shape: Shape, s: Setting) -> tuple[float, float]:
    """Weights once more in the type of the arithmetic: those of one block, and of the head."""
    if s.weight_bytes == s.compute_bytes:
        return 0, 0
    entries = min(shape.vocabulary, TILE[1]) if s.device == "cuda" else shape.vocabulary
    block = 0 if s.technique == "qlora" else shape.block_linear
    return s.compute_bytes * block, s.compute_bytes * entries * shape.hidden


def moments(shape: Shape, s: Setting) -> dict[str, Parts]:
    """All parts in bytes at each moment that can be the peak of a step, the second or later.

    "forward": the forward pass has ended. "loss": the loss goes back through the logits. "last
    block" and "first block": the backward pass is in that block. "update": gradients are complete.
    "trial": on a CPU labkit first tries on four rows whether the model keeps packed rows apart.
    With checkpointing only the blocks' inputs are kept, and each block is computed once more.
    """
    base = standing(shape, s)
    found = {
        "forward": _top(shape, s, back=False),
        "loss": _top(shape, s, back=True),
        "last block": _last_block(shape, s),
        "first block": _first_block(shape, s),
        "update": _update(shape, s),
    }
    for parts in found.values():
        parts["temporary"] += base["temporary"]
        parts["gradients"] = max(parts["gradients"], base["gradients"])
    if s.packed:
        found["trial"] = _trial(shape, s)
    return {name: base | parts for name, parts in found.items()}


def _trial(shape: Shape, s: Setting) -> Parts:
    """No gradients, autocast or states: at most the activations of one MLP, or the logits."""
    inside = 4 * s.sequence_length * s.weight_bytes
    wide = shape.inner_kept + (s.technique in ("lora", "qlora"))  # PEFT holds on to one more
    inside *= wide * shape.inner + 4 * shape.hidden
    numbers = 4 * max(1.0, (s.sequence_length - 1) * s.response_share) * shape.vocabulary
    scores = (8 if s.weight_bytes == 4 else 10) * numbers
    return {
        "activations": inside if inside > scores else 0,
        "logits": scores if scores >= inside else 0,
        "temporary": rebuilt(shape, s),
        "gradients": 0,
        "optimizer states": 0,
    }


def _top(shape: Shape, s: Setting, back: bool) -> Parts:
    """At the output head. The final norm keeps as others do, the head its input if it trains."""
    norm = 4 + (s.weight_bytes if s.full and shape.python_norms else 0)
    kept = _stored(shape, s) + s.tokens * shape.hidden * norm
    if s.full or s.device == "cuda":
        kept += s.compute_bytes * s.predicted * shape.hidden
    block, head = casts(shape, s)
    dropped = s.gradient_checkpointing and (back or not s.full)  # autocast's cache ends before
    return {
        "activations": kept,
        "logits": logits(shape, s)[back],
        "temporary": head + (0 if dropped else shape.layers * block),
        "gradients": _head_gradient(shape, s) if back and s.device == "cuda" else 0,
    }


def _last_block(shape: Shape, s: Setting) -> Parts:
    """Entering it backwards, in its MLP; or before, in the final norm, which works in float32."""
    moving, block = s.tokens * transient(shape, s), casts(shape, s)[0]
    if not s.gradient_checkpointing:
        norm = 24 if shape.python_norms else 8  # its input and five gradients, in float32
        moving = max(moving, s.tokens * norm * shape.hidden)
        block *= shape.layers
    again = _again(shape, s) if s.gradient_checkpointing else 0
    return {
        "activations": _stored(shape, s) + again,
        "temporary": moving + block + rebuilt(shape, s),
        "gradients": _head_gradient(shape, s),
    }


def _first_block(shape: Shape, s: Setting) -> Parts:
    """In its MLP: of its own gradients only that of the MLP's last layer is there yet."""
    gradients = trainable(shape, s) * trained_bytes(s)
    if s.full:
        missing = shape.block_linear - shape.hidden * shape.inner
        gradients -= s.weight_bytes * (missing + (0 if shape.tied else shape.head))
    return {
        "activations": _entering(shape, s) + _again(shape, s) + s.tokens * once(shape, s),
        "temporary": s.tokens * transient(shape, s) + casts(shape, s)[0] + rebuilt(shape, s),
        "gradients": gradients,
    }


def _update(shape: Shape, s: Setting) -> Parts:
    """All gradients are there; a tied embedding gets two, added in place only if one was cast."""
    twice = 2 if s.weight_bytes == s.compute_bytes else 1
    adding = twice * _head_gradient(shape, s) if shape.tied else 0
    return {
        "activations": 0,
        "temporary": max(adding, _stepping(shape, s)),
        "gradients": trainable(shape, s) * trained_bytes(s),
    }


def _stepping(shape: Shape, s: Setting) -> float:
    """Copies of the largest weight in float32, which bitsandbytes makes on a CPU."""
    copies = 5 if "8bit" in s.optimizer else 3 if "32bit" in s.optimizer else 0
    if s.device == "cuda" or not s.full:
        return 0
    return 4 * copies * max(shape.head, *(out * width for _, out, width in shape.linear))


def _stored(shape: Shape, s: Setting) -> float:
    """Activations of all blocks when the forward pass has ended."""
    shared = s.tokens * once(shape, s)
    if s.gradient_checkpointing:
        return shape.layers * _entering(shape, s) + shared
    block = sum(activations(shape, s).values())
    return s.tokens * (shape.layers * block - spared(shape, s)) + shared


def _entering(shape: Shape, s: Setting) -> float:
    """What enters a block."""
    return s.tokens * s.weight_bytes * shape.hidden


def _again(shape: Shape, s: Setting) -> float:
    """Activations of one block beside its input, which the norm keeps as it is if float32."""
    same = _entering(shape, s) if s.weight_bytes == 4 else 0
    return s.tokens * sum(activations(shape, s).values()) - same


def _head_gradient(shape: Shape, s: Setting) -> float:
    return s.weight_bytes * shape.head if s.full else 0


def rebuilt(shape: Shape, s: Setting) -> float:
    """Under QLoRA, the one weight that is rebuilt from its codes to be multiplied with."""
    largest = max(out * width for _, out, width in shape.linear)
    return s.weight_bytes * largest if s.technique == "qlora" else 0
