"""`python -m megavlm.demo.rl`: reinforcement learning on the demo's digits, with a required result.

It continues from the pretrained model of `python -m megavlm.demo`, which it trains first if necessary. Supervised
fine-tuning that ends early leaves a model that often errs. `megavlm grpo` then samples its answers to the training
questions, and the reward is whether an answer is right. `megavlm ppo` does the same with a reward model, which was
trained on pairs of digits, and a critic that starts from it. Held-out questions show what was learned. With ``--all``,
the other losses and advantages learn for some steps, too. Exit status: 0 if all results are within their bounds; 1 if
not, or if a command fails; 2 if the output folder exists.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megavlm.demo.commands import CONFIGS, DEFAULT_OUT, NPROC, at_least, console, run, status_of
from megavlm.demo.run import Demo

RL = "rl"  # the folder of the results, inside the demo's folder
REQUIRED_GAIN = 0.15  # of right answers to held-out questions
OTHERS = {  # what else can learn, and its settings
    "dr_grpo": ("align.loss=dr_grpo",),
    "dapo": ("align.loss=dapo",),
    "gspo": ("align.loss=gspo",),
    "sapo": ("align.loss=sapo",),
    "cispo": ("align.loss=cispo",),
    "rloo": ("align.advantage=rloo",),
}
# With a single update of the weights in a step, some of these losses have the same gradient as GRPO.
OTHER_SETTINGS = ("align.mini_batches=2",)
OTHER_STEPS = 10
REQUIRED_REWARD_GAIN = 0.1  # of the mean reward in the steps of another method
SAMPLE_EVERY = 3  # each third training question is asked to the weak model
AVERAGED = 2  # number of steps at each end whose rewards are averaged


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m megavlm.demo.rl", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help=f"the demo's folder (default: {DEFAULT_OUT})")
    parser.add_argument("--overwrite", action="store_true", help=f"replace the files of an earlier run in DIR/{RL}")
    parser.add_argument("--all", action="store_true", help=f"also run {OTHER_STEPS} steps of {', '.join(OTHERS)}")
    options = parser.parse_args(arguments)

    def job() -> bool:
        rl = Reinforcement(Path(options.out))
        rl.demo.begin(rl.out, options.overwrite)
        rl.start()
        rl.learn()
        rl.reward_model()
        rl.learn_with_critic()
        others = tuple(OTHERS) if options.all else ()
        for name in others:
            rl.learn_otherwise(name)
        return rl.check(others)

    return status_of(job)


class Reinforcement:
    """One run of this demo, in the folder `rl` of the demo's folder `out`."""

    def __init__(self, out: Path):
        self.demo = Demo(out)
        self.out = self.demo.out / RL

    def start(self) -> None:
        """Fine-tunes a model that ends too early, and generates its answers."""
        weak = CONFIGS / "weak.yaml"
        run("megavlm", "sft", weak, *NPROC)
        run("megavlm", "infer", weak, f"model.load={self.out / 'weak'}", f"output={self.out / 'before'}", *NPROC)

    def learn(self) -> None:
        """Trains this model with GRPO, and generates its answers."""
        grpo = CONFIGS / "grpo.yaml"
        run("megavlm", "grpo", grpo, *NPROC)
        run("megavlm", "infer", grpo, f"model.load={self.out / 'grpo'}", f"output={self.out / 'after'}", *NPROC)
        run("python", "-m", "megavlm.report.run_report", self.out / "grpo")  # again, because now there are answers

    def reward_model(self) -> None:
        """Trains a reward model on pairs of the right digit and a wrong one, or a wrong answer of the weak model.

        It must know both: which digit is right, and that nothing follows it.
        """
        from megavlm.demo.answers import read_answers
        from megavlm.demo.data import read_records, write_records
        from megavlm.demo.pairs import write_drawn_pairs, write_pairs, write_some

        questions, asked, sampled = (
            self.demo.out / "data" / "questions.jsonl",
            self.out / "asked.jsonl",
            self.out / "sampled",
        )
        write_some(questions, asked, SAMPLE_EVERY)
        weak = (f"model.load={self.out / 'weak'}", f"data.eval={asked}", "generate.temperature=1.0")
        run("megavlm", "infer", CONFIGS / "weak.yaml", *weak, f"output={sampled}", *NPROC)
        answers = read_answers(sampled / "answers.jsonl", len(read_records(asked)))
        drawn, own, pairs = (self.out / f"{name}.jsonl" for name in ("drawn_pairs", "own_pairs", "pairs"))
        write_drawn_pairs(questions, drawn)
        write_pairs(asked, answers, own)
        write_records(pairs, [*read_records(drawn), *read_records(own)])
        settings = (f"data.train={pairs}", "data.eval=null", f"output={self.out / 'rm'}")
        run("megavlm", "rm", CONFIGS / "rm.yaml", *settings, *NPROC)

    def learn_with_critic(self) -> None:
        """Trains the model of `start` with PPO and the reward model, and generates its answers."""
        ppo = CONFIGS / "ppo.yaml"
        run("megavlm", "ppo", ppo, *NPROC)
        run("megavlm", "infer", ppo, f"model.load={self.out / 'ppo'}", f"output={self.out / 'after_ppo'}", *NPROC)

    def learn_otherwise(self, name: str) -> None:
        """Trains the model of `start` for some steps with a key of `OTHERS`."""
        settings = (*OTHERS[name], *OTHER_SETTINGS, f"train.steps={OTHER_STEPS}", f"output={self.out / name}")
        run("megavlm", "grpo", CONFIGS / "grpo.yaml", *settings, *NPROC)

    def check(self, others: Sequence[str]) -> bool:
        """Prints each result and its bound. Returns whether all results are within their bounds."""
        from megavlm.demo.answers import accuracy_of

        accuracy = partial(accuracy_of, questions=self.demo.questions)
        before, after, ppo = (accuracy(self.out / name) for name in ("before", "after", "after_ppo"))
        console.print("\nresults on handwritten digits that were not used for training")
        kept = [
            at_least(f"GRPO: right answers, {before:.1%} before", after, before + REQUIRED_GAIN),
            at_least(f"PPO and a reward model: right answers, {before:.1%} before", ppo, before + REQUIRED_GAIN),
        ]
        if others:
            console.print(f"mean rewards of {AVERAGED} steps, at the end of {OTHER_STEPS}")
        for name in others:
            first, last = rewards_at_ends(self.out / name)
            kept.append(at_least(f"{name}: reward, {first:.1%} at the beginning", last, first + REQUIRED_REWARD_GAIN))
        console.print(f"\nsampled answers, curves, warnings · {self.out / 'grpo' / 'report.html'}")
        return all(kept)


def rewards_at_ends(run_folder: Path) -> tuple[float, float]:
    """The mean rewards of the first and of the last steps of a run."""
    from megavlm.demo.data import read_records

    rewards = [line["reward"] for line in read_records(run_folder / "metrics.jsonl")]
    return sum(rewards[:AVERAGED]) / AVERAGED, sum(rewards[-AVERAGED:]) / AVERAGED


if __name__ == "__main__":  # processes started by spawn import this file again
    sys.exit(main())
