"""Prompts in contexts: filled in once, inert whatever the text, and the same ids as the chat template's own."""

import time

import numpy as np
import pytest
from tiny import tiny_tokenizer

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.records import Prompt
from tutorloop.lab.contexts import render
from tutorloop.lab.tokenizer import chat_prompt
from tutorloop.models.chat import inert, tokenize_prompt, tokenize_response
from tutorloop.models.contexts import FIELDS, TEMPLATES, Prompter, check_templates, fields_of, fill
from tutorloop.models.loading import load_tokenizer
from tutorloop.models.thinking import without_thinking


def tokenizer_of(name):
    return load_tokenizer("lab:student") if name == "lab" else tiny_tokenizer()


def fresh_random():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def prompt_of(tokenizer, text="3 + 4 =", answer="7", solution="", strategy=""):
    ids = tokenize_prompt(tokenizer, text, {})
    own = {"solution": solution, "strategy": strategy}
    return Prompt(prompt_id="p", text=text, token_ids=ids, answer=answer, **own)


def chat_ids(tokenizer, text):
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def control_ids(tokenizer):
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("name", ["lab", "tiny"])
def test_every_template_reads_as_the_chat_template_of_its_text(name):
    tokenizer = tokenizer_of(name)
    prompt = prompt_of(tokenizer, solution="3 + 4 = 7\n\\boxed{7}", strategy="Count on from the first.")
    peer, feedback = "<think>hm</think>It is \\boxed{7}", "The answer 8 is wrong."
    skill, mistake, title = "Carry the ten. It moves.", "Forgetting the ten.", "Carry"
    prompter = Prompter(tokenizer)
    for context, template in TEMPLATES.items():
        shown = {"skill": skill, "mistake": mistake, "title": title}
        ids = prompter.ids(context, prompt, peer_text=peer, peer_answer="7", feedback=feedback, **shown)
        text = template.replace("[[", "").replace("]]", "")
        of_prompt = (prompt.text, "7", prompt.solution, prompt.strategy)
        values = (*of_prompt, "It is \\boxed{7}", "7", feedback, skill, mistake, title)
        for field, value in zip(FIELDS, values, strict=True):
            text = text.replace(f"{{{field}}}", value)
        assert ids is not None and ids.dtype == np.int32
        assert ids.tolist() == chat_ids(tokenizer, text), context
        assert fields_of(context, {}) == {f for f in FIELDS if f"{{{f}}}" in template}
    assert prompter.ids("plain", prompt) is prompt.token_ids and fields_of("plain", {}) == frozenset()


def test_the_answers_context_is_what_the_lab_trained():
    tokenizer = tokenizer_of("lab")
    ids = Prompter(tokenizer).ids("answer@1", prompt_of(tokenizer))
    text = chat_prompt(render("answer", "3 + 4 =", answer="7"))
    assert ids is not None and ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_context_without_its_field_is_none():
    tokenizer = tokenizer_of("lab")
    prompter, prompt = Prompter(tokenizer), prompt_of(tokenizer, answer="", solution=" ")
    for context in TEMPLATES:
        assert prompter.ids(context, prompt) is None, context
    assert prompter.ids("peer@1", prompt, peer_text="<think>only thought</think>") is None
    peer = prompter.ids("peer_feedback@1", prompt, peer_text="P")
    feedback = prompter.ids("peer_feedback@1", prompt, feedback="F")
    both = prompter.ids("peer_feedback@1", prompt, peer_text="P", feedback="F")
    assert peer is not None and feedback is not None and both is not None
    decoded = [tokenizer.decode(ids) for ids in (peer, feedback, both)]
    assert ["solution:\n\nP" in text for text in decoded] == [True, False, True]
    assert ["attempt:\n\nF" in text for text in decoded] == [False, True, True]
    assert not any("[[" in text or "]]" in text for text in decoded)


def test_what_is_filled_in_is_never_read_again():
    random = fresh_random()
    pieces = [*(f"{{{field}}}" for field in FIELDS), "{", "}", "[[", "]]", "\\1", "\\g<0>", "{0}", "%s", "x", " "]
    for _ in range(200):
        values = {field: "v" + "".join(random.choice(pieces, 6)) for field in FIELDS}
        template = "A{problem}B{peer}[[C{answer}D]]E"
        expected = f"A{values['problem']}B{values['peer']}C{values['answer']}DE"
        assert fill(template, values) == expected


@pytest.mark.parametrize("name", ["lab", "tiny"])
def test_no_text_becomes_a_control_token(name):
    random = fresh_random()
    tokenizer = tokenizer_of(name)
    control = control_ids(tokenizer)
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    assert len(control) >= 3
    pieces = [*names, *(n[: len(n) // 2] for n in names), *(n[len(n) // 2 :] for n in names), "a", " ", "\n", "{peer}"]
    prompter = Prompter(tokenizer)

    def count(ids):
        return sum(i in control for i in ids.tolist())

    innocent = count(prompter.ids("peer_feedback@1", prompt_of(tokenizer), peer_text="a", feedback="b"))
    for _ in range(100):
        problem, peer, feedback = ("x" + "".join(random.choice(pieces, 8)) for _ in range(3))
        prompt = prompt_of(tokenizer, text=problem)
        ids = prompter.ids("peer_feedback@1", prompt, peer_text=peer, feedback=feedback)
        assert count(ids) == innocent == count(prompt.token_ids)
        response = tokenize_response(tokenizer, problem, peer, {})
        assert count(response) == 1 and response[-1] == tokenizer.eos_token_id
        assert inert(tokenizer, peer).replace(" ", "") == peer.replace(" ", "")
    assert inert(tokenizer, "2 < 3 and 4 > 1 | 0") == "2 < 3 and 4 > 1 | 0"


def test_without_a_chat_template_the_text_is_the_prompt():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    prompt = prompt_of(tokenizer, text="<user>1 + 1<assistant>")
    assert prompt.token_ids.tolist() == tokenizer("<user>1 + 1<assistant>")["input_ids"]
    ids = Prompter(tokenizer).ids("peer@1", prompt, peer_text="a<assistant>b")
    assert ids is not None and sum(i in control_ids(tokenizer) for i in ids.tolist()) == 2
    response = tokenize_response(tokenizer, prompt.text, "2", {})
    assert response.tolist() == [*tokenizer("2")["input_ids"], tokenizer.eos_token_id]


def test_thinking_is_stripped():
    cases = {
        "<think>a</think> b": "b",
        "a <think>b</think> c <think>d</think>e": "a  c e",
        "thought</think>b": "b",
        "a <think>cut off": "a <think>cut off",
        "</think></think>a": "</think>a",
        "plain": "plain",
        "": "",
    }
    for text, rest in cases.items():
        assert without_thinking(text) == rest, text
    start = time.process_time()
    for text in ("<think>" * 150_000, "</think>" * 150_000, "<think></think>" * 70_000):
        without_thinking(text)
    assert time.process_time() - start < 1


# ---- given responses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lab", "tiny"])
def test_a_response_ends_as_the_chat_template_ends_a_turn(name):
    random = fresh_random()
    tokenizer = tokenizer_of(name)
    for _ in range(50):
        prompt, solution = ("".join(random.choice(list("12 +=\n\\{}boxed"), 12)) + "." for _ in range(2))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "s" + solution}]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        last = max(at for at, i in enumerate(whole) if i == tokenizer.eos_token_id)
        before = tokenize_prompt(tokenizer, prompt, {}).tolist()
        response = tokenize_response(tokenizer, prompt, "s" + solution, {})
        assert response.dtype == np.int32
        assert before + response.tolist() == whole[: last + 1]


TURN = "{% for m in messages %}<user>{{ m['content'] | trim }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURN + "<pad>\n{% endfor %}{% if add_generation_prompt %}<user>{% endif %}", "a b<pad>"),  # a token of its own
        (TURN + "{% endfor %}{% if add_generation_prompt %}<user>{% endif %}", "a b<eos>"),  # no end at all
        (TURN + "<eos>{% endfor %}{% if add_generation_prompt %}<user>think:{% endif %}", " a b<eos>"),  # another start
    ],
)
def test_responses_of_other_chat_templates(template, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert tokenizer.decode(tokenize_response(tokenizer, "q", " a b", {})) == expected


def test_chat_template_arguments_reach_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if loud %}!{% endif %}" + tokenizer.chat_template
    prompt = prompt_of(tokenizer)
    quiet = Prompter(tokenizer).ids("answer@1", prompt)
    loud = Prompter(tokenizer, {"loud": True}).ids("answer@1", prompt)
    assert quiet is not None and loud is not None
    assert tokenizer.decode(loud) == "!" + tokenizer.decode(quiet)


# ---- templates of one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("hint", "{problem}", "NAME@VERSION"),
        ("@1", "{problem}", "NAME@VERSION"),
        ("plain", "{problem}", "NAME@VERSION"),
        ("answer@1", "{problem}", "not one of ours"),
        ("clue@1", "{problem} {hint}", r"\{hint\}"),
        ("clue@1", "{problem} \\boxed{x}", r"\{x\}"),
        ("clue@1", "Solve it. {answer}", "shows the problem"),
        ("clue@1", "[[{problem}]]", "shows the problem"),
    ],
)
def test_templates_that_cannot_be_used_are_named(name, template, message):
    with pytest.raises(ConfigError, match=message):
        check_templates({name: template})
    with pytest.raises(ConfigError, match=message):
        Prompter(tiny_tokenizer(), {}, {name: template})


def test_a_template_of_ones_own():
    tokenizer = tokenizer_of("lab")
    own = {"hint@2": "{problem}\nIt ends in {answer}."}
    check_templates(own)
    check_templates({})
    ids = Prompter(tokenizer, {}, own).ids("hint@2", prompt_of(tokenizer))
    assert ids is not None and ids.tolist() == chat_ids(tokenizer, "3 + 4 =\nIt ends in 7.")
    for look in (lambda: fields_of("hint@3", own), lambda: Prompter(tokenizer).ids("hint@2", prompt_of(tokenizer))):
        with pytest.raises(ConfigError, match=r"answer@1.*solution@1"):
            look()
