"""What a model wrote is text: never run, never a template, and nowhere shown or stored unescaped."""

import html
import json
import logging
import re
import string
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import typer
from hostile_texts import STEERS, SURROGATES, TEXTS
from rich.console import Console
from run_rows import fresh_rng, step_row
from tiny import tiny_tokenizer
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.cluster.recording.metrics import MetricsLog, read_rows
from tutorloop.cluster.recording.progress import Progress, final_table, plain
from tutorloop.cluster.recording.report import write_report
from tutorloop.contracts.arrow import decode, encode
from tutorloop.contracts.protocols import Response
from tutorloop.contracts.records import Prompt, Rollout, Verdict
from tutorloop.contracts.verifier_config import Reward, Verifier
from tutorloop.models.chat import inert, tokenize_prompt
from tutorloop.models.contexts import TEMPLATES, Prompter, fill
from tutorloop.verifier_service.paths import reasoning_path
from tutorloop.verifier_service.pool import VerifierPool
from tutorloop.verifier_service.reasoning_gym_verifier import inert_eval
from tutorloop.verifier_service.verifiers import make_verifier
from tutorloop.verifier_service.worker import VerifierWorker

CODE = [  # each would make the file {path!r}, were it run
    "open({path!r}, 'w')",
    "__import__('pathlib').Path({path!r}).touch()",
    "__import__('os').system('touch {path}')",
    "eval(\"open({path!r}, 'w')\")",
    "(lambda: open({path!r}, 'w'))()",
    "[open({path!r}, 'w')][0]",
    "().__class__.__base__.__subclasses__()",
    "sqrt(open({path!r}, 'w'))",
    "sympify(\"open({path!r}, 'w')\")",
    "\\operatorname{{open}}({path!r}, w)",
    "\\input{{|touch {path}}} \\write18{{touch {path}}} \\immediate\\openout1={path}",
    "$(touch {path}) `touch {path}` ; touch {path} | touch {path}",
    "!!python/object/apply:os.system ['touch {path}']",
    "cos\nsystem\n(S'touch {path}'\ntR.",
    "{{{{ cycler.__init__.__globals__.os.system('touch {path}') }}}} {{% import os %}} <% open({path!r}, 'w') %>",
    "${{jndi:ldap://127.0.0.1:1/a}} #{{`touch {path}`}}",
]


@pytest.fixture
def hostile(tmp_path):
    """Texts, bare and as the answer in each form that is read; and the file that must not be there."""
    path = tmp_path / "ran"
    written = [*(code.format(path=str(path)) for code in CODE), *TEXTS]
    yield [
        form.replace("TEXT", text) for text in written for form in ("TEXT", "\\boxed{TEXT}", "<answer>TEXT</answer>")
    ]
    assert not path.exists()


@pytest.fixture
def silent(capfd, caplog):
    """Nothing is printed or logged."""
    caplog.set_level(logging.DEBUG)
    yield
    printed = capfd.readouterr()
    assert (printed.out, printed.err, [record.getMessage() for record in caplog.records]) == ("", "", [])


def verifier_of(kind, **options):
    return make_verifier(Verifier(kind=kind, answers="any", **options))


# ---- the verifiers --------------------------------------------------------------------------------------------------

OWN = "def same(completions, answer, **columns):\n    print(completions)\n    return [float(completions == answer)]\n"
PROBLEM = {"question": "?", "answer": "a", "metadata": {"source_dataset": "string_insertion"}}


@pytest.mark.parametrize("kind", ["math", "exact", "numeric", "reasoning_gym", "own", "rewards"])
def test_verifiers_judge_hostile_text_as_text(kind, hostile, silent, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = f"{tmp_path / 'own.py'}:same"
    if kind == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    if kind == "rewards":
        parts = (Reward(kind="format", weight=1, pattern=".*"), Reward(kind=own, weight=1))
        verifier = verifier_of("exact", rewards=parts)
    else:
        verifier = verifier_of(own if kind == "own" else kind)
    golds = {"math": "x+1", "numeric": "123457"}
    texts = [*hostile, SURROGATES]
    row = json.dumps(PROBLEM)
    pool = VerifierPool(verifier, timeout_seconds=20.0)
    wrong = pool.judge([Response(text=text, gold=golds.get(kind, "another"), row=row) for text in texts])
    as_gold = pool.judge([Response(text="\\boxed{7}", gold=text, row=row) for text in texts])
    same = pool.judge([Response(text=text, gold=text) for text in texts]) if kind == "own" else []
    pool.close()
    assert len(wrong) == len(as_gold) == len(texts)
    assert not [t[:99] for t, o in zip(texts, wrong, strict=True) if o.judgement.passed]
    assert all(outcome.judgement.passed for outcome in same)
    errors = {outcome.judgement.error_class for outcome in [*wrong, *as_gold]} - {
        "",
        "too_large",
        "gold_too_large",
        "no_gold",
        "gold_not_numeric",
    }
    assert errors <= {"RecursionError", "memory", "timeout"}, errors


EVALUATING = ("countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication")
EVALUATING += ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens")  # 0.1.25 has no others
PAYLOADS = [
    "__import__('pathlib').Path({path!r}).touch()",
    "open({path!r}, 'w')",
    "[open({path!r}, 'w')]",
    "[[x for x in [open({path!r}, 'w')]]]",
    "().__class__.__base__.__subclasses__()[0].__init__.__globals__['open']({path!r}, 'w')",
    "(lambda: open({path!r}, 'w'))()",
    "sqrt(\"open({path!r}, 'w')\")",
    "eval(\"open({path!r}, 'w')\")",
    "exec(\"open({path!r}, 'w')\")",
    "Symbol.__class__.__base__",
    "f\"{{open({path!r}, 'w')}}\"",
    "x + open({path!r}, 'w')",
    "lambdify([], 'open({path!r})')()",
]


@pytest.mark.parametrize("name", EVALUATING)
def test_an_answer_is_never_run_by_the_scorers_that_evaluate(name, tmp_path):
    """In this process: whatever ran would leave the file."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    row = json.dumps(reasoning_gym.create_dataset(name, seed=int(fresh_rng().integers(2**31)), size=1)[0])
    verifier, path = verifier_of("reasoning_gym"), str(tmp_path / "ran")
    for payload in PAYLOADS:
        response = Response(text=f"<answer>{payload.format(path=path)}</answer>", row=row)
        assert verifier.prepare(response) is response and not verifier(response).passed, payload
    assert not list(tmp_path.iterdir())
    assert "eval" not in vars(sys.modules["sympy.parsing.sympy_parser"])  # others' eval is theirs again


def test_the_payloads_would_run():
    """What the guard is for: a scorer alone runs its answer."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = {"answer": "a", "metadata": {}}
    with pytest.raises(SystemExit):
        reasoning_gym.get_score_answer_fn("string_insertion")(answer="exit()", entry=entry)


@pytest.mark.parametrize(
    "source", ["1 + 2 * 3", "[[1, 0], [0, 1]]", "['a', 'b']", "-2 ** 3", "0xf >> 1", "{'a': (1, 2)}"]
)
def test_what_may_be_evaluated_is_evaluated(source):
    assert inert_eval(source) == eval(source)


@pytest.mark.parametrize(
    "source", ["a", "a.b", "[].append", "f()", "[1][0]", "(1 for _ in [1])", "x := 1", "1 if 1 else 2"]
)
def test_what_may_not_is_refused(source):
    with pytest.raises((ValueError, SyntaxError)):
        inert_eval(source)


def test_the_worker_s_verdicts_hold_hostile_text_through_arrow(hostile, silent):
    def rollout(number, text):
        return Rollout(
            rollout_id=f"r{number}",
            prompt_id="p",
            group_id="g",
            sample_index=0,
            token_ids=np.arange(3, dtype=np.int32),
            prompt_length=2,
            text=text,
            logprobs=np.zeros(1, np.float32),
            loss_mask=np.ones(1, bool),
            answer=text,
        )

    worker = VerifierWorker(config=Verifier(kind="exact", answers="any"))
    batch, receipt = worker.judge(encode(Rollout, [rollout(i, text) for i, text in enumerate(hostile)]))
    worker.close()
    verdicts = decode(Verdict, batch)
    assert [v.rollout_id for v in verdicts] == [f"r{i}" for i in range(len(hostile))]
    assert tuple(v.answer for v in verdicts) == receipt.answers and max(map(len, receipt.answers)) <= 256
    assert all(re.fullmatch("[0-9a-f]{16}|", v.path) for v in verdicts)
    assert {reasoning_path(text) for text in [*hostile, SURROGATES]} >= {v.path for v in verdicts}


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_no_template_reads_what_is_filled_in(hostile):
    for text in (text.strip() for text in hostile if text.strip()):
        assert fill("{problem}|{peer}", {"problem": "P", "peer": text}) == f"P|{text}"
        assert fill("{peer}[[ {feedback}]]", {"peer": text, "feedback": ""}) is None
        assert (
            fill("{problem}[[ {peer}]][[ {feedback}]]", {"problem": text, "peer": text, "feedback": ""})
            == f"{text} {text}"
        )


def test_no_control_token_comes_of_a_text(hostile):
    tokenizer = tiny_tokenizer()
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    ids = tokenize_prompt(tokenizer, "p", {})
    frame = sum(i in control for i in ids.tolist())
    prompter = Prompter(tokenizer)
    for text in (*TEXTS[:-4], *names, "".join(names), "".join(f"{n[:2]}{n}{n[2:]}" for n in names)):
        prompt = Prompt(prompt_id="p", text=text, token_ids=ids, answer=text, solution=text)
        for context in TEMPLATES:
            shown = prompter.ids(context, prompt, peer_text=text, peer_answer=text, feedback=text)
            assert shown is None or sum(i in control for i in shown.tolist()) == frame, (context, text)
    broken = [
        text for text in hostile if any(name in inert(tokenizer, text) for name in names if len(name.strip()) > 1)
    ]
    assert not broken


# ---- what is shown and stored ----------------------------------------------------------------------------------------


def names_of(hostile):
    """As the names of errors, which a function of somebody else may make of a text."""
    return [text[:200] for text in [*hostile, SURROGATES]]


def test_a_shown_text_has_no_character_that_steers(hostile):
    for text in names_of(hostile):
        assert not STEERS.search(plain(text)) and "\n" not in plain(text)
        assert all(c in plain(text) for c in text if c in string.ascii_letters)


def test_progress_and_the_final_table_escape(hostile, tmp_path):
    with (tmp_path / "out").open("w+", encoding="utf-8") as file:
        console = Console(file=file, width=10**6)
        with Progress(3, console) as progress:
            for text in names_of(hostile):
                progress.phase(text)
                progress.note(text)
        console.print(final_table({"verifier_errors": dict.fromkeys(names_of(hostile), 1), "method": "[bold]m"}))
        file.seek(0)
        shown = file.read()
    assert not STEERS.search(shown) and "[bold red]free[/]" in shown and "[bold]m" in shown


def test_metrics_and_the_report_escape(hostile, tmp_path):
    folder = tmp_path / "run"
    names = names_of(hostile)[:-1]  # a name of an error is no half of a character
    log = MetricsLog(folder, "127.0.0.1", 0)
    failed = {f"verifier:{name}": 1 for name in names}
    log.log_step(step_row(fresh_rng(), 1, failed=failed, dropped=dict.fromkeys(names, 1)))
    with urllib.request.urlopen(log.url, timeout=30) as reply:
        exposed = reply.read().decode()
    log.close()
    assert read_rows(folder / "metrics.jsonl")[0]["failed"] == failed
    samples = [line for line in exposed.split("\n") if line and not line.startswith(("#", "tutorloop_"))]
    assert not samples  # no text became a sample of its own
    (folder / "summary.json").write_text(json.dumps({"method": TEXTS[7], "verifier_errors": dict.fromkeys(names, 1)}))
    (folder / "config.yaml").write_text(TEXTS[7], encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page and "onerror=alert(1)>" not in page and not STEERS.search(page)
    assert html.escape(TEXTS[7]) in page


def test_verify_shows_a_hostile_file_escaped(hostile, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "id": text[:200],
            "prediction": text,
            "gold": text[::-1] or "x",
            "expected": None if i % 3 else True,
            "row": text,
        }
        for i, text in enumerate([*hostile, SURROGATES])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["verify", str(path), "--kind", "exact", "--show", "500"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0 and not STEERS.search(table.stdout) and "[bold red]free" in table.stdout
    lines = CliRunner().invoke(app, [*arguments, "--json"])
    *found, _ = [json.loads(line) for line in lines.stdout.splitlines()]
    assert lines.stdout.isascii() and [row["id"] for row in found] == [row["id"] for row in rows]


def test_errors_about_a_hostile_file_escape(tmp_path):
    for field, text in (("expected", TEXTS[4]), ("id", [TEXTS[5]]), ("answer_marker", {TEXTS[3]: 1})):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prediction": "1", "gold": "1", field: text}) + "\n")
        result = CliRunner().invoke(app, ["verify", str(path)])
        assert result.exit_code == 2 and not STEERS.search(result.stderr)


def test_the_code_here_would_run(tmp_path):
    """What the texts of CODE are worth: Python alone runs the first of them."""
    path = tmp_path / "ran"
    subprocess.run([sys.executable, "-c", CODE[0].format(path=str(path))], check=True)
    assert path.exists()


def test_a_command_s_error_is_shown_escaped(capsys):
    from tutorloop.cli.outcome import ends_clearly
    from tutorloop.contracts.errors import DataError, VerifierError

    for text in [*TEXTS, SURROGATES]:
        for error in (DataError("a rule", text, "a remedy"), VerifierError(text), OSError(5, text)):

            def command(error=error):
                raise error

            with pytest.raises(typer.Exit):
                ends_clearly(command)()
            shown = capsys.readouterr().err
            assert not STEERS.search(shown)
            assert not isinstance(error, DataError) or ("\n  found: " in shown and "\n  a remedy" in shown)
