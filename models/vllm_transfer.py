"""vLLM's side of a weight update: a transfer engine that reads published buckets. It runs in vLLM's own processes.

Weights are reloaded layer by layer, as vLLM does with any checkpoint: where its kernels keep weights repacked, they are
repacked anew. Each process takes its own part of a model that is split.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from ..contracts.config import Lora
from .checkpoint_names import CheckpointNames
from .folders import weight_files
from .loading import DTYPES
from .lora import merge_adapters
from .weight_broadcast import BroadcastGroup, bucket_size, views


class Extension:
    """Named to vLLM as its workers' extension, so that they import this module and know the transfer engine."""

    weight_transfer_engine: "BucketTransfer"
    vllm_config: Any

    def give_up_broadcast(self) -> bool:
        """End an update that failed as if its last bucket had come, so that another can begin. Returns whether this
        process has left the group."""
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.weight_transfer_engine.model, self.weight_transfer_engine.model_config)
        self._weight_update_active = False
        group = self.weight_transfer_engine.broadcasts
        assert group
        broken = group.broken
        group.leave()
        return broken


@dataclass
class ModelInfo(WeightTransferInitInfo):
    """The model as it was loaded; with `lora` (its options) updates are adapters alone.

    `group` is where broadcasts come from: host, port, rank of this replica's first process, size.
    """

    model: str = ""
    dtype: str = "fp32"
    lora: dict[str, Any] | None = None
    group: tuple[str, int, int, int] | None = None


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """One bucket: contracts.records.WeightBucket's entries, and where its bytes lie; "" where they are broadcast."""

    path: str = ""
    entries: list[Any] = field(default_factory=list)


class BucketTransfer(WeightTransferEngine[ModelInfo, BucketInfo]):
    """Loads buckets into vLLM's model. Adapters are gathered, and merged into the base weights at the end."""

    init_info_cls = ModelInfo
    update_info_cls = BucketInfo
    broadcasts: BroadcastGroup | None = None

    def init_transfer_engine(self, init_info: ModelInfo) -> None:
        self.base, self.names, self.dtype = init_info.model, CheckpointNames(init_info.model), DTYPES[init_info.dtype]
        self.lora = Lora(**init_info.lora) if init_info.lora else None
        self.adapters: dict[str, torch.Tensor] = {}
        if init_info.group:
            host, port, first, size = init_info.group
            rank = first + torch.distributed.get_rank()
            if self.broadcasts:
                self.broadcasts.leave()
            self.broadcasts = BroadcastGroup(host, port, rank, size, self.device.type)

    def start_weight_update(self) -> None:
        self.adapters = {}
        initialize_layerwise_reload(self.model)
        self._forget_packing()

    def receive_weights(self, update_info: BucketInfo) -> None:
        entries = tuple((name, dtype, tuple(shape), at) for name, dtype, shape, at in update_info.entries)
        if update_info.path:
            data = torch.from_numpy(np.memmap(update_info.path, np.uint8, "c", shape=(bucket_size(entries),)))
        else:
            data = torch.empty(bucket_size(entries), dtype=torch.uint8, device=self.device)
            assert self.broadcasts, "a replica joins before it receives"
            self.broadcasts.broadcast(data)
        tensors = views(data, entries)
        if self.lora:
            self.adapters.update((name, own.cpu()) for name, own in tensors)
        else:
            self._load(tensor for name, own in tensors for tensor in self.names.of(name, own))

    def finish_weight_update(self) -> None:
        if self.lora:
            self._load(merge_adapters(self._base_weights(), self.adapters, self.lora))
        finalize_layerwise_reload(self.model, self.model_config)
        self._pack_heads()

    def _forget_packing(self) -> None:
        """vLLM's CPU build packs a mixture's experts only as it makes their kernel: have it made anew."""
        if current_platform.is_cpu():
            for layer in self.model.modules():
                method: Any = getattr(layer, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None

    def _pack_heads(self) -> None:
        """vLLM's CPU build runs a packed copy of the head. One tied to the embedding was not loaded, nor packed."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        if current_platform.is_cpu():
            for layer in self.model.modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)  # pyright: ignore

    def shutdown(self) -> None:
        pass

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.model.load_weights(weights)  # pyright: ignore[reportCallIssue] (vLLM's models have it, torch's not)

    def _base_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, one at a time, out of the page cache."""
        for shard in weight_files(self.base, Path(self.base)):
            with safe_open(shard, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, tensors.get_tensor(name).to(self.dtype)


WeightTransferEngineFactory.register_engine("tutorloop", BucketTransfer)
