"""Every technique on tiny random models of many architectures.

Each combination trains two steps, generates, is saved, loaded and compared; or is refused by name
before anything trains. `REFUSED` says which and why, and is the table of the README.
"""

import math

import pytest
import torch
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
    | dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8)
    | dict(qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2)
    | dict(n_group=2, topk_group=1, moe_intermediate_size=64, first_k_dense_replace=1),
    "mamba": dict(hidden_size=64, num_hidden_layers=2, state_size=8, expand=2),
}
TECHNIQUES = ("full", "lora", "qlora", "prefix", "adapter", "reward", "ppo", "rloo")
REFUSED: dict[tuple[str, str], str] = {}

CONFIG = training.TrainConfig(max_steps=2, batch_size=3, learning_rate=1e-2, precision="fp32")
QLORA = qlora.QloraConfig(lora.LoraConfig(rank=4), block_size=32)
ROWS = [
    {"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}.", "rejected": "Bread."}
    for n in range(6)
]


def build(arch):
    config = AutoConfig.for_model(arch, **COMMON | ARCHITECTURES[arch])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def attach(technique, model):
    if technique == "full":
        return full.attach(model, full.FullConfig())
    if technique == "lora":
        return lora.attach(model, lora.LoraConfig(rank=4))
    if technique == "qlora":
        return qlora.attach(model, QLORA)
    if technique == "prefix":
        return prefix.attach(model, prefix.PrefixConfig(length=4))
    return adapter.attach(model, adapter.AdapterConfig(bottleneck=4))


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
    if technique in ("ppo", "rloo"):

        def rewards(prompts, responses):
            return [float(len(response)) for response in responses]

        sizes = dict(steps=2, batch_size=4, minibatch_size=4, max_new_tokens=4)
        if technique == "rloo":
            config = critic_free.CriticFreeConfig(generations=2, **sizes)
            return model, critic_free.train(model, tokenizer, ROWS, rewards, config)
        config = ppo.PPOConfig(epochs=1, precision="fp32", **sizes)
        return model, ppo.train(model, tokenizer, ROWS, rewards, config, progress=False).history
    tuned = attach(technique, model)
    encoded = data.encode(ROWS, tokenizer)
    return tuned, training.fit(tuned, encoded, training.sft_loss, CONFIG, progress=False).history


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_technique_trains_saves_and_loads(arch, technique, tiny_tokenizer, tmp_path):
    model = build(arch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
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
    again = load_again(
        "full" if technique in ("ppo", "rloo") else technique, arch, tmp_path / "saved"
    )
    batch = pack(data.encode(ROWS, tiny_tokenizer), packing=False)
    with torch.no_grad():
        logps = [logprobs.response_logps(m.eval(), batch) for m in (tuned, again, build(arch))]
    torch.testing.assert_close(logps[0], logps[1], rtol=1e-4, atol=1e-4)
    assert (logps[0] - logps[2]).abs().max() > 1e-3  # it learned something
    texts = [
        generate.generate(m, tiny_tokenizer, ["It is"], max_new_tokens=5) for m in (tuned, again)
    ]
    assert texts[0] == texts[1]
