"""Makes the base checkpoint: tokenizer, pretraining, held-out perplexity, model card.

    python -m labkit.tinytown.pretrain --out DIR

reproduces `labkit/tinytown/base` on two cores (or on a GPU, in a few minutes). The loop is bare
PyTorch because it is the one place where nothing but throughput counts; fine-tuning goes through
`labkit.training`. Killed runs go on from the last checkpoint when started again with the same `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .card import write_card
from .corpus import documents, genre_samples

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
PAD, END = SPECIAL[:2]
# Chinese function words are split off, so that a name is the same token wherever it stands.
FUNCTION = "的在是了和有叫养吃最爱谁什么哪里吗呢个一只家住做每天当告诉说把很都也不从到对喜欢常"
SPLIT = rf"\d| ?[A-Za-z]+|[{FUNCTION}]|[\u4e00-\u9fff&&[^{FUNCTION}]]+|\s|[^\s\w]"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(vocab_size: int = 2048, documents_used: int = 40_000) -> Any:
    """A byte-level BPE over both languages; numbers are split into digits.

    Returns a `PreTrainedTokenizerFast` whose pad and end tokens differ.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for _, text in islice(documents(seed=1), documents_used))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def base_config(vocab_size: int, **changes: Any) -> Any:
    """The base model's shape: every `in_features` is a multiple of 64, as NF4 blocks need."""
    from transformers import LlamaConfig

    shape = {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    } | changes
    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
        **shape,
    )


def batches(tokenizer: Any, seed: int, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Endless (rows, length + 1) blocks of documents run together, each ended by the end token."""
    stream, need = documents(seed), rows * length + 1
    buffer: list[int] = []
    while True:
        while len(buffer) < need:
            texts = [text for _, text in islice(stream, 500)]
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                buffer += [*ids, tokenizer.eos_token_id]
        block = torch.tensor(buffer[:need])
        yield torch.stack([block[i * length : (i + 1) * length + 1] for i in range(rows)])
        del buffer[: need - 1]


def rate(step: int, cycles: list[int], peak: float, warmup: int = 60) -> float:
    """Cosine cycles with warm restarts (arXiv 1608.03983), each down to a twentieth of the peak.

    `cycles` are lengths in steps; each cycle begins with a linear warm-up.
    """
    for length in cycles:
        if step < length:
            break
        step -= length
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, length - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def pretrain(args: argparse.Namespace) -> None:
    """Train for all of `args.cycles`, writing a checkpoint now and then, and the result to `args.out`."""
    from transformers import LlamaForCausalLM

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(base_config(len(tokenizer), **json.loads(args.shape))).to(device)
    optimizer = torch.optim.AdamW(
        groups(model, 0.1), lr=args.learning_rate, betas=(0.9, 0.98), fused=True
    )
    state_file, first = out / "training_state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    blocks = islice(batches(tokenizer, 0, args.rows, args.length), first, sum(args.cycles))
    compiled = torch.compile(model) if args.compile else model
    started, losses = time.perf_counter(), []
    for step, block in enumerate(blocks, first):
        losses.append(train_step(compiled, optimizer, block.to(device), step, args))
        if (step + 1) % args.log_every == 0:
            report(step + 1, losses, started, first, args)
        if (step + 1) % args.save_every == 0:
            save_state(state_file, model, optimizer, step + 1)
    minutes = (time.perf_counter() - started) / 60
    finish(out, model.float(), tokenizer, args, minutes)


def train_step(
    model: Any, optimizer: Any, block: torch.Tensor, step: int, args: argparse.Namespace
) -> torch.Tensor:
    """One update on a (rows, length + 1) block; returns the loss, unread."""
    for group in optimizer.param_groups:
        group["lr"] = rate(step, args.cycles, args.learning_rate)
    with torch.autocast(block.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=block[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def report(step: int, losses: list, started: float, first: int, args: argparse.Namespace) -> None:
    recent = torch.stack(losses[-args.log_every :]).float().mean().item()
    elapsed = time.perf_counter() - started
    speed = (step - first) * args.rows * args.length / elapsed
    print(
        f"step {step}/{sum(args.cycles)} loss {recent:.4f} {speed:,.0f} tokens/s {elapsed:.0f} s",
        flush=True,
    )


def save_state(path: Path, model: Any, optimizer: Any, step: int) -> None:
    """Replace the checkpoint in one move, so that a kill leaves the old or the new one."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def finish(out: Path, model: Any, tokenizer: Any, args: argparse.Namespace, minutes: float) -> None:
    """Save the checkpoint in bfloat16, its held-out perplexities and the model card."""
    from ..evaluation import perplexity_by

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    scores = perplexity_by(model.float().cpu(), tokenizer, genre_samples(60))
    tokens = sum(args.cycles) * args.rows * args.length
    facts = {"tokens_seen": tokens, "minutes": round(minutes, 1), "perplexity": scores} | vars(args)
    del facts["out"]
    (out / "pretraining.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    write_card(out, facts)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", required=True, help="folder for the checkpoint")
    lengths = [1400, 2400]
    p.add_argument("--cycles", type=int, nargs="+", default=lengths, help="steps of each cycle")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--shape", default="{}", help="JSON changes to the model's shape")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--save-every", type=int, default=200)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return p


if __name__ == "__main__":
    pretrain(parser().parse_args())
