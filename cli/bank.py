"""`tutorloop bank build | show | search | merge | export | import`: the skill bank, for a person."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..contracts.errors import ConfigError, SkillError
from .bank_tables import (
    because,
    change_object,
    change_table,
    counted,
    entry_tables,
    growth,
    hit_object,
    hit_table,
    say,
    version_table,
)
from .outcome import ends_clearly

if TYPE_CHECKING:
    from ..verifier_service.skills.extract import Extractor
    from ..verifier_service.skills.merge import LlmMerger

LAB = "lab:bank"
Kind = Literal["skill", "mistake"]
Bank = Annotated[str, typer.Argument(help="A bank: a folder or an object store path.")]
To = Annotated[str, typer.Option("--to", help="The bank that is written; made where there is none.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ExtractorOption = Annotated[
    str, typer.Option(help="lab: from worked steps, no model; or an OpenAI-compatible server, http://HOST:PORT/v1.")
]
Model = Annotated[str, typer.Option(help="The model's name at the server.")]
KeyEnv = Annotated[str, typer.Option("--api-key-env", help="Environment variable with the server's key.")]


def build(
    rollouts: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="JSONL: {problem|prompt, response|prediction, answer|gold, passed?, id?} a line; rows without "
            "`passed` are judged as --verifier says. Or SkillRL's memories, a .json file.",
        ),
    ],
    to: To,
    extractor: ExtractorOption = "lab",
    model: Model = "",
    api_key_env: KeyEnv = "",
    verifier: Annotated[str, typer.Option(help="math, exact or numeric.")] = "math",
) -> bool:
    """Learn skills and common mistakes from verified rollouts.

    Each rollout gives at most 3 candidates of either; those that say the same are merged, and so are those that a bank
    at --to has already. What an entry was learned from stays with it: rollout ids, and whether they passed.

    Example: tutorloop bank build rollouts.jsonl --to my-bank
    """
    from ..verifier_service.skills import build as growing
    from ..verifier_service.skills.store import SkillBank

    extract, merger = _tools(extractor, model, api_key_env)
    memories, skipped = growing.read_memories(rollouts, lambda responses: judged(responses, verifier))
    if not memories:
        raise SkillError("a bank is built from judged rollouts", f"none in {rollouts}; skipped: {skipped}", "")
    found = extract(memories)
    if sum(found.errors.values()) == len(memories):
        raise SkillError("an extractor answers", f"{extractor}: {found.errors}", "check --extractor and --model")
    bank = SkillBank.open(to, create=True)
    since = bank.version
    known = bank.at(since).entries()
    grown = growing.build(memories, lambda memories: found, merger, known).entries
    if grown != known:
        bank.replace(grown, f"built from {rollouts.name}", since=since)
    passed = sum(memory.passed for memory in memories)
    say(f"{len(memories)} rollouts, {passed} of them right{because('not judged', skipped)}")
    failed = because("no candidates from", found.errors) + because("not merged", merger.errors if merger else {})
    say(f"{growth(known, grown)}{failed}")
    say(f"{to} is at version {bank.version}")
    return True


def show(
    bank: Bank,
    version: Annotated[int, typer.Option(min=0, help="An older version (0: the latest).")] = 0,
    changes: Annotated[
        tuple[int, int] | None, typer.Option(metavar="OLD NEW", help="What changed between two versions.")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only one kind of entry.")] = None,
    as_json: AsJson = False,
) -> bool:
    """Show a bank's entries and versions, or what changed between two versions. --json has every text in full.

    Examples: tutorloop bank show my-bank --kind mistake; tutorloop bank show my-bank --changes 3 7
    """
    from rich.console import Console

    from ..verifier_service.skills.store import SkillBank

    opened = SkillBank.open(bank)
    if changes:
        found = opened.changes(*changes)
        if as_json:
            typer.echo(json.dumps(change_object(found)))
        else:
            Console().print(change_table(found, *changes))
        return True
    view = opened.at(version) if version else opened
    entries = view.entries(kind or "")
    if as_json:
        versions = [{**asdict(v), "time": v.time.isoformat()} for v in view.versions()]
        listed = [asdict(entry) for entry in entries]
        typer.echo(json.dumps({"bank": bank, "version": view.version, "versions": versions, "entries": listed}))
    else:
        for part in (version_table(view), *entry_tables(entries)):
            Console().print(part)
    return True


def search(
    bank: Bank,
    problem: Annotated[str, typer.Argument(help="The text of a problem.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Skills and mistakes that are found.")] = 8,
    version: Annotated[int, typer.Option(min=0, help="An older version (0: the latest).")] = 0,
    embedder: Annotated[str, typer.Option(help="lexical, or a sentence-transformers model.")] = "lexical",
    as_json: AsJson = False,
) -> bool:
    """Find what teachers would be shown for a problem: skills and mistakes, paired by rank, with their weights.

    Example: tutorloop bank search my-bank "Compute 37 + 58 - 29." -k 4
    """
    from rich.console import Console

    from ..verifier_service.skills.retrieval import Retriever
    from ..verifier_service.skills.store import SkillBank

    opened = SkillBank.open(bank)
    retriever = Retriever((opened.at(version) if version else opened).entries(), embedder)
    (pairs,) = retriever.pairs([problem], k)
    found = {kind: retriever.search(problem, len(pairs.weights), kind) for kind in ("skill", "mistake")}
    rows = [
        {"weight": float(weight), **{kind: hit_object(*hit) for kind, hit in zip(found, hits, strict=True)}}
        for weight, *hits in zip(pairs.weights, *found.values(), strict=True)
    ]
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        Console().print(hit_table(rows))
    return True


def merge(
    banks: Annotated[list[str], typer.Argument(help="Banks; one alone is rid of its own near-duplicates.")],
    to: To,
    extractor: Annotated[str, typer.Option("--model-url", help="A server whose model merges more.")] = "",
    model: Model = "",
    api_key_env: KeyEnv = "",
) -> bool:
    """Merge banks into one: entries that say the same become one, with the evidence and the counts of all.

    A bank at --to is merged with them. Two copies of one bank share a past, which is then counted twice.

    Example: tutorloop bank merge first-bank second-bank --to both
    """
    from ..verifier_service.skills import build as growing
    from ..verifier_service.skills import merge as merging
    from ..verifier_service.skills.store import SkillBank

    merger = _tools(extractor, model, api_key_env)[1] if extractor else None
    places = {_place(bank): bank for bank in banks}
    places.pop(_place(to), None)
    sources = {bank: SkillBank.open(bank).entries() for bank in places.values()}
    target = SkillBank.open(to, create=bool(sources))
    since = target.version
    together = growing.unique_ids([before := target.at(since).entries(), *sources.values()])
    merged = {entry.entry_id: entry for entry in merging.merge(together, merger)}
    ordered = [merged[entry.entry_id] for entry in together if entry.entry_id in merged]
    if ordered != before:
        target.replace(ordered, " ".join(["merged", *(f"with {Path(source).name}" for source in sources)]), since=since)
    say(f"{counted(together)} -> {counted(ordered)}{because('not merged', merger.errors if merger else {})}")
    say(f"{to} is at version {target.version}")
    return True


def export(
    bank: Bank,
    file: Annotated[Path, typer.Argument(help="A JSON file.")],
    version: Annotated[int, typer.Option(min=0, help="An older version (0: the latest).")] = 0,
) -> bool:
    """Write a bank in SGSD's published JSON layout, without evidence and counts, for which it has no place.

    Example: tutorloop bank export my-bank bank.json
    """
    from ..verifier_service.skills.published import save_published
    from ..verifier_service.skills.store import SkillBank

    opened = SkillBank.open(bank)
    view = opened.at(version) if version else opened
    entries = view.entries()
    save_published(entries, str(file), view.metadata)
    say(f"{counted(entries)} of version {view.version} in {file}")
    return True


def import_(
    file: Annotated[str, typer.Argument(help=f"A published JSON file, or {LAB}.")],
    bank: Annotated[str, typer.Argument(help="The bank that is written; made where there is none.")],
) -> bool:
    """Add the entries of a published JSON file (SGSD's layout, and SkillRL's) to a bank.

    Ids must be new in the bank: `merge` is for banks that name alike. A new bank takes over the file's metadata too,
    and gives them back when it is exported.

    Example: tutorloop bank import claude_style_skills.json my-bank
    """
    from .. import lab
    from ..verifier_service.skills.published import load_metadata, load_published
    from ..verifier_service.skills.store import SkillBank, bank_exists, create_bank

    path = str(lab.bank_path()) if file == LAB else file
    entries, metadata = load_published(path), load_metadata(path)
    note = f"imported from {Path(path).name}"
    if bank_exists(bank):
        opened = SkillBank.open(bank)
        opened.add(entries, note)
    else:
        opened = create_bank(bank, entries, note, metadata)
    say(f"{counted(entries)} added; {bank} is at version {opened.version}")
    return True


app = typer.Typer(no_args_is_help=True, help="Skill banks: build, show, search, merge, export, import.")
for name, command in {
    "build": build,
    "show": show,
    "search": search,
    "merge": merge,
    "export": export,
    "import": import_,
}.items():
    app.command(name)(ends_clearly(command))


# ---- what the commands need --------------------------------------------------------------------------------------


def _tools(extractor: str, model: str, api_key_env: str) -> "tuple[Extractor, LlmMerger | None]":
    """The extractor and the merger, which are the lab's or one model's. Raises ConfigError."""
    from ..verifier_service.skills.chat import ChatModel
    from ..verifier_service.skills.extract import LabExtractor, LlmExtractor
    from ..verifier_service.skills.merge import LlmMerger

    if extractor == "lab":
        return LabExtractor(), None
    key = os.environ.get(api_key_env, "")
    if api_key_env and not key:
        rule = "--api-key-env names an environment variable that holds the server's key"
        raise ConfigError(rule, f"{api_key_env} is not set", f"export {api_key_env}=…")
    chat = ChatModel(extractor, model, key)
    return LlmExtractor(chat), LlmMerger(chat)


def judged(responses: Sequence[Any], kind: str) -> list[Any]:
    """Judgements of the verifier of that kind, in processes that can be killed. Raises ConfigError."""
    from ..contracts.verifier_config import Verifier
    from ..verifier_service.pool import VerifierPool
    from ..verifier_service.verifiers import make_verifier

    if kind not in ("math", "exact", "numeric"):
        raise ConfigError("--verifier is math, exact or numeric", kind, "give others' verdicts as `passed`")
    config = Verifier(kind=kind, answers="any")
    pool = VerifierPool(make_verifier(config), timeout_seconds=config.timeout_seconds, memory_gib=config.memory_gib)
    try:
        return [outcome.judgement for outcome in pool.judge(responses)]
    finally:
        pool.close()


def _place(bank: str) -> str:
    """One spelling of a bank's path."""
    return bank if "://" in bank else os.path.realpath(bank)
