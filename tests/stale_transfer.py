"""The transfer engine as it would be without mending vLLM's CPU build: a tied head keeps its old weights."""

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from tutorloop.models.vllm_transfer import BucketTransfer
from tutorloop.models.vllm_transfer import Extension as Extension


class StaleTransfer(BucketTransfer):
    def _pack_heads(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("stale", StaleTransfer)
