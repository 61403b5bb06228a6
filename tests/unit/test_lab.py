"""The committed lab: true rows, disjoint splits, a lossless tokenizer, and a teacher that beats its student."""

import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutorloop.lab import SPLITS, contexts, data_path, model_path, rows, skills, tokenizer
from tutorloop.lab.measure import accuracy, boxed
from tutorloop.lab.problems import MISCONCEPTIONS, Problem, add_without_carry, subtract_without_borrow, work

LINE = re.compile(r"(\d+) ([+*-]) (\d+) = (-?\d+)")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
CHAIN = Problem(family="chain_sum", question="37 + 58 - 29", answer="66", tree=("-", ("+", 37, 58), 29))
LEGS = Problem(family="leg_counting", question="3 ducks, 2 cats", answer="14",
               tree=("+", ("legs", 3, 2), ("legs", 2, 4)))  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """The committed tokenizer, as any user loads it."""
    return AutoTokenizer.from_pretrained(model_path("student"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_solution_is_true_and_ends_in_its_boxed_answer(split):
    found = rows(split)
    assert len(found) == {"train": 4000, "test": 400, "ood": 400}[split]
    for row in found:
        *steps, last = row["solution"].splitlines()
        assert last == f"\\boxed{{{row['answer']}}}", row
        assert steps, row
        for step in steps:
            a, operator, b, result = LINE.fullmatch(step).groups()
            assert OPERATIONS[operator](int(a), int(b)) == int(result), row
        assert int(result) == int(row["answer"]), row
        assert set(row["tags"]) <= set(MISCONCEPTIONS), row


def test_answers_of_chains_equal_their_expressions():
    for row in rows("test") + rows("ood"):
        if row["family"] != "leg_counting":
            expression = re.search(r"\d[\d +*-]*\d", row["prompt"]).group()
            assert eval(expression) == int(row["answer"]), row


def test_splits_are_disjoint_and_small():
    questions = [row["prompt"] for split in SPLITS for row in rows(split)]
    assert len(set(questions)) == len(questions)
    assert {row["family"] for row in rows("ood")}.isdisjoint(row["family"] for row in rows("train") + rows("test"))
    assert sum(data_path(split).stat().st_size for split in SPLITS) <= 2_000_000


def test_misconceptions_by_hand():
    assert add_without_carry(37, 58) == 85
    assert add_without_carry(60, 23) == 83
    assert subtract_without_borrow(52, 37) == 25
    assert subtract_without_borrow(58, 37) == 21


def test_a_wrong_working_is_wrong_only_where_its_misconception_says():
    worked = work(CHAIN, lambda name: name == "no_carry")
    assert worked.text == "37 + 58 = 85\n85 - 29 = 56\n\\boxed{56}"
    assert worked.errors == ("no_carry",)
    worked = work(CHAIN, lambda name: name == "no_borrow")
    assert (worked.text, worked.errors) == ("37 + 58 = 95\n95 - 29 = 74\n\\boxed{74}", ("no_borrow",))
    worked = work(LEGS, lambda name: name == "four_legs")
    assert (worked.text, worked.errors) == ("3 * 4 = 12\n2 * 4 = 8\n12 + 8 = 20\n\\boxed{20}", ("four_legs",))
    assert work(LEGS).errors == ()


def test_habits_follow_the_context():
    chance = random.Random(0)
    by_id = {skill["id"]: skill for skill in skills()}
    assert len(by_id) == len(skills())
    assert all(len(skill["text"]) <= 60 and set(skill["misconceptions"]) <= set(MISCONCEPTIONS) for skill in skills())

    def errors(context, skill, share):
        return work(CHAIN, contexts.habit(context, skill, share, chance)).errors

    assert errors("answer", None, 1.0) == ()
    assert errors("hint", by_id["regroup-1"], 1.0) == ()
    assert errors("hint", by_id["carry-1"], 1.0) == ("no_borrow",)
    assert errors("hint", by_id["columns-apart-1"], 0.0) == ("no_carry", "no_borrow")
    assert errors("hint", by_id["neat-1"], 1.0) == errors("plain", None, 1.0) == ("no_carry", "no_borrow")


def test_contexts_render_and_refuse():
    assert contexts.render("plain", "Q") == "Q"
    assert contexts.render("answer", "Q", answer="7") == "Q\nAnswer: 7"
    assert contexts.render("hint", "Q", hint="Carry.") == "Hint: Carry.\nQ"
    with pytest.raises(ValueError, match="needs the answer"):
        contexts.render("answer", "Q")


def test_tokenizer_is_lossless_small_and_splits_digits(made):
    for text in ("12,345.6 \\frac{1}{2}\n\n  x\t", "日本 é 🎈 \u200b", *(row["solution"] for row in rows("test")[:20])):
        assert made.decode(made(text)["input_ids"]) == text
    assert len(made) <= tokenizer.VOCABULARY
    assert [made.convert_ids_to_tokens(i) for i in made("2048")["input_ids"]] == ["2", "0", "4", "8"]
    assert len(made("user")["input_ids"]) == len(made("assistant")["input_ids"]) == 1
    assert (made.eos_token, made.pad_token) == (tokenizer.END, tokenizer.PAD)
    assert (made.eos_token_id, made.pad_token_id) == (tokenizer.END_ID, tokenizer.PAD_ID)


def test_chat_template(made):
    messages = [{"role": "user", "content": "Compute 1 + 1."}]
    rendered = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.chat_prompt("Compute 1 + 1.")
    done = [*messages, {"role": "assistant", "content": "\\boxed{2}"}]
    assert made.apply_chat_template(done, tokenize=False) == rendered + "\\boxed{2}<|im_end|>\n"


def test_boxed():
    assert boxed("1 + 1 = 2\n\\boxed{2}") == "2"
    assert boxed("1 + 1 = 2") is None


def test_models_load_untied_share_a_tokenizer_and_the_teacher_is_better(made):
    torch.manual_seed(0)
    sizes, scores = {}, {}
    for name in ("teacher", "student"):
        folder = model_path(name)
        sizes[name] = (folder / "model.safetensors").stat().st_size
        assert (folder / "README.md").exists()
        assert (folder / "tokenizer.json").read_bytes() == (model_path("student") / "tokenizer.json").read_bytes()
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.config.model_type == "qwen3"
        assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        assert model.dtype == torch.float32
        scores[name] = accuracy(model, made, rows("test")[::10])["all"]
    assert sum(sizes.values()) <= 12_000_000
    assert scores["teacher"] >= 0.85
    assert scores["student"] <= 0.45


def test_skills_for_fit_the_row():
    for row in rows("test")[::7] + rows("ood")[::7]:
        for kind in ("useful", "misleading", "irrelevant"):
            chosen = contexts.skills_for(row["family"], kind, row["tags"])
            assert chosen and all(row["family"] in skill["families"] for skill in chosen), row
        for skill in contexts.skills_for(row["family"], "useful", row["tags"]):
            assert set(row["tags"]) <= set(skill["misconceptions"])
