"""One rank of the learner: takes its share of a step, steps the engine with the others, publishes the weights.

A plain class; cluster makes a Ray actor of each rank. Every method is collective: all ranks must call it, in the same
order. The loss of a step is Σ_terms weight · (Σ over all ranks' tokens of the term's token loss) / (the term's own
number of tokens over all ranks), so it depends on neither ranks, micro-batches nor packing.
"""

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed

from ..contracts.config import Learner
from ..contracts.errors import CheckpointError, ConfigError, ModelError
from ..contracts.records import StepPlan, StepReport, Term, WeightBucket, WeightManifest
from ..models.loading import load_causal_lm, load_lm_head, locate_model
from .engine import build_engine, gradient_norm, join_group, learning_rate
from .examples import join
from .loss_head import ChunkedLoss, PackedStudent
from .micro_batch import Selection, collate
from .objective import Objective, Sums
from .parameters import export_model, publish_weights
from .terms import bind_terms
from .terms.base import SIGNALS, Signal


class LearnerWorker:
    """Rank `rank` of `world_size`. `heads`: teacher id → (model, dtype) of each teacher whose exact signal is used."""

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
        device: str = "cpu",
        threads: int = 1,
        master_addr: str = "127.0.0.1",
    ) -> None:
        self.terms = bind_terms(terms)
        self.signals: tuple[Signal, ...] = tuple(s for s in SIGNALS if any(term.signal == s for term in self.terms))
        if "exact" in self.signals and not heads:
            raise ConfigError("an exact divergence needs the teachers' heads", "no heads", "name the teachers")
        torch.set_num_threads(threads)
        self.rank, self.world_size, self.device = rank, world_size, device
        self.config, self.steps, self.student = config, steps, student
        join_group(rank, world_size, master_addr, master_port, device)
        model = load_causal_lm(student, config.dtype, attention="packed", device=device)
        self.heads = {name: load_lm_head(*source).to(device) for name, source in heads.items()}
        for name, head in self.heads.items():
            if len(head) != model.config.vocab_size:
                raise ModelError(
                    "an exact divergence needs a teacher with the student's vocabulary size",
                    f"teacher {name!r} has {len(head)} ids, the student {model.config.vocab_size}",
                    "set the teacher's signal to topk",
                )
        self.engine: Any = build_engine(PackedStudent(model), config, whole_below=model.config.hidden_size)

    def step(self, plan: StepPlan, *batches: pa.RecordBatch) -> StepReport:
        """Train once on this rank's rows of `batches`: rollouts, scores and verdicts, as many of each as `plan` says.

        The report is the same on every rank. Where no token of any rank can be trained, the weights stay as they are.
        """
        started = time.perf_counter()
        micro_batches = join(plan, batches)
        missing = sum(example.scores is None for examples in micro_batches for example in examples)
        selections = [Selection.of(examples, self.signals) for examples in micro_batches]
        local = [sum(s.tokens_with(signal) for s in selections) for signal in self.signals]
        *of_signals, tokens, missing = self._over_ranks([*local, sum(sum(s.counts) for s in selections), missing])
        counts = dict(zip(self.signals, map(int, of_signals), strict=True))
        metrics = {"missing_scores": missing, "learning_rate": learning_rate(plan.step, self.steps, self.config)}
        if tokens:
            metrics |= self._train(selections, counts, int(tokens), metrics["learning_rate"])
        loss = sum(term.weight * metrics.get(f"loss_{term.name}", 0.0) for term in self.terms)
        return StepReport(loss=loss, tokens=int(tokens), seconds=time.perf_counter() - started, metrics=metrics)

    def _train(
        self, selections: list[Selection], counts: dict[Signal, int], tokens: int, rate: float
    ) -> dict[str, float]:
        sums = Sums()
        for i, selection in enumerate(selections):
            batch = collate(selection, self.signals, self.device)
            objective = Objective(self.terms, batch, counts, self.heads, sums)
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
        totals = self._over_ranks([float(total) for total in sums.totals.values()])
        means = sums.means(totals, {**counts, None: tokens})
        return {**means, "grad_norm": float(self.engine.get_global_grad_norm() if norm is None else norm)}

    def _over_ranks(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def publish(self, version: int) -> Iterator[WeightBucket | WeightManifest]:
        """Rank 0 yields the weights' buckets and then their manifest; the other ranks take part and yield nothing."""
        yield from publish_weights(self.engine, version, self.rank, self.config.dtype)

    def save(self, folder: str) -> None:
        """Weights and optimizer state, sharded as they are; `load` needs the same ranks, stage and dtype."""
        self.engine.save_checkpoint(folder, tag="learner")

    def load(self, folder: str) -> None:
        """Continue from `save`, bit for bit. Raises CheckpointError."""
        try:
            path, _ = self.engine.load_checkpoint(folder, tag="learner")
        except (OSError, EOFError, RuntimeError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                "a learner checkpoint must be whole", f"{folder}: {error}", "resume an older one"
            ) from error
        if path is None:
            raise CheckpointError("a learner checkpoint must be there", f"{folder}: none found")

    def export(self, folder: str) -> None:
        """Write a model folder that transformers loads as it is; rank 0 alone writes."""
        export_model(self.engine, locate_model(self.student), Path(folder), self.rank)
