"""What is done to the machine around a run: its memory, disk, folder and clock, and other runs beside it."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import ray
from jobs import SLOW_TEACHER, Job, actors_of, left_alone
from ray.cluster_utils import Cluster

RAY = str(Path(sys.executable).with_name("ray"))
STEPS = 40
NO_COMMANDS = [f"{who}setup_commands" for who in ("", "head_", "worker_")] + [
    *("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
]
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # for the commands to know each other
FAKE_MACHINES = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")  # of one address
DAY = 86_400  # seconds
STORE = 80 * 2**20  # bytes of an object store; Ray takes no smaller one
IN_A_SMALL_ROOM = 'mount -t tmpfs -o size={mib}m tutorloop-test /dev/shm && exec "$@"'


@contextmanager
def cluster(**head: object) -> Iterator[Cluster]:
    one = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        yield one
    finally:
        one.shutdown()


def spilled(address: str) -> str:
    """What Ray says of its spilled objects."""
    asked = subprocess.run([RAY, "memory", "--stats-only", "--address", address], capture_output=True, text=True)
    return next((line for line in asked.stdout.splitlines() if line.startswith("Spilled")), asked.stdout + asked.stderr)


def pressure(folder: Path, rng: random.Random) -> str:
    """The object store holds 80 MiB, and somebody else fills it again and again: Ray spills to disk."""
    alone = left_alone(STEPS)
    with cluster(num_cpus=4, object_store_memory=STORE) as one:
        address = str(one.address)
        ray.init(address, log_to_driver=False)
        over, kept = threading.Event(), []

        def fill() -> None:
            while not over.wait(rng.uniform(0.05, 0.5)):
                kept.append(ray.put(np.ones(rng.randint(1, 12) * 2**20, np.uint8)))
                while len(kept) > 30:
                    kept.pop(rng.randrange(len(kept)))

        filling = threading.Thread(target=fill)
        filling.start()
        try:
            job = Job(folder / "pressed", STEPS, "--address", address)
            job.ends()
            said = spilled(address)
        finally:
            over.set()
            filling.join()
            kept.clear()
            ray.shutdown()
    assert said.startswith("Spilled"), said
    assert job.weights == alone
    return f"{said}; the undisturbed weights"


def shared_memory(folder: Path, rng: random.Random) -> str:
    """`/dev/shm` has 48 MiB, then 1 MiB."""
    alone, found = left_alone(STEPS), []
    for mib in (48, 1):
        room = ["unshare", "--mount", "sh", "-c", IN_A_SMALL_ROOM.format(mib=mib), "sh"]
        job = Job(folder / f"room-{mib}", STEPS, within=room)
        job.ends()
        assert job.weights == alone
        found.append(next(line for line in job.text.splitlines() if line.startswith("/dev/shm")))
    return f"said before it starts: “{found[0]}”; the undisturbed weights, twice"


def full_disk(folder: Path, rng: random.Random) -> str:
    """The run folder's disk is full from a random moment on, and has room again later."""
    alone = left_alone(STEPS)
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tutorloop-test", str(place)], check=True)
    try:
        job = Job(place, STEPS)
        job.until(rng.randint(2, STEPS - 10))
        filler = place / "somebody_elses"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        said, reached = job.fails(), len(job.rows)
        filler.unlink()
        job.again()
        job.ends()
        assert job.weights == alone
    finally:
        subprocess.run(["umount", str(place)], check=True)
    return f"after step {reached}: “{said}”; then, with --resume auto, the undisturbed weights"


def read_only(folder: Path, rng: random.Random) -> str:
    """Nothing can be made in the run's folder any more, from a random moment on; later it can."""
    alone = left_alone(STEPS)
    job = Job(folder / "readable", STEPS)
    job.until(rng.randint(2, STEPS - 10))
    places = [str(place) for place in (job.folder / "checkpoints", job.folder) if place.is_dir()]
    subprocess.run(["chattr", "+i", *places], check=True)
    try:
        said, reached = job.fails(), len(job.rows)
    finally:
        subprocess.run(["chattr", "-i", *places], check=True)
    job.again()
    job.ends()
    assert job.weights == alone
    return f"after step {reached}: “{said}”; then, with --resume auto, the undisturbed weights"


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static long long *shift;
__attribute__((constructor)) static void begin(void) {
  const char *name = getenv("CLOCK_SHIFT");
  int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
  void *there = file < 0 ? MAP_FAILED : mmap(0, sizeof *shift, PROT_READ, MAP_SHARED, file, 0);
  shift = there == MAP_FAILED ? 0 : there;
}
int clock_gettime(clockid_t id, struct timespec *out) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(id, out);
  if (!failed && shift && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) out->tv_sec += *shift;
  return failed;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
  struct timespec now;
  int failed = clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec, out->tv_usec = now.tv_nsec / 1000;
  return failed;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""  # libfaketime, which would do, breaks Python's sleep


def clock(folder: Path, rng: random.Random) -> str:
    """The wall clock of all processes, Ray's own among them, jumps by up to a day, to and fro, every few seconds."""
    alone, now, library = left_alone(STEPS), folder / "now", folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "-xc", "-"], input=CLOCK, text=True, check=True)
    env = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(now)}
    now.write_bytes(DAY.to_bytes(8, sys.byteorder))
    shown = subprocess.run(["date", "+%s"], env={**os.environ, **env}, capture_output=True, text=True, check=True)
    assert int(shown.stdout) > time.time() + DAY - 60, "the clock does not jump"
    now.write_bytes(bytes(8))
    job, jumps = Job(folder / "jumping", STEPS, env=env), 0
    job.until(2)
    while job.process.poll() is None:
        with now.open("r+b") as file:
            file.write(rng.choice([-DAY, -3600, -61, 0, 61, 3600, DAY]).to_bytes(8, sys.byteorder, signed=True))
        jumps += 1
        time.sleep(rng.uniform(1, 5))
    job.ends()
    assert job.weights == alone
    return f"{jumps} jumps; the undisturbed weights"


def two_runs(folder: Path, rng: random.Random) -> str:
    """Two runs on one cluster, of whose learners and teachers one each is killed: both end as if alone."""
    alone = left_alone(STEPS)
    with cluster(num_cpus=8) as one:
        jobs = [Job(folder / name, STEPS, "--address", str(one.address)) for name in ("one", "other")]
        for name in ("LearnerWorker", "TeacherWorker"):
            for job in jobs:
                job.until(len(job.rows) + 3)
            rng.choice(actors_of(os.getpid(), name)).kill()
        for job in jobs:
            job.ends()
    assert all(job.weights == alone for job in jobs)
    return "both have the undisturbed weights"


def nodes(folder: Path, rng: random.Random) -> str:
    """A node with half of the replicas is killed, and later another one joins."""
    small = [f"{pool}.num_cpus=0.5" for pool in ("rollout", "teacher", "learner")]
    wide = ["rollout.replicas=2", "teacher.replicas=2", "verifier.num_cpus=0.3", *small]
    with cluster(num_cpus=3) as one:  # of the same replicas, for their CPUs decide last bits, and in time tokens
        alone = Job(folder / "alone", STEPS, "--address", str(one.address), *wide)
        alone.ends()
    with cluster(num_cpus=2) as both:
        other = both.add_node(num_cpus=1)
        job = Job(folder / "moved", STEPS, "--address", str(both.address), *wide)
        job.until(rng.randint(4, 9))
        lost = [_kind(process) for process in _actors_on(other)]
        assert lost, "nothing runs on the node"
        both.remove_node(other, allow_graceful=False)
        gone, reached = time.monotonic(), len(job.rows)
        job.until(reached + 2)  # the first may have been learnt already
        pause = time.monotonic() - gone
        another = both.add_node(num_cpus=1)
        came = time.monotonic()
        job.wait(lambda: sorted(map(_kind, _actors_on(another))) == sorted(lost))
        taken = time.monotonic() - came
        job.ends()
    assert job.weights == alone.weights
    return (
        f"{' and '.join(sorted(lost))} lost; two steps within {pause:.0f} s of the death; both run on the new node "
        f"{taken:.0f} s after it came; the undisturbed weights"
    )


def grown(folder: Path, rng: random.Random) -> str:
    """One step ahead, a full machine under Ray's own autoscaler: that of the run wants more teachers."""
    small = [f"{pool}.num_cpus={cpus}" for pool, cpus in (("rollout", 0.5), ("teacher", 0.5), ("learner", 0.5))]
    with growing_cluster(folder, head=2, other=1) as (address, ray_itself):
        more = ["verifier.num_cpus=0.3", *small, *SLOW_TEACHER, "autoscale.cpus=2.3", "max_staleness=1"]
        job = Job(folder / "grown", STEPS, "--address", address, *more, env=NO_TOKEN)
        job.until(2)
        begun = time.monotonic()

        def elsewhere() -> list[psutil.Process]:
            raylets = [one for one in ray_itself.children(recursive=True) if one.name() == "raylet"]
            return [own for raylet in raylets[1:] for own in actors_of(raylet.pid, "TeacherWorker")]

        job.wait(lambda: bool(elsewhere()))
        came, reached = time.monotonic() - begun, len(job.rows)
        job.ends()
    before, after = (
        median(row["seconds"]["total"] for row in rows) for rows in (job.rows[1:3], job.rows[reached + 5 :])
    )
    assert after < before, (before, after)
    return f"a teacher on a machine that came, {came:.0f} s after step 2; {before:.1f} s a step, then {after:.1f}"


@contextmanager
def growing_cluster(folder: Path, head: int, other: int) -> Iterator[tuple[str, psutil.Process]]:
    """A cluster of one machine, to which Ray's autoscaler adds others of `other` CPUs, all of them here."""
    node = {"node_config": {}, "min_workers": 0}
    known = {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": 1,
        "provider": {"type": "fake_multinode", **dict.fromkeys(FAKE_MACHINES, True)},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**node, "resources": {"CPU": head}, "max_workers": 0},
            "other": {**node, "resources": {"CPU": other}, "max_workers": 2},
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in NO_COMMANDS},
    }
    config = folder / "cluster.yaml"
    config.write_text(json.dumps(known))
    command = [RAY, "start", "--head", "--block", "--port=6379", f"--num-cpus={head}", "--include-dashboard=false"]
    command += [f"--autoscaling-config={config}", f"--temp-dir={folder / 'ray'}"]
    env = {**os.environ, **NO_TOKEN, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (folder / "ray.log").open("w") as log:
        block = psutil.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        address = "127.0.0.1:6379"  # where Ray's machines of this kind look for it
        end = time.monotonic() + 60
        while subprocess.run([RAY, "status", "--address", address], capture_output=True, env=env).returncode:
            assert block.poll() is None and time.monotonic() < end, (folder / "ray.log").read_text()
        yield address, block
    finally:
        own = [block]
        with suppress(psutil.Error):
            own += block.children(recursive=True)
        for process in own:
            with suppress(psutil.Error):
                process.kill()
        block.wait()


def _actors_on(node: object) -> list[psutil.Process]:
    (raylet,) = node.all_processes["raylet"]  # pyright: ignore[reportAttributeAccessIssue]
    return actors_of(raylet.process.pid)


def _kind(process: psutil.Process) -> str:
    return process.cmdline()[0].removeprefix("ray::").partition(".")[0]
