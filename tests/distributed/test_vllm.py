"""Real vLLM as the engine: its answers, its log-probabilities after new weights, and servers that are lost.

One server is started for the whole file, and again when it was killed. What it is compared with is in `vllm_runs`.
"""

import json
import threading
import time
from dataclasses import replace
from functools import partial

import forked_command
import psutil
import pytest
import vllm_runs
from test_engine import tokens_of
from toy import reference_model, toy_records, write_records
from vllm_processes import requests_to
from vllm_served import CLOSE, FolderWeights, by_index, prompts_of, vllm_engine, vllm_settings

from megavlm.base.errors import UserError
from megavlm.monitor.rollout_log import read_rollouts


def test_greedy_answers_are_those_of_the_built_in_engine(served, toys, asked, prompts, sampling, world1):
    settings = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"eval": str(asked[1])},
        "train": {"precision": "fp32"},
    }
    (expected,) = world1.run(vllm_runs.of_the_built_in_engine, settings, sampling(6))
    found = by_index(served.generate(iter(prompts(range(50))), sampling(6)))
    assert sorted(found) == list(range(50))
    for index, (answer,) in found.items():
        (ours,) = expected[index]
        assert (answer.tokens, answer.finish) == (ours.tokens, ours.finish), index
        assert answer.logprobs == pytest.approx(ours.logprobs, abs=CLOSE)
    assert len({tuple(answer.tokens) for (answer,) in found.values()}) > 25  # the questions matter


def test_new_weights_are_used_at_once_and_for_everything(served, toys, asked, prompts, sampling, tmp_path):
    """Also for pictures, prompts and videos that vLLM has seen before, and still has in its caches otherwise."""
    from transformers import AutoProcessor

    folder = toys.folder("dense")
    processor, chosen = AutoProcessor.from_pretrained(folder), range(12)
    before = by_index(served.generate(iter(prompts(chosen, 2)), sampling(6, 1.0)))
    served._weights.folder = vllm_runs.changed(folder, tmp_path / "changed")
    served.sync()
    after = by_index(served.generate(iter(prompts(chosen, 2)), sampling(6, 1.0)))
    old, new = reference_model(folder), reference_model(served._weights.folder)
    for index in chosen:
        for model, answers, other in ((old, before, new), (new, after, old)):
            for answer in answers[index]:
                words = asked[0][index], toys.root, answer.tokens
                assert answer.logprobs == pytest.approx(vllm_runs.logprobs_of(model, processor, *words), abs=CLOSE)
                assert answer.policy_logprobs == answer.sampled_logprobs == answer.logprobs
                others = vllm_runs.logprobs_of(other, processor, *words)
                assert max(abs(a - b) for a, b in zip(answer.logprobs, others, strict=True)) > 100 * CLOSE
    served._weights.folder = folder
    served.sync()


@pytest.mark.parametrize("what", ["continue", "drop"])
def test_weights_arrive_while_answers_are_sampled(what, served, prompts, sampling):
    """No answer is lost, none is there twice; dropped ones are those of an undisturbed engine."""
    wanted = prompts(range(20), 2)
    undisturbed = by_index(served.generate(iter(wanted), sampling(60, 1.0)))
    settings = served._settings
    rollout = settings.rollout.model_copy(update={"partial": what})
    for keeper in served._keepers:
        keeper._settings = settings.model_copy(update={"rollout": rollout})
    begun, found = threading.Event(), {}

    def read():
        yield from wanted
        begun.set()

    thread = threading.Thread(target=lambda: found.update(by_index(served.generate(read(), sampling(60, 1.0)))))
    thread.start()
    begun.wait()
    served.sync()
    thread.join()
    assert sorted(found) == list(range(20))
    assert tokens_of(found) == tokens_of(undisturbed)  # the weights were the same: so are answers that go on


def test_a_killed_server_costs_nothing_but_time(served, prompts, sampling):
    wanted, found = prompts(range(16), 2), []
    undisturbed = by_index(served.generate(iter(wanted), sampling(40, 1.0)))
    server = psutil.Process(served._keepers[0]._process.pid)
    server.suspend()  # or all answers might be there before the kill
    thread = threading.Thread(target=lambda: found.extend(served.generate(iter(wanted), sampling(40, 1.0))))
    thread.start()
    end = time.monotonic() + 60
    while not requests_to(server):
        assert time.monotonic() < end
        time.sleep(0.01)
    server.kill()
    thread.join(timeout=300)
    assert served._keepers[0]._process.pid != server.pid
    assert tokens_of(by_index(found)) == tokens_of(undisturbed)


def test_an_engine_that_dies_while_weights_are_on_their_way(served, prompts, sampling):
    """vLLM itself would wait for its answer for ever: the server ends, and the next one gets the weights."""
    wanted = prompts(range(4))
    undisturbed = by_index(served.generate(iter(wanted), sampling(6)))
    server = psutil.Process(served._keepers[0]._process.pid)
    [engine] = [child for child in server.children() if "EngineCore" in " ".join(child.cmdline())]
    engine.suspend()
    thread = threading.Thread(target=served.sync)
    thread.start()
    end = time.monotonic() + 60
    while served._keepers[0].version is not None:  # until it begins to send
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(1)
    engine.kill()
    server.wait(timeout=60)
    thread.join(timeout=300)
    assert not thread.is_alive()
    assert served._keepers[0]._process.pid != server.pid
    assert tokens_of(by_index(served.generate(iter(wanted), sampling(6)))) == tokens_of(undisturbed)


@pytest.mark.parametrize("case", vllm_runs.TRAINERS)
def test_weights_come_from_every_layout(case, request, toys, asked, sampling, world2, tmp_path):
    kind, more = vllm_runs.TRAINERS[case]
    served = request.getfixturevalue("served" if kind == "dense" else "served_moe")
    settings = vllm_runs.trainer_settings(served, toys, kind, asked[1], tmp_path) | more
    ranks = world2.run(vllm_runs.from_a_trainer, settings, sampling(4))
    found, expected = ({i: a for rank in ranks for i, a in rank[which].items()} for which in (0, 1))
    assert sorted(found) == sorted(expected) == list(range(50))
    for index, (answer,) in found.items():
        (ours,) = expected[index]
        assert answer.tokens == ours.tokens, index
        assert answer.logprobs == pytest.approx(ours.logprobs, abs=CLOSE)
    served.sync()
    (old,) = served.generate(iter(prompts_of(toys, kind, asked)[:1]), sampling(4))
    assert max(abs(a - b) for a, b in zip(old.answers[0].logprobs, found[0][0].logprobs, strict=True)) > 100 * CLOSE


def test_no_answer_is_without_weights_when_they_arrive(served, prompts, sampling):
    """Short answers end all the time, also between the request for a pause and the pause: the weights are then old."""
    found: dict[int, list] = {}
    wanted = prompts(range(50), 2)
    problem: list[Exception] = []

    def answer():
        try:
            found.update(by_index(served.generate(iter(wanted), sampling(8, 1.0))))
        except Exception as error:
            problem.append(error)

    thread = threading.Thread(target=answer)
    thread.start()
    for _ in range(3):
        served.sync()
    thread.join()
    assert not problem
    assert sorted(found) == list(range(50))


@pytest.fixture(scope="module")
def learned(served, toys, tmp_path_factory):
    """A run of three steps."""
    found = vllm_runs.grpo(served, toys, tmp_path_factory.mktemp("grpo") / "run", 3)
    served.sync()
    return found


def test_grpo_learns_with_it(learned):
    """The log-probabilities that vLLM gives are those that the trainer computes, also after updates."""
    lines, _, _ = learned
    assert all(line["mismatch_max"] < CLOSE for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)


def test_grpo_samples_ahead(served, learned, toys, tmp_path):
    """Answers are one step older than what learns from them; prompts stay in order, and the end is the end."""
    lines, prompts, seconds = vllm_runs.grpo(served, toys, tmp_path / "run", 8, ahead=1)
    assert [line["staleness"] for line in lines] == [0.0] + 7 * [1.0]
    assert lines[0]["mismatch_max"] < CLOSE
    assert max(line["mismatch_max"] for line in lines[1:]) > 10 * CLOSE  # of older weights
    assert len(prompts) == 32  # of eight records, each once in an epoch
    assert all(len(set(prompts[first : first + 8])) == 8 for first in range(0, 32, 8))
    assert prompts[:12] == learned[1]
    assert lines[-1]["epoch/for_grpo"] == pytest.approx(4.0)
    assert seconds < 60  # far more than a busy machine needs, far less than start_minutes
    served.sync()


def test_held_out_questions_beside_a_server(served, toys, tmp_path):
    """The trainer answers them itself, and what the server samples stays as it is.

    Without chance (``top_k: 1``) the server gives the same answers to the same questions from the same weights.
    """
    folder = tmp_path / "run"
    path = vllm_runs.grpo_config(served, toys, folder, 1, prompts=8, group_size=2, top_k=1)
    config = json.loads(path.read_text())
    config["data"]["eval"], config["eval"] = config["data"]["train"], {"every": 1}
    path.write_text(json.dumps(config))
    result = forked_command.run(["grpo", str(path)])
    assert result.returncode == 0, result.stdout + result.stderr
    held = read_rollouts(folder, "held_out_answers.jsonl")
    assert [step.step for step in held] == [0, 1]
    answers = {group.sample: group.answers[0] for group in held[0].groups}
    assert len(answers) == 8
    for group in read_rollouts(folder)[0].groups:
        assert {answer.text for answer in group.answers} == {answers[group.sample].text}
        assert group.answers[0].reward == answers[group.sample].reward
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/answers/score"] == pytest.approx(sum(one.reward for one in answers.values()) / 8)
    assert lines[1]["mismatch_max"] < CLOSE
    served.sync()


def test_stop_strings_and_filters(served, toys, prompts, sampling):
    """An answer ends with the token that completes a stop string; with top_k 1 nothing is left to chance."""
    from transformers import AutoTokenizer

    decode = partial(AutoTokenizer.from_pretrained(toys.folder("dense")).decode, skip_special_tokens=True)
    whole = by_index(served.generate(iter(prompts(range(6))), sampling(8)))
    few = by_index(served.generate(iter(prompts(range(6), 2)), sampling(8, 1.0, top_k=1)))
    stop = decode(whole[2][0].tokens)[2:4]
    ended = by_index(served.generate(iter(prompts(range(6))), sampling(8, stop_strings=(stop,))))
    for index, (answer,) in whole.items():
        assert all(one.tokens == answer.tokens for one in few[index])
        upto = [n for n in range(1, len(answer.tokens) + 1) if stop in decode(answer.tokens[:n])]
        assert ended[index][0].tokens == answer.tokens[: min(upto, default=len(answer.tokens))]
        assert ended[index][0].finish == ("stop" if upto else answer.finish)
    assert any(len(ended[index][0].tokens) < len(whole[index][0].tokens) for index in whole)
    firsts = {answers[0].tokens[0] for answers in whole.values()}
    banning = replace(sampling(8), banned=tuple(firsts))
    others = by_index(served.generate(iter(prompts(range(6))), banning))
    assert not firsts & {token for (answer,) in others.values() for token in answer.tokens}


def test_prompts_that_cannot_be_read_or_are_too_long(served, prompts, sampling, monkeypatch):
    def read():
        yield from prompts(range(2))
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found += served.generate(read(), sampling(2))
    (prompt,) = prompts(range(1))
    data = served._settings.data.model_copy(update={"seq_length": len(prompt.sample.input_ids)})
    monkeypatch.setattr(served, "_settings", served._settings.model_copy(update={"data": data}))
    with pytest.raises(UserError, match=r"leaves no room for an answer in data.seq_length = \d+"):
        list(served.generate(iter([prompt]), sampling(2)))


def test_a_tensor_that_arrives_with_other_values_is_named(served, toys, tmp_path):
    from megavlm.vllm.client import Client, Refused
    from megavlm.vllm.kept import Kept

    kept = Kept(f"{served._token}:x", tmp_path / "kept")
    kept.write(FolderWeights(toys.folder("dense")).buckets(0))
    names = sorted(kept.digests)
    kept.digests[names[0]] += 1
    kept.digests["model.nothing"] = 1
    with pytest.raises(Refused) as refused:
        kept.send(Client(served._urls[0]), "drop", 60)
    assert f"1 tensors arrived with other values: {names[0]}" in str(refused.value)
    assert "1 tensors did not arrive: model.nothing" in str(refused.value)
    served.sync()


def test_a_server_of_another_model_is_refused(served, toys, tmp_path):
    with pytest.raises(UserError, match=r"serves another model than .*: .* here and .* there"):
        vllm_engine(toys.folder("moe"), tmp_path, url=served._urls)


def test_a_server_for_another_temperature_is_refused(served, toys):
    from megavlm.vllm.client import Client
    from megavlm.vllm.identity import check_identity

    settings = vllm_settings(toys.folder("dense"))
    rollout = settings.rollout.model_copy(update={"temperature": 0.7})
    told = Client(served._urls[0]).get("/identity", 10)
    check_identity(told, settings, "here")
    with pytest.raises(UserError, match=r"logprobs_mode raw_logprobs, but the run needs processed_logprobs"):
        check_identity(told, settings.model_copy(update={"rollout": rollout}), "here")


def test_a_server_with_the_weights_of_another_run_is_refused(served, toys, prompts, sampling, tmp_path):
    other = vllm_engine(toys.folder("dense"), tmp_path, url=served._urls)
    other.sync()
    with pytest.raises(UserError, match="has the weights of another run"):
        list(served.generate(iter(prompts(range(1))), sampling(2)))
    other.close()
    served.sync()
    assert list(served.generate(iter(prompts(range(1))), sampling(2)))


def test_a_server_that_is_slow(served, prompts, sampling):
    from megavlm.vllm.asking import ask
    from megavlm.vllm.client import Client

    limits = served._settings.rollout.vllm.model_copy(update={"request_minutes": 1e-4})
    with pytest.raises(UserError, match=r"has not answered within rollout.vllm.request_minutes = 0.0001"):
        ask(Client(served._urls[0]), prompts([0])[0], sampling(100), limits, lambda: None, served._token)


def test_infer_asks_servers(served, toys, tmp_path):
    """The same greedy answers as those of the built-in engine, with pictures and a video; and to one prompt."""
    data = write_records(toys.root / "for_infer.jsonl", toy_records(toys.root))
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"eval": str(data), "seq_length": 256},
        "train": {"precision": "fp32"},
        "generate": {"max_new_tokens": 8},
        "rollout": {"vllm": {"url": served._urls}, "engine": "vllm"},
    }
    (tmp_path / "infer.yaml").write_text(json.dumps(config))
    run = lambda *more: forked_command.run(["infer", str(tmp_path / "infer.yaml"), *more])
    for engine, more in (("vllm", []), ("megatron", ["rollout.engine=megatron", "rollout.vllm.url=[]"])):
        result = run(f"output={tmp_path / engine}", *more)
        assert result.returncode == 0, result.stdout + result.stderr
    found = {engine: (tmp_path / engine / "answers.jsonl").read_text() for engine in ("vllm", "megatron")}
    assert found["vllm"] == found["megatron"]
    assert len(found["vllm"].splitlines()) == 8
    sampling = {engine: json.loads((tmp_path / engine / "answers.json").read_text())["sampling"] for engine in found}
    assert sampling["vllm"] == sampling["megatron"] | {"engine": "vllm"}
    assert not list((tmp_path / "vllm" / "vllm_infer").glob("weights-*"))
    asked = run(f"output={tmp_path / 'one'}", "--prompt", "Two and two?")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert asked.stdout.strip()
    for setting, told in (
        ("generate.batch_size=4", "generate.batch_size is 4, but rollout.engine is vllm: it would be ignored"),
        ("generate.temperature=0.005", "vLLM would sample at 0.01"),
        ("output=null", "set output"),
    ):
        refused = run(f"output={tmp_path / 'one'}", "--prompt", "Two?", setting)
        assert refused.returncode == 2
        assert told in refused.stderr
    served.sync()
