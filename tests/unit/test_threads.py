"""How many threads a model gets: chosen from the machine and from who works at once."""

import os

import pytest
import torch
from tiny import tiny_model

from tutorloop.cluster.pools import threads
from tutorloop.contracts.config import Config
from tutorloop.models import loading

PLAIN = {"method": "opd", "output_dir": "run", "steps": 1, "prompts_per_step": 4, "student": {"model": "lab:student"}}


def config(**sections) -> Config:
    return Config.model_validate(
        {**PLAIN, "data": {"path": "lab:train"}, "teacher": {"model": "lab:teacher"}, **sections}
    )


@pytest.fixture
def sixteen(monkeypatch):
    nodes = [
        {"Alive": True, "Resources": {"CPU": 32.0}},
        {"Alive": True, "Resources": {"CPU": 16.0}},
        {"Alive": True, "Resources": {"memory": 1.0}},  # a head that runs nothing
        {"Alive": False, "Resources": {"CPU": 2.0}},
    ]
    monkeypatch.setattr(threads.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(threads.ray, "is_initialized", lambda: True)


def test_pools_that_take_turns_have_the_machine_each(sixteen):
    own = config(max_staleness=0, rollout={"replicas": 3}, teacher={"model": "lab:teacher", "replicas": 2})
    assert threads.threads_of(own, own.rollout) == 5
    assert threads.threads_of(own, own.teacher) == 8
    assert threads.threads_of(own, own.learner) == 16


def test_pools_that_work_at_once_share_it(sixteen):
    own = config(max_staleness=1, rollout={"replicas": 2}, learner={"ranks": 2})
    assert threads.threads_of(own, own.rollout) == threads.threads_of(own, own.learner) == 16 // 5
    reserved = config(max_staleness=1, rollout={"replicas": 2, "num_cpus": 6})
    assert threads.threads_of(reserved, reserved.rollout) == 6


def test_a_pool_on_gpus_has_what_it_reserves_and_takes_no_share(sixteen):
    own = config(max_staleness=1, rollout={"num_gpus": 1, "num_cpus": 2}, learner={"num_gpus": 1})
    assert threads.threads_of(own, own.rollout) == 2
    assert threads.threads_of(own, own.learner) == 1
    assert threads.threads_of(own, own.teacher) == 16


def test_a_small_model_has_one_thread(monkeypatch):
    model, before = tiny_model("qwen3", seed=0), torch.get_num_threads()
    parameters = sum(p.numel() for p in model.parameters())
    try:
        loading.use_threads(model, 2)
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(loading, "THREADED_PARAMETERS", parameters)
        loading.use_threads(model, 2)
        assert torch.get_num_threads() == min(2, len(os.sched_getaffinity(0)))
        assert loading.threads_for(parameters, 10**6) == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_a_models_size_is_read_from_its_headers():
    model = loading.load_causal_lm("lab:student")
    assert loading.stored_parameters("lab:student") == sum(p.numel() for p in model.parameters())
