"""Generalised knowledge distillation: a coin for each step takes the student's own answers or given ones.

Source: GKD, arXiv:2306.13649. With M = βT + (1−β)S the loss is β KL(T‖M) + (1−β) KL(S‖M); β = 0 is KL(T‖S), β = 1
KL(S‖T). The coin falls once for a whole step, as Algorithm 1's for a batch (known second-hand). The defaults
λ = β = 0.5 are TRL's; its temperature of 0.9 is not ours, which is 1.

The sampled signal is refused: on tokens that the teacher sampled, a policy gradient on log π_T − log π_θ is behaviour
cloning weighted by a log ratio, and no reverse KL.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...contracts.config import Config
from ...contracts.records import seed_of
from .parts.composition import Composition, Samples, SampleSpec, read_options
from .parts.distil import SignalOptions, distil, refuse, signal_of


class GkdOptions(SignalOptions):
    """And the two mixtures."""

    on_policy: float = Field(0.5, ge=0, le=1, description="λ: share of steps on the student's own answers")
    other: Literal["dataset", "teacher"] = Field("dataset", description="who answers in the other steps")
    beta: float = Field(0.5, ge=0, le=1, description="of the divergence: 0 is KL(teacher‖student), 1 the reverse")


def coin(seed: int, step: int) -> float:
    """A number in [0, 1) that the step alone decides."""
    return seed_of(seed, "gkd", step) / 2**63


def compose(config: Config) -> Composition:
    """λ = 0 never asks the student, and λ = 1 nobody else."""
    options = read_options(GkdOptions, config.method_options, "gkd")
    signal_of(config, "gkd", ("topk", "exact"))
    if options.on_policy == 1:
        refuse(options, {"other"}, "on_policy=1 asks the student alone", "leave other out, or lower on_policy")
    sources = {0.0: (options.other,), 1.0: ("student",)}.get(options.on_policy, ("student", options.other))
    return replace(
        distil(config, options, {"direction": "jsd", "beta": options.beta}, sources=sources),
        samples=_specs(config, options),
        generators=sources,
    )


def _specs(config: Config, options: GkdOptions) -> Samples:
    samples = config.rollout.samples_per_prompt
    student = SampleSpec(samples=samples)
    given = SampleSpec(source=options.other, samples=samples if options.other == "teacher" else 1)
    return lambda step, position: (student if coin(config.seed, step) < options.on_policy else given,)
