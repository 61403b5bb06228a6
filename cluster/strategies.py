"""The run's strategies, checked before anything starts: the extractor's folder, and the problems that it knows."""

from collections.abc import Sequence

from ..contracts.config import Config
from ..contracts.errors import StrategyError
from ..contracts.records import Prompt
from ..verifier_service.strategies.solutions import Solutions


def check_strategies(config: Config, prompts: Sequence[Prompt]) -> str:
    """How many of the run's rows the folder has solutions of, in words. Raises StrategyError where it has none, or
    another problem under a row's id."""
    assert config.strategies
    path = config.strategies.path
    solutions = Solutions.load(path)
    known = [prompt for prompt in prompts if solutions.problem(prompt.prompt_id)]
    suffix = config.data.prompt_suffix
    for prompt in known:
        here = prompt.text.removesuffix(suffix)
        if not solutions.has(prompt.prompt_id, here):
            there = solutions.problem(prompt.prompt_id)
            found = f"row {prompt.prompt_id}: {here[:60]!a} in {config.data.path}, {there[:60]!a} in {path}"
            raise StrategyError("a row's strategies are those of its own problem", found, "fit them to these rows")
    if not known:
        found = f"none of {len(prompts)} rows of {config.data.path} is in {path}"
        remedy = "rows are known by their ids: fit to solutions of these problems"
        raise StrategyError("strategies are those of the run's problems", found, remedy)
    return f"strategies: {len(known):,} of {len(prompts):,} rows have a teacher's solution; the others are neutral"
