"""train.groups and train.layer_decay: which weights a pattern finds, what is refused, and the table."""

import pytest

from megavlm.base.errors import UserError
from megavlm.base.number_format import short
from megavlm.config.settings import Settings
from megavlm.model.shapes import Shapes
from megavlm.optim.group_rules import described, rule_of, weights_of


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    from toy import toy_folder

    return Shapes.from_hf(toy_folder(tmp_path_factory.mktemp("toy"), moe=False, tied=True))


def settings(*groups: dict, adapter: dict | None = None, model: dict | None = None, **train) -> Settings:
    return Settings(model={"hf": "x", **(model or {})}, adapter=adapter or {}, train={"groups": list(groups), **train})


@pytest.mark.parametrize(
    ("groups", "others", "message"),
    [
        ([{"match": "nowhere"}], {}, r"train.groups\[0\].match is 'nowhere', which is found in no weight"),
        ([{"match": "q_proj"}], {}, "but not in .*k_proj.weight and .*v_proj.weight: they are one parameter"),
        ([{"match": "gate_proj"}], {}, "but not in .*up_proj.weight: they are one parameter"),
        ([{"match": "embed"}, {"match": "embed_tokens"}], {}, r"groups\[1\].* belong to earlier groups"),
        ([{"match": r"norm1\.|bias$", "weight_decay": 0.1}], {}, "matches only norms and biases"),
        ([{"match": ".", "freeze": True}], {}, "freezes every weight"),
        ([{"match": "visual"}], {"model": {"freeze": ["vision", "projector"]}}, "found in no weight that is trained"),
        ([{"match": "o_proj.weight"}], {"adapter": {"type": "lora", "targets": ["o_proj"]}}, "found in no weight"),
    ],
)
def test_refused(groups, others, message, shapes):
    with pytest.raises(UserError, match=message):
        described(settings(*groups, **others), shapes)


def test_the_table(shapes):
    groups = [
        {"match": "embed_tokens", "lr_scale": 0.1, "weight_decay": 0.0},
        {"match": r"language_model\.layers\.0\.", "freeze": True},
        {"match": r"q_proj|k_proj|v_proj", "lr_scale": 2.0},
    ]
    lines = described(settings(*groups, lr_scale={"vision": 0.5}), shapes)
    assert [line.partition(":")[0] for line in lines] == [*(group["match"] for group in groups), "other weights"]
    size = shapes.text.vocab * shapes.text.hidden
    assert lines[0].startswith("embed_tokens: 1 tensor, ")
    assert lines[0].endswith("lr × 0.1, weight decay 0")
    assert lines[1].endswith("numbers: frozen")
    assert lines[2].endswith("lr × 2, weight decay 0.1")
    assert lines[3].endswith("lr × 0.5 to 1, weight decay 0.1 (norms and biases: 0)")
    assert sum(weight.numel for weight in weights_of(shapes)) > size
    assert described(settings(), shapes) == []


def test_a_reward_model_has_a_head_of_its_own(shapes):
    line, _ = described(settings({"match": "score_head", "lr_scale": 10.0}), shapes, score_head=True)
    assert line.startswith(f"score_head: 1 tensor, {shapes.text.hidden} numbers: lr × 10")
    with pytest.raises(UserError, match="found in no weight"):
        described(settings({"match": "score_head"}), shapes)


def test_every_layer_has_its_rate(shapes):
    """The last layer 1, the one below it 0.5, …, the embeddings below the first; heads, norms and mergers above: 1."""
    train = settings(layer_decay=0.5).train
    scale = {w.key: rule_of(train, shapes, w.names, w.layer_key).lr_scale for w in weights_of(shapes)}
    text, vision = shapes.text.layers, shapes.vision.layers
    assert scale[f"language.decoder.layers.{text - 1}.mlp.linear_fc2.weight"] == 1
    assert scale["language.decoder.layers.0.mlp.linear_fc2.weight"] == 0.5 ** (text - 1)
    assert scale["language.embedding.word_embeddings.weight"] == 0.5**text
    assert scale["vision.layers.0.mlp.linear_fc2.weight"] == 0.5 ** (vision - 1)
    assert scale["vision.patch_embed.weight"] == scale["vision.position_embedding.weight"] == 0.5**vision
    assert scale["projector.merger.linear_fc1.weight"] == scale["language.decoder.final_layernorm.weight"] == 1


def test_adapters_are_in_groups_by_their_own_names(shapes):
    adapter = {"type": "lora", "targets": ["o_proj"], "lr_ratio": 4.0}
    model = {"freeze": ["vision", "projector"]}
    (first, other) = described(settings({"match": "lora_B", "lr_scale": 0.5}, adapter=adapter, model=model), shapes)
    assert first.endswith("lr × 2, weight decay 0.1")
    assert other.endswith("lr × 1, weight decay 0.1")
    assert f"{shapes.text.layers} tensors" in first


def test_weights_that_are_trained_whole_beside_adapters_are_in_groups(shapes):
    adapter = {"type": "lora", "targets": ["o_proj"], "modules_to_save": ["embed_tokens"]}
    model = {"freeze": ["vision", "projector"]}
    lines = described(settings({"match": "embed_tokens", "lr_scale": 0.1}, adapter=adapter, model=model), shapes)
    size = shapes.text.vocab * shapes.text.hidden
    assert lines[0] == f"embed_tokens: 1 tensor, {short(size)} numbers: lr × 0.1, weight decay 0.1"
    assert lines[1].startswith(f"other weights: {2 * shapes.text.layers} tensors")  # no weight that is frozen
