"""One prompt's way to a server of vLLM and back, asked again when the server was lost."""

import time
from collections.abc import Callable
from typing import Any

from megavlm.base.errors import UserError
from megavlm.config.rollout_section import VllmSettings
from megavlm.data.row import Sample
from megavlm.rollout.engine import Answer, Prompt, Sampling
from megavlm.vllm.client import Client, NotReady, Refused, TooSlow
from megavlm.vllm.wire import packed

_PAUSE = 0.25  # seconds before a prompt is asked again
_WORK = 3.0  # seconds after which a server that says "later" has worked on the prompt
_LOSSES = 3  # how often a server may be lost while it answers the same prompt


def message(prompt: Prompt, sampling: Sampling) -> bytes:
    """What the server is sent of a prompt."""
    sample = prompt.sample
    head = {
        "tokens": sample.input_ids.tolist(),
        "frames": _frames(sample),
        "scale": sample.pixel_scale.tolist(),
        "seeds": prompt.seeds,
        "sampling": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": sampling.stop,
            "stop_strings": sampling.stop_strings,
            "banned": sampling.banned,
        },
    }
    return packed(head, sample.pixels.numpy().tobytes())


def ask(
    client: Client,
    prompt: Prompt,
    sampling: Sampling,
    limits: VllmSettings,
    check: Callable[[], None],
    token: str,
) -> list[Answer]:
    """The answers to a prompt.

    Args:
        client: of the server.
        prompt: the prompt.
        sampling: how to sample.
        limits: how long to wait.
        check: raises what has gone wrong with the servers, if that is known here.
        token: what the versions of this trainer's weights start with.

    Raises:
        UserError: the server refuses the prompt, is too slow, has not been there for too long, is lost each time it
            gets the prompt, or has the weights of another trainer.
        NotReady: the client was closed.
    """
    body, end, losses = message(prompt, sampling), 0.0, 0
    where = f"{prompt.sample.source}: the server of vLLM at {client.url}"
    while True:
        try:
            told = client.post("/generate", body, 60 * limits.request_minutes)
            break
        except Refused as error:
            raise UserError(f"{where} refuses the prompt: {error}") from None
        except TooSlow:
            raise UserError(
                f"{where} has not answered within rollout.vllm.request_minutes = {limits.request_minutes:g}",
                "raise rollout.vllm.request_minutes, or lower rollout.max_sequences or rollout.max_new_tokens",
            ) from None
        except NotReady as error:
            if client.is_closed:
                raise
            check()
            losses += error.was_lost
            if losses == _LOSSES:
                raise UserError(f"{where} was lost {losses} times while it answered this prompt: {error}") from None
            if not end or error.was_lost or error.seconds > _WORK:  # it was there until now
                end = time.monotonic() + 60 * limits.start_minutes
            if time.monotonic() > end:
                raise UserError(
                    f"{where} has not been ready for rollout.vllm.start_minutes = {limits.start_minutes:g}: {error}",
                    "see what that server has printed",
                ) from None
            time.sleep(_PAUSE)
    if not str(told["weights"]).startswith(token):
        raise UserError(f"{where} has the weights of another run", "give each run servers of its own")
    return [_answer(found, sampling) for found in told["answers"]]


def _frames(sample: Sample) -> list[dict[str, int]]:
    """Of each frame what ``inputs.engine_input`` needs."""
    frames, start = [], 0
    if not len(sample.frame_grids):
        return []
    merge = int(sample.frame_grids.prod(dim=1).sum()) // len(sample.visual_positions)  # patches of a visual token
    for (h, w), images in zip(sample.frame_grids.tolist(), sample.frame_images.tolist(), strict=True):
        count = h * w // merge
        places = sample.visual_positions[start : start + count]
        first, start = int(places[0]), start + count
        assert int(places[-1]) == first + count - 1, "the tokens of a frame stand side by side"
        frames.append({"first": first, "tokens": count, "h": h, "w": w, "images": images})
    return frames


def _answer(found: dict[str, Any], sampling: Sampling) -> Answer:
    """See ``VllmEngine`` for the log-probabilities."""
    logprobs = found["logprobs"]
    sampled = [0.0] * len(logprobs) if sampling.temperature == 0 else logprobs
    return Answer(found["tokens"], logprobs, logprobs, sampled, found["finish"])
