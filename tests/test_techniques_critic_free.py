"""RLOO and GRPO: advantages by hand and against TRL's own, and training with a reward of texts."""

from types import SimpleNamespace

import pytest
import torch
import trl

from labkit import models
from labkit.techniques import critic_free, lora
from labkit.techniques.critic_free import CriticFreeConfig

PROMPTS = ["Mila lives", "What does Otto like to eat?", "小城里", "three plus four"]
SIZES = dict(steps=2, batch_size=8, minibatch_size=4, generations=4, max_new_tokens=6)
SMALL = dict(SIZES, template="plain")


def test_advantages_by_hand():
    """Rewards 1, 2, 6: the others' means are 4, 3.5 and 1.5; the mean is 3, the deviation √7."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    rloo = critic_free.rloo_advantages(rewards)
    torch.testing.assert_close(rloo, torch.tensor([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]))
    grpo = critic_free.grpo_advantages(rewards, eps=0.0)[0]
    torch.testing.assert_close(grpo, torch.tensor([-2.0, -1.0, 3.0]) / 7**0.5)
    assert critic_free.grpo_advantages(rewards)[1].tolist() == [0, 0, 0]


def test_the_leave_one_out_baseline_leaves_the_gradient_unbiased():
    """Over all pairs of draws from a categorical, weighted, it is the exact policy gradient."""
    logits = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reward = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)

    def gradient(objective):
        x = logits.clone().requires_grad_()
        objective(x.log_softmax(-1)).backward()
        return x.grad

    def estimated(logp):
        total = logp.new_zeros(())
        for i in range(3):
            for j in range(3):
                a = critic_free.rloo_advantages(reward[[i, j]][None])[0]
                weight = (logp[i] + logp[j]).detach().exp()
                total = total + weight * (a[0] * logp[i] + a[1] * logp[j]) / 2
        return total

    torch.testing.assert_close(gradient(estimated), gradient(lambda p: (p.exp() * reward).sum()))


@pytest.mark.parametrize("method", critic_free.METHODS)
def test_it_learns_what_is_rewarded(tiny_folder, method):
    """Rewarded is each letter e; rows reach a reward that asks for them."""
    model, tokenizer = models.load(str(tiny_folder()), dtype="float32")
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS)]

    def reward(prompts, responses, rows):
        assert all(PROMPTS[row["number"]] == p for p, row in zip(prompts, rows, strict=True))
        return [float(response.count("e")) for response in responses]

    settings = dict(SMALL, steps=16, batch_size=32, minibatch_size=16, learning_rate=3e-3)
    config = CriticFreeConfig(method, beta=0.01, epochs=2, **settings)
    history = critic_free.train(model, tokenizer, rows, reward, config)
    assert [entry["step"] for entry in history] == list(range(1, 17))
    assert history[-1]["reward"] > 2 * (history[0]["reward"] + 0.2)
    assert history[-1]["kl"] > 0.05 > abs(history[0]["kl"])


def nothing(prompts, responses):
    return [0.0] * len(responses)


@pytest.mark.parametrize("method", critic_free.METHODS)
def test_the_library_has_the_same_advantages(tiny_model, tiny_tokenizer, monkeypatch, method):
    """Without a KL penalty: of rewards less what a missing EOS costs, which is not recorded."""
    trainer, met, given = getattr(trl, f"{method.upper()}Trainer"), [], []
    name, real = "_generate_and_score_completions", trainer._generate_and_score_completions
    spy = lambda self, inputs: met.append(real(self, inputs)) or met[-1]  # noqa: E731
    monkeypatch.setattr(trainer, name, spy)

    def reward(prompts, responses):
        given.extend(float(len(r) % 7) + i / 10 for i, r in enumerate(responses))
        return given

    sizes = dict(SMALL, steps=1, batch_size=32, minibatch_size=16, max_new_tokens=24)
    config = CriticFreeConfig(method, **sizes, beta=0.0, missing_end_penalty=2.0)
    entry = critic_free.train(tiny_model(), tiny_tokenizer, PROMPTS, reward, config)[0]
    ended = (met[0]["completion_ids"] == tiny_tokenizer.eos_token_id).any(1).float()
    assert entry["end_rate"] == pytest.approx(ended.mean().item()) and 0 < ended.mean() < 1
    assert entry["reward"] == pytest.approx(sum(given) / 32)
    rewards = (torch.tensor(given) - 2 * (1 - ended)).view(-1, 4)
    expected = getattr(critic_free, f"{method}_advantages")(rewards)
    torch.testing.assert_close(met[0]["advantages"], expected.flatten(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [dict(minibatch_size=4), dict(minibatch_size=8)])
def test_both_methods_report_the_same_divergence(tiny_model, tiny_tokenizer, monkeypatch, sizes):
    """k1, the mean of log pi - log pi_ref: over one step from a moved policy, of the same samples.

    With the reference moved instead of the policy, the first rollout is the same for both, and
    its divergence is not 0. Minibatches of 8 make a step one update.
    """
    found = {}
    real = critic_free.copy.deepcopy

    def moved(model):
        reference = real(model)
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(0.9)
        return reference

    monkeypatch.setattr(critic_free, "copy", SimpleNamespace(deepcopy=moved))
    for method in critic_free.METHODS:
        config = CriticFreeConfig(method, **{**SMALL, **sizes, "steps": 1}, beta=0.1)
        model = tiny_model()
        found[method] = critic_free.train(model, tiny_tokenizer, PROMPTS, nothing, config)[0]["kl"]
    assert found["rloo"] == pytest.approx(found["grpo"], rel=1e-4) and abs(found["rloo"]) > 1e-3


@pytest.mark.parametrize("single", ["<|begin|> $A", "<|begin|> $A <|end|>"])
def test_a_prompt_is_what_its_template_makes_it(tiny_model, make_tokenizer, single):
    """A tokenizer puts a BOS before every text, as its template does, and an EOS after it."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny_model(), make_tokenizer(chat=False)
    seen, forward = [], model.forward
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    special = [("<|begin|>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = processor
    model.forward = lambda *a, **k: seen.append(k["input_ids"]) or forward(*a, **k)
    config = CriticFreeConfig(**{**SMALL, "steps": 1}, beta=0.0)
    critic_free.train(model, tokenizer, PROMPTS, nothing, config)
    assert set((seen[0] == tokenizer.bos_token_id).sum(1).tolist()) == {1}
    assert not (seen[0] == tokenizer.eos_token_id).any()


@pytest.mark.parametrize("method", critic_free.METHODS)
@pytest.mark.parametrize("kind", ["trained in place", "made in memory", "LoRA", "bfloat16"])
def test_the_reference_is_the_model_as_it_comes(
    tiny_folder, tiny_model, tiny_tokenizer, method, kind
):
    """KL before any update is 0; afterwards nothing but weights has changed, dropout included."""
    model = tiny_model("gpt2") if kind == "made in memory" else models.load(tiny_folder("gpt2"))[0]
    model.generation_config.update(temperature=0.6, no_repeat_ngram_size=1)  # has no effect
    if kind == "LoRA":
        model = lora.attach(model, lora.LoraConfig(rank=2))
    if kind == "bfloat16":
        model = model.bfloat16()
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    config = CriticFreeConfig(method, **SMALL, beta=0.1, learning_rate=1e-9)

    def state():
        dropout = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        modes = [(m.training, "forward" in vars(m)) for m in model.modules()]
        configs = (model.config.to_dict(), models.base_model(model).generation_config.to_dict())
        return dropout, modes, configs, [name for name, _ in model.named_parameters()]

    before = state()
    history = critic_free.train(model, tiny_tokenizer, PROMPTS, nothing, config)
    assert all(abs(entry["kl"]) < 1e-5 for entry in history) and len(history) == 2
    assert state() == before


def test_a_response_ends_where_the_template_ends_it(tiny_model, tiny_tokenizer, monkeypatch):
    """Also where the tokenizer's EOS is another token, as in base models with a chat template."""
    given, real = [], trl.RLOOTrainer.__init__
    keep = lambda self, *a, **k: given.append(real(self, *a, **k) or self)  # noqa: E731
    monkeypatch.setattr(trl.RLOOTrainer, "__init__", keep)
    template = tiny_tokenizer.chat_template.replace("eos_token", "'<|system|>'")
    tiny_tokenizer.chat_template = template
    config = CriticFreeConfig(**{**SIZES, "steps": 1})
    critic_free.train(tiny_model(), tiny_tokenizer, PROMPTS, nothing, config)
    assert set(given[0].eos_token_ids) == {1, 2}


def test_refusals(tiny_model, tiny_tokenizer):
    for wrong in (dict(method="ppo"), dict(generations=3), dict(minibatch_size=3), dict(beta=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CriticFreeConfig(**{**SMALL, **wrong})
    config, frozen = CriticFreeConfig(**SMALL), tiny_model().requires_grad_(False)
    failing = lambda prompts, responses: [float("nan")] * 8  # noqa: E731
    with pytest.raises(ValueError, match="prompt '.*', response"):
        critic_free.train(tiny_model(), tiny_tokenizer, PROMPTS, failing, config)
    with pytest.raises(ValueError, match="frozen"):
        critic_free.train(frozen, tiny_tokenizer, PROMPTS, nothing, config)
