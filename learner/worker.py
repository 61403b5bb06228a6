"""One rank of the learner: takes its share of a step, steps the engine with the others, publishes the weights.

A plain class; cluster makes a Ray actor of each rank. Every method is collective: all ranks must call it, in the same
order. The loss of an update is Σ_terms weight · (Σ over all ranks' tokens of the term's token loss) / (the term's own
count over all ranks), so it depends on neither ranks, micro-batches nor packing.
"""

import math
import pickle
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed

from ..contracts.config import Learner, Lora
from ..contracts.data_config import REPLAY
from ..contracts.errors import CheckpointError, ConfigError, LearnerError, ModelError, NotFinite
from ..contracts.records import BucketEntries, Correction, StepPlan, StepReport, Term, WeightBucket, WeightManifest
from ..models.checkpoint import load_lm_head
from ..models.digests import Written
from ..models.loading import load_causal_lm, locate_model, use_threads
from ..models.lora import add_adapters
from ..models.weight_broadcast import BroadcastGroup
from .checkpoint import CheckpointWriter, restore
from .corrections import current_share, effective_share
from .engine import apply_update, build_engine, forward_is_finite, join_group, learning_rate, weights_are_finite
from .examples import Example, Updates, join
from .head_proof import prove_heads
from .loss_head import ChunkedLoss, PackedStudent
from .micro_batch import Selection, collate
from .objective import Objective, Sums, divisor_of
from .old_policy import OldPolicyPass, PassResult
from .parameters import Rounding, announce_weights, broadcast_weights, bucket_layout, export_model, publish_weights
from .policy_shift import FEWEST, policy_shift, watched
from .terms import bind_terms
from .watch import Watch, not_finite, unsound_rows

REASONS = ("teacher_refused", "credit_missing", "off_policy")  # for which a rollout trains in no term


class LearnerWorker:
    """Rank `rank` of `world_size`. `heads`: teacher id → (model, dtype) of each teacher whose exact signal is used.

    With `lora` only adapters are trained, published and saved; `seed` decides what they start as. `longest`: tokens of
    the run's longest prompt with its longest response, which the canary is to reach.
    """

    whole = True  # the weights are those of a step's end, and finite
    version = 0  # of the weights, where a step has made them
    proof: tuple[torch.Tensor, ...] = ()  # token ids and lengths of what the weights must read
    unproven: frozenset[str] = frozenset()  # teachers whose head has not been compared with what they say
    longest = 0

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        master_port: int,
        student: str,
        heads: dict[str, tuple[str, str]],
        config: Learner,
        terms: tuple[Term, ...],
        steps: int,
        correction: Correction,
        lora: Lora | None = None,
        seed: int = 0,
        longest: int = 0,
        device: str = "cpu",
        threads: int = 1,
        master_addr: str = "127.0.0.1",
    ) -> None:
        self.terms = bind_terms(terms)
        exact = any(term.loss.signal == "exact" for term in self.terms)
        if exact and not heads:
            raise ConfigError("an exact divergence needs the teachers' heads", "no heads", "name the teachers")
        self.rank, self.world_size, self.device, self.threads = rank, world_size, device, threads
        self.config, self.steps, self.student, self.correction = config, steps, student, correction
        self.lora, self.seed = lora, seed
        self.broadcasts: BroadcastGroup | None = None
        self.writer = CheckpointWriter()
        join_group(rank, world_size, master_addr, master_port, device)
        self.heads = {name: load_lm_head(*source).to(device) for name, source in heads.items()} if exact else {}
        self.unproven, self.longest = frozenset(self.heads), longest
        self.restart()

    def restart(self, sharded: bool = False) -> None:
        """The student's weights as they were at first, and a fresh optimizer. `sharded`: as build_engine says."""
        model = load_causal_lm(self.student, self.config.dtype, attention="packed", device=self.device)
        use_threads(model, self.threads)
        for name, head in self.heads.items():
            if len(head) != model.config.vocab_size:
                raise ModelError(
                    "an exact divergence needs a teacher with the student's vocabulary size",
                    f"teacher {name!r} has {len(head)} ids, the student {model.config.vocab_size}",
                    "set the teacher's signal to topk",
                )
        if self.lora:
            add_adapters(model, self.lora, self.seed)
        self.engine: Any = build_engine(PackedStudent(model), self.config, model.config.hidden_size, sharded)
        if not self._weights_are_finite():
            raise ModelError("a model's weights are finite numbers", self.student, "use another copy of the model")
        self.whole, self.rounding = True, Rounding()
        updates = self.config.updates_per_step
        self.old_policy_pass = OldPolicyPass(self.engine, self.terms, self.correction, updates, self.device)

    def step(self, plan: StepPlan, *batches: pa.RecordBatch) -> StepReport:
        """Train on this rank's rows of `batches`: rollouts, scores and credits, as many of each as `plan` says.

        The report is the same on every rank. Where no token of any rank can be trained, or no gradient moves a weight,
        weights and optimizer stay as they are. Raises NotFinite, on every rank and before the weights change.
        """
        started = time.perf_counter()
        updates = join(plan, batches)
        self.unproven = prove_heads(self.unproven, self.heads, updates)
        own = [example for update in updates for batch in update for example in batch]
        unsound = unsound_rows(own)
        lacking = Counter(reason for example in own for reason in self._lacks(example))
        counted: list[float] = [lacking["teacher_refused"], lacking["credit_missing"], len(unsound)]
        without_scores, without_credit, refused = self._over_ranks(counted)
        if refused:
            what = "the sampler's logprobs, or an advantage, credit or weight, are not finite"
            raise not_finite(what, plan.version, self._of_all(unsound))
        rate = plan.rate * learning_rate(plan.step, self.steps, self.config)
        found = self.old_policy_pass.run(updates, plan.version, self._over_ranks, self._from_ranks)
        counts, metrics, untrained = self._train(updates, found, plan.version, rate)
        if not self._weights_are_finite():
            raise not_finite("weights, after the step", plan.version)
        self.whole, self.version = True, plan.version + 1
        dropped = {reason: counts[reason] for reason in REASONS if counts[reason]}
        of_ranks = self._from_ranks(untrained) if dropped else []
        metrics |= {"missing_scores": without_scores, "learning_rate": rate}
        metrics |= self._policy_shift(own, plan.step) if counts["trained"] else {}
        if any(term.credit for term in self.terms):
            metrics["missing_credit"] = without_credit
        return StepReport(
            loss=sum(term.weight * metrics.get(f"loss_{term.key}", 0.0) for term in self.terms),
            tokens=counts["tokens"],
            rollouts=counts["rollouts"],
            seconds=time.perf_counter() - started,
            metrics=metrics,
            dropped=dropped,
            polarities=found.polarities,
            untrained={name: reason for of_rank in of_ranks for name, reason in of_rank.items()},
        )

    def _policy_shift(self, examples: Sequence[Example], step: int) -> dict[str, float]:
        sampled = [example.rollout for example in examples if example.sampled]
        names = watched(self._of_all([rollout.rollout_id for rollout in sampled]), step)
        if not names:
            return {}
        own = [rollout for rollout in sampled if rollout.rollout_id in names]
        shift, tokens = self._over_ranks(policy_shift(self.engine, own, self.device))
        return {"policy_shift": shift / tokens} if tokens >= FEWEST else {}

    def _lacks(self, example: Example) -> set[str]:
        """What the terms that ask for it say of it: what they lack, "" where they can train on it."""
        return {example.lacks(term) for term in self.terms if example.asked_by(term)}

    def _train(
        self, updates: Updates, found: PassResult, version: int, rate: float
    ) -> tuple[Counter[str], dict[str, float], dict[str, str]]:
        """Every update of the step; what was counted, the metrics over all updates, and the reasons of this rank's
        rollouts that trained in no term."""
        untrained: dict[str, str] = {}
        metrics = dict(found.metrics)
        sums, counts, norms, moved = Sums(), Counter[str](), [], 0
        for number, update in enumerate(updates):
            selections = [Selection.of(examples, self.terms, found.rollouts) for examples in update]
            own = [example for examples in update for example in examples]
            untrained |= self._untrained(own, selections)
            of_update = self._count(own, selections)
            divisors = self._divisors(of_update)
            counts += of_update + Counter({divisor_of(key): divisor for key, divisor in divisors.items()})
            if of_update["tokens"]:
                place = (version, number, len(updates))
                watch = self._backward(selections, divisors, place, sums)
                moves = self._moves(watch, selections, place)
                norms.append(self._apply(rate, moves, place))
                moved += moves
        totals = self._over_ranks([float(total) for total in sums.totals.values()])
        metrics |= sums.means(totals, counts)
        metrics["skipped_updates"] = self.config.updates_per_step - moved
        if norms:
            metrics["grad_norm"] = sum(norms) / len(norms)
        if counts["asked"]:
            metrics["teacher_coverage"] = 1 - counts["refused"] / counts["asked"]
        if "importance_weight" in metrics:
            share = effective_share(metrics["importance_weight"], metrics.pop("weight_squared"))
            metrics["effective_sample_share"] = share
        return counts, metrics, untrained

    def _refusal(self, example: Example) -> str:
        """Why no term can train on it; "" where one can. No term may have asked for it: "teacher_refused" too."""
        lacks = self._lacks(example)
        return "" if "" in lacks else "credit_missing" if "credit_missing" in lacks else "teacher_refused"

    def _untrained(self, examples: list[Example], selections: list[Selection]) -> dict[str, str]:
        chosen = {example.rollout.rollout_id for selection in selections for example in selection.examples}
        others = [example for example in examples if example.rollout.rollout_id not in chosen]
        return {e.rollout.rollout_id: self._refusal(e) or "off_policy" for e in others}

    def _count(self, examples: list[Example], selections: list[Selection]) -> Counter[str]:
        """Over all ranks: each term's tokens and sequences, the tokens of any term, of any but a replay's, what the
        student sampled of them, those that a teacher was asked for and refused, and the rollouts that train, and those
        that do not by reason."""
        local: dict[str, int] = {}
        for term in self.terms:
            counts = [selection.tokens_and_sequences(term.key) for selection in selections]
            local[term.key] = sum(tokens for tokens, _ in counts)
            local[f"sequences of {term.key}"] = sum(sequences for _, sequences in counts)
        chosen = [pair for s in selections for pair in zip(s.examples, s.counts, strict=True)]
        local["tokens"] = sum(count for _, count in chosen)
        local["trained"] = sum(count for example, count in chosen if example.rollout.source != REPLAY)
        local["sampled"] = sum(count for example, count in chosen if example.sampled)
        taught = [(e, t) for t in self.terms if t.loss.signal != "none" for e in examples if e.asked_by(t)]
        local["asked"] = sum(int(np.count_nonzero(e.rollout.loss_mask)) for e, _ in taught)
        refused = [e for e, t in taught if e.lacks(t) == "teacher_refused"]
        local["refused"] = sum(int(np.count_nonzero(e.rollout.loss_mask)) for e in refused)
        refusals = [self._refusal(example) for example in examples]
        local["rollouts"] = len(chosen)
        local["teacher_refused"] = refusals.count("teacher_refused")
        local["credit_missing"] = refusals.count("credit_missing")
        local["off_policy"] = refusals.count("") - len(chosen)
        return Counter(dict(zip(local, map(int, self._over_ranks(list(local.values()))), strict=True)))

    def _divisors(self, counts: Counter[str]) -> dict[str, int]:
        """What each term's sum is divided by; 0 where it counts no token."""
        divisors: dict[str, int] = {}
        for term in self.terms:
            if term.reduction != "tokens":
                length = term.length if term.reduction == "length" else 1
                divisors[term.key] = counts[f"sequences of {term.key}"] * length
            elif term.of_batch and counts[term.key]:
                divisors[term.key] = counts["trained"]
            else:
                divisors[term.key] = counts[term.key]
        return divisors

    def _backward(
        self, selections: list[Selection], divisors: dict[str, int], place: tuple[int, int, int], sums: Sums
    ) -> Watch:
        """The gradients of one update; `place`: the weights' version, the update's number and of how many."""
        version, number, updates = place
        watch = Watch()

        def share(example: Example) -> float:
            if not example.sampled:
                return 1.0
            older, newer = example.rollout.oldest_version, version + number / updates
            return current_share(self.correction.proximal, older, version, newer)

        for i, selection in enumerate(selections):
            batch = collate(selection, self.terms, self.device, share)
            objective = Objective(self.terms, batch, divisors, self.heads, self.correction, sums, watch)
            watch.read.append((batch.token_ids, batch.lengths))
            self.engine.set_gradient_accumulation_boundary(i == len(selections) - 1)
            loss = self.engine(
                batch.token_ids,
                batch.lengths,
                batch.rows,
                lambda hidden, head, objective=objective: ChunkedLoss.apply(hidden, head, objective, watch.feel),
            )
            # DeepSpeed averages gradients over ranks; the loss is a sum over them.
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        token_ids, lengths = watch.read[0]
        self.proof = (token_ids[: int(lengths[0])], lengths[:1])
        return watch

    def _moves(self, watch: Watch, selections: list[Selection], place: tuple[int, int, int]) -> bool:
        """Whether any rank's gradients are other than 0. Raises NotFinite for a loss of any rank."""
        moves, *unsound = self._over_ranks(watch.flags(term.key for term in self.terms))
        if any(unsound):
            names = [f"loss_{term.key}" for term, count in zip(self.terms, unsound, strict=True) if count]
            own = watch.rollouts(selections)
            held = (any(e.rollout.rollout_id in own for e in selection.examples) for selection in selections)
            self.proof = next((read for read, bad in zip(watch.read, held, strict=True) if bad), self.proof)
            rollouts = self._of_all(own)
            raise self._stopped(f"{', '.join(names)} is not finite", place, rollouts)
        return moves > 0

    def _apply(self, rate: float, moves: bool, place: tuple[int, int, int]) -> float:
        """Take the optimizer's step; the gradients' norm. Raises NotFinite where that is not finite."""
        before, self.whole = self.whole, False
        norm = apply_update(self.engine, rate, moves)
        self.whole = before and not (moves and math.isfinite(norm))
        if not math.isfinite(norm):
            raise self._stopped("the gradients' norm is not finite, though every loss is", place)
        return norm

    def _stopped(self, what: str, place: tuple[int, int, int], rollouts: Iterable[str] = ()) -> NotFinite:
        version, number, updates = place
        return not_finite(what, version, rollouts, f", update {number + 1} of {updates}")

    def _weights_are_finite(self) -> bool:
        return not self._over_ranks([float(not weights_are_finite(self.engine))])[0]

    def _over_ranks(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def _from_ranks(self, own: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, own)
        return everyone

    def _of_all(self, own: Sequence[str]) -> list[str]:
        return [name for names in self._from_ranks(own) for name in names]

    def publish(self, version: int) -> Iterator[WeightBucket | WeightManifest]:
        """Rank 0 yields the weights' buckets and then their manifest; the other ranks take part and yield nothing.
        Raises NotFinite in place of a manifest."""
        for part in publish_weights(self.engine, version, self.rank, self.config.dtype, self.longest, self.rounding):
            yield self._proved(part) if isinstance(part, WeightManifest) else part

    def _proved(self, manifest: WeightManifest) -> WeightManifest:
        if not np.isfinite(manifest.canary_logprobs).all():
            raise not_finite("logprobs of the weights, before they are published", manifest.version - 1)
        return manifest

    def bucket_layout(self) -> tuple[BucketEntries, ...]:
        """What `broadcast` sends."""
        return bucket_layout(self.engine)

    def open_broadcast(self, port: int, size: int) -> None:
        """Wait at `port` for the processes of all replicas; of rank 0 alone. Raises BroadcastBroken."""
        if self.broadcasts:
            self.broadcasts.leave()
        self.broadcasts = BroadcastGroup("0.0.0.0", port, 0, size, self.device)

    def announce(self, version: int) -> WeightManifest:
        """The manifest of the weights as they are, for `broadcast`; every rank takes part. Raises NotFinite."""
        return self._proved(announce_weights(self.engine, version, self.config.dtype, self.longest, self.rounding))

    def broadcast(self) -> None:
        """Send the weights to all replicas of the group, which must be receiving; every rank takes part. Raises
        BroadcastBroken, on rank 0 alone."""
        broadcast_weights(self.engine, self.broadcasts)

    def save(self, folder: str) -> None:
        """Begin to write what is trained and its optimizer state, as they are now; `saved` says when it is done.
        Raises LearnerError inside a step that failed, and NotFinite for weights that nobody can go on from: a
        checkpoint of them would take the place of a good one."""
        if not self.whole:
            found = "a step that failed has changed the weights"
            raise LearnerError("a checkpoint holds the weights of a step's end", found, "continue with --resume")
        if self._over_ranks([float(bool(self.proof) and not forward_is_finite(self.engine, *self.proof))])[0]:
            raise not_finite("logits of the weights, before they are saved", self.version - 1)
        self.writer.begin(self.engine, Path(folder))

    def saved(self) -> Written | None:
        """This rank's files of the last `save`, once they are on the disk; None before. Raises OSError."""
        return self.writer.written()

    def load(self, folder: str) -> None:
        """Continue from `save`, bit for bit where ranks, stage and dtype are the same. Raises CheckpointError."""
        if (Path(folder) / "learner").is_dir():
            self._load_of_deepspeed(folder)
        else:
            self._restore(folder)
        if not self._weights_are_finite():
            raise CheckpointError("a checkpoint's weights are finite numbers", folder, "resume an older one")
        self.whole, self.rounding = True, Rounding()

    def _restore(self, folder: str) -> None:
        """Raises on every rank what one of them found."""
        found: CheckpointError | None = None
        try:
            restore(self.engine, Path(folder))
        except CheckpointError as error:
            found = error
        if self._over_ranks([float(found is not None)])[0]:
            raise found or CheckpointError("a learner's checkpoint is readable", f"{folder}: not by another rank")

    def _load_of_deepspeed(self, folder: str) -> None:
        """Of release 0.5.0 and before: DeepSpeed's own files, for the same ranks, stage and dtype."""
        if self.engine.zero_optimization_stage() == 0 and any(Path(folder).glob("learner/*zero_pp_rank_*")):
            self.restart(sharded=True)  # release 0.5.0 sharded over one rank too
        try:
            path, _ = self.engine.load_checkpoint(folder, tag="learner", load_module_strict=not self.lora)
        except (OSError, EOFError, RuntimeError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                "a learner checkpoint must be whole", f"{folder}: {error}", "resume an older one"
            ) from error
        if path is None:
            raise CheckpointError("a learner checkpoint must be there", f"{folder}: none found")

    def export(self, folder: str) -> None:
        """Write a model folder that transformers loads as it is; rank 0 alone writes. Adapters are merged into it, and
        stand in its `adapter/` as peft loads them."""
        export_model(self.engine, locate_model(self.student), Path(folder), self.rank, self.lora)
