"""Soft-label distillation: the forward KL to the teacher's distribution at each token of given answers.

Source: Hinton et al., arXiv:1503.02531: τ² · KL(softmax(T/τ) ‖ softmax(S/τ)), so that gradients keep their size over τ.
With the topk signal, τ is 1: a tail bucket cannot be tempered.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from ...contracts.config import Config
from .parts.composition import Composition, SampleSpec, read_options
from .parts.distil import SignalOptions, distil, signal_of


class KdOptions(SignalOptions):
    """And whose answers."""

    answers: Literal["dataset", "teacher"] = Field(
        "dataset", description="the dataset's solutions, or the teacher's samples"
    )


def compose(config: Config) -> Composition:
    """One answer a prompt from the dataset, or `rollout.samples_per_prompt` from the teacher."""
    options = read_options(KdOptions, config.method_options, "kd")
    exact = signal_of(config, "kd", ("topk", "exact")) == "exact"
    divergence = {"direction": "forward", **({"hinton": True} if exact else {})}
    samples = config.rollout.samples_per_prompt if options.answers == "teacher" else 1
    spec = SampleSpec(source=options.answers, samples=samples)
    return replace(
        distil(config, options, divergence, sources=(options.answers,)),
        samples=lambda step, position: (spec,),
        generators=(options.answers,),
    )
