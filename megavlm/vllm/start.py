"""Starts vLLM's engine inside the server. It runs in the environment of vLLM."""

import os
from pathlib import Path
from typing import Any

import torch
from vllm import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from megavlm.vllm.wire import SERVER, TRANSPORT

_IN_ENGINE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"  # the worker in the engine's process


def start_engine(model: Path, arguments: dict[str, Any]) -> AsyncLLM:
    """Starts vLLM's engine.

    Args:
        model: Hugging Face folder, whose weights are not read.
        arguments: of the engine, as ``environment.engine_arguments``.
    """
    os.environ[SERVER] = str(os.getpid())
    is_cpu = current_platform.is_cpu()
    if is_cpu:  # vLLM would compile for a minute, and start two interpreters, which import everything again
        # Of a prompt that is read in parts, vLLM takes back the random numbers that it has drawn too early, which its
        # generators cannot do on a CPU.
        whole = {"enable_chunked_prefill": False}
        arguments = {"enforce_eager": True, "distributed_executor_backend": _IN_ENGINE, **whole, **arguments}
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # for processes to come
        torch._dynamo.config.disable = True  # for this one, and for those that are forked off it
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # it would bind every server to the same cores
        if arguments.get("tensor_parallel_size", 1) > 1:
            arguments.pop("distributed_executor_backend")
    settings = AsyncEngineArgs(
        model=str(model),
        weight_transfer_config={"backend": TRANSPORT},
        worker_extension_cls="megavlm.vllm.worker.Extension",
        **arguments,
    ).create_engine_config()
    if is_cpu:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    return AsyncLLM.from_vllm_config(settings)
