"""`megavlm chat` with an adapter of peft's: the answers are those of transformers' model with the adapter merged."""

import shutil

import pytest
from adapted import ADAPTERS, peft_model
from parity import Toys
from test_generate import NEW_TOKENS, reference_answers
from test_train_verbs import megavlm, sft_config


@pytest.mark.parametrize(
    ("named", "layout"),
    [("model.adapter={}", ()), ("--adapter {}", ("parallel.tensor=2", "--nproc", 2))],
    ids=["one process, a setting", "TP2, a flag"],
)
def test_a_conversation_with_an_adapter_is_that_of_peft(named, layout, tmp_path):
    toys = Toys(tmp_path)
    base, (_, options) = toys.folder("dense"), ADAPTERS["lora"]
    adapted = peft_model(base, options)
    adapted.save_pretrained(tmp_path / "peft")
    merged = shutil.copytree(base, tmp_path / "merged", ignore=shutil.ignore_patterns("*.safetensors*"))
    adapted.merge_and_unload().save_pretrained(merged)
    say = lambda role, content: {"role": role, "content": content}
    messages, answers = [], []
    for question in ("Two and two?", "And now?"):
        messages.append(say("user", question))
        answers += reference_answers(merged, [{"messages": messages}], toys.root)
        messages.append(say("assistant", answers[-1]))
    assert answers[:1] != reference_answers(base, [{"messages": messages[:1]}], toys.root)
    asked = (*named.format(tmp_path / "peft").split(), "output=null", f"generate.max_new_tokens={NEW_TOKENS}")
    done = megavlm("chat", sft_config(toys, tmp_path), *asked, *layout, stdin="Two and two?\nAnd now?\n")
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert f"{tmp_path / 'peft'}" in done.stderr
