"""The verifier pool against a bare pebble pool of math-verify, and against itself with hostile rows among its own.

    .venv/bin/python benchmarks/verifiers.py              # about five minutes on two cores
    .venv/bin/python benchmarks/verifiers.py --table      # the table again, from the results alone

Paired and interleaved: each repetition measures everything once, on fresh pools that have judged other rows before, and
both pools in turn on a few rows at a time, so that whatever else the machine does slows both. The bare pool has as many
processes, a fork server with math-verify imported, a task a row with the same budget, and the timeouts of math-verify
off. The real rows and hostile ones are read from TUTORLOOP_SHARED_DATA, or from ../shared/data.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import cloudpickle
import numpy as np
from pebble import ProcessPool

from tutorloop import __version__
from tutorloop.contracts.protocols import Response
from tutorloop.verifier_service.function_verifier import FunctionVerifier
from tutorloop.verifier_service.math import MathVerifier
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.processes import Outcome

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("TUTORLOOP_SHARED_DATA", ROOT.parent / "shared" / "data")) / "verdicts"
PROCESSES, BUDGET, REPETITIONS = 2, 5.0, 5
PLAIN, SYMPY, STREAM, HOSTILE = 2000, 300, 2000, 0.05  # rows; hostile ones are this share of a stream
AT_A_TIME = 25
HANGS = ("hang", "memory", "crash")
COMMAND = ".venv/bin/python benchmarks/verifiers.py"


# ---- rows -----------------------------------------------------------------------------------------------------------


def plain_rows(random: np.random.Generator, count: int) -> list[Response]:
    """Numeric answers as models write them, two of three correct."""
    rows = []
    for _ in range(count):
        number = int(random.integers(-(10**6), 10**6))
        gold = number + int(random.integers(0, 3) == 0)
        written = (str(number), f"{number:,}", f"{number}.00", f"\\${number}")[random.integers(0, 4)]
        rows.append(Response(f"We add them up and so the answer is \\boxed{{{written}}}.", str(gold)))
    return rows


def _root(a: int, b: int, c: int) -> tuple[str, str]:
    return f"\\frac{{{a}\\sqrt{{{b}}}}}{{{c}}}", f"\\frac{{{a}}}{{{c}}}\\sqrt{{{b}}}"


def _product(a: int, b: int, c: int) -> tuple[str, str]:
    return f"(x+{a})({c}x+{b})", f"{c}x^2+{a * c + b}x+{a * b}"


def _pair(a: int, b: int, c: int) -> tuple[str, str]:
    return f"\\left(\\frac{{{a}}}{{{c}}}, {b}\\pi\\right)", f"(\\frac{{{2 * a}}}{{{2 * c}}}, \\pi \\cdot {b})"


def _interval(a: int, b: int, c: int) -> tuple[str, str]:
    return f"[-{a}, {b}\\sqrt{{{c}}})", f"[-{a}, \\sqrt{{{b * b * c}}})"


def _power(a: int, b: int, c: int) -> tuple[str, str]:
    return f"\\frac{{{a}x^{b}}}{{x^{c}}}+1", f"1+{a}x^{{{b - c}}}"


def sympy_rows(random: np.random.Generator, count: int, judge: MathVerifier) -> list[Response]:
    """Two spellings of one value, or of two in one row of three; only such as `prepare` leaves to sympy."""
    rows: list[Response] = []
    while len(rows) < count:
        a, b, c = (int(random.integers(2, 60)) for _ in range(3))
        kind = (_root, _product, _pair, _interval, _power)[random.integers(0, 5)]
        answer, gold = kind(a, b, c)[0], kind(a + int(random.integers(0, 3) == 0), b, c)[1]
        response = Response(f"Therefore it is \\boxed{{{answer}}}.", gold)
        rows += [response] if isinstance(judge.prepare(response), Response) else []
    return rows


def shared_rows(name: str) -> list[dict]:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def real_rows(judge: MathVerifier) -> list[Response]:
    """Of real responses and of the pairs of other graders: those that `prepare` leaves to sympy."""
    rows = shared_rows("qwen_math_cot_responses") + shared_rows("grader_test_pairs")
    responses = [Response(row.get("as_response") or row["prediction"], row["gold"]) for row in rows]
    return [one for one in responses if isinstance(judge.prepare(one), Response)]


def _tower(draw: Callable[[int, int], int]) -> str:
    power = str(draw(3, 12))
    for _ in range(draw(2, 5)):
        power = f"{draw(3, 12)}^{{{power}}}"
    return power


def _series(draw: Callable[[int, int], int]) -> str:
    n = draw(500, 900)
    return f"\\frac{{x^{{{n}}}-1}}{{x-1}}-({'+'.join(f'x^{{{i}}}' for i in range(n))})"


def _parentheses(draw: Callable[[int, int], int]) -> str:
    depth = draw(200, 600)
    return "(" * depth + str(draw(1, 9)) + ")" * depth


def _logarithms(draw: Callable[[int, int], int]) -> str:
    nested = f"{draw(2, 9)}^{{{_tower(draw)}}}"
    for base in range(1, draw(4, 7)):
        nested = f"\\log_{{2^{base}}}({nested})"
    return nested


HOSTILE_KINDS: dict[str, Callable[[Callable[[int, int], int]], str]] = {
    "tower": _tower,
    "tower in a fraction": lambda draw: f"\\dfrac{{{_tower(draw)} - {draw(2, 9)}}}{{{draw(11, 99)}}}",
    "tower of floats": lambda draw: f"{draw(3, 99)}.0^{{{draw(3, 99)}.0^{{{draw(3, 99)}.0}}}}",
    "power too long to print": lambda draw: f"{draw(2, 9)}^{{{draw(20, 40)}^{draw(5, 7)}}}",
    "rational power": lambda draw: f"{draw(2, 9)}^{{\\frac{{{'1' * draw(30, 40)}}}{{{'2' * draw(10, 14)}}}}}",
    "factorials": lambda draw: f"(({draw(20, 90)})!)!",
    "logarithms": _logarithms,
    "series": _series,
    "parentheses": _parentheses,
    "digits": lambda draw: str(draw(1, 9)) * draw(20_000, 100_000),
}


def hostile_rows(random: np.random.Generator, count: int) -> list[Response]:
    """The corpus's rows that hang, fill the memory or crash, then as many of each such kind with other numbers."""
    rows = [Response(row["prediction"], row["gold"]) for row in shared_rows("adversarial") if row["category"] in HANGS]
    kinds = list(HOSTILE_KINDS.values())
    for i in range(count - len(rows)):
        expression = kinds[i % len(kinds)](lambda low, high: int(random.integers(low, high + 1)))
        rows.append(Response(f"\\boxed{{{expression}}}", f"x+{random.integers(1, 10**6)}"))
    return rows[:count]


# ---- measuring ------------------------------------------------------------------------------------------------------


def bare_judge(text: str, gold: str) -> bool:
    from math_verify import parse, verify

    wanted = parse(f"${gold}$", parsing_timeout=None)
    return verify(wanted, parse(text, parsing_timeout=None), timeout_seconds=None)


class Bare:
    """A task a row on pebble's pool, with nothing around it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["math_verify"])
        self.pool = ProcessPool(max_workers=PROCESSES, context=context)

    def judge(self, rows: Sequence[Response]) -> None:
        futures: list[Future] = [self.pool.schedule(bare_judge, (row.text, row.gold), timeout=BUDGET) for row in rows]
        for future in futures:
            future.exception()

    def close(self) -> None:
        self.pool.stop()
        self.pool.join()


def rates(pools: dict[str, Bare | VerifierPool], rows: Sequence[Response]) -> dict[str, float]:
    """Rows a second of each pool."""
    seconds = dict.fromkeys(pools, 0.0)
    for i, at in enumerate(range(0, len(rows), AT_A_TIME)):
        for name in sorted(pools, reverse=bool(i % 2)):
            start = time.perf_counter()
            pools[name].judge(rows[at : at + AT_A_TIME])
            seconds[name] += time.perf_counter() - start
    return {name: len(rows) / seconds[name] for name in pools}


def measure(seed: int, abstained: Counter[str]) -> dict[str, float]:
    """One repetition: rows a second of everything."""
    random, judge = np.random.default_rng(seed), MathVerifier("any")
    plain, made, real = plain_rows(random, PLAIN), sympy_rows(random, SYMPY, judge), real_rows(judge)
    stream = plain_rows(random, STREAM // 2) + sympy_rows(random, STREAM // 2, judge)
    random.shuffle(stream)  # pyright: ignore[reportArgumentType]
    hostile = hostile_rows(random, round(STREAM * HOSTILE))
    places = {int(place): row for place, row in zip(random.permutation(STREAM), hostile, strict=False)}
    mixed = [row for i, clean in enumerate(stream) for row in ([places[i]] if i in places else []) + [clean]]
    warm = sympy_rows(random, 40, judge)
    bare = Bare()
    ours = VerifierPool(judge, timeout_seconds=BUDGET, processes=PROCESSES)
    found: dict[str, float] = {}
    try:
        for pool in (bare, ours):
            pool.judge(warm)
        for name, rows in (("plain", plain), ("made", made), ("real", real)):
            found |= {f"{name} {side}": one for side, one in rates({"bare": bare, "ours": ours}, rows).items()}
        for name, rows in (("clean", stream), ("mixed", mixed)):
            start = time.perf_counter()
            outcomes = ours.judge(rows)
            found[name] = len(stream) / (time.perf_counter() - start)  # the honest rows alone count
        abstained.update(errors_of(outcomes))
    finally:
        bare.close()
        ours.close()
    return found


def errors_of(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(outcome.judgement.error_class for outcome in outcomes if outcome.judgement.error_class)


def clock(completions: list[str], **_: object) -> list[float]:
    """A reward function for `latency`: says when it starts, or works on one long call in C."""
    if completions[0].startswith("hang"):
        pow(7, 10**9)
    return [time.monotonic()]


def latencies(count: int) -> list[float]:
    """Seconds from a kill until the next sample starts in a pool of one slot, which poison held."""
    pool = VerifierPool(FunctionVerifier(cloudpickle.dumps(clock), 0.0), timeout_seconds=0.5, processes=1)
    pool.extra = 0
    pool.judge([Response("warm")])
    killed: list[float] = []
    started: list[float] = []
    for i in range(count):
        poison = pool.submit(Response(f"hang {i}"))
        poison.add_done_callback(lambda _: killed.append(time.monotonic()))
        started.append(pool.submit(Response(f"next {i}")).result().judgement.score)
    pool.close()
    return [start - kill for start, kill in zip(started, killed, strict=True)]


# ---- the table ------------------------------------------------------------------------------------------------------


def ratios(runs: list[dict[str, float]], over: str, under: str) -> str:
    """Median of the repetitions' own ratios, and their range."""
    found = [run[over] / run[under] for run in runs]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def table(results: dict) -> str:
    runs = results["runs"]

    def median(name: str) -> str:
        return f"{statistics.median(run[name] for run in runs):,.0f}"

    lines = [
        "# Verifiers: the pool against bare pebble, and with hostile rows",
        "",
        f"`{COMMAND}`; {len(runs)} repetitions, medians (range). {results['machine']}. {PROCESSES} processes on either",
        f"side, {BUDGET:.0f} s a sample. Rates in rows a second.",
        "",
        "| rows | bare pebble | tutorloop | ratio | needed |",
        "|---|---|---|---|---|",
    ]
    for name, what, needed in (
        ("plain", "plain numbers", 3.0),
        ("made", "made, that need sympy", 0.9),
        ("real", "real, that need sympy", 0.9),
    ):
        bare, ours, ratio = median(f"{name} bare"), median(f"{name} ours"), ratios(runs, f"{name} ours", f"{name} bare")
        lines.append(f"| {what} | {bare} | {ours} | {ratio} | ≥ {needed:.1f} |")
    hostile = ", ".join(f"{count} {name}" for name, count in sorted(results["abstained"].items()))
    wait = [1e3 * seconds for seconds in results["latencies"]]
    return "\n".join(
        [
            *lines,
            "",
            "| tutorloop, plain and sympy rows in turn | honest rows a second | ratio | needed |",
            "|---|---|---|---|",
            f"| clean | {median('clean')} | | |",
            f"| with {HOSTILE:.0%} hostile rows | {median('mixed')} | {ratios(runs, 'mixed', 'clean')} | ≥ 0.6 |",
            "",
            f"Of {len(runs) * round(STREAM * HOSTILE)} hostile rows and {len(runs) * STREAM} others",
            f"could not be judged: {hostile}.",
            "",
            f"From a kill until the next sample starts in its slot: {statistics.median(wait):.1f} ms median,",
            f"{max(wait):.1f} ms at most of {len(wait)} (50 ms allowed).",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table again, from the results alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    path = arguments.results / "verifiers.json"
    if not arguments.table:
        names = ("math-verify", "sympy", "pebble")
        software = f"Python {platform.python_version()}, tutorloop {__version__}"
        software += "".join(f", {name} {version(name)}" for name in names)
        abstained: Counter[str] = Counter()
        runs = [measure(seed, abstained) for seed in range(REPETITIONS)]
        results = {
            "command": COMMAND,
            "machine": f"{os.cpu_count()} cores, {software}",
            "runs": [{name: round(value, 2) for name, value in run.items()} for run in runs],
            "abstained": dict(abstained),
            "latencies": [round(seconds, 5) for seconds in latencies(40)],
        }
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = table(json.loads(path.read_text(encoding="utf-8")))
    (arguments.results / "verifiers.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
