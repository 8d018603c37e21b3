"""How well the mark in generated sound survives, and how often it is seen where there is none.

Needs espeak-ng, fluidsynth with TimGM6mb, and the extra ``audio``: ``python benchmarks/bench_watermark.py``.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Iterator

import av
import numpy as np
import torch
from _report import machine, report
from torch import Tensor

from polymodal.core.interval import wilson
from polymodal.core.sample import Audio
from polymodal.data.worlds import events, instruments, speech
from polymodal.modalities import audio
from polymodal.modalities.watermark import detect_watermark, embed_watermark

RATE = 16_000


def coded(wave: Tensor, rate: int, container: str, codec: str, bits: int) -> tuple[Tensor, int]:
    """What is left of a sound that was written with losses."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = bits
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.numpy()), format="fltp", layout="mono")
        frame.rate = rate
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size)
        for piece in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return audio.decode(Audio(file.getvalue()), rate), rate


def resampled(wave: Tensor, rate: int) -> tuple[Tensor, int]:
    return audio.decode(Audio(wave.numpy(), rate=RATE), rate), rate


def noisy(wave: Tensor, snr: float) -> tuple[Tensor, int]:
    return wave + torch.randn_like(wave) * wave.square().mean().sqrt() * 10 ** (-snr / 20), RATE


def cut(wave: Tensor, seconds: float) -> tuple[Tensor, int]:
    length = round(seconds * RATE)
    start = int(torch.randint(max(1, wave.shape[1] - length), ()))
    return wave[:, start : start + length], RATE


TREATMENTS = {
    "clean": lambda wave: (wave, RATE),
    "mp3 64 kbit/s": lambda wave: coded(wave, RATE, "mp3", "libmp3lame", 64_000),
    "mp3 64 kbit/s, 44.1 kHz": lambda wave: coded(resampled(wave, 44_100)[0], 44_100, "mp3", "libmp3lame", 64_000),
    "mp3 32 kbit/s": lambda wave: coded(wave, RATE, "mp3", "libmp3lame", 32_000),
    "opus 24 kbit/s": lambda wave: coded(wave, RATE, "ogg", "libopus", 24_000),
    "resampled to 8 kHz": lambda wave: resampled(wave, 8_000),
    "resampled to 22.05 kHz": lambda wave: resampled(wave, 22_050),
    "resampled to 44.1 kHz": lambda wave: resampled(wave, 44_100),
    "noise at 30 dB": lambda wave: noisy(wave, 30),
    "noise at 20 dB": lambda wave: noisy(wave, 20),
    "1 s cut out": lambda wave: cut(wave, 1),
    "2 s cut out": lambda wave: cut(wave, 2),
    "5 % faster": lambda wave: (resampled(wave, round(RATE / 1.05))[0], RATE),
}


def sounds(kind: str, seed: int) -> Iterator[Tensor]:
    """Clips without end, of a series that ``seed`` chooses."""
    if kind == "speech":
        for utterance in speech.utterances("train", seed=seed):
            yield torch.from_numpy(speech.render(utterance)[0])[None]
    elif kind == "instruments":
        for piece in instruments.pieces("train", seed=seed):
            yield torch.from_numpy(instruments.render(piece))[None]
    else:
        for scene in events.scenes("train", seed=seed):
            yield torch.from_numpy(events.render(scene))[None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=10_000, help="unmarked clips")
    parser.add_argument("--marked", type=int, default=200, help="marked clips of each kind")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figures: dict[str, object] = {"machine": machine()}

    for kind in ("speech", "instruments"):
        found: defaultdict[str, list[bool]] = defaultdict(list)
        ratios, seconds = [], []
        for wave, _ in zip(sounds(kind, 3), range(arguments.marked), strict=False):
            marked = embed_watermark(wave, RATE)
            ratios.append(10 * float((wave.square().mean() / (marked - wave).square().mean()).log10()))
            seconds.append(wave.shape[1] / RATE)
            for name, treat in TREATMENTS.items():
                found[name].append(detect_watermark(*treat(marked)).marked)
        figures[kind] = {
            "clips": len(ratios),
            "median seconds": float(np.median(seconds)),
            "SNR in dB, least": min(ratios),
            "SNR in dB, mean": float(np.mean(ratios)),
            "detected": {name: f"{sum(hits)} of {len(hits)}" for name, hits in found.items()},
        }
        report("watermark", figures)  # what follows takes a while

    shares = {"speech": 0.5, "instruments": 0.3, "events": 0.2}
    alarms = []
    for kind, share in shares.items():
        for wave, _ in zip(sounds(kind, 2), range(round(share * arguments.clips)), strict=False):
            alarms.append(detect_watermark(wave, RATE))
    wrong = sum(alarm.marked for alarm in alarms)
    figures["unmarked"] = {
        "clips": len(alarms),
        "false positives": wrong,
        "rate, upper end of the 95 % interval": wilson(wrong, len(alarms)).high,
        "highest score": max(alarm.score for alarm in alarms),
        "lowest bound": min(alarm.false_alarm for alarm in alarms),
    }
    report("watermark", figures)


if __name__ == "__main__":
    main()
