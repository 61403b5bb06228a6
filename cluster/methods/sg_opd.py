"""Sign-gated OPD: the verifier decides how much of the teacher's advantage a token gets.

With d_t = log π_T − log π_θ and z = ±1 by the verifier, a token agrees where sign(d_t) = z and conflicts where it is
−z; A_t = d_t + (λ−1)·x_t with λ = `agree` or `conflict`, and 1 where z is 0. At the cold start the teacher answers too
(cold_start.py). Source: SG-OPD, arXiv:2606.09304: its abstract. The exact equation was not found: the gate is ours, in
the form that others report, with their 1.8 and 1.0. (1, 0) is OPDVR, arXiv:2608.24696; gate=soft R²-OPD, 2609.35517.
"""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from ...contracts.config import Config, Section
from ...contracts.records import ScoreRequest, Term
from .cold_start import mixed_specs, try_again
from .parts.composition import Composition, correction_of, read_options, sampling_of, student_group
from .parts.distil import refuse, signal_of
from .parts.verdict_signs import group_sign, outcome_sign


class SgOpdOptions(Section):
    """The gate, the sign that drives it, and the cold start."""

    gate: Literal["sign", "soft"] = Field(
        "sign", description="a factor for agreement and conflict, or R²-OPD's sigmoid"
    )
    agree: float = Field(1.8, ge=0, description="gate=sign: λ where teacher and verifier agree")
    conflict: float = Field(
        1.0, ge=0, description="gate=sign: λ where they do not; 1 plain OPD, 0 leaves the token out"
    )
    mode: Literal["live_ref", "frozen_ref", "blend"] = Field(
        "live_ref",
        description="gate=sign: extrapolate from the student, from the reference, or mix in the verifier's z",
    )
    blend: float = Field(1.0, ge=0, description="mode=blend: A = (d + blend·z) / (1 + blend) where they conflict")
    sharpness: float = Field(1e-3, gt=0, description="gate=soft: β of g = σ(β·z·d / median|d|)")
    sign: Literal["outcome", "group"] = Field("outcome", description="z by right or wrong, or by reward − group mean")
    cold_start: float = Field(
        0.5, ge=0, le=1, description="ρ0: share of prompts that the teacher answers at first; 0: none"
    )
    cold_steps: float = Field(0.15, gt=0, le=1, description="share of the stage's steps in which ρ falls to 0")
    tries: int = Field(4, ge=1, description="answers of the teacher, one after the other, until one passes")
    teacher_loss: Literal["nll", "forward_kl"] = Field("nll", description="loss of the teacher's answers")
    top_k: int = Field(16, ge=1, description="teacher_loss=forward_kl with teacher.signal=topk: ids for each token")


def compose(config: Config) -> Composition:
    """The gated term on the student's answers, and another on the teacher's; each token weighs the same in both."""
    options = read_options(SgOpdOptions, config.method_options, "sg_opd")
    _check(options)
    cold, forward = options.cold_start > 0, options.cold_start > 0 and options.teacher_loss == "forward_kl"
    signal = signal_of(config, "sg_opd", ("topk", "exact") if forward else ("sampled",))
    if signal != "topk":
        refuse(options, {"top_k"}, "top_k is for teacher_loss=forward_kl with teacher.signal=topk", "remove it")
    requests = {"topk": ScoreRequest(signal="topk", top_k=options.top_k), "exact": ScoreRequest(signal="hidden")}
    gated = replace(_gated(options), of_batch=cold)
    base = Composition(
        terms=(gated,),
        samples=student_group(config),
        sampling=sampling_of(config),
        scoring=requests.get(signal, ScoreRequest(signal="sampled")),
        reference=gated.reference,
        needs_verdicts=True,
        min_samples=2 if options.sign == "group" else 1,
        credit=group_sign if options.sign == "group" else outcome_sign,
        correction=correction_of(config, "truncated"),
    )
    if not cold:
        return base
    name, own = (f"{signal}_divergence", {"direction": "forward"}) if forward else ("nll", {})
    return replace(
        base,
        terms=(gated, Term(name=name, options=own, sources=("teacher",), of_batch=True)),
        samples=mixed_specs(config, options.cold_start, max(1.0, options.cold_steps * config.steps)),
        generators=("student", "teacher"),
        scored=("student", "teacher") if forward else ("student",),
        follow_up=try_again(options.tries),
    )


def _gated(options: SgOpdOptions) -> Term:
    if options.gate == "soft":
        return Term(name="soft_gate", options={"sharpness": options.sharpness})
    own: dict[str, Any] = options.model_dump(include={"agree", "conflict", "mode", "blend"})
    return Term(name="sign_gate", options=own, reference=options.mode == "frozen_ref")


def _check(options: SgOpdOptions) -> None:
    """Raises ConfigError for an option that the others leave without effect."""
    if options.gate == "soft":
        names = {"agree", "conflict", "mode", "blend"}
        refuse(options, names, "gate=soft has sharpness alone", "remove it, or use gate: sign")
    else:
        refuse(options, {"sharpness"}, "sharpness is for gate=soft", "remove it")
    if options.mode == "blend":
        refuse(options, {"conflict"}, "mode=blend uses blend where teacher and verifier conflict", "remove it")
    else:
        refuse(options, {"blend"}, "blend is for mode=blend", "remove it")
    if not options.cold_start:
        names = {"cold_steps", "tries", "teacher_loss", "top_k"}
        refuse(options, names, "cold_start=0 asks the teacher for no answers", "remove it")
