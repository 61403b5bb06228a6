"""What a report plots: curves of a run's rows, as means over bins where there are many, and evaluations as points."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .plots import SERIES_INKS, Panel, Series
from .progress import SPLITS

MOST_POINTS = 150  # of a line
MOST_BARS = 60
BETWEEN_STEPS = ("evaluate", "checkpoint")  # stages that happen now and then: in the table, not in the plot of a step
OUTCOMES = ("all_right", "mixed", "all_wrong")  # of a prompt group
POLARITIES, STANCES = ("helpful", "harmful", "neutral"), ("for", "against", "silent")  # of views

Rows = Sequence[dict[str, Any]]
Place = tuple[str, ...]  # keys into a row, outermost first


def plots_of(steps: Rows, evals: Rows) -> Iterable[tuple[str, str, list[Panel]]]:
    """Title, one line of explanation, and panels; a panel without a figure to show is left out."""
    pools = keys_of(steps, "pools")
    stages = {name: ("seconds", name) for name in keys_of(steps, "seconds") if name not in ("total", *BETWEEN_STEPS)}
    views = {a: {name: ("learner", f"skill_{a}_{name}") for name in STANCES} for a in ("right", "wrong")}
    speed, busy = ({name: ("pools", name, key) for name in pools} for key in ("tokens_per_second", "busy_fraction"))
    speed = {name: place for name, place in speed.items() if np.nansum(_values(steps, place))}  # a verifier has none

    def panel(unit: str, places: dict[str, Place], share: bool = False, bars: bool = False) -> Panel:
        most = MOST_BARS if bars else MOST_POINTS
        return Panel(unit=unit, series=curves(steps, places, most), share=share, bars=bars)

    plots = {
        ("Accuracy", "Evaluations with 95 % intervals over problems; the teacher's dashed."): [
            Panel(unit="avg@k of held-out problems", series=_accuracy(evals), share=True)
        ],
        ("Loss", "What the optimizer sees; and the distance from the teacher, where there is one."): [
            panel("reverse KL, nats per token", {"reverse KL": ("learner", "reverse_kl")}),
            panel("reverse KL of the top k and a bucket for the rest", {"top k": ("learner", "topk_reverse_kl")}),
            panel("mass on the top k", {m: ("learner", f"{m}_mass") for m in ("teacher", "student")}, share=True),
            panel("loss", {"loss": ("loss",)}),
        ],
        ("Entropy", "The student's, of the tokens that trained and (−log μ) of all that were sampled."): [
            panel("nats per token", {"trained": ("learner", "entropy"), "sampled": ("sampler_entropy",)})
        ],
        ("Verifier", "Of the rollouts that could be judged, whether they trained or not."): [
            panel("mean reward", {"reward": ("reward",)}),
            panel("share that passed", {"passed": ("pass_rate",)}, share=True),
            panel("parts of the reward", {name: ("reward_parts", name) for name in keys_of(steps, "reward_parts")}),
            panel("prompt groups", {name.replace("_", " "): ("groups", name) for name in OUTCOMES}, share=True),
        ],
        ("Skills", "What the teachers' views of the answers were: verdict × stance, as shares."): [
            panel("of all views", {name: ("learner", f"skill_{name}") for name in POLARITIES}, share=True),
            *(panel(f"of {a} answers' views", views[a], share=True) for a in ("right", "wrong")),
        ],
        ("Responses", "Of all rollouts of the step."): [
            panel("mean length, tokens", {"length": ("response_length",)}),
            panel("share cut off by the token limit", {"cut off": ("truncated_share",)}, share=True),
        ],
        ("Pools", "Since the step before, evaluations and checkpoints left out."): [
            panel("tokens per second", speed),
            panel("busy share of the replicas' time", busy, share=True),
            panel("teacher scores that had been kept (hits) and had not (misses)", _kept_scores(steps)),
        ],
        ("A step's time", f"By stage; {' and '.join(BETWEEN_STEPS)} stand in the table below."): [
            panel("seconds, stacked", stages, bars=True)
        ],
        ("Staleness", "Weight versions between sampling a rollout and training on it."): [
            panel("versions", {"mean": ("staleness_mean",), "max": ("staleness_max",)})
        ],
        ("Optimizer", "The gradient's global norm is taken before clipping."): [
            panel("gradient norm", {"norm": ("learner", "grad_norm")}),
            panel("learning rate", {"rate": ("learner", "learning_rate")}),
        ],
    }
    for (title, note), panels in plots.items():
        shown = [replace(p, series=[s for s in p.series if np.isfinite(s.values).any()]) for p in panels]
        shown = [p for p in shown if p.series]
        if shown:
            yield title, note, shown


def _kept_scores(steps: Rows) -> dict[str, Place]:
    """What the cache of teacher scores did, in a run in which it did anything."""
    places: dict[str, Place] = {name: ("score_cache", name) for name in ("hits", "misses")}
    return places if np.nansum(_values(steps, places["hits"])) else {}


def keys_of(rows: Rows, field: str) -> list[str]:
    """All keys that `field` has in any row, in order of first sight."""
    return list(dict.fromkeys(key for row in rows for key in row.get(field, ())))


def curves(rows: Rows, places: dict[str, Place], most: int) -> list[Series]:
    """A curve of at most `most` points for each label and its place in a row."""
    done = _bins(np.array([float(row["step"]) for row in rows]), most)
    inks = itertools.cycle(SERIES_INKS)
    return [
        Series(label=label, ink=next(inks), steps=done, values=_bins(_values(rows, place), most))
        for label, place in places.items()
    ]


def _values(rows: Rows, place: Place) -> np.ndarray:
    """float [S]; NaN where a row has no such figure or it was not finite."""

    def read(row: Any) -> float:
        for key in place:
            row = row.get(key) if isinstance(row, dict) else None
        return math.nan if row is None else float(row)

    return np.array([read(row) for row in rows])


def _bins(values: np.ndarray, most: int) -> np.ndarray:
    """Means of at most `most` runs of neighbours, without their NaN; NaN where there is nothing else."""
    parts = np.array_split(values, min(most, len(values))) if len(values) else []
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else math.nan for part in parts])


def _accuracy(evals: Rows) -> list[Series]:
    series = []
    for (split, label), ink in zip(SPLITS.items(), SERIES_INKS, strict=False):
        for model in ("student", "teacher"):
            rows = sorted((r for r in evals if (r["split"], r["model"]) == (split, model)), key=lambda r: r["step"])
            if not rows:
                continue
            figures = [row["stats"]["avg_at_k"] for row in rows]
            value, low, high = (np.array([figure[key] for figure in figures]) for key in ("value", "low", "high"))
            steps = np.array([float(row["step"]) for row in rows])
            name, level = f"{model}, {label}", model == "teacher"
            series.append(Series(label=name, ink=ink, steps=steps, values=value, low=low, high=high, level=level))
    return series
