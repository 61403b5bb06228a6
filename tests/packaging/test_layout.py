"""The shape of the house, as tests: who may import whom, how long things may get, what must not be in the tree."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
ROOMS = sorted({name.split(".")[1] for name in PACKAGES if "." in name})
BESIDE_MODELS = ("actors", "learner", "teacher_service", "verifier_service", "lab")
FLOORS = [("contracts",), ("models",), BESIDE_MODELS, ("cluster",), ("deploy",), ("cli",)]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_LOOP_LINES = 400, 60, 80
THE_LOOP = ("cluster/driver.py", "train")


def tree_files() -> list[Path]:
    """Every file that is tracked, or new and not ignored, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(Path(name) for name in set(names.split("\0")) if name and (ROOT / name).is_file())


FILES = tree_files()
SOURCES = [path for path in FILES if path.suffix == ".py"]
PACKAGE_SOURCES = [path for path in SOURCES if path.parts[0] in ROOMS]


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of each import, wherever in the file it stands. Relative ones start with `tutorloop`."""
    package = ["tutorloop", *path.parent.parts]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            names = [alias.name for alias in node.names] if len(base) == 1 else [""]
            yield from ((node.lineno, ".".join([*base, name]).rstrip(".")) for name in names)


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def test_every_room_has_its_floor():
    assert set(ROOMS) == set(FLOOR)


def test_rooms_import_one_way():
    wrong = []
    for path in PACKAGE_SOURCES:
        room = path.parts[0]
        for line, module in imported(path):
            head, *rest = module.split(".")
            if head in ROOMS or (head == "tutorloop" and rest and rest[0] in ROOMS):
                other = head if head in ROOMS else rest[0]
                if head in ROOMS:
                    wrong.append(f"{path}:{line} imports {module} by a bare name")
                elif other != room and FLOOR[other] >= FLOOR[room]:
                    wrong.append(f"{path}:{line} ({room}) imports {other}")
    assert not wrong, "\n".join(wrong)


def test_inside_the_package_imports_are_relative():
    wrong = [
        f"{path}:{node.lineno}"
        for path in PACKAGE_SOURCES
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "tutorloop")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "tutorloop" for alias in node.names))
    ]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_where_they_belong():
    wrong = []
    for path in PACKAGE_SOURCES:
        room = path.parts[0]
        barred = {"torch", "ray", "transformers"} if room == "contracts" else {"ray"}
        if FLOOR[room] < FLOOR["cluster"]:
            wrong += [f"{path}:{line} {module}" for line, module in imported(path) if module.split(".")[0] in barred]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["tutorloop.contracts.config", "tutorloop.cli.main"])
def test_a_wrong_key_is_told_before_torch_or_ray_is_loaded(module, tmp_path):
    code = f"import sys, {module}; print(*[name for name in ('torch', 'ray') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_files_and_functions_are_short():
    wrong = []
    for path in SOURCES:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > MOST_FILE_LINES:
            wrong.append(f"{path}: {lines} lines")
        for node, length in functions(path):
            most = MOST_LOOP_LINES if (path.as_posix(), node.name) == THE_LOOP else MOST_FUNCTION_LINES
            if length > most:
                wrong.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    assert not wrong, "\n".join(wrong)


def test_the_typical_function_is_about_ten_lines():
    assert statistics.median(length for path in PACKAGE_SOURCES for _, length in functions(path)) <= 12


def test_the_driver_has_its_loop():
    path, name = THE_LOOP
    loops = [node for node, _ in functions(Path(path)) if node.name == name]
    assert len(loops) == 1 and any(isinstance(node, ast.While) for node in ast.walk(loops[0]))


def test_no_handler_swallows_everything():
    """A broad handler raises again, or at least looks at the error it caught; none just passes on."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler) and _broad(node.type):
                inside = [below for statement in node.body for below in ast.walk(statement)]
                used = any(isinstance(below, ast.Name) and below.id == node.name for below in inside)
                if not used and not any(isinstance(below, ast.Raise) for below in inside):
                    wrong.append(f"{path}:{node.lineno}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                wrong += [f"{path}:{node.lineno}" for kind in node.args if _broad(kind)]
    assert not wrong, "\n".join(wrong)


def _broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in ("Exception", "BaseException")) for k in kinds)


def test_no_module_at_the_root_and_none_that_shadows():
    assert [path.name for path in SOURCES if len(path.parts) == 1] == ["__init__.py"]
    folders = {path.parts[0] for path in SOURCES if len(path.parts) > 1}
    assert not folders & set(sys.stdlib_module_names)
    own = ("__init__.py", "conftest.py")  # pytest keeps those of two folders apart
    tests = [path.name for path in SOURCES if path.parts[0] == "tests" and path.name not in own]
    assert len(tests) == len(set(tests)), "pytest imports test files by their base name: two share one"


def test_every_package_folder_is_listed():
    folders = {path.parent for path in PACKAGE_SOURCES}
    assert {".".join(("tutorloop", *folder.parts)) for folder in folders} | {"tutorloop"} == set(PACKAGES)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_nothing_of_this_machine_is_in_the_tree():
    """No registry's host name, no index option, no path of the machine that it was written on."""
    hosts = "|".join(("pypi" + r"\.org", "pytho" + "nhosted", "index" + "-url", "/sim" + "ple/?[\"'\\s]"))
    patterns = re.compile(rf"{hosts}|(?<![\w.\-/])/wo" + "rk/")
    wrong = []
    for path in FILES:
        data = (ROOT / path).read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
            if found := patterns.search(line):
                wrong.append(f"{path}:{number}: {found[0]}")
    assert not wrong, "\n".join(wrong)
