"""Codecs as systems: the verb, counts at odd lengths, bandwidths, bad sound, pieces that fade, training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import write_json
from polymodal.core.sample import Audio, Sample
from polymodal.core.verbs import Codes, Counts
from polymodal.encoders.seanet import SEANetConfig
from polymodal.heads.codec import DiscriminatorConfig, MultiScaleSpectrum
from polymodal.systems.codec import Adversarial, Codec
from polymodal.systems.dac import DAC
from polymodal.systems.encodec import EnCodec
from polymodal.systems.seanet_codec import EnCodecConfig, overlap_add
from polymodal.train import Constant, Run, Stage, fit
from polymodal.train.log import read_curve
from tests.nano import NANO, nano, nano_batch
from tests.unit.toy_run import HEADER

CODECS = [
    pytest.param(name, marks=pytest.mark.proves(name, "codes: count at odd lengths, shapes, the lower bit rates"))
    for name in ("encodec", "dac")
]


@pytest.mark.parametrize(("name", "kind"), [("encodec", "EncodecFeatureExtractor"), ("dac", "DacFeatureExtractor")])
def test_folders_of_the_hub_hold_a_preprocessor_of_sound(name: str, kind: str, tmp_path: Path) -> None:
    nano(name).save(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", {"feature_extractor_type": kind, "sampling_rate": 24_000})
    assert polymodal.load(tmp_path).fingerprint == nano(name).fingerprint


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 641])
@pytest.mark.parametrize("name", CODECS)
def test_the_count_is_what_comes_out(name: str, samples: int) -> None:
    model = nano(name).eval()
    assert isinstance(model, EnCodec | DAC)
    assert issubclass(type(model), Codec)
    assert all(isinstance(model, verb) for verb in (Codes, Counts))
    wave = torch.randn(1, 1, samples) * 0.1
    codes = model.quantize(wave)
    assert codes.shape == (1, model.num_codebooks, model.frames(samples))
    assert 0 <= int(codes.min()) <= int(codes.max()) < model.codebook_size
    assert model.frame_rate == model.sample_rate / 8
    sample = Sample.of([Audio(wave[0, 0].numpy(), rate=model.sample_rate)])
    assert model.count(sample) == codes.numel()
    assert model.reconstruct(codes).shape == (1, 1, 8 * model.frames(samples))
    assert torch.equal(model.quantize(wave, 2), codes[:, :2]), "the first codebooks are the lower bit rate"


def test_another_rate_is_counted_after_resampling() -> None:
    model = nano("encodec").eval()
    assert isinstance(model, EnCodec)
    sample = Sample.of([Audio(np.zeros(4001, np.float32), rate=2400), Audio(np.zeros(17, np.float32), rate=600)])
    assert model.count(sample) == model.num_codebooks * (model.frames(1001) + model.frames(17))


@pytest.mark.parametrize("name", ["encodec", "dac"])
@pytest.mark.parametrize("shape", [(1, 2, 64), (1, 1, 0)])
def test_other_channels_and_no_samples_are_refused(name: str, shape: tuple[int, ...]) -> None:
    model = nano(name).eval()
    assert isinstance(model, EnCodec | DAC)
    with pytest.raises(MediaError, match="reads waveforms of 1 channel"):
        model.quantize(torch.zeros(shape))


@pytest.mark.parametrize(
    ("bandwidth", "codebooks"), [(1.5, 2), (3.0, 4), (6.0, 8), (12.0, 16), (24.0, 32), (0.1, 1), (99.0, 32)]
)
@pytest.mark.proves("encodec", "24 kHz: 75 frames a second, 2 to 32 codebooks by bandwidth")
def test_published_bandwidths(bandwidth: float, codebooks: int) -> None:
    config = EnCodecConfig()
    assert config.sample_rate / config.seanet.hop == 75
    assert config.codebooks_at(bandwidth) == codebooks


def test_what_cannot_be_is_refused() -> None:
    codecs: list[dict[str, Any]] = [{"bandwidths": (6.0, 3.0)}, {"chunk_seconds": 1.0}, {"bandwidths": ()}]
    for wrong in codecs:
        with pytest.raises(ConfigError):
            EnCodecConfig(**wrong)
    stacks: list[dict[str, Any]] = [{"channels": 3}, {"ratios": (4, 0)}, {"causal": False, "trim_right": 0.5}]
    for wrong in stacks:
        with pytest.raises(ConfigError):
            SEANetConfig(**wrong)


@pytest.mark.proves("encodec", "48 kHz: loudness kept beside the codes, pieces faded into each other")
def test_pieces_and_loudness() -> None:
    whole = torch.randn(2, 1, 100)
    pieces = [whole[..., start : start + 40] for start in range(0, 100, 30)]
    torch.testing.assert_close(overlap_add(pieces, 30), whole, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    seanet = SEANetConfig(dim=8, filters=4, ratios=(4, 2), num_lstm_layers=1, channels=2, causal=False, norm="group")
    model = polymodal.build(
        EnCodecConfig(
            sample_rate=600, bandwidths=(1.2,), seanet=seanet, codebook_size=16, normalize=True, chunk_seconds=0.5,
            overlap=0.1,
        )
    ).eval()  # fmt: skip
    assert isinstance(model, EnCodec)
    wave = torch.randn(1, 2, 700) * 0.2
    quiet, loud = model.encode_chunks(wave * 0.1), model.encode_chunks(wave)
    assert len(quiet) == 3
    for one, other in zip(quiet, loud, strict=True):
        assert one.scale is not None
        assert other.scale is not None
        assert torch.equal(one.codes, other.codes), "loudness is not in the codes"
        torch.testing.assert_close(10 * one.scale, other.scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(10 * model.decode_chunks(quiet), model.decode_chunks(loud), rtol=1e-4, atol=1e-5)


@pytest.mark.proves("encodec", "causal: what comes later changes no earlier code")
def test_a_causal_codec_does_not_look_ahead() -> None:
    model = nano("encodec").eval()
    assert isinstance(model, EnCodec)
    wave = torch.randn(1, 1, 320)
    other = torch.cat([wave[..., :160], torch.randn(1, 1, 160)], 2)
    first, second = model.latents(wave), model.latents(other)
    torch.testing.assert_close(first[..., :20], second[..., :20], rtol=0, atol=1e-6)
    assert (first - second).abs().max() > 1e-3


class Noise:
    """Eight fixed waveforms."""

    def __init__(self) -> None:
        self.waves = 0.3 * nano_batch(nano("encodec"), 8)["wave"]

    def __len__(self) -> int:
        return 8

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch(wave=self.waves[list(indices)])


def adversarial() -> Adversarial:
    codec = polymodal.build(NANO["encodec"])
    assert isinstance(codec, Codec)
    return Adversarial(codec, MultiScaleSpectrum(DiscriminatorConfig(filters=2, windows=(64,))))


def stage(name: str, trainable: dict[str, float]) -> Stage:
    return Stage(
        name=name, steps=3, batch_size=4, source=Noise, lr=1e-3, schedule=Constant(), clip=None, trainable=trainable
    )


@pytest.mark.proves("encodec", "training: alone, then with discriminators, in the one loop; resumed = not stopped")
def test_training_in_the_one_loop(tmp_path: Path) -> None:
    stages = [stage("alone", {"codec": 1.0}), stage("joined", {"*": 1.0})]
    run = Run(name="codec", header=HEADER, model=adversarial, stages=stages)
    result = fit(run, tmp_path / "whole", device="cpu")
    for stop in (2, 4, None):
        again = fit(run, tmp_path / "parts", device="cpu", until_step=stop)
    whole, parts = (read_curve(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [record["loss"] for record in whole] == [record["loss"] for record in parts]
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in result.model.state_dict().items())
    assert isinstance(result.model, Adversarial)
    loaded = polymodal.load(result.model.codec.save(tmp_path / "codec"))
    trained = result.model.codec
    assert isinstance(loaded, EnCodec)
    assert isinstance(trained, EnCodec)
    wave = torch.randn(2, 1, 333)
    assert torch.equal(loaded.quantize(wave), trained.quantize(wave))
