"""Every tower x connector x language model: built, trained a step, sampled; what does not fit is refused, and why."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import polymodal
from polymodal.asking import ask, request
from polymodal.backbones.decoder import DecoderConfig, Gated, Learned, Plain
from polymodal.backbones.encdec import EncDecConfig
from polymodal.composition import CONNECTORS, Gates, compose, stages
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.grid import PixelShuffle, Pooling
from polymodal.connectors.mlp import MLP, Linear
from polymodal.connectors.qformer import QFormerConfig, TextTables
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.chat import Chat, ToolCall
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.sample import Image, Sample, Video
from polymodal.encoders.vit import ViTConfig
from polymodal.modalities.image import CLIP_MEAN, HALF, IMAGENET_MEAN, ImageProcessor
from polymodal.modalities.video import decode
from polymodal.nn.norm import Layer, OffsetRMS
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings
from polymodal.systems.base import System
from polymodal.systems.composed import Composed
from polymodal.systems.language import LanguageModelConfig
from polymodal.systems.t5 import T5Config
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train.run import Stage
from tests.nano import DECODER, NANO, TOWER, nano

WORDS = ["what is it? it is a ring", "yes", "no"]


def one_layer(config: EncDecConfig) -> EncDecConfig:
    return replace(config, encoder=replace(config.encoder, num_layers=1), decoder=replace(config.decoder, num_layers=1))


TOWERS: dict[str, ViTConfig] = {
    "clip": NANO["clip"].vision,
    "siglip": NANO["siglip"].vision,
    "blip2": NANO["blip2"].vision,
    "dinov2": ViTConfig(**TOWER, layer_scale=1.0, mask_token=True, num_registers=2),
}
_LATENTS = ResamplerConfig(num_latents=4, num_layers=1, num_heads=2, head_dim=8)
JOINTS: dict[str, Any] = {
    "linear": Linear(),
    "mlp": MLP(),
    "pixel_shuffle": PixelShuffle(),
    "pooling": Pooling(stride=2),
    "qformer": QFormerConfig(num_queries=3, dim=16, num_layers=2, num_heads=2, hidden_dim=32),
    "resampler": _LATENTS,
    "gated": Gates(gated=GatedConfig(num_heads=2, head_dim=8, hidden_dim=32), resampler=_LATENTS),
}
_TEXT = replace(DECODER, num_layers=1)
_LEARNED = Learned(count=96, offset=2)
TEXTS: dict[str, Any] = {
    "llama": _TEXT,
    "opt": replace(_TEXT, mlp=Plain(hidden_dim=64, activation="relu"), norm=Layer(), tied=True, position=_LEARNED),
    "gemma": replace(_TEXT, norm=OffsetRMS(), tied=True, embed_scale=32**0.5, mlp=Gated(hidden_dim=64)),
    "t5": one_layer(NANO["t5"].backbone),
    "bart": replace(one_layer(NANO["bart"].backbone), position=_LEARNED),
}
UNFIT = {("gated", "gemma"): "scales embeddings", ("gated", "t5"): "both ways", ("gated", "bart"): "both ways"}


@pytest.fixture(scope="module")
def words() -> LanguageTokenizer:
    return LanguageTokenizer.train_bpe(WORDS * 20, 300)


@pytest.fixture(scope="module")
def texts(words: LanguageTokenizer) -> dict[str, System]:
    """Language models, each with a tokenizer that knows no clips."""
    out: dict[str, System] = {}
    for name, config in TEXTS.items():
        config = replace(config, vocab_size=words.vocab_size)
        if isinstance(config, DecoderConfig):
            model: Any = polymodal.build(LanguageModelConfig(family="llama", backbone=config))
            model.use_tokenizer(words)
        else:
            model = polymodal.build(T5Config(backbone=config, stop=words.eos_ids))
            model.tokenizer = words
        out[name] = model
    return out


@pytest.fixture(scope="module")
def picture() -> Image:
    return Image(PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)))


SHORT = Settings(max_new_tokens=2)


def test_the_matrix_is_whole() -> None:
    assert set(JOINTS) == set(CONNECTORS)


@pytest.mark.parametrize("joint", JOINTS)
def test_what_fits_is_built_trained_and_sampled(joint: str, texts: dict[str, System], picture: Image) -> None:
    question = Chat.of([picture, "what is it?"])
    torch.manual_seed(0)
    for tower, text in itertools.product(TOWERS, TEXTS):
        if (joint, text) in UNFIT:
            with pytest.raises(ConfigError, match=rf"{UNFIT[joint, text]}.*train again: interleave"):
                compose(vision=TOWERS[tower], connector=JOINTS[joint], backbone=texts[text])
            continue
        model = compose(vision=TOWERS[tower], connector=JOINTS[joint], backbone=texts[text])
        batch, losses = model.lesson([question.reply("a ring")]), []
        optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            losses.append(model.loss(batch).mean)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[1] < losses[0], (tower, joint, text)
        ask(model.eval(), question, SHORT)
        assert model.count(Sample.of(picture)) == (model.config.num_features if isinstance(model, Composed) else 1)


@pytest.mark.parametrize(("joint", "text"), [("pooling", "llama"), ("qformer", "t5"), ("gated", "opt")])
def test_what_is_saved_answers_the_same(
    joint: str, text: str, texts: dict[str, System], picture: Image, tmp_path: Path
) -> None:
    model = compose(vision=TOWERS["siglip"], connector=JOINTS[joint], backbone=texts[text])
    for parameter in model.parameters():  # fresh weights say the same to everything
        parameter.data.normal_(std=0.2)
    loaded = polymodal.load(model.save(tmp_path))
    question = [picture, "what is it?"]
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert ask(loaded, question, SHORT) == ask(model, question, SHORT)


def test_named_parts_bring_their_weights(texts: dict[str, System], picture: Image, tmp_path: Path) -> None:
    clip, llama = nano("clip").save(tmp_path / "clip"), texts["llama"].save(tmp_path / "llama")
    first = compose(vision=str(clip), connector="pixel_shuffle", backbone=llama)
    assert torch.equal(first.vision.patch_embed.weight, polymodal.load(clip).get_parameter("vision.patch_embed.weight"))
    assert torch.equal(first.backbone.embed_tokens.weight, texts["llama"].get_parameter("backbone.embed_tokens.weight"))
    assert first.images == polymodal.load(clip).images
    assert [stage.name for stage in stages(first)] == ["align", "instruct"]
    assert "align (connector.* at 0.0002)" in first.source
    whole = first.save(tmp_path / "whole")
    second = compose(vision=whole, connector=whole, backbone=whole)
    assert stages(second) == stages(polymodal.load(whole)) == stages(first), "nobody trained it"
    question = [picture, "what is it?"]
    assert ask(second, question, SHORT) == ask(first, question, SHORT)
    other = compose(vision=clip, connector=whole, backbone=whole)  # a connector behind another tower
    assert [stage.name for stage in stages(other)] == ["align", "instruct"]
    with pytest.raises(ConfigError, match=r"between parts of other widths.*train again: align"):
        compose(vision=ViTConfig(**TOWER | {"dim": 16, "num_heads": 2}), connector=whole, backbone=whole)


@pytest.mark.parametrize("name", ["llava", "llava_next", "paligemma"])
def test_a_connector_reads_its_tower_as_it_was_trained(name: str, picture: Image, tmp_path: Path) -> None:
    config = replace(NANO[name], layers=2, keep_class=name == "llava")
    source: Any = polymodal.build(config)
    for parameter in source.parameters():
        parameter.data.normal_(std=0.2)
    whole = source.save(tmp_path)
    model = compose(vision=whole, connector=whole, backbone=replace(DECODER, norm=OffsetRMS()))
    assert isinstance(model, Composed)
    media = model.see([model.picture(picture)])[1]
    torch.testing.assert_close(model.features(media), source.project(media["pixels"]).flatten(0, 1))
    assert [stage.name for stage in stages(model)] == ["pretrain backbone", "align", "instruct"]
    assert model.images.mean == (HALF if name == "paligemma" else CLIP_MEAN)


def test_fresh_towers_see_colours_of_their_kind() -> None:
    for connector in ("mlp", "gated"):
        models = {n: compose(vision=t, connector=JOINTS[connector], backbone=DECODER) for n, t in TOWERS.items()}
        means = {"clip": CLIP_MEAN, "siglip": HALF, "blip2": HALF, "dinov2": IMAGENET_MEAN}
        assert {name: model.images.mean for name, model in models.items()} == means


def test_stages_are_those_of_the_papers(texts: dict[str, System]) -> None:
    rates = {
        joint: [(s.name, s.rates) for s in stages(compose(vision=TOWERS["siglip"], connector=c, backbone=DECODER))][2:]
        for joint, c in JOINTS.items()
    }
    assert rates["mlp"] == [("align", {"connector.*": 1e-3}), ("instruct", {"connector.*": 2e-5, "backbone.*": 2e-5})]
    assert rates["qformer"][1] == ("instruct", {"connector.*": 1e-5})
    assert rates["gated"] == [("interleave", {"resampler.*": 1e-4, "gated_blocks.*": 1e-4, "new_*": 1e-4})]
    for stage in stages(compose(vision=TOWERS["clip"], connector="mlp", backbone=DECODER)):
        run = Stage(name=stage.name, steps=1, batch_size=1, source=dict, lr=stage.lr, trainable=stage.trainable)  # type: ignore[arg-type]
        assert max(run.trainable.values()) == 1
    with pytest.raises(ConfigError, match="Llava is no composition"):
        stages(nano("llava"))


def test_an_encoder_takes_no_room_from_the_answer(texts: dict[str, System], picture: Image) -> None:
    model = compose(vision=TOWERS["siglip"], connector=MLP(), backbone=texts["bart"])
    batch, rules, _ = request(model, [[picture, "what is it? it is a ring " * 4]], Settings(max_new_tokens=90))
    assert batch["ids"].shape[1] > 96 - 90
    assert rules[0].max_new_tokens == 90


def test_tools_are_not_left_out_in_silence(texts: dict[str, System], picture: Image) -> None:
    chat = Chat.of([picture, "what is it?"])
    for joint, text in (("mlp", "bart"), ("gated", "opt")):
        model = compose(vision=TOWERS["siglip"], connector=JOINTS[joint], backbone=texts[text])
        with pytest.raises(MediaError, match="knows no tools"):
            model.prompt([replace(chat, tools=({"name": "weather"},))])
        with pytest.raises(MediaError, match=r"knows no tools|no lesson"):
            model.lesson([chat.reply("", [ToolCall("weather", {})])])


def test_frames_of_a_clip_are_not_held(texts: dict[str, System], monkeypatch: pytest.MonkeyPatch) -> None:
    model = compose(vision=TOWERS["siglip"], connector=Pooling(frames=6), backbone=texts["llama"])
    events: list[str] = []

    def decoded(*arguments: Any) -> Any:
        for frame in decode(*arguments):
            events.append("decoded")
            yield frame

    seen = ImageProcessor.from_pil
    monkeypatch.setattr("polymodal.systems.composed.decode", decoded)
    monkeypatch.setattr(ImageProcessor, "from_pil", lambda self, frames: events.append("seen") or seen(self, frames))
    model.see([Video(np.zeros((7, 20, 24, 3), np.uint8), fps=2.0)])
    assert events == ["decoded", "seen"] * 6


def test_a_clip_is_pooled_over_time_and_space(texts: dict[str, System], picture: Image) -> None:
    clip = Video(np.random.default_rng(1).integers(0, 256, (7, 20, 24, 3), dtype=np.uint8), fps=2.0)
    for joint, tokens in ((Pooling(frames=6, steps=3), 12), (replace(_LATENTS, num_frames=6), 4)):
        model = compose(vision=TOWERS["siglip"], connector=joint, backbone=texts["llama"])
        assert isinstance(model, Composed)
        assert (model.count(Sample.of(clip)), model.count(Sample.of(picture))) == (tokens, 4)
        spelled, media = model.see([model.picture(picture), clip, model.picture(picture)])
        together = model.features(media)
        apart = [model.features(model.see([m])[1]) for m in (model.picture(picture), clip, model.picture(picture))]
        torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)
        assert len(together) == sum(map(len, spelled))
        ask(model, [picture, clip, "what is it?"], SHORT)
    x = torch.randn(1, 6, 16, 8)
    pooled = Pooling(frames=6, steps=3, layers=1).build(8, 8)
    pooled.proj = torch.nn.Identity()  # type: ignore[assignment]
    means = x.view(1, 3, 2, 2, 2, 2, 2, 8).mean((2, 4, 6)).flatten(1, 3)
    torch.testing.assert_close(pooled(x), means)


def test_pixel_shuffle_keeps_every_number() -> None:
    x = torch.arange(2.0 * 16 * 3).view(2, 16, 3)
    shuffle = PixelShuffle(norm=False).build(3, 8)
    shuffle.proj = torch.nn.Identity()  # type: ignore[assignment]
    square = x.view(2, 4, 4, 3)[:, 2:, :2].reshape(2, 12)  # the lower left one
    assert torch.equal(shuffle(x)[:, 2], square)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"connector": PixelShuffle(factor=3)}, r"4 x 4 features .* squares of 3 x 3: take a factor of 2 or 4"),
    ({"connector": PixelShuffle(), "keep_class": True}, "a class token has no place"),
    ({"connector": Pooling(), "keep_class": True}, "a class token has no place"),
    ({"vision": TOWERS["siglip"], "connector": MLP(), "keep_class": True}, "no class token to keep"),
    ({"connector": replace(JOINTS["qformer"], text=TextTables())}, "first stage"),
    ({"layers": 9}, "layer 9 of a tower of 2"),
    ({"backbone": replace(DECODER, context=16)}, "one medium becomes 16 tokens, and the backbone reads 16"),
    ({"backbone": replace(TEXTS["bart"], position=Learned(count=12))}, "and the backbone reads 12"),
    ({"backbone": replace(DECODER, position=Rope(sections=(2, 1, 1)))}, "M-RoPE"),
    ({"backbone": replace(DECODER, position=Rope(sections=(2, 1, 1))), "connector": "gated"}, "M-RoPE"),
    ({"connector": "gated", "keep_class": True}, "reads all patches"),
    ({"connector": Gates(every=3)}, "a gated block for each 3 of 2 layers"),
    ({"connector": Gates(resampler=ResamplerConfig(num_frames=4))}, "reads pictures"),
    ({"connector": "mpl"}, "Did you mean 'mlp'"),
    ({"vision": "language"}, "has no vision tower"),
    ({"vision": "qwen2_vl"}, "not one ViT over one square grid"),
    ({"vision": "siglip2"}, "not one ViT over one square grid"),
    ({"backbone": "clip"}, "no language model that writes"),
    ({"backbone": "bert"}, "no language model that writes"),
    ({"connector": "flamingo"}, "no connector that could be taken out"),
]


@pytest.mark.parametrize(("parts", "reason"), REFUSED)
def test_what_does_not_fit_is_refused(parts: dict[str, Any], reason: str) -> None:
    named = {key: nano(value) if isinstance(value, str) and value in NANO else value for key, value in parts.items()}
    whole: dict[str, Any] = {"vision": TOWERS["clip"], "backbone": DECODER} | named
    with pytest.raises(ConfigError, match=reason) as error:
        compose(**whole)
    assert reason.startswith(("Did", "has no", "no conn")) or "train" in str(error.value)
