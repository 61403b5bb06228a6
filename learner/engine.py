"""Bringing a DeepSpeed engine up inside a process that Ray started, and the learning rate.

DeepSpeed reads its place in the group from the environment and picks its accelerator when it is first imported, so the
environment is set first and the import happens here, in a function.
"""

import logging
import math
import os
import warnings
from typing import Any

import torch
from torch import nn

from ..contracts.config import Learner


class SittingAdamW(torch.optim.AdamW):
    """AdamW that can sit an update out: DeepSpeed then clears its gradients, and weights and moments stay."""

    sits_out = False

    def step(self, closure: Any = None) -> Any:
        return None if self.sits_out else super().step(closure)


def join_group(rank: int, world_size: int, master_addr: str, master_port: int, device: str) -> None:
    """Make this process rank `rank` of the group: gloo on the CPU, NCCL on a GPU. Blocks until all ranks are there."""
    place = {
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",  # Ray shows each rank its own devices only
    }
    on_cpu = device == "cpu"
    if on_cpu:
        place["DS_ACCELERATOR"] = "cpu"
    if on_cpu and master_addr in ("127.0.0.1", "localhost"):
        place["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.update(place)
    import deepspeed
    import deepspeed.ops

    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An all-reduce kernel for tensor-parallel inference, which nothing here calls. Left compatible, DeepSpeed would
    # compile it (24 s, g++ needed) when the group starts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", auto_mpi_discovery=False)


def build_engine(module: nn.Module, config: Learner, whole_below: int, sharded: bool = False) -> Any:
    """A DeepSpeed engine around `module` with torch's AdamW. ZeRO-3 leaves parameters of up to `whole_below` whole.

    Frozen parameters stay out of the optimizer. In float32 one rank alone has nothing to shard, and stages 1 and 2
    would hold weights and gradients twice: it runs stage 0, unless it is to be `sharded` as configured.
    """
    import deepspeed

    alone = torch.distributed.get_world_size() == 1
    alone = alone and config.dtype == "fp32" and config.zero_stage < 3 and not sharded
    trained = [p for p in module.parameters() if p.requires_grad]
    options = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    optimizer = SittingAdamW(trained, **options, fused=True)  # in one pass, without arrays of its own
    zero = {
        "stage": 0 if alone else config.zero_stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": whole_below,
    }
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the worker says which backward is the last
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    if alone:
        engine.enable_backward_allreduce = False  # over one rank: it would copy all gradients into one array and back
    if config.zero_stage == 0 and config.dtype == "bf16":
        # DeepSpeed's wrapper of this case allocates Adam's state by a step on zero gradients, and that step would count
        # in the bias correction: the first real update would be 0.73 of its size.
        engine.optimizer.optimizer.state.clear()
    return engine


def learning_rate(step: int, steps: int, config: Learner) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up from 1/warmup_steps of it, then the decay."""
    peak, floor = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    left = 1 - (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.decay == "linear":
        return floor + (peak - floor) * left
    if config.decay == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * (1 - left))) / 2
    return peak


def apply_update(engine: Any, rate: float, moves: bool) -> float:
    """One optimizer step at `rate` on the gradients so far; their norm before clipping.

    Where the norm is not finite nothing was changed, on any rank. Where nothing `moves` (all gradients are 0) neither
    weight decay nor old momentum moves a weight: the update is sat out.
    """
    norm = _gradient_norm(engine)
    if norm is not None and not norm.isfinite():
        return float(norm)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.basic_optimizer.sits_out = not moves
    engine.step()
    if not engine.was_step_applied():
        return math.nan
    return float(engine.get_global_grad_norm() if norm is None else norm)


def _gradient_norm(engine: Any) -> torch.Tensor | None:
    """Of stage 0 in fp32, where DeepSpeed reports none and steps whatever it is: that of the reduced gradients."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        return None
    return nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


@torch.no_grad()
def weights_are_finite(engine: Any) -> bool:
    """Of this rank's weights, or of its partition of them."""
    ends = [torch.stack(getattr(p, "ds_tensor", p).detach().aminmax()) for p in engine.module.parameters()]
    return bool(torch.stack([end.float() for end in ends]).isfinite().all())


@torch.no_grad()
def forward_is_finite(engine: Any, token_ids: torch.Tensor, lengths: torch.Tensor) -> bool:
    """Of packed sequences, each read at its last token: finite weights can be too large to be multiplied with each
    other. All ranks must call it."""
    last = lengths.cumsum(0) - 1
    return bool(engine(token_ids, lengths, last, lambda hidden, head: (hidden @ head.T).isfinite().all()))
