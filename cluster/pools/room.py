"""Room on the cluster: whether it has what the recipe asks for, and who holds it while a pool waits."""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup, placement_group_table

from ...contracts.errors import ResourceError
from .deaths import ActorState, actor_record, all_actors

QUIET_SECONDS = 3.0  # before the first word: a free cluster places an actor sooner
REPEAT_SECONDS = 30.0
POLL_SECONDS = 0.2
NAMED_HOLDERS = 4
SLACK = 1e-6  # Ray counts in ten-thousandths

Tell = Callable[[str], None]


def say(text: str) -> None:
    """To a person, where no progress is shown."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Need:
    """What one pool asks for: as many replicas, each with `each` (CPU, GPU) on one node, `on_driver_node`: the
    driver's. `split`: several processes share a replica's GPUs."""

    pool: str
    replicas: int
    each: Mapping[str, float]
    on_driver_node: bool = False
    split: bool = False


def check_room(needs: Sequence[Need]) -> None:
    """The cluster must have in total what all ask for, and for each replica a node that can hold it, if not now.

    Raises ResourceError.
    """
    have = ray.cluster_resources()
    for resource in sorted({name for need in needs for name in need.each}):
        asked = [need for need in needs if need.each.get(resource)]
        total = sum(need.replicas * need.each[resource] for need in asked)
        if total > have.get(resource, 0.0) + SLACK:
            parts = " + ".join(f"{need.pool} {need.replicas} × {need.each[resource]:g}" for need in asked)
            found = f"{parts} = {total:g}; the cluster has {have.get(resource, 0.0):g}"
            remedy = f"lower num_{resource.lower()}s or replicas, or join a larger cluster with --address"
            raise ResourceError(f"the cluster has every {resource} that the recipe asks for", found, remedy)
    own = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for need in needs:
        places = [node["Resources"] for node in nodes if not need.on_driver_node or node["NodeID"] == own]
        if not any(all(node.get(name, 0.0) + SLACK >= amount for name, amount in need.each.items()) for node in places):
            largest = max(places, key=lambda node: [node.get(name, 0.0) for name in sorted(need.each, reverse=True)])
            where = "the driver's machine" if need.on_driver_node else "the largest machine"
            found = f"{need.pool} asks for {_amounts(need.each)}; {where} has {_amounts(largest, need.each)}"
            remedy = "lower its num_cpus, num_gpus or tensor_parallel, or use larger machines"
            raise ResourceError("a replica fits on one machine", found, remedy)


def grows() -> bool:
    """Whether Ray has an autoscaler, to which an actor that waits is a wish for a machine. Where it has none, Ray names
    each machine's type after the machine: in its monitor's report, or, with its newer one, in the cluster's state."""
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report")
    if report:
        types = {*(report["active_nodes"] or ()), *(report["idle_nodes"] or ())}
    else:
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        types = {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}
    return not any(name.startswith("node_") for name in types)


def free() -> dict[str, float]:
    """CPUs and GPUs that nobody holds, of all machines; none is named where Ray gets machines for what waits."""
    if grows():
        return {}
    nodes = state.available_resources_per_node().values()
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


async def wait_for_actors(who: str, each: Mapping[str, float], actors: Sequence[Any], tell: Tell) -> None:
    """Return once every actor has its place; meanwhile say what it waits for, and who holds it."""

    def unplaced() -> int:
        records = [actor_record(actor._actor_id.hex()) for actor in actors]
        return sum(
            record is None or (not record.address.worker_id and record.state != ActorState.DEAD) for record in records
        )

    await _wait(f"{who} ({{}} of {len(actors)} replicas)", each, unplaced, tell)


async def wait_for_groups(who: str, each: Mapping[str, float], groups: Sequence[PlacementGroup], tell: Tell) -> None:
    """The same for placement groups."""

    def unplaced() -> int:
        return sum(placement_group_table(group)["state"] != "CREATED" for group in groups)

    await _wait(f"{who} ({{}} of {len(groups)} groups)", each, unplaced, tell)


async def _wait(who: str, each: Mapping[str, float], unplaced: Callable[[], int], tell: Tell) -> None:
    start, told = time.monotonic(), -REPEAT_SECONDS
    while waiting := unplaced():
        now = time.monotonic()
        if now - start >= QUIET_SECONDS and now - told >= REPEAT_SECONDS:
            told = now
            tell(f"{who.format(waiting)} waits for {_amounts(each)}; {_free(each)}; {held_by()}")
        await asyncio.sleep(POLL_SECONDS)


def _free(each: Mapping[str, float]) -> str:
    free = list(state.available_resources_per_node().values())
    if len(free) == 1:
        return f"free: {_amounts(free[0], each)}"
    best = max(free, key=lambda node: [node.get(name, 0.0) for name in each], default={})
    return f"free on the freest of {len(free)} machines: {_amounts(best, each)}"


def held_by() -> str:
    """Who has the cluster's CPUs and GPUs: other jobs by their command, this run by that name."""
    alive = (ActorState.ALIVE, ActorState.PENDING_CREATION)
    held: dict[str, Counter[str]] = {}
    for actor in all_actors():
        if actor.state in alive and actor.address.worker_id:
            own = held.setdefault(actor.job_id.hex(), Counter())
            for name, amount in actor.required_resources.items():
                if name in ("CPU", "GPU"):
                    own[f"{name} by {actor.name or actor.class_name}"] += amount
    jobs = {job["JobID"]: job for job in state.state.job_table()}
    mine = ray.get_runtime_context().get_job_id()
    parts = []
    for job, amounts in sorted(held.items(), key=lambda item: -sum(item[1].values())):
        if not amounts:
            continue
        facts = jobs.get(job, {})
        name = "this run" if job == mine else f"job {job}"
        if job != mine and facts.get("DriverPid"):
            name += f" (pid {facts['DriverPid']} on {facts['DriverIPAddress']}: {str(facts.get('Entrypoint'))[:80]})"
        parts.append(f"{name} has " + ", ".join(f"{amount:g} {what}" for what, amount in amounts.most_common(4)))
    more = f"; and {len(parts) - NAMED_HOLDERS} more" if len(parts) > NAMED_HOLDERS else ""
    return "; ".join(parts[:NAMED_HOLDERS]) + more if parts else "no actor holds any: tasks or placement groups do"


def _amounts(have: Mapping[str, float], names: Iterable[str] | None = None) -> str:
    chosen = have if names is None else {name: have.get(name, 0.0) for name in names}
    shown = {name: amount for name, amount in chosen.items() if amount or names is not None}
    return " and ".join(f"{round(amount, 4):g} {name}" for name, amount in shown.items()) or "a place"
