"""Chat templates of other families: the words of the data stay words, one block of reasoning, turns end where they end.

Their templates have the shape of two public families; the tokenizer is the lab's, with marks added to it.
"""

import itertools
import json

import pytest
from chat_templates import OFF, Q3, TEMPLATES, tokenizer_of
from tiny import CHAT, tiny_tokenizer

from tutorloop.contracts.errors import ModelError
from tutorloop.contracts.records import Prompt
from tutorloop.models.chat import control_names, inert, tokenize_prompt, tokenize_response, turn_end
from tutorloop.models.contexts import Prompter

# ---- one block of reasoning ------------------------------------------------------------------------------------------

WORDS = "1 + 2 is 3"
SOLUTIONS = {
    "whole": f"<think>\n{WORDS}\n</think>\n\n\\boxed{{3}}",
    "tight": f"<think>{WORDS}</think>\\boxed{{3}}",
    "none": "\\boxed{3}",
    "empty": "<think>\n\n</think>\n\n\\boxed{3}",
    "two": f"<think>a</think>b<think>{WORDS}</think>\\boxed{{3}}",
    "closed only": f"{WORDS}</think>\\boxed{{3}}",
    "words before": f"Well, <think>{WORDS}</think>\\boxed{{3}}",
    "opened only": f"<think>{WORDS}",
    "opened again": f"<think>{WORDS}</think>\\boxed{{3}}<think>",
}
SHAPES = [("chatml", {}), ("q3", {}), ("q3", OFF), ("r1", {}), ("drops", {})]


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("name", "arguments"), SHAPES)
def test_a_solution_s_reasoning_stands_in_one_block(name, arguments, special, marks):
    tokenizer = tokenizer_of(name, marks, special)
    opening, closing = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    prompt = tokenize_prompt(tokenizer, "1 + 2 =", arguments).tolist()
    for kind, solution in SOLUTIONS.items():
        solution = solution.replace("<think>", marks[0]).replace("</think>", marks[1])
        response = tokenize_response(tokenizer, "1 + 2 =", solution, arguments, thinking=marks).tolist()
        both = prompt + response
        blocks = int(kind != "none" or name in ("q3", "r1"))
        assert both.count(opening) == both.count(closing) == blocks, kind
        assert not blocks or both.index(opening) < both.index(closing)
        assert response[-1] == tokenizer.eos_token_id and response.count(response[-1]) == 1
        text = tokenizer.decode(response)
        assert text.replace(" ", "").count("think") <= 2 and "< " not in text and "[ " not in text
        reasoning, _, answer = text.rpartition(marks[1])
        assert ("\\boxed{3}" in answer) == (kind != "opened only")
        shown = kind not in ("none", "empty") and not arguments
        assert (WORDS in reasoning) == shown and WORDS not in answer, kind


def test_whole_solutions_are_what_the_template_writes():
    for name in ("chatml", "q3"):
        tokenizer = tokenizer_of(name)
        for kind in ("whole", "none", "empty"):
            turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": SOLUTIONS[kind]}]
            whole = tokenizer.apply_chat_template(turns, return_dict=False)
            ids = [*tokenize_prompt(tokenizer, "q", {}), *tokenize_response(tokenizer, "q", SOLUTIONS[kind], {})]
            assert ids == whole[: len(ids)] and len(whole) - len(ids) == 1, (name, kind)  # a newline after the end


def test_reasoning_brings_no_other_token():
    """Marks that are taken out leave no name of a control token behind, nor is one hidden in the reasoning."""
    for name, arguments in SHAPES:
        tokenizer = tokenizer_of(name)
        for hidden in ("<|im_<think>end|>", "</think><|im_<|im_end|>end|>", "<th<think>ink>", "<|im_end|>"):
            response = tokenize_response(tokenizer, "q", f"<think>a{hidden}b</think>c{hidden}d", arguments)
            control = [i for i in response.tolist() if i in (0, 1, 2)]
            assert control == [2] and response[-1] == 2, (name, hidden)
            assert sum(i == tokenizer.convert_tokens_to_ids("<think>") for i in response.tolist()) <= 1


# ---- words that stay words -------------------------------------------------------------------------------------------


def test_only_control_names_of_the_data_are_broken():
    tokenizer = tokenizer_of("q3")
    marks = {"<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert control_names(tokenizer, Q3) == marks
    text = "A 12 kg stone, 12kg: name C1=CC"
    ids = tokenize_prompt(tokenizer, text, {}).tolist()
    assert text in tokenizer.decode(ids) and {tokenizer.convert_tokens_to_ids(word) for word in ("kg", "C1=CC")} <= {
        *ids
    }
    plain = tokenizer_of("chatml")  # here <think> is a token like any other
    assert inert(plain, "<think> kg <|im_end|>") == "<think> kg < |im_end|>"
    assert inert(tokenizer, "<think> kg <|im_end|>") == "< think> kg < |im_end|>"


def test_the_recipe_s_suffix_is_left_as_it_is():
    tokenizer, suffix = tokenizer_of("q3"), "\nReason in <think> and </think>."
    think = tokenizer.convert_tokens_to_ids("<think>")
    text = f"Say <think>!{suffix}"
    ids = tokenize_prompt(tokenizer, text, {}, suffix=suffix).tolist()
    assert ids.count(think) == 1 and f"Say < think>!{suffix}" in tokenizer.decode(ids)
    assert tokenize_prompt(tokenizer, text, {}).tolist().count(think) == 0
    prompt = Prompt(prompt_id="p", text=text, token_ids=tokenize_prompt(tokenizer, text, {}), answer="<think>")
    shown = Prompter(tokenizer, {}, {"own@1": "<think>{problem} {answer}"}, suffix).ids("own@1", prompt)
    assert shown is not None and shown.tolist().count(think) == 2  # the recipe's template and suffix, not the data
    assert inert(tokenizer, "a<|im_<think>", suffix="_<think>") == "a<|im_<think>"
    assert inert(tokenizer, "a<think>", suffix="ink>") == "a< think>"  # half of it is the data's


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}<|im_end|>{% endfor %}", "<|user|>"),
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", "[/INST]"),
        ("{% for m in messages %}<start_of_turn>{{ m.content }}<|im_end|>{% endfor %}", "<start_of_turn>"),
    ],
)
def test_marks_that_only_the_template_knows_are_broken(template, name):
    tokenizer = tokenizer_of(template)
    assert name not in tokenizer.get_vocab()
    tokenized = tokenizer.decode(tokenize_prompt(tokenizer, f"x{name}y", {}))
    assert f"x{name[0]} {name[1:]}y" in tokenized


def test_marks_that_are_not_special_are_broken_and_end_turns():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|end|>", "kg"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    tokenizer.chat_template = CHAT.replace("<eos>", "<|end|>")
    assert turn_end(tokenizer) == end and end not in tokenizer.all_special_ids
    assert tokenize_response(tokenizer, "q", "a<|end|>kg", {}).tolist().count(end) == 1
    assert end not in tokenize_prompt(tokenizer, "<|end|>", {}).tolist()


# ---- turns before the problem ----------------------------------------------------------------------------------------

HISTORY = [
    {"role": "system", "content": "Be <|im_end|> brief."},
    {"role": "user", "content": "2 + 2 ="},
    {"role": "assistant", "content": "<think>\nsum\n</think>\n\n4"},
]


@pytest.mark.parametrize("name", ["chatml", "q3"])
def test_turns_stand_before_the_problem_in_every_context(name):
    tokenizer = tokenizer_of(name)
    turns = [{**HISTORY[0], "content": "Be < |im_end|> brief."}, *HISTORY[1:]]
    ids = tokenize_prompt(tokenizer, "3 + 4 =", {}, turns=HISTORY)
    last = {"role": "user", "content": "3 + 4 ="}
    expected = tokenizer.apply_chat_template([*turns, last], add_generation_prompt=True, return_dict=False)
    assert ids.tolist() == expected
    prompt = Prompt(prompt_id="p", text="3 + 4 =", turns=json.dumps(HISTORY), token_ids=ids, answer="7")
    shown = Prompter(tokenizer).ids("answer@1", prompt)
    last = {"role": "user", "content": "3 + 4 =\nAnswer: 7"}
    expected = tokenizer.apply_chat_template([*turns, last], add_generation_prompt=True, return_dict=False)
    assert shown is not None and shown.tolist() == expected
    response = tokenize_response(tokenizer, "3 + 4 =", "7", {}, turns=HISTORY)
    assert tokenizer.decode(response).endswith("7<|im_end|>")


def test_an_assistant_s_turn_may_lose_its_reasoning_alone():
    said = {"role": "assistant", "content": "<think>sum</think>4 it is"}
    wordy = {"role": "assistant", "content": "Well <think>sum</think>4"}
    for name, turn in (("drops", said), ("q3", said), ("chatml", said), ("chatml", wordy)):
        ids = tokenize_prompt(tokenizer_of(name), "3 + 4 =", {}, turns=[HISTORY[1], turn])
        text = tokenizer_of(name).decode(ids)
        assert turn["content"].rpartition(">")[2] in text and ("sum" in text) == (name != "drops")
    special = tokenizer_of("chatml", ("[THINK]", "[/THINK]"), special=True)  # its template names no marks
    turn = {"role": "assistant", "content": "[THINK]sum[/THINK]4"}
    ids = tokenize_prompt(special, "3 + 4 =", {}, turns=[HISTORY[1], turn]).tolist()
    assert [ids.count(special.convert_tokens_to_ids(mark)) for mark in ("[THINK]", "[/THINK]")] == [1, 1]


def test_turns_that_a_template_leaves_out_are_refused():
    without_system = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}{% endfor %}"
    only_last = "<|im_start|>{{ messages[-1]['content'] }}"
    same = [{"role": "user", "content": "3"}]  # its words are in the problem too
    cases = [(without_system, HISTORY, "the system turn"), (only_last, HISTORY[1:], "the user turn")]
    for template, turns, message in [*cases, (only_last, same, "the user turn")]:
        with pytest.raises(ModelError, match=message):
            tokenize_prompt(tokenizer_of(template), "3 + 4 =", {}, turns=turns)
    bare = tokenizer_of("")
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        tokenize_prompt(bare, "3 + 4 =", {}, turns=same)


def test_spaces_are_the_template_s_own_affair():
    for content in ("{{ m.content | trim }}", "{{ m.content.split() | join(' ') }}"):
        tokenizer = tokenizer_of("{% for m in messages %}<|im_start|>" + content + "<|im_end|>{% endfor %}")
        assert "a b" in tokenizer.decode(tokenize_prompt(tokenizer, " \n a b\n", {}))


def test_every_template_takes_every_history_alike():
    """The ids of a prompt do not depend on how often, or in which order, templates were asked before."""
    asked = [(name, words) for name, words in itertools.product(TEMPLATES, ("a", "<|im_end|>"))]
    tokenizers = {name: tokenizer_of(name) for name in TEMPLATES}
    first = [tokenize_prompt(tokenizers[name], words, {}).tolist() for name, words in asked]
    again = [tokenize_prompt(tokenizer_of(name), words, {}).tolist() for name, words in reversed(asked)]
    assert first == again[::-1]
