"""Take in a published version of the weights, and prove that it is the learner's.

A replica (a generator, or a teacher that follows the student) is believed only when it holds every published parameter
under its own name, its own bytes give the learner's fingerprint, and its own forward gives the learner's logprobs of
the canary prompt. The last one finds what the first two cannot: a head left stale by tied weights, an engine that keeps
a second copy of a layer.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from ..contracts.errors import WeightsMismatch
from ..contracts.records import WeightBucket, WeightManifest
from .weights import fingerprint, read_bucket

BLOCK = 32  # tokens of the canary
RESTART = "restart the replica; if it repeats, student.model and the learner's model differ"


@torch.no_grad()
def copy_buckets(
    parameters: Mapping[str, torch.Tensor], buckets: Iterable[WeightBucket], manifest: WeightManifest
) -> None:
    """Copy `buckets` into `parameters` and compare their fingerprint, in published order. Raises WeightsMismatch."""
    order: list[str] = []
    count = 0
    for count, bucket in enumerate(buckets, 1):  # noqa: B007 (the count is used below)
        if bucket.version != manifest.version:
            raise WeightsMismatch("buckets and manifest are one version", f"{bucket.version} and {manifest.version}")
        for name, tensor in read_bucket(bucket):
            _copy(parameters, name, tensor)
            order.append(name)
    if count != manifest.buckets:
        raise WeightsMismatch("a version comes with all its buckets", f"{count} of {manifest.buckets}", RESTART)
    missing = sorted(set(parameters) - set(order))
    if missing:
        raise WeightsMismatch("every parameter is published", f"missing {', '.join(missing)}", RESTART)
    own = fingerprint((name, parameters[name]) for name in order)
    if own != manifest.fingerprint:
        found = f"{own} here, {manifest.fingerprint} published for version {manifest.version}"
        raise WeightsMismatch("a replica's weights have the published fingerprint", found, RESTART)


def _copy(parameters: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    if name not in parameters:
        raise WeightsMismatch("a published parameter exists in the replica", f"unknown {name}", RESTART)
    own = parameters[name]
    if own.shape != tensor.shape or own.dtype != tensor.dtype:
        found = f"{name}: {own.dtype} {list(own.shape)} here, {tensor.dtype} {list(tensor.shape)} published"
        raise WeightsMismatch("parameters have one shape and dtype on both sides", found, RESTART)
    own.copy_(tensor)


def check_buckets(buckets: Iterable[WeightBucket], manifest: WeightManifest) -> list[WeightBucket]:
    """The buckets of one version, whole and unchanged on their way. Raises WeightsMismatch."""
    received = list(buckets)
    for bucket in received:
        if bucket.version != manifest.version:
            raise WeightsMismatch("buckets and manifest are one version", f"{bucket.version} and {manifest.version}")
    if len(received) != manifest.buckets:
        raise WeightsMismatch("a version comes with all its buckets", f"{len(received)} of {manifest.buckets}", RESTART)
    own = fingerprint(pair for bucket in received for pair in read_bucket(bucket))
    if own != manifest.fingerprint:
        found = f"{own} here, {manifest.fingerprint} published for version {manifest.version}"
        raise WeightsMismatch("a version's bytes have the published fingerprint", found, RESTART)
    return received


def canary_gaps(own: np.ndarray, published: np.ndarray) -> np.ndarray:
    """How far apart two readings of a canary are, nats `[C-1]`.

    Of the first tokens each is compared, of those beyond the mean of every BLOCK: what is wrong at a length is wrong
    from there on, and the largest of thousands of rounding errors says nothing.
    """
    gaps = np.abs(own.astype(np.float64) - published)
    each = min(BLOCK - 1, len(gaps))
    gaps[each:] = [gaps[at : at + BLOCK].mean() for at in range(each, len(gaps), BLOCK) for _ in gaps[at : at + BLOCK]]
    return gaps


def check_canary(own: np.ndarray, manifest: WeightManifest, slack: float = 1.0) -> None:
    """Compare this replica's canary logprobs `[C-1]` with the learner's; `slack` widens the published tolerance.

    Raises WeightsMismatch.
    """
    if own.shape != manifest.canary_logprobs.shape:
        raise WeightsMismatch(
            "a canary of C ids has C-1 logprobs", f"{own.shape} here, {manifest.canary_logprobs.shape} published"
        )
    gaps = canary_gaps(own, manifest.canary_logprobs)
    worst = int(gaps.argmax())
    if not gaps[worst] <= slack * manifest.tolerance:  # so that a NaN is a mismatch too
        found = (
            f"version {manifest.version}, canary token {worst + 1} of {len(gaps) + 1}: {own[worst]:.6f} here, "
            f"{manifest.canary_logprobs[worst]:.6f} by the learner, tolerance {slack * manifest.tolerance:g} nats"
        )
        raise WeightsMismatch("a replica scores the canary prompt as the learner does", found, RESTART)
