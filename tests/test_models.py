"""Truths about models: what is saved comes back, counts are exact, a trainer leaves no trace."""

import copy
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from pprint import pformat

import numpy as np
import peft
import pytest
import torch
from helpers import IDS, LLAMA_2_7B, logits
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from labkit import models


def test_a_saved_model_comes_back_with_the_same_outputs(tiny_folder, tmp_path, arch):
    model, tokenizer = models.load(str(tiny_folder(arch)))
    assert not model.training and model.dtype == torch.float32
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    folder = models.save(model, tokenizer, tmp_path / "saved")
    again, _ = models.load(str(folder))
    assert torch.equal(logits(model), logits(again))
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]


def test_weights_are_float32_unless_asked_whatever_the_file_holds(tiny_folder):
    folder = tiny_folder()
    model, tokenizer = models.load(str(folder), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    models.save(model, tokenizer, folder)
    assert models.load(str(folder))[0].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype"):
        models.load(str(folder), dtype="int8")
    with pytest.raises(RuntimeError, match="toaster"):
        models.load(str(folder), device="toaster")


def without(folder, pattern):
    for path in list(folder.glob(pattern)):
        path.unlink()


def only_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    without(folder, "*.safetensors")


def rewrite(file, change):
    """Changes the weights in a file of safetensors."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without_layer_1(weights):
    return {k: v for k, v in weights.items() if "s.1." not in k}


SPOILT = {
    "no config": lambda folder: without(folder, "config.json"),
    "no weights": lambda folder: without(folder, "*.safetensors"),
    "no tokenizer": lambda folder: without(folder, "tokenizer*"),
    "only pickle": only_pickle,
    "no folder": shutil.rmtree,
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
    "another kind": lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
    "half a file": lambda folder: os.truncate(folder / "model.safetensors", 99_999),
    "half the weights": lambda folder: rewrite(folder / "model.safetensors", without_layer_1),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_folder_is_named(tiny_folder, fault):
    folder = tiny_folder()
    SPOILT[fault](folder)
    with pytest.raises((OSError, ValueError), match=f"model: .*{folder}"):
        models.load(str(folder))


def test_saving_replaces_a_model_but_no_other_files(tiny_model, tiny_tokenizer, tmp_path, capfd):
    folder = models.save(tiny_model(), tiny_tokenizer, tmp_path / "m")
    models.save(tiny_model(seed=1), tiny_tokenizer, folder)
    assert torch.equal(logits(models.load(str(folder))[0]), logits(tiny_model(seed=1)))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (folder / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.md"):
        models.save(tiny_model(), tiny_tokenizer, folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert "shards" not in capfd.readouterr().err
    four_bits, broken = tiny_model(), tiny_model()
    four_bits.register_buffer("packed", torch.zeros(4, dtype=torch.uint8))
    broken.lm_head.weight.data[3] = torch.inf
    for model, reason in ((four_bits, "four bits"), (broken, "finite")):
        with pytest.raises(ValueError, match=f"model: .*{reason}"):
            models.save(model, tiny_tokenizer, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("answered", ["{{ m['content'] + '<|system|>' }}", "{{ no(1) }}"])
def test_a_saved_model_stops_where_its_template_ends(
    tiny_model, tiny_tokenizer, tmp_path, answered
):
    """As Qwen2.5 and Phi-3: the template ends in one token, the tokenizer's EOS is another."""
    tiny_tokenizer.chat_template = "{% for m in messages %}" + answered + "{% endfor %}"
    model, ends = tiny_model(), [1, 2] if "system" in answered else [1]
    folder = models.save(model, tiny_tokenizer, tmp_path / "m")
    assert models.load(str(folder))[0].generation_config.eos_token_id == ends
    assert models.eos_ids(model, tiny_tokenizer) == {*ends}
    assert model.generation_config.eos_token_id == 1


def test_a_failed_save_leaves_the_earlier_model(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    folder = models.save(tiny_model(), tiny_tokenizer, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    broken = tiny_model(seed=1)

    def full_disk(target):
        (Path(target) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        models.save(broken, tiny_tokenizer, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("pad", [None, "<|end|>"])
def test_a_spare_special_token_takes_over_with_a_warning(make_tokenizer, caplog, pad):
    assert models.check_tokenizer(make_tokenizer()).pad_token == "<|pad|>" and not caplog.text
    tokenizer = models.check_tokenizer(make_tokenizer(pad_token=pad))
    assert tokenizer.pad_token == "<|pad|>" and "<|pad|>" in caplog.text
    with pytest.raises(ValueError, match="pad_token"):
        models.check_tokenizer(make_tokenizer(pad_token=pad), pad_token=None)


def plain_tokenizer(words, **special):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def test_the_unknown_token_comes_before_a_new_one_and_ordinary_words_never_pad():
    words = ["<unk>", "</s>", "ipad", "reserved"]
    tokenizer = plain_tokenizer(words, eos_token="</s>", unk_token="<unk>")
    assert models.check_tokenizer(tokenizer).pad_token == "<unk>"
    assert models.check_tokenizer(plain_tokenizer(words, eos_token="</s>")).pad_token_id == 4
    with pytest.raises(ValueError, match="eos_token"):
        models.check_tokenizer(plain_tokenizer(words, pad_token="<unk>"))


def test_a_tokenizer_with_eos_only_gets_a_pad_token_with_a_row_at_the_mean(
    tiny_model, tmp_path, caplog
):
    """GPT-2's case; nothing but the new row differs."""
    words = [f"w{i}" for i in range(447)] + ["<|endoftext|>"]
    eos = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    old = tiny_model("gpt2")
    old.save_pretrained(tmp_path)
    plain_tokenizer(words, **eos).save_pretrained(tmp_path)
    model, tokenizer = models.load(str(tmp_path))
    rows, new = old.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert "pad_token" in caplog.text
    assert tokenizer.pad_token_id == model.config.pad_token_id == len(rows) == len(new) - 1
    assert torch.equal(new[:-1], rows)
    assert torch.allclose(new[-1], rows.mean(0), atol=1e-6)
    assert torch.equal(logits(model)[..., :-1], logits(old))


def test_llama_2_7b_has_its_published_number_of_parameters():
    """Embedding and head 32000·4096 each; a layer 4·4096² + 3·4096·11008 + 2·4096; a norm."""
    by_hand = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    counts = models.parameter_counts(models.meta_model(LLAMA_2_7B))
    assert counts.total == counts.trainable == by_hand == 6_738_415_616


def test_counts_see_frozen_and_tied_parameters(tiny_folder, arch):
    folder = tiny_folder(arch)
    model, meta = models.load(str(folder))[0].requires_grad_(False), models.meta_model(folder)
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    counts = models.parameter_counts(model)
    assert counts.trainable == embedding.numel() == 448 * 64
    assert counts.total == models.parameter_counts(meta).total == counts.bytes / 4
    assert counts.share == pytest.approx(counts.trainable / counts.total)
    assert all(p.is_meta for p in meta.parameters())
    with pytest.raises(OSError):
        models.meta_model(folder / "nothing")


def test_autocast_is_for_models_of_a_million_parameters_on_fitting_processors(monkeypatch):
    large, small = torch.nn.Linear(1000, 1000), torch.nn.Linear(10, 10)
    for native, wanted in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(models, "cpu_has_bf16", lambda native=native: native)
        assert models.autocast_dtype(large) is wanted and models.autocast_dtype(small) is None


def test_float32_attention_is_the_librarys_and_stays_so_under_autocast(tiny_model, arch):
    model = tiny_model(arch)
    plain = logits(model)
    models.use_float32_attention(torch.nn.parallel.DataParallel(model))
    assert models.base_model(model).config._attn_implementation == "labkit_float32"
    assert torch.equal(logits(model), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(logits(model).float(), plain, atol=0.2)


def lora_model(model, adapter_name="default", **options):
    options = {"target_modules": "all-linear", "lora_dropout": 0.1} | options
    with models.quiet_peft():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(model, config, adapter_name=adapter_name).eval()


def mixture(tiny_model):
    import transformers as tf

    shape = tiny_model("mistral").config.to_dict()
    config = tf.MixtralConfig(**shape, num_local_experts=4)
    return tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


KINDS = {
    "llama": lambda tiny_model: tiny_model(),
    "gpt2 in train mode": lambda tiny_model: tiny_model("gpt2").train(),
    "mixture of experts": mixture,
    "lora": lambda tiny_model: lora_model(tiny_model("gpt2"), fan_in_fan_out=True),
}


def snapshot(model):
    """All but the values of the weights, as text: modules, attributes, configurations."""
    found = {"classes": {name: type(module) for name, module in model.named_modules()}}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                value = {k: (v is not None and v.requires_grad) for k, v in value.items()}
            elif key == "_modules":
                value = list(value)
            elif hasattr(value, "to_dict"):
                value = value.to_dict() | {"attributes": dict(vars(value))}
            elif isinstance(value, dict):
                value = {k: getattr(v, "to_dict", lambda v=v: v)() for k, v in value.items()}
            found[f"{name}.{key}"] = pformat(value)  # sets in one order
    return found


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def train(model, tokenizer, folder, method="SFT", **options):
    import trl
    from datasets import Dataset

    rows = [{"prompt": f"q{i}", "completion": f"a {i}"} for i in range(8)]
    settings = dict(max_steps=1, use_cpu=True, bf16=method == "SFT", report_to="none")
    settings |= dict(disable_tqdm=True, save_strategy="no", learning_rate=1e-2)
    arguments = getattr(trl, f"{method}Config")(output_dir=str(folder), **settings, **options)
    extra = {} if method == "SFT" else {"reward_funcs": lambda completions, **_: [1.0, 2.0] * 4}
    data = Dataset.from_list(rows if method == "SFT" else [{"prompt": r["prompt"]} for r in rows])
    trainer = getattr(trl, f"{method}Trainer")
    trainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, **extra).train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_leaves_nothing_but_weights(tiny_model, tiny_tokenizer, tmp_path, kind):
    model = KINDS[kind](tiny_model)
    before, states = snapshot(model), random_states()
    weights = copy.deepcopy(model.state_dict())
    with models.unchanged(model):
        models.use_float32_attention(model)
        train(model, tiny_tokenizer, tmp_path, activation_checkpointing=True)
        assert snapshot(model) != before
    assert snapshot(model) == before and random_states() == states
    assert all(p.grad is None for p in model.parameters())
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])]
    assert moved and (kind != "lora" or all("lora" in name for name in moved))
    output = model.generate(IDS, max_new_tokens=2, do_sample=False)  # a mixture's would fail
    assert output.shape[1] > IDS.shape[1]


def test_an_adapter_and_dropout_of_zero_are_taken_off_also_after_an_error(
    tiny_model, tiny_tokenizer, tmp_path
):
    model = KINDS["lora"](tiny_model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="stop"), models.unchanged(model):
        options = dict(num_generations=4, per_device_train_batch_size=8, beta=0.1)
        options |= dict(max_completion_length=4, disable_dropout=True)
        train(model, tiny_tokenizer, tmp_path, "RLOO", **options)
        assert "ref" in model.peft_config
        raise RuntimeError("stop")
    assert snapshot(model) == before
    models.save(model, tiny_tokenizer, tmp_path / "adapter")
    assert not [p for p in (tmp_path / "adapter").iterdir() if p.is_dir()]


def test_an_adapter_comes_back_frozen_and_only_once(tiny_model, tiny_tokenizer, tmp_path):
    model = lora_model(tiny_model(), init_lora_weights=False)
    folder = models.save(model, tiny_tokenizer, tmp_path / "adapter")
    again = models.load_adapter(tiny_model(), folder)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(tiny_model()))
    assert not models.parameter_counts(again).trainable and not again.training
    for other in (again, tiny_model("gpt2")):
        with pytest.raises(ValueError, match="model"):
            models.load_adapter(other, folder)


HARM = {
    "another prefix": lambda w: {k.replace("model.model", "lm"): v for k, v in w.items()},
    "half of them": without_layer_1,
    "not finite": lambda w: {k: v / 0 for k, v in w.items()},
    "another rank": lambda w: {k: v.repeat(1 + ("A" in k), 1) for k, v in w.items()},
}


@pytest.mark.parametrize("harm", HARM)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    tiny_model, tiny_tokenizer, tmp_path, harm
):
    folder = models.save(lora_model(tiny_model()), tiny_tokenizer, tmp_path / "a")
    rewrite(folder / "adapter_model.safetensors", HARM[harm])
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="folder"):
        models.load_adapter(model, folder)
    assert snapshot(model) == before


def test_an_adapter_knows_its_base(tiny_model, tiny_tokenizer, tmp_path, caplog):
    """Qwen2 has layers of the same names and widths as Llama."""
    model = lora_model(tiny_model(), target_modules=["gate_proj", "up_proj"])
    folder = models.save(model, tiny_tokenizer, tmp_path / "a")
    with pytest.raises(ValueError, match="base"):
        models.load_adapter(tiny_model("qwen2"), folder)
    record = folder / "labkit.json"
    record.write_text(record.read_text().replace("torch.float32", "4-bit"))
    models.load_adapter(tiny_model(), folder)
    assert "qlora" in caplog.text
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LABKIT_OTHER"'))
    with pytest.raises(ValueError, match="import labkit.techniques.adapter"):
        models.load_adapter(tiny_model(), folder)


def test_a_named_adapter_can_be_saved_twice_and_loaded(tiny_model, tiny_tokenizer, tmp_path):
    model = lora_model(tiny_model(), "english", init_lora_weights=False)
    for _ in range(2):
        folder = models.save(model, tiny_tokenizer, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="english"):
        models.load_adapter(tiny_model(), folder)
    again = models.load_adapter(tiny_model(), folder / "english")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "no/such/folder"])
def test_a_path_with_nothing_there_is_no_hub_id(name):
    for read in (models.load, models.meta_model):
        with pytest.raises(FileNotFoundError, match="there is no .*folder"):
            read(name)


LOAD = """
import sys
from labkit import models
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        model, tokenizer = models.load(name, revision=revision or None)
        print(sum(p.double().sum().item() for p in model.parameters()))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def load_fresh(url, home, *names, **more):
    """What a fresh process says of each model that it loads from the hub at `url`."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    env = {k: v for k, v in os.environ.items() if k not in offline and "_proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home)} | more
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_a_hub_gives_shards_then_the_cache_does_and_errors_name_the_model(
    tiny_model, tiny_tokenizer, tmp_path
):
    model = tiny_model("qwen2")
    for name in ("sharded", "pickled"):
        model.save_pretrained(tmp_path / "hub" / name, max_shard_size="100KB")
        tiny_tokenizer.save_pretrained(tmp_path / "hub" / name)
    only_pickle(tmp_path / "hub" / "pickled")
    without(tmp_path / "hub" / "pickled", "*.index.json")
    wanted = str(sum(p.double().sum().item() for p in model.parameters()))
    with HubServer(tmp_path / "hub") as server:
        names = ("town/sharded", "town/sharded@v9", "town/typo", "town/pickled")
        loaded, *refused = load_fresh(server.url, tmp_path, *names)
    assert loaded == wanted
    assert len([path for path in server.paths if path.endswith(".safetensors")]) > 2
    for said, name in zip(refused, names[1:], strict=True):
        assert said.startswith("OSError: model") and name.split("@")[0] in said
    # Without this setting the libraries try for half a minute first.
    said = load_fresh(server.url, tmp_path, "town/sharded", "town/other", HF_HUB_OFFLINE="1")
    assert said[0] == wanted and said[1].startswith("OSError: model")
