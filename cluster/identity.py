"""What a run reads, told apart from what may stand behind the same paths later.

Every input has a digest of its content, wherever it stands: data by the prompts and answers that came of it, a model by
the files of its folder, functions of one's own by their sources. The run's folder and each checkpoint hold them, and a
resumed run must read the same. A model that a stage left is in the run's folder, and needs none.

A model's files are digested whole up to `WHOLE_BYTES` a folder. Beyond, each safetensors file goes by its size, its
header (every tensor's name, type and shape) and two blocks of every tensor, so that 16 GB take seconds. That finds a
model that was trained on, merged, quantised or replaced, which changes tensors all over; it cannot find an edit of
single rows of a large model.
"""

import ast
import hashlib
import importlib.util
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..contracts.config import REFERENCE, Config
from ..contracts.errors import RunFolderError
from ..contracts.own_code import is_file
from ..contracts.records import Prompt
from ..models.loading import locate_model
from ..verifier_service.strategies.extractor import version_of
from .preflight import Inputs
from .skill_bank import source_of

Identity = dict[str, dict[str, Any]]  # what is read → digest, place, and of data its rows

WHOLE_BYTES = 2 * 2**30
BLOCK = 4096
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*")
PACKAGE = "tutorloop"  # its own code is known by its version
BANK = "skill bank"
EVALUATION = ("evaluation data", "out-of-distribution data")
NOT_READ_AGAIN = {
    **dict.fromkeys(EVALUATION, "figures before and after are of other problems"),
    BANK: "the run goes on with its own copy",
}


def identity_of(config: Config, inputs: Inputs) -> Identity:
    """The digests of all that `config` names, once it has been checked."""
    data = {"data": (config.data.path, inputs.train)}
    data |= {"replay data": (config.replay.path, inputs.replay)} if config.replay else {}
    held_out = (config.eval.path, inputs.in_distribution), (config.eval.ood_path, inputs.out_of_distribution)
    data |= dict(zip(EVALUATION, held_out, strict=True))
    found: Identity = {
        name: {"digest": digest_of_prompts(prompts), "place": path, "rows": len(prompts)}
        for name, (path, prompts) in data.items()
        if prompts
    }
    folders = {name: locate_model(model).resolve() for name, model in local_models(config).items()}
    digests = {folder: digest_of_model(folder) for folder in set(folders.values())}
    found |= {name: {"digest": digests[folder], "place": str(folder)} for name, folder in folders.items()}
    for place in _own_code(config):
        found[f"code of {place}"] = {"digest": digest_of_code(place), "place": place}
    if config.skills and "://" not in config.skills.path:
        source = Path(source_of(config.skills))
        found[BANK] = {"digest": _digest_of_bank(source), "place": str(source)}
    if config.strategies:
        place = config.strategies.path
        found["strategies"] = {"digest": version_of(place), "place": place}
    return found


def local_models(config: Config) -> dict[str, str]:
    """The models whose files are read here, by their keys in the configuration."""
    models = {"student.model": config.student.model}
    for name, teacher in config.named_teachers.items():
        if not teacher.remote:
            models["teacher.model" if config.teacher else f"teachers.{name}.model"] = teacher.model
    return models | ({f"{REFERENCE}.model": config.reference.model} if config.reference else {})


def differing(before: Identity | None, now: Identity) -> dict[str, tuple[str, str]]:
    """Of what a run reads now and read then, that which is another: described, before and now."""
    return {
        name: (_described(before[name]), _described(one))
        for name, one in now.items()
        if before and name in before and before[name]["digest"] != one["digest"]
    }


def compare(before: Identity | None, now: Identity, may_differ: Collection[str] = ()) -> list[str]:
    """What to tell of a run that is to continue. Raises RunFolderError where it would train on something else, but for
    what may differ."""
    if before is None:
        return ["what this run read when it began was not recorded: its data and models are taken as they are"]
    others = {
        name: f"{name}: {then} before, {by_now} now"
        for name, (then, by_now) in differing(before, now).items()
        if name not in may_differ
    }
    if refused := [text for name, text in others.items() if name not in NOT_READ_AGAIN]:
        rule = "a resumed run reads what it began with"
        remedy = "put it back as it was (its place may differ), or start a new run in another output_dir"
        raise RunFolderError(rule, "\n         ".join(refused), remedy)
    return [f"{text}: {NOT_READ_AGAIN[name]}" for name, text in others.items()]


def _described(one: Mapping[str, Any]) -> str:
    rows = f"{one['rows']} rows, " if "rows" in one else ""
    return f"{one['place']} ({rows}digest {one['digest'][:8]})"


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Of what the run has of each row: the student's tokens, and what verifiers and teachers are shown."""
    total = _blake()
    for prompt in prompts:
        golds = [prompt.answer, *prompt.other_answers]
        shown = [prompt.text, prompt.turns, golds, prompt.solution, prompt.teacher, prompt.row]
        shown += [prompt.strategy] if prompt.strategy else []  # earlier releases had none
        total.update(json.dumps(shown).encode() + prompt.token_ids.tobytes())
    return total.hexdigest()


def digest_of_model(folder: Path) -> str:
    """Of the files that transformers and vLLM may read of a model's folder."""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    whole = sum(file.stat().st_size for file in files) <= WHOLE_BYTES
    total = _blake()
    for file in files:
        own = _digest_of_file(file) if whole or file.suffix != ".safetensors" else _digest_of_tensors(file)
        total.update(f"{file.relative_to(folder)}\n{own}\n".encode())
    return total.hexdigest()


def digest_of_code(place: str) -> str:
    """Of a Python file or module, and of the files and packages beside it that these import."""
    file = Path(place)
    if not is_file(place):
        found = importlib.util.find_spec(place)
        if found is None or found.origin is None:
            return ""
        file = Path(found.origin)
    total = _blake()
    for source in sorted(_with_neighbours(file)):
        total.update(f"{source.relative_to(file.parent)}\n{_digest_of_file(source)}\n".encode())
    return total.hexdigest()


def _with_neighbours(first: Path) -> set[Path]:
    found, left = {first}, [first]
    while left:
        try:
            tree = ast.parse(left.pop().read_bytes())
        except (SyntaxError, ValueError):  # a neighbour that nobody could import
            continue
        names = {name.partition(".")[0] for node in ast.walk(tree) for name in _imported(node)}
        beside = [path for name in names - {PACKAGE} for path in _sources(first.parent / name) if path not in found]
        found.update(beside)
        left += beside
    return found


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from [node.module] if node.module else (alias.name for alias in node.names)


def _sources(module: Path) -> Iterable[Path]:
    file = module.with_name(f"{module.name}.py")
    return [file] if file.is_file() else (module.rglob("*.py") if module.is_dir() else [])


def _own_code(config: Config) -> list[str]:
    """Files and modules of the user's that the run calls."""
    methods = [stage.method for stage in config.plan if is_file(stage.method) or "." in stage.method]
    kinds = [config.verifier.kind, *(reward.kind for reward in config.verifier.rewards)]
    engines = [config.rollout.engine, *(teacher.engine for teacher in config.named_teachers.values())]
    return sorted({*methods, *(name.rpartition(":")[0] for name in (*kinds, *engines) if ":" in name)})


def _digest_of_bank(source: Path) -> str:
    """A published file's content; of a bank's folder the files, whose names change with their content."""
    if source.is_file():
        return _digest_of_file(source)
    files = sorted((str(f.relative_to(source)), f.stat().st_size) for f in source.rglob("*") if f.is_file())
    return _blake(json.dumps(files).encode()).hexdigest()


def _digest_of_tensors(file: Path) -> str:
    """Size, header, and of every tensor a block in its middle and its last one."""
    total = _blake(str(file.stat().st_size).encode())
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = data.read(length)
        total.update(header)
        for tensor in json.loads(header).values():
            if "data_offsets" not in tensor:  # __metadata__
                continue
            begin, end = tensor["data_offsets"]
            for at in ((begin + end) // 2, max(begin, end - BLOCK)):
                data.seek(8 + length + at)
                total.update(data.read(min(BLOCK, end - at)))
    return total.hexdigest()


def _digest_of_file(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, _blake).hexdigest()


def _blake(data: bytes = b"") -> "hashlib.blake2b":
    return hashlib.blake2b(data, digest_size=16)
