"""Every `tutorloop …` that a page, a manifest or a recipe shows is a command as it stands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from tutorloop.cli.main import app
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
GROUP = typer.main.get_command(app)


def commands(text: str) -> Iterator[list[str]]:
    """The words behind each `tutorloop` of a shell's text; a synopsis (`RECIPE […]`) is none."""
    for line in text.replace("\\\n", " ").splitlines():
        if "tutorloop " in line and not re.search(r"[…\[|]", line.partition("#")[0].replace("'", "")):
            words = shlex.split(line, comments=True)
            if "tutorloop" in words:
                yield words[words.index("tutorloop") + 1 :]


def documented() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        inline = [code for code in re.findall(r"`(tutorloop [^`\n]+)`", text) if re.search(r"\btrain [a-z]", code)]
        for shell in [*BLOCK.findall(text), *inline]:
            yield from ((page.name, words) for words in commands(shell))
    for recipe in RECIPES:
        shown = "\n".join(line.removeprefix("#") for line in recipe.read_text().splitlines() if line.startswith("#"))
        yield from ((recipe.name, words) for words in commands(shown.replace("(tutorloop bank build)", "")))
    job = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    yield "rayjob.yaml", shlex.split(job["spec"]["entrypoint"])[1:]


COMMANDS = list(documented())


def test_there_are_some_of_each() -> None:
    assert {"train", "eval", "verify", "bank"} - {words[0] for _, words in COMMANDS} <= {"eval"}
    assert {page for page, _ in COMMANDS} >= {"README.md", "cluster.md", "rayjob.yaml", *(r.name for r in RECIPES)}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(w)}"[:80] for page, w in COMMANDS])
def test_it_is_a_command(page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "recipes" if "opd.yaml" in words else ROOT  # the one is submitted with the folder itself
    monkeypatch.chdir(tmp_path)
    for name in words:
        if re.fullmatch(r"[\w-]+\.jsonl?", name):
            (tmp_path / name).write_text("{}\n")
    command, context = GROUP, typer.Context(GROUP)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    given = command.make_context(command.name, list(words), parent=context).params
    if command.name == "train":
        monkeypatch.chdir(folder)
        config = load_config(given["recipe"], given["overrides"] or [])
        assert config.total_steps > 0


def test_the_options_of_the_synopsis_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, rest in re.findall(r"^tutorloop (train|eval|verify) (.*\[.*)$", text, re.MULTILINE):
        known = {option for parameter in GROUP.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= known, name
    [listed] = re.findall(r"^tutorloop bank (.*) …$", text, re.MULTILINE)
    assert set(listed.split(" | ")) == set(GROUP.commands["bank"].commands)
