"""What is done to the machine around a run: its memory, disk, folder and clock, and other runs beside it."""

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jobs import Job, actors_of, left_alone

STEPS = 40
STORE = 80 * 2**20  # bytes of an object store; Ray takes no smaller one
IN_A_SMALL_ROOM = 'mount -t tmpfs -o size={mib}m tutorloop-test /dev/shm && exec "$@"'


@contextmanager
def cluster(**head: object) -> Iterator[str]:
    from ray.cluster_utils import Cluster

    one = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        yield str(one.address)
    finally:
        one.shutdown()


def spilled(address: str) -> str:
    """What Ray says of its spilled objects."""
    asked = subprocess.run(["ray", "memory", "--stats-only", "--address", address], capture_output=True, text=True)
    return next((line for line in asked.stdout.splitlines() if line.startswith("Spilled")), asked.stdout + asked.stderr)


def pressure(folder: Path, rng: random.Random) -> str:
    """The object store holds 80 MiB, and somebody else fills it again and again: Ray spills to disk."""
    import ray

    alone = left_alone(folder, STEPS)
    with cluster(num_cpus=4, object_store_memory=STORE) as address:
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
    alone, found = left_alone(folder, STEPS), []
    for mib in (48, 1):
        room = ["unshare", "--mount", "sh", "-c", IN_A_SMALL_ROOM.format(mib=mib), "sh"]
        job = Job(folder / f"room-{mib}", STEPS, within=room)
        job.ends()
        assert job.weights == alone
        found.append(next(line for line in job.text.splitlines() if line.startswith("/dev/shm")))
    return f"said before it starts: “{found[0]}”; the undisturbed weights, twice"


def full_disk(folder: Path, rng: random.Random) -> str:
    """The run folder's disk is full from a random moment on, and has room again later."""
    alone = left_alone(folder, STEPS)
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tutorloop-test", str(place)], check=True)
    try:
        job = Job(place, STEPS)
        job.until(rng.randint(2, STEPS - 10))
        filler = place / "somebody_elses"
        filler.write_bytes(bytes(shutil.disk_usage(place).free - rng.randint(0, 2**20)))
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
    alone = left_alone(folder, STEPS)
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


def clock(folder: Path, rng: random.Random) -> str:
    """The wall clock of all processes jumps by up to a day, forwards and backwards, every few seconds."""
    library = next(Path("/usr/lib").rglob("libfaketime.so.1"), None)
    assert library, "it needs libfaketime (Debian: apt-get install faketime)"
    alone, now = left_alone(folder, STEPS), folder / "now"
    now.write_text("+0")
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(now),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    job, jumps = Job(folder / "jumping", STEPS, env=env), 0
    job.until(2)
    while job.process.poll() is None:
        now.write_text(f"{rng.choice([-86400, -3600, -61, 61, 3600, 86400]):+d}")
        jumps += 1
        time.sleep(rng.uniform(1, 5))
    job.ends()
    assert job.weights == alone
    return f"{jumps} jumps; the undisturbed weights"


def two_runs(folder: Path, rng: random.Random) -> str:
    """Two runs on one cluster, of whose learners and teachers one each is killed: both end as if alone."""
    alone = left_alone(folder, STEPS)
    with cluster(num_cpus=8) as address:
        jobs = [Job(folder / name, STEPS, "--address", address) for name in ("one", "other")]
        for name in ("LearnerWorker", "TeacherWorker"):
            for job in jobs:
                job.until(len(job.rows) + 3)
            rng.choice(actors_of(os.getpid(), name)).kill()
        for job in jobs:
            job.ends()
    assert all(job.weights == alone for job in jobs)
    return "both have the undisturbed weights"
