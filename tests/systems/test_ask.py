"""Asking about pictures, from Python and from the command line: real files, a real model at nano size."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import polymodal
from polymodal.ask import answers, ask, seen, stream
from polymodal.cli import plain
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Image
from polymodal.core.tokens import Modality
from polymodal.nn.feature_cache import FeatureCache
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.generator import Generator
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO

WORDS = ["a red cup and a blue plate", "what is it? it is a ring", "how many? two", "yes", "no", "the bar is highest"]


def talking(name: str, *, context: int = 400) -> Generator:
    """A system of this name with a tokenizer of its own; its placeholder is a control token."""
    tokenizer = LanguageTokenizer.train_bpe(WORDS * 20, 320)
    place = tokenizer.backend.token_to_id("<|image|>")
    torch.manual_seed(0)
    config = NANO[name]
    backbone = replace(config.backbone, vocab_size=tokenizer.vocab_size, context=context)
    more = {"image_id": place} if name != "language" else {}
    model = polymodal.build(replace(config, backbone=backbone, **more))
    assert isinstance(model, Generator)
    for parameter in model.parameters():  # fresh weights say the same to everything
        parameter.data.normal_(std=0.3)
    model.use_tokenizer(tokenizer)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking("llava").save(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number, size in enumerate(((20, 31), (50, 16))):
        PILImage.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return sorted(place.iterdir())


@pytest.mark.parametrize("name", ["language", "llava", "llava_next", "paligemma"])
def test_answers_are_the_same_alone_together_and_in_pieces(name: str, pictures: list[Path]) -> None:
    model = talking(name)
    settings = Settings(max_new_tokens=12)
    first, second = (Image(p) for p in pictures)
    questions: list[Any] = [
        [first, "what is it?"],
        [second, first, "how many?"],
        [second, "a red cup, a blue plate?"],
    ]
    if name == "language":
        questions = ["what is it?", "how many? a red cup", "yes"]
    together = answers(model, questions, settings)
    assert together == [ask(model, q, settings) for q in questions]
    assert together[0] == "".join(step.text for step in stream(model, questions[0], settings))
    scores = [model.prefill(model.prompt([Chat.of(q)]), model.new_memory(1, 200)) for q in questions]
    assert not torch.allclose(scores[0], scores[1]), "different questions are answered differently"


def test_the_same_picture_goes_through_the_tower_once(pictures: list[Path]) -> None:
    model = talking("llava")
    model.feature_cache = FeatureCache(2**20)
    settings = Settings(max_new_tokens=6)
    fresh = ask(talking("llava"), [Image(pictures[0]), "what is it?"], settings)
    assert [ask(model, [Image(pictures[0]), "what is it?"], settings) for _ in range(2)] == [fresh, fresh]
    assert (model.feature_cache.hits, model.feature_cache.misses) == (1, 1)
    ask(model, [Image(pictures[1]), "what is it?"], settings)
    assert model.feature_cache.misses == 2
    model.train()
    assert len(model.feature_cache) == 0


def test_what_is_saved_answers_the_same(folder: Path, pictures: list[Path]) -> None:
    loaded, question = polymodal.load(folder), [Image(pictures[0]), "what is it?"]
    again = polymodal.load(loaded.save(folder.parent / "again"))
    assert ask(loaded, question, Settings(max_new_tokens=12)) == ask(again, question, Settings(max_new_tokens=12))


def test_a_lesson_labels_answers_alone(pictures: list[Path]) -> None:
    model = talking("llava")
    assert model.tokenizer is not None
    chat = Chat.of([Image(pictures[0]), "what is it?"]).reply("a ring").ask("how many?").reply("two")
    batch = model.lesson([chat, Chat.of("yes?").reply("no")])
    for row, said in enumerate((["a ring", "two"], ["no"])):
        labels = batch["labels"][row]
        kept = batch["ids"][row][labels != -100]
        assert torch.equal(kept, labels[labels != -100])
        assert model.tokenizer.decode(kept.tolist(), skip_special=False) == "".join(f"{s}<|im_end|>" for s in said)
    assert bool(torch.isfinite(model.loss(batch).total))


def test_what_is_no_lesson_is_refused() -> None:
    model = talking("language")
    for chat in (
        Chat.of("what?"),
        Chat.of([{"role": "assistant", "content": "a ring"}]),
        Chat.of("a").reply("b").ask("c"),
    ):
        with pytest.raises(MediaError, match="no lesson"):
            model.lesson([chat])
    with pytest.raises(MediaError, match="no chat"):
        model.prompt([])
    assert answers(model, []) == []


def test_the_best_of_several_is_given() -> None:
    model, settings = talking("language"), Settings(max_new_tokens=6, temperature=1.0, best_of=4, seed=0)
    together = answers(model, ["what?", "how many?", "yes"], settings)
    assert len(together) == 3
    assert ask(model, "what?", settings) == together[0]


def test_a_typed_placeholder_is_no_place(pictures: list[Path]) -> None:
    model = talking("llava")
    typed = model.prompt([Chat.of([Image(pictures[0]), "<|image|><|im_end|> what is it?"])])
    assert int((typed["ids"] == model.media_id).sum()) == NANO["llava"].num_features
    assert model.read(typed).modality[0, 0] == Modality.TEXT


def test_nothing_is_cut(pictures: list[Path]) -> None:
    model = talking("llava", context=60)
    question = [Image(pictures[0]), "a red cup and a blue plate " * 20]
    with pytest.raises(MediaError, match="reads at most 60"):
        ask(model, question)


def test_unfit_requests_are_refused(pictures: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="writes no text"):
        ask(polymodal.build(NANO["clip"]), "hello")
    with pytest.raises(UnsupportedError, match="tokenizer"):
        ask(polymodal.build(NANO["llava"]), "hello")
    with pytest.raises(MediaError, match="no place for the kind image"):
        ask(talking("language"), [Image(pictures[0]), "what?"])
    for name, content in (("cut.png", pictures[0].read_bytes()[:100]), ("empty.png", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=name):
            ask(talking("llava"), [Image(tmp_path / name), "what?"])


def test_seen_is_what_the_model_gets(pictures: list[Path]) -> None:
    model = talking("llava_next")
    shown, tokens = seen(model, Image(pictures[1]))
    assert {p.size for p in shown} == {(16, 16)}
    assert len(shown) == 3  # the whole, and a canvas of two
    assert tokens == model.count(polymodal.Sample.of(Image(pictures[1])))


def run(*arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "polymodal", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=text)


def test_the_command_line(folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    asked = ["ask", *pictures, "what is it?", "--model", folder, "--max-tokens", "8"]
    spoken = run(*asked)
    assert spoken.returncode == 0, spoken.stderr
    told = json.loads(run(*asked, "--json", "--show", tmp_path / "seen").stdout)
    assert plain(told["answer"].rstrip("\n"), keep="\n") in spoken.stdout
    for row in told["seen"]:
        with PILImage.open(*row["seen"]) as picture:
            assert picture.size == (16, 16)
    assert [row["tokens"] for row in told["seen"]] == [NANO["llava"].num_features] * 2
    captioned = run("caption", *pictures, "--model", folder, "--max-tokens", "4")
    assert captioned.returncode == 0, captioned.stderr
    assert captioned.stdout.count("\n") >= 2
    broken = run("caption", tmp_path / "none.png", *pictures, "--model", folder, "--max-tokens", "4", "--json")
    assert broken.returncode == 1
    assert "none.png" in broken.stderr
    assert [row["files"] for row in json.loads(broken.stdout)] == [[str(p)] for p in pictures]
    talked = run(
        "chat", pictures[0], "--model", folder, "--max-tokens", "4", text=f"what?\n/add\n/add {pictures[1]}\nyes?\n"
    )
    assert talked.returncode == 0, talked.stderr
    vectors = run("ask", pictures[0], "what?", "--model", "polymodal/nano-clip")
    assert vectors.returncode == 1
    assert "writes no text" in vectors.stderr
    wrong = run("ask", tmp_path / "none.png", "what?", "--model", folder)
    assert wrong.returncode == 1
    assert "none.png" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_schema_holds(folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema | {"additionalProperties": False}))
    asked = ["ask", pictures[0], "is it red?", "--model", folder, "--schema", tmp_path / "schema.json", "--json"]
    answer = json.loads(run(*asked).stdout)["answer"]
    assert isinstance(json.loads(answer)["red"], bool)
