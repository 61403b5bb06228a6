"""A reward of several parts: weight · the verifier's score + Σ weight · a part's score.

Whether a response passed, and its answer, are the verifier's alone. Where the verifier or a part abstains, all does;
what is the response's own fault is incorrect, and has its parts.
The parts are `format` (it matches a pattern, or holds exactly one complete box), `length` (the soft overlong
punishment of DAPO, 2503.14476, equation 13) and reward functions.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from ..contracts.errors import ConfigError
from ..contracts.protocols import Judgement, Response, Verifier, error_class_of, judgement_of
from ..contracts.verifier_config import Reward
from .answers import last_box

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


class CompositeVerifier:
    """`parts` are rewards, each with the verifier of its function; format and length have none.

    A judgement's `parts` are the parts' own scores, by their names: a function's is its own name, and the second of one
    name is NAME_2. Raises ConfigError for a pattern that is no regular expression.
    """

    def __init__(self, main: Verifier, weight: float, parts: Sequence[tuple[Reward, Verifier | None]]) -> None:
        self.main, self.weight = main, weight
        self.needs_gold, self.waits = main.needs_gold, main.waits
        self.harmless = main.harmless
        self.functions = any(verifier for _, verifier in parts)  # what they do is no response's fault
        names = part_names([reward for reward, _ in parts])
        patterns = [_compiled(reward.pattern) for reward, _ in parts]
        self._parts = list(zip(names, parts, patterns, strict=True))

    def prepare(self, response: Response) -> Judgement | Response:
        """Decided here if the verifier can and no part needs a process; else the whole response is needed there."""
        try:
            judged = self.main.prepare(response)
        except Exception as error:
            judged = Judgement(False, error_class=error_class_of(error), fault=True)
        if isinstance(judged, Response):
            return response
        if self._abstains(judged):
            return judged
        if any(verifier or pattern for _, (_, verifier), pattern in self._parts):
            return response
        return self._sum(judged, response)

    def __call__(self, response: Response) -> Judgement:
        judged = judgement_of(self.main, response)
        return judged if self._abstains(judged) else self._sum(judged, response)

    def of_fault(self, error_class: str, response: Response) -> Judgement:
        """The judgement of a response that the verifier could not judge by its own fault."""
        return self._sum(Judgement(False, error_class=error_class, fault=True), response)

    def _abstains(self, judged: Judgement) -> bool:
        return bool(judged.error_class) and not (judged.fault and self.harmless)

    def _sum(self, judged: Judgement, response: Response) -> Judgement:
        score, parts = self.weight * judged.score, []
        for name, (reward, verifier), pattern in self._parts:
            if verifier:
                part = judgement_of(verifier, response)
                if part.error_class:
                    reason = f"{name}:{part.error_class}"
                    return replace(judged, passed=False, score=0.0, error_class=reason, fault=False)
                value = part.score
            elif reward.kind == "format":
                value = float(bool(pattern.fullmatch(response.text)) if pattern else one_box(response.text))
            else:
                value = overlong(response.tokens, reward.limit, reward.buffer)
            score += reward.weight * value
            parts.append((name, value))
        return replace(judged, score=score, parts=tuple(parts))


def part_names(rewards: Sequence[Reward]) -> list[str]:
    """A name for each part, all different."""
    kinds = [reward.kind.rpartition(":")[2] for reward in rewards]
    counts = [kinds[: i + 1].count(kind) for i, kind in enumerate(kinds)]
    return [kind if count == 1 else f"{kind}_{count}" for kind, count in zip(kinds, counts, strict=True)]


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """Its `.` is any character: responses have lines."""
    try:
        return re.compile(pattern, re.DOTALL) if pattern else None
    except (re.error, RecursionError, OverflowError) as error:
        rule = "verifier.rewards: pattern is a regular expression"
        raise ConfigError(rule, f"{pattern!r}: {error}", "see Python's re") from error


def one_box(text: str) -> bool:
    """Exactly one box begins in the text, and it is complete and not empty."""
    openings = BOX.finditer(text)
    return next(openings, None) is not None and next(openings, None) is None and last_box(text) is not None


def overlong(tokens: int, limit: int, buffer: int) -> float:
    """0 up to `limit - buffer` tokens, from there in a line to -1 at `limit`, and -1 beyond."""
    if tokens >= limit:
        return -1.0
    return min(0.0, (limit - buffer - tokens) / buffer) if buffer else 0.0
