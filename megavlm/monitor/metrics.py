"""metrics.jsonl: one JSON line for each reported training step and for each skipped step.

All lines but that of step 0 have these fields (`REQUIRED`); a trainer may add its own, such as `moe_aux_loss`:

    step                number of the optimizer step, from 1
    loss                loss of the step, averaged over the targets of the global batch
    lr                  learning rate of the step
    grad_norm           norm of the whole gradient before clipping
    grad_norm/PART      gradient norm of one part: vision, projector, language; 0.0 if the part is frozen
    tokens              tokens of the step over all ranks, without padding
    target_tokens       number of these tokens that are targets
    images              pictures in the step
    packing             share of the rows that is not padding, 0 to 1
    seconds             wall-clock time of the step
    tokens_per_second   tokens / seconds, over all ranks
    model_tflops        model TFLOP/s per device: the operations that the model needs, without recomputation and padding
    mfu                 model_tflops over the device's bf16 peak, 0 to 1; null if the peak is not known (CPU)
    memory_gib          peak memory of rank 0's process: allocated memory on a GPU, resident memory on a CPU

The training loop adds these fields:

    skipped             1 if the loss or a gradient was NaN or infinite, so that the step was skipped; otherwise 0
    videos, samples     videos and samples in the rows, over all ranks
    frames              frames of pictures and videos in the rows
    frames_encoded      how many frames the tower encoded in passes with gradients; fewer than frames if a frozen tower
                        has encoded them before, in the same step of reinforcement learning
    seconds_data        longest time that a data-parallel rank waited for its rows
    seconds_tower       time that a rank needed for the forward and backward pass of its frames, without waiting for
                        other ranks; mean over ranks
    seconds_tower_max   the same time on the slowest rank
    tower_imbalance     seconds_tower_max / seconds_tower, at least 1; null if no rank needed any time
    slowest_rank        rank with the largest sum of its waiting time for rows and its time in the tower
    loss/NAME           with several data sources: loss of one of them over its own targets; null if it has none
    lr/PART             with train.lr_scale or train.unfreeze_after: learning rate of a part, 0.0 while it is frozen
    samples/NAME        samples of the step from this source
    target_tokens/NAME  targets of the step from this source
    epoch/NAME          passes over this source of the run so far: used samples / samples of the source. A skipped
                        sample is used; one that waits in a packing buffer is not
    bad_samples         distinct samples of the run so far that could not be read; data_errors.jsonl lists them
    dropped_samples     distinct valid samples of the run so far that do not fit into a row; also in data_errors.jsonl
    repeated_prompts    samples of the step from whose answers the prompt was removed; absent if there are none
    literal_marks       texts of the step in which <image> or <video> were read as words; absent if there are none
    seconds_checkpoint  time that rank 0 has waited for checkpoints since the previous line; not part of seconds

Steps after which the run has evaluated (eval.every, eval.every_epochs, the last) have these fields, over all samples of
data.eval (with several sources also as eval/NAME/loss and so on). A line of step 0, which only runs that evaluate have,
has no others: it tells of the weights before the first step.

    eval/loss           mean negative log-probability of the targets; for dpo, rm and kto the loss of the method
    eval/accuracy, eval/margin  dpo, rm and kto: as accuracy and margin
    eval/answers/score  with eval.answers: mean score of the answers that have one
    eval/answers/score/NAME  with several scorers: mean of one of them, before its weight
    eval/answers/length      mean length of the answers in tokens
    eval/answers/truncated_share  share of the answers that were cut off at their longest length, 0 to 1

With log.phases, these fields tell how the seconds of a step divide. They are means over the steps since the previous
line and over the ranks, and add up to seconds. On a GPU they are times of the device, read without waiting for it, so
that a step's last work (the update of the weights) is in the next line:

    phase/data          waiting for rows, and copying them to the device
    phase/sampling      sampling answers and waiting for their rewards, without the frames of the prompts
    phase/reference     passes without gradients that the method makes first
    phase/tower         forward and backward pass of the frames
    phase/exchange      the exchange of features and of their gradients between the ranks
    phase/decoder       forward and backward pass of the decoder, with what its ranks send each other
    phase/head          the same of output layer and loss
    phase/reduction     reduction of the gradients over the data-parallel ranks
    phase/optimizer     gradient norms and update of the weights
    phase/other         everything else of a step

For a mixture of experts, these fields tell how evenly the routers share the step's tokens, without padding, over the
global batch. A load is relative to an even one. No token is ever dropped: experts have no capacity.

    experts/load_max, experts/load_min  largest and smallest load of an expert in any layer; 1 is even
    experts/entropy     entropy of the loads of a layer over its maximum, 0 to 1; 1 is even; mean over the layers
    experts/aux_loss    balancing loss before its weight, 1 if even; mean over layers and rows; absent if not computed
    experts/z_loss      z-loss of the routers before its weight, likewise
    experts/NAME/PART   each of these for the early, middle and late third of the layers

Methods that compare answers (dpo, rm, kto) add these fields, over all pairs or answers of the step:

    accuracy            dpo and rm: share of pairs whose chosen answer has the higher reward or score; kto: share of
                        answers whose reward is on the side of z0 that their label asks for; 0 to 1
    margin              dpo and rm: mean of the reward or score of the chosen answer minus that of the rejected one;
                        kto: rewards/desirable - rewards/undesirable, null without answers of both kinds
    pairs               dpo and rm: pairs in the step
    rewards/KIND        dpo: mean reward of the chosen or rejected answers; kto: of the desirable or undesirable ones
    logprobs/KIND       dpo: mean log-probability of the chosen or rejected answers
    desirable, undesirable  kto: number of answers of each kind
    z0                  kto: the reference point between both kinds
    scores/mean, scores/std  rm: mean and standard deviation of the scores

Reinforcement learning adds these fields, over all answers of the step (rollouts.jsonl has some of the answers):

    reward, reward_std  mean and standard deviation of the rewards
    reward/NAME         mean of one reward, before its weight
    groups, answers     prompts and answers that were sampled in the step, those of replaced groups too
    flat_groups         share of the groups whose answers all got the same reward, so that they teach nothing; 0 to 1
    kl                  divergence from the reference model, in nats per token; null without one
    entropy             entropy of the policy, in nats per token
    clip_share          share of the tokens whose ratio was clipped, 0 to 1
    ratio_mean          mean of that ratio
    corrected_share     share of the tokens whose weight align.correction has limited
    ratio_max           largest probability ratio between the weights of the update and those that sampled
    mismatch_kl         divergence of the trainer from the engine that sampled, in nats per token, for the same weights
    mismatch_max        largest difference of their log-probabilities of a token, in nats
    answer_tokens       mean length of the answers in tokens
    truncated_share     share of the answers that rollout.max_new_tokens has cut off, 0 to 1
    reward_failures     answers with a reward that failed; unless its weight is 0, they are left out of their groups
    frames_kept         different frames that a frozen tower has encoded for all passes of the step; else absent
    skipped_updates     updates of the step that NaN or infinity has prevented, while others were done; else absent
    staleness           steps between the weights that sampled the answers and those that are updated
    seconds_rollout, seconds_reward, seconds_update, seconds_sync
                        time for sampling, for waiting for rewards, for the update, and for new weights of the engine
    rollout_tokens_per_second  sampled tokens / seconds_rollout, over all ranks
    turns               with an environment: mean number of the model's turns in an answer
    environment_failures    answers whose environment failed; they are left out of their groups
    truncated_by_turns  share of the answers that ended only because of environment.max_turns, 0 to 1
    seconds_environment time for which sampling has waited for environments, a part of seconds_rollout

ppo adds these fields, over all target tokens of the step; loss, lr and norms are 0 in steps in which the critic alone
learns, and flat_groups is null with one answer to a prompt:

    value_loss          the critic's loss, half the squared error of its values; mean over its updates
    value_clip_share    share of the values that have left their limits to no avail, 0 to 1
    returns             mean of what the critic should say: the discounted rewards to come, with the divergence
    explained_variance  share of the variance of the returns that the critic knows before its updates, at most 1
    critic_grad_norm, critic_lr  gradient norm and learning rate of the critic
    seconds_values, seconds_critic  parts of seconds_update: passes without gradients, and updates of the critic

train.kl_to_start adds kl_to_start, the divergence from the start model in nats per target, and nll, the loss without
it. train.loss.z_loss and label_smoothing add z_loss (with its coefficient) and nll, the loss without z-loss, smoothing
and divergence. All of them are means with the weights that train.loss.per and loss_weight give to targets; loss/NAME is
the nll of a source.

NaN and infinite numbers are written as null, because JSON does not have them.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json

FILE_NAME = "metrics.jsonl"
MOST = 1e100  # no measured number is greater: sums and squares of such numbers are still numbers
MOST_STEPS = 2**62
PARTS = ("vision", "projector", "language")
REQUIRED = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    *(f"grad_norm/{part}" for part in PARTS),
    "tokens",
    "target_tokens",
    "images",
    "packing",
    "seconds",
    "tokens_per_second",
    "model_tflops",
    "mfu",
    "memory_gib",
)


def throughput(
    tokens: float, row_tokens: float, seconds: float, model_flops: float, num_devices: int, peak_flops: float | None
) -> dict[str, float | None]:
    """Computes the derived fields of a line.

    Args:
        tokens: tokens of the step over all ranks, without padding.
        row_tokens: tokens of the step including padding: global_batch_size × seq_length.
        seconds: wall-clock time of the step.
        model_flops: floating-point operations of the step over all ranks (`megavlm.model.flops.step_flops`).
        num_devices: number of ranks of the run.
        peak_flops: bf16 peak of one device in FLOP/s, None if unknown (`megavlm.model.flops.peak_flops`).

    Returns:
        packing, seconds, tokens_per_second, model_tflops and mfu.
    """
    flops_per_device = model_flops / seconds / num_devices
    return {
        "packing": tokens / row_tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "model_tflops": flops_per_device / 1e12,
        "mfu": flops_per_device / peak_flops if peak_flops else None,
    }


class MetricsWriter:
    """Appends to metrics.jsonl of an output folder. Each line is flushed, so that a killed run loses no lines.

    Args:
        output_dir: the run's folder; it must exist.
        resume_step: the step from which the run continues. Lines of later steps are removed, because they will be
            written again; an incomplete last line is removed, too. 0 starts with an empty file.
        enabled: False on all ranks except rank 0; then all calls do nothing.
    """

    def __init__(self, output_dir: str | Path, resume_step: int = 0, enabled: bool = True):
        self.path = Path(output_dir) / FILE_NAME
        self._file = None
        if not enabled:
            return
        drop_after(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line. Values are plain numbers, None, or scalars with `.item()` (torch, numpy).

        Raises UserError if the disk is full.
        """
        if self._file is None:
            return
        missing = [name for name in REQUIRED if name not in line and line.get("step")]
        assert not missing, f"metrics of a step lack {', '.join(missing)}"
        text = json.dumps({name: plain(value) for name, value in line.items()}, allow_nan=False)
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()  # close() tries to write the buffer again and fails, too
            raise _disk_failure(self.path, error) from None

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl (or of that in a folder), oldest first; none if the file is missing.

    Lines that are not a JSON object with a step are ignored, because the last line may be incomplete after a kill. So
    are values that are no numbers, and those beyond MOST (see ``num_odd_values``).
    """
    path = Path(path)
    lines = read_lines(path / FILE_NAME if path.is_dir() else path)
    return [{key: value for key, value in line.items() if value is None or _is_number(value)} for line in lines]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MOST  # which no NaN is


def num_odd_values(path: Path) -> int:
    """The number of values in a metrics.jsonl that ``read_metrics`` ignores. Raises UserError if it cannot be read."""
    return sum(value is not None and not _is_number(value) for line in read_lines(path) for value in line.values())


def num_damaged(path: Path) -> int:
    """The number of lines of a file that ``read_lines`` ignores, without one at the end that is not complete.

    Raises UserError if the file cannot be read.
    """
    *whole, _ = _text(path).split("\n")
    return sum(bool(line.strip()) for line in whole) - len(_parse("\n".join(whole)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file in which each line has a step; none if the file is missing.

    Raises UserError if it cannot be read.
    """
    return [line for _, line in _parse(_text(path))]


def append_lines(path: Path, lines: list[str]) -> None:
    """Appends lines to a file. Raises UserError if the disk is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise _disk_failure(path, error) from None


def _disk_failure(path: Path, error: OSError) -> UserError:
    free = shutil.disk_usage(path.parent).free / 1e9
    return UserError(
        f"cannot write {path}: {error.strerror}; {free:.3g} GB are free on this disk",
        "free some space and start the same command again; it continues from the newest checkpoint",
    )


def drop_after(path: Path, step: int) -> None:
    """If the file exists, atomically removes all incomplete lines and the lines of steps after `step`; 0: all lines.

    Raises UserError if it cannot be read.
    """
    text = _text(path)
    kept = "".join(raw + "\n" for raw, line in _parse(text) if line["step"] <= (step or -1))
    if kept != text:
        write_text(path, kept)


def _text(path: Path) -> str:
    """The text of a file; "" if it is missing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "move it away") from None


def _parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(raw line, parsed line) for each complete line."""
    lines = []
    for raw in text.split("\n"):
        try:
            line = parse_json(raw)
        except ValueError:
            continue
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < MOST_STEPS:
            lines.append((raw, line))
    return lines


def plain(value: Any) -> Any:
    """A value as JSON can have it: scalars of torch and numpy become numbers; NaN and infinity become None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
