"""`python -m megavlm.demo.tune`: reward model, preference tuning and LoRA on the demo's digits, with required results.

It continues from the pretrained model of `python -m megavlm.demo`, which it trains first if necessary. Then it runs the
commands that a user would type: a reward model on pairs of digits; supervised fine-tuning that ends too early, and DPO
on the wrong answers that this model gives when it is sampled; supervised fine-tuning of all weights, and of LoRA
adapters. Training uses the training questions, and results are measured on held-out ones. Exit status: 0 if all results
are within their bounds; 1 if not, or if a command fails; 2 if the output folder exists.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megavlm.demo.commands import CONFIGS, DEFAULT_OUT, NPROC, at_least, console, result, run, status_of
from megavlm.demo.run import Demo

TUNE = "tune"  # the folder of the results, inside the demo's folder
SAMPLE_EVERY = 3  # each third training question is asked to the mediocre model
TEMPERATURE = 0.5  # at 1.0, many answers are not digits and therefore useless for training
REQUIRED_PAIR_ACCURACY = 0.95
REQUIRED_DPO_SHARE = 0.5  # of the wrong answers that DPO must put right
ALLOWED_LORA_LOSS = 0.02  # maximum loss of accuracy compared with fine-tuning of all weights
ALLOWED_LORA_SHARE = 0.05  # maximum share of trainable weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m megavlm.demo.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help=f"the demo's folder (default: {DEFAULT_OUT})")
    parser.add_argument("--overwrite", action="store_true", help=f"replace the files of an earlier run in DIR/{TUNE}")
    options = parser.parse_args(arguments)

    def job() -> bool:
        tune = Tune(Path(options.out))
        tune.prepare(options.overwrite)
        tune.reward_model()
        tune.preference()
        tune.lora()
        return tune.check()

    return status_of(job)


class Tune:
    """One run of this demo, in the folder `tune` of the demo's folder `out`."""

    def __init__(self, out: Path):
        self.demo = Demo(out)
        self.out = self.demo.out / TUNE
        self.train = self.demo.out / "data" / "questions.jsonl"
        self.heldout = self.demo.questions
        self.full = self.demo.out / "after"  # answers after the demo's fine-tuning of all weights

    def prepare(self, overwrite: bool) -> None:
        """Uses the pretrained model of the demo, or trains it."""
        self.demo.begin(self.out, overwrite)

    def reward_model(self) -> None:
        """Trains a reward model on pairs of digits, and scores each digit as the answer to each held-out question."""
        from megavlm.demo.pairs import write_all_answers, write_drawn_pairs

        config = CONFIGS / "rm.yaml"
        pairs, answers = self.out / "pairs.jsonl", self.out / "all_answers.jsonl"
        num_pairs = write_drawn_pairs(self.train, pairs)
        write_all_answers(self.heldout, answers)
        console.print(f"\n{pairs}: {num_pairs} pairs of the right digit and a wrong one")
        console.print(f"{answers}: each digit as the answer to each held-out question")
        run("megavlm", "rm", config, *NPROC)
        load, output = f"model.load={self.out / 'rm'}", f"output={self.out / 'rm_scores'}"
        run("megavlm", "score", config, "--reward", load, output, *NPROC)

    def preference(self) -> None:
        """Fine-tunes a model that ends too early, and trains it with DPO on the errors in its sampled answers."""
        from megavlm.demo.answers import read_answers
        from megavlm.demo.data import read_records
        from megavlm.demo.pairs import write_pairs, write_some

        mediocre, dpo = CONFIGS / "mediocre.yaml", CONFIGS / "dpo.yaml"
        load = f"model.load={self.out / 'mediocre'}"
        run("megavlm", "sft", mediocre, *NPROC)
        run("megavlm", "infer", mediocre, load, f"output={self.out / 'mediocre_answers'}", *NPROC)
        asked, pairs, sampled = self.out / "asked.jsonl", self.out / "sampled_pairs.jsonl", self.out / "sampled"
        write_some(self.train, asked, SAMPLE_EVERY)
        sample = (load, f"data.eval={asked}", f"generate.temperature={TEMPERATURE}", f"output={sampled}")
        run("megavlm", "infer", mediocre, *sample, *NPROC)
        answers = read_answers(sampled / "answers.jsonl", len(read_records(asked)))
        num_pairs = write_pairs(asked, answers, pairs)
        console.print(f"\n{pairs}: pairs of the right answer and a wrong one ({num_pairs} of {len(answers)} are wrong)")
        run("megavlm", "dpo", dpo, *NPROC)
        run("megavlm", "infer", dpo, f"model.load={self.out / 'dpo'}", f"output={self.out / 'dpo_answers'}", *NPROC)

    def lora(self) -> None:
        """Fine-tunes all weights, unless the demo has done it, and LoRA adapters, and generates answers of both."""
        sft, lora = CONFIGS / "sft.yaml", CONFIGS / "lora.yaml"
        if not (self.full / "answers.jsonl").is_file():
            self.full = self.out / "sft_answers"
            run("megavlm", "sft", sft, f"output={self.out / 'sft'}", *NPROC)
            run("megavlm", "infer", sft, f"model.load={self.out / 'sft'}", f"output={self.full}", *NPROC)
        run("megavlm", "sft", lora, *NPROC)
        adapter, output = f"model.adapter={self.out / 'lora'}", f"output={self.out / 'lora_answers'}"
        run("megavlm", "infer", lora, adapter, output, *NPROC)

    def check(self) -> bool:
        """Prints each result and its bound. Returns whether all results are within their bounds."""
        from megavlm.demo.answers import accuracy_of, expected_answers
        from megavlm.demo.data import read_records
        from megavlm.demo.pairs import DIGITS, count_won

        expected, accuracy = expected_answers(self.heldout), partial(accuracy_of, questions=self.heldout)
        total = len(expected)
        scores = [line["score"] for line in read_records(self.out / "rm_scores" / "scores.jsonl")]
        won = count_won(scores, expected) / (total * (len(DIGITS) - 1))
        before, after = accuracy(self.out / "mediocre_answers"), accuracy(self.out / "dpo_answers")
        full, lora = accuracy(self.full), accuracy(self.out / "lora_answers")
        share = count_weights(self.out / "lora") / count_weights(self.demo.start)
        console.print(f"\nresults on {total} handwritten digits that were not used for training")
        kept = [
            at_least("reward model: pairs won by the right digit", won, REQUIRED_PAIR_ACCURACY),
            at_least(f"DPO: right answers, {before:.1%} before", after, before + REQUIRED_DPO_SHARE * (1 - before)),
            at_least(f"LoRA: right answers, {full:.1%} with all weights", lora, full - ALLOWED_LORA_LOSS),
            result("LoRA: share of trainable weights", share, "<", ALLOWED_LORA_SHARE, share < ALLOWED_LORA_SHARE),
        ]
        return all(kept)


def count_weights(run_folder: Path) -> int:
    """The number of weights in the newest checkpoint of a run, without the state of its optimizer."""
    from megavlm.checkpoint.folders import latest
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    checkpoint = latest(run_folder / "checkpoints")
    assert checkpoint is not None, f"{run_folder} has no checkpoint"
    tensors = McoreCheckpoint(checkpoint).tensors
    return sum(math.prod(shape) for name, (shape, _) in tensors.items() if not name.startswith("optimizer."))


if __name__ == "__main__":  # processes started by spawn import this file again
    sys.exit(main())
