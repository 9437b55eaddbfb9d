"""Small data files with the columns of public data sets, and the same samples in megavlm's own form.

The columns are those that the data sets' own pages and files have.
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from skimage import data as photographs

CAT, CUP, ROCKET = "cat.png", "cup.png", "rocket.png"


@dataclass
class DataSet:
    """A data set: its file below a folder, the kind of its samples, and these in megavlm's own form."""

    name: str
    path: str
    kind: str
    own: list[dict]
    form: str | None


def user(text, **rest):
    return {"role": "user", "content": text, **rest}


def assistant(text):
    return {"role": "assistant", "content": text}


def talk(*texts, system=None, **rest):
    turns = [user(text) if number % 2 == 0 else assistant(text) for number, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns, **rest}


def pair(prompt, chosen, rejected, **rest):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rest}


def gpt(*texts):
    return [{"from": "human" if number % 2 == 0 else "gpt", "value": text} for number, text in enumerate(texts)]


def pictures(root: Path) -> dict[str, bytes]:
    """Three photographs as PNG files in the folder, and their bytes."""
    found = {}
    for name, size in ((CAT, (64, 48)), (CUP, (96, 64)), (ROCKET, (48, 80))):
        image = Image.fromarray({CAT: photographs.chelsea, CUP: photographs.coffee, ROCKET: photographs.rocket}[name]())
        stream = io.BytesIO()
        image.resize(size).save(stream, "PNG")
        found[name] = stream.getvalue()
        for folder in ("", "coco/train2017", "documents"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_bytes(found[name])
    return found


def write(root: Path) -> list[DataSet]:
    """All data sets, written into the folder."""
    images = pictures(root)
    cell = lambda name: {"bytes": images[name], "path": None}
    uri = lambda name: "data:image/png;base64," + base64.b64encode(images[name]).decode()
    found: list[DataSet] = []

    def add(name: str, path: str, kind: str, rows, own: list[dict], form: str | None) -> None:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1)
        elif path.endswith(".arrow"):  # a stream, as datasets.save_to_disk writes it
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
                stream.write_table(table, max_chunksize=1)
        elif path.endswith(".jsonl"):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            file.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
        found.append(DataSet(name, path, kind, own, form))

    llava = "LLaVA or ShareGPT conversations"
    add(
        "LLaVA-Instruct-150K", "llava_instruct_150k.json", "tune",
        [
            {"id": "000000033471", "image": CAT,
             "conversations": gpt("<image>\nWhat is it?", "Ein Kätzchen.", "Sure?", "Yes.")},
            {"id": "000000052846", "image": CUP, "conversations": gpt("Is it full?\n<image>", "Write <image> for it.")},
        ],
        [
            talk("<image>\nWhat is it?", "Ein Kätzchen.", "Sure?", "Yes.", images=[CAT]),
            talk("Is it full?\n<image>", "Write \\<image> for it.", images=[CUP]),
        ],
        llava,
    )  # fmt: skip
    add(
        "ShareGPT4V", "sharegpt4v_instruct.json", "tune",
        [{"id": "1", "image": f"coco/train2017/{CAT}", "conversations": gpt("What do you see?\n<image>", "A cat.")},
         {"id": "2", "model": "", "conversations": gpt("Two and two?", "Four.")}],
        [talk("What do you see?\n<image>", "A cat.", images=[CAT]), talk("Two and two?", "Four.")],
        llava,
    )  # fmt: skip
    add(
        "LLaVA-OneVision-Data", "onevision/train-00000-of-00001.parquet", "tune",
        [{"id": "a", "image": cell(CUP), "conversations": gpt("<image>\nFull?", "Yes."), "data_source": "x"},
         {"id": "b", "image": None, "conversations": gpt("Red?", "Blue."), "data_source": "x"}],
        [talk("<image>\nFull?", "Yes.", images=[CUP]), talk("Red?", "Blue.")],
        llava,
    )  # fmt: skip
    add(
        "The Cauldron", "cauldron/train-00000-of-00002.parquet", "tune",
        [{"images": [cell(CAT), cell(CUP)],
          "texts": [{"user": "Same?", "assistant": "No.", "source": "x"},
                    {"user": "Why?", "assistant": "One purrs.", "source": "x"}]}],
        [talk("<image><image>Same?", "No.", "Why?", "One purrs.", images=[CAT, CUP])],
        "The Cauldron",
    )  # fmt: skip
    add(
        "MMMU", "mmmu/dev-00000-of-00001.parquet", "prompt",
        [{"id": "dev_Art_1", "question": "Which one is <image 1>?", "options": "['a cup', '<image 2>']", "answer": "A",
          "image_1": cell(CUP), "image_2": cell(CAT), "image_3": None, "question_type": "multiple-choice"}],
        [{"problem": "Which one is <image>?\nA. a cup\nB. <image>", "answer": "A", "images": [CUP, CAT]}],
        "questions and answers, with pictures in the fields image_1, image_2, …",
    )  # fmt: skip
    add(
        "UltraChat 200k", "ultrachat/train_sft.parquet", "tune",
        [{"prompt": "Name a colour.", "prompt_id": "f0", "messages": talk("Name a colour.", "Blue.")["messages"]}],
        [talk("Name a colour.", "Blue.")],
        None,
    )  # fmt: skip
    add(
        "Alpaca", "alpaca_data.json", "tune",
        [{"instruction": "Sort.", "input": "3, 1", "output": "1, 3"},
         {"instruction": "Greet.", "input": "", "output": "Hello."}],
        [talk("Sort.\n3, 1", "1, 3"), talk("Greet.", "Hello.")],
        "Alpaca",
    )  # fmt: skip
    add(
        "OpenAI fine-tuning", "openai.jsonl", "tune",
        [{"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is it?"},
                                         {"type": "image_url", "image_url": {"url": uri(CAT), "detail": "low"}}]},
            {"role": "assistant", "content": "A cat."}]}],
        [talk("What is it?<image>", "A cat.", system="Be brief.", images=[CAT])],
        None,
    )  # fmt: skip
    add(
        "ms-swift", "swift.jsonl", "tune",
        [{"system": "Be brief.", "history": [["Hi.", "Hello."]], "query": "<image>What is it?", "response": "A cup.",
          "images": [CUP]}],
        [talk("Hi.", "Hello.", "<image>What is it?", "A cup.", system="Be brief.", images=[CUP])],
        "query and response (ms-swift)",
    )  # fmt: skip
    asked = "questions and answers"
    add(
        "ChartQA", "train_human.json", "tune",
        [{"imgname": CUP, "query": "How many cups?", "label": "1"}],
        [talk("<image>How many cups?", "1", images=[CUP])],
        asked,
    )  # fmt: skip
    add(
        "DocVQA", "train_v1.0.json", "tune",
        {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "train",
         "data": [{"questionId": 337, "question": "What is it?", "image": f"documents/{ROCKET}", "docId": 279,
                   "ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1", "answers": ["rocket", "a rocket"],
                   "data_split": "train"}]},
        [talk("<image>What is it?", "rocket", images=[ROCKET])],
        asked,
    )  # fmt: skip
    add(
        "VQAv2", "vqa/dataset.arrow", "tune",
        [{"question_type": "is", "multiple_choice_answer": "yes", "image_id": 4, "question_id": 40, "image": cell(CAT),
          "answers": [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}], "answer_type": "yes/no",
          "question": "Is it a cat?"}],
        [talk("<image>Is it a cat?", "yes", images=[CAT])],
        asked,
    )  # fmt: skip
    add(
        "ScienceQA", "scienceqa/train.parquet", "tune",
        [{"image": cell(ROCKET), "question": "What is it?", "choices": ["a cup", "a rocket"], "answer": 1, "hint": "",
          "task": "closed choice", "grade": "grade2", "lecture": "", "solution": ""}],
        [talk("<image>What is it?\nA. a cup\nB. a rocket", "B", images=[ROCKET])],
        asked,
    )  # fmt: skip
    add(
        "Geometry3K", "geometry3k/train.parquet", "tune",
        [{"images": [cell(CUP)], "problem": "<image>Find x.", "answer": "3"}],
        [talk("<image>Find x.", "3", images=[CUP])],
        None,
    )  # fmt: skip
    add(
        "TRL prompt and completion", "completions.jsonl", "tune",
        [{"prompt": [user("Sky?")], "completion": [assistant("It is blue.")]},
         {"prompt": "The sky is", "completion": " blue."}],
        [talk("Sky?", "It is blue."), talk("The sky is", " blue.")],
        "prompt and completion (TRL)",
    )  # fmt: skip
    add(
        "captions of an ImageFolder", "metadata.jsonl", "tune",
        [{"file_name": CAT, "text": "A cat."}],
        [{"text": "<image>A cat.", "images": [CAT]}],
        "captions",
    )  # fmt: skip
    pairs = "pairs as UltraFeedback and RLAIF-V have them"
    add(
        "UltraFeedback binarized", "ultrafeedback/train_prefs.parquet", "pair",
        [{"prompt": "Name a colour.", "prompt_id": "f0", "chosen": talk("Name a colour.", "Blue.")["messages"],
          "rejected": talk("Name a colour.", "Cat.")["messages"],
          "messages": talk("Name a colour.", "Blue.")["messages"],
          "score_chosen": 8.0, "score_rejected": 2.0}],
        [pair("Name a colour.", "Blue.", "Cat.")],
        pairs,
    )  # fmt: skip
    add(
        "RLHF-V", "RLHF-V-Dataset.parquet", "pair",
        [{"ds_name": "RLHF-V", "image": {"bytes": images[CAT], "path": "cat.jpg"},
          "text": json.dumps({"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}),
          "origin_dataset": "VQAv2", "origin_split": "[]", "idx": 0, "image_path": "llava_v1/cat.jpg"}],
        [pair("<image>What is it?", "A cat.", "A dog.", images=[CAT])],
        "pairs as RLHF-V has them",
    )  # fmt: skip
    add(
        "RLAIF-V", "RLAIF-V-Dataset_000.parquet", "pair",
        [{"ds_name": "RLAIF-V", "image": cell(CUP), "question": "What is it?", "chosen": "A cup.", "rejected": "A hat.",
          "origin_dataset": "x", "origin_split": "{}", "idx": "0", "image_path": "x/cup.jpg"}],
        [pair("<image>What is it?", "A cup.", "A hat.", images=[CUP])],
        pairs,
    )  # fmt: skip
    parts = lambda role, text, media=0: {
        "role": role,
        "content": [{"type": "image", "text": None}] * media + [{"type": "text", "text": text}],
    }
    add(
        "TRL's RLAIF-V", "trl/train.parquet", "pair",
        [{"images": [cell(CUP)], "prompt": [parts("user", "What is it?", 1)], "chosen": [parts("assistant", "A cup.")],
          "rejected": [parts("assistant", "A hat.")]}],
        [pair("<image>What is it?", "A cup.", "A hat.", images=[CUP])],
        None,
    )  # fmt: skip
    add(
        "LLaMA-Factory's RLHF-V", "rlhf_v.json", "pair",
        [{"conversations": gpt("<image>What is it?"), "chosen": gpt("", "A cat.")[1], "rejected": gpt("", "A dog.")[1],
          "images": [CAT]}],
        [pair("<image>What is it?", "A cat.", "A dog.", images=[CAT])],
        llava,
    )  # fmt: skip
    add(
        "OpenAI preferences", "preferences.jsonl", "pair",
        [{"input": {"messages": [user("Hi.")], "tools": [], "parallel_tool_calls": True},
          "preferred_output": [assistant("Hello!")], "non_preferred_output": [assistant("What?")]}],
        [pair("Hi.", "Hello!", "What?")],
        "OpenAI preferences",
    )  # fmt: skip
    add(
        "KTO mix", "kto/train.parquet", "judged",
        [{"prompt": [user("Hi.")], "completion": [assistant("Hello!")], "label": True},
         {"prompt": [user("Hi.")], "completion": [assistant("What?")], "label": False}],
        [{"prompt": "Hi.", "completion": "Hello!", "label": True},
         {"prompt": "Hi.", "completion": "What?", "label": False}],
        None,
    )  # fmt: skip
    return found
