"""EnCodec and DAC against transformers: codes, waveforms, penalties, first gradients, files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.systems.dac import DAC
from polymodal.systems.encodec import EnCodec
from tests.parity.harness import assert_same_files, compare_gradients, file_gradients, save_reference

transformers = pytest.importorskip("transformers")

ENCODEC: dict[str, Any] = {
    "sampling_rate": 600, "target_bandwidths": [0.3, 0.6, 1.2], "hidden_size": 8, "num_filters": 4,
    "upsampling_ratios": [4, 3], "num_lstm_layers": 2, "codebook_size": 16,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "24khz": {"num_residual_layers": 2},
    "48khz": {
        "audio_channels": 2, "use_causal_conv": False, "norm_type": "time_group_norm", "normalize": True,
        "chunk_length_s": 0.5, "overlap": 0.05,
    },
    "32khz": {"use_causal_conv": False, "use_conv_shortcut": False, "target_bandwidths": [1.0]},
    "trimmed on both sides": {"trim_right_ratio": 0.4, "pad_mode": "constant"},
}  # fmt: skip
DAC_FIELDS: dict[str, Any] = {
    "encoder_hidden_size": 4, "decoder_hidden_size": 32, "downsampling_ratios": [2, 3, 4], "n_codebooks": 3,
    "codebook_size": 16, "codebook_dim": 4, "sampling_rate": 1200,
}  # fmt: skip


def encodec_reference(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig(**ENCODEC | KINDS[kind]))
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
        layer.codebook.embed_avg.normal_()
        layer.codebook.cluster_size.uniform_(1, 9)
    return save_reference(model, folder)


@pytest.fixture(
    params=[pytest.param(k, marks=pytest.mark.proves("encodec", "parity: codes (transformers)")) for k in KINDS]
)
def encodec(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[EnCodec, Any, Path]:
    reference = encodec_reference(tmp_path, request.param)
    system = polymodal.load(tmp_path)
    assert isinstance(system, EnCodec)
    return system, reference, tmp_path


def wave(system: EnCodec | DAC, samples: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, system.channels, samples, generator=torch.Generator().manual_seed(samples)) * 0.3


@pytest.mark.parametrize("samples", [1, 143, 301, 700])
def test_encodec_codes_and_waveforms(encodec: tuple[EnCodec, Any, Path], samples: int) -> None:
    system, reference, _ = encodec
    sound = wave(system, samples)
    for bandwidth in system.config.bandwidths:
        theirs = reference.encode(sound, bandwidth=bandwidth)
        chunks = system.encode_chunks(sound, system.config.codebooks_at(bandwidth))
        assert len(chunks) == len(theirs.audio_codes)
        for mine, codes, scale in zip(chunks, theirs.audio_codes, theirs.audio_scales, strict=True):
            assert torch.equal(mine.codes, codes[..., : mine.codes.shape[2]])
            if mine.scale is None:
                assert scale is None
            else:
                torch.testing.assert_close(mine.scale[:, 0], scale, rtol=1e-5, atol=0)
        lost = theirs.audio_codes.shape[-1] - chunks[-1].codes.shape[2]
        expected = reference.decode(theirs.audio_codes, theirs.audio_scales, last_frame_pad_length=lost).audio_values
        torch.testing.assert_close(system.decode_chunks(chunks), expected, rtol=0, atol=1e-5)
    if system.config.chunk is None:
        codes = system.quantize(sound)
        assert codes.shape == (2, system.num_codebooks, system.frames(samples))
        assert system.reconstruct(codes).shape[2] == system.frames(samples) * system.hop
    else:
        with pytest.raises(UnsupportedError, match="encode_chunks"):
            system.quantize(sound)


def test_encodec_gradients(encodec: tuple[EnCodec, Any, Path]) -> None:
    """Transformers' codes stop the gradient: decoder and encoder are compared each on its own."""
    system, reference, folder = encodec
    sound = wave(system, 300)
    ours, theirs = system(Batch(wave=sound)), reference(sound).audio_values
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    mine, other = system.codec.encoder(sound), reference.encoder(sound)
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    direction, inner = torch.randn_like(theirs), torch.randn_like(other)
    for out, latents in ((ours, mine), (theirs, other)):
        ((out * direction).mean() + (latents * inner).mean()).backward()
    gradients = file_gradients(reference, folder / "grad")  # with the values of buffers
    compare_gradients(
        system, {n: torch.zeros_like(t) if n.startswith("quantizer") else t for n, t in gradients.items()}
    )


def test_encodec_files_both_ways(encodec: tuple[EnCodec, Any, Path]) -> None:
    system, reference, folder = encodec
    again = assert_same_files(system, reference, folder, folder / "again")
    sound = wave(system, 100)
    assert torch.equal(again(sound).audio_codes, reference(sound).audio_codes)


@pytest.mark.proves("encodec", "weights: published names of weight normalisation")
def test_encodec_reads_the_names_of_published_files(tmp_path: Path) -> None:
    encodec_reference(tmp_path, "24khz")
    system = polymodal.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): t
        for name, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    old = polymodal.load(tmp_path)
    assert all(torch.equal(t, old.state_dict()[name]) for name, t in system.state_dict().items())


def test_a_codec_stays_in_fp32(tmp_path: Path) -> None:
    encodec_reference(tmp_path, "24khz")
    assert {t.dtype for t in polymodal.load(tmp_path, precision="auto").state_dict().values()} == {torch.float32}
    with pytest.raises(UnsupportedError, match="fp32 only"):
        polymodal.load(tmp_path, precision="bf16")


@pytest.mark.parametrize(
    "changes", [{"codebook_dim": 4}, {"overlap": 0.5}, {"target_bandwidths": [0.01]}, {"compress": 3}]
)
def test_an_impossible_config_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    encodec_reference(tmp_path, "24khz")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError):
        polymodal.load(tmp_path)


@pytest.fixture
def dac(tmp_path: Path) -> tuple[DAC, Any, Path]:
    torch.manual_seed(0)
    reference = save_reference(transformers.DacModel(transformers.DacConfig(**DAC_FIELDS)), tmp_path, scale=0.1)
    system = polymodal.load(tmp_path)
    assert isinstance(system, DAC)
    return system, reference, tmp_path


@pytest.mark.proves("dac", "parity: codes, waveforms, penalty, first gradients (transformers)")
@pytest.mark.parametrize("samples", [24, 480, 1200])
@pytest.mark.parametrize("codebooks", [None, 1])
def test_dac_matches_transformers(dac: tuple[DAC, Any, Path], samples: int, codebooks: int | None) -> None:
    system, reference, folder = dac
    sound = wave(system, samples)
    expected = reference(sound, n_quantizers=codebooks)
    assert torch.equal(system.quantize(sound, codebooks), expected.audio_codes)
    made = reference.decode(audio_codes=expected.audio_codes).audio_values
    torch.testing.assert_close(system.reconstruct(expected.audio_codes)[:, 0], made, rtol=0, atol=1e-5)
    if codebooks is not None:
        return
    out, quantised = system.autoencode(sound)
    theirs = expected.audio_values
    torch.testing.assert_close(out[:, 0, : theirs.shape[1]], theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(quantised.penalty, expected.loss.mean(), rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(theirs)
    ((out[:, 0, : theirs.shape[1]] * direction).mean() + quantised.penalty).backward()
    ((theirs * direction).mean() + expected.loss.mean()).backward()
    compare_gradients(system, file_gradients(reference, folder / "grad"))


@pytest.mark.proves("dac", "parity: files both ways (transformers)")
def test_dac_files_both_ways(dac: tuple[DAC, Any, Path]) -> None:
    system, reference, folder = dac
    again = assert_same_files(system, reference, folder, folder / "again")
    sound = wave(system, 48)
    assert torch.equal(again(sound).audio_codes, reference(sound).audio_codes)


@pytest.mark.parametrize("samples", [1, 23, 25, 1199])
def test_dac_fills_its_last_frame_with_silence(dac: tuple[DAC, Any, Path], samples: int) -> None:
    system, reference, _ = dac
    sound = wave(system, samples)
    padded = torch.nn.functional.pad(sound, (0, -samples % 24))
    codes = system.quantize(sound)
    assert torch.equal(codes, reference.encode(padded).audio_codes)
    assert codes.shape[2] == system.frames(samples)
