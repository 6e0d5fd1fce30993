"""PPO: each detail against a truth of its own, then the loop, its faults, and two processes."""

import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import weights_of
from torch import nn
from torch.distributions import Categorical, kl_divergence

from labkit.techniques import lora, ppo, rollout
from labkit.techniques.ppo import PPOConfig
from labkit.techniques.rollout import PolicyWithValue, compute_rewards

PROMPTS = ["Mila lives", "What does Otto like to eat?", "小城里", "three plus four", "bread", "A"]
SIZES = dict(steps=3, batch_size=6, minibatch_size=3, epochs=2, max_new_tokens=8)
SMALL = PPOConfig(template="plain", learning_rate=1e-3, **SIZES)
NAN = float("nan")


def length_reward(prompts, responses):
    return [len(response) / 10 for response in responses]


def make(model, config=SMALL, **options):
    policy = PolicyWithValue(model, **options)
    weights = [p for p in policy.parameters() if p.requires_grad]
    return policy, torch.optim.Adam(weights, lr=config.learning_rate, eps=1e-5)


def trained(model, tokenizer, config=SMALL, reward=length_reward, prompts=PROMPTS, **options):
    return ppo.train(model, tokenizer, prompts, reward, config, progress=False, **options)


# Rewards that are given

GIVEN = (["one", "two", "three"], ["a", "bb", "ccc"], [{"extra": i} for i in range(3)])


def test_a_reward_gives_numbers_of_any_kind():
    weight = torch.ones(1, requires_grad=True)
    for kind in (list, np.array, torch.tensor, tuple, iter, lambda n: [weight * x for x in n]):
        found = compute_rewards(lambda p, r, kind=kind: kind([len(x) for x in r]), *GIVEN)
        assert found == [1.0, 2.0, 3.0] and all(type(x) is float for x in found)
    assert compute_rewards(lambda p, r, rows: [row["extra"] for row in rows], *GIVEN) == [0, 1, 2]


@pytest.mark.parametrize(
    ("reward", "error", "named"),
    [
        (lambda p, r: [1.0, NAN, 2.0], ValueError, "'two'.*'bb'"),
        (lambda p, r: [1.0, None, 2.0], ValueError, "'two'.*'bb'"),
        (lambda p, r: ["x" if x == "bb" else 1.0 for x in r], RuntimeError, "'two'.*'bb'"),
        (lambda p, r: torch.ones(3, 2), ValueError, "'one'.*'a'"),
        (lambda p, r, rows: [1 / (x["extra"] - 2) for x in rows], RuntimeError, "'three'.*'ccc'"),
        (lambda p, r: None, RuntimeError, "'one'.*'a'"),
        (lambda p, r: [0.0] if len(r) == 1 else 1 / 0, RuntimeError, "'one'.*'a'"),
    ],
)
def test_the_text_on_which_a_reward_fails_is_named(reward, error, named):
    with pytest.raises(error, match=named) as caught:
        compute_rewards(reward, *GIVEN)
    assert error is ValueError or caught.value.__cause__ is not None


def test_k1_and_k3_have_the_mean_of_the_exact_kl():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 12, generator=draw, dtype=torch.float64) / 2).log_softmax(-1)
    exact = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    other = (q.exp() * (q - p)).sum()
    assert (exact - other).abs() > 0.005 and exact > 0  # a swapped sign or order would show
    for estimator in (ppo.k1, ppo.k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), exact)
    assert (ppo.k3(p, q) >= 0).all() and (ppo.k1(p, q) < 0).any()
    spread = [(p.exp() * (k(p, q) - exact) ** 2).sum() for k in (ppo.k3, ppo.k1)]
    assert spread[0] < spread[1]


# Rewards of tokens, advantages, losses; NaN stands where the mask is 0


def ragged(lengths=(5, 1, 3)):
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(mask.shape, generator=draw).where(mask, NAN) for _ in range(2))
    return rewards, values, mask


def test_token_rewards_by_hand():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kl = torch.tensor([[0.1, -0.2, 0.3], [1.0, 2.0, NAN]])
    scores, ended = torch.tensor([5.0, 7.0]), torch.tensor([True, False])
    found = ppo.token_rewards(scores, ended, kl, mask, beta=0.5, penalty=3.0)
    expected = torch.tensor([[-0.05, 0.1, 4.85], [-0.5, 7.0 - 3.0 - 1.0, 0.0]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_discounted_sum_of_its_deltas(gamma, lam):
    """A_t = sum over l of (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), row by row."""
    rewards, values, mask = ragged()
    found = ppo.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            assert found[row, t].item() == pytest.approx(expected, abs=1e-6)
    assert (found[~mask] == 0).all()


def test_explained_variance():
    values, returns = torch.tensor([[1.0, 2.0, NAN]]), torch.tensor([[3.0, 7.0, NAN]])
    mask = torch.tensor([[True, True, False]])
    assert ppo.explained_variance(returns - 5, returns, mask) == 1  # a constant does not count
    assert ppo.explained_variance(torch.zeros(1, 3), returns, mask) == pytest.approx(0)
    # returns - values = 2, 5: variance 2.25; returns: 4
    assert ppo.explained_variance(values, returns, mask) == pytest.approx(1 - 2.25 / 4)
    assert ppo.explained_variance(values, torch.ones(1, 3), mask) == 0


def test_policy_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with c = 0.2; where the clipped term is less, no gradient."""
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, NAN]])
    old, mask = torch.tensor([[-1.0, -2.0, -3.0, -4.0, NAN]]), ~advantages.isnan()
    logp = (old + torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.0]]).log()).requires_grad_()
    loss = ppo.policy_loss(logp, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    loss.backward()
    torch.testing.assert_close(logp.grad[0, :4], torch.tensor([0.0, -0.5, 1.5, 0.0]) / 4)
    assert logp.grad[0, 4] == 0


def test_value_loss_by_hand():
    """Old value 0, return 1, c = 0.2: a value of 0.9 counts as 0.2; one of -3 as itself."""
    values = torch.tensor([[0.9, -3.0, 0.1, NAN]], requires_grad=True)
    returns, mask = torch.tensor([[1.0, 1.0, 1.0, NAN]]), ~values.isnan()
    loss = ppo.value_loss(values, torch.zeros(1, 4), returns, mask, 0.2)
    assert loss.item() == pytest.approx((0.8**2 + 4.0**2 + 0.9**2) / 3 / 2)
    loss.backward()
    torch.testing.assert_close(values.grad[0, :3], torch.tensor([0.0, -4.0, -0.9]) / 3)


# Against an independent version: one unpadded sequence at a time, sums over tokens


def alone(policy, example, temperature):
    """Log-probabilities, values and entropies of a response's tokens."""
    n, ids = int(example.mask.sum()), torch.from_numpy(example.ids)
    output = policy.model(ids[None], output_hidden_states=True)
    logps = (output.logits[0, -n - 1 : -1] / temperature).log_softmax(-1)
    values = policy.value_head(output.hidden_states[-1][0, -n - 1 : -1])[:, 0]
    return logps[torch.arange(n), ids[-n:]], values, -(logps.exp() * logps).sum(-1)


@torch.no_grad()
def moved(module, by, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p += by * torch.randn(p.shape, generator=draw)


@pytest.mark.parametrize("packing", [True, False])
def test_the_update_against_an_independent_version(tiny_model, tiny_tokenizer, arch, packing):
    config = replace(SMALL, temperature=0.8, beta=0.1)
    policy, _ = make(tiny_model(arch), precision="fp32")
    assert policy.packing
    policy.packing = packing
    policy.model.generation_config.eos_token_id = list(range(1, 448, 9))
    moved(policy.value_head, 0.1)
    moved(policy.model, 0.01)
    found = rollout.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, config)
    assert not found.ended.all() and len(set(found.mask.sum(1).tolist())) > 1
    for i, example in enumerate(found.examples):
        for name, x in zip(("logp", "values", "entropy"), alone(policy, example, 0.8), strict=True):
            mine = getattr(found, name)[i][found.mask[i]]
            torch.testing.assert_close(mine, x.detach(), atol=1e-4, rtol=1e-4)
    moved(policy.model, 0.003, seed=2)
    old = ppo.old_scores(found, config)
    mine = ppo.minibatch_losses(policy, found, np.arange(1, 4), old, config)["loss"]
    mine.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}
    advantages, returns = [], []
    for i, mask in enumerate(found.mask):
        kl, value = (found.logp - found.ref_logp)[i][mask], found.values[i][mask]
        rewards = -0.1 * kl
        rewards[-1] += found.rewards[i] - (0.0 if found.ended[i] else 1.0)
        running, row = 0.0, []
        for t in reversed(range(len(value))):
            following = value[t + 1] if t + 1 < len(value) else 0.0
            running = rewards[t] + following - value[t] + 0.95 * running
            row.insert(0, running)
        advantages.append(torch.stack(row))
        returns.append(advantages[-1] + value)
    every, terms = torch.cat(advantages), []
    for i in (1, 2, 3):
        a, mask = (advantages[i] - every.mean()) / every.std(correction=0), found.mask[i]
        logp, value, _ = alone(policy, found.examples[i], 0.8)
        ratio = (logp - found.logp[i][mask]).exp()
        near = value.clamp(found.values[i][mask] - 0.2, found.values[i][mask] + 0.2)
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
        worst = torch.maximum((value - returns[i]) ** 2, (near - returns[i]) ** 2)
        terms.append(loss + 0.05 * worst)
    policy.zero_grad()
    torch.cat(terms).mean().backward()
    torch.testing.assert_close(mine, torch.cat(terms).mean(), atol=1e-5, rtol=1e-4)
    for name, p in policy.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("precision", "temperature"), [("fp32", 0.7), ("bf16", 1.0)])
def test_the_first_ratio_is_exactly_1(tiny_model, tiny_tokenizer, arch, precision, temperature):
    config = replace(SMALL, epochs=1, minibatch_size=6, beta=0.0, temperature=temperature)
    policy, optimizer = make(tiny_model(arch).train(), precision=precision)
    found = rollout.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, config)
    assert torch.equal(found.logp, found.ref_logp)  # dropout is off
    metrics = ppo.update(policy, found, config, optimizer)
    assert metrics["ratio"] == 1 and metrics["approximate_kl"] == 0 == metrics["clip_fraction"]
    metrics = ppo.update(policy, found, config, optimizer)  # the policy has moved since
    assert metrics["ratio"] != 1 and metrics["approximate_kl"] > 0


def test_values_start_at_0_and_a_critic_has_weights_of_its_own(tiny_model, tiny_tokenizer):
    model = tiny_model()
    policy, _ = make(model, separate_critic=True)
    found = rollout.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, SMALL)
    assert (found.values == 0).all()
    nn.init.normal_(policy.value_head.weight)
    batch = policy.pack(found.examples)
    policy(batch, 1.0)[1].sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.critic.parameters())


def test_the_eos_is_looked_for_in_the_response_only(tiny_model, tiny_tokenizer, monkeypatch):
    replies = [[7, 8, 9], [7, 1], [1], [8], [9, 9, 1], [7]]
    monkeypatch.setattr(rollout, "sample", lambda *args, **options: replies)
    prompts = [text + "<|end|>" for text in PROMPTS]
    policy = make(tiny_model())[0]
    found = rollout.rollout(policy, tiny_tokenizer, prompts, length_reward, SMALL)
    assert found.ended.tolist() == [False, True, True, False, True, False]
    assert found.mask.sum(1).tolist() == [3, 2, 1, 1, 3, 1]  # the EOS is an action, too
    assert found.responses[2] == "" and "<|end|>" not in found.responses[1]
    metrics = found.metrics()
    assert metrics["end_rate"] == 0.5 and metrics["length"] == pytest.approx(11 / 6)
    assert metrics["empty_rate"] == pytest.approx(1 / 6)


def test_with_adapters_the_reference_is_the_model_without(tiny_model, tiny_tokenizer):
    """And the KL that is logged: mean over responses of sum over tokens of q/p - 1 - log(q/p)."""
    model = lora.attach(tiny_model(), lora.LoraConfig(rank=4)).eval()
    before, seen = weights_of(model), []
    options = dict(on_rollout=lambda found, metrics: seen.append(found))
    result = trained(model, tiny_tokenizer, replace(SMALL, learning_rate=1e-2), **options)
    assert result.history[0]["kl"] == 0 and result.history[2]["kl"] > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("lora" not in name)
    x = (seen[2].ref_logp - seen[2].logp).where(seen[2].mask, 0.0).double()
    assert result.history[2]["kl"] == pytest.approx(float((x.exp() - 1 - x).sum() / 6), rel=1e-4)
    assert result.history[2]["kl_k1"] == pytest.approx(float(-x.sum() / 6), rel=1e-4)
    base = PolicyWithValue(tiny_model())
    for i, example in enumerate(seen[2].examples):
        expected = alone(base, example, 1.0)[0].detach()
        mine = seen[2].ref_logp[i][seen[2].mask[i]]
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_it_learns_what_is_rewarded(tiny_model, tiny_tokenizer):
    """Rewarded is each letter e, which few random tokens have; rows reach reward and caller."""
    sizes = dict(steps=12, batch_size=32, minibatch_size=16, max_new_tokens=8)
    weights = dict(beta=0.0, missing_end_penalty=0.0)
    config = PPOConfig(learning_rate=3e-3, template="plain", **weights, **sizes)
    rows, seen = [{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS)], []

    def reward(prompts, responses, rows):
        assert all(p == PROMPTS[row["number"]] for p, row in zip(prompts, rows, strict=True))
        return [float(response.count("e")) for response in responses]

    def record(found, metrics):
        seen.extend(row["number"] for row in found.rows)

    result = trained(tiny_model(), tiny_tokenizer, config, reward, rows, on_rollout=record)
    assert result.history[-1]["reward"] > 4 * (result.history[0]["reward"] + 0.2)
    assert result.history[-1]["kl"] > 0.5 and result.steps == 12 and result.stopped == ""
    rates = [entry["learning_rate"] for entry in result.history]
    assert rates == pytest.approx([3e-3 * (1 - i / 12) for i in range(12)])
    rounds = [seen[i : i + 6] for i in range(0, 60, 6)]  # all prompts each time, in another order
    assert all(sorted(r) == list(range(6)) for r in rounds) and rounds[0] != rounds[1]


def test_the_penalty_keeps_near_the_reference(tiny_model, tiny_tokenizer):
    sizes = dict(steps=8, batch_size=24, minibatch_size=12, epochs=4, learning_rate=3e-4)
    free, held = (
        trained(tiny_model(), tiny_tokenizer, replace(SMALL, beta=beta, **sizes)).history[-1]["kl"]
        for beta in (0.0, 1.0)
    )
    assert held < 0.5 * free


def test_the_model_comes_out_as_it_went_in(tiny_model, tiny_tokenizer):
    model = tiny_model().train()
    model.lm_head.eval()
    attention, before = model.config._attn_implementation, weights_of(model)
    state = torch.random.get_rng_state()
    trained(model, tiny_tokenizer)
    assert model.training and not model.lm_head.training
    assert model.config._attn_implementation == attention
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_response_ends_where_the_template_ends_it(tiny_model, tiny_tokenizer):
    """Also where the tokenizer's EOS is another token, as in base models with a chat template."""
    template = tiny_tokenizer.chat_template.replace("eos_token", "'<|user|>'")
    tiny_tokenizer.chat_template = template
    model, config = tiny_model(), replace(SMALL, template="chat")
    with torch.no_grad():  # <|user|> is what the model says most
        model.lm_head.weight[3] = 10 * model.lm_head.weight[3].sign()
    policy = make(model)[0]
    found = rollout.rollout(policy, tiny_tokenizer, PROMPTS * 4, length_reward, config)
    ends = {int(e.ids[-1]) for e, ended in zip(found.examples, found.ended, strict=True) if ended}
    assert 3 in ends and all(3 not in e.ids[:-1][e.mask[:-1] == 1] for e in found.examples)


def timeless(history):
    return [{k: v for k, v in entry.items() if "seconds" not in k} for entry in history]


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_is_the_run(tiny_model, tiny_tokenizer, tmp_path, adapters):
    """Stopped by its reward in the fourth step, and resumed from the checkpoint of the second."""
    config = replace(SMALL, steps=5, save_steps=2)

    def fresh():
        torch.manual_seed(0)
        return lora.attach(tiny_model(), lora.LoraConfig(rank=2)) if adapters else tiny_model()

    def fails_late(prompts, responses):
        calls.append(1)
        return length_reward(prompts, responses) if len(calls) < 4 else [NAN] * 6

    whole, part, calls = fresh(), fresh(), []
    expected = trained(whole, tiny_tokenizer, config, output_dir=tmp_path / "whole")
    with pytest.raises(ValueError, match="prompt '.*', response '"):
        trained(part, tiny_tokenizer, config, fails_late, output_dir=tmp_path / "part")
    assert [f.name for f in (tmp_path / "part").iterdir()] == ["checkpoint-2"]
    again, resumed = replace(config, resume=str(tmp_path / "part")), fresh()
    found = trained(resumed, tiny_tokenizer, again, output_dir=tmp_path / "part")
    assert timeless(found.history) == timeless(expected.history)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert {f.suffix for f in tmp_path.rglob("*.*") if f.is_file()} == {".safetensors", ".json"}
    assert {f.name for f in (tmp_path / "whole").iterdir()} == {"checkpoint-4", "checkpoint-5"}


def test_what_cannot_be_resumed(tiny_model, tiny_tokenizer, tmp_path):
    config, model = replace(SMALL, steps=2, save_steps=1), tiny_model()
    trained(model, tiny_tokenizer, config, output_dir=tmp_path)
    again = replace(config, resume=str(tmp_path))
    for other, settings, error, named in (
        (model, again, ValueError, "frozen weights"),  # the reference has moved
        (tiny_model(), replace(again, beta=0.5), ValueError, "beta"),
        (tiny_model("gpt2"), again, ValueError, "weights"),
        (tiny_model(), config, ValueError, "output_dir"),
        (model, replace(config, resume="nowhere"), FileNotFoundError, "resume"),
    ):
        with pytest.raises(error, match=named):
            trained(other, tiny_tokenizer, settings, output_dir=tmp_path)


# Faults


def test_a_gradient_that_is_not_finite_leaves_no_checkpoint(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    config = replace(SMALL, epochs=1, minibatch_size=6, save_steps=1)
    with pytest.raises(FloatingPointError, match="step 1"):
        trained(model, tiny_tokenizer, config, output_dir=tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_beyond_the_limit_the_run_stops(tiny_model, tiny_tokenizer, caplog):
    config = replace(SMALL, steps=20, learning_rate=1e-2, kl_limit=0.5, beta=0.0)
    result = trained(tiny_model(), tiny_tokenizer, config)
    assert 1 < result.steps < 20 and "kl_limit" in result.stopped and result.stopped in caplog.text
    assert [entry["kl"] > 0.5 for entry in result.history] == [False] * (result.steps - 1) + [True]
    assert "ratio" not in result.history[-1]  # nothing was learned from the last rollout


@pytest.mark.parametrize(("reply", "kind"), [([1], "empty"), ([7, 8], "ended")])
def test_responses_all_empty_or_none_ending_are_reported_once(
    tiny_model, tiny_tokenizer, monkeypatch, caplog, reply, kind
):
    monkeypatch.setattr(rollout, "sample", lambda model, ids, **options: [reply] * len(ids))
    assert trained(tiny_model(), tiny_tokenizer).steps == 3
    (said,) = [record.getMessage() for record in caplog.records if record.name == "labkit"]
    assert said.startswith("step 1: ") and kind in said


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_what_cannot_work_is_refused_before_any_work(tiny_model, make_tokenizer, caplog):
    from peft import PromptTuningConfig, get_peft_model

    def never(prompts, responses):
        raise AssertionError("called")

    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    good, no_pad = make_tokenizer(), make_tokenizer(pad_token="<|end|>")
    for model, tokenizer, config, prompts, named in (
        (tiny_model(), no_pad, SMALL, PROMPTS, "pad_token"),
        (tiny_model(), good, SMALL, ["long " * 300], "prompt 1"),
        (tiny_model(), good, replace(SMALL, save_steps=1), PROMPTS, "output_dir"),
        (get_peft_model(tiny_model(), soft), good, SMALL, PROMPTS, "soft prompt"),
        (tiny_model().requires_grad_(False), good, SMALL, PROMPTS, "model"),
    ):
        with pytest.raises(ValueError, match=named):
            trained(model, tokenizer, config, never, prompts)
    PolicyWithValue(tiny_model().bfloat16())
    assert "half precision" in caplog.text


@pytest.mark.parametrize(
    "setting",
    [dict(steps=0), dict(epochs=5), dict(minibatch_size=48), dict(beta=-0.1), dict(lam=1.1)]
    + [dict(temperature=0), dict(kl_limit=NAN), dict(template="x"), dict(precision="fp8")],
)
def test_settings_that_cannot_work(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PPOConfig(**setting)


# Several processes

SCRIPT = textwrap.dedent("""
    import json, sys, torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from labkit.techniques import ppo
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    folder, out, settings = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    config = ppo.PPOConfig(template="plain", learning_rate=1e-3, **json.loads(settings))
    prompts = json.loads(open(out + ".prompts").read())
    def reward(prompts, responses):
        return [len(response) / 10 for response in responses]
    def fails(prompts, responses):
        return [1 / state.is_main_process] * len(responses)
    result = ppo.train(model, tokenizer, prompts, reward, config, progress=False)
    if state.is_main_process:
        model.save_pretrained(out)
        open(out + ".json", "w").write(json.dumps(result.history))
    try:
        ppo.train(model, tokenizer, prompts, fails, config, progress=False)
    except RuntimeError as error:
        open(f"{out}.{state.process_index}", "w").write(str(error))
    state.wait_for_everyone()
    state.destroy_process_group()
""")


def test_two_processes_learn_what_one_does_and_fail_together(tiny_folder, tmp_path):
    """Shards of 2 and 1 examples of a minibatch: means of means would not be the mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, out, script = tiny_folder(), tmp_path / "out", tmp_path / "script.py"
    one = AutoModelForCausalLM.from_pretrained(folder)
    start = weights_of(one)
    expected = trained(one, AutoTokenizer.from_pretrained(folder))
    script.write_text(SCRIPT)
    (tmp_path / "out.prompts").write_text(json.dumps(PROMPTS))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*run, script, folder, out, json.dumps(SIZES)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    together = AutoModelForCausalLM.from_pretrained(out)
    for (name, p), q in zip(one.named_parameters(), together.parameters(), strict=True):
        change = (p - start[name]).abs().max()
        assert change > 1e-3 and (p - q).abs().max() < 0.02 * change, name
    history = json.loads((tmp_path / "out.json").read_text())
    for found, entry in zip(timeless(history), timeless(expected.history), strict=True):
        assert found == pytest.approx(entry, rel=1e-3, abs=1e-4)
    for process in ("0", "1"):
        assert "ZeroDivisionError" in (tmp_path / f"out.{process}").read_text()


def test_processes_that_do_not_know_of_each_other(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes"):
        trained(tiny_model(), tiny_tokenizer)
