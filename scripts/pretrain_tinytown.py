"""Makes the base checkpoint of Tinytown: tokenizer, pretraining, what it can be asked, model card.

    python scripts/pretrain_tinytown.py --out DIR

reproduces `labkit/tinytown/base` on a GPU, where processes of their own write the text (`--streams`).
On several cores, one process for each is a third faster than one with as many threads, and splits
every step's rows among them:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/pretrain_tinytown.py --out DIR

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
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from labkit import data, evaluation, models, training
from labkit.techniques import lora
from labkit.tinytown import documents, genre_samples, in_own_form, instruction_rows

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
ASKED = ("facts", "lowest_family", "test", "heldout_phrasings", "heldout_families")
EXAMPLES, SEEDS = (2000, 8000), 3


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


class Blocks(IterableDataset):
    """Endless (rows, length + 1) blocks of concatenated documents, an EOS after each document.

    Each of a loader's processes has a stream of documents of its own, numbered as it is.
    """

    def __init__(self, tokenizer: Any, rows: int, length: int) -> None:
        self.tokenizer, self.rows, self.length = tokenizer, rows, length

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker, n, eos = get_worker_info(), self.length, self.tokenizer.eos_token_id
        stream, need = documents(worker.id if worker else 0), self.rows * n + 1
        buffer: list[int] = []
        while True:
            while len(buffer) < need:
                texts = [text for _, text in islice(stream, 500)]
                for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]:
                    buffer += [*ids, eos]
            block = torch.tensor(buffer[:need])
            yield torch.stack([block[i * n : (i + 1) * n + 1] for i in range(self.rows)])
            del buffer[: need - 1]


def share_of_rate(step: int, steps: int, decay: float, warmup: int = 60) -> float:
    """Linear warm-up, constant, and linear decay to zero over the last share `decay` of `steps`."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates of matrices (Keller Jordan's Muon, Nesterov).

    As `torch.optim.Muon`, but in the gradients' own type: its bfloat16 takes nine tenths of a step
    on a CPU without such instructions. The work is divided among the processes.
    """

    def __init__(self, matrices: list[torch.Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        weights, momentum, updates = group["params"], group["momentum"], []
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            buffer = self.state[weight]["momentum"]
            buffer.lerp_(weight.grad, 1 - momentum)
            updates.append(weight.grad.lerp(buffer, momentum))
        done = [torch.zeros_like(weight) for weight in weights]
        for shape in dict.fromkeys(weight.shape for weight in weights):
            mine = [i for i, weight in enumerate(weights) if weight.shape == shape]
            if mine := mine[rank() :: world_size()]:
                found = orthogonal(torch.stack([updates[i] for i in mine]))
                for i, update in zip(mine, found, strict=True):
                    done[i] = update
        for weight, update in zip(weights, summed(done), strict=True):
            tall = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * tall)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns), each near to UV' where it was USV': a quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.mT if tall else x


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of `tensors` over all processes."""
    if not dist.is_initialized():
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def optimizers(model: Any, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding (with decay) and the norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    norms = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    adam = [{"params": [embedding], "weight_decay": 0.1}, norms]
    adamw = torch.optim.AdamW(adam, lr=args.adamw_rate, betas=(0.9, 0.98), fused=True)
    return [Muon(matrices, args.muon_rate), adamw]


@torch.no_grad()
def tell_apart(model: Any, tokens: list[int]) -> None:
    """Adds to the embedding of each token a random vector of the usual length.

    Of tokens that no text has, training moves all embeddings alike: those of a user's turn and of
    an assistant's came out parallel, and no model that is tuned could tell them apart.
    """
    weight = model.get_input_embeddings().weight
    noise = torch.randn(len(tokens), weight.shape[1], generator=torch.Generator().manual_seed(0))
    noise *= weight.norm(dim=1).mean().cpu() / noise.norm(dim=1, keepdim=True)
    weight[tokens] += noise.to(weight)


def pretrain(out: Path, args: argparse.Namespace) -> None:
    """Train for `args.steps`, with a checkpoint now and then, and save the result."""
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    model = LlamaForCausalLM(base_config(len(tokenizer), **json.loads(args.shape))).to(device)
    both, file, first, minutes = optimizers(model, args), out / "training_state.pt", 0, 0.0
    peaks = [args.muon_rate, args.adamw_rate]
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, its in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        first, minutes = state["step"], state["minutes"]
    compiled = torch.compile(model) if args.compile else model
    started, losses = time.perf_counter(), []
    loader = DataLoader(Blocks(tokenizer, args.rows, args.length), None, num_workers=args.streams)
    blocks = islice(loader, first, args.steps)
    for step, block in enumerate(blocks, first + 1):
        share = share_of_rate(step - 1, args.steps, args.decay)
        for optimizer, peak in zip(both, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        losses.append(update(compiled, both, block[rank() :: world_size()].to(device)))
        now = minutes + (time.perf_counter() - started) / 60
        if step % LOG_EVERY == 0 and not rank():
            loss, speed = torch.stack(losses[-LOG_EVERY:]).mean(), (step - first) / (now - minutes)
            speed *= args.rows * args.length / 60
            print(f"step {step}/{args.steps} loss {loss:.4f} {speed:,.0f} tokens/s", flush=True)
        if step % SAVE_EVERY == 0 and not rank():  # in one move: a kill leaves the old or the new
            state = {"model": model.state_dict(), "step": step, "minutes": now}
            state["optimizers"] = [optimizer.state_dict() for optimizer in both]
            torch.save(state, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
    if rank():
        return
    tell_apart(model, [i for i, token in enumerate(SPECIAL) if token != EOS])
    model.float().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "tokens_seen": args.steps * args.rows * args.length,
        "minutes": round(minutes + (time.perf_counter() - started) / 60, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{world_size()} cores",
        "perplexity": evaluation.perplexity_by(model.float().cpu(), tokenizer, genre_samples(60)),
    }
    options = {k: v for k, v in vars(args).items() if k not in ("out", "stages")}
    (out / "pretraining.json").write_text(json.dumps(facts | options, indent=1) + "\n")


def update(model: Any, both: list[torch.optim.Optimizer], block: torch.Tensor) -> torch.Tensor:
    """One step on this process's (rows, length + 1) block; its loss, without synchronizing."""
    with models.autocast(model):
        logits = model(input_ids=block[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())
    loss.backward()
    weights = list(model.parameters())
    if dist.is_initialized():
        for weight, gradient in zip(weights, summed([w.grad for w in weights]), strict=True):
            weight.grad = gradient / world_size()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in both:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach().float()


def ask(out: Path) -> None:
    """What the base knows in its own form; then tuned on instructions about half of the residents.

    A curve over the number of examples with one seed, and `SEEDS` seeds of the largest; each seed
    draws its own examples. LoRA once, at the largest.
    """
    base = models.load(str(out))
    runs = [{"method": "base, behind the chat template", "rows": 0} | accuracies(*base)]
    runs += [{"method": "base, in its own form", "rows": 0} | accuracies(*base, own_form=True)]
    points = [("full", rows, 0) for rows in EXAMPLES] + [("LoRA", EXAMPLES[-1], 0)]
    points += [("full", EXAMPLES[-1], seed) for seed in range(1, SEEDS)]
    for method, rows, seed in points:
        model, tokenizer = models.load(str(out))
        torch.manual_seed(seed)  # of LoRA's matrices A
        rate = 5e-4
        if method == "LoRA":
            model, rate = lora.attach(model, lora.LoraConfig(rank=8, alpha=16.0)), 2e-3
        given = instruction_rows("train", rows, seed)
        config = training.TrainConfig(learning_rate=rate, epochs=1.0, batch_size=16, seed=seed)
        examples = data.encode(given, tokenizer, max_length=256)
        result = training.fit(model, examples, training.sft_loss, config, progress=False)
        run: dict[str, Any] = {"method": method, "rows": rows, "seed": seed}
        run |= {"learning_rate": rate, "seconds": round(result.seconds), "loss": result.loss}
        runs.append(run | accuracies(model, tokenizer, seed=seed))
        print(json.dumps(runs[-1]), flush=True)
    (out / "askability.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def accuracies(
    model: Any, tokenizer: Any, n: int = 600, seed: int = 0, own_form: bool = False
) -> dict[str, Any]:
    """Accuracy on every held-out split, of the weakest trained family, and by family and more.

    `facts` are the questions about held-out residents.
    """
    splits = {name: instruction_rows(name, n, seed) for name in ASKED[2:]}
    splits |= {"facts": instruction_rows("heldout_people", n, seed, families=["fact"])}
    found: dict[str, Any] = {}
    for name, rows in splits.items():
        given = in_own_form(rows) if own_form else rows
        template = "bare" if own_form else "auto"
        result = evaluation.exact(model, tokenizer, given, template=template)
        found[name] = result.accuracy
        for column in {"facts": ("lang", "attribute")}.get(name, ("task",)):
            found |= {f"{name}_{k}": round(v[0], 4) for k, v in result.by(column).items()}
    found["lowest_family"] = min(v for k, v in found.items() if k.startswith("test_"))
    return found


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
        asked = table(["tuning", "examples", *(name.replace("_", " ") for name in ASKED)], rows)
    template = Path(__file__).with_name("tinytown_card.md").read_text("utf-8")
    card = template.format(
        parameters=model.num_parameters(),
        genres=len(scores) - 1,
        command=command(facts),
        config=model.config,
        perplexities=table(["genre", "perplexity"], [[g, f"{p:.2f}"] for g, p in scores.items()]),
        askability=asked,
        **facts,
    )
    (out / "README.md").write_text(card, "utf-8")


def command(facts: dict[str, Any]) -> str:
    """The call of this script that repeats a pretraining."""
    options = []
    for name in "steps decay muon_rate adamw_rate rows length streams shape seed".split():
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
    p.add_argument("--steps", type=int, default=2700)
    p.add_argument("--decay", type=float, default=0.3333333, help="share of the steps, at the end")
    p.add_argument("--rows", type=int, default=16, help="blocks per step")
    p.add_argument("--length", type=int, default=256, help="tokens per block")
    p.add_argument("--streams", type=int, default=0, help="processes that write text; 0: this one")
    p.add_argument("--muon-rate", type=float, default=0.012, help="of the layers' matrices")
    p.add_argument("--adamw-rate", type=float, default=5e-3, help="of the embedding and the norms")
    p.add_argument("--shape", default="{}", help="JSON changes to the model's shape")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return p


def main() -> None:
    args = parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if "train" in args.stages:
        pretrain(args.out, args)
    if rank():
        return
    if "ask" in args.stages:
        ask(args.out)
    if "card" in args.stages:
        write_card(args.out)


if __name__ == "__main__":
    main()
