"""MusicGen against transformers: outputs, loss, first gradients, greedy codes with guidance, files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.core.batch import IGNORE, Batch
from polymodal.nn.skeleton import skeleton
from polymodal.samplers.delayed import Drawing, delay, whole
from polymodal.systems.musicgen import PRESETS, MusicGen
from tests.parity.harness import _close, assert_same_files, compare_gradients, file_gradients, save_reference
from tests.weights.test_full_size import tensors, without_memory, written

transformers = pytest.importorskip("transformers")

SIZE, VOCAB = 32, 40
CODEC = {
    "num_filters": 4, "hidden_size": 12, "codebook_size": SIZE, "sampling_rate": 800, "upsampling_ratios": [4, 2],
    "use_causal_conv": False, "use_conv_shortcut": False,
}  # fmt: skip
PARITY = "parity: outputs, loss, first gradients, greedy codes with guidance, files both ways (transformers)"


def reference(folder: Path, *, channels: int = 1, dim: int = 24, attention: str = "eager") -> Any:
    books = 4
    text = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    # frames of a hundredth of a second, five bits a code
    codec = transformers.EncodecConfig(**CODEC, target_bandwidths=[books * 100 * 5 / 1000])
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=SIZE, hidden_size=dim, ffn_dim=40, num_hidden_layers=2, num_attention_heads=3 if dim == 24 else 2,
        num_codebooks=books * channels, audio_channels=channels, max_position_embeddings=64, pad_token_id=SIZE,
        bos_token_id=SIZE, decoder_start_token_id=SIZE, dropout=0.0,
    )  # fmt: skip
    config = transformers.MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=codec.to_dict(), decoder=decoder.to_dict()
    )
    torch.manual_seed(0)
    model = transformers.MusicgenForConditionalGeneration(config)
    model.set_attn_implementation({"": attention})
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(4)  # at the usual size the same code is the best one everywhere
        for name, buffer in model.audio_encoder.named_buffers():
            if name.endswith(("embed", "embed_avg")):
                buffer.normal_()
    return save_reference(model, folder)


def lesson(books: int, frames: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (3, 6), generator=generator)
    valid = torch.arange(6) < torch.tensor([[6], [2], [1]])
    codes = torch.randint(0, SIZE, (3, books, frames), generator=generator)
    codes[1, :, 6:] = IGNORE
    return Batch(ids=ids.masked_fill(~valid, 0), valid=valid, codes=codes)


def labels(system: MusicGen, batch: Batch) -> Tensor:
    """As transformers' recipe makes them: delayed, the special code where a book has none, book last."""
    steps = delay(batch["codes"], system.delays, SIZE)[..., : batch["codes"].shape[2]]
    return steps.transpose(1, 2)


@pytest.mark.proves("musicgen", PARITY)
@pytest.mark.parametrize(
    ("channels", "dim", "attention"), [(1, 24, "eager"), (2, 24, "sdpa"), (1, 16, "sdpa")], ids=str
)
def test_musicgen_learns_alike(tmp_path: Path, channels: int, dim: int, attention: str) -> None:
    model = reference(tmp_path, channels=channels, dim=dim, attention=attention)
    system = MusicGen.from_folder(tmp_path, "hf")
    batch = lesson(4 * channels)
    model.freeze_text_encoder()
    model.freeze_audio_encoder()
    result = model(input_ids=batch["ids"], attention_mask=batch["valid"].long(), labels=labels(system, batch))
    _close("output", system(batch).flatten(0, 1), result.logits, 1e-5)
    loss = system.loss(batch).mean
    _close("loss", loss, result.loss, 1e-5)
    loss.backward()
    result.loss.backward()
    gradients = file_gradients(model, tmp_path / "grad")
    books = {name: torch.zeros_like(t) for name, t in gradients.items() if ".codebook." in name}  # buffers
    compare_gradients(system, gradients | books)


@pytest.mark.proves("musicgen", PARITY)
@pytest.mark.parametrize(("channels", "guidance"), [(1, 3.0), (2, 3.0), (1, 1.0)])
def test_greedy_codes_and_their_sound(tmp_path: Path, channels: int, guidance: float) -> None:
    model = reference(tmp_path, channels=channels)
    system, frames = MusicGen.from_folder(tmp_path, "hf"), 10
    batch = lesson(4 * channels)
    asked = Batch(ids=batch["ids"], valid=batch["valid"])
    codes = torch.stack(whole(system, asked, Drawing(frames=frames, temperature=0.0, guidance=guidance)))
    assert len(codes.unique()) > 4, "not one code for ever"
    model.generation_config.pad_token_id = model.generation_config.decoder_start_token_id = SIZE
    heard: list[Tensor] = []
    decode = model.audio_encoder.decode
    model.audio_encoder.decode = lambda codes, **more: heard.append(codes[0]) or decode(codes, **more)
    sound = model.generate(
        input_ids=asked["ids"], attention_mask=asked["valid"].long(), do_sample=False, guidance_scale=guidance,
        max_new_tokens=frames + 3,
    )  # fmt: skip
    expected = torch.stack(heard, 2).flatten(1, 2)  # left and right are decoded one after the other
    assert torch.equal(codes, expected)
    _close("sound", system.reconstruct(codes), sound, 1e-5)


@pytest.mark.proves("musicgen", PARITY)
@pytest.mark.parametrize("channels", [1, 2])
def test_codes_of_a_sound(tmp_path: Path, channels: int) -> None:
    model = reference(tmp_path, channels=channels)
    system = MusicGen.from_folder(tmp_path, "hf")
    wave = 0.3 * torch.randn(2, channels, 96, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([model.audio_encoder.encode(one[:, None])[0][0] for one in wave.unbind(1)], 2).flatten(1, 2)
    assert torch.equal(system.quantize(wave), expected)


@pytest.mark.proves("musicgen", PARITY)
def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    model = reference(tmp_path)
    system = MusicGen.from_folder(tmp_path, "hf")
    twin = assert_same_files(system, model, tmp_path, tmp_path / "again")
    batch = lesson(4)
    result = twin(input_ids=batch["ids"], attention_mask=batch["valid"].long(), labels=labels(system, batch))
    _close("output", system(batch).flatten(0, 1), result.logits, 1e-5)


@pytest.mark.proves("musicgen", "weights: every tensor of the full-size checkpoints, of one and of two channels")
@pytest.mark.parametrize(
    ("name", "count"), [("facebook/musicgen-small", 586_884_674), ("facebook/musicgen-stereo-small", 603_665_986)]
)
def test_full_size(name: str, count: int) -> None:
    channels = 2 if "stereo" in name else 1
    decoder = {"audio_channels": channels, "num_codebooks": 4 * channels, "activation_dropout": 0.0}
    codec = {
        "model_type": "encodec", "sampling_rate": 32000, "codebook_size": 2048, "target_bandwidths": [2.2],
        "num_filters": 64, "upsampling_ratios": [8, 5, 4, 4], "use_causal_conv": False, "use_conv_shortcut": False,
        "chunk_length_s": None, "overlap": None, "codebook_dim": 128,
    }  # fmt: skip
    t5 = {
        "model_type": "t5", "d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "n_positions": 512,
        "output_past": True, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    fields = {"text_encoder": t5, "audio_encoder": codec, "decoder": decoder}
    model = without_memory(transformers.MusicgenForConditionalGeneration, fields)
    fmt = MusicGen.formats["hf"]
    config, _ = fmt.read(written({"model_type": "musicgen", **fields}))
    assert config == fmt.read(written(model.config.to_dict()))[0] == PRESETS[name]()
    with skeleton():
        ours = MusicGen(config)
    todo = ours.plan(fmt, tensors(model))
    assert todo.problems == []
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in model.parameters()) == count
    assert {n: t.shape for n, t in ours.to_hub(ours.state_dict()).items()} == {
        n: t.shape for n, t in tensors(model).items()
    }
