"""reasoning-gym's own score of an answer to one of its problems, for datasets that it generated.

The row is reasoning-gym's entry: `question`, `answer` and `metadata`, which may itself be JSON, with the generator's
name in `source_dataset`. Many of its scorers give part of a point to nearly right answers.

Some of them (0.1.25) call `eval` on the answer, or sympy's `parse_expr`, which does. While they score, the `eval` that
these modules see takes nothing but literals, arithmetic and sympy's elementary functions by name: no attribute, no
subscript, no other call. What is left can still hang, and runs in the process that can be killed.

`Integral` is no such name, so an answer that only writes the problem down again scores nothing, where reasoning-gym's
own scorer of `intermediate_integration` differentiates it and is content. About one in eight of that generator's own
answers is such: it could not solve its problem (0.1.25). The solved integral passes there.
"""

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

from ..contracts.errors import ConfigError
from ..contracts.protocols import Judgement, Response
from ..contracts.sections import THINKING
from .answers import harmless, read_answer

SYNTAX = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Name, ast.Load, ast.Call)
SYNTAX += (ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.keyword)
NAMES = frozenset(
    re.findall(
        r"\w+",
        "Symbol Integer Float Rational Add Mul Pow factorial sqrt exp log ln Abs pi E I oo sin cos tan cot sec csc "
        "asin acos atan acot asec acsc sinh cosh tanh asinh acosh atanh",
    )
)
BOARDS = ("arc_agi", "rearc")  # their scorers compare with tuples of tuples, which JSON has not


class ReasoningGymVerifier:
    """A response passes where its answer's score, in [0, 1], is at least `pass_score`. No answer is incorrect.

    The answer is read as `answers` and `marker` say; `<answer>…</answer>` is one too. Abstains as "no_row" without a
    row, "bad_row" where it is no entry, "unknown_dataset" where reasoning-gym has no such generator, "bad_score" where
    the score is none. Raises ConfigError where reasoning-gym is not installed.
    """

    needs_gold, waits = False, False

    def __init__(
        self, pass_score: float, answers: Literal["box", "any"], marker: str, thinking: tuple[str, str] = THINKING
    ) -> None:
        try:
            importlib.import_module("reasoning_gym")
        except ImportError as error:
            rule = "verifier.kind=reasoning_gym needs the extra `lab`"
            raise ConfigError(rule, str(error), "pip install 'tutorloop[lab]'") from error
        self.pass_score, self.answers, self.marker, self.thinking = pass_score, answers, marker, thinking
        self.harmless = harmless(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return ReasoningGymVerifier, (
            self.pass_score,
            self.answers,
            self.marker,
            self.thinking,
        )  # imports before the first sample

    def prepare(self, response: Response) -> Judgement | Response:
        """Decided here: no row, a bad one, or no answer."""
        if not response.row:
            return Judgement(False, error_class="no_row")
        if _entry(response.row) is None:
            return Judgement(False, error_class="bad_row")
        return response if self._answer(response.text) else Judgement(False)

    def __call__(self, response: Response) -> Judgement:
        entry, answer = _entry(response.row), self._answer(response.text)
        if entry is None or not answer:
            judged = self.prepare(response)
            assert isinstance(judged, Judgement)
            return judged
        scorer = _scorer(entry["metadata"]["source_dataset"])
        if scorer is None:
            return Judgement(False, answer, error_class="unknown_dataset")
        with _inert_eval():
            score = scorer(answer=answer, entry=entry)
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            return Judgement(False, answer, error_class="bad_score")
        return Judgement(score >= self.pass_score, answer, float(score))

    def _answer(self, text: str) -> str:
        """Its tags are reasoning-gym's own way to answer, whatever `answers` says."""
        found = read_answer(text, "any", self.marker, thinking=self.thinking)
        return found.text if found and (found.sure or self.answers == "any") else ""


def _entry(row: str) -> dict[str, Any] | None:
    """reasoning-gym's entry of a row, as the generator made it; None where it is none."""
    entry = json.loads(row)
    metadata = entry.get("metadata") if isinstance(entry, dict) else None
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError:
        return None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("source_dataset"), str):
        return None
    if metadata["source_dataset"] in BOARDS and isinstance(metadata.get("output"), list):
        metadata = {**metadata, "output": tuple(map(tuple, metadata["output"]))}
    return {**entry, "metadata": metadata}


@cache
def _scorer(dataset: str) -> Any:
    """Made once a process: some generators read their data."""
    from reasoning_gym import factory  # pyright: ignore[reportMissingImports]

    return factory.get_score_answer_fn(dataset) if dataset in factory.DATASETS else None


@contextmanager
def _inert_eval() -> Iterator[None]:
    """`eval` in reasoning-gym's modules and in sympy's parser is `inert_eval` meanwhile."""
    names = ("reasoning_gym.", "sympy.parsing.sympy_parser")
    modules = [module for name, module in sys.modules.items() if name.startswith(names)]
    for module in modules:
        module.eval = inert_eval  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for module in modules:
            del module.eval  # pyright: ignore[reportAttributeAccessIssue]


def inert_eval(source: Any, names: Mapping[str, Any] | None = None, own: Mapping[str, Any] | None = None) -> Any:
    """`eval` of an expression without anything that could act. Raises ValueError, SyntaxError."""
    tree = ast.parse(source, mode="eval") if isinstance(source, str) else None
    if tree is None:
        raise ValueError("only text is evaluated")
    for node in ast.walk(tree):
        if not isinstance(node, SYNTAX) or (isinstance(node, ast.Call) and not isinstance(node.func, ast.Name)):
            raise ValueError(f"{type(node).__name__} in an answer")
        if isinstance(node, ast.Name) and node.id not in NAMES and node.id not in (own or ()):
            raise ValueError("an unknown name in an answer")
    return eval(compile(tree, "answer", "eval"), {**(names or {}), "__builtins__": {}}, dict(own or {}))
