"""A user's file and its neighbours: found, kept apart, run once, told what they raise, and sent to other processes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from tutorloop.contracts.errors import ConfigError
from tutorloop.contracts.own_code import load_module
from tutorloop.contracts.protocols import Response
from tutorloop.verifier_service.function_verifier import FunctionVerifier, load_function
from tutorloop.verifier_service.pool import VerifierPool

FILES = {
    "rewards.py": """
import helpers, json
import kit.marks as marks
import kit.deep.er
from bare.low import LOW
from helpers import *
from . import helpers as again

def score(completions, **columns):
    from late import late
    import kit.lazy
    from .later import later
    more = starred() + kit.deep.er.DEEP + LOW + late() + kit.lazy.LAZY + later() + marks.mark()
    return [helpers.bonus(c) + more for c in completions] if json.dumps(1) == "1" and again is helpers else [None]
""",
    "helpers.py": "def bonus(text): return float('boxed' in text)\ndef starred(): return 10.0\n",
    "kit/__init__.py": "from .marks import mark\nfrom kit import marks\n",
    "kit/marks.py": "def mark(): return 100.0\n",
    "kit/lazy.py": "LAZY = 1000.0\n",
    "kit/deep/__init__.py": "",
    "kit/deep/er.py": "DEEP = 10000.0\n",
    "bare/low.py": "LOW = 100000.0\n",
    "late.py": "from functools import lru_cache\n@lru_cache\ndef late(): return 1000000.0\n",
    "later.py": "def later(): return 10000000.0\n",
    "json.py": "raise RuntimeError('in the way')\n",
    "tutorloop/__init__.py": "raise RuntimeError('in the way')\n",
}
SCORE = 11111111.0


@pytest.fixture
def lay(tmp_path: Path) -> Callable[..., Path]:
    def write(files: dict[str, str], folder: str = "mine") -> Path:
        for name, text in files.items():
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path / folder

    return write


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True)


def load(path: Path) -> Any:
    return load_module(str(path), "a file", "")


def test_neighbours_are_imported_as_python_would(lay: Callable[..., Path]) -> None:
    before = {*sys.modules}
    module = load(lay(FILES) / "rewards.py")
    assert module.score(["\\boxed{1}", "no"]) == [SCORE, SCORE - 1]
    assert {name.partition(".")[0] for name in {*sys.modules} - before} == {module.__name__.partition(".")[0]}
    assert sys.modules["json"] is json


def test_it_runs_elsewhere_without_the_files(lay: Callable[..., Path], tmp_path: Path) -> None:
    folder = lay(FILES)
    (tmp_path / "sent").write_bytes(load_function(f"{folder}/rewards.py:score"))
    folder.rename(tmp_path / "gone")
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))(completions=['\\\\boxed{1}']))"
    ended = run(code, tmp_path, str(tmp_path / "sent"))
    assert ended.stdout == f"[{SCORE}]\n", ended.stderr


def test_it_judges_in_verifier_processes(lay: Callable[..., Path]) -> None:
    pool = VerifierPool(FunctionVerifier(load_function(f"{lay(FILES)}/rewards.py:score"), 1.0), timeout_seconds=30.0)
    [outcome] = pool.judge([Response(text="\\boxed{1}")])
    pool.close()
    assert (outcome.judgement.error_class, outcome.judgement.score) == ("", SCORE)


def test_a_method_s_functions_travel_with_what_they_import_later(lay: Callable[..., Path], tmp_path: Path) -> None:
    from ray import cloudpickle as rays

    from tutorloop.contracts.own_code import package_of

    files = {"own.py": "import near\ndef loss():\n    from late import LATE\n    return near.one() + LATE\n"}
    folder = lay({**files, "near.py": "def one(): return 1\n", "late.py": "LATE = 2\n"})
    module = load(folder / "own.py")
    for pickler in (cloudpickle, rays):
        pickler.register_pickle_by_value(package_of(module))
        (tmp_path / "sent").write_bytes(pickler.dumps(module.loss))
        pickler.unregister_pickle_by_value(package_of(module))
        folder.rename(tmp_path / "gone")
        code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))())"
        ended = run(code, tmp_path, str(tmp_path / "sent"))
        assert ended.stdout == "3\n", ended.stderr
        (tmp_path / "gone").rename(folder)


def test_files_of_one_name_and_their_neighbours_stay_apart(lay: Callable[..., Path]) -> None:
    text = "from helpers import WHO\ndef score(completions): return [WHO]\n"
    modules = [load(lay({"rewards.py": text, "helpers.py": f"WHO = {n}.0\n"}, f"f{n}") / "rewards.py") for n in (1, 2)]
    assert [module.score([""]) for module in modules] == [[1.0], [2.0]]
    sent = [cloudpickle.loads(load_function(f"{Path(module.__file__)}:score")) for module in modules]
    assert [function(completions=[""]) for function in sent] == [[1.0], [2.0]]


def test_a_file_runs_once_until_something_changes(lay: Callable[..., Path], tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n"
    folder = lay({"own.py": f"{count}import near\nfrom near import A\n", "near.py": "A = 1\n"})
    first = load(folder / "own.py")
    assert load(folder / "own.py") is first and (tmp_path / "count").read_text() == "x"
    (folder / "near.py").write_text("A = 22\n")
    assert load(folder / "own.py").A == 22 and (tmp_path / "count").read_text() == "xx"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {"own.py": "x = 1\nimport near\n", "near.py": "\n\n1 / 0\n"},
            "near.py line 3: ZeroDivisionError: division by zero",
        ),
        ({"own.py": "import near\n", "near.py": "\ndef f(:\n"}, "near.py line 2: SyntaxError: invalid syntax"),
        ({"own.py": "x = (\n"}, "own.py line 1: SyntaxError: '(' was never closed"),
        ({"own.py": "x = 1\n  y = 2\n"}, "own.py line 2: IndentationError: unexpected indent"),
        ({"own.py": "import json\njson.loads('{')\n"}, "own.py line 2: JSONDecodeError"),
        ({"own.py": "import sys\nsys.exit('no')\n"}, "own.py line 2: SystemExit: no"),
        ({"own.py": "import nowhere_at_all\n"}, "own.py line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        (
            {"own.py": "from near import absent\n", "near.py": ""},
            "own.py line 1: ImportError: cannot import name 'absent'",
        ),
        ({"own.py": "import json\nfrom json import mine\n", "json.py": "mine = 1\n"}, "own.py line 2: ImportError"),
        ({"own.py": "x = 1\0\n"}, "own.py line 1: SyntaxError: source code string cannot contain null bytes"),
        ({"own.py": "from .. import x\n"}, "own.py line 1: ImportError: attempted relative import beyond"),
    ],
)
def test_what_it_raises_is_the_user_s(files: dict[str, str], told: str, lay: Callable[..., Path]) -> None:
    folder = lay(files)
    for _ in range(2):
        with pytest.raises(ConfigError, match=re.escape(told)):
            load(folder / "own.py")
    (folder / "own.py").write_text("mended = True\n")
    assert load(folder / "own.py").mended


def test_a_module_that_raises_is_the_user_s_too(lay: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lay({"mine_that_raises.py": "\nraise KeyError('x')\n"}))
    with pytest.raises(ConfigError, match=re.escape("mine_that_raises.py line 2: KeyError: 'x'")):
        load_function("mine_that_raises:f")


@pytest.mark.parametrize("name", ["my-rewards.py", "rewards.v2.py", "class.py", "2.py", "a b.py", "ü.py"])
def test_any_file_name_will_do(name: str, lay: Callable[..., Path]) -> None:
    folder = lay({name: "from helpers import ONE\ndef f(completions): return [ONE]\n", "helpers.py": "ONE = 1.0\n"})
    assert cloudpickle.loads(load_function(f"{folder}/{name}:f"))(completions=["x"]) == [1.0]


def test_files_that_import_each_other_and_packages_without_init(lay: Callable[..., Path]) -> None:
    files = {
        "own.py": "import other\nA = 1\ndef f(): return other.g()\n",
        "other.py": "import own\ndef g(): return own.A\n",
    }
    assert load(lay(files) / "own.py").f() == 1


def test_annotations_dataclasses_and_docstrings_stay(lay: Callable[..., Path]) -> None:
    text = '"""Doc."""\nfrom __future__ import annotations\nimport near\nfrom dataclasses import dataclass\n'
    text += "@dataclass\nclass A:\n    x: near.T = 1\n"
    module = load(lay({"own.py": text, "near.py": "T = int\n"}) / "own.py")
    assert module.__doc__ == "Doc." and module.A().x == 1 and module.A.__annotations__ == {"x": "near.T"}
