"""`python -m megavlm.demo`: from pictures and random weights to a Hugging Face folder that reads digits.

It writes the data and a tiny random model, then prints and runs the commands that a user would type, in two processes
with TP 2 and sequence parallelism. Exit status: 0 if at least 95 % of the held-out digits are recognised, and
transformers and, where it is installed, vLLM give the same answers from the exported folder; 1 if not, or if a command
fails; 2 if the output folder exists.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.config.load import load_settings
from megavlm.demo.commands import (
    CONFIGS,
    DEFAULT_OUT,
    NPROC,
    console,
    run,
    show_variable,
    status_of,
    work_in,
)

REQUIRED_ACCURACY = 0.95
STAGES = ("stage0", "stage1", "stage2", "stage3", "sft")
PARTS = ("data", "model", *STAGES, "before", "after", "exported")  # subfolders of the output folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m megavlm.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help=f"folder to create (default: {DEFAULT_OUT})")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier demo in the folder")
    options = parser.parse_args(arguments)

    def job() -> bool:
        demo = Demo(Path(options.out))
        demo.prepare(options.overwrite)
        demo.train()
        passed = demo.check()
        demo.show_paths()
        return passed

    return status_of(job)


class Demo:
    """One run of the demo in the folder `out`. Commands run in the top folder of the clone.

    Attributes:
        sft: the settings of the supervised fine-tuning.
        questions: the held-out questions.
        start: the run from which it starts.
    """

    def __init__(self, out: Path):
        self.out = work_in(out)
        self.sft = load_settings(CONFIGS / "sft.yaml")
        questions, start = self.sft.data.eval[0].path, self.sft.model.load
        assert isinstance(questions, Path), "configs/demo/sft.yaml sets data.eval to a file"
        assert start is not None, "configs/demo/sft.yaml sets model.load"
        self.questions, self.start = questions, start

    def prepare(self, overwrite: bool) -> None:
        """Writes the data and the model folder."""
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            if not overwrite:
                raise UserError(f"{self.out} exists already", "choose another --out, or use --overwrite to replace it")
            for name in PARTS:  # other files in the folder are kept
                shutil.rmtree(self.out / name, ignore_errors=True)
        console.print("importing torch and transformers …")  # this takes some seconds without other output
        from transformers.utils.logging import disable_progress_bar

        from megavlm.demo.data import read_texts, write_data
        from megavlm.demo.model_folder import make_model_folder

        disable_progress_bar()
        data = write_data(self.out / "data")
        console.print(f"data · {data}: handwritten digits (scikit-learn), photographs with captions (scikit-image)")
        model = make_model_folder(self.out / "model", corpus=read_texts(data), vocab_size=1024)
        console.print(f"model · {model}: a Qwen3-VL of 4 + 4 layers with random weights, its tokenizer and processor")
        show_variable(self.out)

    def train(self) -> None:
        """Answers before training, the four stages, fine-tuning, export, answers after training."""
        out, sft = self.out, CONFIGS / "sft.yaml"
        run("megavlm", "infer", sft, f"model.load={out / 'model'}", f"output={out / 'before'}", *NPROC)
        self.pretrain()
        run("megavlm", "sft", sft, *NPROC)
        best = f"model.load={out / 'sft' / 'checkpoints' / 'best'}"
        run("megavlm", "export", sft, best, "--out", out / "exported")
        run("megavlm", "infer", sft, best, f"output={out / 'after'}", *NPROC)
        run("python", "-m", "megavlm.report.run_report", out / "sft")  # again, because now there are answers to show

    def pretrain(self) -> None:
        """Runs the four stages of pretraining."""
        for stage in STAGES[:-1]:
            run("megavlm", "pretrain", CONFIGS / f"{stage}.yaml", *NPROC)

    def begin(self, folder: Path, overwrite: bool) -> None:
        """Makes the folder of a further demo. Uses the pretrained model of this one, or trains it."""
        if folder.exists():
            if not overwrite:
                raise UserError(f"{folder} exists already", "use --overwrite to replace it, or choose another --out")
            shutil.rmtree(folder)
        if self.is_pretrained():
            console.print(f"continuing from {self.start}")
            show_variable(self.out)
        else:
            self.prepare(overwrite)
            self.pretrain()
        folder.mkdir()

    def is_pretrained(self) -> bool:
        """Whether the folder has the results of `prepare` and the last checkpoint of the four stages."""
        last = load_settings(CONFIGS / f"{STAGES[-2]}.yaml")
        assert last.output is not None, "the configuration of a stage sets output"
        checkpoint = last.output / "checkpoints" / f"step_{last.train.steps:08d}"
        return all(path.exists() for path in (checkpoint, last.model.hf, self.questions))

    def check(self) -> bool:
        """Counts right answers before and after training, and has others answer from the exported folder."""
        from megavlm.demo import answers

        expected = answers.expected_answers(self.questions)
        total = len(expected)
        given = {when: answers.read_answers(self.out / when / "answers.jsonl", total) for when in ("before", "after")}
        right = {when: answers.count_right(found, expected) for when, found in given.items()}
        console.print(f"\n{total} handwritten digits that were not used for training (chance: 10 %)")
        for when, count in right.items():
            console.print(f"  {when:6} {count:4} right, {count / total:6.1%}   for example {_examples(given[when])}")

        console.print(f"\nanswers of others that load {self.out / 'exported'}, in fp32")
        agree = True
        for name, answer in (("transformers", answers.transformers_answers), ("vLLM", answers.vllm_answers)):
            theirs = answer(self.out / "exported", self.questions, self.sft.generate.max_new_tokens)
            if theirs is None:
                console.print(f"  {name} is not installed (make vllm), so its answers are not compared")
                continue
            pairs = list(zip(given["after"], theirs, strict=True))
            same = sum(ours == other for ours, other in pairs)
            console.print(f"  {same} of {total} answers of {name} agree with those of megavlm")
            for number, (ours, other) in enumerate(pairs):
                if ours != other:
                    console.print(f"  question {number}: megavlm {ours!r}, {name} {other!r}")
            agree = agree and same == total
        return right["after"] >= REQUIRED_ACCURACY * total and agree

    def show_paths(self) -> None:
        """Prints the paths of the results."""
        console.print()
        for stage in STAGES:
            console.print(f"{stage} · {self.out / stage / 'report.html'} · {self.out / stage / 'loss.png'}")
        console.print(f"model · {self.out / 'exported'}")


def _examples(answers: list[str]) -> str:
    return ", ".join(repr(answer) for answer in answers[:5])
