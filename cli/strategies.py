"""`tutorloop strategies fit` and `show`: strategies of a teacher's solutions, for a person."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..contracts.errors import ConfigError, StrategyError
from ..contracts.sections import HIDDEN
from ..lab import SPLITS, STRATEGY_SPLITS, data_path
from .bank import judged
from .bank_tables import because, say
from .outcome import ends_clearly

if TYPE_CHECKING:
    from rich.table import Table

    from ..verifier_service.strategies.fit import FitReport
    from ..verifier_service.strategies.solutions import Problem

LAB = "lab:"
KNOWN = (*SPLITS, *STRATEGY_SPLITS)
SHOWN_CODES = 10


def fit(
    solutions: Annotated[
        list[str],
        typer.Argument(
            help="JSONL, or lab:train: {id|prompt_id, prompt|problem|question, answer|gold, "
            "solution|solutions|response, passed?} a line; solutions without `passed` are judged as --verifier says.",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="The folder that is written, in place of strategies there.")],
    embedder: Annotated[
        str, typer.Option(help="hidden:MODEL, the hidden states of one; or a sentence-transformers model.")
    ] = f"{HIDDEN}lab:teacher",
    tokenizer: Annotated[str, typer.Option(help="The model whose tokens are counted; default: hidden:MODEL's.")] = "",
    least: Annotated[int, typer.Option(min=1, help="Tokens of a step at least.")] = 24,
    most: Annotated[int, typer.Option(min=1, help="Tokens of a step at most.")] = 160,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a solution at most.")] = 32,
    codes: Annotated[int, typer.Option(min=2, help="Codes that strategies are told apart by.")] = 64,
    width: Annotated[int, typer.Option(min=8, help="Of the transformer over the steps; a multiple of 8.")] = 256,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Train nothing: the whitened embeddings themselves.")
    ] = False,
    verifier: Annotated[str, typer.Option(help="math, exact or numeric.")] = "math",
    device: Annotated[str, typer.Option(help="Of the embedder: cpu, cuda, …")] = "cpu",
    threads: Annotated[
        int, typer.Option(min=0, help="Of the CPU, for an embedder that is large enough; 0: as many as there are.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> bool:
    """Learn the strategies of a teacher's right solutions: vectors in which steps of one strategy are near each other.

    Wrong solutions are left out. Several solutions of a problem teach most: that one strategy has many wordings.

    Example: tutorloop strategies fit solutions.jsonl --to my-strategies --embedder hidden:Qwen/Qwen3-0.6B
    """
    from ..models.loading import load_tokenizer
    from ..verifier_service.strategies import fit as fitting
    from ..verifier_service.strategies.embedding import make_embedder
    from ..verifier_service.strategies.segments import StepLimits

    tokens_of = _counted_in(embedder, tokenizer)
    if width % 8:
        raise ConfigError("--width is a multiple of 8", str(width), "e.g. --width 256")
    limits = StepLimits(least=least, most=most, steps=steps)
    fitting.check_place(to)
    started = time.monotonic()
    report = fitting.fit(
        _problems(solutions, verifier),
        make_embedder(embedder, device, threads or os.cpu_count() or 1),
        load_tokenizer(tokens_of),
        to,
        limits=limits,
        codes=codes,
        width=width,
        frozen=frozen,
        seed=seed,
        note=say,
    )
    _print(report, time.monotonic() - started)
    say(f"{to} is at version {report.version}; a run takes it with strategies.path={to}")
    return True


def show(
    run: Annotated[Path, typer.Argument(help="The run's folder: its output_dir.")],
    to: Annotated[Path | None, typer.Option("--to", help="Where the page and the lines go; default: RUN.")] = None,
    rollout: Annotated[
        str, typer.Option(help="The rollout_id whose plan is drawn; default: the newest right one.")
    ] = "",
    most: Annotated[
        int, typer.Option(min=1, help="Rollouts that are read, at most: of training, and of either evaluation.")
    ] = 500,
    strategies: Annotated[
        Path | None, typer.Option(help="Where the run's extractor is now; default: where the run had it.")
    ] = None,
    solutions: Annotated[
        list[str] | None,
        typer.Option(
            help="Right solutions of problems that the extractor was not fitted to, those of evaluations: their "
            "rollouts are compared with these. As `fit` reads them; may be given again.",
        ),
    ] = None,
    verifier: Annotated[str, typer.Option(help="math, exact or numeric, for --solutions.")] = "math",
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Go on where the extractor is another than the run's.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of the embedder: cpu, cuda, …")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU, for an embedder that is large enough.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object of the figures.")] = False,
) -> bool:
    """Audit the strategies of a run: a page, strategies.html, and strategies.jsonl with one line a rollout.

    It reads what the run recorded, rollouts.jsonl, and encodes it again: how alike the student's steps and the
    teacher's are, whether that says anything of being right, and whether the student has collapsed onto one strategy.
    """
    from ..cluster.recording.strategy_audit import audit
    from ..cluster.recording.strategy_checks import checks_of
    from ..cluster.recording.strategy_export import figures_of, read_of
    from ..cluster.recording.strategy_page import write_audit

    more = _problems(solutions, verifier) if solutions else []
    found = audit(
        run,
        most=most,
        rollout=rollout,
        strategies=strategies,
        more=more,
        anyway=anyway,
        device=device,
        threads=threads,
    )
    page, lines = write_audit(found, to or run)
    if as_json:
        typer.echo(json.dumps({**figures_of(found), "page": str(page), "lines": str(lines)}))
        return True
    for sentence in read_of(found):
        say(sentence)
    for check in checks_of(found):
        say(f"{check.name}: {check.figure}" + (f" (alarming: {check.alarm})" if check.alarming else ""))
    say(f"{page}, and {len(found.followed)} lines in {lines}")
    return True


app = typer.Typer(no_args_is_help=True, help="Strategies of a teacher's solutions: fit, show.")
for name, command in {"fit": fit, "show": show}.items():
    app.command(name)(ends_clearly(command))


# ---- what is read ----------------------------------------------------------------------------------------------------


def _counted_in(embedder: str, tokenizer: str) -> str:
    """The model in whose tokens steps are counted. Raises ConfigError."""
    if not tokenizer and not embedder.startswith(HIDDEN):
        rule = "steps are counted in a model's tokens"
        raise ConfigError(rule, f"--embedder {embedder} has none of its own", "--tokenizer MODEL, e.g. the student's")
    return tokenizer or embedder.removeprefix(HIDDEN)


def _problems(files: list[str], verifier: str) -> "list[Problem]":
    """Those with right solutions. Raises DataError, StrategyError."""
    from ..verifier_service.strategies.solutions import read_solutions

    paths = [_path(name) for name in files]
    problems, left_out = read_solutions(paths, lambda responses: judged(responses, verifier))
    right = sum(len(problem.solutions) for problem in problems)
    say(f"{right} right solutions of {len(problems)} problems{because('left out', left_out)}")
    if not problems:
        remedy = "check answer, passed and --verifier"
        raise StrategyError("strategies are of right solutions", "there are none", remedy)
    return problems


def _path(name: str) -> Path:
    split = name.removeprefix(LAB)
    path = data_path(split) if name.startswith(LAB) and split in KNOWN else Path(name)
    if not path.is_file():
        remedy = f"name a JSONL file, or lab: and one of {', '.join(KNOWN)}"
        raise StrategyError("solutions are in a file", f"{name}: no such file", remedy)
    return path


# ---- what is printed ---------------------------------------------------------------------------------------------


def _print(report: "FitReport", seconds: float) -> None:
    from rich.console import Console

    Console().print(_figures(report, seconds))
    Console().print(_codes(report))
    for line in _advice(report):
        say(line)


def _figures(report: "FitReport", seconds: float) -> "Table":
    from rich.table import Table

    table = Table("figure", "value")
    rows = {
        "problems, solutions, steps": f"{report.problems}, {report.solutions}, {report.steps}",
        "solutions of fewer than 3 steps": f"{report.short_share:.1%}",
        "codes in use, as good as": f"{len(report.codes)}, {report.effective_codes:.1f}",
        **{f"loss {name}, first and last": f"{a:.3f}, {b:.3f}" for name, (a, b) in report.losses.items()},
        "a probe tells the problem": _told(report),
        "seconds": f"{seconds:.1f}",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def _told(report: "FitReport") -> str:
    leakage = report.leakage
    if leakage is None:
        return "not measured: no problem has two solutions"
    return f"{leakage.accuracy:.1%} of {leakage.problems} (chance {leakage.chance:.1%})"


def _codes(report: "FitReport") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from ..cluster.recording.progress import plain

    table = Table("code", "share", "name", "a step of it")
    for code in report.codes[:SHOWN_CODES]:
        texts = (plain(text.replace("\n", " ")[:80]) for text in (code.name, code.exemplars[0]))
        table.add_row(str(code.code), f"{code.share:.1%}", *map(Text, texts))
    return table


def _advice(report: "FitReport") -> list[str]:
    """What a person should see to before a run."""
    found = []
    if report.short_share > 0.5:
        found.append("most solutions have fewer than 3 steps, and none is compared with those: lower --least")
    if report.leakage and report.leakage.leaks:
        found.append(
            "vectors tell many problems apart, beside strategies: give more problems, and more solutions of each"
        )
    return found
