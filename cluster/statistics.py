"""What an evaluation says: avg@k, pass@k and maj@k, each with an interval over problems.

An evaluation judges k samples of each of N problems. Its uncertainty comes from the choice of problems far more than
from the samples (30 problems at 12 samples still leave about 7 points of standard error), so every figure carries a
95 % percentile-bootstrap interval in which whole problems are drawn again. All figures of one call share the draws.

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..contracts.errors import RecordError

RESAMPLES = 2000
CONFIDENCE = 0.95


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Chance that k of a problem's `samples` draws, taken without replacement, hold a correct one.

    `correct` [N] counts the correct draws. Returns float [N]: 1 - C(n-c, k) / C(n, k), as a product of k factors that
    neither overflows nor cancels. Raises RecordError unless 1 <= k <= samples.
    """
    if not 1 <= k <= samples:
        raise RecordError("pass@k needs 1 <= k <= samples", f"k {k} of {samples} samples")
    drawn = np.arange(k)
    wrong = samples - np.asarray(correct)[:, None]
    return 1.0 - np.prod(np.maximum(wrong - drawn, 0) / (samples - drawn), axis=1)


def majority(correct: Sequence[bool], answers: Sequence[str]) -> tuple[float, float]:
    """Whether the most frequent answer of one problem is right: (expected over ties, with the first seen winning).

    Answers are canonical strings; "" means that none was found, and does not vote. An answer is right when every sample
    that gave it was judged correct. Without a single vote the problem counts as wrong.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0, 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]  # a Counter keeps the order of first sight
    right = [all(c for c, a in zip(correct, answers, strict=True) if a == answer) for answer in tied]
    return sum(right) / len(right), float(right[0])


def intervals(per_problem: np.ndarray, seed: int) -> list[dict[str, float]]:
    """Mean over problems and its percentile-bootstrap interval, for each of M figures at once.

    `per_problem` is float [N, M]. Returns M dicts of value, low and high.
    """
    problems = len(per_problem)
    draws = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)
    means = draws @ per_problem / problems
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    value = per_problem.mean(axis=0)
    return [{"value": float(v), "low": float(a), "high": float(b)} for v, a, b in zip(value, low, high, strict=True)]


def summarise(correct: np.ndarray, answers: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """An evaluation's figures, ready for JSON.

    `correct` is bool [N, k]; `answers` holds N lists of k canonical answers ("" for none). Returns `problems`,
    `samples` and, each as {value, low, high}: `avg_at_k`, `pass_at_k`, `maj_at_k` (ties split), `maj_at_k_first_seen`,
    and `pass_at` with the unbiased estimate for every power of two below k, keyed by its k. Raises RecordError.
    """
    correct = np.asarray(correct, bool)
    if correct.ndim != 2 or not correct.size:
        raise RecordError(
            "an evaluation judges at least one sample of one problem", f"verdicts of shape {correct.shape}"
        )
    problems, samples = correct.shape
    if len(answers) != problems or any(len(row) != samples for row in answers):
        found = sorted({len(row) for row in answers})
        raise RecordError("answers align with the verdicts", f"{len(answers)} rows of {found} for {correct.shape}")

    counts = correct.sum(axis=1)
    votes = np.array([majority(c, a) for c, a in zip(correct, answers, strict=True)])
    below = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    columns = [correct.mean(axis=1), pass_at_k(counts, samples, samples), votes[:, 0], votes[:, 1]]
    columns += [pass_at_k(counts, samples, k) for k in below]
    average, passed, voted, first_seen, *at = intervals(np.stack(columns, axis=1), seed)
    return {
        "problems": problems,
        "samples": samples,
        "avg_at_k": average,
        "pass_at_k": passed,
        "maj_at_k": voted,
        "maj_at_k_first_seen": first_seen,
        "pass_at": {str(k): figure for k, figure in zip(below, at, strict=True)},
    }
