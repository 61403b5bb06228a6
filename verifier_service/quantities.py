r"""Numbers as people write them, with their units, read exactly and linear in the text. No sympy.

How a number reads, once it is spelled (forms.py):
- `1,000.99`, `1.000,99`, `12,34,567`, `1'000.99` and `1 000,99` by their groups. Alone, a full stop is decimal, and a
  comma stands before three digits for a thousand, and else for the decimal point, but in a gold: there it parts a list.
- `3/4`, `\frac{3}{4}`, `1 3/4`; `1.5 \times 10^{3}`; `2 million`, `4 dozen`.
- `50%` is 50 and 1/2; beside another percentage it is itself alone.
- What follows is its unit: known ones (`cm`, `m/s`, `\text{dollars}`) with their size, other words (`people`) as
  words. A number without a unit may be one with any; of two units the values are compared where both measure the same,
  or are words that have one in common. Words that take something back (`or`, `not`, `wrong`) are no unit, and the whole
  is then no quantity.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice

LONGEST_NUMBER = 400  # characters; longer ones are left to the verifier that can be killed
HIGHEST_POWER = 400  # of ten
MOST_WORDS = 4  # of a unit

GROUPED = re.compile(
    r"(?P<plain>[0-9]+\.?[0-9]*|\.[0-9]+)"
    r"|(?P<english>[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]*)?)"
    r"|(?P<european>[1-9][0-9]{0,2}(?:\.[0-9]{3})+,[0-9]+|[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,})"
    r"|(?P<swiss>[0-9]{1,3}(?:'[0-9]{3})+(?:\.[0-9]*)?)"
    r"|(?P<comma>[0-9]+,[0-9]+)"
)
NUMERAL = r"(?:[0-9][0-9,.']*|\.[0-9]+)"
CURRENCY = r"(?:(?:US|C|A)?\\?\$|€|£|¥|₹|USD|EUR|GBP|INR|Rs\.?|\\pounds|\\euro)"
QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<before>{CURRENCY})?\s*(?P<minus>[-+]?)\s*"
    rf"(?:(?P<whole>[0-9]+)\s*(?=\\frac)|(?P<mixed>[0-9]+)\s+(?=[0-9]+\s*/\s*[0-9]))?"
    rf"(?:\\frac\s*(?:\{{\s*(?P<inner>[+-]?)\s*(?P<over>[0-9]+)\s*\}}|(?P<over1>[0-9])|\s(?P<over2>[0-9]))\s*"
    rf"(?:\{{\s*(?P<under>[0-9]+)\s*\}}|(?P<under1>[0-9]))"
    rf"|(?P<digits>{NUMERAL})(?:\s*/\s*(?P<down>[0-9]+))?)"
    rf"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*(?P<power>[-+]?[0-9]+)\s*\}}|(?P<power1>[0-9])))?"
    rf"(?P<rest>.*)",
    re.DOTALL,
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALE = re.compile(rf"\s*(?:\\text\s*\{{\s*)?({'|'.join(SCALES)})s?\b\s*(?P<open>[^{{}}]*\}})?", re.IGNORECASE)
CURRENCIES = {"€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee", "EUR": "euro", "GBP": "pound sterling"}
CURRENCIES |= {"INR": "rupee", "Rs": "rupee", "Rs.": "rupee", "\\pounds": "pound sterling", "\\euro": "euro"}

# What a unit measures, and how much of it. Those of one size are each their own.
SIZES: dict[str, tuple[Mapping[str, int], Fraction]] = {}


def _add(measured: Mapping[str, int], sizes: str) -> None:
    for entry in sizes.split(";"):
        names, _, size = entry.partition("=")
        for name in names.split():
            SIZES[name] = (measured, Fraction(size.strip()))


_add({"length": 1}, "m meter metre=1; km kilometer kilometre=1000; cm centimeter centimetre=1/100")
_add({"length": 1}, "mm millimeter millimetre=1/1000; inch inches=0.0254; ft foot feet=0.3048")
_add({"length": 1}, "yd yard=0.9144; mi mile=1609.344; nm nanometer=1e-9; dm decimeter=1/10")
_add({"mass": 1}, "g gram gm=1; kg kilogram=1000; mg milligram=1/1000; lb lbs pound=453.59237; oz ounce=28.349523125")
_add({"time": 1}, "s sec second=1; ms millisecond=1/1000; min minute=60; h hr hour=3600; day=86400; week=604800")
_add({"length": 3}, "L l liter litre=1/1000; mL ml milliliter millilitre=1/1000000; gal gallon=0.003785411784")
_add({"degree": 1}, "degree deg=1; arcminute arcmin=1/60; arcsecond arcsec=1/3600")
_add({"dollar": 1}, "dollar usd USD buck=1; cent=1/100")
_add({"length": 1, "time": -1}, "mph=0.44704; kph kmh kmph=5/18")
for _name in ("year", "month", "radian", "euro", "yen", "rupee"):
    _add({_name: 1}, f"{_name}=1")
_add({"year": 1}, "yr yrs=1")
_add({"radian": 1}, "rad=1")
_add({"force": 1}, "N newton=1; kN=1000")
_add({"energy": 1}, "J joule=1; kJ=1000")
_add({"power": 1}, "W watt=1; kW=1000")
_add({"voltage": 1}, "V volt=1")
_add({"current": 1}, "A amp ampere=1")
_add({"temperature": 1}, "K kelvin=1")
_add({"frequency": 1}, "Hz hertz=1; kHz=1000; MHz=1000000")
_add({"pressure": 1}, "Pa pascal=1; kPa=1000")
_add({"amount": 1}, "mol mole=1")
_add({"pound sterling": 1}, "£=1")
_add({"celsius": 1}, "°C=1")
_add({"fahrenheit": 1}, "°F=1")

UNSURE = (
    "or and nor but if maybe perhaps possibly probably either neither anything any some something else otherwise not "
    "isn is isnt no wrong incorrect false except unless about approximately around nearly almost roughly least most "
    "more less fewer than greater over under up between plus minus times mod modulo percent half quarter thirds base "
    "factorial also instead rather likely guess unsure actually should could might would cannot can depends unknown "
    "root power"
)
TAKES_BACK = frozenset(UNSURE.split())
RAISES = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
UNIT_TOKEN = re.compile(
    r"\\text\s*\{(?P<text>[^{}]*)\}|(?P<word>[A-Za-z]+)\.?|\^\s*(?:\{\s*(?P<power>-?[0-9])\s*\}|(?P<power1>[0-9]))"
    r"|(?P<degree>\^\s*(?:\{\s*\\circ\s*\}|\\circ))\s*(?P<scale>[CF](?![A-Za-z])|\\text\{ ?[CF] ?\})?"
    r"|(?P<sign>/|\\cdot|\*|-|\\\$|\$|€|£|¥|₹)|(?P<space>[\s.,]+)"
)
BEHIND = re.compile(r"(?<=[0-9A-Za-z})\]])(?: ?(?=\\text\{)| (?=[A-Za-z]{2}))")
KNOWN_WORD = re.compile(r" [A-Za-z]{2,}")
WORD = re.compile(r"(?P<word>[A-Za-z]+)\.?|(?P<sign>/|\^\s*\{?(?P<power>-?[0-9])\}?)|[\s.,-]+")
NOTHING: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class Unit:
    """`measured`: powers of what it measures, None where some word is not a known unit; `size` of one of it."""

    words: frozenset[str]
    measured: Mapping[str, int] | None
    size: Fraction


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its unit, if it has one. `places`: digits after the point of a decimal as it was written."""

    value: Fraction
    unit: Unit | None = None
    percent: bool = False
    places: int = field(default=-1, compare=False)

    def in_unit_of(self, other: "Quantity") -> Fraction | None:
        """The value where the other's unit is its own; None where they measure different things."""
        if self.unit is None or other.unit is None:
            return self.value
        ours, theirs = self.unit, other.unit
        if ours.measured is not None and theirs.measured is not None:
            return self.value * ours.size / theirs.size if ours.measured == theirs.measured else None
        return self.value if ours.words & theirs.words else None

    def seen_as(self, other: "Quantity") -> list[Fraction]:
        """Its values as one compares them with the other's: 50% is 50 and 1/2, beside 50% it is 50% alone."""
        value = self.in_unit_of(other)
        if value is None or ((self.percent or other.percent) and (self.unit or other.unit)):
            return []
        if self.percent == other.percent:
            return [value]
        return [value, value / 100 if self.percent else value * 100]


def read_quantity(text: str, *, gold: bool = False) -> Quantity | None:
    r"""The number, with its unit, that a spelled text is as a whole; None where it is anything else.

    Of a `gold` no more is taken for a unit than is surely one: `2s` there is a formula, and `1,5` a list.
    """
    if len(text) > LONGEST_NUMBER:
        return None
    match = QUANTITY.fullmatch(text.strip())
    if not match:
        return None
    part = match.groupdict()
    if part["sign"] and part["minus"]:
        return None
    read = _value(part, gold)
    if read is None:
        return None
    value, places = read
    rest = part["rest"]
    if scale := SCALE.match(rest):
        value *= SCALES[scale[1].lower()]
        rest = (rf"\text{{{scale['open']}" if (scale["open"] or "").strip("} ") else "") + rest[scale.end() :]
        places = -1
    if rest.strip() == "%":
        return None if part["before"] else Quantity(value, None, percent=True)
    unit = read_unit(rest, gold=gold) if rest.strip(" .") else None
    if rest.strip(" .") and unit is None:
        return _minutes(value, rest) if places < 1 else None
    if part["before"]:
        if unit is not None and unit.measured not in ({"dollar": 1}, None):
            return None
        name = CURRENCIES.get(part["before"], "dollar")
        unit = Unit(frozenset([name]), {name: 1}, Fraction(1))
    return Quantity(value, unit, places=places)


def _value(part: dict[str, str | None], gold: bool) -> tuple[Fraction, int] | None:
    places = -1
    over = part["over"] or part["over1"] or part["over2"]
    whole = int(part["whole"] or part["mixed"] or 0)
    if over:
        under = int(part["under"] or part["under1"] or 0)
        if not under or ((part["whole"] or part["mixed"]) and (part["inner"] or int(over) >= under)):
            return None
        value = whole + Fraction(int(over), under)
        if part["inner"] == "-":
            value = -value
    else:
        digits = part["digits"] or ""
        read = read_digits(digits, gold=gold)
        if read is None:
            return None
        value = read
        if part["down"]:
            under = int(part["down"])
            if not under or "." in digits or (part["mixed"] and value >= under):
                return None
            value = whole + value / under
        elif "." in digits or "," in digits:
            places = len(re.split(r"[.,]", digits)[-1]) if value.denominator > 1 else -1
    power = int(part["power"] or part["power1"] or 0)
    if abs(power) > HIGHEST_POWER:
        return None
    value *= Fraction(10) ** power
    return (-value if "-" in (part["sign"], part["minus"]) else value), (places if not power else -1)


def read_digits(digits: str, *, gold: bool = False) -> Fraction | None:
    """A numeral by its groups; a comma alone, in no gold, is the decimal one where no group of three follows."""
    match = GROUPED.fullmatch(digits)
    if not match:
        return None
    if match["comma"]:
        if gold:
            return None
        return Fraction(digits.replace(",", "."))
    if match["european"]:
        return Fraction(digits.replace(".", "").replace(",", "."))
    plain = digits.replace(",", "").replace("'", "")
    return Fraction(plain) if plain.strip(".") else None


def _minutes(degrees: Fraction, rest: str) -> Quantity | None:
    """`30^\\circ 15' 20''`."""
    match = re.fullmatch(r"\s*\^\\circ\s*([0-9]{1,2})\s*'\s*(?:([0-9]{1,2})\s*'')?\s*", rest)
    if not match:
        return None
    size = degrees + Fraction(int(match[1]), 60) + Fraction(int(match[2] or 0), 3600)
    return Quantity(size, Unit(frozenset(["degree"]), {"degree": 1}, Fraction(1)))


def part_unit(text: str) -> tuple[str, Unit | None]:
    r"""A formula and the unit behind it: `25\pi \text{ cm}^2`. What no `\text` sets apart must be known: `25\pi cm`."""
    for match in islice(BEHIND.finditer(text), MOST_WORDS + 1):
        formula, rest = text[: match.start()], text[match.start() :]
        if not formula.strip() or (not rest.lstrip().startswith("\\") and not KNOWN_WORD.match(rest)):
            continue
        unit = read_unit(rest, gold=True)
        if unit is not None and ("\\text" in rest or unit.measured is not None):
            return formula.rstrip(), unit
    return text, None


def same_unit(left: Unit | None, right: Unit | None) -> bool:
    """Whether values with them can be compared as they stand."""
    one = Quantity(Fraction(1), left).in_unit_of(Quantity(Fraction(1), right))
    return one == 1


def read_unit(text: str, *, gold: bool = False) -> Unit | None:
    """A unit in `\\text{…}` or plain; None where the text is none."""
    tokens: list[tuple[str, str]] = []  # kind, what
    at, spaced = 0, False
    while at < len(text):
        match = UNIT_TOKEN.match(text, at)
        if not match or match.end() == at:
            return None
        at = match.end()
        if match["text"] is not None:
            inner = _words(match["text"])
            if inner is None:
                return None
            tokens += inner
        elif match["word"]:
            word = match["word"]
            known = _known(word) is not None or word.lower() in RAISES or word.lower() == "per"
            if gold and not (known and len(word) > 1) and not (spaced and len(word) > 2):
                return None
            if not gold and not known and not (spaced and len(word) > 1):
                return None
            tokens.append(("word", word))
        elif match["degree"]:
            tokens.append(("word", f"°{re.sub('[^CF]', '', match['scale'])}" if match["scale"] else "degree"))
        elif match["power"] or match["power1"]:
            tokens.append(("power", match["power"] or match["power1"]))
        elif match["sign"]:
            sign = match["sign"]
            tokens.append(("sign", sign) if sign in ("/", "\\cdot", "*", "-") else ("word", _money(sign)))
        spaced = match["space"] is not None or match["text"] is not None
    return _unit(tokens)


def _money(sign: str) -> str:
    return CURRENCIES.get(sign, "dollar")


def _words(text: str) -> list[tuple[str, str]] | None:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = WORD.match(text, at)
        if not match or match.end() == at:
            return None
        at = match.end()
        if match["word"]:
            tokens.append(("word", match["word"]))
        elif match["power"]:
            tokens.append(("power", match["power"]))
        elif match["sign"]:
            tokens.append(("sign", "/"))
    return tokens


def _unit(tokens: list[tuple[str, str]]) -> Unit | None:
    """What the words measure together; None where there are none, too many, or ones that take the number back."""
    words, measured, size, known = [], dict[str, int](), Fraction(1), True
    side, raised = 1, 1
    for kind, what in tokens:
        low = what.lower()
        if kind == "word" and low == "per":
            side = -1
        elif kind == "sign":
            side = -1 if what == "/" else side
        elif kind == "word" and low in RAISES:
            if low.endswith("d"):
                if not words:
                    return None
                _raise(measured, words[-1], RAISES[low] - 1, side)
                size *= _size(words[-1]) ** (side * (RAISES[low] - 1))
            else:
                raised = RAISES[low]
        elif kind == "power":
            if not words or int(what) == 0:
                return None
            more = int(what) - 1
            _raise(measured, words[-1], more, side)
            size *= _size(words[-1]) ** (side * more)
        else:
            if low in TAKES_BACK:
                return None
            words.append(what)
            if len(words) > MOST_WORDS:
                return None
            found = _known(what)
            if found is None:
                known = False
                continue
            _raise(measured, what, raised, side)
            size *= found[1] ** (side * raised)
            raised = 1
    if not words:
        return None
    found = {what: power for what, power in measured.items() if power}
    return Unit(frozenset(map(_singular, words)), found if known else None, size)


def _raise(measured: dict[str, int], word: str, by: int, side: int) -> None:
    found = _known(word)
    for what, power in (found[0] if found else NOTHING).items():
        measured[what] = measured.get(what, 0) + side * power * by


def _size(word: str) -> Fraction:
    found = _known(word)
    return found[1] if found else Fraction(1)


def _known(word: str) -> tuple[Mapping[str, int], Fraction] | None:
    """A known unit by its name: short ones by their very letters, long ones in any case and number."""
    if word in SIZES:
        return SIZES[word]
    low = word.lower()
    if len(low) > 2:
        return SIZES.get(low) or SIZES.get(_singular(low))
    return None


def _singular(word: str) -> str:
    low = word.lower() if len(word) > 2 else word
    return low[:-1] if len(low) > 3 and low.endswith("s") and not low.endswith("ss") else low
