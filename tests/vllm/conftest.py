"""vLLM's own OpenAI server as a process of its own."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import requests

from tutorloop.models.loading import locate_model

START_SECONDS = 180
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Served:
    """A server of the lab's teacher, under the name `model`."""

    url: str
    model: str
    key: str


@contextmanager
def lab_teacher_server(log, max_logprobs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Served(f"http://127.0.0.1:{port}/v1", "lab-teacher", "hush-hush-key")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(locate_model("lab:teacher"))]
    command += ["--served-model-name", served.model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--api-key", served.key]
    command += ["--max-logprobs", str(max_logprobs)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=output, stderr=output)
    try:
        _wait_until_healthy(process, port, log)
        yield served
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=5)


def _wait_until_healthy(process, port, log):
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends and process.poll() is None:
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.2)
    pytest.fail(f"vLLM's server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def http_server(tmp_path_factory):
    """Gives at most 64 ids a position."""
    with lab_teacher_server(tmp_path_factory.mktemp("vllm") / "log", 64) as served:
        yield served


@pytest.fixture(scope="session")
def whole_http_server(tmp_path_factory):
    """Gives the whole vocabulary."""
    with lab_teacher_server(tmp_path_factory.mktemp("vllm") / "log", -1) as served:
        yield served
