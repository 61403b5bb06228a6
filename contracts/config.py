"""The run's configuration: one YAML file and dotted overrides, validated once, before any actor starts.

Imports neither torch nor Ray, so a wrong key costs a second. Unknown keys name the nearest known one.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import ConfigError


class Section(BaseModel):
    """Base of every section: frozen, and no key that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pool(Section):
    """A group of equal replicas and what each takes from the cluster. Whole CPUs are torch threads (at least one)."""

    replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.25, ge=0)
    num_gpus: float = Field(default=0, ge=0)


class Student(Section):
    """The model to train: a local folder, a hub id, or `lab:student`."""

    model: str


class Teacher(Pool):
    """A teacher pool. `signal` is what it returns for each token of a rollout."""

    model: str
    engine: Literal["transformers"] = "transformers"
    signal: Literal["sampled", "topk", "exact"] = "exact"
    dtype: Literal["fp32", "bf16"] = "fp32"
    tokens_per_batch: int = Field(default=8192, ge=1, description="most tokens in one forward pass")


class Rollout(Pool):
    """The rollout pool and how it samples."""

    engine: Literal["transformers"] = "transformers"
    samples_per_prompt: int = Field(default=4, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    batch_size: int = Field(default=64, ge=1, description="rollouts in one call of generate")


class Verifier(Pool):
    """The verifier pool. `timeout_seconds` is each sample's budget; what exceeds it is killed and abstains."""

    num_cpus: float = Field(default=0.125, ge=0)
    kind: Literal["math", "exact"] = "math"
    timeout_seconds: float = Field(default=5.0, gt=0)


class Learner(Section):
    """The DeepSpeed ZeRO learner: one rank per replica of nothing else."""

    ranks: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.25, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    min_learning_rate: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(default=1.0, gt=0)
    tokens_per_batch: int = Field(default=4096, ge=1, description="most tokens in one packed micro-batch of one rank")


class Data(Section):
    """Problems: JSONL or Parquet file, `lab:train`, or a hub id (extra `hub`) with `name` its configuration."""

    path: str
    name: str = ""
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    prompt_suffix: str = ""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class Eval(Section):
    """Evaluation on held-out problems. `every` 0 evaluates before and after only; no `path`: no evaluation."""

    path: str = ""
    ood_path: str = ""
    split: str = "test"
    every: int = Field(default=0, ge=0, description="steps")
    samples: int = Field(default=1, ge=1, description="samples per problem, the k of avg@k")
    problems: int = Field(default=200, ge=1, description="first problems of the file")
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: int | None = Field(default=None, ge=1, description="default: the rollout's")


class Checkpoint(Section):
    """Every how many steps (0: only at the end or when interrupted), and how many to keep."""

    every: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)


class Metrics(Section):
    """The Prometheus endpoint; port 0 takes a free one. Loopback unless told otherwise."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)


class Config(Section):
    """A run. `teacher` is the one teacher; `teachers` names several, and rows of the data say which to ask."""

    method: str
    method_options: dict[str, Any] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)
    output_dir: str
    steps: int = Field(ge=1)
    prompts_per_step: int = Field(ge=1)
    max_staleness: int = Field(default=0, ge=0)
    student: Student
    teacher: Teacher | None = None
    teachers: dict[str, Teacher] = Field(default_factory=dict)
    data: Data
    rollout: Rollout = Rollout()
    verifier: Verifier = Verifier()
    learner: Learner = Learner()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    @model_validator(mode="after")
    def _one_way_to_name_teachers(self) -> "Config":
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("give either teacher.model or teachers.NAME.model")
        if self.learner.min_learning_rate > self.learner.learning_rate:
            raise ValueError("learner.min_learning_rate must not exceed learner.learning_rate")
        return self

    @property
    def named_teachers(self) -> dict[str, Teacher]:
        """All teachers by name; the single one is called `teacher`."""
        return {"teacher": self.teacher} if self.teacher else self.teachers


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `key.path=value` overrides (values are YAML). Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "a recipe must be a readable file", f"{path}: {error.strerror}", "give a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("a recipe must be YAML", f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError("a recipe is a mapping of keys", f"{path} holds {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a tree of plain values; all its faults come in one ConfigError."""
    try:
        return Config.model_validate(_given(tree))
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors()]
        raise ConfigError("the configuration has a fault in every line below", "\n  ".join(faults)) from None


def _given(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that hold nothing: `key:` and `key=` mean the default."""
    kept = {key: _given(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in kept.items() if value is not None}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError("an override reads key.path=value", override, "e.g. learner.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("an override's value must be YAML", override) from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        below = node.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ConfigError("an override's path leads through sections", f"{key}: {parent} is a value")
        node = below
    node[leaf] = value


def _explain(fault: Any) -> str:
    place = [str(part) for part in fault["loc"]]
    key = ".".join(place) or "recipe"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*place[:-1], near[0]])}?" if near else f"known keys: {', '.join(sorted(known))}"
        )
        return f"{key}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{key}: required, and not given"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message
    return f"{key}: {message} (found {fault['input']!r})"


def _known_keys(place: Sequence[str]) -> list[str]:
    """Keys of the section at `place`; below `teachers` every name holds a Teacher."""
    if not place:
        return list(Config.model_fields)
    return list(_SECTIONS.get(place[0], Teacher).model_fields)


_SECTIONS: dict[str, type[Section]] = {
    "student": Student,
    "teacher": Teacher,
    "data": Data,
    "rollout": Rollout,
    "verifier": Verifier,
    "learner": Learner,
    "eval": Eval,
    "checkpoint": Checkpoint,
    "metrics": Metrics,
}
