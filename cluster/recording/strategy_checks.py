"""What an audit of strategies comes to, one figure at a time: what it is, what it means, and whether it is alarming.

Bounds of collapse are those that a run's own alarms have (cluster/methods/parts/strategies.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...verifier_service.strategies.alignment import FEWEST_STEPS
from ...verifier_service.strategies.fit import LEAKS
from ..methods.parts.strategies import COLLAPSED, DOMINANT, EVALUATIONS, GROWN, RISE, WARM
from .progress import SPLITS, percent
from .strategy_audit import STRANGERS, Audit
from .strategy_figures import Measured
from .strategy_rollouts import INSIDE, OUTSIDE, TRAIN

LEAST_DROP = 0.1
MOSTLY = 0.5
CRAMPED = -5.0
UNKNOWN = "not known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`alarming` is None where the figure is not known."""

    name: str
    figure: str
    means: str
    alarm: str  # what would be alarming
    alarming: bool | None


def checks_of(audit: Audit) -> list[Check]:
    """Whether alignment measures what it should, and whether the student has collapsed onto a strategy."""
    method = [row for row in audit.rows if row["kind"] == "step" and "strategy_scale" in row.get("method", {})]
    return [
        _control(audit),
        *(_auc(audit, split) for split in (INSIDE, OUTSIDE)),
        _leakage(audit),
        *_collapse(audit, method),
    ]


def written(measured: Measured | None, digits: int = 2) -> str:
    """A figure and its interval."""
    if measured is None:
        return UNKNOWN
    if measured.low is None or measured.high is None:
        return f"{measured.value:.{digits}f} (too few problems for an interval)"
    return f"{measured.value:.{digits}f} ({measured.low:.{digits}f} to {measured.high:.{digits}f})"


def _problems(count: int) -> str:
    return f"{count:,} problem{'' if count == 1 else 's'}"


def _of(measured: Measured) -> str:
    return f"{measured.rollouts:,} rollouts of {_problems(measured.problems)}"


# ---- what alignment measures -------------------------------------------------------------------------------------


def _control(audit: Audit) -> Check:
    own, others, drop = audit.own, audit.others, audit.drop
    found = "No rollout could be compared with another problem's solutions."
    if own and others and drop:
        found = (
            f"Mean alignment is {own.value:.2f} with the own problem's solutions and {others.value:.2f} with those of "
            f"{STRANGERS} other problems (drawn by a seed), over {_of(drop)}."
        )
    return Check(
        name="Drop with shuffled strategies",
        figure=written(drop),
        means=f"{found} Alignment is to say how this problem is solved, not how problems are solved.",
        alarm=f"less than {LEAST_DROP}: any solution would do as well",
        alarming=None if drop is None else drop.value < LEAST_DROP,
    )


def _auc(audit: Audit, name: str) -> Check:
    split, measured = audit.aucs[name]
    where = "training" if split == TRAIN else f"the evaluations {SPLITS[split]}"
    found = (
        f"From {_of(measured)} in {where}"
        if measured
        else f"In {where} there are not both right and wrong answers with an alignment (--solutions may help)"
    )
    return Check(
        name=f"AUC of alignment against correctness, {SPLITS[name]}",
        figure=written(measured),
        means=f"{found}. Of a right and a wrong answer, how often the right one is aligned better; 0.5 is chance.",
        alarm="0.5 or less: following the teacher does not go with being right",
        alarming=None if measured is None else measured.value <= 0.5,
    )


def _leakage(audit: Audit) -> Check:
    told = audit.leakage
    figure = UNKNOWN
    if told:
        figure = f"{percent(told['accuracy'])} of {_problems(int(told['problems']))}, chance {percent(told['chance'])}"
    return Check(
        name="Leakage",
        figure=figure,
        means="How often a linear probe, fitted to the vectors of other solutions, tells which problem one is of.",
        alarm=f"more than {percent(LEAKS, 0)}: the vectors say which problem it is as well as how it is solved",
        alarming=None if told is None else told["accuracy"] > LEAKS,
    )


# ---- collapse ----------------------------------------------------------------------------------------------------


def _collapse(audit: Audit, method: Sequence[dict[str, Any]]) -> list[Check]:
    few, first_few = _first_and_now(method, "effective_strategies")
    top, first_top = _first_and_now(method, "top_code_share")
    neutral, _ = _first_and_now(method, "neutral_share")
    scale, _ = _first_and_now(method, "strategy_scale")
    most = max(DOMINANT, GROWN * (first_top or 0.0))
    return [
        Check(
            name="Effective strategies",
            figure=UNKNOWN if few is None else f"{few:.1f} now, {first_few:.1f} at first",
            means="How many codes the student uses as if evenly (e to the entropy of their shares), over all rollouts.",
            alarm=f"less than {percent(COLLAPSED, 0)} of what it was: the student has one way for everything",
            alarming=None if few is None or first_few is None else few < COLLAPSED * first_few,
        ),
        Check(
            name="The top code's share",
            figure=UNKNOWN
            if top is None or first_top is None
            else f"{percent(top)} now, {percent(first_top)} at first",
            means="Of all steps that the student wrote in a step of training, those with the most used code.",
            alarm=f"more than {percent(most, 0)}: one step is written again and again",
            alarming=None if top is None else top > most,
        ),
        *_spread(audit),
        _trick(audit, method),
        Check(
            name="What strategies are worth",
            figure=UNKNOWN if scale is None else f"{scale:.3g} of the configured weight",
            means="Each alarm of the run halves it, and wrong answers then earn nothing by their strategy.",
            alarm="less than 1: the run itself has seen a collapse or a trick",
            alarming=None if scale is None else scale < 1,
        ),
        Check(
            name="Neutral rollouts",
            figure=UNKNOWN if neutral is None else percent(neutral),
            means=f"Rollouts of fewer than {FEWEST_STEPS} steps, or of a problem without a solution: not aligned.",
            alarm=f"more than {percent(MOSTLY, 0)}: most rollouts earn nothing by their strategy",
            alarming=None if neutral is None else neutral > MOSTLY,
        ),
    ]


def _spread(audit: Audit) -> list[Check]:
    """Of what was read of the first and the last third of training."""
    early, late = audit.spreads or (None, None)
    informed = (early.mutual_information, late.mutual_information) if early and late else None
    volumes = (early.volume, late.volume) if early and late else (None, None)
    return [
        Check(
            name="Mutual information of steps and strategies",
            figure=f"{informed[1]:.2f} nats at last, {informed[0]:.2f} at first" if informed else UNKNOWN,
            means="High where each step has one strategy and all steps together have many.",
            alarm=f"less than {percent(COLLAPSED, 0)} of what it was: steps have become one step",
            alarming=informed[1] < COLLAPSED * informed[0] if informed else None,
        ),
        Check(
            name="Room between a group's answers",
            figure=UNKNOWN
            if volumes[0] is None or volumes[1] is None
            else f"{volumes[1]:.2f} at last, {volumes[0]:.2f} at first",
            means="log det of the cosines of a prompt group's answers, for each answer; 0 where they are at right "
            "angles, about −6 where eight are all alike.",
            alarm=f"less than {CRAMPED:.0f}: the answers of a group are copies of one another",
            alarming=None if volumes[1] is None else volumes[1] < CRAMPED,
        ),
    ]


def _first_and_now(method: Sequence[dict[str, Any]], name: str) -> tuple[float | None, float | None]:
    """The last step's figure, and the mean of the first ones."""
    values = [row["method"][name] for row in method if row["method"].get(name) is not None]
    return (values[-1], sum(values[:WARM]) / len(values[:WARM])) if values else (None, None)


def _trick(audit: Audit, method: Sequence[dict[str, Any]]) -> Check:
    """Alignment over the last evaluations, and accuracy."""
    evals = [row for row in audit.rows if row["kind"] == "eval" and (row["model"], row["split"]) == ("student", INSIDE)]
    aligned = [
        (row["step"], row["method"]["alignment"]) for row in method if row["method"].get("alignment") is not None
    ]
    pairs = [
        (before[-1], row["stats"]["avg_at_k"]["value"])
        for row in evals
        if (before := [value for step, value in aligned if step <= row["step"]])
    ][-EVALUATIONS - 1 :]
    figure, alarming = f"{UNKNOWN}: fewer than {EVALUATIONS + 1} evaluations", None
    if len(pairs) > EVALUATIONS:
        (was_aligned, was), (now_aligned, now) = pairs[0], pairs[-1]
        figure = f"alignment {was_aligned:.2f} to {now_aligned:.2f}, accuracy {percent(was)} to {percent(now)}"
        alarming = now_aligned - was_aligned > RISE and now <= was
    return Check(
        name=f"Alignment and accuracy over the last {EVALUATIONS} evaluations",
        figure=figure,
        means="Both should rise together: accuracy is of held-out problems.",
        alarm=f"alignment up by more than {RISE} and accuracy not: the reward is gamed",
        alarming=alarming,
    )
