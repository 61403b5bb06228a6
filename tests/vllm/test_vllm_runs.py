"""Whole runs with vLLM for rollouts and teachers, a teacher behind http, and a shared one.

On a real Ray cluster where weights meet rollouts that run, replicas, parts or ranks are several, or a driver is killed;
else in this process (`train` without an address).
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_qwen3

from tutorloop.cluster import run
from tutorloop.contracts.errors import ConfigError, ResourceError
from tutorloop.contracts.recipe import load_config

ROOT = Path(__file__).parents[2]
SMALL = ["eval.path=", "eval.ood_path=", "eval.every=0", "checkpoint.every=0", "learner.warmup_steps=0"]
VLLM = ["rollout.engine=vllm", "teacher.engine=vllm"]
MARK = f"TUTORLOOP_TEST_{os.getpid()}"
# Of a teacher that is all but certain the servers' float32 leaves no tail to compare.
TOPK = ["teacher.signal=topk", "method_options.top_k=8", "method_options.rest=renormalise"]
ON_RAY = pytest.mark.xdist_group("ray")  # one at a time
LIVE = ["teacher.follows=live", *TOPK]


@pytest.fixture(scope="module", autouse=True)
def marked():
    os.environ[MARK] = "1"  # inherited by every process of a cluster, and by engines
    yield
    del os.environ[MARK]


@pytest.fixture(scope="module")
def address(marked):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


def engine_processes():
    """vLLM's engine cores that came of this module: marked, or of this process."""
    own = {process.pid for process in psutil.Process().children(recursive=True)}
    engines = [p for p in psutil.process_iter(["cmdline", "environ"]) if "VLLM::" in " ".join(p.info["cmdline"] or [])]
    return {p.pid for p in engines if p.pid in own or MARK in (p.info["environ"] or {})}


def train(name, folder, address, *overrides):
    """Two or more steps of a recipe; its steps' rows. No engine outlives it."""
    before = engine_processes()
    config = load_config(ROOT / "recipes" / f"{name}.yaml", [f"output_dir={folder}", *SMALL, *overrides])
    config = config.model_copy(update={"prompts_per_step": 24})
    assert run.train(config, False, address, Console(file=io.StringIO()), local=address is None)
    ends = time.monotonic() + 60
    while engine_processes() - before and time.monotonic() < ends:
        time.sleep(0.5)
    assert not engine_processes() - before
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(math.isfinite(row["loss"]) for row in steps)
    taken, trained = (sum(row["rollouts"][key] for row in steps) for key in ("taken", "trained"))
    assert taken == trained + sum(steps[-1]["dropped"].values())  # nothing is lost
    assert "stale" not in steps[-1]["dropped"]
    return steps


def same_at_first(one, other):
    """Two ways to one step. From the second on a weight or logit that was rounded otherwise may draw another token."""
    assert one[0]["tokens"] == other[0]["tokens"]
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-4)


@ON_RAY
def test_distillation_with_vllm_on_both_sides(tmp_path, address):
    """Asynchronous, with the sampler's own ids; weights arrive while rollouts run."""
    ids = ["teacher.signal=topk", "method_options.support=student", "method_options.top_k=8"]
    steps = train("quickstart", tmp_path / "run", address, *VLLM, *ids, "steps=8", "max_staleness=2")
    assert {row["step"] for row in steps} == set(range(1, 9))
    assert sum(row["loss"] for row in steps[-3:]) < sum(row["loss"] for row in steps[:3])
    assert all("teacher_entropy" in row["learner"] for row in steps)  # the lab's vocabulary is scored whole


SYNCHRONOUS = ["rollout.engine=vllm", "max_staleness=0"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of three steps in this process: its folder, and its steps' rows."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, train("quickstart", folder, None, *SYNCHRONOUS, "steps=3")


@ON_RAY  # where the run is that it is compared with
def test_synchronous_runs_draw_the_same_rollouts_twice(tmp_path, undisturbed):
    """By their seeds alone, whatever replica and company they run in."""
    two = train("quickstart", tmp_path / "run", None, *SYNCHRONOUS, "steps=1", "rollout.replicas=2")
    same_at_first(undisturbed[1], two)


@ON_RAY
@pytest.mark.sweep
@pytest.mark.parametrize("zero", [1, 3])
def test_broadcast_weights_are_those_of_the_object_store(zero, tmp_path, address):
    """Into two replicas, from two ranks that shard the model or do not. The canaries prove every version."""
    overrides = ["rollout.engine=vllm", "rollout.replicas=2", "learner.ranks=2", f"learner.zero_stage={zero}"]
    overrides += ["steps=3", "max_staleness=0"]
    sent = train("quickstart", tmp_path / "sent", address, *overrides, "rollout.transfer=broadcast")
    stored = train("quickstart", tmp_path / "stored", address, *overrides)
    same_at_first(sent, stored)


@contextmanager
def killed_after_a_step(folder):
    """Meanwhile the rollout replicas of a run are killed, once its first step is written down."""
    over, metrics = threading.Event(), folder / "metrics.jsonl"

    def wait():
        while not metrics.is_file() or '"kind": "step"' not in metrics.read_text():
            if over.wait(0.05):
                return
        for process in psutil.process_iter(["cmdline", "environ"]):
            name = " ".join(process.info["cmdline"] or [])
            if name.startswith("ray::RolloutWorker") and MARK in (process.info["environ"] or {}):
                process.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@ON_RAY
def test_a_killed_replica_changes_nothing_where_weights_are_broadcast(tmp_path, undisturbed, address):
    """One that takes its place gets them out of the object store, while the learner waits, and then by broadcast."""
    whole, folder = undisturbed[0], tmp_path / "run"
    with killed_after_a_step(folder):
        killed = train("quickstart", folder, address, *SYNCHRONOUS, "steps=3", "rollout.transfer=broadcast")
    assert json.loads((folder / "summary.json").read_text())["restarts"]["rollout"] == 1
    assert [row["loss"] for row in killed] == [row["loss"] for row in undisturbed[1]]
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (folder, whole))
    assert ours.keys() == theirs.keys() and all(bool((ours[name] == theirs[name]).all()) for name in ours)


@ON_RAY
@pytest.mark.parametrize("transfer", ["broadcast", pytest.param("object_store", marks=pytest.mark.sweep)])
def test_a_student_split_in_two(transfer, tmp_path, address):
    """In a placement group; both parts take the weights of a learner that shards them too, by either way."""
    tiny_qwen3(tmp_path / "student", hidden=128)
    tiny_qwen3(tmp_path / "teacher", hidden=128, seed=1)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f"{role}.model={tmp_path / role}" for role in ("student", "teacher")] + [
        f"data.path={tmp_path / 'data.jsonl'}",
        "rollout.engine=vllm",
        "rollout.tensor_parallel=2",
        f"rollout.transfer={transfer}",
        "rollout.max_new_tokens=12",
        "rollout.num_cpus=0.2",
        "learner.ranks=2",
        "learner.zero_stage=3",
        "teacher.signal=topk",
        "max_staleness=0",
        "steps=3",
    ]
    steps = train("quickstart", tmp_path / "run", address, *overrides)
    assert all(row["learner"]["grad_norm"] > 0 and row["staleness_max"] == 0 for row in steps) and len(steps) == 3


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=ON_RAY)])
def test_a_self_teacher_shares_the_rollout_replicas_of_a_student_with_adapters(engine, tmp_path, request):
    """Under vLLM as actors, whose calls run side by side."""
    address = request.getfixturevalue("address") if engine == "vllm" else None
    engines = [f"rollout.engine={engine}", f"teacher.engine={engine}"]
    lora = ["student.lora.rank=4", "learner.learning_rate=1e-3"]
    shared = train("opsd", tmp_path / "shared", address, *engines, *LIVE, *lora, "teacher.shared=true", "steps=3")
    assert set(shared[0]["pools"]) == {"rollout", "verifier", "learner"}
    assert any(row["learner"]["grad_norm"] > 0 for row in shared)


def test_a_live_teacher_under_vllm_in_a_pool_of_its_own(tmp_path):
    """By the same weights it says the same as one under transformers."""
    overrides = [*LIVE, "steps=2", "max_staleness=0"]
    vllm = train("opsd", tmp_path / "vllm", None, *overrides, "teacher.engine=vllm")
    same_at_first(vllm, train("opsd", tmp_path / "transformers", None, *overrides))


@pytest.mark.xdist_group("http_server")
def test_a_teacher_behind_http(tmp_path, http_server, monkeypatch):
    monkeypatch.setenv("LAB_KEY", http_server.key)
    at = [f"teacher.urls=[{http_server.url}]", f"teacher.model={http_server.model}", "teacher.api_key_env=LAB_KEY"]
    signal_ = ["teacher.engine=http", *TOPK]
    over_http = train("quickstart", tmp_path / "http", None, *at, *signal_, "steps=2", "max_staleness=0")
    here = train("quickstart", tmp_path / "here", None, *TOPK, "steps=2", "max_staleness=0")
    same_at_first(over_http, here)
    for one, other in zip(over_http, here, strict=True):
        assert "teacher_entropy" in other["learner"] and "teacher_entropy" not in one["learner"]
    assert http_server.key not in "".join(path.read_text() for path in (tmp_path / "http").glob("*.*"))


@pytest.mark.xdist_group("http_server")
@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["method_options.top_k=65"], "65; 64"),
        (["teacher.signal=exact"], "sampled and the topk"),
        (["teacher.model=another"], "another"),
        (["teacher.api_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["teacher.urls=[http://127.0.0.1:9/v1]", "teacher.timeout_seconds=2"], "127.0.0.1:9"),
    ],
)
def test_a_server_that_cannot_do_it_is_refused_before_the_run(overrides, rule, tmp_path, http_server, monkeypatch):
    monkeypatch.setenv("LAB_KEY", http_server.key)
    at = [f"teacher.urls=[{http_server.url}]", f"teacher.model={http_server.model}", "teacher.api_key_env=LAB_KEY"]
    own = [f"output_dir={tmp_path / 'run'}", "teacher.engine=http", "teacher.signal=topk", *at]
    config = load_config(ROOT / "recipes" / "quickstart.yaml", [*own, *overrides])
    with pytest.raises((ConfigError, ResourceError)) as caught:
        run.train(config, False, "127.0.0.1:1", Console(file=io.StringIO()))  # no cluster is asked
    assert rule in str(caught.value) and http_server.key not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.sweep  # the same death in one process: tests/ray/test_command.py
@ON_RAY
def test_a_killed_driver_leaves_nothing_behind(tmp_path):
    """Neither engines nor actors, nor the Ray that it had started."""
    mark = f"TUTORLOOP_KILLED_{os.getpid()}"

    def left():
        marked = psutil.process_iter(["environ", "cmdline"])
        return {p.pid: " ".join(p.info["cmdline"] or [])[:80] for p in marked if mark in (p.info["environ"] or {})}

    command = [str(Path(sys.executable).with_name("tutorloop")), "train", str(ROOT / "recipes" / "quickstart.yaml")]
    command += [f"output_dir={tmp_path / 'run'}", *SMALL, "rollout.engine=vllm", "steps=10000"]
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": "", mark: "1"})
    ends = time.monotonic() + 180
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and "VLLM::" in "".join(left().values())):
        assert driver.poll() is None and time.monotonic() < ends, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    ends = time.monotonic() + 30
    while left() and time.monotonic() < ends:
        time.sleep(0.5)
    assert not left()
