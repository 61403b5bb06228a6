"""Trains the extractor's transformer and its codebook (ours; METHODS.md 8b).

A step's positives are its own un-abstracted view and the step that optimal transport matches it with in the nearest
other solution of its problem, where that is nearer than solutions of other problems: a problem's solutions may be one
strategy in many wordings, or many strategies, of which none should be made to look like another. Its negatives are all
other steps of the batch, of its own solution too, but for those that read the same once they are abstracted. Noise on
what the transformer reads stands for wordings that no solution has.

Shapes: S solutions, B of them in a batch of T steps, M keys, C components, D = 128, K codes, N steps of the longest.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .alignment import PairAlignment, align
from .extractor import SIZE, FrozenEncoder, StepEncoder, encode_steps, padded
from .losses import Codebook, LossWeights, NextStep, adversary_loss, commitment, info_nce, k_means

BATCH, EPOCHS, FEWEST_UPDATES = 64, 3, 200  # solutions of an update, times that each is seen, updates at least
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
WARM_UP = 0.25  # of the updates: until then vectors move too fast for codes
OTHERS = 4  # solutions of its problem that one may be matched with
RIVALS = 8  # drawn solutions of other problems, all of which the nearest must be nearer than
NOISE = 0.8  # standard deviation, where the components of whitened embeddings have at most 1
DRAWN = 20_000  # steps that codes are first drawn from, at most


def some_steps(vectors: Sequence[np.ndarray], seed: int) -> torch.Tensor:
    """Steps `[T, D]`, at most DRAWN of them."""
    every_TD = np.concatenate(vectors)
    if len(every_TD) > DRAWN:
        every_TD = np.random.default_rng(seed).choice(every_TD, DRAWN, replace=False, shuffle=False)
    return torch.from_numpy(every_TD)


class Corpus:
    """Of each solution: its problem's number, its steps' abstracted views and its steps as they were written, both
    whitened embeddings `[n, C]`, and numbers of the views' texts, equal where these are."""

    def __init__(
        self, owners_S: np.ndarray, views: list[np.ndarray], raws: list[np.ndarray], texts: Sequence[Sequence[str]]
    ) -> None:
        self.owners_S, self.views, self.raws = owners_S, views, raws
        numbers: dict[str, int] = {}
        self.texts = [np.array([numbers.setdefault(t, len(numbers)) for t in own], np.int64) for own in texts]


@dataclass(frozen=True, slots=True)
class Partner:
    """The nearest other solution of the same problem."""

    row: int
    steps: int
    matched: np.ndarray  # which of them each step is matched with, int64 [n]


def partners_of(owners_S: np.ndarray, vectors: Sequence[np.ndarray], rng: np.random.Generator) -> list[Partner | None]:
    """None of a solution that is alone with its problem, or nearer to one of RIVALS that are drawn from others."""
    rows_of: dict[int, list[int]] = {}
    for row, owner in enumerate(owners_S.tolist()):
        rows_of.setdefault(owner, []).append(row)
    pairs = [
        (row, rows[(at + ahead) % len(rows)])
        for rows in rows_of.values()
        for at, row in enumerate(rows)
        for ahead in range(1, min(len(rows), OTHERS + 1))
    ]
    best: dict[int, tuple[float, Partner]] = {}
    for (row, other), own in zip(pairs, _aligned(vectors, pairs), strict=True):
        if row not in best or own.distance < best[row][0]:
            best[row] = own.distance, Partner(other, len(vectors[other]), own.plan.argmax(1))
    rivals = [(row, other) for row in best for other in _rivals(owners_S, row, rng)]
    nearer = {
        row for (row, _), own in zip(rivals, _aligned(vectors, rivals), strict=True) if own.distance < best[row][0]
    }
    return [best[row][1] if row in best and row not in nearer else None for row in range(len(vectors))]


def _aligned(vectors: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]]) -> list[PairAlignment]:
    return align([vectors[row] for row, _ in pairs], [vectors[other] for _, other in pairs])


def _rivals(owners_S: np.ndarray, row: int, rng: np.random.Generator) -> list[int]:
    """Rows of RIVALS solutions of other problems, of which there are some."""
    drawn = rng.integers(len(owners_S), size=RIVALS)
    while len(own := np.flatnonzero(owners_S[drawn] == owners_S[row])):
        drawn[own] = rng.integers(len(owners_S), size=len(own))
    return drawn.tolist()


class Training:
    def __init__(self, corpus: Corpus, codes: int, width: int, seed: int, generator: torch.Generator) -> None:
        self.corpus, self.codes, self.seed, self.generator = corpus, codes, seed, generator
        self.weights = LossWeights()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = StepEncoder(corpus.views[0].shape[1], width)
            self.next_step = NextStep(SIZE)
            self.guess = torch.nn.Linear(SIZE, int(corpus.owners_S.max()) + 1)
        self.codebook: Codebook | None = None
        vectors = encode_steps(FrozenEncoder(), corpus.views)
        self.partners = partners_of(corpus.owners_S, vectors, np.random.default_rng(seed))

    def run(self) -> tuple[StepEncoder, torch.Tensor, dict[str, tuple[float, float]]]:
        """The encoder, its codes `[K, D]`, and each loss at first and at last."""
        parameters = [p for net in (self.encoder, self.next_step, self.guess) for p in net.parameters()]
        updates = max(FEWEST_UPDATES, EPOCHS * math.ceil(len(self.corpus.views) / BATCH))
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
        history: list[dict[str, float]] = []
        with torch.random.fork_rng(devices=[]):  # dropout and noise draw from the process's own
            torch.manual_seed(self.seed)
            for update, rows in zip(range(updates), self._batches(), strict=False):
                if update >= WARM_UP * updates and self.codebook is None:
                    some_TD = some_steps(encode_steps(self.encoder.eval(), self.corpus.views), self.seed)
                    self.codebook = Codebook(k_means(some_TD, self.codes, self.generator))
                losses = self._losses(rows)
                sum(losses.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                history.append({name: float(loss.detach()) for name, loss in losses.items()})
        assert self.codebook is not None
        return self.encoder.eval(), self.codebook.codes_KD, _first_and_last(history)

    def _batches(self) -> Iterator[np.ndarray]:
        """Rows of solutions, all of them in a new order each epoch, for ever."""
        rng = np.random.default_rng(self.seed)
        while True:
            order = rng.permutation(len(self.corpus.views))
            yield from np.split(order, range(BATCH, len(order), BATCH))

    def _losses(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Of one batch, each with its weight."""
        corpus, weights, partners = self.corpus, self.weights, [self.partners[row] for row in rows]
        others = [own.row for own in partners if own]
        inputs = [corpus.views[r] for r in rows] + [corpus.raws[r] for r in rows] + [corpus.views[r] for r in others]
        texts_M = torch.from_numpy(np.concatenate([corpus.texts[r] for r in (*rows, *rows, *others)]))
        lengths = torch.tensor([len(own) for own in inputs])
        own_lengths = lengths[: len(rows)]
        inputs_BNC = padded(inputs)
        vectors_BND = self.encoder.train()(inputs_BNC + NOISE * torch.randn_like(inputs_BNC))
        real_BN = torch.arange(vectors_BND.shape[1]) < lengths[:, None]
        vectors_MD, T = vectors_BND[real_BN], int(own_lengths.sum())
        own_TD, texts_T = vectors_MD[:T], texts_M[:T]
        owners_T = torch.from_numpy(corpus.owners_S[rows]).repeat_interleave(own_lengths)
        matched_T = _matched(own_lengths.tolist(), partners)
        predicted_TD = self.next_step(vectors_BND[: len(rows)])[real_BN[: len(rows)]]
        last_T = own_lengths.cumsum(0) - 1
        losses = {
            "info_nce": _contrast(own_TD, vectors_MD[T:], texts_T, texts_M[T:], matched_T),
            "cpc": weights.cpc * _predict(predicted_TD, own_TD, texts_T, last_T),
            "adversary": weights.adversary * adversary_loss(self.guess, math.sqrt(SIZE) * own_TD, owners_T),
        }
        if self.codebook:
            losses["vq"] = weights.vq * commitment(own_TD, self.codebook.codes_KD)
            self.codebook.update(own_TD.detach(), self.generator)
        return losses


def _matched(lengths: Sequence[int], partners: Sequence[Partner | None]) -> torch.Tensor:
    """Of each step of a batch the key that it is matched with, −1 for none, int64 `[T]`. Keys are the T steps as they
    were written, then those of the partners."""
    found, at = [], sum(lengths)
    for length, partner in zip(lengths, partners, strict=True):
        found.append(np.full(length, -1) if partner is None else at + partner.matched)
        at += 0 if partner is None else partner.steps
    return torch.from_numpy(np.concatenate(found))


def _contrast(
    own_TD: torch.Tensor,
    keys_MD: torch.Tensor,
    texts_T: torch.Tensor,
    texts_M: torch.Tensor,
    matched_T: torch.Tensor,
) -> torch.Tensor:
    """Mean InfoNCE of each step with its other view and with its match; neither is the other's negative."""
    every_T = torch.arange(len(own_TD))
    has_T = matched_T >= 0
    negatives_TM = texts_T[:, None] != texts_M
    negatives_TM[every_T[has_T], matched_T[has_T]] = False
    views = info_nce(own_TD, keys_MD, every_T, negatives_TM)
    matches = info_nce(own_TD[has_T], keys_MD, matched_T[has_T], negatives_TM[has_T].clone())
    return torch.cat([views, matches]).mean()


def _predict(
    predicted_TD: torch.Tensor, own_TD: torch.Tensor, texts_T: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """Mean InfoNCE of what each step predicts with the step after it; 0 where there is none. `last`: last steps."""
    goes_on_T = torch.ones(len(own_TD), dtype=torch.bool)
    goes_on_T[last] = False
    (rows,) = goes_on_T.nonzero(as_tuple=True)
    if not len(rows):
        return own_TD.new_zeros(())
    return info_nce(predicted_TD[rows], own_TD, rows + 1, texts_T[rows + 1, None] != texts_T).mean()


def _first_and_last(history: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    tenth = max(1, len(history) // 10)
    columns = {name: [row[name] for row in history if name in row] for name in history[-1]}
    return {name: (float(np.mean(own[:tenth])), float(np.mean(own[-tenth:]))) for name, own in columns.items()}
