"""Retrieval: the skills and mistakes nearest to each problem, paired by rank, for a whole batch at once.

Lexical, the default, is LanceDB's full-text search: its own tokenizer (English stems, no stop words) and its BM25, with
k1 = 1.2, b = 0.75 and idf = ln(1 + (N - n + ½) / (n + ½)) over the whole bank; but from arrays in memory that are made
once for a version of the bank, since a search costs LanceDB milliseconds whatever the bank's size. A text's similarity
is the share that it has of the largest score that any text could reach for the problem, so it lies in [0, 1) and has
BM25's order (ours; a teacher's weight wants a bounded one). With embeddings it is the cosine.

Shapes: Q problems, N entries, D embedding size, K pairs.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS

from ...contracts.errors import ModelError, SkillError
from ...contracts.skills import BankEntry

K1, B = 1.2, 0.75  # LanceDB's
BLOCK = 64
BATCH = 256  # problems that are scored at once: [BATCH, N] float64 is what retrieval takes of memory


class Embedder(Protocol):
    """As sentence-transformers has it: texts to vectors [N, D]."""

    def encode(self, texts: list[str], /) -> Any: ...


class _Index(Protocol):
    def similarities(self, problems: Sequence[str]) -> np.ndarray:
        """[Q, N], one problem's whatever the others are."""
        ...


@dataclass(frozen=True, slots=True)
class Pairs:
    """One problem's skills and mistakes by falling similarity, and the weights of the pairs, float32 [K], sum 1."""

    skills: tuple[BankEntry, ...]
    mistakes: tuple[BankEntry, ...]
    weights: np.ndarray


class Retriever:
    """Finds among `entries` with `embedder`: "lexical", a sentence-transformers model's name, or an Embedder.

    Raises SkillError without the extra `embeddings`, ModelError where the model does not load.
    """

    def __init__(self, entries: Sequence[BankEntry], embedder: str | Embedder = "lexical") -> None:
        of_kind = {kind: [entry for entry in entries if entry.kind == kind] for kind in ("skill", "mistake")}
        self.entries = [e for part in of_kind.values() for e in sorted(part, key=lambda entry: entry.entry_id)]
        self.skills, self.mistakes = (len(part) for part in of_kind.values())
        texts = [entry.text for entry in self.entries]
        self._index: _Index = _Words(texts) if embedder == "lexical" else _Embeddings(texts, embedder)

    def pairs(self, problems: Sequence[str], k: int) -> list[Pairs]:
        """At most `k` pairs a problem: as many as there are both skills and mistakes.

        Weights are softmax over the pairs of the mean of both similarities, at temperature 1 (SGSD, METHODS.md §4).
        """
        found = []
        for start in range(0, len(problems), BATCH):
            for row in self._index.similarities(problems[start : start + BATCH]):
                skills, mistakes = self._best(row, "skill", k), self._best(row, "mistake", k)
                pairs = min(len(skills), len(mistakes))
                skills, mistakes = skills[:pairs], mistakes[:pairs]
                weights = _softmax((row[skills] + row[mistakes]) / 2)
                found.append(Pairs(self._named(skills), self._named(mistakes), weights.astype(np.float32)))
        return found

    def search(self, problem: str, k: int, kind: str) -> list[tuple[BankEntry, float]]:
        """The `k` entries of a kind that are nearest to a text, with their similarities."""
        row = self._index.similarities([problem])[0]
        return [(self.entries[i], float(row[i])) for i in self._best(row, kind, k)]

    def _best(self, row: np.ndarray, kind: str, k: int) -> np.ndarray:
        """Where in `row` the k largest of a kind are, the largest first; equal ones by id."""
        if kind == "skill":
            return _largest(row[: self.skills], k)
        return self.skills + _largest(row[self.skills :], k)

    def _named(self, rows: np.ndarray) -> tuple[BankEntry, ...]:
        return tuple(self.entries[i] for i in rows)


class _Words:
    """BM25 over the words of N texts, by word: the texts that have it, and what it adds to their scores."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = len(texts)
        words = tokenize(texts)
        lengths = np.array([len(text) for text in words], np.float64)
        norms = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0)) if len(texts) else lengths
        postings: dict[str, list[tuple[int, int]]] = {}
        for i, text in enumerate(words):
            for word, times in Counter(text).items():
                postings.setdefault(word, []).append((i, times))
        self.idf = {word: float(np.log1p((len(texts) - len(p) + 0.5) / (len(p) + 0.5))) for word, p in postings.items()}
        self.postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, posting in postings.items():
            rows, times = np.array(posting).T
            self.postings[word] = rows, self.idf[word] * (K1 + 1) * times / (times + norms[rows])

    def similarities(self, problems: Sequence[str]) -> np.ndarray:
        return np.stack([self._row(Counter(w for w in words if w in self.idf)) for words in tokenize(problems)])

    def _row(self, words: Counter[str]) -> np.ndarray:
        if not words:
            return np.zeros(self.texts)
        rows = np.concatenate([self.postings[word][0] for word in words])
        scores = np.concatenate([times * self.postings[word][1] for word, times in words.items()])
        return np.bincount(rows, scores, self.texts) / ((K1 + 1) * sum(n * self.idf[w] for w, n in words.items()))


class _Embeddings:
    """Cosines of embeddings."""

    def __init__(self, texts: Sequence[str], embedder: str | Embedder) -> None:
        self.embedder = _load(embedder) if isinstance(embedder, str) else embedder
        self.vectors_ND = self._unit(texts) if texts else np.zeros((0, 1), np.float32)

    def similarities(self, problems: Sequence[str]) -> np.ndarray:
        if not len(self.vectors_ND):
            return np.zeros((len(problems), 0), np.float32)
        return self._unit(problems) @ self.vectors_ND.T

    def _unit(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.asarray(self.embedder.encode(list(texts)), np.float32)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@cache
def _load(name: str) -> Embedder:
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError:
        remedy = "pip install 'tutorloop[embeddings]', or skills.embedder=lexical, which needs none"
        raise SkillError("a model's embeddings need sentence-transformers", f"embedder {name!r}", remedy) from None
    try:
        return SentenceTransformer(name)
    except (OSError, ValueError) as error:
        remedy = "check the name; offline, give the model's folder"
        raise ModelError("skills.embedder is a sentence-transformers model", f"{name!r}: {error}", remedy) from error


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text as LanceDB's full-text search has them.

    A call costs LanceDB 0.3 ms, so the texts go as one, parted by a word that no text can know.
    """
    parting = f"x{secrets.token_hex(16)}0"
    parted: list[list[str]] = [[]]
    for token in _tokenizer().tokenize(f"\n{parting}\n".join(texts), column="text"):
        if token.text == parting:
            parted.append([])
        else:
            parted[-1].append(token.text)
    return parted[: len(texts)]


@cache
def _tokenizer() -> Any:
    """An empty table in memory, whose index has the tokenizer."""
    table: Any = lancedb.connect("memory://").create_table("texts", schema=pa.schema({"text": pa.string()}))
    table.create_index("text", config=FTS())
    return table


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, falling; equal ones in their order. The k-th of the blocks' maxima bounds them."""
    enough = np.arange(len(values))
    if len(values) > k * BLOCK:
        maxima = np.maximum.reduceat(values, enough[::BLOCK])
        enough = np.flatnonzero(values >= np.partition(maxima, -k)[-k])
    return enough[np.argsort(-values[enough], kind="stable")[:k]]


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(initial=-np.inf))
    return powers / powers.sum()
