"""Asking about pictures, from Python and from the command line: real files, a real model at nano size."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import polymodal
from polymodal.asking import answers, ask, request, seen, stream, watched
from polymodal.cli import main
from polymodal.cli.show import plain
from polymodal.core.chat import Chat, ToolCall
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Image, Text, Video
from polymodal.core.tokens import Modality
from polymodal.modalities.smart_resize import SmartResize
from polymodal.nn.feature_cache import FeatureCache
from polymodal.samplers.autoregressive import Settings
from polymodal.weights.hub import shipped
from tests.nano import NANO
from tests.talking import talking


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


def test_each_answer_has_the_room_behind_its_own_prompt() -> None:
    model, settings = talking("language", context=100), Settings(max_new_tokens=60)
    questions = ["what?", "a red cup and a blue plate " * 5]
    short, long = (len(model.write_prompt(Chat.of(question))) for question in questions)
    assert short + 60 < 100 < long + 60
    assert [rules.max_new_tokens for rules in request(model, questions, settings)[1]] == [60, 100 - long]
    assert answers(model, questions, settings) == [ask(model, question, settings) for question in questions]


def test_other_prompts_are_another_model() -> None:
    model = talking("language")
    assert model.template is not None
    prints = [model.fingerprint]
    model.template = replace(model.template, source="{{ messages[0].content }}")
    prints.append(model.fingerprint)
    model.stop_ids = (*model.stop_ids, 7)
    assert len({*prints, model.fingerprint}) == 3


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


TOOLS = ({"type": "function", "function": {"name": "weather"}},)


def test_a_call_of_a_tool_is_learned_or_refused(pictures: list[Path]) -> None:
    chat = replace(Chat.of("what?").reply("yes", [ToolCall("weather", {"of": "a cup"})]), tools=TOOLS)
    model = talking("language")
    labels = model.lesson([chat])["labels"][0]
    assert model.tokenizer is not None
    said = model.tokenizer.decode(labels[labels != -100].tolist(), skip_special=False)
    assert re.fullmatch(r'yes\s*<tool_call>.*"weather".*"a cup".*</tool_call>\s*<\|im_end\|>', said, re.DOTALL), said
    assert model.template is not None
    model.template = replace(model.template, source="{{ messages[-1].content }}<|im_end|>")
    called = replace(chat, tools=())
    for each in (called, replace(Chat.of("what?").reply("yes"), tools=TOOLS)):
        with pytest.raises(MediaError, match="no place for tools"):
            model.lesson([each])
    with pytest.raises(MediaError, match="knows no tools"):
        talking("prismatic").lesson([called])
    with pytest.raises(MediaError, match="knows no tools"):
        talking("blip2").prompt([replace(Chat.of([Image(pictures[0]), "what?"]), tools=TOOLS)])


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
    assert plain(told["answer"].rstrip("\n"), keep="\n\t") in spoken.stdout
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
    assert "answers no questions" in vectors.stderr
    wrong = run("ask", tmp_path / "none.png", "what?", "--model", folder)
    assert wrong.returncode == 1
    assert "none.png" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_forgotten_question_is_not_the_last_file(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(pictures[0].parent))
    for asked in (pictures[:1], pictures, [pictures[0], f"~/{pictures[1].name}"]):
        assert main(["ask", *map(str, asked)]) == 1
        assert f"there is no question, the last argument is a file: {asked[-1]}" in capsys.readouterr().err
    for blank in ("", " \n"):
        assert main(["ask", str(pictures[0]), blank]) == 1
        assert "the question is empty" in capsys.readouterr().err


def test_a_file_that_fails_has_a_line_of_its_own(
    folder: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / "none.png"), str(pictures[0])]
    assert main(["caption", *files, "--model", str(folder), "--max-tokens", "4"]) == 1
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == f"{files[0]}: "
    assert lines[1].startswith(f"{files[1]}: ")


def test_what_is_printed_is_written_as_its_language_writes_it() -> None:
    for text in (
        "Quelle heure\u202f?\u00a0Dix.",
        "\u8d64\u3000\u9752",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f469\u200d\U0001f33e",
    ):
        assert plain(text) == text
    for obeyed in ("\x1b[2J", "\r", "\x9b", "\u202e", "\u2028", "\u2066", "\x00", "\udcff"):
        assert plain(obeyed).isascii()
        assert plain(obeyed).isprintable()


def test_a_chat_reads_a_picture_once(
    folder: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, settings = polymodal.load(folder, precision="auto"), Settings(max_new_tokens=8)
    first = Chat.of([Image(pictures[0]), "what is it?"])
    second = first.reply(ask(loaded, first, settings)).ask("how many?")
    said = [ask(loaded, chat, settings) for chat in (first, second, Chat.of([Image(pictures[0]), "yes?"]))]
    system, looked = type(loaded), []
    features = system.features
    monkeypatch.setattr(system, "features", lambda self, batch: looked.append(batch) or features(self, batch))
    wrong = ["/add none.png", "what?", "a red cup " * 200]
    lines = ["what is it?", *wrong, "how many?", "/new", f"/add {pictures[0]}", "yes?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(pictures[0]), "--model", str(folder), "--max-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(plain(answer, keep="\n\t") + "\n" for answer in said)
    assert re.search(r"none\.png(.|\n)*reads at most 400", err), "the conversation goes on after errors"
    assert len(looked) == 1


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    system, steps = type(talking("llava")), []
    step = system.step

    def interrupted(self: Any, ids: Any, memory: Any) -> Any:
        steps.append(memory.lengths[0])
        if len(steps) == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.5)  # until the main thread has seen it
        return step(self, ids, memory)

    monkeypatch.setattr(system, "step", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\nhow many?\n"))
    assert main(["chat", "--model", str(folder), "--max-tokens", "30"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2
    apart = next(at for at in range(1, len(steps)) if steps[at] != steps[at - 1] + 1)
    assert apart < 10, "the first answer ends at once"
    assert steps[apart] > steps[apart - 1], "the second answer stands behind what was said of the first"


@pytest.mark.skipif("polymodal/nano-vlm" not in shipped(), reason="no model that answers is shipped yet")
def test_a_picture_and_a_question_are_enough(pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = in_process(capsys, "ask", pictures[0], "What is the colour?")
    assert told["model"] == "polymodal/nano-vlm"
    assert told["answer"].strip()


def test_without_the_shipped_model_the_error_says_so(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("polymodal.weights.hub.shipped", dict)
    assert main(["ask", str(pictures[0]), "what?"]) == 1
    assert "no shipped model is called 'polymodal/nano-vlm'" in capsys.readouterr().err


def test_a_schema_holds(folder: Path, pictures: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema | {"additionalProperties": False}))
    asked = ["ask", pictures[0], "is it red?", "--model", folder, "--schema", tmp_path / "schema.json", "--json"]
    answer = json.loads(run(*asked).stdout)["answer"]
    assert isinstance(json.loads(answer)["red"], bool)


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """What a command prints as JSON."""
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_boxes_are_drawn_on_the_original(
    pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    model = talking("qwen2_5_vl")
    folder = model.save(tmp_path / "model")
    said = {"bbox_2d": [4, 8, 20, 24], "label": "cup"}
    schema = {"properties": {key: {"const": value} for key, value in said.items()}, "required": list(said)}
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object", "additionalProperties": False} | schema))
    asked = ["ask", pictures[1], "where is it?", "--model", folder, "--schema", tmp_path / "schema.json"]
    row = in_process(capsys, *asked, "--draw", tmp_path / "found")
    assert isinstance(model.images, SmartResize)
    with PILImage.open(pictures[1]) as picture, PILImage.open(row["drawn"]) as drawn:
        wide, high = model.images.target(*picture.size)
        across, down = picture.width / wide, picture.height / high
        assert drawn.size == picture.size
    assert row["marks"] == [
        {"label": "cup", "box": pytest.approx([4 * across, 8 * down, 20 * across, 24 * down], abs=0.01)}
    ]
    without = ["ask", pictures[1], "where?", "--model", folder, "--max-tokens", "2", "--draw", tmp_path / "none"]
    row = in_process(capsys, *without)
    assert (row["marks"], row["drawn"], (tmp_path / "none").exists()) == ([], None, False)
    assert main([str(a) for a in ("ask", *pictures, "where?", "--model", folder, "--draw", tmp_path / "two")]) == 1
    assert "--draw needs one picture, not 2" in capsys.readouterr().err


def test_a_clip_is_frames_with_their_times(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (60, 16, 24, 3), dtype=np.uint8)
    clip, model = Video(frames, fps=2), talking("llava")
    chat = watched(model, Chat.of([clip, "what is it?"]))
    texts = [part.text for part in chat.turns[0].parts if isinstance(part, Text)]
    assert texts == ["0:00: ", "0:04: ", "0:08: ", "0:12: ", "0:17: ", "0:21: ", "0:25: ", "0:29: ", "what is it?"]
    assert np.array_equal(chat.images[3].source, frames[25])
    assert ask(model, [clip, "what is it?"], Settings(max_new_tokens=4)) == ask(model, chat, Settings(max_new_tokens=4))
    reads = talking("qwen2_vl")
    assert watched(reads, Chat.of([clip, "what?"])).parts("video") == [clip]
    pytest.importorskip("av")
    from tests.unit.test_video import encoded

    (tmp_path / "clip.mp4").write_bytes(encoded(list(frames[:20]), fps=2))
    asked = ["ask", tmp_path / "clip.mp4", "what is it?", "--model", folder, "--max-tokens", "4"]
    row = in_process(capsys, *asked, "--sampling", "fps:0.5", "--show", tmp_path / "seen")
    assert [each["file"].rsplit(" at ")[-1] for each in row["seen"]] == ["0:00", "0:02", "0:04", "0:06", "0:08"]
    for wrong in ("uniform:0", "uniform:1.5", "uniform:inf", "fps:-1", "fps:nan", "often"):
        with pytest.raises(SystemExit):
            main([*map(str, asked), "--sampling", wrong])
        assert "none of uniform:8" in capsys.readouterr().err


def test_a_model_of_clips_reads_as_many_frames_as_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    from tests.unit.test_video import encoded

    folder = talking("qwen2_vl").save(tmp_path / "model")
    frames = np.random.default_rng(0).integers(0, 256, (20, 56, 56, 3), dtype=np.uint8)
    (tmp_path / "clip.mp4").write_bytes(encoded(list(frames), fps=2))
    asked = ["ask", tmp_path / "clip.mp4", "what?", "--model", folder]
    tokens = []
    for more in ([], ["--sampling", "uniform:4"]):
        assert main([*map(str, asked), *more]) == 1
        tokens.append(int(re.findall(r"a prompt of (\d+) tokens", capsys.readouterr().err)[0]))
    text = 20
    assert tokens[0] - text == 5 * (tokens[1] - text), "twenty frames, at two a second, and four"
