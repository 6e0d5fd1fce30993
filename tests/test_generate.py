"""Truths about sampling: batching cannot matter, EOS stops, nothing is inherited, nothing is left."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from labkit import generate as generation
from labkit.generate import encode_prompts, generate, invert, responses, sample
from labkit.respond import from_model
from labkit.techniques import lora

LONG, SHORT = [5, 9, 33, 47, 120, 7, 8, 15], [40, 41]
IDS = [LONG, SHORT, LONG[:5], SHORT + LONG, [3], LONG[2:]]
PROMPTS = [
    "<|user|>What does Otto eat?<|end|><|assistant|>",
    "Mila",
    "小城里有一条河",
    "What is 3?",
]
MANY_ENDS = set(range(0, 448, 3))


def draw(model, ids, uniforms, ends=frozenset({1}), **options):
    length = uniforms.shape[1]
    return sample(model, ids, uniforms=uniforms, max_new_tokens=length, ends=set(ends), **options)


def test_the_inverse_by_hand():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.999, 1 - 1e-16], dtype=torch.float64)
    assert invert(logits, uniforms).tolist() == [0, 0, 2, 2, 3, 3, 3]
    assert invert(logits, uniforms, temperature=0).tolist() == [2] * 7


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_even_grid_gives_the_distribution(tiny_model, temperature):
    """n evenly spaced uniforms hit a token of probability p in n p of the cases, give or take 1."""
    model, n = tiny_model(), 2000
    grid = ((np.arange(n) + 0.5) / n)[:, None]
    tokens = torch.tensor(draw(model, [LONG] * n, grid, temperature=temperature))[:, 0]
    p = (model(torch.tensor([LONG])).logits[0, -1] / temperature).softmax(-1)
    assert (torch.bincount(tokens, minlength=len(p)) - n * p).abs().max() < 1.01


def test_greedy_is_that_of_transformers(tiny_model, arch):
    model = tiny_model(arch)
    found = sample(model, IDS, max_new_tokens=12, ends=MANY_ENDS, temperature=0)
    for ids, response in zip(IDS, found, strict=True):
        options = dict(max_new_tokens=12, eos_token_id=[*MANY_ENDS], pad_token_id=0)
        expected = model.generate(torch.tensor([ids]), do_sample=False, **options)
        assert response == expected[0, len(ids) :].tolist()
    assert len({len(response) for response in found}) > 1


def test_samples_do_not_depend_on_their_batch(tiny_model, arch):
    """Left padding, how batches are cut, and examples that left because they ended."""
    model, uniforms = tiny_model(arch), np.random.default_rng(0).random((36, 12))
    alone = [
        draw(model, [i], u[None], MANY_ENDS)[0] for i, u in zip(IDS * 6, uniforms, strict=True)
    ]
    assert draw(model, IDS * 6, uniforms, MANY_ENDS) == alone
    assert draw(model, IDS * 6, uniforms, MANY_ENDS, batch_size=7) == alone
    assert len({len(response) for response in alone}) > 3
    for response in alone:
        assert not MANY_ENDS & set(response[:-1])
        assert response[-1] in MANY_ENDS or len(response) == 12


SHAPE = dict(vocab_size=448, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
WINDOW = dict(num_key_value_heads=2, intermediate_size=64, sliding_window=6)
OTHERS = {
    "no cache of keys": tf.MambaConfig(vocab_size=448, hidden_size=32, num_hidden_layers=2),
    "no positions": tf.BloomConfig(vocab_size=448, hidden_size=32, n_layer=2, n_head=4),
    "a window": tf.MistralConfig(**SHAPE, **WINDOW),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_models_of_other_kinds(config):
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    nn.init.normal_(model.get_input_embeddings().weight)
    uniforms = np.random.default_rng(0).random((6, 10))
    alone = [draw(model, [i], u[None], MANY_ENDS)[0] for i, u in zip(IDS, uniforms, strict=True)]
    assert draw(model, IDS, uniforms, MANY_ENDS) == alone
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=0)
    expected = model.generate(torch.tensor([LONG]), **options)[0, len(LONG) :]
    assert sample(model, [LONG], max_new_tokens=10, ends={1}, temperature=0)[0] == expected.tolist()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_soft_prompt_or_prefix_is_read_first(tiny_model, arch, kind):
    """Against the whole model called without a cache at each token."""
    import peft

    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(arch), settings).eval()
    found = sample(model, IDS, max_new_tokens=6, ends={1}, temperature=0)
    for ids, response in zip(IDS, found, strict=True):
        for t, token in enumerate(response):
            inputs = torch.tensor([ids + response[:t]])
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
            assert int(logits[0, -1].argmax()) == token


@pytest.mark.parametrize("pause", [5, 16])
def test_examples_that_go_on_after_their_eos_change_nothing(tiny_model, monkeypatch, pause):
    """On a GPU the host looks for examples that have ended every 16 tokens only."""
    model, uniforms = tiny_model(), np.random.default_rng(0).random((6, 12))
    expected = draw(model, IDS, uniforms, MANY_ENDS)
    monkeypatch.setattr(generation, "STEPS_BETWEEN_CHECKS", {"cpu": pause})
    assert draw(model, IDS, uniforms, MANY_ENDS) == expected


def test_dropout_is_off(tiny_model, tiny_tokenizer):
    model = lora.attach(tiny_model("gpt2"), lora.LoraConfig(rank=4, dropout=0.5)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    options = dict(max_new_tokens=12, template="plain")
    first, again = (responses(model, tiny_tokenizer, PROMPTS, **options) for _ in range(2))
    assert first == again == responses(model.eval(), tiny_tokenizer, PROMPTS, **options)


def test_the_models_own_sampling_settings_are_not_inherited(tiny_model, tiny_tokenizer):
    model = tiny_model()
    before = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.repetition_penalty = 50.0
    model.config.use_cache = False
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12) == before


def test_eos_of_template_tokenizer_and_model(tiny_model, tiny_tokenizer):
    model = tiny_model()
    model.generation_config.eos_token_id = [1, 4]
    assert generation.eos_ids(model, tiny_tokenizer) == {1, 4}
    model.generation_config.eos_token_id = None
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("eos_token", "'<|system|>'")
    assert generation.eos_ids(model, tiny_tokenizer) == {1, 2}
    assert generation.eos_ids(model, tiny_tokenizer, "plain") == {1}


def test_nothing_follows_the_eos(tiny_model, tiny_tokenizer):
    """A model that can only say "a", or only the EOS; and an EOS that is an ordinary token."""
    model, a = tiny_model(), tiny_tokenizer("a").input_ids[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[a] = 9.0
        assert generate(model, tiny_tokenizer, ["hello"], max_new_tokens=5) == ["aaaaa"]
        model.generation_config.eos_token_id = a
        assert generate(model, tiny_tokenizer, ["hello"], max_new_tokens=5) == [""]
        model.lm_head.bias[tiny_tokenizer.eos_token_id] = 99.0
        assert generate(model, tiny_tokenizer, ["hello"], max_new_tokens=5) == [""]


def test_a_seed_repeats_samples_and_leaves_the_global_state(tiny_model, tiny_tokenizer):
    model, state = tiny_model(), torch.get_rng_state()
    options = dict(temperature=1.0, max_new_tokens=12)
    first, again, other = (
        generate(model, tiny_tokenizer, PROMPTS, seed=seed, batch_size=size, **options)
        for seed, size in ((1, 64), (1, 2), (2, 64))
    )
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())
    found = responses(model, tiny_tokenizer, PROMPTS, each=3, seed=1, template="plain")
    assert [len(set(texts)) for texts in found] == [3] * 4


def test_prompts_longer_than_the_context_lose_their_beginning(tiny_model, tiny_tokenizer, caplog):
    model, long = tiny_model("gpt2"), "river " * 400
    kept = tiny_tokenizer.decode(tiny_tokenizer(long).input_ids[-(256 - 4) :])
    with caplog.at_level(logging.WARNING, "labkit"):
        got = generate(model, tiny_tokenizer, [long, "Mila"], max_new_tokens=4)
    assert "1 of 2" in caplog.text
    assert got[0] == generate(model, tiny_tokenizer, [kept], max_new_tokens=4)[0]
    ask = dict(template="bare", max_new_tokens=4)
    assert from_model(model, tiny_tokenizer, long="cut", **ask)([long, "Mila"]) == got
    with pytest.raises(ValueError, match="prompt 1"):
        from_model(model, tiny_tokenizer, **ask)([long, "Mila"])
    with caplog.at_level(logging.WARNING, "labkit"):
        left = encode_prompts([long, "Mila"], model, tiny_tokenizer, "bare", 4, "left out")
    assert [prompt.text for prompt in left] == ["Mila"] and "1 of 2 prompts left out" in caplog.text
    with pytest.raises(ValueError, match="prompt 1"):
        encode_prompts([long], model, tiny_tokenizer, "bare", 4, "left out")


def test_bad_arguments_are_named(tiny_model, tiny_tokenizer):
    ask = partial(generate, tiny_model(), tiny_tokenizer)
    assert ask([]) == []
    wrong = [("max_new_tokens", 0), ("max_new_tokens", 256), ("temperature", -1), ("batch_size", 0)]
    for name, value in wrong:
        with pytest.raises(ValueError, match=name):
            ask(["Mila"], **{name: value})
    for prompts, name in (("one", "prompts"), (["fine", ""], "prompt 2")):
        with pytest.raises(ValueError, match=name):
            ask(prompts)


def test_prompts_in_their_template(tiny_model, tiny_tokenizer):
    turns = [{"role": "user", "content": "Hello"}]
    answered = [*turns, {"role": "assistant", "content": "Good day."}]
    rows = ["Hello", {"prompt": "Hello", "note": 3}, {"prompt": turns}, {"messages": answered}]
    found = encode_prompts(rows, tiny_model(), tiny_tokenizer, "auto", 8)
    text = "<|user|>Hello<|end|><|assistant|>"
    assert {prompt.text for prompt in found} == {text}
    assert {tiny_tokenizer.decode(prompt.ids) for prompt in found} == {text}
    assert [prompt.content for prompt in found] == ["Hello", "Hello", turns, turns]
    assert found[0].row == {"prompt": "Hello"} and found[1].row is rows[1]
    assert encode_prompts(found, tiny_model(), tiny_tokenizer, "auto", 8) == found


def test_prompts_that_cannot_work(tiny_model, tiny_tokenizer):
    wrong = {"prompts": ([], "Hello"), "prompt 1": ([{"text": "a"}], [""])}
    wrong["prompt 2"] = (["a", 3], ["a", "long " * 300])
    for name, lists in wrong.items():
        for prompts in lists:
            with pytest.raises(ValueError, match=name):
                encode_prompts(prompts, tiny_model(), tiny_tokenizer, "plain", 8)
