"""`tutorloop verify`: a verdict for every row of a file, in order, and what becomes of bad files and of Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from tutorloop.cli.main import app
from tutorloop.contracts.errors import DataError
from tutorloop.contracts.json_files import MOST_BYTES
from tutorloop.verifier_service.rows import read_rows

PATIENT = 60.0  # seconds


def file_of(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def command(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def objects_of(*arguments):
    """The rows' objects, and the summary."""
    result = command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    *rows, last = map(json.loads, result.stdout.splitlines())
    return rows, last["summary"]


def fresh_random():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_the_marks_of_reasoning_are_an_option(tmp_path):
    texts = ("[THINK]\\boxed{7}[/THINK]\\boxed{8}", "\\boxed{8}[THINK]\\boxed{7}", "[THINK]\\boxed{7}")
    path = file_of(tmp_path, *({"prediction": text, "gold": "7"} for text in texts))
    assert [row["passed"] for row in objects_of(path)[0]] == [False, True, True]
    rows, _ = objects_of(path, "--thinking", "[THINK]", "[/THINK]")
    assert [row["answer"] for row in rows] == ["8", "8", ""]


def test_an_object_for_every_row_in_order_and_the_summary(tmp_path):
    rows = [
        {"id": "a", "prediction": "so \\boxed{7}", "gold": "7", "expected": True},
        {"prediction": "so \\boxed{8}", "gold": 7, "expected": True},
        {"id": 9, "prediction": "\\boxed{\\frac{2}{4}}", "gold": "0.5"},
        {"id": "d", "prediction": "\\boxed{1}", "gold": " ", "expected": False},
        {"id": "e", "prediction": "\\boxed{8}", "gold": "7", "expected": False},
        {"id": "f", "prediction": "\\boxed{8}", "gold": "8", "expected": False},
        {"id": "g", "prediction": "\\boxed{8}", "gold": "", "expected": True},
        {"id": "h", "prediction": "\\boxed{8}", "gold": "8", "expected": None},
    ]
    found, summary = objects_of(file_of(tmp_path, *rows))
    assert [row["id"] for row in found] == ["a", 2, 9, "d", "e", "f", "g", "h"]
    assert [row["passed"] for row in found] == [True, False, True, False, False, True, False, True]
    assert [row["abstained"] for row in found] == [False, False, False, True, False, False, True, False]
    assert [row["error_class"] for row in found] == ["", "", "", "no_gold", "", "", "no_gold", ""]
    assert [row.get("expected") for row in found] == [row.get("expected") for row in rows]
    assert {key for row in found for key in row} == {
        *("id", "passed", "abstained", "answer", "error_class", "seconds", "expected")
    }
    assert all(row["seconds"] >= 0 for row in found) and found[1]["answer"] == "8"
    del summary["seconds"]
    assert len(summary.pop("slowest")) == 8
    assert summary == {
        "rows": 8,
        "passed": 4,
        "incorrect": 2,
        "abstained": 2,
        "errors": {"no_gold": 2},
        "faults": {},
        "expected": 6,
        "agree": 2,
        "agreement": 2 / 6,
        "wrong_accepts": 1,
        "wrong_rejects": 1,
        "abstained_expected_true": 1,
        "abstained_expected_false": 1,
        "interrupted": False,
    }


def test_the_table_says_the_same(tmp_path):
    rows = [{"id": f"row{i}", "prediction": f"\\boxed{{{i}}}", "gold": "3", "expected": i < 6} for i in range(8)]
    result = command(file_of(tmp_path, *rows), "--show", "3")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert all(part in text for part in ("agreement │ 3 of 8 37.50%", "wrong rejects │ 5", "wrong accepts │ 0"))
    assert text.count("incorrect") == 4 and "row5" not in text.partition("disagreements")[2]  # three of five are shown


EXPLAINED = [  # prediction, gold; from where, what was read of either, the rule, and the decision
    ("\\boxed{1} so \\boxed{**12** people}", "12", "the last box", "**12** people", "12", "", "incorrect"),
    ("so \\boxed{12 people}", "12", "the last box", "12 people", "12", "two numbers, with the units", "passed"),
    ("</think>\\boxed{½}", "0.5", "the last box, after </think>", "\\frac{1}{2}", "0.5", "two numbers", "passed"),
    ("\\boxed{7 8}", "15", "the last box", "7 8", "15", "numbers side by side", "incorrect"),
    ("\\boxed{x+x}", "$2x$", "the last box", "x+x", "2x", "a formula against a formula", "passed"),
    ("\\boxed{9^{9^{9^9}}}", "4", "the last box", "9^{9^{9^9}}", "4", "too large", "incorrect (too_large)"),
    ("\\boxed{1}, \\boxed{2}", "1,2", "the boxes that are one list", "1, 2", "1,2", "", "passed"),
    ("it is 1e3.", "1000", "the whole text, searched", "it is 1e3.", "1000", "two numbers", "passed"),
    ("<answer>4</answer>", "5", "the <answer> tag", "4", "5", "two numbers", "incorrect"),
    ("\\boxed{", "5", "nowhere", "", "5", "no answer", "incorrect"),
]


def test_explain_says_what_was_read_from_where_and_by_which_rule(tmp_path):
    file = file_of(tmp_path, *({"prediction": said, "gold": gold} for said, gold, *_ in EXPLAINED))
    found, summary = objects_of(file, "--explain")
    for row, (_, _, place, read, gold, rule, decided) in zip(found, EXPLAINED, strict=True):
        assert row["from"].startswith(place) and (row["read"], row["gold_read"]) == (read, gold), row
        assert rule in row["rule"] and row["rule"], row
        assert row["passed"] == (decided == "passed") and not row["abstained"], row
    assert summary["faults"] == {"too_large": 1} and summary["errors"] == {}
    shown = command(file, "--explain").stdout
    assert all(f"  {decided}\n  from" in shown for *_, decided in EXPLAINED)
    lenient, summary = objects_of(file, "verifier.response_fault=abstain")
    assert [row["abstained"] for row in lenient].count(True) == 1 and summary["errors"] == {"too_large": 1}
    assert "rule" not in lenient[0]


def test_more_rows_than_are_read_ahead_stay_in_order(tmp_path):
    random = fresh_random()
    golds = random.integers(0, 5, 3000)
    said = np.where(random.random(3000) < 0.5, golds, random.integers(0, 5, 3000))
    rows = [{"prediction": f"\\boxed{{{a}}}", "gold": str(b)} for a, b in zip(said, golds, strict=True)]
    found, summary = objects_of(file_of(tmp_path, *rows))
    assert [row["passed"] for row in found] == (said == golds).tolist()
    assert [row["id"] for row in found] == list(range(1, 3001))
    assert (summary["rows"], summary["passed"], summary["agreement"]) == (3000, int((said == golds).sum()), None)


def test_a_row_s_own_form_and_marker(tmp_path):
    rows = [
        {"prediction": "no", "as_response": "\\boxed{5}", "gold": "5"},
        {"prediction": "3\nA: 5", "gold": "5", "answer_marker": "A:"},
        {"prediction": "3\nB: 5 A: 6", "gold": "6", "answer_marker": "B: 5 A:"},
        {"prediction": "\\boxed{5}", "gold": "5", "answer_marker": ""},
    ]
    found, _ = objects_of(file_of(tmp_path, *rows))
    assert [row["passed"] for row in found] == [True] * 4
    found, _ = objects_of(file_of(tmp_path, *rows), "--marker", "A:")
    assert [row["passed"] for row in found] == [False, True, True, False]
    many = [{"prediction": "5", "gold": "5", "answer_marker": f"{i}:"} for i in range(20)]
    result = command(file_of(tmp_path, *many))
    assert result.exit_code == 2 and "answer_marker" in result.stderr


def test_answers_and_tolerance_are_options(tmp_path):
    path = file_of(tmp_path, {"prediction": "it is 10.4", "gold": "10"}, {"prediction": "\\boxed{10.4}", "gold": "10"})
    passed = {}
    for options in (("--answers", "box"), ("--answers", "any")):
        found, _ = objects_of(path, "--kind", "numeric", "--tolerance", "0.05", *options)
        passed[options[1]] = [row["passed"] for row in found]
    assert passed == {"box": [False, True], "any": [True, True]}


def test_other_keys_are_the_row_of_a_function(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def f(prompts, completions, level, answer, **columns):\n"
        "    assert not columns.keys() & {'id', 'prediction', 'gold', 'expected'}\n"
        "    return [0.5 if (prompts, level, answer) == (['2+2'], [7], ['4']) else None]\n"
    )
    rows = [{"prediction": "4", "gold": "4", "problem": "2+2", "level": level, "expected": True} for level in (7, 8)]
    path = file_of(tmp_path, *rows)
    found, _ = objects_of(path, "verifier.pass_score=0.5", "--kind", f"{own}:f")
    assert [(row["passed"], row["error_class"]) for row in found] == [(True, ""), (False, "no_reward")]


def test_what_hangs_is_killed_and_counted(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def f(completions):\n    while completions == ['hang']: pass\n    return [1.0]\n")
    path = file_of(tmp_path, *({"prediction": text, "gold": "1"} for text in ("a", "hang", "b")))
    found, summary = objects_of(path, "--kind", f"{own}:f", "--timeout", "3", "--processes", "1")
    assert [row["error_class"] for row in found] == ["", "timeout", ""]
    assert summary["errors"] == {"timeout": 1} and summary["slowest"][0]["id"] == 2


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = b'{"prediction": "1", "gold": "1"}\n'
LINES = {
    "no JSON": b"so it is\n",
    "cut off": b'{"prediction": "1", "go',
    "a list": b"[1]\n",
    "no gold": b'{"prediction": "1"}\n',
    "no prediction": b'{"gold": "1"}\n',
    "a prediction that is none": b'{"prediction": null, "gold": "1"}\n',
    "a gold that is none": b'{"prediction": "1", "gold": true}\n',
    "another expected": b'{"prediction": "1", "gold": "1", "expected": "yes"}\n',
    "another id": b'{"prediction": "1", "gold": "1", "id": []}\n',
    "another marker": b'{"prediction": "1", "gold": "1", "answer_marker": 1}\n',
    "no UTF-8": b'{"prediction": "\xff", "gold": "1"}\n',
    "nested without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_told_with_its_number(name, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n \n" + GOOD + LINES[name])
    result = command(path, "--kind", "exact")  # needs no processes for the good lines
    assert result.exit_code == 2
    assert "line 5" in result.stderr and "Traceback" not in result.stderr


def test_files_that_hold_no_rows_are_told(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, found in ((tmp_path / "empty.jsonl", "empty"), (tmp_path / "absent", "absent"), (tmp_path, "directory")):
        result = command(path)
        assert result.exit_code == 2 and found in result.stderr, path


def test_lines_end_with_newlines_alone_and_are_not_endless(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["a\u2028b", "a\u0085b", "a\u001cb", "\ud800"]
    rows = [json.dumps({"prediction": text, "gold": text}, ensure_ascii=text == "\ud800") for text in texts]
    path.write_text("\r\n".join(rows), encoding="utf-8", newline="")
    assert [row.response.text for row in read_rows(path)] == texts
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(DataError, match="line 1"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--kind", "maths"], "math, exact"),
        (["--kind", "absent.py:f"], "no such file"),
        (["--kind", "none"], "none"),
        (["--kind", "http"], "verifier.urls"),
        (["--kind", "http", "verifier.urls=[http://a]", "verifier.api_key_env=ABSENT_"], "ABSENT_ is not set"),
        (["--answers", "all"], "verifier.answers"),
        (["--timeout", "0"], "timeout_seconds"),
        (["--tolerance", "0.1"], "tolerance"),
        (["steps=3"], "steps=3"),
        (["verifier.rewards=[]"], "rewards"),
        (["verifier.marke=A"], "did you mean verifier.marker"),
    ],
)
def test_bad_options_are_told(arguments, found, tmp_path):
    result = command(file_of(tmp_path, {"prediction": "1", "gold": "1"}), *arguments)
    assert result.exit_code == 2 and found in result.stderr and "Traceback" not in result.stderr


# ---- the process ----------------------------------------------------------------------------------------------------


def test_it_needs_neither_torch_nor_ray(tmp_path):
    path = file_of(tmp_path, {"prediction": "\\boxed{1}", "gold": "1"}, {"prediction": "\\boxed{x+x}", "gold": "2x"})
    code = (
        "import sys; sys.argv = ['tutorloop', 'verify', sys.argv[1]]\n"
        "from tutorloop.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, {'torch', 'ray', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=PATIENT)
    assert done.stdout.endswith("0 set()\n"), done.stderr
    assert "2  100.0%" in done.stdout


def test_ctrl_c_ends_with_130_and_what_was_judged(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import time\ndef f(completions):\n    time.sleep(600 * (completions == ['hang']))\n    return [1.0]\n"
    )
    texts = ["a", "b", "hang", "c"]
    path = file_of(tmp_path, *({"prediction": text, "gold": "1"} for text in texts))
    arguments = [path, "--kind", f"{own}:f", "--timeout", "500"]
    # A shell's background job, as these tests may be, is born deaf to Ctrl-C, and so are its children.
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    for option in ([], ["--json"]):
        running = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"{hear}; from tutorloop.cli.main import main; main()",
                "verify",
                *arguments,
                *option,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C goes to the whole group of processes
        )
        try:
            family = _when_busy(running)
            os.killpg(running.pid, signal.SIGINT)
            out, err = running.communicate(timeout=PATIENT)
        finally:
            running.kill()
        assert running.returncode == 130, err
        assert "Traceback" not in out + err
        if option:
            *rows, last = map(json.loads, out.splitlines())
            assert [row["id"] for row in rows] == [1, 2] and last["summary"]["interrupted"]
        else:
            assert "2  100.0%" in out
        gone, alive = psutil.wait_procs(family, timeout=PATIENT)
        assert gone and not alive


def _when_busy(running):
    """The command's processes once one of them sleeps over a row: no new one for a second."""
    deadline, family, since = time.monotonic() + PATIENT, [], time.monotonic()
    while time.monotonic() < deadline and running.poll() is None:
        found = psutil.Process(running.pid).children(recursive=True)
        if {p.pid for p in found} != {p.pid for p in family}:
            family, since = found, time.monotonic()
        if len(family) >= 3 and time.monotonic() - since > 1:
            return family
        time.sleep(0.05)
    raise AssertionError(family)


def test_a_terminal_without_unicode_gets_escapes(tmp_path):
    path = file_of(
        tmp_path, {"id": "é\u202e[red]x\x1b[31m", "prediction": "\\boxed{数}", "gold": "學", "expected": True}
    )
    code = "from tutorloop.cli.main import main; main()"
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-c", code, "verify", path, "--kind", "exact"],
            capture_output=True,
            timeout=PATIENT,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        out = done.stdout.decode(encoding)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in out and "\u202e" not in out and "[red]" in out and "\\x1b[31m" in out
        assert ("é" in out) == ("数" in out) == (encoding == "utf-8")


# ---- verdicts that others made --------------------------------------------------------------------------------------


def test_a_corpus_is_run_as_it_is():
    data = Path(os.environ.get("TUTORLOOP_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = data / "verdicts" / "gsm8k_model_solutions.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here; TUTORLOOP_SHARED_DATA names the folder")
    rows, summary = objects_of(path)
    assert len(rows) == summary["expected"] == summary["agree"] and summary["agreement"] == 1
