"""What a block keeps for the backward pass: activations, modelled term by term.

    s·b·h·(34 + 5·a·s/h) bytes a block      s tokens, b rows, h hidden width, a attention heads

is the formula of Korthikanti et al. 2022 (arXiv:2205.05198), for GPT in half precision with
dropout. `transformers` keeps other things today: norms work in float32, MLPs are gated, keys are
grouped, dropout is 0, and attention computes its a·s² scores again (Dao et al. 2022,
arXiv:2205.14135). And what does not train needs no input kept. Each term here was compared with
what autograd saves.
"""

from __future__ import annotations

from labkit.memory.shapes import Setting, Shape


def activations(shape: Shape, s: Setting) -> dict[str, float]:
    """What one block keeps of each token for the backward pass, in bytes, by origin.

    `norms`: the input in float32 and, if its weight trains, the normalized input. `inputs` of
    linear layers whose weight (or LoRA's A) trains; autocast makes a copy for each layer.
    `attention`: queries, keys, values, output, and a float32 sum a head; eager also the scores.
    `mlp`: before and after the activation, and what the gate is multiplied with.
    """
    kept = s.weight_bytes if s.full and shape.python_norms else 0
    width = s.flow_bytes * shape.inner
    return {
        "norms": sum(shape.norms) * (4 + kept),
        "inputs": _inputs(shape, s),
        "attention": _attention(shape, s),
        "mlp": shape.inner_kept * width,
    }


def _inputs(shape: Shape, s: Setting) -> float:
    c = s.compute_bytes
    if s.technique == "prefix":
        return 0
    if s.technique == "adapter":
        return adapters(s) * c * (shape.hidden + s.bottleneck)
    layers = shape.linear if s.full else shape.targeted(s.targets)
    copies = c * sum(width for _, _, width in layers)
    inner = 0 if s.full else c * s.rank * len(layers)  # what B multiplies
    if copied(s):
        return copies + inner
    shared = s.attention == "sdpa" and s.attention_bytes == c  # with attention's own output
    own = 0 if shared else shape.queries
    return min(copies, c * (2 * shape.hidden + shape.inner + own)) + inner


def copied(s: Setting) -> bool:
    """Whether each linear layer that trains keeps its own bfloat16 copy of its input.

    Autocast makes one of a float32 input; PEFT first makes a float32 one for LoRA.
    """
    if s.compute_bytes == 4 or s.weight_bytes == 4:
        return s.compute_bytes == 2
    return s.technique == "lora" or (s.technique == "qlora" and s.device == "cpu")


def _attention(shape: Shape, s: Setting) -> float:
    a, room = s.attention_bytes, s.lines[1]
    if s.attention == "eager":
        scores = 4 + (s.compute_bytes if s.compute_bytes == 2 else 0)
        return a * 3 * shape.queries + shape.heads * room * scores
    several = shape.keys * shape.heads > shape.queries  # more than one head of keys
    keys = shape.queries if s.masked and several else shape.keys  # a mask wants them repeated
    kept = 2 * a * (shape.queries + keys) + 4 * shape.heads
    before = s.prefix_length if s.technique == "prefix" else 0
    mask = a * (room + before) if s.masked else 0
    return kept + mask + 2 * a * keys * before / room


def once(shape: Shape, s: Setting) -> float:
    """What all blocks share for a token: the mask, and the sines and cosines of its position."""
    angles = 2 * s.weight_bytes * shape.queries // shape.heads if s.packed else 0
    return angles + (s.lines[1] if s.masked else 0)


def spared(shape: Shape, s: Setting) -> float:
    """What the first block need not keep of a token, since nothing before it trains."""
    if s.full or s.gradient_checkpointing:
        return 0
    kept = activations(shape, s)
    before = kept["norms"] / len(shape.norms)
    if s.technique != "adapter":
        return before
    return kept["attention"] + (before if adapters(s) == 2 else kept["norms"] + kept["mlp"])


def transient(shape: Shape, s: Setting) -> float:
    """Gradients of activations at their most, for a token: in the MLP, going backwards.

    There live the gradient of the residual stream and those of the MLP's inner activations, less
    what has been used up; under LoRA also its copies. Fitted to the allocator's record.
    """
    inner = 2 if shape.gated else 1
    stream = float(s.weight_bytes * shape.hidden)
    if s.technique in ("prefix", "adapter") or (s.technique == "lora" and copied(s)):
        inner += 1
    if s.technique in ("lora", "qlora") and copied(s):
        w, c = s.weight_bytes, s.compute_bytes
        stream += (w + 3 * c if s.technique == "lora" else w) * shape.hidden
    return inner * s.flow_bytes * shape.inner + stream


def adapters(s: Setting) -> int:
    """Of a block: after attention and MLP, or after the MLP."""
    return 2 if s.placement == "houlsby" else 1
