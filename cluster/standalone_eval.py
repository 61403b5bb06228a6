"""Evaluate one model outside a run: a generator pool and a verifier pool, and nothing else."""

import asyncio
from typing import Any

from ray import cloudpickle
from rich.table import Table

from ..contracts.config import Config
from ..contracts.engines import ROLLOUT_ENGINES
from ..contracts.own_code import package_of
from ..contracts.records import Prompt
from ..models.checkpoint import check_weights
from ..models.loading import check_architecture, load_tokenizer
from .chat_checks import check_prompts, check_template
from .data import eval_data, fitting, load_prompts
from .flow.evaluation import ProblemSet, evaluate
from .interrupt import Interrupt
from .methods import own_modules
from .methods.parts.checks import check_engines
from .pools.pool import need_of, parts_of
from .pools.ray_backend import RayBackend
from .pools.ray_cluster import cluster
from .pools.room import check_room, say
from .pools.services import start_generators, start_verifiers
from .preflight import context_of
from .recording.metrics import EvalRow
from .stage import eval_plan


def evaluate_model(config: Config, address: str | None) -> EvalRow:
    """`config.student` on the first `config.eval.problems` rows of `config.data`. Raises InputError."""
    model, data = config.student.model, eval_data(config.data, config.eval)
    needs: dict[str, Any] = {"need_answer": config.verifier.needs_gold, "keep_rows": config.verifier.reads_rows}
    needs["thinking"] = config.thinking
    check_engines(config)
    with Interrupt(say):
        check_architecture(model)
        check_weights(model)
        ROLLOUT_ENGINES.check_model(config.rollout.engine, model, parts_of(config.rollout))
        tokenizer = load_tokenizer(model)
        check_template(model, tokenizer, data.chat_template_kwargs)
        loaded = load_prompts(data, data.path, data.split, tokenizer, config.eval.problems, **needs)
        answers = config.eval.max_new_tokens or config.rollout.max_new_tokens
        prompts = fitting(loaded, answers, dict([context_of("model", model)]), data.path, data)
        check_prompts(model, tokenizer, data.chat_template_kwargs, prompts, data.path)
        for module in own_modules(config):
            cloudpickle.register_pickle_by_value(package_of(module))
        with cluster(address):
            check_room([need_of("rollout", config.rollout), need_of("verifier", config.verifier)])
            row = asyncio.run(_evaluate(config, prompts))
    if len(prompts) < len(loaded):
        row.stats["left_out"] = {"too_long": len(loaded) - len(prompts)}
    return row


async def _evaluate(config: Config, prompts: list[Prompt]) -> EvalRow:
    backend, student = RayBackend(), config.student.model
    generators = start_generators("rollout", student, config.learner.dtype, config.rollout, config, backend)
    verifiers = start_verifiers(config, backend)
    await asyncio.gather(generators.ready(), verifiers.ready())
    problems = ProblemSet.of("in_distribution", prompts, backend)
    (row,) = await evaluate([problems], eval_plan(config), generators, verifiers, "student", 0)
    return row


def table(config: Config, row: EvalRow) -> Table:
    """The figures for a person."""
    stats, k = row.stats, row.stats["samples"]
    title = f"{config.student.model} on {config.data.path}: {stats['problems']} problems, {k} samples each"
    if "left_out" in stats:
        title += f"; {stats['left_out']['too_long']} problems too long for its context are left out"
    result = Table(title=title)
    for column in ("figure", "value", "95 % interval"):
        result.add_column(column, justify="left" if column == "figure" else "right")
    figures = {f"avg@{k}": stats["avg_at_k"], **{f"pass@{n}": at for n, at in stats["pass_at"].items()}}
    named = {f"pass@{k}": "pass_at_k", f"maj@{k}": "maj_at_k"}
    figures |= {short: stats[name] for short, name in named.items() if name in stats}
    for name, figure in figures.items():
        low, high = figure["low"], figure["high"]
        result.add_row(name, f"{100 * figure['value']:.1f} %", f"{100 * low:.1f} – {100 * high:.1f} %")
    for name, share in (("answered", row.answered_share), ("cut off by the limit", row.truncated_share)):
        if share is not None:
            result.add_row(name, f"{100 * share:.1f} %", "")
    if row.response_length is not None:
        result.add_row("tokens a response", f"{row.response_length:.0f}", "")
    return result
