"""`tutorloop verify FILE.jsonl [--kind math] [--json]`: judge given predictions, compare with given verdicts."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..contracts.errors import ConfigError, DataError
from ..contracts.sections import THINKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from ..contracts.verifier_config import Verifier as Config
    from ..verifier_service.pool import Outcome, VerifierPool
    from ..verifier_service.rows import Row, Tally

AHEAD = 1024  # rows that are read before the first of them is judged
MOST_MARKERS = 8  # of the rows' own: each has processes of its own
SHOWN = 60  # characters of a text in the table


def verify(
    file: Annotated[Path, typer.Argument(help="JSONL: {prediction, gold, expected?, id?} a line.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="verifier.KEY=value of a recipe, e.g. verifier.pass_score=0.5")
    ] = None,
    kind: Annotated[str, typer.Option(help="math, exact, numeric, reasoning_gym, http, or MODULE:FUNCTION.")] = "math",
    as_json: Annotated[bool, typer.Option("--json", help="An object a row, and a last one with the summary.")] = False,
    answers: Annotated[str, typer.Option(help="box: the last box is the answer; any: or what stands without.")] = "any",
    marker: Annotated[str, typer.Option(help="The answer is what follows this, e.g. 'A:'.")] = "",
    thinking: Annotated[
        tuple[str, str], typer.Option(metavar="OPEN CLOSE", help="Marks around the reasoning, which is no answer.")
    ] = THINKING,
    timeout: Annotated[float, typer.Option(help="Seconds for a row.")] = 5.0,
    memory: Annotated[float, typer.Option(help="GiB for a row.")] = 1.0,
    processes: Annotated[int, typer.Option(min=0, help="Rows judged side by side; 0: as many as CPUs.")] = 0,
    tolerance: Annotated[float, typer.Option(help="numeric: largest difference, as a share of the gold.")] = 0.0,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="For each row what was read, from where, and by which rule it was decided."),
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="Slowest rows and disagreements in the table.")] = 10,
) -> bool:
    """Score a file of predictions: correct, incorrect, or abstained and why."""
    from rich.console import Console

    from ..verifier_service.rows import Tally, read_rows

    section = {"kind": kind, "answers": answers, "marker": marker, "tolerance": tolerance}
    config = _config({**section, "timeout_seconds": timeout, "memory_gib": memory}, overrides or [])
    lenient = config.response_fault == "abstain"
    tally, start = Tally(show, lenient), time.monotonic()
    interrupted = False
    with closing(_Pools(config, thinking, processes or max(2, len(os.sched_getaffinity(0))))) as pools:
        status = nullcontext() if as_json or explain else Console(stderr=True).status("judging")
        try:
            with status as shown:
                for row, outcome in _judged(read_rows(file), pools):
                    tally.add(row, outcome)
                    if as_json:
                        typer.echo(
                            json.dumps({**_object(row, outcome, lenient), **_read(row, outcome, pools, explain)})
                        )
                    elif explain:
                        _say(row, outcome, lenient, _read(row, outcome, pools, True))
                    elif shown and not tally.rows % 100:
                        shown.update(f"{tally.rows:,} rows")
        except KeyboardInterrupt:
            interrupted = True
    if not tally.rows and not interrupted:
        raise DataError("a file to verify has at least one row", f"{file} is empty")
    if as_json:
        seconds = round(time.monotonic() - start, 3)
        typer.echo(json.dumps({"summary": {**tally.summary(), "seconds": seconds, "interrupted": interrupted}}))
    else:
        Console().print(_table(tally))
    return not interrupted


def _config(section: dict[str, Any], overrides: list[str]) -> "Config":
    from ..contracts.recipe import parse_config

    for override in overrides:
        if not override.startswith("verifier.") or override.startswith("verifier.rewards"):
            rule = "an override is of the verifier's section, without its rewards: they decide nothing"
            raise ConfigError(rule, override, "e.g. verifier.pass_score=0.5")
    nobody = {"model": "."}
    tree = {"method": "opd", "output_dir": ".", "steps": 1, "prompts_per_step": 1, "student": nobody, "teacher": nobody}
    return parse_config({**tree, "data": {"path": "."}, "verifier": section}, overrides).verifier


class _Pools:
    """One pool, or one for each marker that the rows bring. Started where they are needed."""

    def __init__(self, config: "Config", thinking: tuple[str, str], processes: int) -> None:
        self.config, self.thinking, self.processes = config, thinking, processes
        self._pools: dict[str, VerifierPool] = {}
        self.of("")  # what is wrong with the verifier is told before the file is read

    def of(self, marker: str) -> "VerifierPool":
        """The pool of a row with this marker of its own. Raises ConfigError, DataError."""
        from ..verifier_service.pool import VerifierPool
        from ..verifier_service.verifiers import make_verifier

        config = self.config_of(marker)
        marker = config.marker
        if marker not in self._pools:
            if len(self._pools) > MOST_MARKERS:
                rule = f"the rows of a file have at most {MOST_MARKERS} different answer_marker"
                raise DataError(rule, f"more, {marker[:SHOWN]!a} among them", "give one with --marker")
            verifier = make_verifier(config, api_key=_key(config), thinking=self.thinking)
            self._pools[marker] = VerifierPool(
                verifier,
                timeout_seconds=self.config.timeout_seconds,
                memory_gib=self.config.memory_gib,
                processes=self.processes,
            )
        return self._pools[marker]

    def config_of(self, marker: str) -> "Config":
        """The section of a row with this marker of its own."""
        return self.config.model_copy(update={"marker": self.config.marker or marker})

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _key(config: "Config") -> str:
    key = os.environ.get(config.api_key_env, "")
    if config.api_key_env and not key:
        rule = "verifier.api_key_env names an environment variable that holds the servers' key"
        raise ConfigError(rule, f"{config.api_key_env} is not set", f"export {config.api_key_env}=…")
    return key


def _judged(rows: "Iterable[Row]", pools: _Pools) -> "Iterator[tuple[Row, Outcome]]":
    """Each row with its outcome, in order; at most AHEAD rows wait for theirs."""
    ahead: deque[tuple[Row, Future[Outcome]]] = deque()
    for row in rows:
        ahead.append((row, pools.of(row.marker).submit(row.response)))
        if len(ahead) >= AHEAD:
            row, outcome = ahead.popleft()
            yield row, outcome.result()
    for row, outcome in ahead:
        yield row, outcome.result()


def _read(row: "Row", outcome: "Outcome", pools: _Pools, explained: bool) -> dict[str, str]:
    """What was read, from where, and the rule; nothing where it is not asked for."""
    if not explained:
        return {}
    from ..verifier_service.explain import explain

    reading = explain(pools.config_of(row.marker), pools.thinking, row.response)
    read = {"from": reading.place, "read": reading.answer, "gold_read": reading.gold}
    return {**read, "rule": outcome.judgement.rule or outcome.judgement.error_class}


def _say(row: "Row", outcome: "Outcome", lenient: bool, read: dict[str, str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from ..verifier_service.rows import decision

    error = outcome.judgement.error_class
    decided = decision(outcome, lenient) + (f" ({error})" if error else "")
    styles = {"passed": "green", "abstained": "yellow"}
    text = Text.assemble(_text(row.row_id), "  ", (decided, styles.get(decided.partition(" ")[0], "red")))
    if row.expected is not None:
        text.append(f"  expected {'passed' if row.expected else 'incorrect'}", "dim")
    for name, value in read.items():
        text.append(f"\n  {name.replace('_', ' '):10}", "dim").append(_text(value))
    Console().print(text)


def _object(row: "Row", outcome: "Outcome", lenient: bool) -> dict[str, Any]:
    from ..verifier_service.rows import decision

    judgement = outcome.judgement
    expected = {} if row.expected is None else {"expected": row.expected}
    return {
        "id": row.row_id,
        "passed": judgement.passed,
        "abstained": decision(outcome, lenient) == "abstained",
        "answer": judgement.answer,
        "error_class": judgement.error_class,
        "seconds": round(outcome.seconds, 6),
        **expected,
    }


# ---- the table ------------------------------------------------------------------------------------------------------


def _table(tally: "Tally") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    figures = tally.summary()
    parts: list[tuple[str, RenderableType]] = [("", _pairs(_counts(figures)))]
    if figures["expected"]:
        parts.append(("against what was expected; an abstention agrees with nothing", _pairs(_agreement(figures))))
    if figures["errors"]:
        parts.append(("abstained because of", _pairs([(name, f"{n:,}") for name, n in figures["errors"].items()])))
    if figures["faults"]:
        named = [(name, f"{n:,}") for name, n in figures["faults"].items()]
        parts.append(("incorrect because of the response itself", _pairs(named)))
    if figures["slowest"]:
        slowest = [(row["id"], f"{row['seconds']:.3f} s") for row in figures["slowest"]]
        parts.append(("slowest rows", _pairs(slowest)))
    if tally.disagreements:
        parts.append(("disagreements", _disagreements(tally)))
    return Group(*(part for title, table in parts for part in (Text(title, "dim"), table) if part))


def _counts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = figures["rows"] or 1
    shares = [(name, f"{figures[name]:,}  {figures[name] / rows:.1%}") for name in ("passed", "incorrect", "abstained")]
    return [("rows", f"{figures['rows']:,}"), *shares]


def _agreement(figures: dict[str, Any]) -> list[tuple[str, str]]:
    share = f"{figures['agree']:,} of {figures['expected']:,}  {figures['agreement']:.2%}"
    names = ("wrong_accepts", "wrong_rejects", "abstained_expected_true", "abstained_expected_false")
    return [("agreement", share), *((name.replace("_", " "), f"{figures[name]:,}") for name in names)]


def _pairs(pairs: list[tuple[Any, str]]) -> "Table":
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    for name, value in pairs:
        table.add_row(_text(name), value)
    return table


def _disagreements(tally: "Tally") -> "Table":
    from rich.table import Table

    from ..verifier_service.rows import decision

    table = Table()
    for name in ("id", "expected", "decided", "answer", "gold"):
        table.add_column(name, overflow="fold")
    for row, outcome in tally.disagreements:
        error = outcome.judgement.error_class
        decided = decision(outcome, tally.lenient) + (f": {error}" if error else "")
        texts = (row.row_id, row.expected, decided, outcome.judgement.answer, row.response.gold)
        table.add_row(*map(_text, texts))
    return table


def _text(value: object) -> "Text":
    """What the file or a verifier says, cut and as text: no markup, no character that could steer a terminal."""
    from rich.text import Text

    from ..cluster.recording.progress import plain

    text, encoding = str(value), sys.stdout.encoding or "utf-8"
    text = plain(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")
    return Text(text.encode(encoding, "backslashreplace").decode(encoding))
