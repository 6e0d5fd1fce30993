"""The live view, a stop that keeps the model, and cells that are run again."""

import os
import signal

import numpy as np
import pytest

from labkit import progress, training
from labkit.batching import Example
from labkit.techniques import ppo


def copies(count):
    ids = np.array([[3, 20 + n % 7, 30, 4, 20 + n % 7, 30, 1] for n in range(count)])
    return [Example(row, np.arange(7) > 3) for row in ids]


def sft(model, examples, *, max_steps, loss=training.sft_loss, progress=False, **options):
    config = training.TrainConfig(max_steps=max_steps, batch_size=4)
    return training.fit(model, examples, loss, config, progress=progress, **options)


@pytest.fixture
def cells(monkeypatch):
    """As in a notebook: `cells(n)` begins cell n; what is displayed is kept in `cells.shown`."""

    def begin(number):
        for module in (progress, training):
            monkeypatch.setattr(module, "cell", lambda: number)

    def keep(_, data, name, update):
        begin.shown.append((data, name, update))

    begin.shown = []
    monkeypatch.setattr(progress.Live, "_views", [])
    monkeypatch.setattr(progress.Live, "_stop_button", lambda self: None)
    monkeypatch.setattr(progress.Live, "_display", keep)
    return begin


def test_an_interrupt_ends_after_the_step_and_keeps_what_was_learned(cells, tiny_model):
    cells(1)
    before, handler = tiny_model(), signal.getsignal(signal.SIGINT)

    def interrupt(metrics, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    options = dict(max_steps=9, progress=True, label="LoRA")
    model = tiny_model()
    result = sft(model, copies(8), log=interrupt, **options)
    assert result.steps in (3, 4) and f"step {result.steps} of 9" in result.stopped
    assert result.stopped in cells.shown[-1][0]["text/plain"]
    learned = [p.detach().clone() for p in model.parameters()]
    assert any((p != q).any() for p, q in zip(learned, before.parameters(), strict=True))
    assert signal.getsignal(signal.SIGINT) is handler
    whole = sft(tiny_model(), copies(8), **options)  # the cell is run again, with a new model
    assert whole.steps == 9 and not whole.stopped
    common = [entry["loss"] for entry in result.history[:3]]
    assert common == [entry["loss"] for entry in whole.history[:3]]


def test_a_cell_that_is_run_again_does_not_train_on(cells, tiny_model):
    cells(1)
    model = tiny_model()
    for _ in range(2):  # of one cell
        sft(model, copies(8), max_steps=1)
    learned = [p.detach().clone() for p in model.parameters()]
    cells(2)
    with pytest.raises(ValueError, match="trained already"):
        sft(model, copies(8), max_steps=1)
    assert all((p == q).all() for p, q in zip(learned, model.parameters(), strict=True))
    sft(model, copies(8), max_steps=1, loss=lambda m, batch: training.sft_loss(m, batch))
    training.fit(model, copies(8), training.sft_loss, progress=False, again=True)


def test_the_trainings_of_a_cell_share_one_display(cells, tiny_model):
    cells(1)
    for label in ("r = 2", "<b>"):
        sft(tiny_model(), copies(8), max_steps=3, label=label, progress=True)
    names = [what[1:] for what in cells.shown]
    assert set(names) == {("view", False), ("view", True)}  # one is made, the others replace it
    assert names.count(("view", False)) == 1
    last = cells.shown[-1][0]
    lines = [line.split(" · ")[0] for line in last["text/plain"].splitlines()]
    assert lines == ["r = 2: step 3/3", "<b>: step 3/3"]
    page = last["text/html"]
    assert page.count("<polyline") == 2 and "<progress" not in page and "<b>" not in page
    cells(2)
    sft(tiny_model(), copies(8), max_steps=1, progress=True)
    assert "r = 2" not in cells.shown[-1][0]["text/plain"]


def test_ppo_shows_what_it_raises_its_newest_sample_and_stops(cells, tiny_model, tiny_tokenizer):
    cells(1)

    def note(rollout, metrics):
        metrics["gold"] = 0.25
        if len(cells.shown) > 0:
            os.kill(os.getpid(), signal.SIGINT)

    config = ppo.PPOConfig(steps=9, batch_size=4, minibatch_size=4, epochs=1, max_new_tokens=4)
    prompts = ["Where is Mila?", "<i>Who</i> is Otto?"] * 2
    model, options = tiny_model(), dict(on_rollout=note, label="PPO")
    result = ppo.train(model, tiny_tokenizer, prompts, lambda p, r: [0.5] * 4, config, **options)
    assert result.steps == 2 and "step 2 of 9" in result.stopped
    page = cells.shown[-1][0]["text/html"]
    assert all(f'aria-label="{name}, from' in page for name in ("reward", "kl", "gold"))
    assert "newest sample" in page and "<i>" not in page
    cells(2)
    with pytest.raises(ValueError, match="trained already"):
        ppo.train(model, tiny_tokenizer, prompts, lambda p, r: [0.5] * 4, config)
