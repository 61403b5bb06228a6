"""Rows of a made-up run, random in every figure, for the tests of what shows and stores them."""

import secrets
from dataclasses import asdict

import numpy as np

from tutorloop.cluster.recording.metrics import EvalRow, PoolRow, StepRow
from tutorloop.cluster.recording.statistics import summarise


def fresh_rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print("seed", seed)
    return np.random.default_rng(seed)


def step_row(rng: np.random.Generator, step: int, **changes) -> StepRow:
    """`step` from 1."""
    pools = {
        name: PoolRow(
            replicas=int(rng.integers(1, 4)),
            tokens_per_second=float(rng.random() * 1e4),
            busy_seconds=float(rng.random() * 10),
            busy_fraction=float(rng.random()),
            queue_depth=int(rng.integers(0, 5)),
        )
        for name in ("rollout", "teacher", "verifier", "learner")
    }
    seconds = {stage: float(rng.random()) for stage in ("wait", "learn", "publish", "load")}
    learner = {name: float(rng.random()) for name in ("reverse_kl", "entropy", "grad_norm", "importance_weight")}
    values = {
        "step": step,
        "wall_seconds": 2.0 * step,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "loss": float(rng.normal()),
        "learner": {**learner, "learning_rate": 1e-4},
        "reward": float(rng.random()),
        "pass_rate": float(rng.random()),
        "abstained": int(rng.integers(0, 3)),
        "response_faults": {"too_large": int(rng.integers(0, 3))},
        "response_length": float(rng.random() * 200),
        "truncated_share": float(rng.random()),
        "staleness_mean": float(rng.random()),
        "staleness_max": int(rng.integers(0, 3)),
        "sampler_entropy": float(rng.random()),
        "rollouts": {"taken": 96, "trained": int(rng.integers(1, 97))},
        "reward_parts": {"format": float(rng.random())},
        "groups": {name: float(rng.random()) for name in ("all_right", "all_wrong", "mixed")},
        "score_cache": {name: int(rng.integers(1, 1000)) for name in ("hits", "misses", "bytes_read", "bytes_written")},
        "tokens": {kind: int(rng.integers(1, 1000)) for kind in ("generated", "scored", "trained")},
        "pools": pools,
        "dropped": {"stale": 2 * step},
        "failed": {"verifier:timeout": 3 * step},
    }
    return StepRow(**{**values, **changes})


def eval_row(rng: np.random.Generator, step: int, split: str = "in_distribution", model: str = "student") -> EvalRow:
    correct = rng.random((12, 4)) < rng.random((12, 1))
    stats = summarise(correct, [["g" if c else "w" for c in row] for row in correct])
    names = ("seconds", "response_length", "truncated_share", "answered_share")
    return EvalRow(step=step, split=split, model=model, stats=stats, **{name: float(rng.random()) for name in names})


def summary_of(evals: list[EvalRow], **changes) -> dict:
    """A summary.json that fits `evals`."""
    rows = [asdict(row) for row in evals]

    def accuracy(split: str, model: str, which: int) -> float | None:
        found = [row["stats"]["avg_at_k"]["value"] for row in rows if (row["split"], row["model"]) == (split, model)]
        return found[which] if found else None

    return {
        "method": "opd",
        "seed": 0,
        "steps": 3,
        "wall_seconds": 75.4,
        "accuracy": {
            "before": accuracy("in_distribution", "student", 0),
            "after": accuracy("in_distribution", "student", -1),
            "teacher": accuracy("in_distribution", "teacher", 0),
            "ood_before": accuracy("out_of_distribution", "student", 0),
            "ood_after": accuracy("out_of_distribution", "student", -1),
            "ood_teacher": accuracy("out_of_distribution", "teacher", 0),
        },
        "tokens": {"generated": 12345, "scored": 23456, "trained": 11111},
        "pools": {"rollout": {"tokens_per_second": 1234.5, "busy_fraction": 0.5}},
        "weight_versions": 4,
        "staleness": {"mean": 0.25, "max": 1},
        "dropped": {"stale": 2},
        "verifier_errors": {"timeout": 1},
        "evals": rows,
        "interrupted": False,
        "peak_memory_bytes": 2**31,
        **changes,
    }
