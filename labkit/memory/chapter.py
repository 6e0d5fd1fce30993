"""The chapter's table of memory beside the planner's, for LLaMA of three sizes."""

from __future__ import annotations

from typing import Any

from labkit.memory.planner import plan, readable

LLAMA = {  # hidden, inner, layers, heads (Touvron et al. 2023, arXiv:2302.13971, table 2)
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "65B": (8192, 22016, 80, 64),
}
CHAPTER = {"full": (28, 52, 260), "lora": (12, 20, 120), "qlora": (6, 10, 48)}  # GB, in 5.3.2
REASONS = {
    "full": "the chapter counts float32 weights alone, 4 bytes a parameter; gradients (4) and "
    "AdamW's two states (8) come on top",
    "lora": "the frozen weights alone take {weights} in bfloat16",
    "qlora": "weights and constants take {weights}; the chapter's figure leaves room for more rows "
    "or longer ones",
}


def llama(size: str, vocabulary: int = 32_000) -> dict[str, Any]:
    """The configuration of LLaMA of this size: "7B", "13B" or "65B"."""
    hidden, inner, layers, heads = LLAMA[size]
    return dict(model_type="llama", vocab_size=vocabulary, hidden_size=hidden,
                intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                tie_word_embeddings=False)  # fmt: skip


def chapter_table() -> list[dict[str, Any]]:
    """The chapter's nine numbers beside the planner's, in GB, with the reason for a difference.

    One row of 512 tokens on a GPU, checkpointing, rank 16 on all linear layers; full fine-tuning
    with float32 weights and states, the others on a frozen base in bfloat16.
    """
    rows = []
    for technique, told in CHAPTER.items():
        for size, chapter in zip(LLAMA, told, strict=True):
            found = plan(
                llama(size), technique, rank=16, gradient_checkpointing=True, device="cuda",
                precision="mixed" if technique == "full" else "bf16",
            )  # fmt: skip
            weights = found.parts["weights"] + found.parts["quantization constants"]
            rows.append({
                "model": f"LLaMA-{size}", "technique": technique, "chapter, GB": chapter,
                "planned, GB": round(found.total / 1e9, 1),
                "reason": REASONS[technique].format(weights=readable(weights)),
            })  # fmt: skip
    return rows
