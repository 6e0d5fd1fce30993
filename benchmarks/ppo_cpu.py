"""How fast labkit's PPO is on a CPU, beside the last PPO that TRL had.

Arms, interleaved, each run in a process of its own with the same model (the embedded base after a
short SFT, made here), prompts, greatest length, reward, passes and minibatches:

    labkit        labkit.techniques.ppo
    trl           PPOTrainer of TRL 1.9, tuned by its flags: no gradient checkpointing, bfloat16
                  where the processor has it (`--trl-precision`), all rows sampled at once
    trl_defaults  the same with TRL's defaults for those three (`--defaults`)

TRL's comes with its own environment, installed here by pip. The reward is a function of texts:
how like the row's answer a response is (difflib, from -1 to 1). Times are of whole steps (sample,
reward, score, update) without loading and the first step; ratios are medians over rounds. Both
learn: the curves are means over rounds, each with its own seed. labkit's policy and value share a
backbone; `--separate` gives it a critic of its own, as TRL's has.

Needs a quiet machine: `python benchmarks/ppo_cpu.py --json out.json`, about 15 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TRL = "trl==1.9.*"
MARK = "RESULT "
STAGES = ("sample", "reward", "score", "update")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a run, the first untimed")
    parser.add_argument("--batch", type=int, default=64, help="episodes a step")
    parser.add_argument("--minibatch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="greatest length of a response")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--trl-precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--defaults", action="store_true", help="also TRL's defaults")
    parser.add_argument("--separate", action="store_true", help="also labkit, critic apart")
    folder = Path(tempfile.gettempdir()) / "labkit-ppo-benchmark"
    parser.add_argument("--folder", type=Path, default=folder, help="environment and model")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def likeness(expected: str, response: str) -> float:
    """The reward: 1 for the answer itself, -1 for nothing in common."""
    return 2 * difflib.SequenceMatcher(None, expected, response, autojunk=False).ratio() - 1


# What is measured, each in a process of its own


def run_labkit(job: dict[str, Any]) -> dict[str, Any]:
    from labkit import models
    from labkit.techniques import ppo

    model, tokenizer = models.load(job["model"])
    answers = {row["prompt"]: row["completion"] for row in job["rows"]}

    def reward(prompts, responses):
        return [likeness(answers[p], r) for p, r in zip(prompts, responses, strict=True)]

    config = ppo.PPOConfig(
        steps=job["steps"], batch_size=job["batch"], minibatch_size=job["minibatch"],
        epochs=job["epochs"], max_new_tokens=job["tokens"], learning_rate=job["rate"],
        beta=job["beta"], seed=job["seed"], separate_critic=job["arm"] == "labkit_separate",
    )  # fmt: skip
    ends: list[float] = []
    result = ppo.train(
        model, tokenizer, job["rows"], reward, config, progress=False,
        log=lambda metrics, step: ends.append(time.perf_counter()),
    )  # fmt: skip
    stages = {s: sum(e[f"seconds_{s}"] for e in result.history[1:]) for s in STAGES}
    curve = [entry["reward"] for entry in result.history]
    kl = [entry["kl_k1"] for entry in result.history]
    return {"ends": ends, "curve": curve, "kl": kl, "stages": stages}


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
                         for _ in range(2))  # fmt: skip
    value = AutoModelForSequenceClassification.from_pretrained(
        job["model"], num_labels=1, dtype=torch.float32
    )
    torch.nn.init.zeros_(value.score.weight)
    ids = [tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in job["rows"]]
    answers = [row["completion"] for row in job["rows"]]
    reward = text_reward(tokenizer, dict(zip(map(tuple, ids), answers, strict=True)))
    tuned = {"gradient_checkpointing": False, "local_rollout_forward_batch_size": job["batch"]}
    if job["arm"] == "trl" and job["trl_precision"] == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # its flag bf16 alone changes nothing
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        # gradient_accumulation_steps stays 1, or there would be one optimizer step a pass
        args = PPOConfig(
            output_dir=folder, use_cpu=True, report_to="none", save_strategy="no", seed=job["seed"],
            per_device_train_batch_size=job["batch"], gradient_accumulation_steps=1,
            num_mini_batches=job["batch"] // job["minibatch"], num_ppo_epochs=job["epochs"],
            total_episodes=job["steps"] * job["batch"], response_length=job["tokens"],
            stop_token="eos", temperature=1.0, missing_eos_penalty=1.0, kl_coef=job["beta"],
            learning_rate=job["rate"], adam_epsilon=1e-5, num_sample_generations=0,
            disable_tqdm=True, **(tuned if job["arm"] == "trl" else {}),
        )  # fmt: skip
        trainer = PPOTrainer(
            args, tokenizer, policy, reference, reward, Dataset.from_dict({"input_ids": ids}),
            value, callbacks=[Clock()],
        )  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    size = job["batch"]
    seen = reward.backbone.seen
    curve = [statistics.fmean(seen[i : i + size]) for i in range(0, len(seen), size)]
    kl = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    return {"ends": ends, "curve": curve, "kl": kl, "versions": versions}


def text_reward(tokenizer, answers: dict[tuple[int, ...], str]):
    """A reward of texts in the shape of the model that PPOTrainer asks for."""
    import torch

    class Backbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []
            self.assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")

        def forward(self, input_ids, attention_mask, **kwargs):
            rewards = []
            for row in input_ids.tolist():
                row = row[next(i for i, token in enumerate(row) if token != 0) :]
                start = row.index(self.assistant) + 1
                response = tokenizer.decode(row[start:], skip_special_tokens=True)
                rewards.append(likeness(answers[tuple(row[:start])], response))
            self.seen += rewards
            values = torch.tensor(rewards)[:, None, None].expand(*input_ids.shape, 1)
            return type("Output", (), {"hidden_states": [values]})

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    return Reward()


def work(file: str) -> None:
    job = json.loads(Path(file).read_text())
    import torch

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    result = (run_labkit if job["arm"].startswith("labkit") else run_trl)(job)
    seconds = result["ends"][-1] - result["ends"][0]
    episodes = (len(result["ends"]) - 1) * job["batch"]
    result |= {"episodes_per_second": episodes / seconds, "threads": torch.get_num_threads()}
    result |= {"seconds": time.perf_counter() - started}
    del result["ends"]
    print(MARK + json.dumps(result), flush=True)


# What they share: an environment for TRL, a model, rows


def environment(folder: Path) -> Path:
    """The Python of an environment with TRL 1.9 and this one's torch and transformers."""
    python = folder / "trl" / "bin" / "python"
    if not (folder / "trl" / "installed").exists():
        print(f"installing {TRL} into {folder / 'trl'}", flush=True)
        pins = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
                for name in ("torch", "transformers")]  # fmt: skip
        subprocess.run([sys.executable, "-m", "venv", folder / "trl"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", TRL, *pins], check=True)
        (folder / "trl" / "installed").touch()
    return python


def tuned_model(folder: Path) -> Path:
    """The base after a short SFT on answers, a third of them rude, wrong or rambling."""
    from labkit import data, models, training
    from labkit.tinytown import demonstrations

    if not (folder / "sft" / "config.json").exists():
        rows = demonstrations(2400, seed=7)
        model, tokenizer = models.load("tinytown")
        config = training.TrainConfig(learning_rate=5e-4, batch_size=16)
        training.sft(model, tokenizer, data.encode(rows, tokenizer).dataset, config, progress=False)
        models.save(model, tokenizer, folder / "sft")
    return folder / "sft"


def prompt_rows(model: Path, count: int) -> list[dict[str, str]]:
    from transformers import AutoTokenizer

    from labkit import data
    from labkit.tinytown.preferences import prompts

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = {row["prompt"]: row for row in prompts(2 * count, seed=1)}.values()
    return [{"prompt": row["prompt"], "completion": row["completion"],
             "text": data.render(row, tokenizer)[0]} for row in list(rows)[:count]]  # fmt: skip


def run(python: Path | str, job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(job))
        file.flush()
        done = subprocess.run([python, __file__, "--worker", file.name],
                              capture_output=True, text=True)  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise RuntimeError(f"{job['arm']} failed:\n{done.stderr[-4000:]}")


def summary(rounds: list[dict[str, dict]], arms: list[str]) -> dict[str, Any]:
    def median(values):
        return statistics.median(values)

    def curve(arm: str, key: str) -> list[float]:
        return [round(statistics.fmean(x), 4)
                for x in zip(*(r[arm][key] for r in rounds), strict=True)]  # fmt: skip

    found: dict[str, Any] = {
        "episodes_per_second": {},
        "reward": {},
        "kl": {},
        "reward_last_third": {},
    }
    for arm in arms:
        found["episodes_per_second"][arm] = median(r[arm]["episodes_per_second"] for r in rounds)
        found["reward"][arm], found["kl"][arm] = curve(arm, "curve"), curve(arm, "kl")
        last = found["reward"][arm][-max(1, len(found["reward"][arm]) // 3) :]
        found["reward_last_third"][arm] = statistics.fmean(last)
    for arm in arms:
        for other in ("trl", "trl_defaults"):
            if arm.startswith("labkit") and other in arms:
                ratios = [r[arm]["episodes_per_second"] / r[other]["episodes_per_second"]
                          for r in rounds]  # fmt: skip
                found[f"{arm}_over_{other}"] = median(ratios)
    stages = {s: median(r["labkit"]["stages"][s] for r in rounds) for s in STAGES}
    found["labkit_stages"] = {s: x / sum(stages.values()) for s, x in stages.items()}
    return found


def show(found: dict[str, Any]) -> None:
    for arm, rate in found["episodes_per_second"].items():
        curve = " ".join(f"{x:.2f}" for x in found["reward"][arm])
        print(f"{arm:16} {rate:7.1f} episodes/s   reward {curve}   KL {found['kl'][arm][-1]:.2f}")
    shares = ", ".join(f"{s} {100 * x:.0f} %" for s, x in found["labkit_stages"].items())
    print(f"labkit's time: {shares}")
    for name, ratio in found.items():
        if "_over_" in name:
            print(f"{name}: {ratio:.2f}")


def main() -> None:
    args = parse()
    if args.worker:
        return work(args.worker)
    args.folder.mkdir(parents=True, exist_ok=True)
    python, model = environment(args.folder), tuned_model(args.folder)
    arms = [
        "labkit",
        *["labkit_separate"] * args.separate,
        "trl",
        *["trl_defaults"] * args.defaults,
    ]
    settings = {k: getattr(args, k) for k in ("steps", "batch", "minibatch", "epochs", "tokens",
                                              "rate", "beta", "threads", "trl_precision")}  # fmt: skip
    if args.trl_precision == "auto":
        from labkit.models import cpu_has_bf16

        settings["trl_precision"] = "bf16" if cpu_has_bf16() else "fp32"
    rows = prompt_rows(model, args.steps * args.batch)
    rounds: list[dict[str, dict]] = []
    for seed in range(args.rounds):
        order, found = arms if seed % 2 == 0 else arms[::-1], {}
        for arm in order:
            job = settings | {"arm": arm, "seed": seed, "model": str(model), "rows": rows}
            found[arm] = run(sys.executable if arm.startswith("labkit") else python, job)
            print(
                f"round {seed}: {arm} {found[arm]['episodes_per_second']:.1f} episodes/s",
                flush=True,
            )
        rounds.append(found)
    result = summary(rounds, arms)
    show(result)
    if args.json:
        from labkit import machine

        about = {"hardware": machine.hardware(), "versions": machine.versions()}
        about |= {"trl_versions": rounds[0]["trl"]["versions"], "settings": settings}
        args.json.write_text(json.dumps(about | result | {"rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
