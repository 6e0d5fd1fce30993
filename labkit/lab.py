"""What the notebooks on fine-tuning repeat: a training that is timed, scores of several models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from . import evaluation, tinytown
from .record import Run
from .show import Table, samples
from .templates import Row, prompt_text
from .training import TrainConfig, TrainResult, fit, sft_loss


def tune(
    run: Run,
    network: Any,
    examples: Any,
    main: bool = False,
    eval_examples: Any = None,
    **config: Any,
) -> TrainResult:
    """SFT of what trains in `network`, by `TrainConfig`'s fields; the run has the time it took.

    The `main` training of a notebook is logged, and has its checkpoints in the run's folder. The
    loss of `eval_examples` is shown beside that of training.
    """
    more: dict[str, Any] = {"log": run.log, "output_dir": run.path("checkpoints")} if main else {}
    more |= {"eval_examples": eval_examples}
    with run.timed("training"):
        return fit(network, examples, sft_loss, TrainConfig(**config), **more)


class Scores:
    """Accuracies of models on the same questions, and their loss (nats per response token).

    `asked` names sets of rows; `test` is the first in encoded form. `of` has the numbers of each
    model, which are the run's metrics too, and `answers` its marked responses to the first set.
    """

    def __init__(
        self, run: Run, tokenizer: Any, asked: Mapping[str, list[Row]], test: Any, template: str
    ) -> None:
        self.run, self.tokenizer, self.template = run, tokenizer, template
        self.asked, self.test = asked, test
        self.of: dict[str, dict[str, float]] = {}
        self.answers: dict[str, list[str]] = {}

    def add(self, name: str, network: Any, own_form: bool = False, **more: float) -> None:
        """Scores a model; `own_form`: asked as Tinytown's base knows questions, without the loss.

        `more` are numbers of the model that were measured elsewhere.
        """
        template, found = "bare" if own_form else self.template, dict[str, float]()
        with self.run.timed("evaluation"):
            if not own_form:
                found["loss"] = evaluation.held_out_loss(network, self.test)
            for key, rows in self.asked.items():
                rows = tinytown.in_own_form(rows) if own_form else rows
                exact = evaluation.exact(network, self.tokenizer, rows, template=template)
                found[key] = exact.accuracy
                both = zip(rows, exact.marked, strict=True)  # in own form up to the next question
                said = [tinytown.tasks.answer_in_own_form(row, text) for row, text in both]
                self.answers.setdefault(name, said)
        self.of[name], short = found | more, re.sub(r"\W+", "_", name.replace(" = ", "")).lower()
        self.run.metric(**{f"{key}_{short}": value for key, value in self.of[name].items()})

    def table(self) -> Table:
        rows: list[dict[str, Any]] = []
        for name, found in self.of.items():
            shown = {k: f"{v:.1%}" if k in self.asked else v for k, v in found.items()}
            rows.append({"model": name} | shown)
        return self.run.table("scores", rows)

    def samples(self, *names: str) -> Table:
        """Answers of these models, as far as they were scored, to some of the first questions."""
        answers = {name: self.answers[name] for name in names if name in self.answers}
        return samples(next(iter(self.asked.values())), answers)

    def ask(self, networks: Mapping[str, Any]) -> Any:
        """A box: the models, by name, answer what the reader types; some questions are offered."""
        from .widgets import ask

        questions = [prompt_text(row) for row in next(iter(self.asked.values()))[:8]]
        return ask(networks, self.tokenizer, questions, template=self.template)
