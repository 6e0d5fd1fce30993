"""Truths about models: what is saved comes back, counts are exact, bad input is named."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from labkit import models

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "dtype": "float16",
}


def logits(model, tokenizer):
    ids = tokenizer("Mila lives in the old mill. 你好", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


def test_a_saved_model_comes_back_with_the_same_outputs(tiny_folder, tmp_path, arch):
    model, tokenizer = models.load(str(tiny_folder(arch)))
    assert not model.training and model.dtype == torch.float32
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    folder = models.save(model, tokenizer, tmp_path / "saved")
    again, tokenizer_again = models.load(str(folder))
    assert torch.equal(logits(model, tokenizer), logits(again, tokenizer_again))
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]


def test_a_loss_and_a_padded_batch_bring_no_warning(tiny_folder, arch, caplog, monkeypatch):
    from transformers.utils import logging as tf_logging

    from labkit import speed

    model, tokenizer = models.load(str(tiny_folder(arch)))
    tf_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    ids = torch.tensor([[5, 6, 7], [8, 9, tokenizer.pad_token_id]])
    places, targets = torch.tensor([0, 1, 3]), torch.tensor([6, 7, 9])
    part = {"input_ids": ids, "positions": places, "targets": targets}
    with caplog.at_level(logging.WARNING):
        model(input_ids=ids, labels=ids)
        speed.response_loss(model, part)
    assert "transformers" not in " ".join(record.name for record in caplog.records)


def test_dtype_and_device_are_obeyed_or_refused(tiny_folder):
    folder = str(tiny_folder())
    model, _ = models.load(folder, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype.*int4"):
        models.load(folder, dtype="int4")
    with pytest.raises(ValueError, match="device.*toaster"):
        models.load(folder, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device.*cuda:0.*no GPU"):
            models.load(folder, device="cuda:0")


def without(folder, *patterns):
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def only_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    without(folder, "*.safetensors")


def half_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layers.1." not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def other_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: without(f, "config.json"), FileNotFoundError, "no config.json"),
        (lambda f: without(f, "tokenizer*"), FileNotFoundError, "no tokenizer"),
        (lambda f: without(f, "*.safetensors"), FileNotFoundError, "no weights"),
        (only_pickle, FileNotFoundError, "only pickled weights"),
        (lambda f: shutil.rmtree(f), FileNotFoundError, "no folder here"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json"),
        (half_file, ValueError, "[Ss]afetensor"),
        (half_weights, ValueError, "lacks 9 weights"),
        (other_kind, ValueError, "causal language model"),
    ],
)
def test_a_spoiled_folder_is_named_with_its_fault(tiny_folder, spoil, error, message):
    folder = tiny_folder()
    spoil(folder)
    with pytest.raises(error, match=message) as raised:
        models.load(str(folder))
    assert "model: " in str(raised.value) and str(folder) in str(raised.value)


def test_a_folder_with_an_adapter_only_says_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="base model"):
        models.load(str(tmp_path))


def test_a_good_pad_token_is_kept(make_tokenizer, caplog):
    tokenizer = models.check_tokenizer(make_tokenizer())
    assert tokenizer.pad_token == "<|pad|>" and not caplog.text


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_a_spare_special_token_takes_over_and_is_announced(make_tokenizer, caplog, pad):
    tokenizer = make_tokenizer(pad_token=pad)
    with caplog.at_level(logging.WARNING, "labkit"):
        models.check_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|pad|>" and "<|pad|>" in caplog.text
    with pytest.raises(ValueError, match="pad_token.*differs"):
        models.check_tokenizer(make_tokenizer(pad_token=pad), pad_token=None)


def plain_tokenizer(words, **special):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_the_unknown_token_is_the_last_resort_and_ordinary_words_are_none():
    words = ["<unk>", "</s>", "ipad", "reserved"]
    tokenizer = plain_tokenizer(words, eos_token="</s>", unk_token="<unk>")
    assert models.check_tokenizer(tokenizer).pad_token == "<unk>"
    tokenizer = plain_tokenizer(words, eos_token="</s>")
    with pytest.raises(ValueError, match=r"pad_token='<\|pad\|>'"):
        models.check_tokenizer(tokenizer)


def test_a_tokenizer_without_end_is_refused():
    with pytest.raises(ValueError, match="eos_token"):
        models.check_tokenizer(plain_tokenizer(["<unk>", "a"], pad_token="<unk>"))


def test_pad_equal_to_the_end_by_name_is_refused(make_tokenizer):
    with pytest.raises(ValueError, match="pad_token.*<.end.>"):
        models.check_tokenizer(make_tokenizer(), pad_token="<|end|>")


def test_a_new_pad_token_gets_a_row_at_the_mean(tiny_model, tiny_tokenizer, tmp_path):
    """Without spare rows the embedding grows by one; nothing else changes."""
    old = tiny_model()
    old.resize_token_embeddings(len(tiny_tokenizer))
    rows = old.get_input_embeddings().weight.detach().clone()
    old.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = models.load(str(tmp_path), pad_token="<|fill|>")
    new = model.get_input_embeddings().weight
    assert tokenizer.pad_token_id == len(rows) == new.shape[0] - 1
    assert torch.equal(new[:-1], rows)
    assert torch.allclose(new[-1], rows.mean(0), atol=1e-6)
    assert model.config.vocab_size == len(rows) + 1 == logits(model, tokenizer).shape[-1]


def test_llama_2_7b_has_its_published_number_of_parameters():
    """Embedding and head 32000·4096 each; a layer 4·4096² + 3·4096·11008 + 2·4096; a norm."""
    by_hand = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    counts = models.parameter_counts(models.meta_model(LLAMA_2_7B))
    assert counts.total == counts.trainable == by_hand == 6_738_415_616
    assert counts.bytes in (2 * by_hand, 4 * by_hand) and counts.share == 1


def test_counts_see_frozen_and_tied_parameters(tiny_model, arch):
    model = tiny_model(arch)
    model.requires_grad_(False)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    counts = models.parameter_counts(model)
    assert counts.trainable == embedding.numel() == 448 * 64
    assert counts.total == sum(t.numel() for t in {id(p): p for p in model.parameters()}.values())
    assert counts.share == pytest.approx(counts.trainable / counts.total)
    assert counts.bytes == 4 * counts.total


def test_a_meta_model_takes_a_folder_and_no_memory(tiny_folder, arch):
    folder = tiny_folder(arch)
    model = models.meta_model(folder)
    assert all(p.is_meta for p in model.parameters())
    loaded, _ = models.load(str(folder))
    assert models.parameter_counts(model).total == models.parameter_counts(loaded).total
    with pytest.raises(FileNotFoundError, match="config"):
        models.meta_model(folder / "nothing")
    with pytest.raises(ValueError, match="model_type"):
        models.meta_model({"hidden_size": 64})


def test_saving_replaces_a_model_but_no_other_files(tiny_model, tiny_tokenizer, tmp_path):
    folder = models.save(tiny_model(), tiny_tokenizer, tmp_path / "m")
    models.save(tiny_model(seed=1), tiny_tokenizer, folder)
    model, _ = models.load(str(folder))
    assert torch.equal(model.lm_head.weight, tiny_model(seed=1).lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (folder / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.md"):
        models.save(tiny_model(), tiny_tokenizer, folder)
    assert (folder / "notes.md").read_text() == "mine"


def test_a_failed_save_leaves_the_earlier_model(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    folder = models.save(tiny_model(), tiny_tokenizer, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = tiny_model(seed=1)

    def full_disk(target):
        (Path(target) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, "save_pretrained", full_disk)
    with pytest.raises(OSError, match=f"(?s)folder.*{folder}.*No space left"):
        models.save(broken, tiny_tokenizer, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_autocast_is_for_models_of_a_million_parameters_on_fitting_processors(
    tiny_model, monkeypatch
):
    large = torch.nn.Linear(1000, 1000)
    monkeypatch.setattr(models, "cpu_has_bf16", lambda: True)
    assert models.autocast_dtype(large) == torch.bfloat16
    assert models.autocast_dtype(tiny_model()) is None
    monkeypatch.setattr(models, "cpu_has_bf16", lambda: False)
    assert models.autocast_dtype(large) is None


# --- the hub, on loopback ---

LOAD = """
import logging, sys
logging.basicConfig(format="LOG %(name)s %(message)s")
from labkit import models
try:
    model, tokenizer = models.load(sys.argv[1])
    print("LOADED", sum(p.double().sum().item() for p in model.parameters()))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def load_fresh(url, home, model="town/tiny"):
    """Load in a fresh process, as a user would; (what it said, standard error)."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    env = {k: v for k, v in os.environ.items() if k not in offline and k.lower() not in proxies}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, model]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.fixture
def load_from(monkeypatch, caplog):
    """Load in this process from another hub and cache; (what it said, seconds, log)."""
    from huggingface_hub import close_session, constants

    def load(url, home, model="town/tiny", **options):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
        caplog.clear()
        start = time.monotonic()
        try:
            network, _ = models.load(model, **options)
            said = f"LOADED {sum(p.double().sum().item() for p in network.parameters())}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        return said, time.monotonic() - start, caplog.text

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield load
    close_session()


@pytest.fixture
def nowhere():
    """The address of a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def checksum(folder):
    model, _ = models.load(str(folder))
    return f"LOADED {sum(p.double().sum().item() for p in model.parameters())}"


def test_a_fresh_process_loads_from_hf_endpoint_and_then_from_its_cache(
    hub_server, tiny_folder, tmp_path, nowhere
):
    folder = tiny_folder()
    with hub_server(folder) as server:
        said, noise = load_fresh(server.url, tmp_path)
    assert said == checksum(folder), noise
    assert all("/resolve/" in path for _, path in server.requests)
    said, noise = load_fresh(nowhere, tmp_path)
    assert said == checksum(folder)
    assert "using the cached copy of town/tiny" in noise


def test_a_fresh_process_without_network_says_one_line(tmp_path, nowhere):
    start = time.monotonic()
    said, noise = load_fresh(nowhere, tmp_path)
    assert said.startswith("HubError: model: ") and "\n" not in said
    assert "LOG" not in noise and time.monotonic() - start < 60


def test_hub_shards_revision_and_unknown_names(
    load_from, hub_server, tiny_model, tiny_tokenizer, tmp_path
):
    folder = tmp_path / "sharded"
    tiny_model("qwen2").save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    with hub_server(folder) as server:
        said, _, noise = load_from(server.url, tmp_path / "a", revision=hub_server.commit)
        assert said == checksum(folder), noise
        said, _, _ = load_from(server.url, tmp_path / "b", revision="v9")
        assert said.startswith("FileNotFoundError: revision: ") and "'v9'" in said
        said, _, _ = load_from(server.url, tmp_path / "c", model="town/typo")
        assert said.startswith("FileNotFoundError: model: ") and "'town/typo'" in said
        (folder / "model.safetensors.index.json").unlink()
        said, _, _ = load_from(server.url, tmp_path / "d")
        assert said.startswith("FileNotFoundError: model: ") and "safetensors" in said


@pytest.mark.parametrize(
    ("fault", "reason"), [("503", "503"), ("503-weights", "503"), ("cut", "closed connection")]
)
def test_hub_faults_are_told_once_quickly_and_leave_no_half_model(
    load_from, hub_server, tiny_folder, tmp_path, nowhere, fault, reason
):
    folder = tiny_folder()
    with hub_server(folder, fault) as server:
        said, seconds, noise = load_from(server.url, tmp_path)
        assert said.startswith("HubError: model: ") and "'town/tiny'" in said, noise
        assert reason in said and "\n" not in said and seconds < 20
        assert noise == ""
        offline, _, _ = load_from(nowhere, tmp_path)
        assert offline.startswith("HubError")
        server.fault = None
        said, _, noise = load_from(server.url, tmp_path)
        assert said == checksum(folder), noise


def test_a_download_cut_once_resumes(load_from, hub_server, tiny_folder, tmp_path):
    folder = tiny_folder()
    with hub_server(folder, "cut-once") as server:
        said, seconds, noise = load_from(server.url, tmp_path)
        assert said == checksum(folder) and server.cuts == 1, noise


def test_no_network_at_all_is_told_quickly(load_from, tmp_path, nowhere):
    said, seconds, noise = load_from(nowhere, tmp_path)
    assert said.startswith("HubError: model: ") and "refused" in said, noise
    assert "local folder" in said and seconds < 15


def test_a_local_folder_asks_nobody(load_from, hub_server, tiny_folder, tmp_path):
    folder = tiny_folder("gpt2")
    with hub_server(folder) as server:
        said, _, noise = load_from(server.url, tmp_path, model=str(folder))
    assert said == checksum(folder), noise
    assert server.requests == []


def test_repositories_with_code_are_taken_whole(load_from, hub_server, tiny_folder, tmp_path):
    folder = tiny_folder()
    with hub_server(folder) as server:
        said, _, noise = load_from(server.url, tmp_path, trust_remote_code=True)
    assert said == checksum(folder), noise
