"""A vLLM engine run by this process: AsyncLLM on an event loop in a thread of its own, called from any other thread.

vLLM is imported with the first engine, since the default install does not have it. Its engine core is a process beside
this one (and one more for each part of a model that is split). New weights are handed to those processes in anonymous
memory: one copy of a bucket, out of the object store, that ends with this process whatever becomes of it.
"""

import asyncio
import os
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from threading import Thread
from typing import Any, Literal, TypeVar

import numpy as np
import psutil

from ..contracts.config import Lora
from ..contracts.errors import BroadcastBroken, ModelError, RolloutError, TutorloopError, WeightsMismatch
from ..contracts.records import BucketEntries, WeightBucket, WeightManifest
from .loading import load_config, locate_model, stored_parameters, threads_for
from .weight_proof import check_buckets, check_canary

InFlight = Literal["keep", "abort", "wait"]
# A bucket's entries, and its arrays where they do not come by broadcast.
Part = tuple[BucketEntries, Sequence[np.ndarray] | None]
Result = TypeVar("Result")

TRANSFER = ("tutorloop", "tutorloop.models.vllm_transfer.Extension")  # the backend, and what registers it
CANARY_SLACK = {"fp32": 1.0, "bf16": 4.0}  # two engines' bf16 kernels were 0.14 nats apart on sharp random models
CPU_CACHE_BYTES = 2**30
LOGITS_BYTES = 2**30  # of one step's prompt logprobs, float32 [tokens, vocab]; vLLM itself sets nothing aside for them
# One process less, no compilation, and threads where we say; each is needed on CPUs, and means nothing elsewhere.
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


class VllmHost:
    """`model` under vLLM. `concurrent`: most requests that run at a time; `gpu_share`: of each GPU, what is ours.

    `task`: "sample" generates and scores; "score" only scores, with memory kept for the logprobs of long prompts;
    "embed" gives last hidden states. With `lora` the weights it takes are adapters of `model`, run merged.
    Raises ModelError where vLLM cannot load the model.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        device: str = "cpu",
        threads: int = 1,
        tensor_parallel: int = 1,
        gpu_share: float = 1.0,
        concurrent: int = 64,
        task: Literal["sample", "score", "embed"] = "sample",
        lora: Lora | None = None,
    ) -> None:
        threads = threads_for(stored_parameters(model), threads)
        os.environ |= ENVIRONMENT | (CPU_ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)} if device == "cpu" else {})
        self.vocab = int(load_config(model).get_text_config().vocab_size)
        self._slack = CANARY_SLACK[dtype]
        self._numbers = count()
        self._proven, self._scores, self._loading = True, 0, False
        self._broken = False  # a broadcast: nothing runs until a version has been taken in
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        self._idle = asyncio.Condition()
        folder = locate_model(model)
        arguments = {
            "model": str(folder),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
            "tensor_parallel_size": tensor_parallel,
            "max_num_seqs": concurrent + 1,  # the canary never waits for a place
            **_task_arguments(task, device, self.vocab),
        }
        if device == "cpu":
            arguments |= {"kv_cache_memory_bytes": CPU_CACHE_BYTES, "enforce_eager": True}
        else:
            arguments["gpu_memory_utilization"] = 0.9 * gpu_share
        self._init_info = {"model": str(folder), "dtype": dtype, "lora": lora.model_dump() if lora else None}
        try:
            self._llm, self.context = self.run(_start(arguments, self._init_info))
        except Exception as error:  # whatever vLLM raises, the user needs one answer
            found = f"{model}: {type(error).__name__}: {error}"
            raise ModelError("vLLM must load the model", found, "the process's log has its reason") from error
        self.exact_ids = bool(self._llm.vllm_config.use_v2_model_runner)  # it scores ids of the request's choice

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Wait for `work` on the engine's loop; from any thread but its own."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- requests ----

    def sample(self, prompts: Sequence[np.ndarray], parameters: Sequence[Any]) -> list[list[Any]]:
        """Each prompt's outputs: its last, and before it those that an update aborted and that were started again.

        Returns once the weights that made them are proven. Raises WeightsMismatch where they are not.
        """

        async def one(prompt: np.ndarray, own: Any) -> list[Any]:
            outputs = [await self._request(prompt, own)]
            while outputs[-1].outputs[0].finish_reason == "abort":
                outputs.append(await self._request(prompt, own))
            return outputs

        async def all_of_them() -> list[list[Any]]:
            await self._settled()
            found = await asyncio.gather(*map(one, prompts, parameters))
            await self._settled()
            return found

        return self.run(all_of_them())

    def score(self, sequences: Sequence[np.ndarray], parameters: Sequence[Any]) -> list[Any]:
        """The outputs of requests that only read. No update falls between the first and the last of them."""

        async def all_of_them() -> list[Any]:
            await self._settled()
            self._scores += 1
            try:
                return await asyncio.gather(*map(self._request, sequences, parameters))
            finally:
                async with self._idle:
                    self._scores -= 1
                    self._idle.notify_all()

        return self.run(all_of_them())

    async def _request(self, token_ids: np.ndarray, parameters: Any, priority: int = 0) -> Any:
        prompt, name = {"prompt_token_ids": token_ids.tolist()}, str(next(self._numbers))
        if type(parameters).__name__ == "PoolingParams":
            outputs = self._llm.encode(prompt, parameters, name)
        else:
            outputs = self._llm.generate(prompt, parameters, name, priority=priority)
        return [output async for output in outputs][-1]  # the parameters ask for the last alone

    async def _settled(self) -> None:
        """Wait for the end of an update, or of the one after a broadcast that broke. Raises WeightsMismatch where its
        weights could not be proven."""
        async with self._idle:
            await self._idle.wait_for(lambda: not self._loading and not self._broken)
        if not self._proven:
            raise WeightsMismatch("a replica works with proven weights only", "its last load failed")

    # ---- weights ----

    def load_weights(self, buckets: Iterable[WeightBucket], manifest: WeightManifest, in_flight: InFlight) -> None:
        """Take a version in and prove it; `in_flight` says what becomes of running requests. Scores are let finish.

        All that was cached under the old weights is dropped: a kept request reads its tokens again. Raises
        WeightsMismatch, and then nothing is served until a version is proven.
        """
        parts = [(bucket.entries, bucket.arrays) for bucket in check_buckets(buckets, manifest)]
        self.run(self._load(parts, manifest, in_flight))

    def join_broadcast(self, host: str, port: int, first_rank: int, size: int) -> None:
        """Have the engine's processes, the first of which is `first_rank`, join the learner's group, in place of one
        that they were in. Raises BroadcastBroken."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest as Request

        info = {**self._init_info, "group": (host, port, first_rank, size)}
        try:
            self.run(self._llm.init_weight_transfer_engine(Request(init_info=info)))
        except Exception as error:  # the text of what was raised in another process
            raise self._failed_broadcast("the processes of a replica meet the learner", error) from error

    def receive_weights(self, layout: Iterable[BucketEntries], manifest: WeightManifest, in_flight: InFlight) -> None:
        """As `load_weights`, of buckets that the learner broadcasts meanwhile. Raises BroadcastBroken, and then running
        requests stand still, and others wait, until a version has been taken in."""
        self.run(self._load([(entries, None) for entries in layout], manifest, in_flight))

    async def _load(self, parts: Sequence[Part], manifest: WeightManifest, in_flight: InFlight) -> None:
        async with self._idle:
            await self._idle.wait_for(lambda: not self._loading)
            self._loading = True
            await self._idle.wait_for(lambda: not self._scores)
        try:
            self._proven = False
            await self._llm.pause_generation(mode=in_flight, clear_cache=True)
            try:
                self._broken = False
                await self._update(parts, str(manifest.version))
            except BroadcastBroken:
                self._broken = True
                raise
            finally:
                if not self._broken:
                    await self._llm.resume_generation()
            known = replace(  # its memory may hold less than the run's longest sequence, and a token more is made
                manifest,
                canary_ids=manifest.canary_ids[: self.context - 1],
                canary_logprobs=manifest.canary_logprobs[: self.context - 2],
            )
            check_canary(await self._canary(known.canary_ids), known, self._slack)
            self._proven = True
        finally:
            async with self._idle:
                self._loading = False
                self._idle.notify_all()

    async def _update(self, parts: Sequence[Part], version: str) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest as Request

        try:
            await self._llm.start_weight_update()
            for entries, data in parts:
                with nullcontext("") if data is None else _shared(data) as path:
                    await self._llm.update_weights(Request(update_info={"path": path, "entries": entries}))
            await self._llm.finish_weight_update(version)
        except Exception as error:
            rule, broadcast = "vLLM must take the published weights", any(data is None for _, data in parts)
            if broadcast and (self._llm.errored or any(await self._llm.collective_rpc("give_up_broadcast"))):
                raise self._failed_broadcast(rule, error) from error
            raise WeightsMismatch(rule, f"version {version}: {type(error).__name__}: {error}") from error

    def _failed_broadcast(self, rule: str, error: Exception) -> TutorloopError:
        """A replica whose engine has ended is lost."""
        found = f"{type(error).__name__}: {error}"
        if not self._llm.errored:
            return BroadcastBroken(rule, found)
        return RolloutError(rule, f"its engine has ended: {found}").as_lost()

    async def _canary(self, ids: np.ndarray) -> np.ndarray:
        """Logprobs `[C-1]` of each next token, before any other request that waits."""
        output = await self._request(ids, prompt_parameters(0), priority=-1)
        return prompt_logprobs(output, 1)[1][:, 0]

    def close(self) -> None:
        """End the engine's processes."""

        async def shutdown() -> None:
            try:
                self._llm.shutdown()
            except psutil.NoSuchProcess:  # vLLM was about to kill what ended by itself
                for process in self._llm.engine_core.resources.engine_manager.processes:
                    process.kill()
                if self._llm.output_handler:
                    self._llm.output_handler.cancel()

        self.run(shutdown())
        self._llm.shutdown = lambda *_: None  # its destructor would try again, without the modules that it needs
        self._loop.call_soon_threadsafe(self._loop.stop)


def prompt_parameters(top_k: int) -> Any:
    """To read the logprobs of a prompt's tokens, and of the `top_k` likeliest at each place (-1: of all)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=1.0,
        prompt_logprobs=top_k,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def embedding_parameters() -> Any:
    """To read the last hidden states of a prompt."""
    from vllm import PoolingParams

    return PoolingParams(task="token_embed", use_activation=False)


def prompt_logprobs(output: Any, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and logprobs `[L - first, 1 + K]` of a read prompt from its token `first` ≥ 1 on: the token itself, then the
    K likeliest in their order."""
    return flat_logprobs(output.prompt_logprobs[first:], len(output.prompt_token_ids) - first)


def flat_logprobs(found: Any, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and logprobs float32 `[rows, 1 + K]` of vLLM's flat lists, which give every place as many."""
    ids = np.array(found.token_ids, np.int32).reshape(rows, -1)
    return ids, np.array(found.logprobs, np.float32).reshape(ids.shape)


def _task_arguments(task: str, device: str, vocab: int) -> dict[str, Any]:
    # vLLM's CPU build cannot rewind a seeded generator, which it would for a prompt that is read in parts.
    whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2**16} if device == "cpu" else {}
    if task == "embed":
        from vllm.config import PoolerConfig

        pooler = PoolerConfig(task="token_embed", use_activation=False)  # pyright: ignore[reportCallIssue]
        return {"runner": "pooling", "convert": "embed", "pooler_config": pooler, **whole_prompts}
    common: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "scheduling_policy": "priority",
    }
    if task == "score":
        return common | {"max_num_batched_tokens": max(256, min(8192, LOGITS_BYTES // (4 * vocab)))}
    return common | whole_prompts


async def _start(arguments: dict[str, Any], init_info: dict[str, Any]) -> tuple[Any, int]:
    """The engine, and the longest sequence that it takes."""
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            **arguments,
            trust_remote_code=False,
            load_format="safetensors",
            generation_config="vllm",
            max_model_len=-1,  # the model's own, or what the memory allows
            distributed_executor_backend="mp" if arguments["tensor_parallel_size"] > 1 else "uni",
            disable_log_stats=True,
            worker_extension_cls=TRANSFER[1],
            weight_transfer_config=WeightTransferConfig(backend=TRANSFER[0]),
        )
    )
    await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))
    await llm.update_weight_version("0")
    return llm, llm.model_config.max_model_len


@contextmanager
def _shared(arrays: Sequence[np.ndarray]) -> Iterator[str]:
    """Uint8 arrays, one behind the other, where this user's other processes can read them as long as the block
    lasts."""
    descriptor = os.memfd_create("tutorloop-weights")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.writelines(memoryview(array) for array in arrays)  # pyright: ignore[reportArgumentType]
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
