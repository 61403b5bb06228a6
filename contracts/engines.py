"""The engines by name and what each can do, said once and asked everywhere else. Imports neither torch nor Ray.

A new engine is one file in its room and one line here, which names its class and what that can do: the class is
imported where it runs, and a recipe is checked without it. An engine of one's own states `capabilities` in its class
(docs/engines.md).
"""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

from .errors import ConfigError
from .own_code import load_module

SIGNALS = ("sampled", "topk", "given", "hidden")  # what a teacher may be asked; docs/engines.md says what each is
FAKE = "fake"  # without a model, for tests of what stands around one: no recipe can name it


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCapabilities:
    """What a rollout engine can do beyond the methods of `contracts.protocols.RolloutEngine`."""

    concurrent_calls: int = 1  # of `generate` that one replica works on side by side, from as many threads
    weights_while_generating: bool = False  # `load_weights` may come meanwhile: it is given `in_flight`, `max_running`
    split: bool = False  # runs a model over several GPUs: it is given `tensor_parallel` and `gpu_share`
    broadcast: bool = False  # takes weights from a process group: it is a `contracts.protocols.BroadcastEngine`

    def __post_init__(self) -> None:
        if self.concurrent_calls < 1:
            raise ConfigError("an engine works on one call or more", f"concurrent_calls={self.concurrent_calls}")
        if self.concurrent_calls > 1 and not self.weights_while_generating:
            rule = "an engine that works on several calls takes new weights while it generates"
            found = f"concurrent_calls={self.concurrent_calls}, weights_while_generating=False"
            raise ConfigError(rule, found, "set weights_while_generating=True, or leave concurrent_calls at 1")

    @property
    def methods(self) -> tuple[str, ...]:
        """What its class must have."""
        own = ("join_broadcast", "receive_weights") if self.broadcast else ()
        return ("generate", "decode", "load_weights", *own)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCapabilities:
    """What a teacher engine can do beyond the method of `contracts.protocols.TeacherEngine`."""

    signals: frozenset[str]  # of SIGNALS
    entropy: bool = False  # with topk and given: the entropy over the whole vocabulary
    takes_weights: bool = False  # has `load_weights` as rollout engines do, so that it can follow the student
    averages: bool = False  # and holds `weights` (models.lora.ReplicaWeights) in its process, which can be averaged
    split: bool = False  # runs a model over several GPUs: it is given `tensor_parallel` and `gpu_share`
    remote: bool = False  # asks servers and has no model here: it is given `urls` and what its `probe` returned
    hidden_apart: bool = False  # starts for hidden states or for all else: it is given `hidden`
    extra_tokens: int = 0  # of the model's context that it needs beside a rollout

    def __post_init__(self) -> None:
        if not self.signals or not set(self.signals) <= set(SIGNALS):
            raise ConfigError(f"a teacher engine's signals are some of {', '.join(SIGNALS)}", repr(self.signals))

    @property
    def methods(self) -> tuple[str, ...]:
        """What its class must have."""
        return ("score", *(["load_weights"] if self.takes_weights else []), *(["probe"] if self.remote else []))


Capabilities = TypeVar("Capabilities", RolloutCapabilities, TeacherCapabilities)


@dataclass(frozen=True, slots=True)
class Engines(Generic[Capabilities]):
    """What the recipe's `key` may name: one of `known`, by where its class is and what it can do, or one's own."""

    key: str
    kind: type[Capabilities]
    known: dict[str, tuple[str, Capabilities]]

    @property
    def names(self) -> list[str]:
        """Those that a recipe may name, beside one's own."""
        return [name for name in self.known if name != FAKE]

    @property
    def choices(self) -> str:
        """What a recipe may name, in words."""
        return f"{', '.join(self.names)}, MODULE:CLASS or FILE.py:CLASS"

    def that(self, ability: str, has: bool = True) -> str:
        """Those of `names` that have an ability, or have it not, in words."""
        return " or ".join(name for name in self.names if getattr(self.known[name][1], ability) == has)

    def fault(self, engine: str) -> str:
        """Why a recipe cannot name `engine`, as far as its name says; "" where it can."""
        if engine in self.names or ":" in engine:
            return ""
        return f"{self.key} is {self.choices} (found {engine!r})"

    def capabilities(self, engine: str) -> Capabilities:
        """What `engine` can do; of one's own, its class is loaded for it. Raises ConfigError."""
        known = self.known.get(engine)
        return known[1] if known else self._own(engine).capabilities

    def class_of(self, engine: str) -> Any:
        """Raises ConfigError where there is none, or where one's own is no engine."""
        if engine not in self.known:
            return self._own(engine)
        module, _, name = self.known[engine][0].partition(":")
        return getattr(importlib.import_module(module), name)

    def to_send(self, engine: str) -> Any:
        """What a worker is given: the name, or the class of one's own, whose file other nodes do not have."""
        return engine if engine in self.known else self._own(engine)

    def own_module(self, engine: str) -> ModuleType | None:
        """The module of an engine of one's own, to be sent by value; None for one of ours. Raises ConfigError."""
        return None if engine in self.known else self._module(engine)

    def check_model(self, engine: str, model: str, parts: int) -> None:
        """Have the engine refuse a model in so many parts before anything starts, if it can tell. Raises ModelError."""
        check = getattr(self.class_of(engine), "check_model", None)
        if check:
            check(model, parts)

    def _module(self, engine: str) -> ModuleType:
        place, _, name = engine.rpartition(":")
        if not place or not name:
            known = f"known: {', '.join(sorted(self.known))}"
            raise ConfigError(f"{self.key} is a known engine, MODULE:CLASS or FILE.py:CLASS", engine, known)
        return load_module(place, f"{self.key} of one's own is MODULE:CLASS or FILE.py:CLASS", "")

    def _own(self, engine: str) -> Any:
        module, name = self._module(engine), engine.rpartition(":")[2]
        found = getattr(module, name, None)
        if not isinstance(found, type):
            what = "not there" if found is None else f"a {type(found).__name__}"
            raise ConfigError("an engine of one's own is a class", f"{engine} is {what}", "check its name")
        stated = getattr(found, "capabilities", None)
        if not isinstance(stated, self.kind):
            rule = f"an engine for {self.key} states what it can do: capabilities = {self.kind.__name__}(…)"
            what = "states none" if stated is None else f"states a {type(stated).__name__}"
            raise ConfigError(rule, f"{engine} {what}", "docs/engines.md has an example")
        if lacking := [method for method in stated.methods if not callable(getattr(found, method, None))]:
            rule = f"an engine for {self.key} with these capabilities has {', '.join(stated.methods)}"
            raise ConfigError(rule, f"{engine} lacks {', '.join(lacking)}", "contracts/protocols.py describes them")
        return found


ROLLOUT_ENGINES = Engines(
    "rollout.engine",
    RolloutCapabilities,
    {
        "transformers": ("tutorloop.actors.transformers_engine:TransformersEngine", RolloutCapabilities()),
        "vllm": (
            "tutorloop.actors.vllm_engine:VllmEngine",
            RolloutCapabilities(concurrent_calls=4, weights_while_generating=True, split=True, broadcast=True),
        ),
        FAKE: ("tutorloop.actors.fake_engine:FakeEngine", RolloutCapabilities()),
    },
)

TEACHER_ENGINES = Engines(
    "teacher.engine",
    TeacherCapabilities,
    {
        "transformers": (
            "tutorloop.teacher_service.transformers_engine:TransformersTeacher",
            TeacherCapabilities(signals=frozenset(SIGNALS), entropy=True, takes_weights=True, averages=True),
        ),
        "vllm": (
            "tutorloop.teacher_service.vllm_engine:VllmTeacher",
            TeacherCapabilities(
                signals=frozenset(SIGNALS), takes_weights=True, split=True, hidden_apart=True, extra_tokens=1
            ),
        ),
        "http": (
            "tutorloop.teacher_service.http_engine:HttpTeacher",
            TeacherCapabilities(signals=frozenset({"sampled", "topk", "given"}), remote=True),
        ),
        FAKE: (
            "tutorloop.teacher_service.fake_engine:FakeTeacher",
            TeacherCapabilities(signals=frozenset(SIGNALS), entropy=True),
        ),
    },
)
