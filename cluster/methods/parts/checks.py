"""What a recipe must and must not hold for its compositions: one clear ConfigError each, before anything starts.

`check_needs` asks of one stage whether everything is there that its method uses. `check_used` asks of all stages
together whether everything that the recipe gives is used by one of them.
"""

from collections.abc import Sequence

from ....contracts.config import Config, OffPolicy, Teacher
from ....contracts.engines import ROLLOUT_ENGINES, TEACHER_ENGINES
from ....contracts.errors import ConfigError
from ....models.contexts import check_templates, fields_of
from .annotations import STRATEGIES
from .composition import Composition

OF_VERDICTS = {"peer", "peer_answer", "feedback"}  # fields that exist once a group is judged
OF_SKILLS = {"skill", "mistake", "title"}  # and where a bank is asked
SENT = {"sampled": "sampled", "topk": "topk", "hidden": "exact"}  # what teacher.signal calls it


def check_engines(config: Config) -> None:
    """The engines can do what the run asks of them; those of one's own are loaded here. Raises ConfigError."""
    for name, section in [("rollout", config.rollout), *config.named_teachers.items()]:
        if fault := section.beyond():
            found = f"{name}: engine {section.engine}, whose capabilities are {section.capabilities}"
            raise ConfigError(fault, found, "change that key, or what the engine's class states and can do")
    if config.teacher_rollout.tensor_parallel > 1 and not config.rollout.capabilities.split:
        rule = f"teacher_rollout.tensor_parallel is for rollout.engine={ROLLOUT_ENGINES.that('split')}"
        raise ConfigError(rule, f"rollout.engine: {config.rollout.engine}", "remove tensor_parallel")


def check_needs(config: Config, composition: Composition) -> None:
    """`config` is one stage's. Raises ConfigError for the first thing that is missing or does not fit."""
    method = config.method
    samples = config.rollout.samples_per_prompt
    generating = "teacher" in composition.generators
    if (composition.scoring or generating) and not config.named_teachers:
        raise ConfigError(f"{method} needs a teacher", "none is given", "give teacher.model, or teachers.NAME.model")
    if generating and len(config.named_teachers) > 1:
        found = ", ".join(config.named_teachers)
        raise ConfigError(f"{method} samples from its teacher, which is one", found, "give teacher.model alone")
    if composition.reference and not config.reference:
        rule = f"{method} with these options needs a reference model"
        raise ConfigError(rule, "none is given", "give reference.model, e.g. the student's before training")
    if composition.needs_verdicts and config.verifier.kind == "none":
        rule = f"{method} with these options reads the verifier's verdicts"
        raise ConfigError(rule, "verifier.kind: none", "give verifier.kind, e.g. math")
    if composition.min_samples > samples:
        rule = f"{method} compares the answers to a prompt, at least {composition.min_samples} of them"
        raise ConfigError(rule, f"rollout.samples_per_prompt: {samples}", "raise rollout.samples_per_prompt")
    _check_self_teachers(config, composition)
    _check_engines(config, composition)
    _check_contexts(config, composition)
    _check_skills(config, composition)
    if STRATEGIES in composition.services and not config.strategies:
        remedy = "give strategies.path, a folder that tutorloop strategies fit made"
        raise ConfigError(f"{config.method} asks how the teacher solves", "no strategies are given", remedy)


def _check_skills(config: Config, composition: Composition) -> None:
    """Views are made of a bank's pairs, and only they show them."""
    views = composition.scoring.views if composition.scoring else 0
    if views and not config.skills:
        raise ConfigError(f"{config.method} shows its teachers skills", "no bank is given", "give skills.path")
    contexts = {ask.context for ask in composition.samples(0, 0)}
    contexts |= {composition.scoring.context} if composition.scoring and not views else set()
    for context in sorted(contexts):
        shown = sorted(fields_of(context, config.templates) & OF_SKILLS)
        if shown:
            found = f"{context} shows {', '.join(f'{{{field}}}' for field in shown)}"
            raise ConfigError(f"no skill is retrieved for {config.method}", found, "use another template, or sgsd")
    if views and composition.scoring and not fields_of(composition.scoring.context, config.templates) & OF_SKILLS:
        rule = f"a template of {config.method} shows a skill or a mistake"
        raise ConfigError(rule, composition.scoring.context, "write {skill} into it")


def _check_self_teachers(config: Config, composition: Composition) -> None:
    """A self-teacher takes the student's weights, and the learner holds a frozen copy of an exact teacher's head."""
    for name, teacher in config.named_teachers.items():
        if teacher.follows and teacher.model != config.student.model:
            rule = f"a teacher that follows the student (follows: {teacher.follows}) is the student's own model"
            found = f"{name}: {teacher.model}; student: {config.student.model}"
            raise ConfigError(rule, found, "give both the same model, or remove follows")
        if teacher.follows and composition.scoring and composition.scoring.signal == "hidden":
            rule = "a teacher that follows the student cannot send the exact signal: its head changes"
            found = f"{name}: follows {teacher.follows}, signal exact"
            raise ConfigError(rule, found, "set signal: topk or sampled, or remove follows")


def _check_engines(config: Config, composition: Composition) -> None:
    """What a teacher's engine can send, and who may share the rollout replicas."""
    signal = composition.scoring.signal if composition.scoring else ""
    gated = any(t.name == "topk_divergence" and t.options.get("teacher_entropy_above") for t in composition.terms)
    shared = [name for name, teacher in config.named_teachers.items() if teacher.shared]
    if len(shared) > 1:
        raise ConfigError("one teacher shares the rollout replicas", ", ".join(shared), "remove shared from the others")
    for name, teacher in config.named_teachers.items():
        if signal:
            _check_signal(name, teacher, signal)
        if teacher.remote and "teacher" in composition.generators:
            rule = f"{config.method} samples from its teacher, and one behind {teacher.engine} only scores"
            remedy = f"set teacher.engine: {TEACHER_ENGINES.that('remote', has=False)}"
            raise ConfigError(rule, f"{name}: engine {teacher.engine}", remedy)
        if gated and not teacher.capabilities.entropy:
            rule = f"{config.method} reads the teacher's entropy over the whole vocabulary"
            remedy = f"set teacher.engine: {TEACHER_ENGINES.that('entropy')}, or teacher.signal: exact"
            raise ConfigError(rule, f"{name}: engine {teacher.engine}, signal topk", remedy)
        if teacher.shared and teacher.engine != config.rollout.engine:
            rule = "a teacher that shares the rollout replicas has their engine"
            found = f"{name}: {teacher.engine}; rollout: {config.rollout.engine}"
            raise ConfigError(rule, found, "set both alike, or remove shared")


def _check_signal(name: str, teacher: Teacher, signal: str) -> None:
    """The engine sends what the method asks for: a `ScoreRequest`'s signal."""
    signals = teacher.capabilities.signals
    if signal in signals:
        return
    if signal == "given" and "topk" in signals:
        rule = f"a teacher of engine {teacher.engine} chooses the ids of the topk signal"
        raise ConfigError(
            rule, f"{name}: method_options.support student", "set method_options.support: teacher, or another engine"
        )
    sent = [word for one, word in SENT.items() if one in signals]
    rule = f"a teacher of engine {teacher.engine} sends the {' and the '.join(sent)} signal"
    raise ConfigError(rule, f"{name}: {teacher.signal}", f"set teacher.signal: {' or '.join(reversed(sent))}")


def _check_contexts(config: Config, composition: Composition) -> None:
    """Templates are known (fields_of raises), and one that shows what a verdict says is used after the verdicts."""
    check_templates(config.templates)
    contexts = [(ask.context, "who answers has seen no verdict") for ask in composition.samples(0, 0)]
    if composition.scoring:
        late = "" if composition.after_verdicts else f"teachers of {config.method} score before the verdicts"
        contexts.append((composition.scoring.context, late))
    for context, why in contexts:
        early = sorted(fields_of(context, config.templates) & OF_VERDICTS)
        if early and why:
            found = f"{context} shows {', '.join(f'{{{field}}}' for field in early)}"
            raise ConfigError(f"a template shows what is known: {why}", found, "use another template, or method: sdpo")


def check_used(config: Config, compositions: Sequence[Composition]) -> None:
    """`config` is the whole run's. Raises ConfigError for the first thing that is given and used by no stage."""
    methods = ", ".join(dict.fromkeys(stage.method for stage in config.plan))
    asked = [c.scoring for c in compositions if c.scoring]
    sampled_from = any("teacher" in c.generators for c in compositions)
    if config.named_teachers and not asked and not sampled_from:
        raise ConfigError(f"{methods} asks no teacher", ", ".join(config.named_teachers), "remove teacher and teachers")
    if config.skills and not any(request.views for request in asked):
        raise ConfigError(f"{methods} shows no teacher skills", f"skills.path: {config.skills.path}", "remove skills")
    if config.strategies and not any(STRATEGIES in c.services for c in compositions):
        found = f"strategies.path: {config.strategies.path}"
        raise ConfigError(f"{methods} asks for no strategies", found, "remove strategies")
    if config.reference and not any(c.reference for c in compositions):
        found = f"reference.model: {config.reference.model}"
        raise ConfigError(f"{methods} with these options reads no reference model", found, "remove reference")
    if "teacher_rollout" in config.model_fields_set and not sampled_from:
        raise ConfigError(f"{methods} samples no answers from a teacher", "teacher_rollout", "remove teacher_rollout")
    for name, teacher in config.named_teachers.items():
        if "weight" in teacher.model_fields_set and not any(request.everyone for request in asked):
            rule = "a teacher's weight counts where several score one rollout (method_options.teachers: combined)"
            raise ConfigError(rule, f"{name}: weight {teacher.weight}", "remove weight")
        if "signal" in teacher.model_fields_set and not asked:
            rule = f"{methods} asks no teacher for scores"
            raise ConfigError(rule, f"{name}: signal {teacher.signal}", "remove signal")
        if "ema_decay" in teacher.model_fields_set and teacher.follows != "ema":
            rule = "ema_decay is for a teacher that follows the student's average (follows: ema)"
            raise ConfigError(rule, f"{name}: ema_decay {teacher.ema_decay}", "remove ema_decay")
    on_policy = any("student" in term.sources for c in compositions for term in c.terms)
    if config.off_policy != OffPolicy() and not on_policy:
        rule = f"{methods} trains given answers only, where off-policy corrections do nothing"
        raise ConfigError(rule, "off_policy settings", "remove off_policy")
