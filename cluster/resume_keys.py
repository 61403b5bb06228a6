"""What a run that goes on may have changed in its configuration, key by key.

Four kinds. *free*: where it runs, how long, and what is written about it. *last bits*: the same sums in another order,
told in a note. *result*: it trains otherwise from here on, so each such key is named with `--allow-change`; what was
changed, and at which step, stands in the run's folder. *never*: what the checkpoint holds, or what the place of a run
is counted in. The table is all there is: a key that no rule names is refused, and a test finds it first.
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from ..contracts.config import Config
from ..contracts.errors import ConfigError, RunFolderError
from ..contracts.recipe_text import members
from ..contracts.sections import Section

FREE, BITS, RESULT, NEVER = "free", "last bits", "result", "never"
CHANGES = "changes.jsonl"
GIVEN = "given"  # the value of a section, whose keys have their own


@dataclass(frozen=True, slots=True)
class Rule:
    """Keys of one kind for one reason. A pattern's `*` is any part of a key, or several."""

    kind: str
    why: str
    keys: tuple[str, ...]

    def covers(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key that is another than before."""

    key: str
    kind: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} before, {self.now!r} now"


# The first rule that covers a key is the key's. For each: teacher's are also those of teachers.NAME.
TABLE = (
    Rule(NEVER, "the checkpoint holds weights and optimizer of this model", ("student.model", "student.lora*")),
    Rule(
        NEVER,
        "the place of a run is a position in this data under this seed: with another, prompts would be trained twice "
        "or never, and what was trained could not be told",
        ("seed", "prompts_per_step", "data*", "replay", "replay.path", "replay.name", "replay.split", "replay.*_field"),
    ),
    Rule(NEVER, "the checkpoint holds the average of such a teacher, and of no other", ("*.follows",)),
    Rule(NEVER, "the run has its own copy of the bank, of which checkpoints hold the version", ("skills",)),
    Rule(
        FREE,
        "how long it runs; under learner.decay it alters the result, for the rate decays over all steps",
        ("steps", "stages.*.steps"),
    ),
    Rule(
        BITS,
        "it changes the order in which sums are taken: the last bits of a figure, and, where they decide, a sample",
        (
            *("rollout.replicas", "rollout.batch_size", "*.tokens_per_batch", "*.tensor_parallel", "*.shared"),
            *("learner.ranks", "learner.zero_stage", "learner.num_gpus", "rollout.num_gpus", "teacher*.num_gpus"),
            "reference.num_gpus",
        ),
    ),
    Rule(
        FREE,
        "where it runs, on how much, and for how long it waits",
        (
            *("output_dir", "*.replicas", "*.num_cpus", "*.num_gpus", "*.min_replicas", "*.max_replicas"),
            *("*.deadline_seconds", "*.max_attempts", "*.max_restarts_per_minute", "*.urls", "*.requests_per_url"),
            *("*.api_key_env", "teacher*.timeout_seconds", "rollout.transfer", "autoscale.*"),
        ),
    ),
    Rule(
        FREE,
        "what is measured, kept and told, and what is done about trouble",
        ("record", "eval.*", "checkpoint.*", "metrics.*", "guards.*", "notify.*", "*.cache_gib"),
    ),
    Rule(
        RESULT,
        "it decides what is trained, and how it is read",
        ("method", "method_options.*", "stages*", "templates.*", "thinking", "max_staleness", "off_policy.*"),
    ),
    Rule(
        RESULT,
        "it decides the updates",
        (
            *("learner.dtype", "learner.learning_rate", "learner.min_learning_rate", "learner.warmup_steps"),
            *("learner.decay", "learner.max_grad_norm", "learner.updates_per_step", "learner.betas"),
            "learner.weight_decay",
        ),
    ),
    Rule(
        RESULT,
        "it decides what is sampled",
        (
            *("rollout.engine", "rollout.in_flight", "rollout.samples_per_prompt", "rollout.max_new_tokens"),
            "rollout.temperature",
        ),
    ),
    Rule(
        RESULT,
        "it decides who teaches, and what",
        (
            *("teacher", "teachers.*", "teacher.model", "teacher.engine", "teacher.signal", "teacher.dtype"),
            *("teacher.ema_decay", "teacher.weight", "reference", "reference.model", "reference.dtype"),
        ),
    ),
    Rule(
        RESULT,
        "it decides what passes",
        (
            *("verifier.kind", "verifier.answers", "verifier.marker", "verifier.tolerance", "verifier.pass_score"),
            *("verifier.timeout_seconds", "verifier.memory_gib", "verifier.response_fault", "verifier.weight"),
            "verifier.rewards*",
        ),
    ),
    Rule(RESULT, "it decides what strategies are and are worth", ("strategies", "strategies.path")),
    Rule(RESULT, "it decides how strongly given answers are imitated", ("replay.rows_per_step", "replay.weight")),
    Rule(
        RESULT,
        "it decides which skills are shown",
        (
            *("skills.path", "skills.embedder", "skills.update_every", "skills.update_below", "skills.most_new"),
            *("skills.capacity", "skills.extractor", "skills.extractor_model"),
        ),
    ),
)
STAGE_DONE = Rule(NEVER, "this stage is done: the next one began from its model", ())
DECAYS = Rule(RESULT, "the rate decays over all steps", ())
UNKNOWN = Rule(RESULT, "no rule names it", ())


@cache
def rule_of(key: str) -> Rule:
    """The rule of a key, or of a section that may be left out. Of a named teacher's it is that of `teacher`'s."""
    parts = key.split(".")
    if parts[0] == "teachers" and len(parts) > 2:
        key = ".".join(["teacher", *parts[2:]])
    return next((rule for rule in TABLE if rule.covers(key)), UNKNOWN)


def settings_of(config: Config) -> str:
    """A digest of the keys that alter the result, as a stage has them: shards that others made are not gone on with."""
    deciding = {key: value for key, value in _values(config.model_dump(mode="json")) if rule_of(key).kind == RESULT}
    return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=8).hexdigest()


# ---- two configurations ----------------------------------------------------------------------------------------------


def changes(
    new: Config, old: Config, *, places: Collection[str] = (), stages_done: int = 0, allow: Collection[str] = ()
) -> list[Change]:
    """What is another in `new` than in `old`, by key. `places`: keys whose content is compared otherwise.

    Raises RunFolderError where that cannot be, or is not in `allow`.
    """
    found, refused = [], []
    for key, before, now in _differing(dict(_values(new)), dict(_values(old))):
        if key in places:
            continue
        rule = _rule_in(new, key, stages_done)
        found.append(Change(key=key, kind=rule.kind, before=before, now=now))
        if rule.kind == NEVER or (rule.kind == RESULT and not _covered(key, allow)):
            refused.append((rule, found[-1]))
    if refused:
        raise _refusal(refused)
    return found


def content_changes(differing: Mapping[str, tuple[str, str]], allow: Collection[str]) -> list[Change]:
    """Of what the run reads and what is another than it was (identity.py: differing), that which may be."""
    return [
        Change(key=name, kind=RESULT, before=before, now=now)
        for name, (before, now) in differing.items()
        if rule_of(name).kind == RESULT and _covered(name, allow)
    ]


def _rule_in(config: Config, key: str, stages_done: int) -> Rule:
    parts = key.split(".")
    if parts[0] == "stages" and int(parts[1]) < stages_done:
        return STAGE_DONE
    if parts[-1] == "steps" and config.learner.decay != "constant":
        return DECAYS
    return rule_of(key)


def _refusal(refused: Sequence[tuple[Rule, Change]]) -> RunFolderError:
    """Of what can never be changed where there is such, else of what wants to be named."""
    if never := [(rule, change) for rule, change in refused if rule.kind == NEVER]:
        told = "\n         ".join(f"{change} ({rule.why})" for rule, change in never)
        remedy = "restore it, or start a new run in another output_dir"
        return RunFolderError("a resumed run keeps what its checkpoints are made of", told, remedy)
    told = "\n         ".join(f"{change}" for _, change in refused)
    flags = " ".join(f"--allow-change {change.key}" for _, change in refused)
    remedy = f"restore it, or say that it may be so: {flags}"
    return RunFolderError("a resumed run keeps what decides its result", told, remedy)


def _values(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its dotted key, and GIVEN for every section that holds some."""
    if isinstance(value, Section):
        if place:
            yield place, GIVEN
        inner: Mapping[Any, Any] = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, dict):
        inner = value
    elif isinstance(value, tuple) and any(isinstance(part, Section) for part in value):
        inner = dict(enumerate(value))
    else:
        yield place, value
        return
    for name, part in inner.items():
        yield from _values(part, f"{place}.{name}" if place else f"{name}")


def _differing(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, before, now). Of a section that came or went its name, and its keys that a checkpoint has to hold."""
    differing = [key for key in sorted(new.keys() | old.keys()) if new.get(key) != old.get(key)]
    whole = [key for key in differing if GIVEN in (new.get(key), old.get(key))]
    for key in differing:
        inside = any(key.startswith(f"{section}.") for section in whole)
        none = any(section.startswith(f"{key}.") for section in whole)  # an empty list, which has some now
        if not none and (not inside or (rule_of(key).kind == NEVER and new.get(key))):
            yield key, old.get(key), new.get(key)


# ---- --allow-change --------------------------------------------------------------------------------------------------


def _covered(key: str, allow: Collection[str]) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow)


def check_known(allow: Iterable[str]) -> None:
    """Raises ConfigError where one is neither a key nor a section."""
    known = list(known_keys())
    for key in allow:
        if key and any(_leads_to(key.split("."), pattern.split(".")) for pattern in known):
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists every key"
        raise ConfigError("--allow-change names a key or a section of the configuration", repr(key), hint)


def _leads_to(key: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether `key` is the pattern's or that of a section above it."""
    if len(key) > len(pattern) and pattern[-1] != "**":
        return False
    return all(wanted in (part, "*", "**") for part, wanted in zip(key, pattern, strict=False))


def check_used(allow: Iterable[str], changed: Collection[str], folder: Path) -> None:
    """Raises ConfigError where one names nothing that differs, now or when the run went on before: a job that is tried
    again says the same."""
    earlier = [change["key"] for change in written(folder)]
    for key in allow:
        if not any(_covered(one, [key]) for one in (*changed, *earlier)):
            found = f"{key} is as it was, and always has been"
            raise ConfigError("--allow-change names what differs from the run in output_dir", found, "leave it out")


def known_keys(kind: Any = Config, place: str = "") -> Iterator[str]:
    """Every key of the configuration, and every section that may be left out. `*`: a name of the user's, or a number;
    `**`: whatever a method, a template or a guard is given."""
    for part in members(kind):
        origin, arguments = get_origin(part), get_args(part)
        if _is_section(part):
            for name, field in part.model_fields.items():
                inner = f"{place}.{name}" if place else name
                if not _is_section(field.annotation) and get_origin(field.annotation) is not dict:
                    yield inner
                yield from known_keys(field.annotation, inner)
        elif origin is dict and not _is_section(arguments[1]):
            yield f"{place}.**"
        elif origin is dict or (origin is tuple and _is_section(arguments[0])):
            yield f"{place}.*"
            yield from known_keys(arguments[1 if origin is dict else 0], f"{place}.*")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


# ---- what was changed, in the run's folder ---------------------------------------------------------------------------


def notes(changed: Iterable[Change]) -> Iterator[str]:
    """What to tell of the changes that are not free."""
    for change in changed:
        if change.kind == BITS:
            yield f"{change}: the same run but for the last bits of its figures"
        elif change.kind == RESULT:
            yield f"{change}: another result from here on, as --allow-change says"


def write_down(folder: Path, changed: Iterable[Change], step: int) -> None:
    """Add the changes that are not free to the run's, as made after `step`. Raises OSError."""
    lines = [
        {"step": step, "key": change.key, "kind": change.kind, "before": change.before, "now": change.now}
        for change in changed
        if change.kind != FREE
    ]
    if lines:
        with (folder / CHANGES).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def written(folder: Path) -> list[dict[str, Any]]:
    """The changes of a run, oldest first. Raises RunFolderError."""
    path = folder / CHANGES
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except (OSError, ValueError) as error:
        raise RunFolderError(f"a run's {CHANGES} is as it was written", f"{path}: {error}", "restore it") from error
