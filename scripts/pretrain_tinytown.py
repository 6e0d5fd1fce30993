"""Makes the base checkpoint of Tinytown: tokenizer, pretraining, what it can be asked, model card.

    python scripts/pretrain_tinytown.py --out DIR

reproduces `labkit/tinytown/base` in under an hour on two cores (or on a GPU, in a few minutes).
Killed runs go on from the last checkpoint when started again with the same `--out`; `--stages card`
writes the card of a checkpoint anew. The loop is bare PyTorch because it is the one place where
nothing but throughput counts; fine-tuning goes through `labkit.training`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from labkit import data, evaluation, models, training
from labkit.tinytown import documents, genre_samples, instruction_rows

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
PAD, EOS = SPECIAL[:2]
# Chinese function words are split off, so that a name is the same token wherever it stands.
FUNCTION = "的在是了和有叫养吃最爱谁什么哪里吗呢个一只家住做每天当告诉说把很都也不从到对喜欢常"
SPLIT = rf"\d| ?[A-Za-z]+|[{FUNCTION}]|[\u4e00-\u9fff&&[^{FUNCTION}]]+|\s|[^\s\w]"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LOG_EVERY, SAVE_EVERY = 50, 200  # steps
ASKED = ("facts", "test", "heldout_phrasings", "heldout_families")


def train_tokenizer(vocab_size: int = 2048, documents_used: int = 40_000) -> Any:
    """A byte-level BPE over both languages; numbers are split into digits."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
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
        eos_token=EOS,
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def base_config(vocab_size: int, **changes: Any) -> Any:
    """The base model's shape: every `in_features` is a multiple of 64, as NF4 blocks need."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 640}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4} | changes
    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
        **shape,
    )


def batches(tokenizer: Any, seed: int, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Endless (rows, length + 1) blocks of concatenated documents, an EOS after each document."""
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


def learning_rate(step: int, cycles: list[int], peak: float, warmup: int = 60) -> float:
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


def pretrain(out: Path, args: argparse.Namespace) -> None:
    """Train for all of `args.cycles`, with a checkpoint now and then, and save the result."""
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(base_config(len(tokenizer), **json.loads(args.shape))).to(device)
    weights = list(model.parameters())
    groups = [  # weight decay on matrices only
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    file, first, steps = out / "training_state.pt", 0, sum(args.cycles)
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    compiled = torch.compile(model) if args.compile else model
    started, losses = time.perf_counter(), []
    blocks = islice(batches(tokenizer, 0, args.rows, args.length), first, steps)
    for step, block in enumerate(blocks, first + 1):
        rate = learning_rate(step - 1, args.cycles, args.learning_rate)
        losses.append(update(compiled, optimizer, block.to(device), rate))
        if step % LOG_EVERY == 0:
            loss, seconds = torch.stack(losses[-LOG_EVERY:]).mean(), time.perf_counter() - started
            speed = (step - first) * args.rows * args.length / seconds
            print(f"step {step}/{steps} loss {loss:.4f} {speed:,.0f} tokens/s", flush=True)
        if step % SAVE_EVERY == 0:  # replaced in one move: a kill leaves the old or the new one
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
    model.float().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "tokens_seen": steps * args.rows * args.length,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "perplexity": evaluation.perplexity_by(model.float().cpu(), tokenizer, genre_samples(60)),
    }
    options = {k: v for k, v in vars(args).items() if k not in ("out", "stages")}
    (out / "pretraining.json").write_text(json.dumps(facts | options, indent=1) + "\n")


def update(model: Any, optimizer: Any, block: torch.Tensor, rate: float) -> torch.Tensor:
    """One step on a (rows, length + 1) block; returns the loss without synchronizing."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(block.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=block[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach().float()


def ask(out: Path) -> None:
    """Tune on instructions about half of the residents, then ask about the other half.

    Once before tuning, then after several numbers of examples, with full fine-tuning and LoRA.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    runs = [{"method": "base", "rows": 0, "epochs": 0} | accuracies(*models.load(str(out)))]
    for method, rate in (("full", 5e-4), ("lora", 4e-3)):
        for rows in (1500, 3000, 6000):
            model, tokenizer = models.load(str(out))
            if method == "lora":
                torch.manual_seed(0)  # of the matrices A
                model = get_peft_model(model, lora)
            examples = data.encode(instruction_rows("train", rows), tokenizer, max_length=256)
            config = training.TrainConfig(learning_rate=rate, epochs=1.0, batch_size=16)
            result = training.fit(model, examples, training.sft_loss, config, progress=False)
            run: dict[str, Any] = {"method": method, "rows": rows, "epochs": 1, "loss": result.loss}
            runs.append(run | {"learning_rate": rate} | accuracies(model, tokenizer))
            print(json.dumps(runs[-1]), flush=True)
    (out / "askability.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def accuracies(model: Any, tokenizer: Any, n: int = 400) -> dict[str, float]:
    """Accuracy on every held-out split; `facts` are the questions about held-out residents."""
    splits = {name: instruction_rows(name, n) for name in ASKED if name != "facts"}
    splits |= {"facts": instruction_rows("heldout_people", n, families=["fact"])}
    scores = {}
    for name, rows in splits.items():
        result = evaluation.exact(model, tokenizer, rows)
        scores[name] = result.accuracy
        for column in {"facts": ("lang", "attribute"), "test": ("task",)}.get(name, ()):
            scores |= {f"{name}_{k}": v[0] for k, v in result.by(column).items()}
    return scores


def write_card(out: Path) -> None:
    """Write `out/README.md` from the files next to it; no figure is typed by hand."""
    from transformers import AutoModelForCausalLM

    facts = json.loads((out / "pretraining.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    scores = facts["perplexity"]
    scores["geometric mean"] = math.exp(sum(map(math.log, scores.values())) / len(scores))
    asked, file = "Not measured yet.", out / "askability.json"
    if file.exists():
        runs = json.loads(file.read_text())["runs"]
        rows = [[r["method"], r["rows"], *(f"{r[name]:.1%}" for name in ASKED)] for r in runs]
        asked = table(["tuning", "examples", *ASKED], rows)
    template = Path(__file__).with_name("tinytown_card.md").read_text("utf-8")
    card = template.format(
        parameters=model.num_parameters(),
        genres=len(scores) - 1,
        command=command(facts),
        steps=sum(facts["cycles"]),
        lengths=" and ".join(f"{n:,}" for n in facts["cycles"]),
        config=model.config,
        perplexities=table(["genre", "perplexity"], [[g, f"{p:.2f}"] for g, p in scores.items()]),
        askability=asked,
        **facts,
    )
    (out / "README.md").write_text(card, "utf-8")


def command(facts: dict[str, Any]) -> str:
    """The call of this script that repeats a pretraining."""
    options = ["--cycles", *map(str, facts["cycles"])]
    for name in ("rows", "length", "learning_rate", "shape", "seed"):
        options += [f"--{name.replace('_', '-')}", str(facts[name])]
    options += [] if facts["compile"] else ["--no-compile"]
    return f"python scripts/pretrain_tinytown.py --out DIR {shlex.join(options)}"


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    stages = ["train", "ask", "card"]
    p.add_argument("--stages", nargs="+", choices=stages, default=stages, help="default: all")
    p.add_argument("--cycles", type=int, nargs="+", default=[1400, 2400], help="steps of each")
    p.add_argument("--rows", type=int, default=16, help="blocks per step")
    p.add_argument("--length", type=int, default=256, help="tokens per block")
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--shape", default="{}", help="JSON changes to the model's shape")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return p


def main() -> None:
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if "train" in args.stages:
        pretrain(args.out, args)
    if "ask" in args.stages:
        ask(args.out)
    if "card" in args.stages:
        write_card(args.out)


if __name__ == "__main__":
    main()
