"""Any Python function with the signature of TRL's rewards, as a verifier or as a part of a reward.

`f(prompts, completions, **columns) -> list[float | None]` is called with lists of one: the prompt and the completion as
strings, or as messages where the row's own `prompt` is a list of messages, and of each column of the row its value. As
TRL does, it gets every column it takes by name, or all of them if it takes any; `answer` is the gold answer where the
row has no column of that name. What only a trainer has (`completion_ids`, `trainer_state`, …) is not there.

A function is made once, in the driver, and crosses as bytes: one of a FILE.py by value, one of a MODULE by name.
"""

import inspect
import json
import math
from collections.abc import Callable
from typing import Any

import cloudpickle

from ..contracts.errors import ConfigError
from ..contracts.own_code import Sources, load_module, package_of, sources_of
from ..contracts.protocols import Judgement, Response
from .answers import last_box

RULE = "a reward function of one's own is MODULE:FUNCTION or FILE.py:FUNCTION"
TRAINERS = ("completion_ids", "trainer_state", "environments", "log_extra", "log_metric")  # TRL gives them, we cannot
OURS = ("prompt", "prompts", "completion", "completions", *TRAINERS)  # no columns


def load_function(spec: str) -> bytes:
    """The pickled function that `spec` names. Raises ConfigError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(RULE, spec, "e.g. rewards.py:is_short")
    module = load_module(place, RULE, "")
    function = getattr(module, name, None)
    if not callable(function):
        what = "not there" if function is None else f"a {type(function).__name__}"
        raise ConfigError("a reward function can be called", f"{spec} is {what}", "check its name")
    _check_signature(function, spec)
    sources = sources_of(module)
    if sources:
        cloudpickle.register_pickle_by_value(package_of(module))  # no other process has the file
    try:
        return cloudpickle.dumps(_Sent(sources, function) if sources else function)
    except Exception as error:  # whatever its globals raise
        found = f"{spec}: {type(error).__name__}: {error}"
        raise ConfigError(
            "a reward function can be sent to other processes", found, "make such globals in it"
        ) from error


class _Sent:
    """A function that is itself again where it arrives, behind the sources that it may import from."""

    def __init__(self, sources: Sources, function: Callable[..., Any]) -> None:
        self.sources, self.function = sources, function

    def __reduce__(self) -> tuple[Any, ...]:
        return _function, (self.sources, self.function)


def _function(sources: Sources, function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _check_signature(function: Callable[..., Any], spec: str) -> None:
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise ConfigError("a reward function is not async", spec, "write it with def")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigError("a reward function shows its parameters", f"{spec}: {error}", "wrap it in a def") from error
    named, takes_all = _parameters(signature)
    if "completions" not in named and not takes_all:
        found = f"{spec}{signature}"
        raise ConfigError("a reward function takes completions by name", found, "def f(completions, **columns)")
    if lacking := [
        name for name in TRAINERS if name in named and signature.parameters[name].default is inspect.Parameter.empty
    ]:
        rule = "a reward function needs nothing that only a trainer has"
        raise ConfigError(rule, f"{spec} needs {', '.join(lacking)}", "give these parameters a default")


def _parameters(signature: inspect.Signature) -> tuple[frozenset[str], bool]:
    """The names that it takes as keywords, and whether it takes any."""
    parameters = signature.parameters.values()
    named = frozenset(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


class FunctionVerifier:
    """A response passes where the function's score is at least `pass_score`; its answer is its last box.

    Abstains as "no_reward" where the function returns None for it, and as "bad_reward" where it returns anything but a
    list of one finite number.
    """

    needs_gold, waits, harmless = False, False, ""

    def __init__(self, pickled: bytes, pass_score: float) -> None:
        self.pickled, self.pass_score = pickled, pass_score
        self._function: Callable[..., Any] = cloudpickle.loads(pickled)

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionVerifier, (self.pickled, self.pass_score)  # so that what it imports counts against no sample

    def prepare(self, response: Response) -> Judgement | Response:
        """Whatever the function does may hang."""
        return response

    def __call__(self, response: Response) -> Judgement:
        answer = last_box(response.text) or ""
        rewards = self._function(**_arguments(response, *_parameters(inspect.signature(self._function))))
        try:
            (reward,) = rewards
            if reward is None:
                return Judgement(False, answer, error_class="no_reward")
            score = math.nan if isinstance(reward, str | bytes) else float(reward)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            return Judgement(False, answer, error_class="bad_reward")
        return Judgement(score >= self.pass_score, answer, score)


def _arguments(response: Response, named: frozenset[str], takes_all: bool) -> dict[str, list[Any]]:
    row = json.loads(response.row) if response.row else {}
    turns = row.get("prompt")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        prompt, completion = turns, [{"role": "assistant", "content": response.text}]
    else:
        prompt, completion = response.prompt, response.text
    columns = {"answer": response.gold, **{key: value for key, value in row.items() if key not in OURS}}
    values = {**columns, "prompts": prompt, "completions": completion}
    return {key: [value] for key, value in values.items() if takes_all or key in named}
