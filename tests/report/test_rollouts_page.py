"""Reinforcement learning in report.html: sampled answers, curves, warnings; hostile answers are shown, not obeyed."""

import base64
import io
import json
import re

import pytest
import yaml
from markupsafe import Markup
from PIL import Image

from megavlm.monitor import metrics
from megavlm.monitor.metrics import REQUIRED, MetricsWriter
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup, RolloutLog, held_out_log
from megavlm.report.policy import policy_charts
from megavlm.report.run import RecordedRun
from megavlm.report.run_report import write_report

RL = {
    "reward": 0.5, "reward_std": 0.3, "reward/exact": 0.4, "reward/format": 0.9, "flat_groups": 0.25, "kl": 0.05,
    "entropy": 0.8, "clip_share": 0.01, "ratio_max": 3.0, "ratio_mean": 1.25,
    "groups": 8, "answers": 64, "corrected_share": 0.02, "mismatch_kl": 5e-4, "mismatch_max": 1.5,
    "answer_tokens": 200.0, "truncated_share": 0.05, "reward_failures": 0, "staleness": 0.0, "seconds_rollout": 30.0,
    "seconds_reward": 0.5, "seconds_update": 20.0, "seconds_sync": 0.25, "rollout_tokens_per_second": 3000.0,
}  # fmt: skip
HOSTILE = "<|vision_start|><|image_pad|><image><script>alert(1)</script></p><img src=x> {{ 1 }}<|im_end|>"


def logged(text, reward, advantage, **changes):
    fields = {"parts": {"exact": reward, "format": 0.5}, "tokens": 3, "finish": "stop"} | changes
    return LoggedAnswer(text, reward, advantage=advantage, **fields)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a run of 6 steps, with 6 logged steps of one group each; the entropy collapses at the end."""
    folder = tmp_path_factory.mktemp("runs") / "grpo"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": "hf", "freeze": []}}))
    with MetricsWriter(folder) as writer:
        for step in range(1, 7):
            line = {**dict.fromkeys(REQUIRED, 1.0), **RL, "step": step, "mfu": None, "reward": step / 8}
            writer.write(line | {"entropy": 0.8 if step < 4 else 0.1})
    Image.new("RGB", (64, 32), (200, 80, 80)).save(folder.parent / "7.png")
    log = RolloutLog(folder)
    for step in range(1, 7):
        answers = [
            logged("low", 0.25, -1.0),
            logged(HOSTILE, None, None, parts={"exact": None}, failures=["exact: <b>"], tokens=1),
            logged("", 1.0, 1.0, finish="length"),
        ]
        question = f"<image> in step {step}?"
        log.write(step, [LoggedGroup("../train.jsonl:3", question, ["7.png", "gone.png"], "<7>", answers)])
    # a path relative to a folder above the output folder, as in a run that was started there
    (folder.parent / "train.jsonl").write_text("{}\n")
    log.write(7, [LoggedGroup("train.jsonl:1", "last?", ["7.png"] * 5, None, [logged("x", 0.5, 0.0)] * 17)])
    return write_report(folder).read_text()


def curves_of(page):
    """Title → name → values, of each chart."""
    drawn = dict(re.findall(r"<figcaption><b>([^<]*)</b>.*?data-chart=\"([^\"]*)\"", page))
    return {
        title: {c["name"]: [v for _, v in c["points"]] for c in json.loads(Markup(data).unescape())["curves"]}
        for title, data in drawn.items()
    }


def test_the_table_of_runs_has_rewards_in_place_of_a_loss_near_zero(page):
    assert re.search(r'data-label="reward"><span class="wide">reward </span>0\.125 → 0\.\d{3}</td>', page)
    assert 'data-label="loss"' not in page


def test_the_newest_steps_and_the_first_are_shown_newest_first(page):
    assert re.findall(r"<summary>Step (\d+) ", page) == ["7", "6", "5", "4", "1"]
    assert page.count("<details open>") == 1
    assert re.search(r"<details open>\s*<summary>Step 7 ", page)


def test_answers_stand_side_by_side_with_their_rewards_the_highest_first(page):
    group = page[page.index("in step 6?") : page.index("Step 5")]
    tries = group.split('<div class="try')[1:]
    assert len(tries) == 3
    best, low, failed = tries
    assert "<b>1.00</b>" in best
    assert "an empty answer" in best
    assert ">cut off<" in best
    assert best.startswith(" above")
    assert "advantage +1.00" in best
    assert "<b>0.250</b>" in low
    assert low.startswith(" below")
    assert "exact 0.25" in low
    assert "format 0.5" in low
    assert "3 tokens" in low
    assert "cut off" not in low
    assert failed.startswith('">')  # neither above nor below
    assert "<b>–</b>" in failed
    assert "exact –" in failed
    assert "1 token<" in failed
    assert "exact: &lt;b&gt;" in failed
    assert "mean reward 0.625, spread 0.375" in group  # of 0.25 and 1
    assert "&lt;7&gt;" in group


def test_what_an_answer_says_is_quoted(page):
    assert "&lt;image&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;/p&gt;&lt;img src=x&gt; {{ 1 }}" in page
    assert '<i class="token">&lt;|image_pad|&gt;</i>' in page
    assert "&lt;image&gt; in step 6?" in page
    for live in ("<script>alert", "<img src=x", "<image>", "<b>exact", "<7>"):
        assert live not in page
    assert not re.search(r"https?://|<link|@import|url\(", page)
    assert "None" not in page.partition("</style>")[2]


def test_pictures_of_the_sample_are_shown_or_their_absence_is_told(page):
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 4  # of step 7; those of the others are beside a file that is not there
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.getpixel((0, 0)) == (200, 80, 80)
    assert "gone.png does not exist" in page
    assert "not shown: 1 more pictures and videos" in page
    assert "not shown: 1 more answers" in page
    assert "all rewards 0.5: the group teaches nothing" in page


# Title → name of each curve → its last value.
CURVES = {
    "Reward": {"reward": "0.7500"},
    "Each reward": {"exact": "0.4000", "format": "0.9000"},
    "Spread of rewards": {"std": "0.3000"},
    "Groups without spread, %": {"flat_groups, %": "25.00"},
    "Failed rewards": {"answers": "0.000"},
    "Entropy": {"entropy": "0.1000"},
    "KL to the reference": {"kl": "0.05000"},
    "Clipped tokens, %": {"clip_share, %": "1.000"},
    "Ratio of probabilities": {"mean": "1.250", "largest": "3.000"},
    "Limited by align.correction, %": {"corrected_share, %": "2.000"},
    "Sampler against trainer": {"mean": "5.00e-04", "largest": "1.500"},
    "Staleness": {"steps": "0.000"},
    "Sampled in a step": {"prompts": "8.00", "answers": "64.0"},
    "Length": {"tokens": "200.0"},
    "Cut off, %": {"truncated_share, %": "5.000"},
    "Seconds of a step": {"rollout": "30.00", "reward": "0.5000", "update": "20.00", "sync": "0.2500"},
    "Sampled tokens per second": {"tokens/s": "3.00k"},
    "Loss": {"loss": "1.000"},
}


def documented_names():
    """The fields that only reinforcement learning writes, from the description of metrics.jsonl."""
    text = metrics.__doc__
    text = text[text.index("Reinforcement learning adds") : text.index("train.kl_to_start adds")]
    rows = re.findall(r"^    ([\w/]+(?:, [\w/]+)*)", text, re.MULTILINE)
    return [name.replace("NAME", "exact") for row in rows for name in row.split(", ")]


@pytest.mark.parametrize("name", documented_names())
def test_every_metric_has_a_curve(name):
    empty = dict.fromkeys(documented_names())
    draw = lambda **values: "".join(
        drawn for _, charts in policy_charts([{**empty, "step": 1, **values}]) for drawn in charts
    )
    assert draw() == ""
    assert draw(**{name: 0.5}).count("<path") >= 1


def test_each_of_many_rewards_has_a_curve():
    line = {"step": 1, "reward": 0.5, **{f"reward/r{number}": number / 16 for number in range(8)}}
    curves = curves_of("".join(dict(policy_charts([line, line | {"step": 2}]))["Rewards"]))
    assert list(curves["Each reward"]) == [f"r{number}" for number in range(6)]
    assert curves["Each reward, from number 7"] == {"r6": ["0.3750"] * 2, "r7": ["0.4375"] * 2}


def test_the_curves_and_the_reward_at_the_head_of_the_page(page):
    assert "0.750</b><span>reward at step 6, 0.125 at the start" in page
    curves = curves_of(page)
    assert curves["Reward"]["reward"] == ["0.1250", "0.2500", "0.3750", "0.5000", "0.6250", "0.7500"]
    last = {title: {name: values[-1] for name, values in named.items()} for title, named in curves.items()}
    assert list(last.items())[: len(CURVES)] == list(CURVES.items())  # the other charts are those of every run
    assert re.findall(r"<h4>([^<]*)", page) == ["Rewards", "Policy", "Answers", "Time", "Training"]


def test_a_critic_has_curves_of_its_own():
    line = {"step": 1, "reward": 0.5, "value_loss": 2.0, "explained_variance": 0.25, "returns": 0.5}
    of_critic = dict(policy_charts([line, line | {"step": 2}]))["Critic"]
    assert sum("<svg" in chart for chart in of_critic) == 3  # those with values
    assert "Critic" not in dict(policy_charts([{"step": 1, "reward": 0.5}]))


def test_warnings_stand_in_the_page(page):
    section = page[page.index("<h2>Warnings") : page.index("<h2>The run")]
    assert section.count("<li") == 1
    assert '<li class="standing">Since step 4: the entropy has collapsed: 0.100 nats per token' in section
    assert "align.epsilon_high" in section


def test_without_mismatch_its_curve_is_drawn_from_zero(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            line = {**dict.fromkeys(REQUIRED, 1.0), **RL, "mismatch_kl": 0.0, "mismatch_max": 0.0}
            writer.write({**line, "step": step, "kl": None})
    text = write_report(tmp_path).read_text()
    curves = curves_of(text)
    assert curves["Sampler against trainer"] == {"mean": ["0.000"] * 2, "largest": ["0.000"] * 2}
    assert "KL to the reference" not in curves
    assert "Sampled answers" not in text


def test_held_out_answers_and_their_curve_begin_before_the_first_step(tmp_path):
    """The line of step 0 has nothing but what was measured; sums and medians are those of the steps."""
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": "hf", "freeze": []}}))
    Image.new("RGB", (64, 32), (80, 80, 200)).save(tmp_path / "7.png")
    (tmp_path / "heldout.jsonl").write_text("{}\n")
    log = held_out_log(folder, 0, 8, enabled=True)
    with MetricsWriter(folder) as writer:
        for step in range(3):
            answers = [logged(f"said in step {step}", step / 2, None)]
            log.write(step, [LoggedGroup("heldout.jsonl:1", f"Q{n}", ["7.png"], "7", answers) for n in range(6)])
            measured = {"eval/answers/score": step / 2, "eval/own/answers/score": step / 4, "eval/loss": 1.0 - step / 4}
            measured |= {"eval/answers/score/exact": step / 8, "eval/answers/truncated_share": 1 - step / 2}
            trained = {**dict.fromkeys(REQUIRED, 1.0), "mfu": None, "tokens": 10 * step} if step else {}
            writer.write(trained | measured | {"step": step})
    page = write_report(folder).read_text()
    assert "Answers to held-out questions" in page
    assert re.findall(r"<summary>Step (\d+) ", page) == ["2", "1", "0"]
    assert page.count("said in step 0") == 6
    assert "advantage" not in page
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 18
    assert curves_of(page)["Score of held-out answers"] == {
        "all": ["0.000", "0.5000", "1.000"],
        "own": ["0.000", "0.2500", "0.5000"],
    }
    assert curves_of(page)["Each scorer of held-out answers"] == {"exact": ["0.000", "0.1250", "0.2500"]}
    assert curves_of(page)["Held-out answers cut off, %"] == {"cut off": ["100.0", "50.00", "0.000"]}
    assert "<b>1.00</b><span>score of held-out answers at step 2, 0.00 at the start" in page
    assert re.findall(r"mean (\w+) of these answers ([\d.]+)<", page) == [
        ("score", "1.00"),
        ("score", "0.500"),
        ("score", "0.00"),
    ]
    assert page.count('<div class="singles">') == 3
    assert curves_of(page)["Loss"]["held out"] == ["1.000", "0.7500", "0.5000"]
    run = RecordedRun.read(folder)
    assert (run.total("tokens"), run.typical("tokens")) == (30.0, 20)
