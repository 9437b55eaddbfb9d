"""Data files as public data sets have them: read as the same samples in megavlm's own form, and trained on."""

import base64
import datetime
import decimal
import json
import pickle
from collections import Counter
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from parity import Toys
from public_data import CAT, CUP, pictures, write
from pydantic import ValidationError
from test_train_verbs import megavlm, metrics_of, sft_config
from toy import write_records

from megavlm.base.errors import UserError
from megavlm.config.data_sections import DataSource
from megavlm.data.answer_groups import draft_unit
from megavlm.media.access import MediaAccess
from megavlm.media.files import File
from megavlm.records.foreign import foreign_form
from megavlm.records.forms import form_of
from megavlm.records.records import check_record
from megavlm.sources import inline, json_array, table
from megavlm.sources.jsonl import JsonlFile
from megavlm.sources.open_files import open_file
from megavlm.sources.previews import media_of, preview


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("public")


@pytest.fixture(scope="module")
def data_sets(root):
    return write(root)


def units(renderer, file, kind):
    """All samples of a file as they are trained on, with the answers of a pair."""
    found = []
    for index in range(len(file)):
        draft = draft_unit(renderer, file, index, kind)
        for one in (draft, *draft.followers):
            found.append((one, renderer.complete(one)))
    return found


def test_each_is_read_as_the_same_samples_in_our_own_form(data_sets, root, renderer):
    """Tokens, targets, weights, positions and pixels, bit for bit."""
    for data_set in data_sets:
        file = open_file(root / data_set.path)
        assert file.form == data_set.form, data_set.name
        own = open_file(write_records(root / "own.jsonl", data_set.own))
        assert own.form is None
        found, expected = units(renderer, file, data_set.kind), units(renderer, own, data_set.kind)
        assert len(found) == len(expected) >= len(data_set.own), data_set.name
        for (draft, sample), (own_draft, own_sample) in zip(found, expected, strict=True):
            for name in ("input_ids", "labels", "loss_weights", "position_ids", "pixels", "frame_grids"):
                assert torch.equal(getattr(sample, name), getattr(own_sample, name)), (data_set.name, name)
            for name in (field.name for field in fields(draft.annotations)):
                assert name == "asked" or getattr(draft.annotations, name) == getattr(own_draft.annotations, name)


def test_each_is_trained_on_by_naming_its_path_alone(data_sets, root, tmp_path_factory, tmp_path):
    toys = Toys(tmp_path_factory.mktemp("toys"))
    for verb, kind in (("sft", "tune"), ("dpo", "pair"), ("kto", "judged")):
        chosen = [data_set for data_set in data_sets if data_set.kind == kind]
        paths = ", ".join(
            f"{{path: {root / data_set.path}, name: n{number}}}" for number, data_set in enumerate(chosen)
        )
        config = sft_config(toys, tmp_path, steps=1, lr=0.001)
        rows = len(chosen) + 2
        out = tmp_path / verb
        lines = [
            "data.packing=none",
            "data.seq_length=256",
            "data.max_bad_fraction=0",
            f"train.global_batch_size={rows}",
        ]
        printed = megavlm(verb, config, f"data.train=[{paths}]", *lines, "data.workers=0", f"output={out}")
        step = metrics_of(out)[0]
        named = [name for name in step if name.startswith("samples/")]
        assert len(named) == (len(chosen) if len(chosen) > 1 else 0)
        assert all(step[name] >= 1 for name in named), step
        assert step["loss"] > 0
        if kind == "tune":
            assert "form: LLaVA or ShareGPT conversations" in str(printed)


def test_our_own_forms_are_no_foreign_ones():
    """What could be read before is read as it was."""
    for record in (
        {"messages": [{"role": "user", "content": "?"}], "question": "a", "answer": "b"},
        {"text": "a <image> b", "images": ["a.png"], "caption": "c"},
        {"text": "a text", "question": "q", "answer": "a", "image_path": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "question": "q", "images": ["a.png"]},
        {"prompt": "p", "completion": "c", "label": True},
        {"problem": "p", "answer": "a", "images": ["a.png"]},
        {"text": "x", "file_name": "notes.txt"},
        {"messages": [{"role": "user", "content": "?"}], "images": ["a.png"], "query": "a", "response": "b"},
        {"messages": [{"role": "user", "content": "?"}], "instruction": "a", "output": "b"},
        {"messages": [{"role": "user", "content": "?"}], "prompt": "a", "completion": "b"},
        {"prompt": "p", "completion": "c", "label": True, "instruction": "a", "output": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "instruction": "q"},
        {"text": "a text", "instruction": "a", "output": "b"},
    ):
        assert foreign_form(record) is None, record
        assert (
            "problem" not in record
            or check_record(record | {"images": []}, "prompt", "a:1").messages[-1]["role"] == "user"
        )


def test_nothing_is_left_of_the_foreign_form():
    record = {"prompt": "?", "completion": "!", "source": "x"}
    assert form_of(converted(record)) == "conversation"
    assert sorted(converted(record)) == ["messages", "source"]
    alpaca = {"instruction": "?", "input": "", "output": "yes", "text": "Below is … ? … yes"}
    assert [turn["content"] for turn in converted(alpaca)["messages"]] == ["?", "yes"]


def converted(record):
    return foreign_form(record).convert(record)


@pytest.mark.parametrize(
    "choices",
    [
        {"choices": ["cat", "cup"]},
        {"options": {"A": "cat", "B": "cup"}},
        {"options": "['cat', 'cup']"},
        {"options": '["cat", "cup"]'},
        {"choices": {"text": ["cat", "cup"], "label": ["A", "B"]}},
    ],
)
def test_choices_are_shown(choices):
    for answer in ("cup", "B", 1):
        found = converted({"question": "What?", "answer": answer, **choices})
        assert found == {"problem": "What?\nA. cat\nB. cup", "answer": "B"}


@pytest.mark.parametrize(
    ("record", "field", "said", "images"),
    [
        ({"question": "Does <image 2> follow <image 1>?", "answer": "A"}, "problem",
         "<image>Does <image> follow <image>?", ["c", "b", "a"]),
        ({"question": "Which?", "answer": "A"}, "problem", "<image><image><image>Which?", ["a", "b", "c"]),
        ({"prompt": "<image><image><image>Which?"}, "prompt", "<image><image><image>Which?", ["a", "b", "c"]),
        ({"instruction": "<image 3> <image 3> <image_1> <image 2>", "output": "<image 1>"}, "messages",
         [{"role": "user", "content": "<image> <image> <image> <image>"},
          {"role": "assistant", "content": "<image 1>"}], ["c", "c", "a", "b"]),
        ({"text": "A cat."}, "text", "<image><image><image>A cat.", ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_numbered_pictures_stand_where_their_marks_are(record, field, said, images):
    record |= {"image_2": "b", "image_1": "a", "image_3": "c", "image_4": None, "image_id": 7}
    found = converted(record)
    assert (found[field], found["images"]) == (said, images)
    assert [name for name in found if name.startswith("image_")] == ["image_id"]
    assert foreign_form(record).name.endswith("with pictures in the fields image_1, image_2, …")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"options": "cat or cup"}, "the choices are the text 'cat or cup'"),
        ({"options": [{"key": "A"}]}, "neither a list of texts"),
        ({"A": "cat", "B": "cup"}, "in the fields A, B"),
        ({"options": ["<image 1>", "<image 2>"]}, "there are no fields image_1"),
        ({"options": ["<image 1>", "<image 3>"], "image_1": "a.png"}, "but image_3 has none"),
    ],
)
def test_what_would_not_be_shown_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        converted({"question": "What?", "answer": "A", **more})


def test_what_a_form_lacks_is_said_of_its_sample(tmp_path):
    lines = [
        {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": "judge", "value": "!"}, {"from": "gpt", "value": "?"}]},
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "?"}],
        },
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]},
    ]
    file = open_file(write_records(tmp_path / "a.jsonl", lines))
    with pytest.raises(UserError, match=r"a\.jsonl:1: cannot be read as LLaVA or ShareGPT conversations: KeyError"):
        file.read(0)
    for index, message in ((1, "role 'judge'; allowed roles"), (2, "2 <image>, but images has 1"), (3, "images has 0")):
        with pytest.raises(UserError, match=message):
            check_record(file.read(index)[0], "tune", file.source(index))


def test_fields_and_the_folder_of_media_have_names_of_ones_own(root, tmp_path):
    pictures(root)
    data = write_records(tmp_path / "mine.jsonl", [{"picture": CAT, "ask": "What?", "say": "A cat.", "image": 7}])
    file = open_file(data, fields={"image": "picture", "question": "ask", "answer": "say"}, media=str(root))
    record, find = file.read(0)
    assert check_record(record, "tune", "a").messages[1]["content"] == "A cat."
    assert find(record["images"][0]).url == f"{root}/{CAT}"
    inside = "data:image/png;base64," + base64.b64encode((root / CAT).read_bytes()).decode()
    file = open_file(
        write_records(tmp_path / "a.jsonl", [{"image": inside, "question": "?", "answer": "!"}]), media="b"
    )
    record, find = file.read(0)
    assert find(*record["images"]).read() == (root / CAT).read_bytes()
    with pytest.raises(ValidationError, match=r"a blend has map, which would be ignored"):
        DataSource(sources=[{"path": "a"}, {"path": "b"}], map={"images": "x"})


def test_patterns_and_folders(data_sets, root, tmp_path):
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number in range(3):
        rows = [{"question": f"{number}.{row}?", "answer": "!"} for row in range(number + 1)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{number}.parquet")
    (folder.parent / "dataset_info.json").write_text("{}")
    (folder / "columns.json").write_text("[]")  # describes the others
    asked = [f"{number}.{row}?" for number in range(3) for row in range(number + 1)]
    for path in (folder, folder.parent, f"{folder}/*.parquet", f"file://{folder}/train-?.parquet"):
        file = pickle.loads(pickle.dumps(open_file(path)))
        assert [file.read(index)[0]["problem"] for index in range(len(file))] == asked, path
        assert file.source(3).endswith("train-2.parquet:1")
        assert len(file.index_files) == 3
    labels = {f"{folder}/train-*.parquet": "train", f"{folder}/*.parquet": "data", "a/b.parquet": "b", "c.jsonl": "c"}
    labels |= {"d.json": "d", "e.feather": "e"}
    assert {path: DataSource(path=path).label for path in labels} == labels
    with pytest.raises(UserError, match="no file matches"):
        open_file(f"{folder}/*.jsonl")
    (folder / "test-0.parquet").write_bytes((folder / "train-0.parquet").read_bytes())
    with pytest.raises(UserError, match="files to train and to test"):
        open_file(folder)


def test_json_arrays_are_indexed_in_pieces(tmp_path, monkeypatch):
    """Objects that are longer than a block, brackets in texts, characters of several bytes; against json itself."""
    records = [{"text": 'é]},{"[\\"' * number + "日本" * 40, "n": [1, [2, {"a": []}]]} for number in range(40)]
    for indent in (None, 3):
        (tmp_path / "a.json").write_text(
            json.dumps(records, ensure_ascii=indent is None, indent=indent), encoding="utf-8"
        )
        for block in (7, 100, 1 << 20):
            monkeypatch.setattr(json_array, "_BLOCK", block)
            file = open_file(tmp_path / "a.json")
            assert [file.read(index)[0] for index in range(len(file))] == records
    (tmp_path / "bom.json").write_text(json.dumps(records), encoding="utf-8-sig")
    assert open_file(tmp_path / "bom.json").read(39)[0] == records[39]
    indexed = Counter()
    monkeypatch.setattr(json_array, "_spans", lambda *a, real=json_array._spans: indexed.update("i") or real(*a))
    for kept_from, count in ((1 << 24, 2), (1, 3)):  # a large file is indexed once
        monkeypatch.setattr(json_array, "_KEPT_FROM", kept_from)
        files = [open_file(tmp_path / "a.json") for _ in range(2)]
        assert files[1].read(39)[0] == records[39]
        assert indexed["i"] == count
    for text, message in (
        ('[{"a": 1}, 7]', r"byte 11, after 1 objects, begins none"),
        ('[{"a": 1}, {"a": ]', r"object 2 of the array, at byte 11, is not valid JSON"),
        ('[{"a": 1}', r"object 2 of the array, at byte 9"),
        ("[]", "is empty"),
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match=message):
            open_file(tmp_path / "b.json")
    lines = [{"text": "a", "data": [{"x": 1}]}, {"text": "b", "data": []}]
    assert len(open_file(write_records(tmp_path / "lines.json", lines))) == 2  # lines of JSON by another name


def test_tables(root, data_sets, tmp_path, monkeypatch):
    path = root / "RLAIF-V-Dataset_000.parquet"
    record, find = open_file(path).read(0)
    assert record["images"] == ["#image.png"]
    assert find("#image.png").read() == (root / CUP).read_bytes()
    assert str(find("#image.png")).endswith("RLAIF-V-Dataset_000.parquet:1 image.png")
    assert preview("#image.png", False, media_of(f"{path}:1", MediaAccess()), "a").size == (96, 64)
    plain = table.TableFile(root / "onevision/train-00000-of-00001.parquet")
    assert sorted(plain.raw(1)) == ["conversations", "data_source", "id"]  # it has no image
    (tmp_path / "broken.parquet").write_bytes(path.read_bytes()[:-9])
    for named, message in (("broken.parquet", "cannot be read"), ("none.parquet", "does not exist")):
        with pytest.raises(UserError, match=message):
            open_file(tmp_path / named)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="has no rows"):
        open_file(tmp_path / "empty.parquet")
    remote = open_file(f"file://{root}/vqa/dataset.arrow")  # is copied to the cache
    assert remote.read(0)[0]["answer"] == "yes"
    told = {"text": "a", "day": datetime.date(2026, 1, 2), "cost": decimal.Decimal("1.50")}
    pq.write_table(pa.Table.from_pylist([told]), tmp_path / "told.parquet")
    assert open_file(tmp_path / "told.parquet").read(0)[0] == {"text": "a", "day": "2026-01-02", "cost": "1.50"}
    rows = pa.table({"text": [f"{row} " * 100 for row in range(200)]})
    for name, make in (("file.feather", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        for compression in ("zstd", None):
            options = pa.ipc.IpcWriteOptions(compression=compression)
            with make(str(tmp_path / name), rows.schema, options=options) as writer:
                writer.write_table(rows)
            of_rows = table.TableFile(tmp_path / name)
            assert [of_rows.raw(row)["text"].split()[0] for row in (0, 63, 64, 199)] == ["0", "63", "64", "199"]
            assert len(of_rows._ends) == (4 if compression else 1)  # 64 rows at a time: read without the others
    with pytest.raises(UserError, match="does not exist"):
        open_file(f"file://{tmp_path}/none.arrow")
    monkeypatch.setenv("MEGAVLM_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match="cannot be written to the cache"):
        open_file(f"file://{root}/cauldron/train-00000-of-00002.parquet")


def test_tables_are_converted_once(root, data_sets, monkeypatch):
    calls = Counter()
    monkeypatch.setattr(table, "_convert", lambda *a, real=table._convert: calls.update("c") or real(*a))
    monkeypatch.setenv("MEGAVLM_CACHE", str(root / "cache"))
    for _ in range(3):
        open_file(root / "trl/train.parquet")
    assert calls["c"] == 1
    assert not list((root / "cache").rglob("*.parts"))


def test_only_pictures_are_taken_for_pictures():
    calls = [{"function": {"arguments": {"path": "a.py"}}}, {"function": {"arguments": {"image": {"path": "b.png"}}}}]
    record = {"messages": [{"role": "assistant", "tool_calls": calls}], "meta": {"path": "c"}}
    media = {"images": [{"path": "a.png", "bytes": b"\x89PNG"}, {"path": "b.png"}], "picture": {"path": "c.png"}}
    found, _ = inline.with_names(None, 0, record | media, None)
    assert found == record | {"images": ["#images.0.png", "b.png"], "picture": "c.png"}


def test_each_record_has_its_own_form(tmp_path):
    own = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    foreign = {"question": "?", "answer": "!", "image": "a.png"}
    file = open_file(write_records(tmp_path / "a.jsonl", [*[own] * 9, foreign]))
    assert (file.form, file.read(0)[0]) == (None, own)
    assert file.read(9)[0] == {"problem": "<image>?", "answer": "!", "images": ["a.png"]}


def test_pictures_inside_json(root, tmp_path, monkeypatch):
    pictures(root)
    encoded = base64.b64encode((root / CAT).read_bytes()).decode()
    answer = f"data:image/png;base64,{encoded}"  # what is asked for is a text
    lines = [
        {"image": encoded, "question": "?", "answer": answer},
        {"image": "data:image/png;base64,%%%" + "A" * 100, "question": "?", "answer": "!"},
        {"image": "data:image/png," + "A" * 100, "question": "?", "answer": ";base64,"},
    ]
    data = write_records(tmp_path / "a.jsonl", lines)
    file = open_file(data)
    record, find = file.read(0)
    assert record["answer"] == answer
    assert record["images"] == ["#image.png"]
    assert find("#image.png").read() == (root / CAT).read_bytes()
    assert isinstance(find("other.png"), File)
    assert preview("#image.png", False, media_of(f"{data}:1", MediaAccess()), "a").size == (64, 48)
    with monkeypatch.context() as patch:  # the line is parsed once for all its pictures
        parsed = Counter()
        patch.setattr(inline, "_last", inline._LastRecord())
        patch.setattr(JsonlFile, "raw", lambda *a, real=JsonlFile.raw: parsed.update("p") or real(*a))
        picture = file.read(0)[1]("#image.png")
        assert picture.size() == len(picture.read()) == len(picture.open().read())
        assert parsed["p"] == 1
    for index in (1, 2):
        record, find = file.read(index)
        with pytest.raises(UserError, match=r"a\.jsonl:. image\....?.?.? cannot be read: .*base64"):
            preview(record["images"][0], False, find, "a")
    monkeypatch.setattr(inline, "_MOST", 100)
    with pytest.raises(UserError, match="at most 100 are read"):
        preview("#image.png", False, file.read(0)[1], "a")
