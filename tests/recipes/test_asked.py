"""What nano-vlm learns from: rows as its chat template writes them, true maps, and nothing that is held out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from polymodal.backbones.decoder import DecoderBlock
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import DataError
from polymodal.data.worlds import charts, documents, questions, shapes
from polymodal.data.worlds.asked import HELD_OUT_PARAPHRASES
from polymodal.heads.lm import IGNORE
from polymodal.train.loop import fit
from recipes.nano import asked, vlm


@pytest.fixture(autouse=True)
def fonts() -> None:
    try:
        documents.fonts(held_out=True)
    except DataError as error:
        pytest.skip(str(error))


def lessons(count: int, scenes: float, charted: float) -> list[asked.Lesson]:
    rng = np.random.default_rng(3)
    source = asked.Pictures(scenes=scenes, charts=charted, collate=asked.collate)
    return [source.lesson(rng) for _ in range(count)]


def test_rows_are_those_that_the_chat_template_writes() -> None:
    learner = vlm.model()
    assert isinstance(learner, vlm.Learner)
    for lesson in lessons(6, scenes=0.4, charted=0.3):
        messages = []
        for turn, (question, answer) in enumerate(lesson.asked):
            content = [{"type": "image", "image": PILImage.fromarray(lesson.pixels)}] if turn == 0 else []
            messages += [
                {"role": "user", "content": [*content, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
        ours, theirs = (
            asked.collate([lesson], np.random.default_rng(0), noise=0.0),
            learner.vlm.lesson([Chat.of(messages)]),
        )
        for name in ("ids", "labels", "valid", "pixels_row"):
            assert torch.equal(ours[name], theirs[name]), name
        torch.testing.assert_close(ours["pixels"], theirs["pixels"], rtol=0, atol=1e-5)


def test_each_patch_is_named_by_its_words() -> None:
    words = asked.tokenizer()
    made = lessons(12, scenes=0.5, charted=0.2)
    batch = asked.look(made, np.random.default_rng(0))
    assert batch["names"].shape == (12, len(asked.MAPS), asked.PATCHES)
    for lesson, names in zip(made, batch["names"], strict=True):
        for name, ids in zip(asked.MAPS, names.tolist(), strict=True):
            known = asked.vocabulary(name).tolist()
            for i, word in zip(ids, {**lesson.maps(), **asked.PLACES}.get(name, [None] * asked.PATCHES), strict=True):
                assert (word in (None, asked.NOTHING) and i == IGNORE) or words.decode([i]) == word
                assert i == IGNORE or i in known


def test_a_learner_names_patches_and_answers() -> None:
    learner, made, rng = vlm.model(), lessons(2, scenes=1.0, charted=0.0), np.random.default_rng(0)
    assert isinstance(learner, vlm.Learner)
    named = learner.loss(asked.look(made, rng))
    named.total.backward()
    assert learner.vlm.vision.patch_embed.weight.grad is not None
    assert learner.vlm.backbone.blocks[0].mlp.up_proj.weight.grad is None  # words alone, not what reads them
    answered = learner.loss(asked.collate(made, rng))
    assert answered.weight == sum(len(words) + 1 for m in made for words in map(asked._ids, [a for _, a in m.asked]))
    learner.eval()  # the statistics of a batch norm would move between the parts and the whole
    batch = asked.both(made, np.random.default_rng(0))
    looked = learner.loss(Batch({name: batch[name] for name in ("pixels", "names")}))
    said = learner.loss(Batch({name: tensor for name, tensor in batch.items() if name != "names"}))
    whole = learner.loss(batch)
    assert whole.weight == said.weight
    torch.testing.assert_close(whole.total, said.total + vlm.NAMING * looked.total / looked.weight * said.weight)


def test_strange_words_change_no_question() -> None:
    rng, idle = np.random.default_rng(0), set(asked.idle_words())
    assert {"say", "value", "text"} < idle  # else a word is enough to tell what kind of question it is
    telling = {*asked.KNOWN, *" ".join(shapes.RELATIONS).split(), *shapes.COLOURS, "higher", "lower", "highest", "most"}
    assert idle.isdisjoint(telling - {"of"} | {"appear", "outnumber", "true"})  # the last: of held-out wordings only
    words = ["is", "the", "red", "cup", "left", "of", "the", "star?"]
    for _ in range(20):
        mixed = asked.with_noise(words, rng, 1.0)
        assert [word for word in mixed if isinstance(word, int)] == list(range(len(words)))
        assert 1 <= len(mixed) - len(words) <= 4
    assert asked.with_noise(words, rng, 0.0) == list(range(len(words)))


def test_its_stages_run(tmp_path: Path) -> None:
    result = fit(replace(vlm.run((1, 1, 1)), evaluate=None, expect={}), tmp_path, device="cpu")
    assert result.step == 3


@pytest.mark.parametrize("seed", range(5))
def test_maps_agree_with_the_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = shapes.scene(rng, objects=1)
    picture = shapes.render(scene, asked.SIZE).astype(int)
    maps = asked.map_scene(scene)
    touched = _touched(np.abs(picture - np.array(scene.background)).sum(2))
    for name in ("shape", "colour"):
        named = [i for i, word in enumerate(maps[name]) if word != asked.NOTHING]
        assert touched[named].mean() > 0.8, name
    assert sum(word != asked.NOTHING for word in maps["middle"]) == 1

    page = documents.line(rng, size=asked.SIZE, words=2)
    maps = asked.map_letters(documents.letters(page), {})
    said = page.text.lower().replace("\n", "").replace(" ", "")
    found = [word for name in ("letter", "second") for word in maps[name] if word != asked.NOTHING]
    assert len(found) >= 0.8 * len(said)  # a third letter of one patch has no map
    assert set(found) <= set(said)
    ink = _touched(np.abs(documents.render(page, asked.SIZE).astype(int) - np.array(page.paper)).sum(2))
    assert ink[[i for i, word in enumerate(maps["letter"]) if word != asked.NOTHING]].mean() > 0.9


def test_words_of_a_question_know_how_many_there_are_and_where() -> None:
    cup, other, star = (
        shapes.Thing(shape=shape, colour=colour, size="small", material="matte", x=x, y=y, width=0.1)
        for shape, colour, x, y in (("cup", "red", 0.15, 0.55), ("cup", "blue", 0.5, 0.5), ("star", "red", 0.85, 0.95))
    )
    scene = shapes.Scene(things=(cup, other, star), background=(9, 9, 9))
    one, two = {"many": "1"}, {"many": "2"}
    assert asked.things_of_scene(scene, ["is", "the", "red", "cup", "left", "of", "the", "star"]) == {
        3: asked.Thing({**one, "across": "1", "down": "5"}, [51], (0.15, 0.55)),
        7: asked.Thing({**one, "across": "8", "down": "9"}, [98], (0.85, 0.95)),
    }
    assert asked.related((0.15, 0.55), (0.85, 0.95)) == {"beside": "left", "over": "above"}
    assert asked.related((0.55, 0.55), (0.5, 0.4)) == {"beside": "nothing", "over": "below"}
    assert asked.things_of_scene(scene, ["more", "cups", "than", "blue", "stars", "or", "red", "objects"]) == {
        1: asked.Thing(two, [51, 55]),
        4: asked.Thing({"many": "0"}, []),
        7: asked.Thing(two, [51, 98]),
    }
    letters = [("F", 3.0, 9.0), ("o", 9.0, 9.0), ("x", 17.0, 9.0), (" ", 20.0, 9.0), ("7", 40.0, 9.0), (" ", 44.0, 9.0)]
    values = {"fox": "6.2", "cat": "40"}
    fox = {"first": "6", "then": ".", "third": "2", "last": "nothing", "across": "0", "down": "1"}
    assert asked.things_of_chart(letters, values, ["is", "fox", "above", "cat"]) == {
        1: asked.Thing(fox, [10]),
        3: asked.Thing({"first": "4", "then": "0", "third": "nothing", "last": "nothing"}, []),
    }
    maps = asked.map_letters(letters, values)
    assert {i: sign for i, sign in enumerate(maps["first"]) if sign} == {10: "6", 11: "6", 12: "6"}
    assert {i: sign for i, sign in enumerate(maps["last"]) if sign} == {10: "nothing", 11: "nothing", 12: "nothing"}


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_thing_is_pointed_at_where_its_name_ends(noise: float) -> None:
    tokens, seen = asked.tokenizer(), 0
    made = lessons(12, scenes=0.5, charted=0.5)
    batch = asked.collate(made, np.random.default_rng(0), noise=noise)
    row_things = [(row, *thing) for row, named in enumerate(batch["things"].tolist()) for thing in named]
    for row, token, which, word in (thing for thing in row_things if thing[1] != IGNORE):
        if which == asked.MEETS:  # another word that names a thing, before it
            assert word < token
            assert any(thing[:2] == (row, word) and asked.NAMED[thing[2]] == "across" for thing in row_things)
            continue
        text = tokens.decode(batch["ids"][row, asked.PATCHES : token + 1].tolist())
        last = text.split()[-1]
        assert made[row].things([last]), text
        assert batch["labels"][row, token] == IGNORE
        if which == asked.LIES:
            assert word < asked.PATCHES
            continue
        said = {"left", "right", "above", "below"} if asked.NAMED[which] in asked.RELATED else {*"0123456789."}
        assert tokens.decode([word]) in said | {asked.NOTHING}
        if asked.NAMED[which] == "many":
            assert last in asked.KNOWN, text
            seen += 1
    assert seen > 20


def test_a_line_is_read_where_its_letters_are() -> None:
    rng, tokens = np.random.default_rng(1), asked.tokenizer()
    made = [asked.of_line(rng) for _ in range(10)]
    batch = asked.collate(made, rng, noise=0.0)
    signs = ("letter", "second", "next")
    for row, lesson in enumerate(made):
        maps = lesson.maps()
        read = [(token, patch) for token, which, patch in batch["things"][row].tolist() if which == asked.LIES]
        assert len(read) == sum(letter != " " for letter in lesson.asked[0][1].removeprefix("text: "))
        shown = [
            tokens.decode([int(batch["labels"][row, token + 1])]).lower().strip()
            in {maps[name][patch] for name in signs}
            for token, patch in read
        ]
        assert np.mean(shown) > 0.9  # a third letter of one patch has no map


def test_letters_of_a_chart_lie_on_ink() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        chart = charts.chart(rng, size=160, kind="bar")
        picture = charts.render(chart, 160).astype(int)
        for letter, x, y in charts.letters(chart, 160):
            if letter != " ":
                near = picture[max(int(y) - 5, 0) : int(y) + 6, max(int(x) - 4, 0) : int(x) + 5].reshape(-1, 3)
                assert np.ptp(near, 0).sum() > 60, (letter, x, y)


def _touched(change: np.ndarray) -> np.ndarray:
    """Which patches hold a pixel that is not of the background."""
    return (change > 30).reshape(asked.SIZE // 8, 8, -1, 8).any((1, 3)).flatten()


def test_nothing_that_is_held_out_is_learned() -> None:
    pairs = {f"{colour} {shape}" for colour, shape in shapes.HELD_OUT}
    unseen = [w for group in questions.WORDINGS.values() for i, w in enumerate(group) if i in HELD_OUT_PARAPHRASES]
    forms = [re.compile(re.sub(r"\\\{.*?\\\}", ".+", re.escape(wording))) for wording in unseen]
    rng = np.random.default_rng(0)
    for _ in range(200):
        lesson = asked.of_scene(rng, 4)
        assert pairs.isdisjoint(map(" ".join, zip(lesson.maps()["colour"], lesson.maps()["shape"], strict=True)))
        for question, answer in lesson.asked:
            assert not any(pair in f"{question} {answer}" for pair in pairs), question
            assert not any(form.fullmatch(question) for form in forms), question


def test_the_tasks_ask_about_what_is_held_out() -> None:
    tasks = {task.name: task for task in asked.tasks(12)}
    assert list(tasks) == ["existence", "count", "relation", "reading", "chart value"]
    assert {len(task.items) for task in tasks.values()} == {12}
    again = {task.name: task for task in asked.tasks(12)}
    for name, task in tasks.items():
        assert [i.references for i in task.items] == [i.references for i in again[name].items]
    words = set(asked.tokenizer().backend.get_vocab())
    assert "appear" not in words  # a word of held-out wordings only
    assert not any(charts.held_out_word(w) and w in words for w in ("plum", "iron", "chess"))


def test_what_is_looked_at_is_what_the_first_head_sees() -> None:
    learner, made = vlm.model(), lessons(2, scenes=1.0, charted=0.0)
    assert isinstance(learner, vlm.Learner)
    learner.eval()
    backbone, batch = learner.vlm.backbone, asked.collate(made, np.random.default_rng(0))
    block, tokens = backbone.blocks[1], learner.vlm.read(batch)
    assert isinstance(block, DecoderBlock)
    views = list(backbone.views(tokens))
    x, view = backbone.blocks[0](backbone.enter(tokens), views[0]), views[1]
    row, token = torch.tensor([0, 1]), torch.tensor([100, 104])
    looks = learner.looking(block, x, view, row, token).exp()
    torch.testing.assert_close(looks.sum(1), torch.ones(2))
    _, _, v = block.attn.project(block.attn_norm(x), view.rotary)
    seen: list[torch.Tensor] = []
    block.attn.o_proj.register_forward_hook(lambda _, given, x: seen.append(given[0]))
    block(x, view)
    head = backbone.config.attention.head_dim
    for i in range(2):  # the weighted values are what the head gives on
        torch.testing.assert_close(looks[i] @ v[row[i], 0], seen[0][row[i], token[i], :head], rtol=1e-4, atol=1e-5)


def test_pointing_alone_is_what_answers_learn_beside() -> None:
    learner, made = vlm.model(), lessons(3, scenes=0.7, charted=0.3)
    assert isinstance(learner, vlm.Learner)
    learner.eval()
    alone, both = (learner.loss(form(made, np.random.default_rng(0))) for form in (asked.point, asked.both))
    for name, value in alone.metrics.items():
        torch.testing.assert_close(both.metrics[name], value)
    assert alone.weight == 3
    alone.total.backward()
    blocks = learner.vlm.backbone.blocks
    read = [any(p.grad is not None and bool(p.grad.any()) for p in block.parameters()) for block in blocks]
    assert read == [True, True, True, False]
