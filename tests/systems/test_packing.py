"""Rows that are packed for the decoder give what lone rows give: logits, loss and gradients, media included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch import Tensor

import polymodal
from polymodal.backbones.decoder import Window, pack_rows
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import UnsupportedError
from polymodal.core.packing import Packing, first_fit
from polymodal.core.sample import Image, Video
from polymodal.core.tokens import Modality, Tokens
from polymodal.modalities.smart_resize import ClipSize, SmartResize
from polymodal.modalities.video import Fps
from polymodal.systems.generator import Generator
from tests.nano import NANO, nano, nano_batch
from tests.talking import talking

ANSWERS = ["a red cup", "two", "it is a ring and a blue plate", "no", "yes", "the bar", "a ring", "many, and a cup"]


def chats(name: str) -> list[Chat]:
    """Lessons of very different lengths: with no picture, one, several of odd sizes, a clip; of one turn and of two."""
    rng = np.random.default_rng(0)

    def picture() -> Image:
        height, width = rng.integers(9, 40, 2)
        return Image(PILImage.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))

    found = []
    for number, answer in enumerate(ANSWERS):
        shown: list[Image | Video] = [picture() for _ in range(0 if name == "language" else number % 3)]
        if "qwen" in name and number == 4:
            shown.append(Video(rng.integers(0, 256, (8, 20, 33, 3), dtype=np.uint8), fps=4.0))
        chat = Chat.of([*shown, "what is it? " * (1 + 4 * (number == 5))]).reply(answer)
        found.append(chat if name == "paligemma" or number % 2 else chat.ask("how many?").reply("two, a cup"))
    return found


def seeing(name: str) -> Generator:
    """A system of this name; small clips are left as small as they are."""
    model = talking(name)
    if isinstance(model.images, SmartResize):
        clips = ClipSize(sampling=Fps(fps=2.0), min_pixels=64, max_pixels=24 * 40, total_pixels=10**6)
        model.images = replace(model.images, min_pixels=64, max_pixels=40 * 40, clips=clips)
    return model


def gradients(model: Generator) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


PACKED = ["language", "llava", "llava_next", "paligemma", "qwen2_vl", "qwen2_5_vl", "composed"]
CLAIM = "packing: logits, loss and gradients of packed rows = those of lone ones"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.proves(n, CLAIM), id=n) for n in PACKED])
def test_packed_equals_lone(name: str) -> None:
    model, lessons = seeing(name), chats(name)
    batch = model.lesson(lessons)
    lone_logits = [model(model.lesson([chat]))[0] for chat in lessons]
    lone_losses = [model.loss(model.lesson([chat])) for chat in lessons]
    torch.stack([loss.total for loss in lone_losses]).sum().backward()
    expected = gradients(model)
    pack_rows(model)
    packing = Packing.of(batch["valid"])
    assert len(packing.source) < len(lessons)
    assert packing.padding[1] < packing.padding[0]
    packed = model(batch)
    for row, logits in enumerate(lone_logits):
        torch.testing.assert_close(packed[row, : len(logits)], logits, rtol=1e-5, atol=1e-5)
    loss = model.loss(batch)
    assert loss.weight == sum(lone.weight for lone in lone_losses)
    torch.testing.assert_close(loss.total, sum(lone.total for lone in lone_losses), rtol=1e-5, atol=1e-5)
    loss.total.backward()
    for parameter, gradient in gradients(model).items():
        scale = max(1.0, float(expected[parameter].abs().max()))
        torch.testing.assert_close(gradient / scale, expected[parameter] / scale, rtol=0, atol=1e-5)
    assert any(g.abs().max() > 1e-3 for n, g in expected.items() if "vision" in n) or name == "language"


@pytest.mark.parametrize("broken", ["sample", "position", "block"])
def test_a_leak_would_show(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sample numbers, the restarted positions or the restarted blocks the logits are others."""
    name = "paligemma" if broken == "block" else "qwen2_vl"
    model = seeing(name)
    batch = model.lesson(chats(name))
    expected, honest = model(batch), Packing.pack

    def leaking(self: Packing, tokens: Tokens) -> Tokens:
        packed = honest(self, tokens)
        order = torch.arange(packed.shape[1])
        wrong = {
            "sample": torch.zeros_like(packed.sample),
            "position": order[None, :, None].expand_as(packed.position).contiguous(),
            "block": order.expand_as(packed.block).contiguous(),
        }
        return replace(packed, **{broken: wrong[broken]})

    pack_rows(model)
    torch.testing.assert_close(model(batch)[batch["valid"]], expected[batch["valid"]], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(Packing, "pack", leaking)
    assert (model(batch) - expected)[batch["valid"]].abs().max() > 1e-2


def test_a_window_stays_within_its_sample() -> None:
    config = NANO["language"]
    backbone = replace(config.backbone, window=Window(size=3, layers=(1,)))
    model = polymodal.build(replace(config, backbone=backbone))
    assert isinstance(model, Generator)
    valid = torch.arange(12) < torch.tensor([12, 5, 4, 3])[:, None]
    batch = Batch(ids=torch.randint(3, 40, (4, 12)), valid=valid)
    expected = model(batch)
    pack_rows(model)
    torch.testing.assert_close(model(batch)[valid], expected[valid], rtol=1e-5, atol=1e-5)


def test_generation_is_not_packed() -> None:
    model = talking("llava")
    asked = [Chat(chat.turns[:1]) for chat in chats("llava")]
    batch = model.prompt(asked)
    expected = model.prefill(batch, model.new_memory(len(asked), 200))
    pack_rows(model)
    assert torch.equal(model.prefill(batch, model.new_memory(len(asked), 200)), expected)


def test_who_cannot_pack_says_so() -> None:
    with pytest.raises(UnsupportedError, match="no decoder"):
        pack_rows(nano("t5"))
    model = nano("flamingo")
    pack_rows(model)
    with pytest.raises(UnsupportedError, match="row by row"):
        model.loss(nano_batch(model))


# ---- the packer


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 60))
def test_first_fit_holds_all_once(lengths: list[int], capacity: int) -> None:
    rows = first_fit(lengths, capacity)
    assert sorted(n for row in rows for n in row) == [n for n, length in enumerate(lengths) if length]
    assert all(sum(lengths[n] for n in row) <= capacity or len(row) == 1 for row in rows)
    sums = sorted(sum(lengths[n] for n in row) for row in rows)
    if len(sums) > 1:  # else the two emptiest rows would be one
        assert sums[0] + sums[1] > capacity


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=8))
def test_unpack_reverses_pack(rows: list[list[bool]]) -> None:
    valid = torch.tensor(rows)
    tokens = Tokens.of(torch.randn(*valid.shape, 2), causal=True, modality=Modality.TEXT, valid=valid)
    packing = Packing.of(valid)
    packed = packing.pack(tokens)
    assert int(packed.valid.sum()) == int(valid.sum())
    assert packing.padding[1] <= packing.padding[0] + 1e-6
    assert torch.equal(packing.unpack(packed.x), tokens.x.masked_fill(~valid.unsqueeze(-1), 0.0))
    where = packed.valid.nonzero().tolist()
    sample = {(r, p): int(packed.sample[r, p]) for r, p in where}
    assert all(torch.equal(packed.x[r, p], tokens.x[sample[r, p], packed.position[r, p, 0]]) for r, p in where)
