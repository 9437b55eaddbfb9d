"""`megavlm score`: log-probabilities of all target tokens of a data file, or the scores of a reward model."""

import json

import torch

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import has_score_head, shapes_at_start
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.convert.adapter import Adapter
from megavlm.data.renderer import Renderer
from megavlm.data.sources import media_access, read_samples
from megavlm.runtime.eval_rows import EvalRows, note_settings
from megavlm.runtime.forward import encode_window, logprobs_of, scores_of
from megavlm.runtime.scoring import fill_rows, sample_scores
from megavlm.runtime.session import start


def main(settings: Settings, reward: bool = False) -> int:
    """Writes ``scores.jsonl`` for ``data.eval`` in file order: index, logprobs, sum, tokens; or index, score.

    Args:
        settings: the settings of the run.
        reward: write the score of a reward model at the last target token of each sample.

    Raises:
        UserError: with ``reward``, the checkpoint has no reward head.
    """
    model, load = settings.model, required(settings.model.load, "model.load")
    output, data = required(settings.output, "output"), settings.data.eval
    assert data is not None, "data.eval must be set"
    if reward and model.adapter is not None:
        scored = Adapter(find_checkpoint(model.adapter), shapes_at_start(model)).reward_head is not None
    else:
        scored = not reward or has_score_head(find_checkpoint(load))
    if not scored:
        raise UserError(
            f"{model.adapter or load} has no reward head",
            "use a checkpoint of megavlm rm, or leave out --reward",
        )
    session = start(settings, training=False, score_head=reward)
    samples = None
    if session.groups.is_leader:
        renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
        access, groups = media_access(settings.data), session.groups
        samples = read_samples(data, renderer, "tune", access=access, rank=groups.dp_rank, num_ranks=groups.dp_size)
    rows = EvalRows(session, fill_rows(samples, renderer, settings.data) if samples is not None else None, "scoring")
    scores: list[dict] = []
    for window, real in rows:
        with torch.no_grad():
            encode_window(session.vlm, window)
        micro_batch = window.micro_batches[0]
        if reward:
            values = scores_of(session.vlm, micro_batch).tolist()
            found = [{"index": i, "score": v} for i, v in zip(micro_batch.host.indices, values, strict=True)]
        else:
            logprobs = logprobs_of(session.vlm, micro_batch, settings.train.logprob_chunk_tokens)
            found = sample_scores(micro_batch.host, logprobs)
        if real and session.groups.is_leader:
            scores += found
    scores = rows.gather(scores)
    if session.is_first:
        note_settings(settings)
        path = output / "scores.jsonl"
        write_text(path, "".join(json.dumps(score) + "\n" for score in sorted(scores, key=lambda s: s["index"])))
        if reward:
            summary = f"mean score {sum(score['score'] for score in scores) / max(1, len(scores)):.4f}"
        else:
            mean = sum(score["sum"] for score in scores) / max(1, sum(score["tokens"] for score in scores))
            summary = f"mean log-probability {mean:.4f}"
        print(f"{len(scores)} samples · {summary} · {path}")
    return 0
