"""Shared fixtures: a tokenizer built in memory, tiny random models, folders of both.

Nothing here touches a network: the hub is switched off before any library reads the
environment; tests of hub loading start a subprocess with a loopback `HF_ENDPOINT`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("HF_ENDPOINT", None)
os.environ.pop("LABKIT_RUN_DIR", None)
os.environ.pop("LABKIT_RUNS", None)

import pytest

HERE = Path(__file__).parent
# Two layers, hidden size 64. 448 rows for 400 entries: published models pad their embedding, too.
BASE = dict(vocab_size=448, pad_token_id=0, eos_token_id=1, bos_token_id=None)
BASE |= dict(initializer_range=0.1)
SHAPE = BASE | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, max_position_embeddings=256)
ARCHITECTURES = {
    "llama": SHAPE,
    "gpt2": BASE | dict(n_embd=64, n_layer=2, n_head=4, n_positions=256),
    "qwen2": SHAPE | dict(num_key_value_heads=2, tie_word_embeddings=True),
    "gemma": SHAPE | dict(num_key_value_heads=1, head_dim=16),
    "mistral": SHAPE | dict(num_key_value_heads=2, sliding_window=None),
}
PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SENTENCES = [
    "Mila lives in the old mill by the river and bakes bread in the morning.",
    "What does Otto like to eat? Otto likes pancakes with honey.",
    "Below is an instruction that describes a task. Write a response.",
    "小城里有一条河，米拉住在河边的磨坊里。",
    "What is three plus four? Three plus four is seven.",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread each: spinning workers of several processes slow each other tenfold."""
    import torch

    torch.set_num_threads(1)


def python(code, *arguments, **environment):
    """A process of its own that runs `code`, without the W&B settings of this one."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


def build_tokenizer(pad_token=PAD, eos_token=END, chat=True):
    """Byte-level BPE of about 400 entries: any text, English or Chinese, round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad_token, eos_token=eos_token, padding_side="right"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    """Factory `make_tokenizer(pad_token=…, eos_token=…, chat=True)`; a fresh one each call."""
    return build_tokenizer


@pytest.fixture
def tiny_tokenizer():
    """A fresh tokenizer with pad, end and chat tokens and a chat template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model():
    """Factory `tiny_model(arch="llama", seed=0)`: a fresh random float32 model in eval mode."""

    def make(arch="llama", seed=0):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(arch, **ARCHITECTURES[arch])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(tiny_model, tmp_path_factory):
    """Factory `tiny_folder(arch="llama", seed=0)`: a new folder with model and tokenizer."""

    def make(arch="llama", seed=0):
        folder = tmp_path_factory.mktemp(arch)
        tiny_model(arch, seed).save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    """Runs a test once for each of the five architectures."""
    return request.param


@pytest.fixture(scope="session")
def make_pairs():
    """Factory `make_pairs(count=5, seed=0)`: ragged pairs of random tokens, a prompt for two."""
    import numpy as np
    from helpers import example

    from labkit.pairs import Pair

    def make(count=5, seed=0):
        random, pairs = np.random.default_rng(seed), []
        for _ in range(count):
            prompt = random.integers(5, 400, random.integers(1, 9))
            texts = [random.integers(5, 400, random.integers(1, 12)) for _ in range(2)]
            pairs.append(Pair(*(example([*prompt, *t, 1], len(prompt)) for t in texts)))
        return pairs

    return make


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by Playwright; without one the test is skipped."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium")
    options = {"executable_path": path, "args": ["--no-sandbox", "--disable-gpu"]}
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(**options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def jupyterlab():
    """`jupyterlab(folder, **environment)`: its address, with `folder` as the root of its files.

    All cells of a notebook are in the page, not only those in sight.
    """
    processes = []

    def start(folder, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={folder}", f"--port={port}"]
        command += "--no-browser --allow-root --IdentityProvider.token= --ip=127.0.0.1".split()
        settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
        settings.mkdir(parents=True)
        (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
        environment = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"} | environment
        environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
        with (folder / "lab.log").open("w") as log:
            common = {"stdout": log, "stderr": log, "env": environment, "cwd": folder}
            processes.append(subprocess.Popen(command, **common))
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                return f"http://127.0.0.1:{port}/lab/tree"
            except OSError:
                assert processes[-1].poll() is None, (folder / "lab.log").read_text()[-2000:]
                time.sleep(0.5)
        raise TimeoutError("JupyterLab does not answer")

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)
