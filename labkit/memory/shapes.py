"""What memory depends on: the shape of a decoder, and the setting in which it trains.

A shape is read from a configuration by `reading`; what follows from the two is in `footprint`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

CHOICES = {
    "technique": ("full", "lora", "qlora", "prefix", "adapter"),
    "device": ("cpu", "cuda"),
    "precision": ("bf16", "mixed", "fp32"),
    "attention": ("sdpa", "eager"),
    "placement": ("houlsby", "pfeiffer"),
    "optimizer": (
        "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
        "sgd",
    ),
}  # fmt: skip
COUNTS = ("batch_size", "sequence_length", "gradient_accumulation", "rank", "prefix_length",
          "bottleneck")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Widths and counts of a decoder.

    `queries` and `keys` are widths, heads times their size; `inner` is the width inside the MLP,
    `gated` whether two layers lead to it, `inner_kept` how many activations of that width the
    backward pass needs before the last layer. `linear` names the linear layers of a block, (name, out,
    in), `norms` gives the widths of its norms; `python_norms` tells whether these are written in
    Python, as RMSNorm is, and so keep more for the backward pass than a kernel does.
    """

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    tied: bool
    heads: int
    queries: int
    keys: int
    inner: int
    gated: bool
    inner_kept: int
    linear: tuple[tuple[str, int, int], ...]
    norms: tuple[int, ...]
    python_norms: bool

    @property
    def head(self) -> int:
        """Parameters of the output head, or of the input embedding."""
        return self.vocabulary * self.hidden

    @property
    def block_linear(self) -> int:
        """Parameters of the linear layers of one block."""
        return sum(out * width for _, out, width in self.linear)

    def targeted(self, targets: str | tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
        """The linear layers of a block that LoRA's `targets` mean: "all-linear", or names.

        A name is a layer's last or a longer ending, as in `lora`. Raises ValueError for a name
        that no layer has.
        """
        if targets == "all-linear":
            return self.linear
        names = targets.split(",") if isinstance(targets, str) else targets
        endings = ["." + name.strip() for name in names]
        full = {layer: "." + layer[0] for layer in self.linear}
        for ending in endings:
            if not any(name.endswith(ending) for name in full.values()):
                raise ValueError(f"targets: expected 'all-linear' or some of {', '.join(self.names)}, "
                                 f"got {targets!r}")  # fmt: skip
        return tuple(layer for layer, name in full.items() if name.endswith(tuple(endings)))

    @property
    def names(self) -> list[str]:
        """Last names of the linear layers."""
        return sorted({name.rpartition(".")[2] for name, _, _ in self.linear})


@dataclass(frozen=True)
class Setting:
    """How a model is trained by labkit on a device. Raises ValueError for what cannot work.

    `precision`: "bf16" (weights and arithmetic), "mixed" (float32 weights, bfloat16 arithmetic)
    or "fp32". `attention`: "sdpa", or "eager", which keeps all scores. `response_share`: of the
    tokens, those that the loss falls on. Adapters and prefixes are float32.
    """

    technique: str = "lora"
    device: str = "cuda"
    optimizer: str = "adamw_torch_fused"
    precision: str = "bf16"
    batch_size: int = 1
    sequence_length: int = 512
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    response_share: float = 1.0
    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"
    prefix_length: int = 20
    bottleneck: int = 64
    placement: str = "houlsby"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            value = getattr(self, name)
            _require(name, value, value in known, f"one of {', '.join(known)}")
        for name in COUNTS:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(name, value, whole and value >= 1, "a whole number from 1")
        _require("response_share", self.response_share, 0 < self.response_share <= 1,
                 "a share above 0, at most 1")  # fmt: skip
        again = self.gradient_checkpointing and self.technique == "prefix"
        _require("gradient_checkpointing", True, not again, "False with a prefix")

    @property
    def full(self) -> bool:
        return self.technique == "full"

    @property
    def weight_bytes(self) -> int:
        """Of a weight that is not quantized, and so of the residual stream."""
        return 2 if self.precision == "bf16" else 4

    @property
    def compute_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def flow_bytes(self) -> int:
        """Of what passes between linear layers; autocast does not reach those in four bits."""
        return self.weight_bytes if self.technique == "qlora" else self.compute_bytes

    @property
    def attention_bytes(self) -> int:
        """On a CPU labkit computes attention in float32 (`speed.float32_attention`)."""
        return 4 if self.device == "cpu" and self.attention == "sdpa" else self.flow_bytes

    @property
    def packed(self) -> bool:
        """On a CPU labkit lets short rows share lines (`batching`), unless they have a prefix."""
        return self.device == "cpu" and self.technique != "prefix"

    @cached_property
    def lines(self) -> tuple[int, int]:
        """How many lines of how many tokens a batch of rows of this length makes."""
        rows = [self.sequence_length] * self.batch_size
        if not self.packed:
            return self.batch_size, self.sequence_length
        from labkit import batching

        room = batching.room_of(rows)
        return len(batching.lines(rows, room)), room

    @property
    def masked(self) -> bool:
        """Whether attention needs a mask: rows share lines or a prefix stands before them."""
        return self.lines != (self.batch_size, self.sequence_length) or self.technique == "prefix"

    @property
    def tokens(self) -> int:
        return self.lines[0] * self.lines[1]

    @property
    def predicted(self) -> float:
        """Tokens that the loss falls on; nothing predicts the first of a row."""
        return max(1.0, self.batch_size * (self.sequence_length - 1) * self.response_share)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
