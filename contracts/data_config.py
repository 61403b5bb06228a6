"""The sections that say where problems come from and how a run is evaluated. Imports neither torch nor Ray."""

from typing import Any, Literal

from pydantic import Field

from .sections import Section

REPLAY = "replay"  # the source of rollouts that are given answers of that section
GIVEN = ("dataset", REPLAY)  # sources of which nobody samples: a row's own solution is the response


class Data(Section):
    """Problems with gold answers (docs/data.md)."""

    path: str = Field(description="JSONL or Parquet file, a folder of `datasets`, `lab:train`, or a hub id")
    name: str = Field(default="", description="a hub dataset's configuration")
    split: str = Field(default="train", description="a hub dataset's split")
    prompt_field: str = Field(
        default="prompt", description="field of the problem: text, or a list of messages; a.b nests"
    )
    answer_field: str = Field(
        default="answer", description="field of the gold answer, or of several; of `… #### 42`, the 42"
    )
    solution_field: str = Field(default="solution", description="field of a worked solution, for methods that show it")
    strategy_field: str = Field(
        default="strategy", description="field of a strategy in words, without its answer, for methods that show it"
    )
    prompt_suffix: str = Field(default="", description="text after every problem")
    too_long: Literal["refuse", "drop"] = Field(
        default="refuse", description="rows that do not fit a model's context end the run, or are left out and counted"
    )
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="e.g. {enable_thinking: false}")


class Replay(Section):
    """Given answers that every step imitates beside its method's own loss, so that what the student can do besides is
    not forgotten. They are of another dataset than the method's prompts."""

    path: str = Field(description="prompts with solutions, as `data.path`")
    name: str = Field(default="", description="a hub dataset's configuration; none: data.name")
    split: str = Field(default="train", description="a hub dataset's split")
    prompt_field: str = Field(default="", description="none: data.prompt_field")
    solution_field: str = Field(default="", description="none: data.solution_field")
    rows_per_step: int = Field(default=8, ge=1, description="answers that each step trains on top")
    weight: float = Field(default=0.1, gt=0, description="of their negative log-likelihood, a mean over their tokens")


class Eval(Section):
    """Evaluation on held-out problems, before, during and after."""

    path: str = Field(default="", description="in-distribution problems, as `data.path`; none: no evaluation")
    ood_path: str = Field(default="", description="out-of-distribution problems")
    name: str = Field(default="", description="a hub dataset's configuration; none: data.name")
    split: str = Field(default="test", description="a hub dataset's split")
    prompt_field: str = Field(default="", description="none: data.prompt_field")
    answer_field: str = Field(default="", description="none: data.answer_field")
    every: int = Field(default=0, ge=0, description="steps; 0 evaluates before and after only")
    samples: int = Field(default=1, ge=1, description="samples per problem, the k of avg@k")
    problems: int = Field(default=200, ge=1, description="first problems of each set")
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    max_new_tokens: int | None = Field(default=None, ge=1, description="none: the rollout's")
