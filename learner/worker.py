"""One rank of the learner: takes its share of a step, steps the engine with the others, publishes the weights.

A plain class; cluster makes a Ray actor of each rank. Every method is collective: all ranks must call it, in the same
order. The loss of an update is Σ_terms weight · (Σ over all ranks' tokens of the term's token loss) / (the term's own
count over all ranks), so it depends on neither ranks, micro-batches nor packing.
"""

import pickle
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed

from ..contracts.config import Learner, Lora
from ..contracts.errors import CheckpointError, ConfigError, ModelError
from ..contracts.records import BucketEntries, Correction, StepPlan, StepReport, Term, WeightBucket, WeightManifest
from ..models.checkpoint import load_lm_head
from ..models.loading import load_causal_lm, locate_model
from ..models.lora import add_adapters
from ..models.weight_broadcast import BroadcastGroup
from .corrections import current_share, effective_share
from .engine import build_engine, gradient_norm, join_group, learning_rate
from .examples import Example, Updates, join
from .foresight import Foresight, Seen
from .head_proof import prove_heads
from .loss_head import ChunkedLoss, PackedStudent
from .micro_batch import Selection, collate
from .objective import Objective, Sums, divisor_of
from .parameters import announce_weights, broadcast_weights, bucket_layout, export_model, publish_weights
from .terms import bind_terms


class LearnerWorker:
    """Rank `rank` of `world_size`. `heads`: teacher id → (model, dtype) of each teacher whose exact signal is used.

    With `lora` only adapters are trained, published and saved; `seed` decides what they start as. `longest`: tokens of
    the run's longest prompt with its longest response, which the canary is to reach.
    """

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
        torch.set_num_threads(threads)
        self.rank, self.world_size, self.device = rank, world_size, device
        self.config, self.steps, self.student, self.correction = config, steps, student, correction
        self.lora, self.seed = lora, seed
        self.broadcasts: BroadcastGroup | None = None
        join_group(rank, world_size, master_addr, master_port, device)
        self.heads = {name: load_lm_head(*source).to(device) for name, source in heads.items()} if exact else {}
        self.unproven, self.longest = frozenset(self.heads), longest
        self.restart()

    def restart(self) -> None:
        """The student's weights as they were at first, and a fresh optimizer."""
        model = load_causal_lm(self.student, self.config.dtype, attention="packed", device=self.device)
        for name, head in self.heads.items():
            if len(head) != model.config.vocab_size:
                raise ModelError(
                    "an exact divergence needs a teacher with the student's vocabulary size",
                    f"teacher {name!r} has {len(head)} ids, the student {model.config.vocab_size}",
                    "set the teacher's signal to topk",
                )
        if self.lora:
            add_adapters(model, self.lora, self.seed)
        self.engine: Any = build_engine(PackedStudent(model), self.config, whole_below=model.config.hidden_size)
        self.foresight = Foresight(self.engine, self.terms, self.correction, self.config.updates_per_step, self.device)

    def step(self, plan: StepPlan, *batches: pa.RecordBatch) -> StepReport:
        """Train on this rank's rows of `batches`: rollouts and scores, as many of each as `plan` says.

        The report is the same on every rank. Where no token of any rank can be trained, the weights stay as they are.
        """
        started = time.perf_counter()
        updates = join(plan, batches)
        self.unproven = prove_heads(self.unproven, self.heads, updates)
        missing = sum(self._lacks_scores(e) for update in updates for batch in update for e in batch)
        rate = learning_rate(plan.step, self.steps, self.config)
        seen = self.foresight.look(updates, plan.version, self._over_ranks, self._from_ranks)
        counts, metrics = self._train(updates, seen, plan.version, rate)
        metrics |= {"missing_scores": self._over_ranks([missing])[0], "learning_rate": rate}
        return StepReport(
            loss=sum(term.weight * metrics.get(f"loss_{term.key}", 0.0) for term in self.terms),
            tokens=counts["trained"],
            rollouts=counts["rollouts"],
            seconds=time.perf_counter() - started,
            metrics=metrics,
            dropped={reason: counts[reason] for reason in ("teacher_refused", "off_policy") if counts[reason]},
            stances=seen.stances,
        )

    def _lacks_scores(self, example: Example) -> bool:
        return any(example.asked_by(term) and not example.has(term) for term in self.terms)

    def _train(self, updates: Updates, seen: Seen, version: int, rate: float) -> tuple[Counter[str], dict[str, float]]:
        """Every update of the step; what was counted, and the metrics over all updates."""
        metrics = dict(seen.metrics)
        sums, counts, norms = Sums(), Counter[str](), []
        for number, update in enumerate(updates):
            selections = [Selection.of(examples, self.terms, seen.rollouts) for examples in update]
            of_update = self._count([example for examples in update for example in examples], selections)
            divisors = self._divisors(of_update)
            counts += of_update + Counter({divisor_of(key): divisor for key, divisor in divisors.items()})
            if of_update["trained"]:
                norms.append(self._update(selections, divisors, version, number / len(updates), rate, sums))
        totals = self._over_ranks([float(total) for total in sums.totals.values()])
        metrics |= sums.means(totals, counts)
        if norms:
            metrics["grad_norm"] = sum(norms) / len(norms)
        if "importance_weight" in metrics:
            share = effective_share(metrics["importance_weight"], metrics.pop("weight_squared"))
            metrics["effective_sample_share"] = share
        return counts, metrics

    def _count(self, examples: list[Example], selections: list[Selection]) -> Counter[str]:
        """Over all ranks: each term's tokens and sequences, the tokens of any term, what the student sampled of them,
        and the rollouts that train, that no teacher served, and that the off-policy correction rejected."""
        local: dict[str, int] = {}
        for term in self.terms:
            counts = [selection.tokens_and_sequences(term.key) for selection in selections]
            local[term.key] = sum(tokens for tokens, _ in counts)
            local[f"sequences of {term.key}"] = sum(sequences for _, sequences in counts)
        chosen = [pair for s in selections for pair in zip(s.examples, s.counts, strict=True)]
        local["trained"] = sum(count for _, count in chosen)
        local["sampled"] = sum(count for example, count in chosen if example.sampled)
        usable = sum(any(e.asked_by(term) and e.has(term) for term in self.terms) for e in examples)
        local["rollouts"] = len(chosen)
        local["teacher_refused"] = len(examples) - usable
        local["off_policy"] = usable - len(chosen)
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

    def _update(
        self, selections: list[Selection], divisors: dict[str, int], version: int, done: float, rate: float, sums: Sums
    ) -> float:
        """One optimizer update; the gradients' norm. `done`: share of the step's updates before it."""

        def share(example: Example) -> float:
            if not example.sampled:
                return 1.0
            return current_share(self.correction.proximal, example.rollout.oldest_version, version, version + done)

        for i, selection in enumerate(selections):
            batch = collate(selection, self.terms, self.device, share)
            objective = Objective(self.terms, batch, divisors, self.heads, self.correction, sums)
            self.engine.set_gradient_accumulation_boundary(i == len(selections) - 1)
            loss = self.engine(
                batch.token_ids,
                batch.lengths,
                batch.rows,
                lambda hidden, head, objective=objective: ChunkedLoss.apply(hidden, head, objective),
            )
            # DeepSpeed averages gradients over ranks; the loss is a sum over them.
            self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        norm = gradient_norm(self.engine)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    def _over_ranks(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def _from_ranks(self, own: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, own)
        return everyone

    def publish(self, version: int) -> Iterator[WeightBucket | WeightManifest]:
        """Rank 0 yields the weights' buckets and then their manifest; the other ranks take part and yield nothing."""
        yield from publish_weights(self.engine, version, self.rank, self.config.dtype, self.longest)

    def bucket_layout(self) -> tuple[BucketEntries, ...]:
        """What `broadcast` sends."""
        return bucket_layout(self.engine)

    def open_broadcast(self, port: int, size: int) -> None:
        """Wait at `port` for the processes of all replicas; of rank 0 alone."""
        self.broadcasts = BroadcastGroup("0.0.0.0", port, 0, size, self.device)

    def announce(self, version: int) -> WeightManifest:
        """The manifest of the weights as they are, for `broadcast`; every rank takes part."""
        return announce_weights(self.engine, version, self.config.dtype, self.longest)

    def broadcast(self) -> None:
        """Send the weights to all replicas, which must be receiving; every rank takes part."""
        broadcast_weights(self.engine, self.broadcasts)

    def save(self, folder: str) -> None:
        """What is trained and its optimizer state, sharded as it is; `load` needs the same ranks, stage and dtype."""
        self.engine.save_checkpoint(folder, tag="learner", exclude_frozen_parameters=True)

    def load(self, folder: str) -> None:
        """Continue from `save`, bit for bit. Raises CheckpointError."""
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
