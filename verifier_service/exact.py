"""Equality of strings: for answers that are words, labels or lists with one spelling."""

from typing import Literal

from ..contracts.protocols import Judgement, Response
from ..contracts.sections import THINKING
from .answers import NO_ANSWER, harmless, read_answer


class ExactVerifier:
    """Passes where the answer equals the gold, spaces around both stripped.

    The answer of a response without marker, box and tag is all of it, whatever `answers` says.
    """

    needs_gold = True
    waits = False

    def __init__(
        self, answers: Literal["box", "any"] = "box", marker: str = "", thinking: tuple[str, str] = THINKING
    ) -> None:
        self.answers: Literal["box", "any"] = answers
        self.marker, self.thinking = marker, thinking
        self.harmless = harmless(marker)

    def prepare(self, response: Response) -> Judgement:
        """Nothing here can hang."""
        found = read_answer(response.text, self.answers, self.marker, thinking=self.thinking)
        passed = found is not None and found.text == response.gold.strip()
        return Judgement(passed, found.text if found else "", rule="the same text" if found else NO_ANSWER)

    def __call__(self, response: Response) -> Judgement:
        return self.prepare(response)
