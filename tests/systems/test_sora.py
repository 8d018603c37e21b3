"""What the report on Sora says: clips of any length, size and shape in one row are as alone; a picture is one frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.filming import Filming
from polymodal.nn.spacetime import NOBODY, patched, unpatched
from polymodal.systems.cosmos_tokenizer import CosmosTokenizerConfig
from polymodal.systems.flow_painter import T5_END
from polymodal.systems.sora import Sora, SoraConfig
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO, nano, shaken

SHAPES = [(3, 4, 6), (1, 8, 4), (2, 2, 10), (1, 2, 2)]  # wide, a tall picture, very wide, the smallest picture
TEXTS = [[5, 9, 1], [7, 1], [1], [3, 4, 6, 8, 1]]


@pytest.fixture(scope="module")
def model() -> Sora:
    torch.manual_seed(0)
    system = shaken(nano("sora"), 0.2).eval()
    assert isinstance(system, Sora)
    return system


def clips() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, *shape, generator=generator) for shape in SHAPES]


def learned(model: Sora, batch: Batch, when: dict[int, float]) -> tuple[Batch, list[tuple[Tensor, Tensor]]]:
    """The batch with noise and times that do not depend on where a clip lies, and each clip's patches and velocity."""
    batch = Batch(batch)
    batch["noise"] = torch.sin(batch["patches"] * 3 + 1)
    lengths = {len(patched(c, 2)[0]): number for number, c in enumerate(clips())}
    times = torch.zeros(batch["ids"].shape[:2])
    for row, place in torch.cartesian_prod(*(torch.arange(n) for n in times.shape)).tolist():
        count = int((batch["clip"][row] == place).sum())
        if count:
            times[row, place] = when[lengths[count]]
    batch["when"] = times
    out = model(batch)
    found = []
    for row in range(len(out)):
        for place in range(times.shape[1]):
            here = batch["clip"][row] == place
            if here.any():
                found.append((batch["patches"][row, here], out[row, here]))
    return batch, found


@pytest.mark.proves("sora", "packing: clips and pictures of several sizes in one row are as alone")
def test_packed_is_alone(model: Sora) -> None:
    when = {0: 0.1, 1: 0.4, 2: 0.7, 3: 0.95}
    packed, together = learned(model, model.pack(clips(), TEXTS, capacity=20), when)
    assert packed["patches"].shape[0] < len(SHAPES)  # some share a row
    assert (packed["clip"] == NOBODY).any()  # and there is padding
    total = 0.0
    for clip, text in zip(clips(), TEXTS, strict=True):
        batch, [(patches, velocity)] = learned(model, model.pack([clip], [text]), when)
        (same,) = (v for p, v in together if p.shape == patches.shape and torch.equal(p, patches))
        torch.testing.assert_close(same, velocity, atol=1e-5, rtol=1e-5)
        total += model.loss(batch).total.item()
    loss = model.loss(packed)
    assert loss.total.item() == pytest.approx(total, rel=1e-5)
    assert loss.weight == sum(clip.numel() for clip in clips())


@pytest.mark.proves("sora", "clips: any size is patches and back; a picture is one frame")
def test_clips_are_patches_and_back(model: Sora) -> None:
    for clip in clips():
        patches, position = patched(clip, 2)
        time, height, width = clip.shape[1:]
        assert patches.shape == (time * height // 2 * (width // 2), 16)
        assert torch.equal(unpatched(patches, (time, height, width), 2), clip)
        assert position[0].tolist() == [0, 0, 0]
        assert position[-1].tolist() == [time - 1, height // 2 - 1, width // 2 - 1]
        number = len(patches) // 2
        t, y, x = position[number].tolist()
        assert torch.equal(patches[number], clip[:, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten())
    still = clips()[1]
    assert patched(still, 2)[1][:, 0].eq(0).all()


def test_a_causal_autoencoder_has_one_latent_for_the_first_frame(model: Sora) -> None:
    assert [model.vae.grid(n, 16, 32) for n in (1, 5, 9, 61)] == [(n, 2, 4) for n in (1, 2, 3, 16)]
    for frames in (0, -3, 2, 4, 8, 60):
        with pytest.raises(MediaError, match="1, 5, 9"):
            model.vae.grid(frames, 16, 16)
    for shape in ((1, 3, 4), (1, 4, 5), (0, 4, 4)):
        with pytest.raises(MediaError, match="patches of 2"):
            patched(torch.zeros(4, *shape), 2)


@pytest.mark.proves("sora", "drawing: the size of the noise is the size of the clip")
def test_the_noise_gives_the_size(model: Sora) -> None:
    for shape in ((1, 4, 4), (2, 2, 6)):
        made = model.sample([5, 1], shape, steps=3, seed=2)
        assert made.shape == (4, *shape)
        assert torch.equal(made, model.sample([5, 1], shape, steps=3, seed=2))
        assert not torch.allclose(made, model.sample([6, 1], shape, steps=3, seed=2), atol=1e-4)
        assert not torch.allclose(made, model.sample([5, 1], shape, steps=3, seed=3), atol=1e-2)


def test_time_and_place_are_told_apart(model: Sora) -> None:
    """The same patches in another order of moments, or as one picture, are not moved the same way."""
    clip = clips()[0]
    batch = model.pack([clip], [[5, 1]])
    batch["noise"], batch["when"] = torch.zeros_like(batch["patches"]), torch.full((1, 1), 0.5)
    before = model(batch)
    for axis in range(3):
        position = batch["position"].clone()
        position[..., axis] *= 2
        assert not torch.allclose(model(Batch(batch, position=position)), before, atol=1e-4)
    shifted = batch["position"] + 3  # text is at the origin: a clip is where it is from it
    assert not torch.allclose(model(Batch(batch, position=shifted)), before, atol=1e-5)


def test_padding_is_not_learned(model: Sora) -> None:
    batch, _ = learned(model, model.pack(clips(), TEXTS, capacity=20), dict.fromkeys(range(4), 0.5))
    padded = batch["clip"] == NOBODY
    other = batch["patches"].masked_fill(padded[..., None], 1e3)
    assert model.loss(Batch(batch, patches=other)).total.item() == pytest.approx(model.loss(batch).total.item())


def test_learning_pictures_and_clips_together() -> None:
    torch.manual_seed(0)
    model = nano("sora").train()
    assert isinstance(model, Sora)
    batch = model.pack(clips(), TEXTS, capacity=20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = model.loss(batch).mean
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_impossible_configs_are_refused() -> None:
    config = NANO["sora"]
    wrong = ({"size": 3}, {"text": NANO["sd3"].t5}, {"backbone": NANO["flux"].backbone}, {"scale": 0.0})
    for fields in wrong:
        with pytest.raises(ConfigError):
            SoraConfig(**{"text": config.text, "backbone": config.backbone, "vae": config.vae} | fields)


@pytest.mark.proves("sora", "films: pixels to clip and back, a picture is as alone; films of a text, with guidance")
def test_pixels_to_clip_and_back(model: Sora) -> None:
    film = torch.rand(9, 3, 16, 32) * 2 - 1
    latents = model.encode_clip(film)
    assert latents.shape == (4, 3, 2, 4)
    torch.testing.assert_close(model.encode_clip(film[:1]), latents[:, :1], atol=1e-5, rtol=1e-5)
    assert model.decode_clip(latents).shape == film.shape
    other = replace(model.config, scale=2.0)
    doubled = Sora(other)
    doubled.load_state_dict(model.state_dict())
    torch.testing.assert_close(doubled.encode_clip(film), 2 * latents)
    torch.testing.assert_close(doubled.decode_clip(2 * latents), model.decode_clip(latents))
    with pytest.raises(MediaError, match="multiples of 8"):
        model.encode_clip(torch.zeros(1, 3, 12, 16))


def test_an_autoencoder_is_adopted() -> None:
    torch.manual_seed(0)
    model, codec = nano("sora"), polymodal.build(CosmosTokenizerConfig(net=NANO["sora"].vae))
    assert isinstance(model, Sora)
    model.adopt(codec.net)
    film = torch.rand(1, 3, 5, 16, 16)
    torch.testing.assert_close(model.encode_clip(film[0].movedim(1, 0)), codec.latents(film)[0])


def test_films(model: Sora, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        model.film("a cat", Filming())
    monkeypatch.setattr(model, "tokenizer", LanguageTokenizer.of_words(["a", "cat", "dog"], special=()))
    assert model.ids(["a cat"])[0][-1] == T5_END
    with pytest.raises(MediaError, match="at most 12"):
        model.film("a cat " * 20, Filming())
    monkeypatch.setattr(model, "ids", lambda texts: [[*map(len, text.split()), T5_END] for text in texts])
    filming = Filming(seed=3, steps=3, guidance=3)
    film = model.film("a cat", filming)
    assert film.shape == (5, 3, 16, 16)
    assert torch.equal(film, model.film("a cat", filming))
    assert not torch.allclose(film, model.film("some cats", filming), atol=1e-4)
    assert not torch.allclose(film, model.film("a cat", replace(filming, guidance=1)), atol=1e-4)
    assert model.film("a cat", replace(filming, frames=1, size=(32, 16))).shape == (1, 3, 16, 32)
    with pytest.raises(ConfigError, match="1, 5, 9"):
        model.film("a cat", Filming(frames=6))
    with pytest.raises(UnsupportedError, match="no picture"):
        model.film("a cat", filming, image=torch.rand(3, 16, 16))
    with pytest.raises(UnsupportedError, match="how much is to move"):
        model.film("a cat", Filming(motion=5))


@pytest.mark.proves("sora", "training: what is dropped says nothing")
def test_dropping(model: Sora) -> None:
    batch = model.pack(clips(), TEXTS, capacity=20)
    dropped = model.drop(batch, torch.ones(batch["ids"].shape[:2], dtype=torch.bool))
    assert torch.equal(dropped["valid"].any(-1), batch["valid"].any(-1))
    said = dropped["ids"][dropped["valid"]]
    assert said.tolist() == [T5_END] * len(TEXTS)
    kept = model.drop(batch, torch.zeros(batch["ids"].shape[:2], dtype=torch.bool))
    assert all(torch.equal(kept[name], batch[name]) for name in batch)
