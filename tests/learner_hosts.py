"""Ranks of the learner as Ray actors, built, trained and read by tests."""

import socket
import time
from pathlib import Path

import ray
import torch
from parity_reference import OPTIONS, STEPS, TERMS, TRUNCATED

from tutorloop.contracts.arrow import encode
from tutorloop.contracts.config import Learner
from tutorloop.contracts.records import Rollout, StepPlan, TeacherScores, TrainRow, WeightManifest
from tutorloop.learner import checkpoint
from tutorloop.learner.packing import plan_updates
from tutorloop.learner.worker import LearnerWorker
from tutorloop.models.weights import fingerprint, read_bucket


class Host(LearnerWorker):
    """A rank whose process builds one learner after another: starting processes is what would take the time."""

    def __init__(self):
        pass

    def build(self, **kwargs):
        torch.manual_seed(0)
        LearnerWorker.__init__(self, **kwargs)

    def state(self):
        """A digest of the weights that it has and of those that the optimizer has, and of its moments and counts."""
        optimizer = self.engine.basic_optimizer
        own = [getattr(p, "ds_tensor", p) for p in self.engine.module.parameters()]
        own += [p for group in optimizer.param_groups for p in group["params"]]
        own += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return fingerprint((str(i), tensor.detach()) for i, tensor in enumerate(own)), len(own)

    def save_whole(self, folder):
        self.save(folder)
        self.writer.end()
        return self.saved()

    def save_held(self, folder, gate):
        """Its files are not written before the file `gate` is there."""
        real = checkpoint.write_fragments

        def write(file, own):
            while str(file).startswith(folder) and not Path(gate).exists():
                time.sleep(0.01)
            return real(file, own)

        checkpoint.write_fragments = write
        self.save(folder)

    def save_as_before(self, folder):
        """DeepSpeed's own files, as release 0.5.0 wrote them."""
        self.engine.save_checkpoint(folder, tag="learner", exclude_frozen_parameters=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(ranks, cls):
    remote = ray.remote(num_cpus=0.5)(cls)
    return [remote.remote() for _ in range(ranks)]


def call(actors, method, *args):
    return ray.get([getattr(actor, method).remote(*args) for actor in actors])


PORTS = {}


def build(actors, models, student="student", terms=TERMS, correction=TRUNCATED, config=None, **options):
    """A new learner in the group's processes; the group itself, once joined, stays."""
    port = PORTS.setdefault(tuple(actors), free_port())
    kwargs = {
        "world_size": len(actors),
        "master_port": port,
        "student": models[student],
        "heads": {"teacher": (models["teacher"], "fp32")},
        "config": config or Learner(**(OPTIONS | options)),
        "terms": terms,
        "correction": correction,
        "steps": STEPS,
    }
    ray.get([actor.build.remote(rank=rank, **kwargs) for rank, actor in enumerate(actors)])


def batches_of(items):
    """Two rollout batches and two score batches, cut elsewhere and in another order."""
    rollouts = [item.rollout for item in items]
    scores = [item.scores for item in reversed(items) if item.scores is not None]
    return [
        encode(Rollout, rollouts[:3]),
        encode(Rollout, rollouts[3:]),
        encode(TeacherScores, scores[:2]),
        encode(TeacherScores, scores[2:]),
    ]


def rows_of(items):
    """Tokens and credit of each item, in its place in `batches_of`."""
    places = [(0, row) if row < 3 else (1, row - 3) for row in range(len(items))]
    return [
        (len(i.rollout.token_ids), TrainRow(batch=batch, row=row, advantage=i.advantage, weight=i.weight))
        for i, (batch, row) in zip(items, places, strict=True)
    ]


def train(actors, data, steps=range(STEPS), tokens_per_batch=OPTIONS["tokens_per_batch"], updates=1):
    reports = []
    for step in steps:
        batches = [ray.put(batch) for batch in batches_of(data[step])]
        shares = plan_updates(rows_of(data[step]), len(actors), tokens_per_batch, updates)
        common = {"step": step, "version": step, "rollout_batches": 2, "score_batches": 2}
        plans = [StepPlan(updates=share, **common) for share in shares]
        of_ranks = ray.get([actor.step.remote(plan, *batches) for actor, plan in zip(actors, plans, strict=True)])
        assert all(report.metrics == of_ranks[0].metrics for report in of_ranks)
        reports.append(of_ranks[0])
    return reports


def weights_of(actors):
    """Rank 0's parameters by name, and the manifest, streamed as the driver streams them."""
    streams = [actor.publish.options(num_returns="streaming").remote(1) for actor in actors]
    (*buckets, manifest), *others = ([ray.get(ref) for ref in stream] for stream in streams)
    assert not any(others), "rank 0 alone yields"
    parameters = {name: tensor.float() for bucket in buckets for name, tensor in read_bucket(bucket)}
    assert isinstance(manifest, WeightManifest) and manifest.buckets == len(buckets)
    return parameters, manifest
