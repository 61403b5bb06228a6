"""Evaluate one model outside a run: a generator pool and a verifier pool, and nothing else."""

from typing import Any

from rich.table import Table

from ..contracts.config import Config
from ..models.loading import load_tokenizer
from .chat_checks import check_prompts, check_template
from .data import check_context, load_prompts
from .evaluation import ProblemSet, evaluate
from .interrupt import Interrupt, Interrupted
from .metrics import EvalRow
from .preflight import context_length
from .run import eval_plan
from .runtime import check_resources, cluster
from .services import start_generators, start_verifiers


def evaluate_model(config: Config, address: str | None) -> EvalRow:
    """`config.student` on the first `config.eval.problems` rows of `config.data`. Raises InputError."""
    model, data = config.student.model, config.data
    tokenizer = load_tokenizer(model)
    check_template(model, tokenizer, data.chat_template_kwargs)
    needs: dict[str, Any] = {"need_answer": config.verifier.needs_gold, "keep_rows": config.verifier.reads_rows}
    prompts = load_prompts(data, data.path, data.split, tokenizer, config.eval.problems, **needs)
    check_prompts(model, tokenizer, data.chat_template_kwargs, prompts, data.path)
    check_context(prompts, config.rollout.max_new_tokens, context_length(model), data.path, "model")
    with cluster(address):
        rollout, verifier = config.rollout, config.verifier
        pools = (rollout, verifier)
        check_resources(
            {"CPU": sum(p.replicas * p.num_cpus for p in pools), "GPU": rollout.replicas * rollout.num_gpus}
        )
        generators = start_generators("rollout", model, config.learner.dtype, rollout, config)
        verifiers = start_verifiers(config)
        generators.ready()
        problems = ProblemSet.of("in_distribution", prompts)
        with Interrupt(lambda _: None) as interrupt:
            try:
                return evaluate(problems, eval_plan(config), generators, verifiers, [], "student", 0, interrupt)
            except Interrupted:
                raise KeyboardInterrupt from None


def table(config: Config, row: EvalRow) -> Table:
    """The figures for a person."""
    stats, k = row.stats, row.stats["samples"]
    result = Table(
        title=f"{config.student.model} on {config.data.path}: {stats['problems']} problems, {k} samples each"
    )
    for column in ("figure", "value", "95 % interval"):
        result.add_column(column, justify="left" if column == "figure" else "right")
    figures = {f"avg@{k}": stats["avg_at_k"], **{f"pass@{n}": at for n, at in stats["pass_at"].items()}}
    figures |= {f"pass@{k}": stats["pass_at_k"], f"maj@{k}": stats["maj_at_k"]}
    for name, figure in figures.items():
        low, high = figure["low"], figure["high"]
        result.add_row(name, f"{100 * figure['value']:.1f} %", f"{100 * low:.1f} – {100 * high:.1f} %")
    return result
