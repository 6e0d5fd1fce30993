"""Blind A/B rating: which of two models' responses is better, by people, in a notebook.

Which response is A is drawn at random for each pair and rater. Each vote is one JSON line that
names the winner, whatever side it stood on; a file that is there is gone on with. Such a file is
also a data set of preferences, as `labkit.data.load` reads it, without ties and skipped pairs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets
from anywidget import AnyWidget

from labkit.files import write_text
from labkit.templates import prompt_text

if TYPE_CHECKING:  # judging brings PyTorch, and who votes should not wait for it
    from labkit.judging import Kappa, Verdict

VOTES = ("A", "B", "tie", "both bad", "skip")
Vote = dict[str, Any]  # one line: what was shown (A first), what was voted, and the winner's name


class Ballot:
    """Pairs of responses to vote on, one rater's votes, and the file that holds them.

    prompts: texts or lists of messages. responses: two models' responses by name. Raises
    ValueError for anything else, and for a file that holds no votes.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        responses: Mapping[str, Sequence[str]],
        file: str | Path,
        rater: str = "",
    ) -> None:
        counts = {name: len(r) for name, r in responses.items()}
        if len(counts) != 2 or {*counts.values()} != {len(prompts)} or not len(prompts):
            expected = f"two models with {len(prompts)} responses each, and at least one"
            raise ValueError(f"responses: expected {expected}, got {counts}")
        self.models, self.file, self.rater = list(responses), Path(file).expanduser(), rater
        self.pairs: list[Vote] = []
        for prompt, *texts in zip(prompts, *responses.values(), strict=True):
            shown = [prompt, sorted(zip(self.models, texts, strict=True))]
            names = [blake2b(json.dumps([shown, *by]).encode()).digest() for by in ([], [rater])]
            order = [0, 1] if names[1][0] % 2 else [1, 0]
            sides = {"responses": [texts[i] for i in order]}
            sides["models"] = [self.models[i] for i in order]
            self.pairs.append({"pair": names[0][:8].hex(), "prompt": prompt} | sides)
        self._votes = read(self.file) if self.file.exists() else []
        if self.file.exists() and not self.file.read_bytes().endswith(b"\n"):
            self._save()  # without the line that a killed process left unfinished
        self._since = time.monotonic()

    def _mine(self) -> dict[str, Vote]:
        """This rater's votes on these pairs, in the order in which they were cast."""
        names = {pair["pair"] for pair in self.pairs}
        votes = [v for v in self._votes if v["rater"] == self.rater and v["pair"] in names]
        return {vote["pair"]: vote for vote in votes}

    @property
    def current(self) -> int:
        """The index of the first pair without a vote; the number of pairs when all have one."""
        votes = self._mine()
        waiting = (i for i, pair in enumerate(self.pairs) if pair["pair"] not in votes)
        return next(waiting, len(self.pairs))

    def vote(self, choice: str) -> None:
        """One of `VOTES` on the current pair, added to the file."""
        if choice not in VOTES or self.current == len(self.pairs):
            expected = f"one of {', '.join(VOTES)} on a pair"
            raise ValueError(f"choice: expected {expected}, got {choice!r}")
        pair = self.pairs[self.current]
        winner = pair["models"]["AB".index(choice)] if choice in ("A", "B") else None
        vote = pair | {"vote": choice, "winner": winner, "rater": self.rater}
        vote["seconds"] = round(time.monotonic() - self._since, 1)
        vote["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(vote) + "\n")
        self._votes.append(vote)
        self._since = time.monotonic()

    def undo(self) -> None:
        """Takes this rater's last vote out of the file, so that its pair is the current one."""
        if mine := list(self._mine().values()):
            self._votes = [vote for vote in read(self.file) if vote != mine[-1]]
            self._save()
            self._since = time.monotonic()

    def _save(self) -> None:
        write_text(self.file, "".join(json.dumps(vote) + "\n" for vote in self._votes))

    def verdicts(self) -> list[Verdict]:
        """For each pair, as in `labkit.judging`: 1 where the first model won, None if skipped."""
        votes = self._mine()
        return [_verdict(votes.get(pair["pair"]), self.models[0]) for pair in self.pairs]


def _verdict(vote: Vote | None, model: str) -> Verdict:
    if vote is None or vote["vote"] == "skip":
        return None
    return 0.5 if vote["winner"] is None else float(vote["winner"] == model)


def read(*files: str | Path) -> list[Vote]:
    """The votes in `files`. ValueError names the file and line of what is no vote."""
    votes = []
    for file in map(Path, files):
        for number, line in enumerate(file.read_text("utf-8").split("\n")[:-1], start=1):
            try:
                votes.append(json.loads(line))
                [votes[-1][name] for name in ("pair", "vote", "winner", "models", "rater")]
            except (ValueError, TypeError, KeyError):
                found = f"line {number}: expected a vote, got {line:.80}"
                raise ValueError(f"{file}: {found}") from None
    return votes


def agreement(votes: Sequence[Vote]) -> dict[tuple[str, str], Kappa]:
    """For each two raters how they agree on the pairs that both voted on, and did not skip.

    Both bad counts as a tie. Raises ValueError for fewer than two raters, or no common pair.
    """
    from labkit.judging import kappa

    by: dict[str, dict[str, Verdict]] = {}
    for vote in votes:
        by.setdefault(vote["rater"], {})[vote["pair"]] = _verdict(vote, min(vote["models"]))
    if len(by) < 2:
        raise ValueError(f"votes: expected those of two raters or more, got {[*by]}")
    both = combinations(sorted(by), 2)
    return {(a, b): kappa([by[a].get(p) for p in by[b]], [*by[b].values()]) for a, b in both}


class View(AnyWidget):
    """The browser is told the texts and no names; it sends a vote and the pair it showed."""

    _esm = Path(__file__).with_name("rating.js")
    _css = Path(__file__).with_name("rating.css")
    shown = traitlets.Dict().tag(sync=True)

    def __init__(self, ballot: Ballot) -> None:
        self.ballot, self._turn = ballot, 0
        super().__init__(shown=self._next())
        self.on_msg(self._receive)

    def _next(self, error: str = "") -> dict[str, Any]:
        number, pairs = self.ballot.current, self.ballot.pairs
        shown = {"number": number, "total": len(pairs), "file": str(self.ballot.file)}
        if number < len(pairs):
            prompt = prompt_text(pairs[number])
            shown |= {"prompt": prompt, "responses": pairs[number]["responses"]}
        return shown | {"turn": self._turn, "error": error}

    def _receive(self, _: Any, message: dict[str, Any], __: Any) -> None:
        self._turn, error = self._turn + 1, ""  # what is shown changes: the browser waits
        try:
            if message["number"] != self.ballot.current:
                error = "That vote was on another pair, and is not counted."
            elif message["choice"] == "undo":
                self.ballot.undo()
            else:
                self.ballot.vote(message["choice"])
        except (OSError, ValueError) as failure:
            error = f"Not saved: {failure}"
        self.shown = self._next(error)


def widget(ballot: Ballot) -> View:
    """The ballot to vote on in a notebook, by mouse or by key: A, B, T, X, S, and U for undo."""
    return View(ballot)
