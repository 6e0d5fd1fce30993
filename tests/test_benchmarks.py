"""The sweep driver of `benchmarks/`: what is recorded is skipped, learning rates are searched."""

import json
import math
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

from labkit import models, record, sweeps

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(models, "autocast_dtype", models.autocast_dtype)  # which its import sets
    import sweep

    return sweep


def test_a_killed_sweep_goes_on_where_it_stopped(sweep, tmp_path):
    file, measured = tmp_path / "new" / "runs.json", []

    def measure(point, breaks_at=None):
        if point["x"] == breaks_at:
            raise KeyboardInterrupt
        measured.append(point["x"])
        return {"y": 2 * point["x"]}

    points = [{"x": x, "seed": 0} for x in range(4)]
    with pytest.raises(KeyboardInterrupt):
        sweep.run(partial(measure, breaks_at=2), points, file)
    runs = sweep.run(measure, points, file)
    assert measured == [0, 1, 2, 3] and [run["y"] for run in runs] == [0, 2, 4, 6]
    content = json.loads(file.read_text())
    assert content["runs"] == runs and {"hardware", "versions", "commit"} <= set(content)
    assert len(content["base"]) == 16
    assert sweep.run(measure, points[:1], file) == runs and len(measured) == 4


def test_a_file_of_another_base_is_refused(sweep, tmp_path, monkeypatch):
    file = tmp_path / "runs.json"
    sweep.run(lambda point: {}, [{"x": 1}], file)
    before = file.read_text()
    monkeypatch.setattr(sweep.tinytown, "base_checksum", lambda: "another")
    with pytest.raises(ValueError, match="this one is another: move the file away"):
        sweep.run(lambda point: {}, [{"x": 1}, {"x": 2}], file)
    assert file.read_text() == before


def test_results_of_another_base_are_left_out_and_said_to_be_so(monkeypatch, capsys):
    head = record.recorded("lora_rank")
    monkeypatch.setattr(sweeps.tinytown, "base_checksum", lambda: head.get("base"))
    capsys.readouterr()
    record.recorded("lora_rank")
    assert not capsys.readouterr().out
    monkeypatch.setattr(sweeps.tinytown, "base_checksum", lambda: "another")
    assert not record.recorded("lora_rank")["runs"]
    assert "earlier base checkpoint" in capsys.readouterr().out


def test_a_missing_result_is_said_in_one_line(capsys):
    assert record.recorded("no_such_sweep") == {"runs": []}
    assert capsys.readouterr().out.count("\n") == 1


def test_all_sweeps_run_one_after_the_other(sweep, tmp_path, monkeypatch, capsys):
    calls = []

    def run(command, check):
        calls.append(command)
        return Namespace(returncode=1 if "dpo" in command[1] else 0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        sweep.run_all(["lora_rank", "dpo", "rlhf"], seeds=2)
    assert ended.value.code and [Path(c[1]).stem for c in calls] == ["lora_rank", "dpo", "rlhf"]
    assert calls[0][2:] == ["--json", str(BENCHMARKS / "results/lora_rank.json"), "--seeds", "2"]
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "== lora_rank: done",
        "== dpo: failed (1)",
        "== rlhf: done",
    ]


def test_workers_measure_every_point_once(sweep, tmp_path):
    points = [{"x": x} for x in range(5)]
    runs = sweep.run(partial(dict, done=True), points, tmp_path / "runs.json", workers=2)
    assert sorted(run["x"] for run in runs) == list(range(5)) and all(run["done"] for run in runs)


@pytest.mark.parametrize("best, found", [(2.0, 2.0), (8.0, 8.0), (100.0, 16.0), (0.01, 0.25)])
def test_a_learning_rate_is_searched_beyond_the_list_at_most_twice(sweep, tmp_path, best, found):
    def measure(point):
        return {"tuning_loss": abs(math.log(point["learning_rate"] / best)) + point["rank"]}

    args = Namespace(json=tmp_path / "a.json", settings={"rows": 1}, seeds=2, workers=1, only={})
    conditions = {(8,): (8,), (4,): (8,), (0,): 0.3}
    sweep.compare_tuned(measure, ("rank",), {(8,): (1.0, 2.0, 4.0)}, conditions, args)
    compared = [r for r in sweep.runs_in(args.json) if r["stage"] == "compare"]
    assert [(r["rank"], r["learning_rate"]) for r in compared] == [
        (8, found),
        (4, found),
        (0, 0.3),
    ] * 2
    assert [r["seed"] for r in compared] == [0, 0, 0, 1, 1, 1]
    done = sweep.runs_in(args.json)
    sweep.compare_tuned(measure, ("rank",), {(8,): (1.0, 2.0, 4.0)}, conditions, args)
    assert sweep.runs_in(args.json) == done


def test_every_condition_can_have_its_own_rate(sweep, tmp_path):
    def measure(point):
        return {"tuning_loss": abs(math.log(point["learning_rate"] / point["rank"]))}

    args = Namespace(json=tmp_path / "a.json", settings={}, seeds=1, workers=1, only={})
    sweep.compare_tuned(measure, ("rank",), {(1,): (1.0, 2.0), (8,): (4.0, 8.0)}, None, args)
    compared = [r for r in sweep.runs_in(args.json) if r["stage"] == "compare"]
    assert [(r["rank"], r["learning_rate"]) for r in compared] == [(1, 1.0), (8, 8.0)]


def test_what_is_tuned_on_is_never_compared_on(sweep):
    import common

    seeds = (0, 1, 2, sweep.TUNING_SEED)
    points = [{"seed": seed, "test_rows": 50} for seed in seeds]
    compared = [common.questions(point) for point in points]
    tuned = [common.questions(point, tuning=True) for point in points]
    assert all(len(rows) == 50 for rows in (*compared, *tuned))
    keys = [{row["key"] for rows in found for row in rows} for found in (compared, tuned)]
    assert not keys[0] & keys[1]
    assert len({tuple(row["prompt"] for row in rows) for rows in compared}) == len(seeds)


def test_right_answers_are_told_apart_by_question(sweep):
    import common

    from labkit.evaluation import Evaluation

    rows = [{"key": key} for key in "bab"]
    assert common.marks(Evaluation(rows, ["", "", ""], [True, False, False])) == "0 10"


def test_rankings_of_every_size_are_drawn(sweep):
    import reward_noise

    for k in reward_noise.SIZES:
        clean, noisy = (reward_noise.ranked(12, k, noise, seed=0) for noise in (0.0, 0.4))
        assert [len(row["ranks"]) for row in clean] == [k] * 12
        assert [r["responses"] for r in clean] == [r["responses"] for r in noisy]
        assert reward_noise.flipped(clean) == 0 < reward_noise.flipped(noisy)


def test_a_repetition_is_compared_with_what_is_recorded(sweep, tmp_path, capsys):
    def record(name, seeds, shift):
        points = [{"rank": 8, "seed": seed} for seed in seeds]
        sweep.run(lambda p: {"loss": p["seed"] + shift}, points, tmp_path / name)
        return tmp_path / name

    sweep.compare(record("new", [1], 0.5), record("old", [0, 1, 2], 0.0))
    assert "+0.5" in (line := capsys.readouterr().out.splitlines()[-1]) and line.endswith(" 1")


def test_every_recorded_result_has_the_script_that_made_it():
    assert all(
        (BENCHMARKS / f"{f.stem}.py").is_file() for f in BENCHMARKS.glob("results/**/*.json")
    )
