"""Equality of strings: for answers that are words, labels or lists with one spelling."""

from .answers import Decision, last_box


class ExactVerifier:
    """Passes where the last box, or the whole text if it has no box at all, equals the gold, spaces around stripped."""

    def __call__(self, text: str, gold: str) -> Decision:
        answer = (last_box(text) or "") if "\\boxed" in text or "\\fbox" in text else text.strip()
        return Decision(answer == gold.strip(), answer)

    def decide_quickly(self, text: str, gold: str) -> Decision | None:
        """Nothing here can hang."""
        return self(text, gold)
