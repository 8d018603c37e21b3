"""In the style of Parti: each published fact, guidance, pictures by seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image as PILImage

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.verbs import Counts, Draws
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.samplers.modes import Wordless
from polymodal.systems.parti import PRESETS, Parti
from polymodal.tokenizers.language import LanguageTokenizer
from tests.nano import NANO, nano, nano_batch
from tests.talking import WORDS


@pytest.fixture(scope="module")
def model() -> Parti:
    tokenizer = LanguageTokenizer.train_bpe(WORDS * 20, 300)
    torch.manual_seed(0)
    model = polymodal.build(replace(NANO["parti"], text_vocab_size=tokenizer.vocab_size))
    assert isinstance(model, Parti)
    model.tokenizer = tokenizer
    for part in (model.text, model.backbone):
        for parameter in part.parameters():
            parameter.data.normal_(std=0.3)
    return model.eval()


@pytest.mark.proves("parti", "sizes: 350M, 750M, 3B and 20B parameters in two stacks, 1,024 codes of 8,192, 128 tokens")
@pytest.mark.parametrize(("name", "millions"), [("350m", 350), ("750m", 750), ("3b", 3000), ("20b", 20_000)])
def test_published_sizes(name: str, millions: int) -> None:
    with skeleton():
        model = Parti(PRESETS[f"parti-{name}"]())
    stacks = (model.text.encoder.blocks, model.backbone.decoder.blocks)
    assert sum(p.numel() for s in stacks for p in s.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
    c = model.config
    assert (c.vision.num_codes, c.vision.codes.size, c.text_context) == (1024, 8192, 128)


@pytest.mark.proves("parti", "training: cross-entropy of every code given the text and the codes before it, by hand")
def test_loss_by_hand() -> None:
    model = nano("parti").eval()
    batch = nano_batch(model, 3)
    scores, codes = model(batch), batch["codes"]
    assert scores.shape == (3, 16, 32)
    by_hand = (scores.logsumexp(-1) - scores.gather(-1, codes[..., None])[..., 0]).mean()
    torch.testing.assert_close(model.loss(batch).mean, by_hand)
    later = Batch(batch, codes=torch.cat([codes[:, :9], (codes[:, 9:] + 1) % 32], 1))
    torch.testing.assert_close(model(later)[:, :10], scores[:, :10], rtol=0, atol=1e-5)
    assert (model(later)[:, 10:] - scores[:, 10:]).abs().max() > 1e-5


@pytest.mark.proves("parti", "training: a tenth of the texts is dropped: nothing of them is left")
def test_a_tenth_of_the_texts_is_dropped() -> None:
    model = nano("parti").train()
    assert isinstance(model, Parti)
    torch.manual_seed(0)
    for parameter in (*model.text.parameters(), *model.backbone.parameters()):
        parameter.data.normal_(std=0.3)
    batch = nano_batch(model, 4)
    batch["chance"] = torch.tensor([0, 9, 10, 99])
    other = Batch(batch, ids=(batch["ids"] + 1) % 40)
    moved = (model(batch) - model(other)).abs().amax((1, 2))
    assert (moved[:2] == 0).all()
    assert (moved[2:] > 1e-3).all()
    nothing = model.prompt([""]).to("cpu")
    model.eval()
    empty = Batch({name: nothing[name].expand(4, -1) for name in ("ids", "valid")}, codes=batch["codes"])
    torch.testing.assert_close(model.train()(batch)[:2], model.eval()(empty)[:2], rtol=0, atol=1e-5)
    del batch["chance"]
    model.train()
    torch.manual_seed(0)
    many = Batch({name: tensor[:1].expand(400, *tensor.shape[1:]) for name, tensor in batch.items()})
    scores = model(many)
    kept = scores[0] if (scores[0] - scores[1]).abs().max() == 0 else scores[2]
    dropped = float(((scores - kept).abs().amax((1, 2)) > 1e-4).float().mean())
    assert min(dropped, 1 - dropped) == pytest.approx(0.1, abs=0.05)


@pytest.mark.proves("parti", "guidance: scores without the text plus so many times what it changes, by hand")
def test_guidance(model: Parti) -> None:
    asked, nothing = model.asked(["a red cup", "no"]), model.asked(["", ""])
    settings = Settings(max_new_tokens=16, guidance=4.0)
    answers = complete(model.writer, asked, settings, Wordless(), against=nothing)
    codes = torch.tensor([answer.ids for answer in answers])
    with torch.no_grad():
        with_text, without = (model(Batch(batch, codes=codes)).log_softmax(-1) for batch in (asked, nothing))
    guided = without + 4 * (with_text - without)
    assert torch.equal(guided.argmax(-1), codes), "greedy, each code from those before it"
    plain = complete(model.writer, asked, Settings(max_new_tokens=16), Wordless())
    assert torch.tensor([answer.ids for answer in plain]).ne(codes).any()


@pytest.mark.proves("parti", "draw: a seed gives the same picture alone and in a batch")
def test_draw(model: Parti) -> None:
    assert all(isinstance(model, verb) for verb in (Draws, Counts))
    both = model.draw(["a red cup", "no"], Drawing(seed=3))
    assert both.shape == (2, 3, 8, 8)
    assert torch.equal(model.draw(["no"], Drawing(seed=4))[0], both[1])
    assert not torch.equal(model.draw(["a red cup"], Drawing(seed=4))[0], both[1])
    settled = model.settled(Drawing())
    assert (settled.size, settled.guidance, settled.steps) == ((8, 8), 3.0, 16)
    assert torch.equal(model.draw(["no"], replace(settled, seed=4))[0], both[1])
    assert settled.seed is not None


def test_what_cannot_be_is_refused(model: Parti) -> None:
    with pytest.raises(UnsupportedError, match="of texts alone"):
        polymodal.draw(model, "a red cup", control=PILImage.new("RGB", (8, 8)))
    with pytest.raises(ConfigError, match=r"a negative prompt: .* at a guidance of 1 there is none"):
        polymodal.draw(model, "a red cup", Drawing(guidance=1, negative="blue"))
    with pytest.raises(MediaError, match="reads at most 12"):
        model.asked(["a red cup and a blue plate " * 9])
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        nano("parti").prompt(["a cup"])  # type: ignore[operator]
    config = NANO["parti"]
    for wrong in ({"vocab_size": 40}, {"start_id": 3}, {"tied": True}):
        with pytest.raises(ConfigError, match="codes and a start"):
            replace(config, backbone=replace(config.backbone, **wrong))
    with pytest.raises(ConfigError, match="learned position"):
        replace(config, vision=replace(config.vision, resolution=16))
