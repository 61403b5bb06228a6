"""Chat templates that cannot be used, their arguments, where turns and prompts end: told before anything starts."""

import json
from dataclasses import replace

import pytest
from chat_templates import CHATML, PARTS, prompts_of, tokenizer_of
from tiny import CHAT, save_tiny, tiny_tokenizer

from tutorloop.actors.transformers_engine import TransformersEngine
from tutorloop.cluster.chat_checks import check_chat, check_prompts, check_template
from tutorloop.cluster.data import load_prompts
from tutorloop.cluster.methods import compose_stages
from tutorloop.contracts.data_config import Data
from tutorloop.contracts.errors import ConfigError, DataError, ModelError
from tutorloop.contracts.recipe import parse_config
from tutorloop.contracts.records import Prompt, Sampling
from tutorloop.learner.parameters import export_ends
from tutorloop.models.chat import template_of, tokenize_prompt, tokenize_response
from tutorloop.models.loading import eos_ids, load_tokenizer

# ---- templates that cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PARTS, "content parts"),
        ("{{ raise_exception('a system message is required') }}", "a system message is required"),
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("{{ messages[0].content.text.more }}", "UndefinedError"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("X", "is not in 'X'"),
        ({"tool_use": "X", "rag": "Y"}, "rag, tool_use.*chat_template=rag"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(template, message, tmp_path):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "3 + 4 =", "answer": "7"}) + "\n")
    with pytest.raises(ModelError, match=rf"(?s)rows\.jsonl line 1.*{message}"):
        load_prompts(Data(path=str(rows)), str(rows), "train", tokenizer)


def test_the_row_that_a_template_refuses_is_named(tmp_path):
    tokenizer = tokenizer_of("{% if 'z' in messages[-1].content %}{{ raise_exception('no z') }}{% endif %}" + CHATML)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in ("a", "b", "z")))
    with pytest.raises(ModelError, match=r"rows.jsonl line 3.*no z"):
        load_prompts(Data(path=str(rows)), str(rows), "train", tokenizer)


def test_one_of_several_templates_can_be_named():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = {"tool_use": "X", "rag": CHATML}
    ids = tokenize_prompt(tokenizer, "q", {"chat_template": "rag"})
    assert ids.tolist() == tokenize_prompt(tokenizer_of("chatml"), "q", {}).tolist()
    assert template_of(tokenizer, {"chat_template": "rag"}) == CHATML
    with pytest.raises(ModelError, match="rag, tool_use"):
        tokenize_prompt(tokenizer, "q", {"chat_template": "other"})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("q3", {"enable_thinkng": False}, "did you mean enable_thinking"),
        ("q3", {"enable_thinking": "false"}, "'false' changes nothing"),
        ("q3", {"enable_thinking": False, "budget": 3}, "budget: 3 changes nothing"),
        ("chatml", {"enable_thinking": False}, "the template reads none"),
        ("chatml", {"tokenize": True}, "the run decides it"),
        ("", {"enable_thinking": False}, "no chat template"),
    ],
)
def test_arguments_without_effect_are_refused(name, arguments, message):
    tokenizer = tokenizer_of(name)
    with pytest.raises(ConfigError, match=message):
        check_template("lab:student", tokenizer, arguments)
        check_prompts("lab:student", tokenizer, arguments, prompts_of(tokenizer, arguments), "rows")


@pytest.mark.parametrize("value", [False, True])  # True is what happens without it, and still the user's choice
def test_arguments_that_choose_are_taken(value):
    tokenizer, arguments = tokenizer_of("q3"), {"enable_thinking": value}
    check_template("lab:student", tokenizer, arguments)
    check_prompts("lab:student", tokenizer, arguments, prompts_of(tokenizer, arguments), "rows")


# ---- where turns and prompts end -------------------------------------------------------------------------------------


def test_what_a_tokenizer_puts_after_a_bare_prompt_is_left_out():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    specials = [("<bos>", 1), ("<eos>", 2)]
    post = TemplateProcessing(single="<bos> $A <eos>", special_tokens=specials)
    tokenizer.backend_tokenizer.post_processor = post
    ids = tokenizer("3 + 4 =")["input_ids"]
    assert ids[-1] == 2 and tokenize_prompt(tokenizer, "3 + 4 =", {}).tolist() == ids[:-1]
    assert tokenize_response(tokenizer, "3 + 4 =", "7", {}).tolist() == [*tokenizer("7")["input_ids"][1:-1], 2]


def test_a_prompt_that_ends_as_a_response_is_refused(tmp_path):
    model = save_tiny(tmp_path, "qwen3")
    tokenizer = load_tokenizer(model)
    check_prompts(model, tokenizer, {}, prompts_of(tokenizer), "rows")
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}<eos>\n{% endfor %}"
    with pytest.raises(DataError, match="prompt p of rows ends in <eos>"):
        check_prompts(model, tokenizer, {}, prompts_of(tokenizer), "rows")
    tokenizer.chat_template = None
    text = Prompt(prompt_id="p", text="3<eos>", token_ids=tokenize_prompt(tokenizer, "3<eos>", {}), answer="7")
    with pytest.raises(DataError, match="ends in <eos>"):
        check_prompts(model, tokenizer, {}, [text], "rows")


def test_a_generation_prompt_may_name_an_end(tmp_path):
    """A public family lists its <|assistant|> among the ends, and its prompts end in it."""
    model = save_tiny(tmp_path, "qwen3")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 4]}))
    tokenizer = load_tokenizer(model)
    prompts = prompts_of(tokenizer)
    assert prompts[0].token_ids[-1] == 4 and 4 in eos_ids(model, tokenizer)
    check_prompts(model, tokenizer, {}, prompts, "rows")


def base_model(folder, **ends):
    """Its chat template ends turns with <pad>, and its files say <eos>: the shape of many base models."""
    model = save_tiny(folder, "qwen3")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = CHAT.replace("<eos>", "<pad>")
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text()) | ends
        (folder / name).write_text(json.dumps(settings))
    return model


def test_the_template_s_end_joins_the_stops_and_the_export(tmp_path):
    model = base_model(tmp_path / "student")
    tokenizer = load_tokenizer(model)
    assert eos_ids(model, tokenizer) == [0, 2] and TransformersEngine(model, dtype="fp32").eos_ids.tolist() == [0, 2]
    assert tokenize_response(tokenizer, "q", "7", {})[-1] == 0
    (note,) = check_template(model, tokenizer, {})
    assert "ends a turn with <pad>, its files name <eos>" in note
    folder = tmp_path / "final"
    folder.mkdir()
    export_ends(tmp_path / "student", folder)
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [0, 2]}


def test_an_export_whose_ends_agree_stays_as_it_is(tmp_path):
    save_tiny(tmp_path, "qwen3")
    before = (tmp_path / "generation_config.json").read_bytes()
    export_ends(tmp_path, tmp_path)
    assert (tmp_path / "generation_config.json").read_bytes() == before
    assert check_template(str(tmp_path), load_tokenizer(str(tmp_path)), {}) == []


NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def test_a_model_without_any_end_is_refused(tmp_path):
    model = base_model(tmp_path, eos_token_id=None)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
    (tmp_path / "chat_template.jinja").write_text(NO_END)
    tokenizer = load_tokenizer(model)
    assert eos_ids(model, tokenizer) == []
    with pytest.raises(ModelError, match=r"eos_token_id in its generation_config\.json"):
        check_template(model, tokenizer, {})
    with pytest.raises(ModelError, match=r"eos_token in tokenizer_config\.json"):
        tokenize_response(tokenizer, "q", "7", {})


def test_an_end_that_only_the_model_s_files_name_ends_given_responses(tmp_path):
    model = base_model(tmp_path, eos_token_id=4)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
    (tmp_path / "chat_template.jinja").write_text(NO_END)
    tokenizer = load_tokenizer(model)
    assert eos_ids(model, tokenizer) == [4] and tokenize_response(tokenizer, "q", "7", {})[-1] == 4
    (note,) = check_template(model, tokenizer, {})
    assert "given responses end in <assistant>" in note


def recipe(method, options=None, **teacher):
    given = {"method": method, "method_options": options or {}, "output_dir": ".", "steps": 1, "prompts_per_step": 1}
    models = {"student": {"model": "lab:student"}, "teacher": {"model": "lab:student", **teacher}}
    return parse_config({**given, **models, "data": {"path": "."}})


def test_a_teacher_with_another_end_is_told_of_or_refused():
    student, teacher = tokenizer_of("chatml"), tokenizer_of("chatml")
    teacher.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    sets = [(prompts_of(student), "rows")]
    config = recipe("opd", signal="sampled")
    both = {"student": student, "teacher": teacher}
    (note,) = check_chat(config, compose_stages(config), both, sets)
    assert "teacher ends a turn with <|endoftext|>, the student with <|im_end|>" in note
    assert check_chat(config, compose_stages(config), {"student": student, "teacher": student}, sets) == []
    config = recipe("kd", {"answers": "teacher"}, signal="topk")
    with pytest.raises(ModelError, match="a teacher that generates ends its turns as the student does"):
        check_chat(config, compose_stages(config), both, sets)


def test_contexts_are_tried_in_the_teacher_s_template():
    student, teacher = tokenizer_of("chatml"), tokenizer_of(PARTS)
    config = recipe("sdft", follows="live", signal="topk")
    prompts = [replace(prompt, solution="3 + 4 = 7") for prompt in prompts_of(student)]
    with pytest.raises(ModelError, match=r"demonstration@1, shown to the teacher: (?s:.*)content parts"):
        check_chat(config, compose_stages(config), {"student": student, "teacher": teacher}, [(prompts, "rows")])


# ---- marks that are special ------------------------------------------------------------------------------------------


def test_special_marks_of_reasoning_survive_decoding(tmp_path):
    save_tiny(tmp_path, "qwen3")
    tokenizer = tiny_tokenizer()
    marks = {"<think>", "</think>", "[THINK]", "[/THINK]"}
    tokenizer.add_tokens(sorted(marks), special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    engine = TransformersEngine(str(tmp_path), dtype="fp32")
    text = "<bos><think>a</think>b[THINK]c[/THINK]d<eos>"
    ids = engine.tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"][0]
    for own in (("<think>", "</think>"), ("[THINK]", "[/THINK]")):
        expected = text
        for name in {"<bos>", "<eos>", *marks} - {*own}:
            expected = expected.replace(name, "")
        assert engine.decode(ids, own) == expected
    assert engine.decode(ids, ("<a>", "</a>")) == "abcd"
    assert engine.generate([ids], [0], Sampling(max_new_tokens=1))[0].finish_reason in ("stop", "length")
