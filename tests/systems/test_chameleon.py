"""Chameleon as a system: pictures as tokens that are learned, whole pictures in what it writes, the verb draw."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.chat import Chat
from polymodal.core.drawing import Drawing, Glimpse
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image, Sample, Text
from polymodal.core.verbs import Draws
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.systems.chameleon import PRESETS, Chameleon
from polymodal.systems.unified import Z_LOSS
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO, nano, nano_batch
from tests.talking import MARKS, WORDS

WHOLE = 16  # codes of a picture at nano size


def picture(seed: int = 0) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model() -> Chameleon:
    tokenizer = LanguageTokenizer.train_bpe(WORDS * 20, 320, special=tuple(MARKS.values()))
    first, config = tokenizer.vocab_size, NANO["chameleon"]
    torch.manual_seed(0)
    config = replace(
        config, backbone=replace(config.backbone, vocab_size=first + 36), code_ids=tuple(range(first, first + 32)),
        image_id=first + 36, start_id=first + 32, end_id=first + 33, turn_id=first + 34,
    )  # fmt: skip
    model = polymodal.build(config)
    assert isinstance(model, Chameleon)
    model.use_tokenizer(tokenizer)
    for parameter in model.backbone.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()


@pytest.mark.proves("chameleon", "image tokens: 1,024 of a picture of 512 pixels, between begin and end")
def test_a_picture_is_1024_tokens() -> None:
    with skeleton():
        whole = Chameleon(PRESETS["facebook/chameleon-7b"]())
    whole.images = whole.default_images()
    for size in ((512, 512), (30, 900), (1, 1)):
        (ids,), batch = whole.see([PILImage.new("RGB", size)])
        assert batch["pixels"].shape == (1, 3, 512, 512)
        assert ids == [8197, *[8711] * 1024, 8196]


@pytest.mark.proves("chameleon", "interleaved documents: exactly the codes of each picture, learned as the text is")
def test_documents(model: Chameleon) -> None:
    t = model.modes[0]
    samples = [
        Sample.of([Text("a red cup"), Image(picture()), Text("yes"), Image(picture(1))]),
        Sample.of([Text("no")]),
    ]
    batch = model.document(samples)
    spelled = model.spelled(batch)
    assert "pixels" not in spelled
    for row, sample in enumerate(samples):
        ids, labels = (spelled[name][row][spelled["valid"][row]].tolist() for name in ("ids", "labels"))
        assert ids == labels
        assert sum(i in t.books[0] for i in ids) == WHOLE * len(sample.images)
        assert model.count(sample) == len(ids) - 2
        assert ids.count(t.begin) == ids.count(t.end) == len(sample.images)
        assert (ids[0], ids[-1]) == (1, 2)
    expected = model.picture_tokens(batch["pixels"]).flatten()
    assert torch.equal(spelled["ids"][torch.isin(spelled["ids"], torch.tensor(t.books[0]))], expected)
    with pytest.raises(MediaError, match="at most 96"):
        model.document([Sample.of([Image(picture())] * 6)])


@pytest.mark.proves("chameleon", "training: pictures get loss and gradient; z-loss by hand; the tokenizer stays frozen")
def test_pictures_are_learned() -> None:
    torch.manual_seed(0)
    model = nano("chameleon").train()
    assert isinstance(model, Chameleon)
    batch = nano_batch(model, 2)
    only = batch["labels"].masked_fill(batch["labels"] != model.media_id, IGNORE)
    loss = model.loss(Batch(batch, labels=only))
    assert loss.weight == 2 * WHOLE
    scores, ids = model(batch)[:, :WHOLE], model.spelled(batch)["ids"][:, 1 : WHOLE + 1]
    by_hand = (scores.logsumexp(-1) - scores.gather(-1, ids[..., None])[..., 0]).mean()
    by_hand = by_hand + Z_LOSS * scores.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss.mean, by_hand)
    loss.mean.backward()
    table, head = model.backbone.embed_tokens.weight, model.backbone.lm_head
    assert head is not None
    for weight in (table, head.weight):
        assert weight.grad is not None
        assert (weight.grad[ids.unique()].abs().amax(1) > 0).all()
    assert not any(p.requires_grad for p in model.vision.parameters())
    assert not model.vision.training
    asked = Batch(batch, labels=batch["labels"].masked_fill(batch["labels"] == model.media_id, IGNORE))
    assert model.loss(asked).weight == 2 * (8 - 1), "pictures of a question are not learned"


def test_an_answer_may_hold_pictures(model: Chameleon) -> None:
    chat = Chat.of(
        [
            {"role": "user", "content": ["how many?", Image(picture())]},
            {"role": "assistant", "content": ["two", Image(picture(1)), "yes"]},
        ]
    )
    batch = model.lesson([chat])
    labels = model.spelled(batch)["labels"][0]
    learned = labels[labels != IGNORE].tolist()
    assert model.tokenizer is not None
    two, yes = (model.tokenizer.encode(word, special=False) for word in ("two", "yes"))
    codes = model.picture_tokens(batch["pixels"])[1].tolist()
    assert learned == [*two, model.modes[0].begin, *codes, model.modes[0].end, *yes, model.config.turn_id]
    prompt = model.write_prompt(Chat(chat.turns[:1]))
    assert prompt[0] == 1
    assert prompt[-2:] == [model.config.image_id, model.config.turn_id]


@pytest.mark.proves("chameleon", "text and pictures in turn: an answer is taken apart into texts and whole pictures")
def test_text_and_pictures_in_turn(model: Chameleon) -> None:
    prompt = model.prompt([Chat.of("a red cup")])
    settings = [
        Settings(max_new_tokens=60, temperature=5.0, seed=seed, constraint=model.interleaved(60, most={"image": 2}))
        for seed in range(6)
    ]
    prompts = Batch({name: tensor.expand(6, -1) for name, tensor in prompt.items()})
    assert model.tokenizer is not None
    answers = complete(model, prompts, settings, model.tokenizer)
    counts = []
    for answer in answers:
        parts = model.parts(answer.ids)
        pictures = [part for part in parts if isinstance(part, Image)]
        assert all(part.source.size == (8, 8) for part in pictures)
        assert all(a.text or b for a, b in itertools.pairwise(parts) if isinstance(a, Text))
        counts.append(len(pictures))
    assert 0 < max(counts) <= 2
    t = model.modes[0]
    with pytest.raises(MediaError, match=f"token {t.end} in a span of image, behind 2 of its codes"):
        model.parts([5, t.begin, *t.books[0][:2], t.end])


@pytest.mark.proves("chameleon", "draw: a seed gives the same picture alone and in a batch; guidance counts")
def test_draw(model: Chameleon) -> None:
    assert isinstance(model, Draws)
    assert model.multiple == 8
    seen: list[Glimpse] = []
    both = model.draw(["a red cup", "no"], Drawing(seed=3), watch=seen.append)
    assert both.shape == (2, 3, 8, 8)
    assert 0 <= float(both.min()) <= float(both.max()) <= 1
    assert torch.equal(model.draw(["no"], Drawing(seed=4))[0], both[1])
    assert not torch.equal(model.draw(["no"], Drawing(seed=5))[0], both[1])
    assert not torch.equal(model.draw(["no"], Drawing(seed=4, guidance=9))[0], both[1])
    assert not torch.equal(model.draw(["no"], Drawing(seed=4, negative="yes"))[0], both[1])
    assert [glimpse.step for glimpse in seen] == list(range(1, WHOLE + 3))
    assert torch.equal(seen[-1].pictures(), both)
    with pytest.raises(ConfigError, match="8 x 8"):
        model.draw(["no"], Drawing(size=(16, 16)))
    with pytest.raises(UnsupportedError, match="takes 18 steps"):
        model.draw(["no"], Drawing(steps=5))
    with pytest.raises(UnsupportedError, match="texts alone"):
        model.draw(["no"], Drawing(), image=both[:1])


def test_weights_without_a_decoder_paint_nothing() -> None:
    config = NANO["chameleon"]
    blind = polymodal.build(replace(config, vision=replace(config.vision, paints=False)))
    assert isinstance(blind, Chameleon)
    with pytest.raises(UnsupportedError, match="no decoder"):
        blind.draw(["no"], Drawing())
