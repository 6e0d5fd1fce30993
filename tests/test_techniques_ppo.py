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
from torch import nn

from labkit import batching, sampling
from labkit.logprobs import token_logps
from labkit.policy import PolicyWithValue
from labkit.techniques import lora, ppo
from labkit.techniques.ppo import PPOConfig

PROMPTS = ["Mila lives", "What does Otto like to eat?", "小城里", "three plus four", "bread", "A"]
SMALL = PPOConfig(steps=3, batch_size=6, minibatch_size=3, epochs=2, max_new_tokens=8,
                  template="plain", learning_rate=1e-3)  # fmt: skip
NAN = float("nan")


def ragged(seed=0, lengths=(5, 1, 3), garbage=NAN):
    """Rewards, values and mask (3, 5), with garbage where the mask is not."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(mask.shape, generator=draw).where(mask, garbage)
                       for _ in range(2))  # fmt: skip
    return rewards, values, mask


def length_reward(prompts, responses):
    return [len(response) / 10 for response in responses]


def make(model, config=SMALL, **options):
    policy = PolicyWithValue(model, **options)
    weights = [p for p in policy.parameters() if p.requires_grad]
    return policy, torch.optim.Adam(weights, lr=config.learning_rate, eps=1e-5)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(model, tokenizer, config=SMALL, reward=length_reward, prompts=PROMPTS, **options):
    return ppo.train(model, tokenizer, prompts, reward, config, progress=False, **options)


# KL estimators


def categorical(seed=0, n=12):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(2, n, generator=draw, dtype=torch.float64) / 2).log_softmax(-1)


def test_k1_and_k3_have_the_mean_of_the_exact_kl():
    p, q = categorical()
    exact = torch.distributions.kl_divergence(*(torch.distributions.Categorical(x.exp())
                                                for x in (p, q)))  # fmt: skip
    other = (q.exp() * (q - p)).sum()
    assert (exact - other).abs() > 0.005 and exact > 0  # a swapped sign or order would show
    for estimator in (ppo.k1, ppo.k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), exact)
    assert (ppo.k3(p, q) >= 0).all() and (ppo.k1(p, q) < 0).any()
    spread = [(p.exp() * (k(p, q) - exact) ** 2).sum() for k in (ppo.k3, ppo.k1)]
    assert spread[0] < spread[1]


def test_k2_in_a_loss_has_the_gradient_of_the_exact_kl():
    """Samples are fixed, so their weights carry no gradient; k3's mean gradient is another."""
    q = categorical()[1]
    logits = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = []
    for kl in (lambda p: (p.exp() * (p - q)).sum(),
               lambda p: (p.exp().detach() * ppo.k2(p, q)).sum(),
               lambda p: (p.exp().detach() * ppo.k3(p, q)).sum()):  # fmt: skip
        x = logits.clone().requires_grad_()
        kl(x.log_softmax(-1)).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert (gradients[2] - gradients[0]).abs().max() > 0.01


# Rewards, advantages, whitening


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
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s])
                           for s in range(t, length))  # fmt: skip
            assert found[row, t].item() == pytest.approx(expected, abs=1e-6)
    assert (found[~mask] == 0).all()


def test_lambda_1_gives_monte_carlo_returns():
    rewards, values, mask = ragged()
    returns = ppo.gae(rewards, values, mask, 1.0, 1.0) + values
    to_go = rewards.nan_to_num().flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns[mask], to_go[mask])


def test_whitened_advantages_and_returns_from_before():
    rewards, values, mask = ragged(lengths=(5, 2, 4))
    advantages, returns = ppo.advantages_and_returns(10 * rewards, values, mask, 1.0, 0.95)
    assert advantages[mask].mean().abs() < 1e-6
    assert advantages[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    raw = ppo.gae(10 * rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(returns[mask], (raw + values)[mask])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_explained_variance():
    values, returns = torch.tensor([[1.0, 2.0, NAN]]), torch.tensor([[3.0, 7.0, NAN]])
    mask = torch.tensor([[True, True, False]])
    assert ppo.explained_variance(returns, returns, mask) == 1
    assert ppo.explained_variance(returns - 5, returns, mask) == 1  # a constant is not its affair
    assert ppo.explained_variance(torch.zeros(1, 3), returns, mask) == pytest.approx(0)
    # returns - values = 2, 5: variance 2.25; returns: 4
    assert ppo.explained_variance(values, returns, mask) == pytest.approx(1 - 2.25 / 4)
    assert ppo.explained_variance(values, torch.ones(1, 3), mask) == 0


# Losses


def test_policy_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with c = 0.2; where the clipped term is less, no gradient."""
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    old = torch.tensor([[-1.0, -2.0, -3.0, -4.0, NAN]])
    logp = (old + torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.0]]).log()).requires_grad_()
    loss = ppo.policy_loss(logp, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    loss.backward()
    torch.testing.assert_close(logp.grad[0, :4], torch.tensor([0.0, -0.5, 1.5, 0.0]) / 4)
    assert logp.grad[0, 4] == 0


def test_value_loss_by_hand():
    """Old value 0, return 1, c = 0.2: a value of 0.9 counts as 0.2; one of -3 as itself."""
    mask = torch.tensor([[True, True, True, False]])
    values = torch.tensor([[0.9, -3.0, 0.1, NAN]], requires_grad=True)
    returns = torch.tensor([[1.0, 1.0, 1.0, NAN]])
    loss = ppo.value_loss(values, torch.zeros(1, 4), returns, mask, 0.2)
    assert loss.item() == pytest.approx((0.8**2 + 4.0**2 + 0.9**2) / 3 / 2)
    loss.backward()
    torch.testing.assert_close(values.grad[0, :3], torch.tensor([0.0, -4.0, -0.9]) / 3)


def batch_of(mask, **columns):
    base = dict.fromkeys(("logp", "ref_logp", "values", "advantages", "returns"))
    return {name: columns.get(name, torch.zeros(mask.shape)) for name in base} | {"mask": mask}


def test_the_loss_weighs_its_parts_and_reports_kept_tokens_only():
    mask = torch.tensor([[True, True, False]])
    old = batch_of(mask, advantages=torch.tensor([[1.0, 1.0, NAN]]), returns=torch.ones(1, 3))
    logp = torch.tensor([[math.log(1.5), 0.0, 9.0]])
    found = ppo.losses(logp, torch.zeros(1, 3), old, beta=0.3, config=PPOConfig())
    assert found["policy_loss"].item() == pytest.approx(-(1.2 + 1) / 2)
    assert found["value_loss"].item() == pytest.approx(0.5)
    assert found["loss"].item() == pytest.approx(-1.1 + 0.1 * 0.5)
    assert found["ratio"].item() == pytest.approx(1.25)
    assert found["clip_fraction"].item() == pytest.approx(0.5)
    # KL(old || new) of a sample with new / old = 1.5: 1.5 - 1 - log 1.5
    assert found["approximate_kl"].item() == pytest.approx((0.5 - math.log(1.5)) / 2)
    inside = ppo.losses(logp, torch.zeros(1, 3), old, 0.3, PPOConfig(kl_in_loss=True))
    assert (inside["loss"] - found["loss"]).item() == pytest.approx(
        0.3 * math.log(1.5) ** 2 / 4, abs=1e-6
    )


def test_the_controller_goes_towards_its_target():
    assert ppo.adapted(0.1, kl=6.0, target=6.0, episodes=100, horizon=1000) == 0.1
    assert ppo.adapted(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert ppo.adapted(0.1, 99.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02)
    assert ppo.adapted(0.1, -99.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)


# The policy


@pytest.mark.parametrize("way", ["shared lines", "parts", "padded"])
def test_scores_are_those_of_each_sequence_alone(
    tiny_model, tiny_tokenizer, arch, way, monkeypatch
):
    """However rows are batched, the last way as on a GPU; also the entropy."""
    config = replace(SMALL, temperature=0.7)
    policy, _ = make(tiny_model(arch))
    policy.packing, policy.cut = policy.packing and way == "shared lines", way == "parts"
    monkeypatch.setattr(
        batching, "cuts", lambda lengths: [1, len(lengths)] if len(lengths) > 1 else [1]
    )
    nn.init.normal_(policy.value_head.weight)
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, config)
    with torch.no_grad():
        for i, length in enumerate(found.lengths.tolist()):
            ids = torch.from_numpy(found.ids[i])[None]
            output = policy.model(ids, output_hidden_states=True)
            logits = output.logits / config.temperature
            logp = token_logps(logits, ids)[0, -length:]
            torch.testing.assert_close(found.logp[i, :length], logp, atol=3e-5, rtol=1e-4)
            categorical = torch.distributions.Categorical(logits=logits[0, -length - 1 : -1])
            entropy = categorical.entropy()
            torch.testing.assert_close(found.entropy[i, :length], entropy, atol=1e-4, rtol=1e-4)
            values = policy.value_head(output.hidden_states[-1])[0, -length - 1 : -1, 0]
            torch.testing.assert_close(found.values[i, :length], values, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_both_ways_to_batch_are_used(tiny_model, tiny_tokenizer, packing):
    policy, _ = make(tiny_model())
    assert policy.packing
    policy.packing = packing
    ids = [np.arange(2, 2 + n) for n in (9, 4, 30, 12)]
    order, batch = policy.batch(ids, [2, 1, 5, 3], [3, 0, 2])
    assert sorted(order) == [0, 2, 3] and ("position_ids" in batch) is packing
    found = dict(zip(order, policy.score(batch, 1.0)[0].split([(2, 1, 5, 3)[i] for i in order]),
                     strict=True))  # fmt: skip
    for i in order:
        x = torch.from_numpy(ids[i])[None]
        alone = token_logps(policy.model(x).logits, x)[0, -(2, 1, 5, 3)[i] :]
        torch.testing.assert_close(found[i], alone.detach(), atol=1e-5, rtol=1e-4)


def test_a_model_that_mixes_rows_is_padded(tiny_model, monkeypatch):
    model = tiny_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **rest: forward(**rest))
    assert not PolicyWithValue(model).packing


def test_values_start_at_0_and_a_critic_stands_apart(tiny_model, tiny_tokenizer):
    model = tiny_model()
    policy, _ = make(model, separate_critic=True)
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, SMALL)
    assert (found.values == 0).all()
    assert not {id(p) for p in policy.critic.parameters()} & {id(p) for p in model.parameters()}
    nn.init.normal_(policy.value_head.weight)
    _, batch = policy.batch(found.ids, found.lengths.tolist(), range(6))
    policy(batch, 1.0)[1].sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.critic.parameters())
    with torch.no_grad():  # the critic reads its own weights
        before = policy(batch, 1.0)[1]
        next(model.parameters()).mul_(2)
        assert torch.equal(policy(batch, 1.0)[1], before)


def test_a_shared_backbone_learns_from_values(tiny_model, tiny_tokenizer):
    policy, _ = make(tiny_model())
    nn.init.normal_(policy.value_head.weight)
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, SMALL)
    policy(policy.batch(found.ids, found.lengths.tolist(), range(6))[1], 1.0)[1].sum().backward()
    assert policy.model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("precision", "temperature"), [("fp32", 0.7), ("bf16", 1.0)])
def test_the_first_ratio_is_exactly_1(tiny_model, tiny_tokenizer, arch, precision, temperature):
    config = replace(SMALL, epochs=1, minibatch_size=6, beta=0.0, temperature=temperature)
    policy, optimizer = make(tiny_model(arch), precision=precision)
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, config)
    metrics = ppo.update(policy, found, config, optimizer)
    assert metrics["ratio"] == 1 and metrics["approximate_kl"] == 0
    metrics = ppo.update(policy, found, config, optimizer)  # the policy has moved since
    assert metrics["ratio"] != 1 and metrics["approximate_kl"] > 0


def test_dropout_is_off_in_every_pass(tiny_tokenizer, tiny_model):
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    policy, optimizer = make(model)
    config = replace(SMALL, epochs=1, minibatch_size=6)
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, config)
    assert torch.equal(found.logp, found.ref_logp)
    assert ppo.update(policy, found, config, optimizer)["ratio"] == 1
    assert not any(module.training for module in policy.modules())


def test_temperature_is_in_every_log_probability(tiny_model, tiny_tokenizer):
    policy, _ = make(tiny_model())
    cold = replace(SMALL, temperature=0.01)
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, cold)
    greedy = policy.model.generate(
        torch.from_numpy(found.ids[0][: -int(found.lengths[0])])[None], do_sample=False,
        max_new_tokens=8, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    assert greedy[0].tolist() == found.ids[0].tolist()
    assert found.logp[found.mask].exp().mean() > 0.9  # at temperature 1 it is about 1 / 50
    assert torch.equal(found.logp, found.ref_logp)


def test_the_end_is_looked_for_in_the_response_only(tiny_model, tiny_tokenizer, monkeypatch):
    replies = [[7, 8, 9], [7, 1], [1], [8], [9, 9, 1], [7]]
    monkeypatch.setattr(sampling, "sample", lambda *args, **options: replies)
    policy, _ = make(tiny_model())
    prompts = [text + "<|end|>" for text in PROMPTS]
    found = ppo.rollout(policy, tiny_tokenizer, prompts, length_reward, SMALL)
    assert found.ended.tolist() == [False, True, True, False, True, False]
    assert found.lengths.tolist() == [3, 2, 1, 1, 3, 1]  # the end token is an action, too
    assert found.responses[2] == "" and "<|end|>" not in found.responses[1]
    metrics = found.metrics()
    assert metrics["end_rate"] == 0.5 and metrics["length"] == pytest.approx(11 / 6)
    assert metrics["empty_rate"] == pytest.approx(1 / 6)


# Adapters


def test_with_adapters_the_reference_is_the_model_without(tiny_model, tiny_tokenizer):
    base = tiny_model()
    model = lora.attach(tiny_model(), lora.LoraConfig(rank=4)).eval()
    policy, _ = make(model)
    assert policy.reference is None
    before = weights_of(model)
    result = trained(model, tiny_tokenizer, replace(SMALL, learning_rate=1e-2))
    assert result.history[0]["kl"] == 0 and result.history[2]["kl"] > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("lora" not in name)
    found = ppo.rollout(make(model)[0], tiny_tokenizer, PROMPTS, length_reward, SMALL)
    for i, length in enumerate(found.lengths.tolist()):
        ids = torch.from_numpy(found.ids[i])[None]
        expected = token_logps(base(ids).logits, ids)[0, -length:].detach()
        torch.testing.assert_close(found.ref_logp[i, :length], expected, atol=1e-5, rtol=1e-4)
        assert (found.logp[i, :length] - expected).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_soft_prompt_is_refused(tiny_model):
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="model: expected one without a soft prompt"):
        PolicyWithValue(get_peft_model(tiny_model(), config))
    with pytest.raises(ValueError, match="model: expected weights that train"):
        PolicyWithValue(tiny_model().requires_grad_(False))


# Updates


def test_each_pass_takes_every_row_once_in_a_new_order(tiny_model, tiny_tokenizer, monkeypatch):
    config = replace(SMALL, epochs=4, batch_size=6, minibatch_size=2)
    policy, optimizer = make(tiny_model())
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, length_reward, config)
    taken, batch = [], policy.batch

    def spy(ids, lengths, rows):
        taken.append(sorted(int(i) for i in rows))
        return batch(ids, lengths, rows)

    monkeypatch.setattr(policy, "batch", spy)
    ppo.update(policy, found, config, optimizer)
    passes = [taken[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(sum(p, [])) == [0, 1, 2, 3, 4, 5] for p in passes)
    assert len({str(sorted(p)) for p in passes}) >= 3


def test_the_gradient_is_clipped_after_it_is_measured(tiny_model, tiny_tokenizer):
    config = replace(SMALL, epochs=1, minibatch_size=6, value_coefficient=100.0)
    policy, optimizer = make(tiny_model())
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, lambda p, r: [1e3] * 6, config)
    assert ppo.update(policy, found, config, optimizer)["gradient_norm"] > 100
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1.0, abs=1e-3)


def test_advantages_are_whitened_over_the_rollout(tiny_model, tiny_tokenizer, monkeypatch):
    """Minibatches of one row: whitened by themselves, each would have mean 0."""
    config, met = replace(SMALL, epochs=1, minibatch_size=1, lam=1.0, beta=0.0), []
    policy, optimizer = make(tiny_model())
    scores = [0.0, 0.0, 0.0, 9.0, 9.0, 9.0]
    found = ppo.rollout(policy, tiny_tokenizer, PROMPTS, lambda p, r: scores, config)
    loss = ppo.policy_loss
    monkeypatch.setattr(ppo, "policy_loss", lambda *a: met.append(a[2][a[3]]) or loss(*a))
    ppo.update(policy, found, replace(config, missing_end_penalty=0.0), optimizer)
    assert torch.cat(met).mean().abs() < 1e-5
    assert met[0].mean() < -0.5 < 0.5 < met[5].mean()


def test_adam_and_a_rate_that_falls_to_0(tiny_model, tiny_tokenizer, monkeypatch):
    made, real = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: made.append(real(*a, **k)) or made[0])
    result = trained(tiny_model(), tiny_tokenizer, replace(SMALL, steps=4, learning_rate=0.4e-3))
    rates = [entry["learning_rate"] for entry in result.history]
    assert rates == pytest.approx([0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3])
    assert made[0].defaults["eps"] == 1e-5 and made[0].defaults["weight_decay"] == 0


def test_beta_is_adapted_only_with_a_target(tiny_model, tiny_tokenizer):
    config = replace(SMALL, learning_rate=1e-2, kl_horizon=6, beta=0.1)
    fixed = trained(tiny_model(), tiny_tokenizer, config)
    assert [entry["beta"] for entry in fixed.history] == [0.1] * 3
    run = trained(tiny_model(), tiny_tokenizer, replace(config, kl_target=1e-3))
    betas = [entry["beta"] for entry in run.history]
    # no divergence yet at the first step, much at the second
    assert betas == pytest.approx([0.1, 0.08, 0.08 * 1.2])
    losses = [[entry["loss"] for entry in result.history] for result in (fixed, run)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]  # it is used, too


# The loop


def test_it_learns_what_is_rewarded(tiny_model, tiny_tokenizer):
    """Rewarded is each letter e, which few random tokens have."""
    config = PPOConfig(steps=12, batch_size=32, minibatch_size=16, max_new_tokens=8, beta=0.0,
                       template="plain", learning_rate=3e-3, missing_end_penalty=0.0)  # fmt: skip
    seen = []

    def reward(prompts, responses):
        return [float(response.count("e")) for response in responses]

    result = trained(tiny_model(), tiny_tokenizer, config, reward, PROMPTS,
                     on_rollout=lambda rollout, metrics: seen.append(rollout))  # fmt: skip
    assert result.history[-1]["reward"] > 4 * (result.history[0]["reward"] + 0.2)
    assert result.history[-1]["kl"] > 0.5 and result.steps == 12 and result.stopped == ""
    assert seen[-1].responses and seen[-1].rows[0] == {"prompt": seen[-1].prompts[0]}


def test_the_penalty_keeps_near_the_reference(tiny_model, tiny_tokenizer):
    config = replace(SMALL, steps=8, learning_rate=3e-4, batch_size=24, minibatch_size=12, epochs=4)
    free, in_reward, in_loss = (
        trained(tiny_model(), tiny_tokenizer, replace(config, beta=beta, kl_in_loss=inside))
        for beta, inside in ((0.0, False), (1.0, False), (1.0, True))
    )
    for held in (in_reward, in_loss):
        assert held.history[-1]["kl"] < 0.5 * free.history[-1]["kl"]


def test_rows_texts_and_what_the_reward_sees(tiny_model, tiny_tokenizer):
    seen = []

    def reward(prompts, responses, rows):
        seen.extend(zip(prompts, rows, strict=True))
        return [0.0] * len(responses)

    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS)]
    config = replace(SMALL, steps=2, template="chat")
    logged = []
    trained(tiny_model(), tiny_tokenizer, config, reward, rows,
            log=lambda metrics, step: logged.append((step, metrics)))  # fmt: skip
    assert all(prompt == PROMPTS[row["number"]] for prompt, row in seen)
    for part in (seen[:6], seen[6:]):  # each time round all prompts, in another order
        assert sorted(row["number"] for _, row in part) == list(range(6))
    assert [row["number"] for _, row in seen[:6]] != [row["number"] for _, row in seen[6:]]
    wanted = {"reward", "kl", "entropy", "length", "end_rate", "clip_fraction", "ratio", "beta",
              "approximate_kl", "explained_variance", "seconds_sample", "seconds_update"}  # fmt: skip
    assert [step for step, _ in logged] == [1, 2] and wanted <= set(logged[0][1])


def test_the_model_comes_out_as_it_went_in(tiny_model, tiny_tokenizer):
    model = tiny_model().train()
    attention, before = model.config._attn_implementation, weights_of(model)
    state = torch.random.get_rng_state()
    trained(model, tiny_tokenizer, SMALL)
    assert model.training and model.config._attn_implementation == attention
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def timeless(history):
    return [{k: v for k, v in entry.items() if "seconds" not in k} for entry in history]


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_is_the_run(tiny_model, tiny_tokenizer, tmp_path, adapters):
    """Stopped by its reward in the fourth step, and resumed from the checkpoint of the second."""
    config = replace(SMALL, steps=5, save_steps=2, kl_target=0.1, kl_horizon=20)

    def fresh():
        torch.manual_seed(0)
        return lora.attach(tiny_model(), lora.LoraConfig(rank=2)) if adapters else tiny_model()

    def fails_late(prompts, responses):
        calls.append(1)
        return length_reward(prompts, responses) if len(calls) < 4 else [NAN] * 6

    whole, part, calls = fresh(), fresh(), []
    expected = trained(whole, tiny_tokenizer, config, output_dir=tmp_path / "whole")
    with pytest.raises(ValueError, match="finite number, got nan; prompt '.*', response '"):
        trained(part, tiny_tokenizer, config, fails_late, output_dir=tmp_path / "part")
    assert [f.name for f in (tmp_path / "part").iterdir()] == ["checkpoint-2"]
    resumed = fresh()
    found = trained(resumed, tiny_tokenizer, replace(config, resume=str(tmp_path / "part")),
                    output_dir=tmp_path / "part")  # fmt: skip
    assert timeless(found.history) == timeless(expected.history)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    files = {f.suffix for f in tmp_path.rglob("*") if f.is_file()}
    assert files == {".safetensors", ".json"}
    assert {f.name for f in (tmp_path / "whole").iterdir()} == {"checkpoint-4", "checkpoint-5"}


def test_what_cannot_be_resumed(tiny_model, tiny_tokenizer, tmp_path):
    config = replace(SMALL, steps=2, save_steps=1)
    model = tiny_model()
    trained(model, tiny_tokenizer, config, output_dir=tmp_path)
    again = replace(config, resume=str(tmp_path))
    with pytest.raises(ValueError, match="other frozen weights"):  # the reference has moved
        trained(model, tiny_tokenizer, again, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"written with beta = 0.05, got 0.5"):
        trained(tiny_model(), tiny_tokenizer, replace(again, beta=0.5), output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"written with model.*, got None"):
        trained(tiny_model("gpt2"), tiny_tokenizer, again, output_dir=tmp_path)
    with pytest.raises(ValueError, match="output_dir: expected a folder without checkpoints"):
        trained(tiny_model(), tiny_tokenizer, config, output_dir=tmp_path)
    (tmp_path / "checkpoint-2" / "state.json").unlink()  # half written: the one before is taken
    seen = []
    trained(tiny_model(), tiny_tokenizer, again, output_dir=tmp_path,
            log=lambda metrics, step: seen.append(step))  # fmt: skip
    assert seen == [2]
    (tmp_path / "checkpoint-2" / "state.json").unlink()
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match="resume: expected a folder"):
        trained(tiny_model(), tiny_tokenizer, again, output_dir=tmp_path)


def test_only_a_runs_own_earlier_checkpoints_are_removed(tiny_model, tiny_tokenizer, tmp_path):
    """A greater step in a folder below it, of another run, stays, and so does the newest."""
    config = replace(SMALL, steps=3, save_steps=1)
    for folder in (tmp_path / "other", tmp_path):
        trained(tiny_model(), tiny_tokenizer, config, output_dir=folder)
        assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert (tmp_path / "other" / "checkpoint-3" / "state.json").exists()


def test_the_kl_that_is_logged_is_k3_summed_over_a_response(tiny_model, tiny_tokenizer):
    """mean over responses of sum over tokens of q/p - 1 - log(q/p), q the reference."""
    seen = []
    config = replace(SMALL, steps=2, learning_rate=1e-2)
    result = trained(tiny_model(), tiny_tokenizer, config,
                     on_rollout=lambda rollout, metrics: seen.append(rollout))  # fmt: skip
    logp, ref_logp, mask = seen[1].logp, seen[1].ref_logp, seen[1].mask
    sums = {"kl": [], "kl_k1": []}
    for p, q, kept in zip(logp, ref_logp, mask, strict=True):
        log_ratio = [(b - a).item() for a, b in zip(p[kept], q[kept], strict=True)]
        sums["kl"].append(sum(math.exp(x) - 1 - x for x in log_ratio))
        sums["kl_k1"].append(sum(-x for x in log_ratio))
    for name, values in sums.items():
        assert result.history[1][name] == pytest.approx(sum(values) / 6, rel=1e-4, abs=1e-5)
    assert result.history[1]["kl"] > 0.01


def test_a_gradient_that_is_not_finite_leaves_no_checkpoint(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model()
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="step 1: expected a finite"):
        trained(model, tiny_tokenizer, replace(SMALL, epochs=1, minibatch_size=6, save_steps=1),
                output_dir=tmp_path)  # fmt: skip
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_checkpoint_that_cannot_be_written(tiny_model, tiny_tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir: could not write .*checkpoint-1"):
        trained(tiny_model(), tiny_tokenizer, replace(SMALL, save_steps=1),
                output_dir=tmp_path / "file")  # fmt: skip


# Bad input and faults


def test_beyond_the_limit_the_run_stops_and_says_so(tiny_model, tiny_tokenizer, caplog):
    config = replace(SMALL, steps=20, learning_rate=1e-2, kl_limit=0.5, beta=0.0)
    result = trained(tiny_model(), tiny_tokenizer, config)
    assert 1 < result.steps < 20 and result.history[-1]["kl"] > 0.5
    assert all(entry["kl"] <= 0.5 for entry in result.history[:-1])
    assert "kl_limit 0.5" in result.stopped and result.stopped in caplog.text
    assert "ratio" not in result.history[-1]  # nothing was learned from the last rollout


@pytest.mark.parametrize(
    ("reply", "kind"), [([1], "all 6 responses are empty"), ([7, 8], "no response ended within 8")]
)
def test_responses_all_empty_or_none_ending_are_reported_once(
    tiny_model, tiny_tokenizer, monkeypatch, caplog, reply, kind
):
    monkeypatch.setattr(sampling, "sample", lambda model, prompts, *a, **k: [reply] * len(prompts))
    result = trained(tiny_model(), tiny_tokenizer, SMALL)
    assert len(result.notes) == 1 and f"step 1: {kind}" in result.notes[0]
    assert caplog.text.count(kind) == 1 and result.steps == 3


def test_a_loss_that_is_not_finite(tiny_model, tiny_tokenizer):
    config = replace(SMALL, learning_rate=1e30)
    with pytest.raises((FloatingPointError, ValueError), match="finite"):
        trained(tiny_model(), tiny_tokenizer, config)


def test_what_cannot_work_is_refused_before_any_work(tiny_model, make_tokenizer, tiny_tokenizer):
    def never(prompts, responses):
        raise AssertionError("asked")

    with pytest.raises(ValueError, match="pad_token: expected a pad token that differs"):
        trained(tiny_model(), make_tokenizer(pad_token="<|end|>"), SMALL, never)
    with pytest.raises(ValueError, match="prompts: prompt 1: expected 1 to 248 tokens"):
        trained(tiny_model(), tiny_tokenizer, SMALL, never, ["a", "long " * 300])
    with pytest.raises(ValueError, match="save_steps: expected an output_dir"):
        trained(tiny_model(), tiny_tokenizer, replace(SMALL, save_steps=1), never)


def test_half_precision_weights_are_warned_of(tiny_model, tiny_tokenizer, caplog):
    trained(tiny_model().bfloat16(), tiny_tokenizer, replace(SMALL, steps=1))
    assert "half precision" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", 2.5), ("epochs", 5), ("minibatch_size", 48), ("beta", -0.1),
     ("temperature", 0), ("lam", 1.1), ("gamma", -0.1), ("clip", 0), ("kl_limit", 0),
     ("kl_target", NAN), ("learning_rate", math.inf), ("template", "x"), ("precision", "fp8"),
     ("max_new_tokens", 0), ("seed", -1), ("save_steps", -1), ("missing_end_penalty", -1)],
)  # fmt: skip
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        PPOConfig(**{name: value})


# Several processes

SCRIPT = textwrap.dedent("""
    import json, sys, torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from labkit.techniques import ppo
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    folder, out = sys.argv[1:]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    config = ppo.PPOConfig(steps=3, batch_size=6, minibatch_size=3, epochs=2, max_new_tokens=8,
                           template="plain", learning_rate=1e-3)
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
    """Shares of 2 and 1 rows a minibatch: means of means would not be the mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, out, script = tiny_folder(), tmp_path / "out", tmp_path / "script.py"
    alone = AutoModelForCausalLM.from_pretrained(folder)
    start = weights_of(alone)
    expected = trained(alone, AutoTokenizer.from_pretrained(folder))
    script.write_text(SCRIPT)
    (tmp_path / "out.prompts").write_text(json.dumps(PROMPTS))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*run, script, folder, out], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    together = AutoModelForCausalLM.from_pretrained(out)
    for (name, p), q in zip(alone.named_parameters(), together.parameters(), strict=True):
        moved = (p - start[name]).abs().max()
        assert moved > 1e-3 and (p - q).abs().max() < 0.02 * moved, name
    history = json.loads((tmp_path / "out.json").read_text())
    for found, entry in zip(timeless(history), timeless(expected.history), strict=True):
        assert found == pytest.approx(entry, rel=1e-3, abs=1e-4)
    for process in ("0", "1"):
        assert "reward: raised ZeroDivisionError" in (tmp_path / f"out.{process}").read_text()


def test_processes_that_do_not_know_of_each_other(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected 2 processes to work together, got 1"):
        trained(tiny_model(), tiny_tokenizer)
