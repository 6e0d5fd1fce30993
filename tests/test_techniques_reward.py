"""Reward model: the loss by hand, where the score is read, parity with TRL, bad rows, faults."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from labkit import tinytown
from labkit.batching import Example, pack
from labkit.evaluation import Agreement, wilson
from labkit.techniques import reward
from labkit.techniques.reward import RewardConfig, RewardModel, Scorer, pack_rankings

EOS = 1
WORDS = ["bread", "honey", "river", "the mill", "pancakes", "seven", "no idea", "Otto", "米拉"]


@pytest.fixture
def network(tiny_model, tiny_tokenizer):
    """Factory of a tiny network with a reward head, for any architecture."""
    return lambda arch="llama", seed=0: reward.with_head(tiny_model(arch), tiny_tokenizer, seed)


def texts(seed=0, lengths=(5, 9, 3, 12)):
    """Examples of random token ids, each ending with EOS; all but the first token a response."""
    draw = np.random.default_rng(seed)
    ids = [np.array([*draw.integers(5, 400, n - 1), EOS]) for n in lengths]
    return [Example(i, np.array([0] + [1] * (len(i) - 1))) for i in ids]


def alone(scorer, examples):
    return torch.cat([scorer(pack([example], packing=False)) for example in examples])


def ranking(k=4, seed=0, prompt="What does Otto like to eat?"):
    """Responses in an order of their own, ranked by their place in WORDS."""
    order = np.random.default_rng(seed).permutation(k).tolist()
    responses, ranks = [WORDS[i] for i in order], [i + 1 for i in order]
    return {"prompt": prompt, "responses": responses, "ranks": ranks}


def pair(**changes):
    return {"prompt": "What is three plus four?", "chosen": "seven", "rejected": "honey"} | changes


def test_worked_example():
    """Scores ln 3, 0 and -ln 3. The odds of the pairs are 3, 9 and 3, to 1.

    So their probabilities are 3/4, 9/10 and 3/4, and the mean loss is -ln(0.75² · 0.9) / 3. The
    other way round, the first pair has the probability 1/4, and one of three is wrong.
    """
    scores = torch.tensor([math.log(3), 0.0, -math.log(3)])
    value, metrics = reward.loss(scores, torch.tensor([[0, 1], [0, 2], [1, 2]]))
    assert value.item() == pytest.approx(-math.log(0.75**2 * 0.9) / 3)
    assert metrics["accuracy"] == 1
    assert metrics["margin"].item() == pytest.approx(4 / 3 * math.log(3))
    value, metrics = reward.loss(scores, torch.tensor([[1, 0], [0, 2], [1, 2]]))
    assert value.item() == pytest.approx(-math.log(0.25 * 0.9 * 0.75) / 3)
    assert metrics["accuracy"].item() == pytest.approx(2 / 3)


def test_only_differences_count_and_huge_ones_stay_finite():
    torch.manual_seed(0)
    scores, pairs = torch.randn(5, requires_grad=True), torch.tensor([[0, 1], [3, 2], [4, 0]])
    value, _ = reward.loss(scores, pairs)
    torch.testing.assert_close(reward.loss(scores + 100, pairs)[0], value, atol=1e-5, rtol=0)
    value.backward()
    assert abs(scores.grad.sum()) < 1e-6 and scores.grad[0] != 0
    value, metrics = reward.loss(torch.full((4,), 7.5), torch.tensor([[0, 1], [2, 3]]))
    assert value.item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0
    scores = torch.tensor([1e4, -1e4], requires_grad=True)
    value, _ = reward.loss(scores, torch.tensor([[1, 0]]))
    value.backward()
    assert value.item() == 2e4 and scores.grad.tolist() == [1, -1]


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_is_the_mean_over_rankings_of_the_mean_over_their_pairs(network, packing):
    """A ranking of two counts as much as one of five; the texts are scored one by one here."""
    scorer = Scorer(network())
    rankings = [texts(1, (4, 9)), texts(2, (7, 3, 11, 5, 30)), texts(3, (6, 6, 6))]
    batch = pack_rankings(rankings, packing)
    assert batch.weight == 3 and batch.tokens == 4 + 9 + 56 + 18 and len(batch.pairs) == 14
    expected = []
    for ranking in rankings:
        r = alone(scorer, ranking).tolist()
        losses = [math.log1p(math.exp(worse - better)) for better, worse in combinations(r, 2)]
        expected.append(sum(losses) / len(losses))
    value, _ = reward.ranking_loss(scorer, batch)
    assert value.item() == pytest.approx(sum(expected) / 3, abs=1e-5)


# The score


@pytest.mark.parametrize("packing", [False, True])
def test_padding_and_packing_do_not_matter(network, arch, packing):
    """Nor what stands under the padding; and the score is not the same for all texts."""
    scorer, examples = Scorer(network(arch)), texts()
    with torch.no_grad():
        expected = alone(scorer, examples)
        assert expected.std() > 1e-3
        for filler in (0, 7, 300):
            found = scorer(pack(examples, packing, pad_id=filler))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_dropout_stays_off(tiny_model, tiny_tokenizer):
    model = tiny_model("gpt2")
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    scorer = Scorer(reward.with_head(model.train(), tiny_tokenizer)).train()
    assert torch.equal(scorer(pack(texts())), scorer(pack(texts())))


def test_scores_are_read_in_float32_under_autocast(network):
    """In bfloat16 scores near 8 would be multiples of 1/32."""
    scorer = Scorer(network())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scorer.network.score.weight *= 100
        scores = scorer(pack(texts(lengths=[9] * 8)))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_the_head_starts_normal(tiny_model, tiny_tokenizer):
    """64 weights of standard deviation 1/√65, for each of 50 seeds: 3,200 draws in all."""
    model = tiny_model()
    state = torch.get_rng_state()
    heads = [reward.with_head(model, tiny_tokenizer, seed).score for seed in range(50)]
    draws = torch.stack([head.weight.detach() for head in heads]) * math.sqrt(64 + 1)
    assert draws.shape == (50, 1, 64) and all(head.bias is None for head in heads)
    assert abs(draws.std() - 1) < 4 / math.sqrt(2 * 3200)
    assert abs(draws.mean()) < 4 / math.sqrt(3200)
    assert torch.equal(torch.get_rng_state(), state)
    again = reward.with_head(model, tiny_tokenizer, 7).score.weight
    assert torch.equal(again, heads[7].weight) and not torch.equal(again, heads[8].weight)


def test_the_model_is_copied(tiny_model, tiny_tokenizer, arch):
    model = tiny_model(arch).bfloat16().requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    network = reward.with_head(model, tiny_tokenizer)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())
    assert network.config is network.base_model.config is not model.config
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not hasattr(model.config, "problem_type") or model.config.num_labels == 2


def test_what_can_carry_no_head_is_refused(tiny_model, tiny_tokenizer, network):
    import peft
    import transformers as tf

    tuned = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM"))
    classifier = peft.get_peft_model(network(), peft.LoraConfig(task_type="SEQ_CLS"))
    two = tf.AutoModelForSequenceClassification.from_config(tiny_model().config)
    sizes = dict(vocab_size=448, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)
    granite = tf.GraniteConfig(hidden_size=64, intermediate_size=64, **sizes)
    ctrl = tf.CTRLConfig(vocab_size=448, n_embd=64, n_layer=1, n_head=4, dff=64)
    others = [tf.AutoModelForCausalLM.from_config(config) for config in (granite, ctrl)]
    reasons = ("merge_and_unload", "merge_and_unload", "one output", "a granite", "a ctrl")
    for model, reason in zip((tuned, classifier, two, *others), reasons, strict=True):
        with pytest.raises(ValueError, match=reason):
            reward.train(model, tiny_tokenizer, [pair()], progress=False)


def test_parity_with_trl(network, tiny_tokenizer, arch, tmp_path):
    """Loss, scores, metrics and gradients of TRL's trainer, on pairs in its own batches."""
    from datasets import Dataset
    from trl import RewardConfig as TrlConfig
    from trl import RewardTrainer

    chosen, rejected = texts(1, (5, 12, 8)), texts(2, (9, 4, 8))
    columns = {"chosen_ids": [e.ids for e in chosen], "rejected_ids": [e.ids for e in rejected]}
    options = dict(use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False)
    theirs, mine = network(arch), network(arch)
    given = dict(processing_class=tiny_tokenizer, train_dataset=Dataset.from_dict(columns))
    trainer = RewardTrainer(theirs, TrlConfig(str(tmp_path), **options), **given)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    expected, outputs = trainer.compute_loss(theirs.train(), dict(inputs), return_outputs=True)
    scores = Scorer(mine)(pack(chosen + rejected))
    torch.testing.assert_close(scores, outputs.logits[:, 0], atol=1e-5, rtol=1e-5)
    value, metrics = reward.loss(scores, torch.tensor([[0, 3], [1, 4], [2, 5]]))
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    for name, metric in metrics.items():
        assert metric.item() == pytest.approx(trainer._metrics["train"][name][-1], abs=1e-5)
    for result in (value, expected):
        result.backward()
    others = dict(theirs.named_parameters())
    scale = max(p.grad.abs().max() for p in others.values())
    assert {n for n, p in mine.named_parameters() if p.grad is not None} == others.keys()
    for name, parameter in mine.named_parameters():
        assert (parameter.grad - others[name].grad).abs().max() < 1e-5 * scale, name


# Rows


def test_best_first(tiny_tokenizer):
    assert reward.best_first(ranking(5)) == WORDS[:5]
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]}
    assert reward.best_first(row) == ["b", "c", "a"]
    message = {"role": "assistant", "content": "seven"}
    assert reward.best_first(pair(chosen=[message])) == ["seven", "honey"]
    two = {"prompt": pair()["prompt"], "responses": ["honey", "seven"], "ranks": [2, 1]}
    assert reward.check([pair()], tiny_tokenizer) == reward.check([two], tiny_tokenizer)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (ranking() | {"ranks": [1, 2, 3]}, "ranks"),
        (ranking() | {"ranks": [1, 2, 2, 3]}, "ranks"),
        (ranking() | {"ranks": [1, 2, 3, 4.5]}, "ranks"),
        (ranking() | {"responses": ["a"], "ranks": [1]}, "responses"),
        (ranking() | {"responses": ["a", " ", "b", "c"], "ranks": [4, 1, 2, 3]}, "responses"),
        (pair(rejected="seven"), "responses"),
        (pair(rejected=None), "chosen and rejected"),
        (pair(prompt=None), "prompt"),
        (pair(chosen=[{"role": "user", "content": "x"}]), "completion"),
    ],
)
def test_rows_that_cannot_work_are_named(tiny_model, network, tiny_tokenizer, row, problem):
    rows = [pair(), row, pair()]
    with pytest.raises(ValueError, match=f"row 2: .*{problem}"):
        reward.train(tiny_model(), tiny_tokenizer, rows, progress=False)
    with pytest.raises(ValueError, match=f"row 2: .*{problem}"):
        reward.evaluate(RewardModel(network(), tiny_tokenizer), rows)


def test_settings_and_data_that_cannot_work(tiny_model, tiny_tokenizer):
    for name, value in (("pairs", "some"), ("max_length", 1), ("learning_rate", 0.0), ("seed", -1)):
        with pytest.raises(ValueError, match=name):
            RewardConfig(**{name: value})
    with pytest.raises(ValueError, match="rows"):
        reward.train(tiny_model(), tiny_tokenizer, [], progress=False)
    with pytest.raises(ValueError, match="template"):
        config = RewardConfig(template="none")
        reward.train(tiny_model(), tiny_tokenizer, [pair()], config, progress=False)


def test_one_pair_of_each_ranking(tiny_model, tiny_tokenizer, monkeypatch):
    """In the ranking's order, fixed by the seed, and every pair comes up at some seed."""
    monkeypatch.setattr(reward.training, "fit", lambda scorer, examples, *a, **k: examples)

    def drawn(**settings):
        found = reward.train(network, tiny_tokenizer, [ranking(4)], RewardConfig(**settings))
        return [example.ids.tobytes() for example in found[1][0]]

    network = reward.with_head(tiny_model(), tiny_tokenizer)
    everything = drawn()
    pairs = [tuple(map(everything.index, drawn(pairs="one", seed=seed))) for seed in range(40)]
    assert len(everything) == 4 and set(pairs) == set(combinations(range(4), 2))
    assert tuple(map(everything.index, drawn(pairs="one", seed=3))) == pairs[3]


def test_texts_are_cut_at_the_beginning(network, tiny_tokenizer, caplog):
    """A BOS stays, the EOS, too."""
    tiny_tokenizer.bos_token = "<|user|>"
    model = RewardModel(network(), tiny_tokenizer, max_length=12)
    long = "米拉住在河边的磨坊里。" * 5
    (first,) = model.scores([long + "a"], ["seven"])
    assert "1 texts" in caplog.text
    assert model.scores(["b" + long + "a"], ["seven"]) == [first]
    assert model.scores([long + "a"], ["honey"]) != [first]
    (ids, mask), bos = model._encode([("<|user|>" + long, "seven<|end|>")])[0], 3
    assert (ids[0], ids[-1], len(ids)) == (bos, EOS, 12) and not mask[0]


def test_texts_that_are_equal_once_cut_teach_nothing(tiny_model, tiny_tokenizer, caplog):
    """Two responses that differ only in what is cut away: their pair would cost log 2 for ever."""
    long = " the mill by the river" * 5
    same = pair(chosen="Otto" + long, rejected="Mila" + long)
    config = RewardConfig(max_length=16, batch_size=2)
    rows = [pair(), same]
    model, result = reward.train(tiny_model(), tiny_tokenizer, rows, config, progress=False)
    assert result.steps == 1 and result.tokens <= 32 and "left out" in caplog.text
    found = reward.evaluate(model, rows)
    assert (len(found.margins), found.rankings) == (1, 1)
    with pytest.raises(ValueError, match="max_length"):
        reward.evaluate(model, [same])


def test_rewards_come_in_order_whatever_the_batches(network, tiny_tokenizer):
    model = RewardModel(network(), tiny_tokenizer, mean=2.0, std=0.5)
    prompts = [f"{word}?" * (i % 4 + 1) for i, word in enumerate(WORDS)]
    responses = [*reversed(WORDS[1:]), ""]
    together = model(prompts, responses)
    for batch_size in (1, 2, 5):
        same = RewardModel(model.network, tiny_tokenizer, mean=2.0, std=0.5, batch_size=batch_size)
        assert same(prompts, responses) == pytest.approx(together, abs=1e-4)
    raw = model.scores(prompts, responses)
    assert together == pytest.approx([(r - 2.0) / 0.5 for r in raw])
    assert np.std(raw) > 1e-3 and all(isinstance(r, float) for r in together)
    assert model([], []) == []
    with pytest.raises(ValueError):
        model(prompts, responses[1:])


def test_a_score_is_that_of_prompt_response_and_eos(network, tiny_tokenizer):
    model = RewardModel(network(), tiny_tokenizer)
    text = "<|user|>What is three plus four?<|end|><|assistant|>seven<|end|>"
    pieces = text.partition("seven")  # the policy's tokens: prompt and response apart
    ids = [i for piece in pieces for i in tiny_tokenizer(piece)["input_ids"]]
    assert ids[-1] == EOS
    (found,) = model.scores(["What is three plus four?"], ["seven"])
    expected = alone(Scorer(model.network), [Example(np.array(ids), np.ones(len(ids)))])
    assert found == pytest.approx(expected.item(), abs=1e-5)
    messages = [{"role": "user", "content": "What is three plus four?"}]
    assert model.scores([messages], ["seven"]) == [found]


def test_normalized_on_reference_samples(network, tiny_tokenizer):
    model = RewardModel(network(), tiny_tokenizer)
    prompts, responses = ["米拉?"] * len(WORDS), WORDS
    normal = model.normalized(prompts, responses)
    rewards = np.array(normal(prompts, responses))
    assert abs(rewards.mean()) < 1e-5 and rewards.std() == pytest.approx(1, abs=1e-5)
    assert (np.argsort(rewards) == np.argsort(model(prompts, responses))).all()
    assert normal.scores(prompts, responses) == model.scores(prompts, responses)
    again = normal.normalized(prompts, responses)
    assert (again.mean, again.std) == (normal.mean, normal.std)
    for same in ([], ["seven"], ["seven", "seven"]):
        with pytest.raises(ValueError, match="responses"):
            model.normalized(["?"] * len(same), same)


def test_saved_and_loaded(network, tiny_tokenizer, tiny_folder, arch, tmp_path):
    from safetensors.torch import load_file, save_file

    model = RewardModel(network(arch), tiny_tokenizer, "plain", 40, mean=0.25, std=2.0)
    prompts, folder = ["Otto?"] * len(WORDS), tmp_path / "reward"
    model.save(folder)
    again = RewardModel.load(folder)
    assert (again.template, again.max_length, again.mean, again.std) == ("plain", 40, 0.25, 2.0)
    assert again(prompts, WORDS) == pytest.approx(model(prompts, WORDS), abs=1e-6)
    model.save(folder)  # replaces it
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="score.weight"):
        RewardModel.load(folder)
    with pytest.raises(FileNotFoundError, match="folder"):
        RewardModel.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="folder"):
        RewardModel.load(tiny_folder())


def test_accuracy_margin_and_loss():
    """Margins ln 3, 0, -ln 3, ln 3: two of four are right, as equal scores prefer nothing."""
    found = Agreement([math.log(3), 0.0, -math.log(3), math.log(3)], rankings=4)
    assert found.accuracy == 0.5 and found.margin == pytest.approx(math.log(3) / 4)
    assert found.loss == pytest.approx(-math.log(0.75 * 0.5 * 0.25 * 0.75) / 4)
    assert found.interval == wilson(2, 4)
    assert Agreement(found.margins * 10, rankings=4).interval == wilson(2, 4)


def test_calibration_of_known_probabilities():
    """Ten pairs at 0.9, nine right; eight at 0.6, of which only two are: |0.25 - 0.6| · 8/18."""
    odds = [math.log(9)] * 9 + [-math.log(9)] + [math.log(1.5)] * 2 + [-math.log(1.5)] * 6
    found = Agreement(odds, rankings=18)
    low, high = found.calibration(bins=2)
    assert (low["predicted"], low["observed"], low["n"]) == (pytest.approx(0.6), 0.25, 8)
    assert (high["predicted"], high["observed"], high["n"]) == (pytest.approx(0.9), 0.9, 10)
    assert (high["low"], high["high"]) == wilson(9, 10)
    assert found.calibration_error(bins=2) == pytest.approx(0.35 * 8 / 18)
    (certain,) = Agreement([80.0, 90.0], rankings=2).calibration()
    assert (certain["predicted"], certain["n"]) == (1.0, 2)


def test_evaluate_compares_all_pairs(network, tiny_tokenizer):
    model, rows = RewardModel(network(), tiny_tokenizer), [ranking(4), pair(), ranking(6, seed=3)]
    found = reward.evaluate(model, rows)
    expected = []
    for row in rows:
        texts = reward.best_first(row)
        scores = model.scores([row["prompt"]] * len(texts), texts)
        expected += [better - worse for better, worse in combinations(scores, 2)]
    assert found.margins == pytest.approx(expected, abs=1e-5)
    assert found.rankings == 3 and len(found.margins) == 6 + 1 + 15


# Training


def preferences(n, seed=0):
    """Whatever is asked, the earlier word of WORDS is better."""
    draw = np.random.default_rng(seed)
    rows = [ranking(*map(int, draw.integers((2, 0), (6, 99))), f"Say {i}.") for i in range(n)]
    return [*rows, *(pair(prompt=f"Tell {i}.", chosen="bread", rejected="seven") for i in range(n))]


@pytest.mark.parametrize("pairs", ["all", "one"])
def test_it_learns_what_is_preferred(tiny_model, tiny_tokenizer, pairs):
    seen, config = [], RewardConfig(pairs=pairs, learning_rate=2e-3, epochs=3.0, batch_size=4)
    options = dict(log=lambda metrics, step: seen.append(step), progress=False)
    model, result = reward.train(tiny_model(), tiny_tokenizer, preferences(12), config, **options)
    assert result.steps == 18 and seen[-1] == 18 and result.loss < 0.2 < result.history[0]["loss"]
    found = reward.evaluate(model, preferences(6, seed=1))
    assert found.accuracy > 0.9 and found.margin > 1 and found.loss < math.log(2)
    assert not model.network.training and all(p.grad is None for p in model.network.parameters())


def test_a_network_with_a_head_is_trained_in_place(network, tiny_tokenizer):
    given, config = network(), RewardConfig(batch_size=2)
    kept = given.score.weight.clone()
    model, _ = reward.train(given, tiny_tokenizer, preferences(4), config, progress=False)
    assert model.network is given and not torch.equal(given.score.weight, kept)


def test_first_step_is_that_of_the_loss(tiny_model, network, tiny_tokenizer):
    """The reported loss of one step over all rows is the one of the untrained head."""
    rows = preferences(5)
    model = RewardModel(network(seed=0), tiny_tokenizer)
    each = [reward.evaluate(model, [row]).loss for row in rows]
    config = RewardConfig(batch_size=len(rows), precision="fp32")
    _, result = reward.train(tiny_model(), tiny_tokenizer, rows, config, progress=False)
    assert result.steps == 1 and result.loss == pytest.approx(sum(each) / len(each), abs=1e-5)


def test_a_killed_run_goes_on(tiny_model, tiny_tokenizer, tmp_path):
    def run(model, log=None, **settings):
        sizes = dict(batch_size=4, epochs=2.0, learning_rate=2e-3, precision="fp32")
        config = RewardConfig(**sizes, **settings)
        options = dict(output_dir=tmp_path, log=log, progress=False)
        return reward.train(model, tiny_tokenizer, preferences(8), config, **options)

    def kill(metrics, step):
        if step == 6:
            raise KeyboardInterrupt

    whole, _ = run(tiny_model())
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model(), kill, save_steps=3)
    again, result = run(tiny_model(seed=5), resume=str(tmp_path))
    assert result.steps == 8
    resumed = dict(again.network.named_parameters())
    for name, parameter in whole.network.named_parameters():
        torch.testing.assert_close(parameter, resumed[name], atol=1e-6, rtol=0)


def test_tinytown_rankings_can_be_read(tiny_tokenizer):
    """Four to nine responses, and the gold judge's order where no label is wrong."""
    rows = tinytown.rankings(30, noise=0.0, seed=0)
    for row, rendered in zip(rows, reward.check(rows, tiny_tokenizer), strict=True):
        gold = dict(zip(row["responses"], row["scores"], strict=True))
        scores = [gold[text] for text in reward.best_first(row)]
        assert scores == sorted(scores, reverse=True) and 4 <= len(rendered) <= 9


def test_gradient_checkpointing_is_refused_by_name(tiny_model, tiny_tokenizer):
    config = reward.RewardConfig(gradient_checkpointing=True)
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4
    with pytest.raises(ValueError, match="gradient_checkpointing: expected False with a Scorer"):
        reward.train(tiny_model(), tiny_tokenizer, rows, config)


def test_a_judge_who_follows_the_scores_is_calibrated():
    """Preferences drawn with the model's own probabilities: the error is that of sampling only."""
    draw = np.random.default_rng(0)
    margins = draw.normal(0, 2, 20_000)
    won = draw.random(20_000) < 1 / (1 + np.exp(-margins))
    found = Agreement(np.where(won, margins, -margins).tolist(), rankings=20_000)
    assert found.calibration_error(bins=10) < 0.01
    assert Agreement([3 * m for m in found.margins], 20_000).calibration_error(bins=10) > 0.05


def test_accumulated_rankings_weigh_the_same(tiny_model, tiny_tokenizer):
    """Seven rankings as 4 + 3 or 6 + 1 are one step over seven: losses and weights equal."""

    def run(size, pieces):
        sizes = dict(batch_size=size, gradient_accumulation=pieces, warmup_ratio=0.0)
        config = RewardConfig(precision="fp32", **sizes)
        rows = preferences(7)[:7]
        model, result = reward.train(tiny_model(), tiny_tokenizer, rows, config, progress=False)
        return model.network.score.weight.detach(), result.loss

    weight, loss = run(7, 1)
    for other, value in (run(4, 2), run(6, 2)):
        torch.testing.assert_close(other, weight, atol=1e-5, rtol=1e-3)
        assert value == pytest.approx(loss, abs=1e-5)


def test_the_language_model_stays_as_it_was(tiny_model, tiny_tokenizer):
    model = tiny_model()
    before = [p.clone() for p in model.parameters()]
    config = RewardConfig(batch_size=2)
    trained, _ = reward.train(model, tiny_tokenizer, preferences(4), config, progress=False)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    kept = trained.network.score.weight.clone()
    more, _ = reward.train(trained.network, tiny_tokenizer, preferences(4), config, progress=False)
    assert more.network is trained.network and not torch.equal(more.network.score.weight, kept)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, tiny_tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.base_model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1"):
        reward.train(model, tiny_tokenizer, preferences(2), progress=False)
