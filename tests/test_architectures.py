"""Every technique on tiny random models of many architectures.

Each combination trains two steps, generates, is saved, loaded and compared; or is refused by name
before anything trains. `REFUSED` says which and why, and is the table of the README.
"""

import logging
import math

import pytest
import torch
from helpers import IDS, weights_of
from transformers import AutoConfig, AutoModelForCausalLM

from labkit import data, generate, logprobs, models, training
from labkit.batching import pack
from labkit.techniques import adapter, critic_free, full, lora, ppo, prefix, qlora, reward

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
COMMON = dict(vocab_size=448, pad_token_id=0, eos_token_id=1, bos_token_id=None)
GROUPED = SHAPE | dict(num_key_value_heads=2)
EXPERTS = GROUPED | dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2)
GPT = dict(n_embd=64, n_layer=2, n_head=4, hidden_size=64, num_hidden_layers=2)
ARCHITECTURES = {
    "llama": GROUPED,
    "mistral": GROUPED | dict(sliding_window=16),
    "qwen2": GROUPED | dict(tie_word_embeddings=True),
    "qwen3": GROUPED | dict(head_dim=16),
    "gemma3_text": GROUPED | dict(head_dim=16, sliding_window=16),
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "cohere": GROUPED,
    "granite": GROUPED,
    "gpt2": GPT,  # learned positions, Conv1D
    "gpt_neox": SHAPE,
    "opt": dict(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4)
    | dict(word_embed_proj_dim=64),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4),  # ALiBi
    "mpt": dict(d_model=64, n_layers=2, n_heads=4, expansion_ratio=2),  # ALiBi
    "falcon": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True)
    | dict(new_decoder_architecture=False),
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS
    | dict(moe_intermediate_size=64, shared_expert_intermediate_size=64, decoder_sparse_step=1),
    "gpt_oss": EXPERTS | dict(head_dim=16, sliding_window=16),
    "deepseek_v3": SHAPE  # latent attention, a dense layer, shared experts
    | dict(num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8)
    | dict(qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2)
    | dict(n_group=2, topk_group=1, moe_intermediate_size=64, first_k_dense_replace=1),
    "mamba": dict(hidden_size=64, num_hidden_layers=2, state_size=8, expand=2),
    "jamba": GROUPED  # state space, attention and experts
    | dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
}
TECHNIQUES = ("full", "lora", "qlora", "prefix", "adapter", "reward", "ppo", "rloo")
REFUSED = {(arch, "adapter"): "expected one of" for arch in ("opt", "mpt", "jamba", "mamba")}
REFUSED |= {(arch, "prefix"): "^model: " for arch in ("deepseek_v3", "jamba", "mamba")}
REFUSED |= {(arch, "reward"): "no reward head" for arch in ("cohere", "granite", "mamba")}

CONFIG = training.TrainConfig(max_steps=2, batch_size=3, learning_rate=1e-2, precision="fp32")
LORA = lora.LoraConfig(rank=4)
QLORA = qlora.QloraConfig(LORA, block_size=32)
ATTACH = {
    "full": (full, full.FullConfig()),
    "lora": (lora, LORA),
    "qlora": (qlora, QLORA),
    "prefix": (prefix, prefix.PrefixConfig(length=4)),
    "adapter": (adapter, adapter.AdapterConfig(bottleneck=4)),
}
ROWS = [
    {"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}.", "rejected": "Bread."}
    for n in range(6)
]


def build(arch):
    config = AutoConfig.for_model(arch, **COMMON | ARCHITECTURES[arch])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "expert" in name or "router" in name:  # some are left as they were allocated
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def attach(technique, model):
    module, config = ATTACH[technique]
    return module.attach(model, config)


def load_again(technique, arch, folder):
    if technique == "full":
        return models.load(str(folder), device="cpu")[0]
    if technique == "qlora":
        return qlora.load_adapter(build(arch), folder, QLORA)
    return (prefix if technique == "prefix" else models).load_adapter(build(arch), folder)


def train(technique, model, tokenizer):
    """Two steps; returns what was trained and what the history says."""
    if technique == "reward":
        rows = [row | {"chosen": row["completion"]} for row in ROWS]
        config = reward.RewardConfig(max_steps=2, batch_size=3, precision="fp32")
        trained, result = reward.train(model, tokenizer, rows, config, progress=False)
        return trained, result.history
    sizes = dict(steps=2, batch_size=4, minibatch_size=4, max_new_tokens=4)
    lengths = lambda prompts, responses: [*map(len, responses)]  # noqa: E731
    if technique == "rloo":
        config = critic_free.CriticFreeConfig(generations=2, **sizes)
        return model, critic_free.train(model, tokenizer, ROWS, lengths, config)
    if technique == "ppo":
        config = ppo.PPOConfig(epochs=1, precision="fp32", **sizes)
        return model, ppo.train(model, tokenizer, ROWS, lengths, config, progress=False).history
    tuned = attach(technique, model)
    encoded = data.encode(ROWS, tokenizer)
    return tuned, training.fit(tuned, encoded, training.sft_loss, CONFIG, progress=False).history


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_technique_trains_saves_and_loads(arch, technique, tiny_tokenizer, tmp_path):
    model = build(arch)
    before = weights_of(model)
    if reason := REFUSED.get((arch, technique)):
        with pytest.raises(ValueError, match=reason):
            train(technique, model, tiny_tokenizer)
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        return
    tuned, history = train(technique, model, tiny_tokenizer)
    assert len(history) == 2
    assert all(math.isfinite(entry["loss" if "loss" in entry else "reward"]) for entry in history)
    if technique == "reward":
        prompts, replies = [row["prompt"] for row in ROWS], [row["completion"] for row in ROWS]
        loaded = reward.RewardModel.load(tuned.save(tmp_path / "saved"))
        assert loaded(prompts, replies) == pytest.approx(tuned(prompts, replies), abs=1e-4)
        return
    tuned.eval()
    models.save(tuned, tiny_tokenizer, tmp_path / "saved")
    kind = "full" if technique in ("ppo", "rloo") else technique
    again = load_again(kind, arch, tmp_path / "saved")
    batch = pack(data.encode(ROWS, tiny_tokenizer), packing=False)
    with torch.no_grad():
        logps = [logprobs.response_logps(m.eval(), batch) for m in (tuned, again, build(arch))]
    torch.testing.assert_close(logps[0], logps[1], rtol=1e-4, atol=1e-4)
    assert (logps[0] - logps[2]).abs().max() > 1e-3  # it learned something
    asked = dict(prompts=["It is"], max_new_tokens=5)
    texts = [generate.generate(m, tiny_tokenizer, **asked) for m in (tuned, again)]
    assert texts[0] == texts[1]
    if technique in ("lora", "qlora"):
        merged = tuned.merge_and_unload() if technique == "lora" else qlora.merge(tuned)
        with torch.no_grad():
            found = logprobs.response_logps(merged, batch)
        torch.testing.assert_close(found, logps[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attach_has_the_layers_of_inject(arch):
    """Not those with experts' names, nor those whose weight Mamba reads; all others."""
    ours, theirs = lora.inject(build(arch), LORA), lora.attach(build(arch), LORA)
    names = {n.rpartition(".")[0] for n, p in ours.named_parameters() if p.requires_grad}
    assert names == set(theirs.targeted_module_names)
    counts = [models.parameter_counts(model) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    leaves = {name.rpartition(".")[2] for name in names}
    expected = {"mamba": {"in_proj"}, "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"}}
    assert leaves == expected.get(arch, leaves)
    ours(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for n, p in ours.named_parameters() if n.endswith(".B"))


def test_layers_that_cannot_have_an_update_are_refused_by_name():
    for arch, target in (("mamba", "out_proj"), ("mixtral", "w1"), ("deepseek_v3", "up_proj")):
        with pytest.raises(ValueError, match=f"targets: .*{target}"):
            lora.attach(build(arch), lora.LoraConfig(targets=target))


def test_the_share_in_four_bits_is_logged(caplog):
    """Of Mixtral's weights, attention alone: 2 layers of q and o (64 × 64), k and v (64 × 32)."""
    caplog.set_level(logging.INFO, "labkit")
    model = build("mixtral")
    share = 2 * (2 * 64 * 64 + 2 * 64 * 32) / models.parameter_counts(model).total
    qlora.quantize_model(model, QLORA)
    assert f"{100 * share:.1f} %" in caplog.text and "*.mlp.experts.gate_up_proj" in caplog.text
    qlora.quantize_model(build("qwen3"), QLORA)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_an_adapter_of_another_kind_is_refused(tiny_tokenizer, tmp_path):
    """By the record of `models.save`; without it, a prefix by the shape of the cache."""
    for technique in ("lora", "prefix", "adapter"):
        tuned = attach(technique, build("qwen3"))
        folder = models.save(tuned, tiny_tokenizer, tmp_path / technique)
        with pytest.raises(ValueError, match="another base"):
            load_again(technique, "bloom", folder)
    attach("prefix", build("qwen3")).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="prefix does not fit"):
        prefix.load_adapter(build("bloom"), tmp_path / "peft")
