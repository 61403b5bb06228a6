"""Methods are compositions: who generates, what the teachers return, which loss terms the learner sums.

A new method is one file with a function `compose(config) -> Composition`, and one line in METHODS; or a file or module
of one's own that `method` names (docs/methods.md). Imports neither torch nor Ray, so a wrong option costs a second.
"""

import difflib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ...contracts.config import Config
from ...contracts.engines import ROLLOUT_ENGINES, TEACHER_ENGINES
from ...contracts.errors import ConfigError, TutorloopError
from ...contracts.own_code import is_file, load_module, users_fault
from . import (
    constant_advantage,
    dapo,
    dr_grpo,
    eopd,
    g_opd,
    gkd,
    grpo,
    kd,
    kdrl,
    opd,
    opsd,
    raft,
    raft_pp,
    reinforce_pp,
    reinforce_rej,
    rest,
    rft,
    rloo,
    sdft,
    sdpo,
    seqkd,
    sft,
    sg_opd,
    sgpo,
    sgpo_guided,
    sgsd,
    star,
)
from .parts.checks import check_engines, check_needs, check_used
from .parts.composition import Composition, with_replay

METHODS: dict[str, Callable[[Config], Composition]] = {
    "sft": sft.compose,
    "seqkd": seqkd.compose,
    "kd": kd.compose,
    "gkd": gkd.compose,
    "opd": opd.compose,
    "eopd": eopd.compose,
    "g_opd": g_opd.compose,
    "exopd": g_opd.compose,
    "constant_advantage": constant_advantage.compose,
    "sg_opd": sg_opd.compose,
    "opsd": opsd.compose,
    "sgsd": sgsd.compose,
    "sgpo": sgpo.compose,
    "sgpo_guided": sgpo_guided.compose,
    "sdft": sdft.compose,
    "sdpo": sdpo.compose,
    "kdrl": kdrl.compose,
    "grpo": grpo.compose,
    "dr_grpo": dr_grpo.compose,
    "dapo": dapo.compose,
    "rloo": rloo.compose,
    "reinforce_pp": reinforce_pp.compose,
    "raft": raft.compose,
    "raft_pp": raft_pp.compose,
    "reinforce_rej": reinforce_rej.compose,
    "rft": rft.compose,
    "rest": rest.compose,
    "star": star.compose,
}


def compose(config: Config) -> Composition:
    """The composition that the `config` of one stage names, with all that it needs. Raises ConfigError."""
    module = own_module(config.method)
    if module is None and config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known methods: {', '.join(sorted(METHODS))}"
        raise ConfigError("method names a known method, a FILE.py or a MODULE", f"method: {config.method}", hint)
    composition = _own_composition(config, module) if module else METHODS[config.method](config)
    if not isinstance(composition, Composition):
        raise ConfigError("compose(config) returns a Composition", f"{type(composition).__name__} from {config.method}")
    check_needs(config, composition)
    return with_replay(config, composition)


def _own_composition(config: Config, module: ModuleType) -> Composition:
    try:
        return module.compose(config)
    except TutorloopError:
        raise
    except Exception as error:  # whatever a user's code raises is the user's to mend
        raise users_fault(config.method, error, str(Path(config.method).parent)) from error


def compose_stages(config: Config) -> list[Composition]:
    """One composition for each stage of the run, in which all that the recipe gives is used. Raises ConfigError."""
    check_engines(config)
    compositions = [compose(config.of_stage(stage)) for stage in config.plan]
    check_used(config, compositions)
    return compositions


def own_module(method: str) -> ModuleType | None:
    """The user's module that `method` names: `path/to/file.py`, or a dotted and importable name; None for one of ours.

    To send its functions to other processes, register what `package_of` gives by value with cloudpickle. Raises
    ConfigError where it is absent, raises something itself, or has no `compose`.
    """
    if not is_file(method) and "." not in method:
        return None
    rule = "a method of one's own is a Python file that exists, or a module that can be imported"
    module = load_module(method, rule, "method: ")
    if not callable(getattr(module, "compose", None)):
        rule = "a method of one's own defines compose(config) -> Composition"
        raise ConfigError(rule, f"method: {method}", "docs/methods.md has an example")
    return module


def own_modules(config: Config) -> list[ModuleType]:
    """The modules of the run's methods and engines that are one's own, to be sent by value. Raises ConfigError."""
    modules = [own_module(stage.method) for stage in config.plan]
    modules.append(ROLLOUT_ENGINES.own_module(config.rollout.engine))
    modules += [TEACHER_ENGINES.own_module(teacher.engine) for teacher in config.named_teachers.values()]
    return [module for module in modules if module]
