"""RAFT++ (2504.11343): RAFT on positives with importance weights and a clip.

L = the mean over answers that passed of the mean over their tokens of −min(r, 1 + ε_h), r = π_θ/μ: a clipped
policy gradient with advantage 1 on positives alone, and none on the rest. The paper's; π_old is the policy that
sampled, so that r corrects for stale answers too. Its ablation without the clip, which was worse than RAFT, is
`clip` false: a plain importance weight.
"""

from dataclasses import replace

from pydantic import Field

from ...contracts.config import Config, Section
from ...contracts.records import Term
from .parts.composition import Composition, correction_of, read_options
from .parts.group_rl import by_group, policy_gradient
from .raft import positives


class RaftPpOptions(Section):
    """RAFT++'s options; with no negative advantage a lower clip would do nothing."""

    clip: bool = Field(True, description="whether the ratio is clipped at all")
    clip_high: float = Field(0.2, gt=0, description="how far above 1 the ratio π_θ/μ counts")


def compose(config: Config) -> Composition:
    options = read_options(RaftPpOptions, config.method_options, config.method)
    term = Term(name="clipped_policy_gradient", options=options.model_dump(), reduction="sequences")
    correction = correction_of(config, "none")
    if "proximal" not in config.off_policy.model_fields_set:
        correction = replace(correction, proximal="behaviour")
    composition = policy_gradient(config, by_group(positives), (term,), min_samples=1)
    return replace(composition, correction=correction)
