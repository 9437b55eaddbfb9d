"""Makes the engine that the settings name, with conversations if there is an environment."""

from collections.abc import Callable, Sequence

from megavlm.base.errors import UserError
from megavlm.base.stop_signals import is_leaving
from megavlm.config.requirements import required
from megavlm.data.renderer import Renderer
from megavlm.environments.messages import Messages
from megavlm.environments.pool import EnvironmentPool
from megavlm.rollout.builtin import BuiltinEngine
from megavlm.rollout.conversations import Conversations
from megavlm.rollout.engine import Engine
from megavlm.runtime.session import Session
from megavlm.training.step import raise_everywhere
from megavlm.vllm.of_session import vllm_engine


def make_engine(
    session: Session,
    *,
    decode: Callable[[list[int]], str] | None = None,
    special: Sequence[int] = (),
    records_routing: bool = False,
) -> Engine:
    """The engine of the section ``rollout``. Call it on all ranks.

    Args:
        session: the session of the run.
        decode: returns the text of tokens; only needed for stop strings.
        special: tokens that are not part of an answer's text.
        records_routing: whether answers have their ``routing``; only for a mixture of experts.

    Raises:
        UserError: a server of vLLM does not start or does not fit.
    """
    settings = session.settings
    if settings.rollout.engine == "vllm":
        assert not records_routing, "check_sampling refuses it"
        return vllm_engine(session, required(settings.output, "output") / "vllm")
    return BuiltinEngine(
        session.vlm,
        places=settings.rollout.max_sequences,
        cache_gib=settings.rollout.cache_gib,
        cache_setting="rollout.cache_gib",
        prompt_tokens=settings.data.seq_length,
        chunk_tokens=settings.train.logprob_chunk_tokens,
        batch_invariant=settings.rollout.batch_invariant,
        decode=decode,
        special=special,
        records_routing=records_routing,
        leaves=is_leaving,
    )


def in_turns(session: Session, engine: Engine, renderer: Renderer | None) -> Engine:
    """The engine or, with an environment, one that lets answers have several turns. Call it on all ranks."""
    settings = session.settings.environment
    if settings.python is None:
        return engine
    pool, messages, problem = None, None, None
    if renderer is not None:
        try:
            messages = Messages(renderer, settings.role)
            pool = EnvironmentPool(settings)
        except UserError as error:
            problem = error
    raise_everywhere(problem, problem is not None, session.groups)
    return Conversations(
        engine,
        pool,
        messages,
        max_turns=settings.max_turns,
        max_tokens=session.settings.answer_tokens,
        max_patches=session.settings.data.max_patches_per_row,
        group=session.groups.world_host,
    )
