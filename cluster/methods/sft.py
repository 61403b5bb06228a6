"""Supervised fine-tuning on the dataset's own solutions: −log π_θ(y_t), the mean over all tokens of the step.

Source: maximum likelihood. The mean is over tokens of the whole step, not of micro-batches.
"""

from ...contracts.config import Config, Section
from ...contracts.records import Term
from .parts.composition import Composition, SampleSpec, read_options, sampling_of


class SftOptions(Section):
    """It has none."""


def compose(config: Config) -> Composition:
    """One solution a prompt, from the field `data.solution_field`."""
    read_options(SftOptions, config.method_options, "sft")
    return Composition(
        terms=(Term(name="nll", sources=("dataset",)),),
        samples=lambda step, position: (SampleSpec(source="dataset"),),
        sampling=sampling_of(config),
        generators=("dataset",),
        scored=(),
    )
