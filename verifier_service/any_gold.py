"""Several golds that are all right, for a verifier that compares a response with one."""

from collections.abc import Iterator
from dataclasses import replace

from ..contracts.protocols import Judgement, Response, Verifier, error_class_of, judgement_of


class AnyGoldVerifier:
    """A response passes where it equals any of its golds, and that gold's judgement is its own.

    Else it is incorrect, with the answer that was compared with the first gold, or by its own fault with the first;
    where no gold could be compared with it, it abstains, with the first gold's reason.
    """

    def __init__(self, one: Verifier) -> None:
        self.one = one
        self.needs_gold, self.waits, self.harmless = one.needs_gold, one.waits, one.harmless

    def prepare(self, response: Response) -> Judgement | Response:
        """Decided here if it passes by a gold that can be compared here, or if all of them can; else a process needs
        the whole response, with its golds."""
        if not response.other_golds:
            return self.one.prepare(response)
        prepared = [self._prepared(single) for single in singles(response)]
        decided = [one for one in prepared if isinstance(one, Judgement)]
        found = best(decided) if decided else None
        return found if found and (_passed(found) or len(decided) == len(prepared)) else response

    def _prepared(self, single: Response) -> Judgement | Response:
        try:
            return self.one.prepare(single)
        except Exception as error:  # of this gold alone
            return Judgement(False, error_class=error_class_of(error), fault=True)

    def __call__(self, response: Response) -> Judgement:
        if not response.other_golds:
            return self.one(response)
        found = []
        for single in singles(response):
            found.append(judgement_of(self.one, single))
            if _passed(found[-1]):
                break
        return best(found)


def singles(response: Response) -> Iterator[Response]:
    """The response with each of its golds alone; those without any text are none."""
    for gold in (response.gold, *response.other_golds):
        if gold.strip():
            yield replace(response, gold=gold, other_golds=())


def best(found: list[Judgement]) -> Judgement:
    """The judgement that counts, of those by each gold: one that passed, compared, is a fault, or abstains."""
    order = (_passed, lambda one: not one.error_class, lambda one: one.fault, lambda _: True)
    return next(one for kind in order for one in found if kind(one))


def _passed(judgement: Judgement) -> bool:
    return judgement.passed and not judgement.error_class
