"""Every technique on architectures of many kinds: it works from end to end, or refuses at once."""

import logging

import numpy as np
import pytest
import torch
import transformers

from labkit import generate, models, training
from labkit.batching import Example
from labkit.techniques import adapter, full, lora, prefix, qlora

IDS = torch.arange(5, 29).reshape(2, 12)
LORA = lora.LoraConfig(rank=4)
QLORA = qlora.QloraConfig(LORA, block_size=32)
COMMON = dict(vocab_size=448, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
COMMON |= dict(num_attention_heads=4, initializer_range=0.1, pad_token_id=0, eos_token_id=1)
GROUPED = dict(num_key_value_heads=2)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16)
KINDS = {
    "bloom": {},
    "deepseek_v3": dict(n_routed_experts=4, n_group=2, topk_group=1, v_head_dim=16, **LATENT)
    | dict(num_key_value_heads=4, first_k_dense_replace=1, **EXPERTS),
    "falcon": dict(multi_query=True, new_decoder_architecture=False, alibi=False),
    "gpt_oss": dict(head_dim=16, **GROUPED, **EXPERTS),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, **GROUPED),
    "llama4_text": dict(head_dim=16, intermediate_size_mlp=128, moe_layers=[1], **GROUPED)
    | dict(num_local_experts=4, num_experts_per_tok=1),
    "mamba": dict(state_size=8),
    "mixtral": GROUPED | EXPERTS,
    "mpt": dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=256),
    "opt": dict(ffn_dim=128, word_embed_proj_dim=64),
    "qwen2_moe": dict(num_experts=4, shared_expert_intermediate_size=64, **GROUPED, **EXPERTS),
    "qwen3": dict(head_dim=16, **GROUPED),
}
TECHNIQUES = {
    "full": (lambda model: full.attach(model, full.FullConfig()), None),
    "lora": (lambda model: lora.attach(model, LORA), models.load_adapter),
    "qlora": (
        lambda model: qlora.attach(model, QLORA),
        lambda model, folder: qlora.load_adapter(model, folder, QLORA),
    ),
    "prefix": (
        lambda model: prefix.attach(model, prefix.PrefixConfig(5), text=IDS[0, :5]),
        prefix.load_adapter,
    ),
    "adapter": (lambda model: adapter.attach(model, adapter.AdapterConfig(6)), models.load_adapter),
}
REFUSED = {("adapter", kind) for kind in ("jamba", "mamba", "mpt", "opt")}
REFUSED |= {("prefix", kind) for kind in ("deepseek_v3", "jamba", "mamba")}


def make(kind):
    config = transformers.AutoConfig.for_model(kind, **(COMMON | KINDS[kind]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "expert" in name or "router" in name:  # some are left as they were allocated
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_works_or_is_refused_before_training(technique, kind, tiny_tokenizer, tmp_path):
    attach, load = TECHNIQUES[technique]
    if (technique, kind) in REFUSED:
        with pytest.raises(ValueError, match="^model: "):
            attach(make(kind))
        return
    tuned = attach(make(kind))
    before = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    examples = [Example(np.arange(3, 12 + i), np.arange(9 + i) > 4) for i in range(4)]
    config = training.TrainConfig(max_steps=2, warmup_ratio=0, learning_rate=1e-2, precision="fp32")
    training.fit(tuned, examples, training.sft_loss, config, progress=False)
    now = dict(tuned.named_parameters())
    assert any(not torch.equal(now[name], p) for name, p in before.items())
    prompts = [[5, 6, 7], [8, 9]]
    written = generate.sample(tuned, prompts, max_new_tokens=4, ends=set(), temperature=0)
    assert [len(ids) for ids in written] == [4, 4]
    expected = logits(tuned.eval())
    folder = models.save(tuned, tiny_tokenizer, tmp_path / "saved")
    again = load(make(kind), folder) if load else models.load(str(folder), device="cpu")[0]
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    if technique in ("lora", "qlora"):
        merged = tuned.merge_and_unload() if technique == "lora" else qlora.merge(tuned)
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_attach_has_the_layers_of_inject(kind):
    """Not those with experts' names, nor those whose weight Mamba reads; all others."""
    ours, theirs = lora.inject(make(kind), LORA), lora.attach(make(kind), LORA)
    names = {n.rpartition(".")[0] for n, p in ours.named_parameters() if p.requires_grad}
    assert names == set(theirs.targeted_module_names)
    counts = [models.parameter_counts(model) for model in (ours, theirs)]
    assert counts[0] == counts[1]
    leaves = {name.rpartition(".")[2] for name in names}
    expected = {"mamba": {"in_proj"}, "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"}}
    assert leaves == expected.get(kind, leaves)
    ours(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for n, p in ours.named_parameters() if n.endswith(".B"))


def test_layers_that_cannot_have_an_update_are_refused_by_name():
    for kind, target in (("mamba", "out_proj"), ("mixtral", "w1"), ("deepseek_v3", "up_proj")):
        with pytest.raises(ValueError, match=f"targets: .*{target}"):
            lora.attach(make(kind), lora.LoraConfig(targets=target))


def test_the_share_in_four_bits_is_logged(caplog):
    """Of Mixtral's weights, attention alone: 2 layers of q and o (64 × 64), k and v (64 × 32)."""
    caplog.set_level(logging.INFO, "labkit")
    model = make("mixtral")
    share = 2 * (2 * 64 * 64 + 2 * 64 * 32) / models.parameter_counts(model).total
    qlora.quantize_model(model, QLORA)
    assert f"{100 * share:.1f} %" in caplog.text and "*.mlp.experts.gate_up_proj" in caplog.text
    qlora.quantize_model(make("qwen3"), QLORA)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_an_adapter_of_another_kind_is_refused(tiny_tokenizer, tmp_path):
    """By the record of `models.save`; without it, a prefix by the shape of the cache."""
    for technique in ("lora", "prefix", "adapter"):
        tuned = TECHNIQUES[technique][0](make("qwen3"))
        folder = models.save(tuned, tiny_tokenizer, tmp_path / technique)
        with pytest.raises(ValueError, match="another base"):
            TECHNIQUES[technique][1](make("bloom"), folder)
    TECHNIQUES["prefix"][0](make("qwen3")).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="prefix does not fit"):
        prefix.load_adapter(make("bloom"), tmp_path / "peft")
