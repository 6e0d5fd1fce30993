"""Asking a reward: what it is given, and which text is named when it fails."""

import numpy as np
import pytest
import torch

from labkit.rewards import ask

PROMPTS, RESPONSES = ["one", "two", "three"], ["a", "bb", "ccc"]
ROWS = [{"prompt": prompt, "extra": i} for i, prompt in enumerate(PROMPTS)]


def lengths(prompts, responses):
    return [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_numbers_of_any_kind(kind):
    found = ask(lambda p, r: kind(lengths(p, r)), PROMPTS, RESPONSES, ROWS)
    assert found == [4.0, 5.0, 8.0] and all(type(x) is float for x in found)


def test_rows_for_those_who_ask():
    def reward(prompts, responses, rows):
        return [row["extra"] for row in rows]

    assert ask(reward, PROMPTS, RESPONSES, ROWS) == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "x"])
def test_no_finite_number(bad):
    with pytest.raises(ValueError, match="finite number, got .*prompt 'two', response 'bb'"):
        ask(lambda p, r: [1.0, bad, 2.0], PROMPTS, RESPONSES, ROWS)


def test_wrong_count():
    with pytest.raises(ValueError, match="expected 3 numbers.* got 2; .*'one'.*'a'"):
        ask(lambda p, r: [1.0, 2.0], PROMPTS, RESPONSES, ROWS)


def test_the_row_that_raises_is_named():
    def reward(prompts, responses, rows):
        return [1 / (row["extra"] - 2) for row in rows]

    with pytest.raises(RuntimeError, match="ZeroDivisionError.*'three'.*'ccc'") as caught:
        ask(reward, PROMPTS, RESPONSES, ROWS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "reward", [lambda p, r: None, lambda p, r: 1.0, lambda p, r: (1 / (len(x) - 2) for x in r)]
)
def test_what_is_no_list_of_numbers_is_named_too(reward):
    """Nothing, a single number, and a generator that fails when it is read."""
    with pytest.raises(RuntimeError, match="reward: raised .*Error: .*prompt '(one|two)'"):
        ask(reward, PROMPTS, RESPONSES, ROWS)
    with pytest.raises((RuntimeError, ValueError), match="prompt 'one', response 'a'"):
        ask(lambda p, r: torch.tensor(1.0), PROMPTS, RESPONSES, ROWS)
    with pytest.raises(ValueError, match=r"finite number, got \[1.0, 2.0\]; prompt 'one'"):
        ask(lambda p, r: torch.tensor([[1.0, 2.0]] * 3), PROMPTS, RESPONSES, ROWS)


def test_a_reward_that_fails_on_batches_only():
    def reward(prompts, responses):
        if len(prompts) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RuntimeError, match="too many.*'one'"):
        ask(reward, PROMPTS, RESPONSES, ROWS)
