"""VALL-E by its published facts: no implementation to compare with, so small ones are written out here."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.cli import main
from polymodal.core.batch import IGNORE, Batch, padded
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Audio
from polymodal.core.sounding import Sounding, Voice
from polymodal.core.verbs import Sounds
from polymodal.encoders.seanet import SEANetConfig
from polymodal.modalities.audio import decode
from polymodal.modalities.watermark import detect_watermark
from polymodal.samplers.delayed import Drawing
from polymodal.systems.seanet_codec import EnCodecConfig
from polymodal.systems.valle import VALLE
from polymodal.tokenizers.phonemes import ENGLISH, PAUSE, phonemes
from tests.nano import NANO, nano, shaken

SIZE, BOOKS = 32, 4
FACTS = "the paper: both models, their losses and how they write, against small re-computations"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


def model() -> VALLE:
    made = shaken(nano("valle"), 0.3).eval()
    assert isinstance(made, VALLE)
    return made


def lesson(texts: tuple[int, ...] = (5, 2, 3), frames: tuple[int, ...] = (9, 4, 7)) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = [[*torch.randint(0, 7, (n,), generator=generator).tolist(), 7] for n in texts]
    codes = torch.randint(0, SIZE, (len(frames), BOOKS, max(frames)), generator=generator)
    behind = torch.arange(max(frames)) >= torch.tensor(frames)[:, None, None]
    valid = padded([[True] * len(row) for row in ids], fill=False)
    return Batch(ids=padded(ids), valid=valid, codes=codes.masked_fill(behind, IGNORE))


# ---- the two models again, row by row, in plain products


def waves(places: int, dim: int) -> Tensor:
    rates = [10_000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
    table = [[math.cos(p * r) for r in rates] + [math.sin(p * r) for r in rates] for p in range(places)]
    return torch.tensor(table).reshape(places, dim)


def attention(attn: Any, x: Tensor, heads: int, *, causal: bool) -> Tensor:
    q, k, v = (layer(x).view(len(x), heads, -1) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full((len(x), len(x)), -1e30).triu(1)
    return attn.o_proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))


def first_scores(model: VALLE, ids: Tensor, codes: Tensor) -> Tensor:
    """Of what follows each phoneme and each code of book 1."""
    text, said = model.first_text.weight[ids], model.first_codes.weight[codes]
    x = torch.cat([text + waves(len(text), text.shape[1]), said + waves(len(said), text.shape[1])])
    for block in model.first.blocks:
        x = x + attention(block.attn, block.attn_norm(x), 3, causal=True)
        x = x + block.mlp.down_proj(torch.nn.functional.gelu(block.mlp.up_proj(block.mlp_norm(x))))
    return model.first.norm(x) @ model.first_codes.weight.T


def level_scores(model: VALLE, ids: Tensor, prompt: Tensor, codes: Tensor) -> Tensor:
    """Of the book above ``codes``, from phonemes, the whole prompt and the books below."""
    level, tables = len(codes), [table.weight for table in model.rest_codes]
    told = model.rest.levels.weight[level - 1]

    def norm(layer: Any, x: Tensor) -> Tensor:
        a, b = (layer.modulation.weight @ told + layer.modulation.bias).chunk(2)
        centred = x - x.mean(1, keepdim=True)
        return a * centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() + b

    parts = [model.rest_text.weight[ids]]
    parts.append(sum(tables[b][prompt[b]] for b in range(len(tables))))  # type: ignore[arg-type]
    parts.append(sum(tables[b][codes[b]] for b in range(level)))  # type: ignore[arg-type]
    x = torch.cat([part + waves(len(part), part.shape[1]) for part in parts])
    for block in model.rest.blocks:
        x = x + attention(block.attn, norm(block.attn_norm, x), 4, causal=False)
        x = x + block.mlp.down_proj(torch.relu(block.mlp.up_proj(norm(block.mlp_norm, x))))
    return norm(model.rest.norm, x)[-codes.shape[1] :] @ tables[level].T


def rows(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Phonemes and codes of each row, without padding."""
    return [
        (ids[valid], codes[:, codes[0] >= 0])
        for ids, valid, codes in zip(batch["ids"], batch["valid"], batch["codes"], strict=True)
    ]


@pytest.mark.proves("valle", FACTS)
def test_the_first_model_and_its_loss() -> None:
    made, batch, chances = model(), lesson(), []
    scores = made(batch)
    for row, (ids, codes) in enumerate(rows(batch)):
        expected = first_scores(made, ids, codes[0])
        torch.testing.assert_close(scores[row, : len(expected)], expected, atol=1e-4, rtol=1e-4)
        said = torch.cat([codes[0], torch.tensor([SIZE])])  # the end behind the last code
        chances += (-expected[len(ids) - 1 :].log_softmax(1)[range(len(said)), said]).tolist()
    loss = made.loss(batch).metrics["first"].item()
    assert loss == pytest.approx(sum(chances) / len(chances), rel=1e-4)


@pytest.mark.proves("valle", FACTS)
def test_the_other_model_and_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = model(), lesson()
    calls: list[tuple[Tensor, Tensor]] = []
    real = made.level_scores

    def spied(given: Batch, prompt: Tensor, codes: Tensor) -> Tensor:
        calls.append((prompt, codes))
        return real(given, prompt, codes)

    monkeypatch.setattr(made, "level_scores", spied)
    length, levels, starts = round(0.05 * 100), [], set()  # a twentieth of a second at 100 frames a second
    length = min(length, batch["codes"].shape[2] // 2)
    for _ in range(40):
        loss = made.loss(batch).metrics["rest"].item()
        prompt, lower = calls[-1]
        level = lower.shape[1]
        levels.append(level)
        start = next(s for s in range(9 - length + 1) if torch.equal(batch["codes"][..., s : s + length], prompt))
        starts.add(start)
        chances = []
        for row, (ids, codes) in enumerate(rows(batch)):
            shown = prompt[row][:, prompt[row, 0] >= 0]
            expected = level_scores(made, ids, shown, codes[:level])
            got = real(batch, prompt, lower)[row, : codes.shape[1]]
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            kept = [t for t in range(codes.shape[1]) if not start <= t < start + length]
            chances += (-expected.log_softmax(1)[kept, codes[level, kept]]).tolist()
        assert loss == pytest.approx(sum(chances) / len(chances), rel=1e-4)
        if set(levels) == {1, 2, 3} and len(starts) > 1:
            return
    pytest.fail("every level and several places of the prompt are drawn")


@pytest.mark.proves("valle", FACTS)
def test_who_sees_what() -> None:
    made, batch = model(), lesson((4,), (8,))
    changed = Batch(batch, codes=batch["codes"].clone())
    changed["codes"][..., -1] = (batch["codes"][..., -1] + 1) % SIZE
    torch.testing.assert_close(made(batch)[:, :-1], made(changed)[:, :-1])
    prompt = batch["codes"][..., :3]
    before, after = (made.level_scores(batch, prompt, each["codes"][:, :2]) for each in (batch, changed))
    assert not torch.allclose(before[:, 0], after[:, 0], atol=1e-4), "the first frame sees the last one"
    first = {id(p) for part in (made.first, made.first_text, made.first_codes) for p in part.parameters()}
    rest = {id(p) for part in (made.rest, made.rest_text, made.rest_codes) for p in part.parameters()}
    assert not first & rest, "no shared weight"


@pytest.mark.proves("valle", FACTS)
def test_writing_is_drawn_first_and_then_the_best_level_by_level() -> None:
    """Rows with and without much to read, alone and together; every code against a model that keeps no cache."""
    made, batch = model(), lesson()
    asked = Batch(ids=batch["ids"], valid=batch["valid"], prompt=batch["codes"])
    ways = [Drawing(frames=6, temperature=0.0), Drawing(frames=9, seed=1), Drawing(frames=4, seed=2, top_k=5)]
    together = made.write(asked, ways)
    for row, (ids, prompt) in enumerate(rows(batch)):
        codes = together[row]
        (alone,) = made.write(asked.take([row]), ways[row])
        assert torch.equal(alone, codes)
        assert codes.shape == (BOOKS, codes.shape[1])
        assert int(codes.max()) < SIZE
        scores = first_scores(made, ids, torch.cat([prompt[0], codes[0]]))[len(ids) + prompt.shape[1] - 1 :]
        if row == 0:
            scores[0, SIZE] = -torch.inf  # a sound has a frame
            assert scores.argmax(1)[:-1].tolist() == codes[0].tolist()
        for level in range(1, BOOKS):
            assert torch.equal(level_scores(made, ids, prompt, codes[:level]).argmax(1), codes[level])


# ---- phonemes and sound


@needs_espeak
def test_phonemes() -> None:
    assert phonemes("Hello, world!") == ["h", "ə", "l", "oʊ", PAUSE, "w", "ɜː", "l", "d"]
    assert phonemes("-v") == phonemes("V"), "text is never an option"
    assert set(phonemes("The quick brown fox jumps over the lazy dog; a judge sang of pleasure.")) <= set(ENGLISH)
    with pytest.raises(MediaError, match="can be said"):
        phonemes("  ")
    with pytest.raises(UnsupportedError, match="no voice"):
        phonemes("hello", voice="nobody")


def speaker() -> VALLE:
    """Of random weights, at a rate that a watermark survives."""
    torch.manual_seed(0)
    seanet = SEANetConfig(dim=8, filters=4, ratios=(8, 5, 4), num_lstm_layers=1)
    codec = EnCodecConfig(sample_rate=8000, bandwidths=(1.0,), codebook_size=SIZE, seanet=seanet)
    made = VALLE.build(replace(NANO["valle"], symbols=ENGLISH, codec=codec)).eval()
    with torch.no_grad():
        for book in made.codec.quantizer.books:
            book.entries.normal_()
    return made


@needs_espeak
@pytest.mark.proves("valle", "sound: sentence by sentence, by a voice; the same seed says the same")
def test_speech() -> None:
    made, sounding = speaker(), Sounding(seconds=1.2, seed=0)
    assert isinstance(made, Sounds)
    stream = made.sound("Good day. How are you?", sounding)
    blocks = list(stream)
    assert 1 <= len(blocks) <= 2
    assert sum(block.shape[1] for block in blocks) <= 1.2 * 8000
    assert all(torch.equal(a, b) for a, b in zip(blocks, made.sound("Good day. How are you?", sounding), strict=True))
    voice = Voice(Audio((0.1 * torch.randn(1, 4000)).numpy(), rate=8000), "hello")
    other = next(iter(made.sound("Good day.", sounding, voice=voice)))
    assert other.shape != blocks[0].shape or not torch.equal(other, blocks[0]), "the voice is heard"
    alone = next(iter(made.sound("Good day.", sounding)))
    assert torch.equal(alone, next(iter(made.sound("... Good day. !", sounding)))), "what cannot be said is left out"
    with pytest.raises(UnsupportedError, match="guide"):
        made.sound("Good day.", Sounding(guidance=3.0))
    with pytest.raises(MediaError, match="not trained on the phonemes"):
        list(nano("valle").sound("Good day.", sounding))  # type: ignore[operator]


@needs_espeak
def test_speak_writes_a_file_with_a_watermark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = speaker().save(tmp_path / "model"), tmp_path / "hello.wav"
    assert main(["speak", "Good day to you.", "--model", str(folder), "--out", str(out), "--seed", "3"]) == 0
    assert "hello.wav: " in capsys.readouterr().out
    wave = decode(Audio(out), 8000)
    assert wave.shape[1] < 8000 or detect_watermark(wave, 8000).marked
