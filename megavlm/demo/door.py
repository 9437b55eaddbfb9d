"""`python -m megavlm.demo.door`: a model learns to ask for a picture, in two turns with an environment.

It continues from the pretrained model of `python -m megavlm.demo`, which it trains first if necessary. Supervised
fine-tuning on conversations about a digit behind a door leaves a model that most often guesses, without asking to open
the door. `megavlm grpo` then lets it speak with the environment `configs/demo/door.py`. Held-out digits show what was
learned. Exit status: 0 if the results are within their bounds; 1 if not, or if a command fails; 2 if the output folder
exists.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megavlm.demo.commands import CONFIGS, DEFAULT_OUT, NPROC, at_least, console, result, run, status_of
from megavlm.demo.run import Demo

DOOR = "door"  # the folder of the results, inside the demo's folder
ASKED, OPEN, SHOWN = "Which digit is behind the door?", "Open.", "Which digit is it?"
GUESSED = 0.6  # of the conversations of the fine-tuning
MOST_BEFORE, LEAST_AFTER = 0.5, 0.9  # of right answers
HELDOUT = 360


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m megavlm.demo.door", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help=f"the demo's folder (default: {DEFAULT_OUT})")
    parser.add_argument("--overwrite", action="store_true", help=f"replace the files of an earlier run in DIR/{DOOR}")
    options = parser.parse_args(arguments)

    def job() -> bool:
        door = BehindTheDoor(Path(options.out))
        door.demo.begin(door.out, options.overwrite)
        door.learn()
        return door.check()

    return status_of(job)


class BehindTheDoor:
    """One run of this demo, in the folder `door` of the demo's folder `out`."""

    def __init__(self, out: Path):
        self.demo = Demo(out)
        self.out = self.demo.out / DOOR

    def learn(self) -> None:
        """Fine-tunes a model that guesses, lets it learn, and samples a step of held-out conversations.

        The rewards of a step are those of the weights before its update.
        """
        write_doors(self.demo.out / "data")
        run("megavlm", "sft", CONFIGS / "door-sft.yaml", *NPROC)
        run("megavlm", "grpo", CONFIGS / "door.yaml", *NPROC)
        questions = f"data.train=[{{path: {self.demo.out / 'data' / 'heldout_doors.jsonl'}}}]"
        small = ("rollout.group_size=2", f"rollout.prompts={HELDOUT}", "train.steps=1", "train.warmup_steps=0")
        settings = (questions, *small, f"model.load={self.out / 'grpo'}", f"output={self.out / 'heldout'}")
        run("megavlm", "grpo", CONFIGS / "door.yaml", *settings, *NPROC)

    def check(self) -> bool:
        """Prints the results and their bounds. Returns whether they are within their bounds."""
        before, after = first_line(self.out / "grpo"), first_line(self.out / "heldout")
        right = before["reward"]
        console.print("\nright answers to sampled conversations about digits behind doors")
        kept = [
            result("before, digits of the training", right, "≤", MOST_BEFORE, right <= MOST_BEFORE),
            at_least("after, digits that were not used for training", after["reward"], LEAST_AFTER),
        ]
        console.print(f"mean number of turns: {before['turns']:.2f} before, {after['turns']:.2f} after")
        console.print(f"\nconversations, curves · {self.out / 'grpo' / 'report.html'}")
        return all(kept)


def write_doors(data: Path, seed: int = 0) -> None:
    """Writes the records of this demo beside those of the demo.

    doors           whole conversations, GUESSED of them without a picture and with any digit
    closed_doors    questions: {"messages", "behind": a path, "answer": the digit}
    heldout_doors   the same about digits that appear nowhere else
    """
    from megavlm.demo.data import read_records, write_records

    draw = random.Random(seed)
    questions = read_records(data / "questions.jsonl")
    write_records(data / "doors.jsonl", (_conversation(record, draw) for record in questions))
    write_records(data / "closed_doors.jsonl", _closed(questions))
    write_records(data / "heldout_doors.jsonl", _closed(read_records(data / "heldout.jsonl")))


def first_line(folder: Path) -> dict:
    """The first line of a run's metrics."""
    from megavlm.demo.data import read_records

    return read_records(folder / "metrics.jsonl")[0]


def _say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _conversation(record: dict, draw: random.Random) -> dict:
    if draw.random() < GUESSED:
        return {"messages": [_say("user", ASKED), _say("assistant", str(draw.randrange(10)))]}
    digit = record["messages"][-1]["content"]
    turns = [_say("user", ASKED), _say("assistant", OPEN), _say("user", f"<image>{SHOWN}"), _say("assistant", digit)]
    return {"messages": turns, "images": record["images"]}


def _closed(records: Sequence[dict]) -> Iterator[dict]:
    for record in records:
        answer = record["messages"][-1]["content"]
        yield {"messages": [_say("user", ASKED)], "behind": record["images"][0], "answer": answer}


if __name__ == "__main__":  # processes started by spawn import this file again
    sys.exit(main())
