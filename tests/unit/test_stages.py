"""When a stage ends early: the trigger against its golden numbers, and against a slow reading of the whole history."""

import json

import numpy as np
import pytest
from run_rows import fresh_rng
from term_cases import golden

from tutorloop.cluster.entropy_collapse import EntropyCollapse
from tutorloop.contracts.config import Until

INPUTS, EXPECTED = golden("rejection_ft")


def until(**changes):
    given = {
        "trigger": "entropy_collapse",
        "every": 1,
        "warmup": INPUTS["warmup_n"],
        "smoothing": INPUTS["ema_alpha"],
        "share": INPUTS["rel_floor"],
        "floor": INPUTS["abs_floor"],
        "patience": INPUTS["patience"],
        "slope": 0.2,
    }
    return Until(**(given | changes))


def test_the_golden_series_does_not_trigger_yet():
    """Its pass rate stands still, so the entropy alone decides: one check below the threshold is not two."""
    trigger = EntropyCollapse(until())
    for step, entropy in enumerate(INPUTS["entropy_series"]):
        assert not trigger.observe(entropy, 0.5)
        assert trigger.average == pytest.approx(EXPECTED["entropy_ema"][step], abs=1e-9)
    assert trigger.threshold == pytest.approx(EXPECTED["threshold"], abs=1e-9)
    assert EXPECTED["trigger_step"] == -1 and trigger.low_checks == 1
    assert trigger.observe(INPUTS["entropy_series"][-1], 0.5), "the second check below it"


def slow_history(rule, steps):
    """Whether the trigger has fired after each step, read anew from everything seen so far."""
    return [any(_fires(rule, steps[:n]) for n in range(1, end + 1)) for end in range(1, len(steps) + 1)]


def _fires(rule, steps):
    """Whether the last `patience` checks of these steps are all low."""
    checks, part = [], []
    for number, (entropy, pass_rate) in enumerate(steps, 1):
        part += [] if entropy is None else [(entropy, pass_rate)]
        if number % rule.every == 0 and part:
            checks.append(np.mean(part, axis=0))
            part = []
    threshold = np.mean([entropy for entropy, _ in checks[: rule.warmup]]) * rule.share if checks else 0.0
    low = []
    for i, (_, pass_rate) in enumerate(checks):
        recent = sum(rule.smoothing * (1 - rule.smoothing) ** (i - j) * checks[j][0] for j in range(1, i + 1))
        average = recent + (1 - rule.smoothing) ** i * checks[0][0]
        rise = 100 * (pass_rate - checks[i - 1][1]) if i else 0.0
        low.append(i + 1 >= rule.warmup and average < max(rule.floor, threshold) and rise < rule.slope)
    return len(low) >= rule.patience and all(low[-rule.patience :])


def random_series(rng, steps):
    """Entropies that fall unevenly, some steps without one, and pass rates that wander."""
    entropy = 2.0 * np.exp(-np.cumsum(rng.exponential(0.06, steps))) * rng.uniform(0.7, 1.3, steps)
    passes = np.clip(0.5 + np.cumsum(rng.normal(0, 0.01, steps)), 0, 1)
    gaps = rng.random(steps) < 0.15
    return [(None if gap else float(e), float(p)) for gap, e, p in zip(gaps, entropy, passes, strict=True)]


@pytest.mark.parametrize("case", range(20))
def test_it_fires_when_the_whole_history_says_so_and_never_takes_it_back(case):
    rng = fresh_rng()
    rule = until(
        every=int(rng.integers(1, 4)),
        warmup=int(rng.integers(1, 4)),
        patience=int(rng.integers(1, 4)),
        smoothing=float(rng.uniform(0.2, 1.0)),
        slope=float(rng.choice([0.0, 0.5, 100.0])),
    )
    steps, trigger = random_series(rng, 60), EntropyCollapse(rule)
    found = [trigger.observe(*step) for step in steps]
    assert found == slow_history(rule, steps)
    assert found == sorted(found), "once fired it stays so"


def test_a_rising_pass_rate_holds_it_back():
    held, free = EntropyCollapse(until(slope=0.2)), EntropyCollapse(until(slope=100.0))
    series = [(1.0, 0.1), (1.0, 0.1), *((0.01, 0.1 + 0.01 * i) for i in range(1, 20))]
    for step in series:
        assert not held.observe(*step)
        free.observe(*step)
    assert free.fired


def test_it_resumes_from_its_state_as_if_never_stopped():
    rng = fresh_rng()
    rule, steps = until(every=3), random_series(rng, 60)
    whole, expected = EntropyCollapse(rule), []
    for step in steps:
        expected.append(whole.observe(*step))
    for stop in (0, 1, 7, 30, 59):
        first, second = EntropyCollapse(rule), EntropyCollapse(rule)
        found = [first.observe(*step) for step in steps[:stop]]
        second.resume(json.loads(json.dumps(first.state())))
        found += [second.observe(*step) for step in steps[stop:]]
        assert found == expected and second.state() == whole.state()


def test_it_stays_fired_through_a_resume():
    trigger, resumed = EntropyCollapse(until()), EntropyCollapse(until())
    for entropy in (1.0, 1.0, *[0.01] * 8):
        trigger.observe(entropy, 0.5)
    assert trigger.fired
    resumed.resume(trigger.state())
    assert all(resumed.observe(5.0, 0.1 * i) for i in range(10))
