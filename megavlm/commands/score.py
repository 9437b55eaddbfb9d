"""`megavlm score`: log-probabilities of all target tokens of a data file, or the scores of a reward model."""

from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.checkpoint.load_weights import has_score_head, shapes_at_start
from megavlm.config.settings import Settings
from megavlm.convert.adapter import Adapter
from megavlm.data.renderer import Renderer
from megavlm.inspection.worst import told, worst_of, write_each, write_worst
from megavlm.model.language import LanguageModel
from megavlm.runtime.evaluation import Evaluation
from megavlm.runtime.feed import MicroBatch, Window
from megavlm.runtime.forward import forward_only, to_leader
from megavlm.runtime.scoring import fill_rows, row_logprobs, row_rewards, sample_scores
from megavlm.runtime.session import start
from megavlm.runtime.weights import choose, tell

_SHOWN = 10  # of the samples with the highest loss on the terminal


def main(
    settings: Settings, reward: bool = False, ema: bool = False, worst: int | None = None, each: bool = False
) -> int:
    """Writes ``scores.jsonl`` for ``data.eval`` in file order.

    A line has ``index``, ``sample``, ``question``, ``media``, ``reference``, for an answer of a pair also ``side``
    (see ``EvalSamples``), and ``logprobs``, ``sum``, ``tokens`` and ``loss``, or ``score``. What was loaded is in
    ``scores.json``.

    Args:
        settings: the settings of the run.
        reward: write the score of a reward model at the last target token of each sample.
        ema: use the moving average of the weights (``train.ema``).
        worst: how many samples to write to ``scores.html``: those with the highest loss per token, highest first.
        each: also write the loss per token of each sample to ``losses.jsonl``, highest first.

    Raises:
        UserError: with ``reward``, the checkpoint has no reward head, or ``worst`` or ``each`` is given, too.
    """
    for name, given in {"--worst": worst, "--each": each}.items():
        if reward and given:
            raise UserError(f"{name} with --reward would be ignored: scores are no losses", "leave out one of them")
    settings, weights = choose(settings, ema=ema)
    model, data = settings.model, settings.data
    if reward and model.adapter is not None:
        scored = Adapter(model.adapter, shapes_at_start(model)).reward_head is not None
    else:
        scored = not reward or has_score_head(weights.load)
    if not scored:
        raise UserError(f"{weights} has no reward head", "use a checkpoint of megavlm rm, or leave out --reward")
    session = start(settings, training=False, score_head=reward, ema=ema)
    tell(weights, session)
    renderer = Renderer(model.hf, data, settings.pad_multiple)
    evaluation = Evaluation(session, weights, renderer, "scores.jsonl", "tune", {"score": {"reward": reward}})

    chunk_tokens, sequence_parallel = settings.train.logprob_chunk_tokens, settings.parallel.sequence_parallel

    def read(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        if reward:
            return row_rewards(chunk, hidden, micro_batch, session.groups, sequence_parallel)
        return row_logprobs(chunk, hidden, micro_batch, session.groups, chunk_tokens)

    def compute(window: Window) -> list[dict]:
        found = []
        results = to_leader(session.vlm, forward_only(session.vlm, window, read))
        for micro_batch, result in zip(window.micro_batches, results, strict=False):  # none but on the leader
            host = micro_batch.host
            if reward:
                found += [{"index": i, "score": v} for i, v in zip(host.indices, result.tolist(), strict=True)]
            else:
                found += sample_scores(host, result)
        return found

    rows_of = lambda samples: fill_rows(samples, renderer, data)
    scores, skipped = evaluation.run("scoring", rows_of, compute, size=settings.parallel.pipeline)
    if session.is_first:
        if reward:
            summary = f"mean score {sum(score['score'] for score in scores) / len(scores):.4f}"
        else:
            mean = sum(score["sum"] for score in scores) / max(1, sum(score["tokens"] for score in scores))
            summary = f"mean log-probability {mean:.4f}"
        pairs = _pairs(scores, "score" if reward else "sum")
        print(" · ".join(filter(None, (f"{len(scores)} samples", summary, pairs, skipped, str(evaluation.path)))))
        if each:
            listed = evaluation.path.with_name("losses.jsonl")
            write_each(listed, scores)
            print(f"loss of each sample, highest first: {listed}")
        if worst:
            found, page = worst_of(scores, worst), evaluation.path.with_suffix(".html")
            write_worst(page, found, len(scores), evaluation.file(), renderer, str(weights))
            print("highest loss per token:", *map(told, found[:_SHOWN]), f"with their tokens: {page}", sep="\n")
    return 0


def _pairs(scores: list[dict], field: str) -> str:
    """If there are pairs: how often the chosen answer has more of a field than the rejected one, and how much more."""
    chosen, rejected = (
        {line["index"]: line[field] for line in scores if line.get("side") == side} for side in ("chosen", "rejected")
    )
    if not chosen:
        return ""
    margins = [value - rejected[index] for index, value in chosen.items()]
    won, what = sum(margin > 0 for margin in margins), "score" if field == "score" else "log-probability"
    return (
        f"the chosen answer has the higher {what} in {won} of {len(margins)} pairs ({won / len(margins):.1%}), mean "
        f"margin {sum(margins) / len(margins):.4f}"
    )
