r"""Steps of a solution and their abstracted text: against texts whose boundaries are known since they were built.

A slow segmenter, which looks at every place again for each cut, must agree with `segment`.
"""

from itertools import pairwise

import numpy as np
import pytest
from hostile_texts import SURROGATES, TEXTS
from run_rows import fresh_rng
from tiny import EOS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tutorloop.contracts.errors import ConfigError
from tutorloop.lab import model_path
from tutorloop.lab.tokenizer import load
from tutorloop.verifier_service.strategies.abstraction import abstract
from tutorloop.verifier_service.strategies.segments import (
    FEWEST,
    StepLimits,
    formulas,
    pieces_of,
    segment,
    segment_text,
)

EVERYWHERE = StepLimits(least=1, most=2, steps=10**6)
WORDS = ["we", "add", "the", "two", "halves", "of", "what", "is", "left", "and", "get", "more", "than", "half"]
FORMULAS = [
    "$x = 1. Then y$",
    r"\(a. B\)",
    r"\boxed{A. {B}. \} C}",
    "\\begin{cases} a. B \\\\ c.\n D \\begin{x} E. F \\end{x} G. \\end{cases}",
    "$$y. Z$$",
    "$5 + x$",
    r"\[ u. \[ V \]",
]
WHOLE = [*FORMULAS, "3.14", "e.g. Anna", "Mr. Smith", "i.e. 7", "$5", "cost $3.50,", "1,000.5", "Fig. 2", "3, 4, ... 9"]
DISPLAYS = ["\\[\n\n x = 1. Then\n y = 2 \n\n\\]", "$$ a. B\n$$"]
LINE_MARKS = ["- ", "3. ", "2) ", "### ", "**So** ", "Step 2: ", "  - ", "Then, "]
SENTENCE_MARKS = ["Then, ", "Next, ", "Finally, ", "Step 3: "]


class Built:
    """A made-up solution: its text, its boundaries with their strengths, and its formulas."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.text = rng, ""
        self.bounds: dict[int, int] = {}
        self.spans: list[tuple[int, int]] = []
        ahead = 0
        for _ in range(int(rng.integers(1, 9))):
            ahead = self.line(ahead)
            newlines = int(rng.integers(1, 4))
            self.text += "\n" * newlines if newlines < 3 else "\n \n"
            ahead = min(ahead, 5 if newlines > 1 else 3)

    def pick(self, options: list[str]) -> str:
        return options[self.rng.integers(len(options))]

    def bound(self, strength: int) -> None:
        if strength and self.text:
            self.bounds[len(self.text)] = max(strength, self.bounds.get(len(self.text), 0))

    def line(self, ahead: int) -> int:
        """Adds a line behind a boundary of the strength `ahead`; what the next line may have at most."""
        if self.rng.random() < 0.15:
            self.bound(min(ahead, 1))
            self.formula(self.pick(DISPLAYS))
            return 5
        marked = self.rng.random() < 0.3
        self.bound(max(ahead, 4 * marked))
        self.text += self.pick(LINE_MARKS) if marked else ""
        for number in range(int(self.rng.integers(1, 4))):
            if number:
                marked = self.rng.random() < 0.3
                self.bound(4 if marked else 2)
                self.text += " " + (self.pick(SENTENCE_MARKS) if marked else "")
            self.sentence()
        if self.rng.random() < 0.2:
            self.text = self.text[:-1] + ":"
            return 1
        return 5

    def sentence(self) -> None:
        for number in range(int(self.rng.integers(1, 9))):
            self.text += " " if number else ""
            if number and self.rng.random() < 0.25:
                self.formula(self.pick(WHOLE))
            else:
                word = self.pick(WORDS)
                self.text += word if number else word.capitalize()
        self.text += " it" + self.pick([".", "?", "!", ".", "."])

    def formula(self, text: str) -> None:
        if text in FORMULAS or text in DISPLAYS:
            self.spans.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def pieces(self) -> list[str]:
        """Cut anywhere, as a tokenizer might, with tokens that say nothing."""
        at = np.cumsum(self.rng.integers(0, 6, len(self.text))).tolist()
        edges = [0, *(place for place in at if place < len(self.text)), len(self.text)]
        return [self.text[a:b] for a, b in pairwise(edges)] + [""] * int(self.rng.integers(0, 2))


def slow_segment(built: Built, pieces: list[str], limits: StepLimits) -> list[int]:
    """Starts of the steps."""
    text, total, cuts = built.text, len(pieces), {}
    begins = [len("".join(pieces[:t])) for t in range(total)]
    for place, strength in built.bounds.items():
        token = next((t for t in range(total) if begins[t] >= place), 0)
        at = begins[token]
        clean = at == place or text[at - 1].isspace() or text[at : at + 1].isspace()
        inside = any(a < at < b for a, b in built.spans)
        if token > 0 and at < len(text) and clean and not inside:
            cuts[token] = max(strength, cuts.get(token, 0))
    starts = [0]
    for token in sorted(t for t, strength in cuts.items() if strength >= 4):
        if token - starts[-1] >= limits.least and total - token >= limits.least:
            starts.append(token)
    longest = max(2 * limits.least, min(limits.most, total // FEWEST))

    def split(a: int, b: int) -> list[int]:
        free = {t: s for t, s in cuts.items() if a + limits.least <= t <= b - limits.least}
        if b - a <= longest or not free:
            return [a]
        cut = min((-s, abs(t - (a + b) / 2), t) for t, s in free.items())[2]
        return split(a, cut) + split(cut, b)

    return [start for a, b in pairwise([*starts, total]) for start in split(a, b)]


def whole(pieces: list[str], limits: StepLimits) -> list[str]:
    """The texts of the steps, once they are seen to cover all."""
    steps = segment(pieces, limits)
    assert [step.start for step in steps] == [0, *(step.end for step in steps[:-1])] and steps[-1].end == len(pieces)
    assert [step.text for step in steps] == ["".join(pieces[step.start : step.end]) for step in steps]
    assert all(step.end > step.start for step in steps) and len(steps) <= limits.steps
    return [step.text for step in steps]


@pytest.mark.parametrize("trial", range(150))
def test_it_is_the_slow_segmenter(trial):
    rng = fresh_rng()
    built = Built(rng)
    print(repr(built.text))
    pieces = list(built.text) if trial % 3 == 0 else built.pieces()
    least = int(rng.integers(1, 40))
    limits = StepLimits(least=least, most=2 * least + int(rng.integers(0, 100)), steps=10**6)
    starts = slow_segment(built, pieces, limits)
    assert [step.start for step in segment(pieces, limits)] == starts
    assert formulas(built.text) == built.spans
    few = StepLimits(least=least, most=limits.most, steps=int(rng.integers(1, 9)))
    assert "".join(whole(pieces, few)) == built.text
    merged = [step.start for step in segment(pieces, few)]
    assert len(merged) == min(few.steps, len(starts)) and set(merged) <= set(starts)
    counts = np.diff([*(starts.index(start) for start in merged), len(starts)])
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    "steps",
    [
        ["One.", " Two"],
        ["We have:\n", "- one\n", "- two"],
        ["# A\n\n", "It is 3.5 m.\n", "So what?", " Yes."],
        ["It costs $5.", " She has $7."],
        ["It costs $5.", " Let $x. Y$ be.", " So $z. A$."],
        ["He paid 3*2=$<<3*2=6>>6.", " It is $6."],
        ["Unclosed $x. Y. Z\nstill. Here\n\n", "Out.", " Of it."],
        ["Unclosed \\[ x. Y\n\n", "Out.", " Of it."],
        ["So \\boxed{x. Y\n\n", "Out."],
        ["As .\\[x = 1.\\]", "Hence $y.$", " Then \\(z.\\)", " Fine."],
        ["Escaped \\$5.", " And \\\\[2pt] it.", " End \\{a."],
        ["Dr. Who met Mrs. Hu, cf. Fig. 3, approx. 7 vs. Al.", " End... Or not … Ok."],
        ["1. It is.\n", "2. Fine."],
        ["求和。", "然后！", "好"],
        ["a\r\n", "b\r\n\r\n", "c"],
        ["no boundary at all"],
        ["\n\n", "x.\n"],
    ],
)
def test_where_it_cuts(steps):
    assert whole(list("".join(steps)), EVERYWHERE) == steps


def test_a_token_with_a_boundary_inside_ends_the_step_before():
    pieces = ["One", ". T", "wo", " it", ".\n\nThe", " end", ". It", " is", " so", "."]
    assert whole(pieces, EVERYWHERE) == ["One. Two it.\n\nThe", " end. It", " is so."]
    assert whole(["One. 3", ".5 it"], EVERYWHERE) == ["One. 3.5 it"]
    assert whole(["One. $x. Y", " z$ it", ". So"], EVERYWHERE) == ["One. $x. Y z$ it. So"]
    assert whole(["", "One.", "", " T", "wo", ""], EVERYWHERE) == ["One.", " Two"]


def test_stronger_boundaries_go_first_and_long_formulas_stay_whole():
    words = "so it is and so on "
    text = f"{words * 5}it.\n{words * 3}it. And {words * 5}so."
    assert whole(list(text), StepLimits(least=90, most=180)) == [text[:99], text[99:]]
    text = f"It is.\n\n\\[{words * 99}. A.\nB\\]\n\nSo."
    assert whole(list(text), StepLimits(least=2, most=9)) == ["It is.\n\n", text[8:-3], "So."]


@pytest.mark.parametrize("limits", [{"least": 0}, {"most": 40}, {"steps": 0}])
def test_limits_that_contradict_are_refused(limits):
    with pytest.raises(ConfigError, match="least"):
        StepLimits(**limits)


def test_no_tokens_no_steps_and_tokens_without_text_are_one():
    assert segment([]) == []
    assert [(step.start, step.end, step.text) for step in segment(["", ""])] == [(0, 2, "")]


# ---- what each token says ----------------------------------------------------------------------------------------


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama 2: spaces are marked, and bytes stand in for characters out of the vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij.=", "▁a", "▁be"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def with_added_tokens() -> PreTrainedTokenizerFast:
    tokenizer = load(model_path("student"))
    tokenizer.add_tokens(["<é ü>", " added"])
    return tokenizer


def decoded(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", [tiny_tokenizer, with_added_tokens])
def test_pieces_are_the_decoded_text_whatever_the_ids(make):
    rng, tokenizer = fresh_rng(), make()
    for _ in range(300):
        ids = rng.integers(0, len(tokenizer), int(rng.integers(0, 60)))
        pieces = pieces_of(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == decoded(tokenizer, ids.tolist())


@pytest.mark.parametrize("make", [tiny_tokenizer, with_added_tokens])
def test_each_piece_is_what_the_tokens_so_far_add(make):
    tokenizer = make()
    ids = tokenizer("a be 中 é😀 ≤ be.\n\na=b 😀", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    for count in range(1, len(ids) + 1):
        assert "".join(pieces[:count]) == decoded(tokenizer, ids[:count]).rstrip("\ufffd")
    assert pieces_of(tokenizer, [*ids, tokenizer.eos_token_id, *ids])[len(ids)] == ""


def test_pieces_of_another_kind_of_tokenizer():
    tokenizer = with_byte_fallback()
    text = "a be 中 é😀 é be.  a=b 😀"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text == decoded(tokenizer, ids)
    assert pieces[-7:] == ["=", "b", " ", "", "", "", "😀"]
    assert "".join(pieces_of(tokenizer, [tokenizer.bos_token_id, *ids])) == text


def test_ids_out_of_the_vocabulary_say_nothing():
    for tokenizer, text in ((tiny_tokenizer(), "aa"), (with_byte_fallback(), "a a")):
        a = tokenizer("a", add_special_tokens=False)["input_ids"]
        pieces = pieces_of(tokenizer, [-1, *a, 10**6, 2**40, *a])
        assert "".join(pieces) == text and [pieces[i] for i in (0, len(a) + 1, len(a) + 2)] == [""] * 3
        assert pieces_of(tokenizer, []) == []


@pytest.mark.parametrize("text", [*TEXTS, SURROGATES])
def test_hostile_texts_come_back_whole(text):
    text, tokenizer = text[:20_000], tiny_tokenizer()
    steps = segment_text(tokenizer, text)
    ids = tokenizer(text.encode("utf-8", "replace").decode(), add_special_tokens=False)["input_ids"]
    assert "".join(step.text for step in steps) == decoded(tokenizer, ids) and len(steps) <= 32
    assert steps[0].start == 0 and steps[-1].end == len(ids)
    assert abstract(abstract(text)) == abstract(text)


def test_the_end_token_belongs_to_the_last_step():
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer("One it is. Two it is.", add_special_tokens=False)["input_ids"], EOS]
    steps = segment(pieces_of(tokenizer, ids), EVERYWHERE)
    assert [step.text for step in steps] == ["One it is.", " Two it is."] and steps[-1].end == len(ids)


# ---- without its instance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "abstracted"),
    [
        ("Add 1,234.5 and 50%.", "Add ⟨num⟩ and ⟨num⟩."),
        ("Half of $3.50 is 7/4, 48/2 = 24.", "Half of ⟨num⟩ is ⟨num⟩, ⟨num⟩/⟨num⟩ = ⟨num⟩."),
        (r"$\frac{1}{2} + \dfrac34 + 1{,}000\%$", "$⟨num⟩ + ⟨num⟩ + ⟨num⟩$"),
        (r"$\frac{x}{4} = \sin y_{12} \cdot \alpha$", r"$\frac{⟨v⟩}{⟨num⟩} = \sin ⟨v⟩ \cdot \alpha$"),
        ("Let x be 2y + y_1 - x2.", "Let ⟨v⟩ be ⟨num⟩⟨v⟩ + ⟨v⟩ - ⟨v⟩."),
        ("So I have a pen. A pen. $a + I + A$, a = 3", "So I have a pen. A pen. $⟨v⟩ + ⟨v⟩ + ⟨v⟩$, ⟨v⟩ = ⟨num⟩"),
        ("Two of twenty-five, the 3rd, 3 x 4", "⟨num⟩ of ⟨num⟩, the ⟨num⟩rd, ⟨num⟩ x ⟨num⟩"),
        ("Then Anna's and New York's. Bob met Mr. Smith.", "Then ⟨e⟩'s and ⟨e⟩'s. Bob met ⟨e⟩."),
        ("We use Heron's formula or the Law of Cosines.", "We use Heron's formula or the Law of Cosines."),
        ("It is the Chinese Remainder Theorem of Sun.", "It is the Chinese Remainder Theorem of ⟨e⟩."),
        ("### Find the Total Cost of 3 Pens\nSo Ann has it.", "### Find the Total Cost of ⟨num⟩ Pens\nSo ⟨e⟩ has it."),
        (
            r"In $AB$ and \[ABC\text{ is 3 of }\mathbb{R}.\] Now",
            r"In $⟨v⟩$ and \[⟨v⟩\text{ is ⟨num⟩ of }\mathbb{R}.\] Now",
        ),
        (r"\begin{align}x &= 1\\\ y\end{align}", r"\begin{align}⟨v⟩ &= ⟨num⟩\\\ ⟨v⟩\end{align}"),
        ("3*2=$<<3*2=6>>6, don't, e.g. I'm", "⟨num⟩*⟨num⟩=$<<⟨num⟩*⟨num⟩=⟨num⟩>>⟨num⟩, don't, e.g. I'm"),
        ("", ""),
    ],
)
def test_what_is_abstracted(text, abstracted):
    assert abstract(text) == abstracted
    assert abstract(abstracted) == abstracted


ATOMS = [*"$${}aAIx.:,'%=/-+*_^\n\n (é中Ω⟨5"]
ATOMS += [
    r"\(",
    r"\)",
    r"\[",
    r"\]",
    r"\begin{align}",
    r"\end{align}",
    r"\boxed{",
    r"\$",
    r"\%",
    r"\\",
    r"\alpha",
    r"\,",
]
ATOMS += [r"\frac{1}{2}", r"\frac12", r"\frac{x}{3}", r"\text{for", "$$", "$<<", "$5", "{,}", "y_1", "x_{i}", "x_{Foo}"]
ATOMS += [
    "1,000",
    "3/4",
    "ABC",
    "AB",
    "**",
    "'s",
    "⟨num⟩",
    "⟨v⟩",
    "⟨e⟩",
    "two",
    "Two",
    " hundred",
    "word",
    "The",
    "Alice",
]
ATOMS += ["New", " York", "Mr. ", "Step", " Theorem", " theorem", "e.g. ", "I'm", "O'Brien"]


@pytest.mark.parametrize("trial", range(4))
def test_abstracting_again_changes_nothing(trial):
    rng = fresh_rng()
    for _ in range(1500):
        text = "".join(ATOMS[i] for i in rng.integers(len(ATOMS), size=int(rng.integers(1, 16))))
        once = abstract(text)
        assert abstract(once) == once, (text, once)


def test_the_same_solution_with_other_numbers_and_names_is_the_same():
    solution = (
        "First, {0} has {1} pens, so {0}'s part is $\\frac{{{1}}}{{{2}}} = {3}$.\n\nThen {1}/{2} = {3}. {3}% of {0}."
    )
    one = abstract(solution.format("Ann", 12, 4, "3.5"))
    assert abstract(solution.format("Jean-Luc", "1,200", 77, 9)) == one
    assert abstract(solution.format("New York", 3, "0.5", 6).replace("has", "lost")) != one
