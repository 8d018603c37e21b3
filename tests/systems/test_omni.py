"""Any to any: pictures and sounds are tokens that are read, learned and written; answers come as events."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import polymodal
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.chat import Chat
from polymodal.core.drawing import Drawing
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.events import Event
from polymodal.core.sample import Audio, Image, Sample, Text
from polymodal.core.sounding import Sounding, Voice
from polymodal.core.verbs import Draws, Generates, Sounds
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.samplers.modes import Wordless, events
from polymodal.systems.omni import Omni
from polymodal.systems.unified import Z_LOSS
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO, nano, nano_batch
from tests.talking import WORDS

RATE, HOP = NANO["omni"].codec.sample_rate, NANO["omni"].codec.seanet.hop


def picture(seed: int = 0) -> Image:
    return Image(PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)))


def sound(samples: int, seed: int = 0) -> Audio:
    return Audio(np.random.default_rng(seed).normal(0, 0.3, samples).astype(np.float32), rate=RATE)


@pytest.fixture(scope="module")
def model() -> Omni:
    tokenizer = LanguageTokenizer.train_bpe(WORDS * 20, 300)
    words, config = tokenizer.vocab_size, NANO["omni"]
    torch.manual_seed(0)
    backbone = replace(config.backbone, vocab_size=config.backbone.vocab_size - config.words + words, context=200)
    model = polymodal.build(replace(config, backbone=backbone, words=words))
    assert isinstance(model, Omni)
    model.use_tokenizer(tokenizer)
    for parameter in model.backbone.parameters():
        parameter.data.normal_(std=0.2)
    assert model.backbone.lm_head is not None
    begins = [mode.begin for mode in model.modes]  # two of 385 tokens: they have to come up in a short answer
    model.backbone.lm_head.weight.data[begins] *= 6
    return model.eval()


@pytest.mark.proves(
    "omni", "token accounting: a picture is its codes, a sound its frames times its codebooks, at odd lengths"
)
def test_counts(model: Omni) -> None:
    image, audio = model.modes
    for samples in (1, HOP - 1, HOP, HOP + 1, 5 * HOP):
        sample = Sample.of([picture(), "no", sound(samples)])
        ids = model.document([sample])["ids"][0].tolist()
        frames = -(-samples // HOP)
        assert (
            ids.count(model.config.sound_id)
            == 3 * frames
            == 3 * model.codec.encode_chunks(torch.zeros(1, 1, samples))[0].codes.shape[2]
        )
        assert ids.count(model.config.image_id) == 16
        assert model.count(sample) == len(ids) - 2
        spelled = model.spelled(model.document([sample]))["ids"][0].tolist()
        assert [event.kind for event in events(spelled, model.modes) if event.done] == [
            "text",
            "image",
            "text",
            "audio",
            "text",
        ]
    with pytest.raises(MediaError, match="more than the context holds"):
        model.document([Sample.of(sound(200 * HOP + 1))])
    with pytest.raises(MediaError, match="a prompt of"):
        model.document([Sample.of(sound(100 * HOP))])
    assert (image.shortest, audio.shortest) == (18, 5)


@pytest.mark.proves("omni", "reading: a row with pictures and sounds is the same alone and in a batch")
def test_alone_and_in_a_batch(model: Omni) -> None:
    samples = [
        Sample.of([sound(50), "a red cup", picture(), sound(9, 1)]), Sample.of("no"),
        Sample.of([picture(1), sound(31, 2), "yes"]),
    ]  # fmt: skip
    batch = model.document(samples)
    whole, scores = model.spelled(batch), model(batch)
    for row, sample in enumerate(samples):
        one = model.document([sample])
        length = one["ids"].shape[1]
        assert torch.equal(model.spelled(one)["ids"][0], whole["ids"][row, :length])
        torch.testing.assert_close(model(one)[0], scores[row, :length], atol=1e-5, rtol=1e-5)
    order = [2, 0]
    assert torch.equal(model.spelled(batch.take(order))["ids"], whole["ids"][order])
    joined = Batch.join([model.document([sample]) for sample in samples])
    assert torch.equal(model.spelled(joined)["ids"], whole["ids"])


@pytest.mark.proves(
    "omni", "training: every modality gets loss and gradient, weighed by hand; the tokenizers stay frozen"
)
def test_every_modality_is_learned() -> None:
    torch.manual_seed(0)
    model = nano("omni").train()
    assert isinstance(model, Omni)
    batch, c = nano_batch(model, 2), model.config
    spelled = model.spelled(batch)
    scores, labels = model(batch)[:, :-1], spelled["labels"][:, 1:]
    sides = {
        "text": (0, c.first_code, 1.0),
        "image": (c.first_code, c.first_sound, 1.0),
        "audio": (c.first_sound, 999, 0.5),
    }
    costs = scores.logsumexp(-1) - scores.gather(-1, labels[..., None])[..., 0] + Z_LOSS * scores.logsumexp(-1).square()
    total, weight = torch.zeros(()), 0.0
    for low, high, worth in sides.values():
        mine = (labels >= low) & (labels < high)
        assert mine.any()
        total, weight = total + worth * costs[mine].sum(), weight + worth * int(mine.sum())
    rows = torch.tensor([2.0, 0.0])
    loss = model.loss(batch)
    torch.testing.assert_close(loss.total, total)
    assert loss.weight == weight
    assert model.loss(Batch(batch, weights=rows)).weight == weight
    loss.mean.backward()
    assert model.backbone.lm_head is not None
    for table in (model.backbone.embed_tokens.weight, model.backbone.lm_head.weight):
        assert table.grad is not None
        assert (table.grad[spelled["ids"][:, :-1].unique()].abs().amax(1) > 0).all()
    for frozen in (model.vision, model.codec):
        assert not frozen.training
        assert all(p.grad is None for p in frozen.parameters())
    asked = batch["labels"].masked_fill(batch["labels"] >= c.image_id, IGNORE)
    assert model.loss(Batch(batch, labels=asked)).weight == 2 * (29 - 16 - 3 - 1)


@pytest.mark.proves(
    "omni", "any to any: a chat of text, pictures and sounds is answered in all of them, event by event"
)
def test_stream(model: Omni) -> None:
    chat = Chat.of(["what is it?", picture(), sound(40)])
    prompt = model.prompt([chat])
    kinds = set()
    for seed in range(3):
        settings = Settings(
            max_new_tokens=48, temperature=3.0, seed=seed, constraint=model.interleaved(48, most={"image": 2})
        )
        got = list(model.stream(chat, settings))
        assert all(isinstance(event, Event) for event in got)
        (answer,) = complete(model, prompt, settings, Wordless())
        parts = model.parts(answer.ids)
        spans = [(kind, [e.payload for e in span]) for (kind, _), span in groupby(got, lambda e: (e.kind, e.index))]
        assert [e.index for e in got if e.done] == list(range(len(parts)))
        for part, (kind, payloads) in zip(parts, spans, strict=True):
            kinds.add(kind)
            if isinstance(part, Text):
                assert "".join(payloads) == part.text
            elif isinstance(part, Image):
                assert part.source.size == (8, 8)
                assert [p.shape for p in payloads] == [(3, 8, 8)]
            else:
                assert isinstance(part, Audio)
                assert np.array_equal(part.source, torch.cat(payloads, 1).numpy())
                assert part.source.shape[1] % HOP == 0 < part.source.shape[1]
        # What was written reads as what was said.
        codes = [i for i in answer.ids if i >= model.config.first_sound]
        assert len(codes) == 3 * sum(p.source.shape[1] // HOP for p in parts if isinstance(p, Audio))
    assert kinds == {"text", "image", "audio"}


@pytest.mark.proves("omni", "lessons: answers of text, pictures and sound are learned whole, questions are not")
def test_lessons(model: Omni) -> None:
    chat = Chat.of(
        [
            {"role": "user", "content": ["how many?", picture(), sound(20, 5)]},
            {"role": "assistant", "content": [sound(17), "two", picture(1)]},
        ]
    )
    batch = model.lesson([chat])
    labels = model.spelled(batch)["labels"][0]
    learned = labels[labels != IGNORE].tolist()
    assert learned[-1] == model.config.turn_id
    text, image, audio = (
        [e.payload for e in events(learned[:-1], model.modes) if e.kind == kind and e.payload]
        for kind in ("text", "image", "audio")
    )
    assert model.tokenizer is not None
    assert model.tokenizer.decode([i for (i,) in text]) == "two"
    assert len(image) == 1
    codes = model.codec.encode_chunks(torch.nn.functional.pad(torch.from_numpy(sound(17).source)[None, None], (0, 7)))[
        0
    ].codes
    assert torch.equal(torch.cat([model.modes[1].codes(frame) for frame in audio], 1), codes[0])
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        nano("omni").prompt([Chat.of("no")])  # type: ignore[attr-defined]


@pytest.mark.proves("omni", "draw and sound: one picture, or one sound of at most so long, and nothing else")
def test_draw_and_sound(model: Omni) -> None:
    assert isinstance(model, Draws)
    assert isinstance(model, Sounds)
    assert isinstance(model, Generates)
    both = model.draw(["a red cup", "no"], Drawing(seed=3))
    assert both.shape == (2, 3, 8, 8)
    assert torch.equal(model.draw(["no"], Drawing(seed=4))[0], both[1])
    for seconds in (0.01, 0.1):
        wave = torch.cat([*model.sound("yes", Sounding(seconds=seconds, seed=1, guidance=2.0))], 1)
        assert wave.shape[1] % HOP == 0
        assert 0 < wave.shape[1] / RATE <= max(HOP / RATE, seconds + HOP / RATE / 2)
    with pytest.raises(MediaError, match="room for"):
        next(model.sound("yes", Sounding(seconds=60.0)))
    with pytest.raises(UnsupportedError, match="nobody's voice"):
        next(model.sound("yes", Sounding(), voice=Voice(sound(9), "yes")))


@pytest.mark.proves("omni", "weights: tokenizer, config and tensors are what was saved, and answer alike")
def test_round_trip(model: Omni, tmp_path: Path) -> None:
    again = polymodal.load(model.save(tmp_path / "model"))
    assert isinstance(again, Omni)
    assert again.config == model.config
    settings = Settings(max_new_tokens=40, temperature=3.0, seed=2)
    pairs = zip(model.stream(Chat.of("no"), settings), again.stream(Chat.of("no"), settings), strict=True)
    assert all(
        a.kind == b.kind
        and (a.payload == b.payload if isinstance(a.payload, str) else torch.equal(a.payload, b.payload))
        for a, b in pairs
    )


def test_impossible_configs_are_refused() -> None:
    config = NANO["omni"]
    with pytest.raises(ConfigError, match="a vocabulary of"):
        replace(config, words=41)
    with pytest.raises(ConfigError, match="in one piece"):
        replace(config, codec=replace(config.codec, normalize=True))
