"""ROUGE-L between short texts, in English and Chinese, and the most similar of many.

    F = 2 LCS(a, b) / (|a| + |b|)     over words, and over characters in Chinese (Lin 2004)

Nothing is stemmed, and signs do not count, as usual: 3 + 4 equals 3 - 4.
The usual tokenizer keeps a-z and 0-9 only: two equal Chinese texts score 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

from rapidfuzz.distance import Indel, LCSseq
from rapidfuzz.process import extractOne

HAN = "\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff"  # Chinese characters and kana, for a [] of `re`
_TOKEN = re.compile(f"[{HAN}]|[^\\W_{HAN}]+")
TOLERANCE = 1e-9  # of a comparison with a threshold


def tokens(text: str) -> list[str]:
    """Words of Latin script, single characters of Chinese; without case and punctuation."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F of two texts, from 0 to 1."""
    x, y = tokens(a), tokens(b)
    return 2 * LCSseq.similarity(x, y) / (len(x) + len(y)) if x and y else 0.0


def language(text: str) -> Literal["en", "zh"]:
    """`zh` if Chinese prevails; a character weighs as much as two letters."""
    chinese = len(re.findall(f"[{HAN}]", text))
    return "zh" if 2 * chinese > len(re.findall("[A-Za-z]", text)) else "en"


class Nearest:
    """Texts in order, to be searched for the most similar one.

    Each is kept as one character per token: its LCS is then bit-parallel, and it is skipped where
    the lengths alone rule it out. Exact: ROUGE-L F is 1 - (insertions + deletions) / (|a| + |b|).
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts: list[str] = []
        self._encoded: list[str] = []
        self._ids: dict[str, str] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        self.texts.append(text)
        self._encoded.append(self._encode(text))

    def find(self, text: str, at_least: float = 0.0) -> tuple[float, str]:
        """ROUGE-L F to the most similar text, and that (the first of equals), or (0, "") if none
        is `at_least` so similar."""
        query, cutoff = self._encode(text), max(at_least, 2 * TOLERANCE) - TOLERANCE
        rouge = Indel.normalized_similarity
        best = extractOne(query, self._encoded, scorer=rouge, score_cutoff=cutoff)
        return (best[1], self.texts[best[2]]) if query and best else (0.0, "")

    def _encode(self, text: str) -> str:
        return "".join(self._ids.setdefault(t, chr(len(self._ids) + 1)) for t in tokens(text))
