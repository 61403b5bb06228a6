"""`tutorloop train --check`: all that a run checks before its first actor, and what would run. Starts no Ray."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..contracts.config import Config, Teacher
from ..models.loading import context_length, eos_ids, load_config, load_tokenizer
from .methods import compose_stages
from .methods.parts.composition import Composition
from .pools.autoscaler import budget_of, scaled_pools
from .pools.services import judges
from .preflight import Inputs, needs_of
from .recording.notify import ways_of
from .recording.progress import plain
from .recording.run_folder import RunFolder
from .resuming import begin


def check(config: Config, resume: bool, console: Console, allow: Sequence[str] = ()) -> bool:
    """Print one screen of what would run; True. Raises an InputError where a run would."""

    def note(text: str) -> None:
        console.out(plain(text), highlight=False)

    compositions = compose_stages(config)
    folder = RunFolder(Path(config.output_dir).absolute(), allow=allow)
    with folder.claimed(config, resume, note):
        inputs, checkpoint = begin(config, compositions, folder, resume, note)
    begins = f"goes on after step {checkpoint[1]['step']}" if checkpoint else "starts anew"
    lines = [("run folder", f"{folder.path}: {begins}"), *_lines(config, compositions, inputs)]
    for label, text in lines:
        note(f"{label:<16}{text}")
    note("Nothing is wrong that can be seen without Ray.")
    return True


def _lines(config: Config, compositions: Sequence[Composition], inputs: Inputs) -> Iterator[tuple[str, str]]:
    for number, stage in enumerate(config.plan):
        until = f", or until {stage.until.trigger}" if stage.until else ""
        yield "method" if not number else "then", f"{stage.method}, {stage.steps} steps{until}"
    rollout, data, evaluation = config.rollout, config.data, config.eval
    samples = f"{config.prompts_per_step} prompts × {rollout.samples_per_prompt} rollouts"
    yield "a step", f"{samples} of up to {rollout.max_new_tokens} tokens, {config.max_staleness} steps of staleness"
    adapters = f", adapters of rank {config.student.lora.rank}" if config.student.lora else ""
    yield "student", f"{config.student.model}: {config.learner.dtype}, {rollout.engine}{adapters}"
    for name, teacher in config.named_teachers.items():
        yield name, _teacher(teacher)
    if config.reference:
        yield "reference", f"{config.reference.model}: {config.reference.dtype}"
    longest = max(len(prompt.token_ids) for prompt in inputs.train)
    room = context_length(load_config(config.student.model))
    yield "data", f"{data.path}: {len(inputs.train):,} rows, the longest prompt {longest:,} tokens of {room:,}"
    for path, prompts in ((evaluation.path, inputs.in_distribution), (evaluation.ood_path, inputs.out_of_distribution)):
        if prompts:
            often = f"every {evaluation.every} steps" if evaluation.every else "before and after"
            yield "evaluation", f"{path}: {len(prompts):,} problems × {evaluation.samples}, {often}"
    yield "verifier", config.verifier.kind if judges(config, compositions) else "nothing is judged"
    yield "responses end", _ends(config.student.model)
    needs = needs_of(config, compositions)
    for need in needs:
        yield f"  {need.pool}", f"{need.replicas} × {_resources(need.each)}"
    yield "  in all", _resources({key: sum(n.replicas * n.each.get(key, 0) for n in needs) for key in ("CPU", "GPU")})
    for resource, budget in budget_of(config.autoscale).items():
        names = [need.pool for need in needs if need.pool in scaled_pools(config) and need.each.get(resource)]
        yield "autoscale", f"{', '.join(names)}: up to {budget:g} {resource} together"
    every = f" and every {config.checkpoint.every} steps" if config.checkpoint.every else ""
    if ways := ways_of(config.notify):
        yield "alarms go to", " and ".join(f"the {way} of the recipe" for way in ways)
    yield "checkpoints", f"every {config.checkpoint.minutes:g} minutes{every}, the newest {config.checkpoint.keep} kept"


def _teacher(teacher: Teacher) -> str:
    place = ", ".join(teacher.urls) if teacher.urls else teacher.dtype
    follows = f", follows the student ({teacher.follows})" if teacher.follows else ""
    return f"{teacher.model}: {place}, {teacher.engine}, {teacher.signal}{follows}"


def _ends(model: str) -> str:
    tokenizer: Any = load_tokenizer(model)
    ends = eos_ids(model, tokenizer)
    return "at " + ", ".join(f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in ends) if ends else "nowhere"


def _resources(amounts: Mapping[str, float]) -> str:
    return f"{amounts.get('CPU', 0):g} CPU, {amounts.get('GPU', 0):g} GPU"
