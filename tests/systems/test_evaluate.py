"""Evaluating a model: the command on real files of every format, killed and resumed, with a real model at nano size."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.asking import ask, engine_of
from polymodal.cli import main
from polymodal.core.chat import Chat
from polymodal.core.errors import DataError, MediaError
from polymodal.core.sample import Sample
from polymodal.evaluate.card import _Hashes, _key
from polymodal.evaluation import TASKS, Official, _answers, run, side_of, task_of
from polymodal.samplers.autoregressive import Settings, prompts
from polymodal.serve.engine import EngineConfig
from polymodal.weights.hub import shipped
from tests.talking import talking

PICTURES = [f"{name}.png" for name in "abcd"]
PEOPLE = [{"answer": "two"}] * 7 + [{"answer": "yes"}] * 3
FILES: dict[str, Any] = {
    "pope.json": [
        {"question_id": i, "image": name, "text": f"Is there a {what} in the image?", "label": label}
        for i, (name, what, label) in enumerate(
            (name, what, label) for name in PICTURES for what, label in (("cup", "yes"), ("plate", "no"))
        )
    ],
    "questions.json": {
        "data_subtype": "val2014",
        "questions": [{"question_id": i, "image_id": i, "question": "How many?"} for i in range(4)],
    },
    "annotations.json": {
        "annotations": [{"question_id": i, "answer_type": "number", "answers": PEOPLE} for i in range(4)]
    },
    "human.json": [{"imgname": name, "query": f"What is {i}?", "label": str(i)} for i, name in enumerate(PICTURES)],
    "augmented.json": [{"imgname": name, "query": "Which bar is highest?", "label": "cup"} for name in PICTURES],
    "documents.json": {
        "data": [
            {"questionId": i, "question": "What is the title?", "answers": ["a red cup"], "image": f"documents/{name}"}
            for i, name in enumerate(PICTURES)
        ]
    },
    "captions.json": {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(PICTURES)],
        "annotations": [{"image_id": i, "caption": f"a red cup and {i} plates"} for i in range(4)],
    },
    "instances.json": {
        "images": [],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}],
        "annotations": [{"image_id": i, "category_id": 1 + i % 2} for i in range(4)],
    },
}
OFFICIAL = {
    "pope": ("pope.json",),
    "vqa": ("questions.json", "annotations.json"),
    "chartqa": ("human.json", "augmented.json"),
    "docvqa": ("documents.json",),
    "captions": ("captions.json",),
    "chair": ("captions.json", "instances.json", "synonyms.txt"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking("llava").save(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with every official file and the pictures that they name."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(PICTURES):
        pixels = rng.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)
        for file in (name, f"COCO_val2014_{i:012d}.jpg"):
            PILImage.fromarray(pixels).save(tmp_path / "pictures" / file)
    for file, content in FILES.items():
        lines = "\n".join(map(json.dumps, content)) if file == "pope.json" else json.dumps(content)
        (tmp_path / file).write_text(lines)
    (tmp_path / "synonyms.txt").write_text("cup, mug\nplate, dish\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


Told = Callable[..., Any]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], model: Path) -> Told:
    """Runs the command with --json; gives what it printed, or checks how it was refused."""

    def call(task: str, *arguments: str, error: str = "", name: str | None = None) -> Any:
        capsys.readouterr()
        assert main(["evaluate", name or str(model), task, *arguments, "--json"]) == int(bool(error))
        out, err = capsys.readouterr()
        assert re.search(error, err) if error else not err
        return None if error else json.loads(out)

    return call


@pytest.mark.parametrize("task", OFFICIAL)
def test_official_files(task: str, place: Path, told: Told) -> None:
    card = told(task, "--data", *OFFICIAL[task], "--images", "pictures", "--out", "cards")
    assert card["questions"] == (8 if task in ("pope", "chartqa") else 4)
    assert card["pictures"] == 4
    for outcome in ("true", "blind", "shuffled"):
        score = card[outcome]["score"]
        assert score["low"] <= score["value"] <= score["high"]
        assert score["n"] == card["questions"]
        assert 0 <= card[outcome]["unparsed"] <= score["n"]
    (page,) = (place / "cards").glob("*.md")
    assert task in page.name
    assert json.loads(page.with_suffix(".json").read_text()) == card
    for said in (card["metric"].replace("_", r"\_"), "with pictures", "blind", "other pictures", "unparsed"):
        assert said in page.read_text()
    assert {p.name for p in (place / "cards").iterdir()} == {
        page.name, page.with_suffix(".json").name, f"{task}.answers.jsonl",
    }  # fmt: skip


def test_the_scores_are_those_of_the_answers(place: Path, told: Told) -> None:
    asked = ["docvqa", "--data", "documents.json", "--images", "pictures", "--out", "cards"]
    assert told(*asked)["answered"] == 4 + 1 + 4, "blind, the four questions are one"
    file, hashes = place / "cards/docvqa.answers.jsonl", _Hashes()
    head, *rows = map(json.loads, file.read_text().splitlines())
    items = task_of("docvqa", data=[place / "documents.json"], images=place / "pictures").items
    planted = dict.fromkeys((row["key"] for row in rows), "a blue plate")
    for item, said in zip(items, ("a red cup", "A red cup.", "a red cap", "no"), strict=True):
        planted[_key(item.sample, "true", hashes)] = said
    planted[_key(Sample(tuple(items[0].sample.texts)), "blind", hashes)] = "a red mug"
    lines = [head, *({"key": key, "answer": said} for key, said in planted.items())]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = told(*asked)
    assert card["answered"] == 0
    assert card["true"]["score"]["value"] == pytest.approx((1 + 1 + 8 / 9 + 0) / 4)
    assert card["blind"]["score"]["value"] == pytest.approx(7 / 9)
    assert card["shuffled"]["score"]["value"] == 0


@pytest.mark.parametrize("task", ["questions", "charts", "documents"])
def test_worlds(task: str, place: Path, told: Told) -> None:
    pytest.importorskip("matplotlib")
    card = told(task, "--limit", "9", "--seed", "3")
    assert card["questions"] == 9
    assert len(card["kinds"]) >= 5
    assert "3" in card["task"]
    again = told(task, "--limit", "9", "--seed", "3")
    assert again["answered"] == 0, "all answers are there"
    assert again["true"] == card["true"]
    if task == "questions":
        more = told(task, "--limit", "10", "--seed", "3")
        assert 0 < more["answered"] <= 1 + 1 + 10, "one more question; the shuffled run is drawn anew"


def test_pictures_go_through_the_tower_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, calls = talking("llava"), []
    features = type(vlm).features
    monkeypatch.setattr(type(vlm), "features", lambda self, batch: calls.append(1) or features(self, batch))
    task = task_of("pope", data=[place / "pope.json"], images=place / "pictures")
    card, _ = run(vlm, "pope", task, out=place / "cards")
    assert card.answered == 8 + 2 + 8
    assert len(calls) == len(PICTURES)
    assert vlm.feature_cache is None


def test_what_is_too_large_for_the_engine_is_asked_alone(place: Path) -> None:
    vlm, settings = talking("llava"), Settings(max_new_tokens=4)
    items = task_of("docvqa", data=[place / "documents.json"], images=place / "pictures").items
    samples = [Sample.of("What?"), *(item.sample for item in items[:2])]
    size = [len(ids) + 4 for sample in samples for ids in prompts(vlm.prompt([Chat.of(sample)]))]
    with engine_of(vlm, EngineConfig(tokens=min(size))) as engine:
        assert min(size) < size[1], "only the first one fits"
        assert _answers(engine, vlm, settings)(samples) == [ask(vlm, sample, settings) for sample in samples]
        (place / "cut.png").write_bytes(b"")
        with pytest.raises(MediaError, match=r"cut\.png"):
            _answers(engine, vlm, settings)([samples[0], Sample.of([place / "cut.png", "What?"])])


def test_a_person_reads_it(place: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(model), "pope", "--data", "pope.json", "--images", "pictures"]) == 0
    out = capsys.readouterr().out
    for said in ("accuracy", "with pictures", "blind", "other pictures", "unparsed", "first yes or no", "note: "):
        assert said in out
    assert (place / re.search(r"card: (\S+\.md)", out)[1]).is_file()  # type: ignore[index]
    assert f"evaluations/{model.name}/" in out


def test_it_lists_what_it_wants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == list(TASKS)
    assert rows["vqa"]["wants"] == "--data QUESTIONS.json ANNOTATIONS.json --images DIR"
    assert main(["evaluate", "--list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in TASKS)


def test_a_killed_run_goes_on(place: Path, model: Path, told: Told) -> None:
    asked = ["questions", "--limit", "24"]
    command = [sys.executable, "-m", "polymodal", "evaluate", str(model), *asked]
    for end in (signal.SIGINT, signal.SIGKILL):
        file = place / f"evaluations/{model.name}/questions.answers.jsonl"
        before = file.read_text().count("\n") if file.is_file() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not file.is_file() or file.read_text().count("\n") <= before + 1:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(end)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if end == signal.SIGINT else -end), err
        assert not list(file.parent.glob("*.md"))
    kept = file.read_text().count("\n") - 1
    card, fresh = told(*asked), told(*asked, "--out", "whole")
    assert 0 < kept == fresh["answered"] - card["answered"] < fresh["answered"]
    assert {**card, "answered": 0, "seconds": 0, "started": ""} == {**fresh, "answered": 0, "seconds": 0, "started": ""}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["pop"], "no task is called 'pop'. Did you mean 'pope'"),
        (["pope"], "pope wants --data QUESTIONS.json --images DIR; given: nothing"),
        (["pope", "--data", "pope.json"], "wants .*; given: pope.json"),
        (["pope", "--data", "pope.json", "--images", "nowhere"], "nowhere is no folder"),
        (["vqa", "--data", "questions.json", "--images", "pictures"], "vqa wants .*ANNOTATIONS.json"),
        (["docvqa", "--data", "documents.json", "pope.json", "--images", "pictures"], "docvqa wants"),
        (["docvqa", "--data", "nothing.json", "--images", "pictures"], "nothing.json does not exist"),
        (["docvqa", "--data", "cut.json", "--images", "pictures"], "cut.json is not valid JSON.*download it again"),
        (["pope", "--data", "cut.jsonl", "--images", "pictures"], r"cut.jsonl:8: is not a line of JSON"),
        (["docvqa", "--data", "human.json", "--images", "pictures"], "human.json: should be an object with a list"),
        (["pope", "--data", "pope.json", "--images", "some"], "3 of 4 pictures are not in some, the first is b.png"),
        (["pope", "--data", "pope.json", "--images", "broken"], "a.png: .*cut off"),
        (["questions", "--data", "pope.json"], "questions takes no files: its pictures are drawn"),
    ],
)
def test_what_is_wrong_is_one_message(arguments: list[str], error: str, place: Path, told: Told) -> None:
    for name in ("some", "broken"):
        (place / name).mkdir()
    (place / "some/a.png").write_bytes((place / "pictures/a.png").read_bytes())
    for name in PICTURES:
        (place / "broken" / name).write_bytes((place / "pictures" / name).read_bytes()[:150])
    (place / "cut.json").write_text((place / "documents.json").read_text()[:-20])
    (place / "cut.jsonl").write_text((place / "pope.json").read_text()[:-20])
    told(*arguments, error=rf"\Apolymodal: .*{error}[^\n]*\n\Z")
    assert not list(place.rglob("*.md"))


def test_what_cannot_be_asked(place: Path, told: Told, capsys: pytest.CaptureFixture[str]) -> None:
    if "polymodal/nano-clip" in shipped():
        told("questions", error="answers no questions", name="polymodal/nano-clip")
    other = str(talking("llava_next").save(place / "other"))
    told("questions", "--limit", "1", "--out", "cards")
    told("questions", "--limit", "1", "--out", "cards", error="holds answers of .*give another name", name=other)
    assert main(["evaluate"]) == 1
    assert "polymodal evaluate MODEL TASK" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", other, "questions", "--limit", "0"])


def test_worlds_fit_what_the_model_sees() -> None:
    assert side_of(talking("language")) == 224
    small = talking("llava")  # its tower sees 16 x 16
    assert side_of(small) == 56
    first, second = (task_of("questions", limit=5, seed=seed).items[0].sample.texts for seed in (3, 4))
    assert first != second
    pytest.importorskip("matplotlib")
    for name in ("charts", "documents"):
        for item in task_of(name, limit=10, side=56).items:
            assert item.sample.images[0].source.size == (56, 56)
    with pytest.raises(DataError, match="a seed is 0 or more, not -1"):
        task_of("questions", seed=-1)
    with pytest.raises(DataError, match="no questions"):
        task_of("questions", limit=-1)
    assert all(isinstance(TASKS[name], Official) for name in OFFICIAL)
