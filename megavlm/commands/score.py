"""`megavlm score`: log-probabilities of all target tokens of a data file, or the scores of a reward model."""

import torch

from megavlm.base.errors import UserError
from megavlm.checkpoint.load_weights import has_score_head, shapes_at_start
from megavlm.config.settings import Settings
from megavlm.convert.adapter import Adapter
from megavlm.data.renderer import Renderer
from megavlm.runtime.evaluation import Evaluation
from megavlm.runtime.feed import Window
from megavlm.runtime.forward import encode_window, logprobs_of, scores_of
from megavlm.runtime.scoring import fill_rows, sample_scores
from megavlm.runtime.session import start
from megavlm.runtime.weights import choose, tell


def main(settings: Settings, reward: bool = False) -> int:
    """Writes ``scores.jsonl`` for ``data.eval`` in file order.

    A line has ``index``, ``sample``, ``question``, ``media``, ``reference``, for an answer of a pair also ``side``
    (see ``EvalSamples``), and ``logprobs``, ``sum``, ``tokens`` or ``score``. What was loaded is in ``scores.json``.

    Args:
        settings: the settings of the run.
        reward: write the score of a reward model at the last target token of each sample.

    Raises:
        UserError: with ``reward``, the checkpoint has no reward head.
    """
    settings, weights = choose(settings)
    model, data = settings.model, settings.data
    if reward and model.adapter is not None:
        scored = Adapter(model.adapter, shapes_at_start(model)).reward_head is not None
    else:
        scored = not reward or has_score_head(weights.load)
    if not scored:
        raise UserError(f"{weights} has no reward head", "use a checkpoint of megavlm rm, or leave out --reward")
    session = start(settings, training=False, score_head=reward)
    tell(weights, session)
    renderer = Renderer(model.hf, data, settings.pad_multiple)
    evaluation = Evaluation(session, weights, renderer, "scores.jsonl", "tune", {"score": {"reward": reward}})

    def compute(window: Window) -> list[dict]:
        with torch.no_grad():
            encode_window(session.vlm, window)
        micro_batch = window.micro_batches[0]
        if reward:
            values = scores_of(session.vlm, micro_batch).tolist()
            return [{"index": i, "score": v} for i, v in zip(micro_batch.host.indices, values, strict=True)]
        return sample_scores(
            micro_batch.host, logprobs_of(session.vlm, micro_batch, settings.train.logprob_chunk_tokens)
        )

    scores, skipped = evaluation.run("scoring", lambda samples: fill_rows(samples, renderer, data), compute)
    if session.is_first:
        if reward:
            summary = f"mean score {sum(score['score'] for score in scores) / len(scores):.4f}{_won(scores)}"
        else:
            mean = sum(score["sum"] for score in scores) / max(1, sum(score["tokens"] for score in scores))
            summary = f"mean log-probability {mean:.4f}"
        print(" · ".join(filter(None, (f"{len(scores)} samples", summary, skipped, str(evaluation.path)))))
    return 0


def _won(scores: list[dict]) -> str:
    """How many chosen answers have a higher score than the rejected ones of their pairs, if there are pairs."""
    sides = [
        {line["index"]: line["score"] for line in scores if line.get("side") == side} for side in ("chosen", "rejected")
    ]
    if not sides[0]:
        return ""
    won = sum(score > sides[1][index] for index, score in sides[0].items())
    return f" · the chosen answer has the higher score in {won} of {len(sides[0])} pairs ({won / len(sides[0]):.1%})"
