"""Does the base model know the town, and can it be asked? The question behind the checkpoint.

Tunes the base on instructions about half of the residents and asks about the other half, for
several tuning lengths, with full fine-tuning and LoRA (r = 8, all linear layers).

    python benchmarks/askability.py --rows 1500,3000,6000 --json labkit/tinytown/base/askability.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from labkit import data, evaluation, machine, models, training
from labkit.tinytown import instruction_rows

RATES = {"full": 5e-4, "lora": 4e-3}


def tune(base: str, method: str, rows: int, rate: float, epochs: float, seed: int) -> tuple:
    """A model tuned on `rows` training rows, and its training result."""
    model, tokenizer = models.load(base)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    encoded = data.encode(instruction_rows("train", rows, seed), tokenizer, max_length=256)
    config = training.TrainConfig(learning_rate=rate, epochs=epochs, batch_size=16, seed=seed)
    return model, tokenizer, training.sft(model, tokenizer, encoded.dataset, config, progress=False)


def score(model: object, tokenizer: object, n: int) -> dict[str, float]:
    """Accuracy on every held-out split; `facts` are the questions about held-out residents."""
    facts = instruction_rows("heldout_people", n, families=["fact"])
    result = evaluation.exact(model, tokenizer, facts)
    scores = {"facts": result.accuracy}
    scores |= {
        f"facts_{k}": v[0] for key in ("lang", "attribute") for k, v in result.by(key).items()
    }
    for split in ("test", "heldout_phrasings", "heldout_families"):
        found = evaluation.exact(model, tokenizer, instruction_rows(split, n))
        scores[split] = found.accuracy
        if split == "test":
            scores |= {f"test_{k}": v[0] for k, v in found.by("task").items()}
    return scores


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--base", default="tinytown")
    p.add_argument("--rows", default="1500,3000,6000")
    p.add_argument("--methods", default="full,lora")
    p.add_argument("--rate", type=float, help="learning rate, instead of the method's own")
    p.add_argument("--epochs", type=float, default=1.0)
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--questions", type=int, default=400)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    model, tokenizer = models.load(args.base)
    runs = [{"method": "base", "rows": 0} | score(model, tokenizer, args.questions)]
    print(json.dumps(runs[-1]), flush=True)
    for method in args.methods.split(","):
        for rows in map(int, args.rows.split(",")):
            for seed in range(args.seeds):
                started = time.perf_counter()
                rate = args.rate or RATES[method]
                model, tokenizer, result = tune(args.base, method, rows, rate, args.epochs, seed)
                run = {"method": method, "rows": rows, "seed": seed, "learning_rate": rate}
                run |= {"epochs": args.epochs, "loss": result.loss, "train_seconds": result.seconds}
                runs.append(run | score(model, tokenizer, args.questions))
                runs[-1]["seconds"] = time.perf_counter() - started
                print(json.dumps(runs[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"hardware": machine.hardware(), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
