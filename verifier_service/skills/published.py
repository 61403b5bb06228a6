"""The JSON layout in which SGSD and SkillRL publish their banks: `general_skills`, `task_specific_skills` (SkillRL's
search bank says `query_type_skills`) by group, `common_mistakes`, `metadata`.

A file that was loaded and saved again is equal: other keys of an entry travel in `BankEntry.extra`. An entry's evidence
and counts have no place in this layout and stay in the bank.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...contracts.errors import SkillError
from ...contracts.json_files import read_json
from ...contracts.skills import BankEntry

KEYS = {
    "skill": ("skill_id", "title", "principle", "when_to_apply"),
    "mistake": ("mistake_id", "description", "why_it_happens", "how_to_avoid"),
}
GENERAL, MISTAKES, METADATA = "general_skills", "common_mistakes", "metadata"
PLACES = {"skill": GENERAL, "mistake": MISTAKES}
GROUPS = ("task_specific_skills", "query_type_skills")  # a bank's groups are under the first, where nothing says more
GROUPS_KEY = "__groups__"  # in `extra`: the other one
LAYOUT = f"a published bank is an object of {GENERAL}, {GROUPS[0]} or {GROUPS[1]}, {MISTAKES} and {METADATA}"


def load_published(path: str) -> list[BankEntry]:
    """The entries of a published bank, in the file's order. Raises SkillError."""
    bank = _load(path)
    entries = [_entry(path, "skill", "", value, "") for value in _list(path, bank, GENERAL)]
    for key in GROUPS:
        if not isinstance(groups := bank.get(key, {}), dict):
            raise SkillError("groups are an object of lists", f"{path}: {key} is {_shown(groups)}", "")
        for group in groups:
            entries += [_entry(path, "skill", group, value, key) for value in _list(path, groups, group)]
    return entries + [_entry(path, "mistake", "", value, "") for value in _list(path, bank, MISTAKES)]


def load_metadata(path: str) -> dict[str, Any]:
    """What a published bank says of itself. Raises SkillError."""
    metadata = _load(path).get(METADATA, {})
    if not isinstance(metadata, dict):
        raise SkillError(f"{METADATA} is an object", f"{path}: {_shown(metadata)}", "")
    return metadata


def save_published(entries: Sequence[BankEntry], path: str, metadata: Mapping[str, Any]) -> None:
    """Write a published bank: the whole file or, where it cannot be written, the old one. Raises SkillError."""
    bank: dict[str, Any] = {key: {} if key in GROUPS else [] for key in (GENERAL, *GROUPS, MISTAKES)}
    for entry in entries:
        extra = json.loads(entry.extra or "{}")
        values = bank[PLACES[entry.kind]]
        groups = bank[GROUPS[extra.pop(GROUPS_KEY, "") == GROUPS[1]]]
        if entry.group and entry.kind == "skill":
            values = groups.setdefault(entry.group, [])
        values.append(dict(zip(KEYS[entry.kind], (entry.entry_id, *entry.texts), strict=True)) | extra)
    if not bank[GROUPS[1]]:
        del bank[GROUPS[1]]
    elif not bank[GROUPS[0]]:
        del bank[GROUPS[0]]
    if metadata:
        bank[METADATA] = dict(metadata)
    text = json.dumps(bank, indent=2, ensure_ascii=False)
    part = Path(f"{path}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SkillError("a bank is exported to a file", f"{path}: {error.strerror}", "name a file") from error


def _load(path: str) -> dict[str, Any]:
    bank = read_json(Path(path), "a published bank is a JSON file", SkillError)
    if not isinstance(bank, dict) or not (bank.keys() & {GENERAL, MISTAKES, *GROUPS}):
        remedy = "SkillRL's memories, a list, are what a bank is built from" if isinstance(bank, list) else ""
        raise SkillError(LAYOUT, f"{path}: {_shown(bank)}", remedy)
    if others := bank.keys() - {GENERAL, MISTAKES, METADATA, *GROUPS}:
        raise SkillError(LAYOUT, f"{path}: also {_shown(sorted(others))}", f"move them into {METADATA}")
    return bank


def _list(path: str, values: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(listed := values.get(key, []), list):
        raise SkillError("the entries of a published bank are in lists", f"{path}: {key} is {_shown(listed)}", "")
    return listed


def _entry(path: str, kind: str, group: str, value: Any, groups_key: str) -> BankEntry:
    keys = KEYS[kind]
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in keys) or not value[keys[0]]:
        raise SkillError(f"a {kind} has {', '.join(keys)}, each a string", f"{path}: {_shown(value)}", "")
    extra = {key: other for key, other in value.items() if key not in keys}
    if groups_key not in ("", GROUPS[0]):
        extra[GROUPS_KEY] = groups_key
    texts = (value[keys[1]], value[keys[2]], value[keys[3]])
    dumped = json.dumps(extra, ensure_ascii=False) if extra else ""
    return BankEntry(entry_id=value[keys[0]], kind=kind, group=group, texts=texts, extra=dumped)


def _shown(value: Any) -> str:
    """Escaped and cut short: the file is someone's."""
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:120] + "…"
