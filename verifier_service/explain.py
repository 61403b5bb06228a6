"""What a verifier read of a response and of its gold, and from where, for people. No sympy; linear in the texts."""

from dataclasses import dataclass

from ..contracts.protocols import Response
from ..contracts.verifier_config import Verifier as Config
from .answers import gold_answer, last_box, read_answer, values, without_dollars
from .forms import spelled
from .quantities import read_quantity


@dataclass(frozen=True, slots=True)
class Reading:
    """`place`: where the answer stands. `answer`, `gold`: as they were compared, "" where nothing was read."""

    place: str
    answer: str
    gold: str


def explain(config: Config, thinking: tuple[str, str], response: Response) -> Reading:
    """The reading of the kinds math, numeric and exact; of others, what they were given."""
    if config.kind not in ("math", "numeric", "exact"):
        return Reading(f"the {config.kind} verifier has the whole response", "", response.gold)
    gold = response.gold.strip() if config.kind == "exact" else gold_answer(response.gold)
    several = config.kind == "math" and values(gold) > 1 and read_quantity(gold, gold=True) is None
    found = read_answer(response.text, config.answers, config.marker, several=several, thinking=thinking)
    if config.marker:
        place = f"what follows the last {config.marker!r} on its line"
    elif thinking[1] in response.text and found is not None:
        place = f"after {thinking[1]}"
    else:
        place = ""
    if found is None:
        where = {True: place, False: "no box" if config.answers == "box" else "no box, no answer"}[bool(config.marker)]
        return Reading(f"nowhere: {where}", "", gold)
    if not config.marker:
        own = "the last box" if found.sure and last_box(response.text) else "the <answer> tag"
        own = own if found.sure else "the whole text, searched"
        own = "the boxes that are one list" if several and found.sure and found.text != last_box(response.text) else own
        place = f"{own}, {place}" if place else own
    if config.kind == "exact":
        return Reading(place, found.text, gold)
    return Reading(place, spelled(without_dollars(found.text)) if found.sure else found.text, spelled(gold))
