"""Scores of speech and sound: errors in words and characters, and distances between two waveforms.

Error rates are of a corpus: the sum of all edits over the sum of all reference words, which is not the mean of the
sentences' rates. Distances compare a waveform with its reference, sample for sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.errors import DataError
from polymodal.evaluate.spoken_text import english
from polymodal.evaluate.text_metrics import Estimate, bootstrap, edit_distance
from polymodal.nn.mel import LONGEST_WINDOW, log_mel_distance

# ---- speech ----


@dataclass(frozen=True, kw_only=True)
class ErrorRate:
    """Edits of a corpus over the length of its references, with a 95 % interval (bootstrap over sentences)."""

    edits: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def value(self) -> float:
        return sum(self.edits) / sum(self.lengths)

    def estimate(self, seed: int = 0) -> Estimate:
        """The rate and how sure it is; each sentence counts by its length."""
        mean = sum(self.lengths) / len(self.lengths)
        # A ratio of sums: the mean of what each sentence is off the rate, over the mean length.
        off = [(e - self.value * n) / mean for e, n in zip(self.edits, self.lengths, strict=True)]
        low, high = bootstrap(off, groups=range(len(off)), seed=seed)
        return Estimate(
            value=self.value, low=max(0.0, self.value + low), high=self.value + high, n=len(off),
            method="bootstrap of a ratio",
        )  # fmt: skip


def word_error_rate(
    texts: Sequence[str], references: Sequence[str], *, normalise: Callable[[str], str] = english
) -> ErrorRate:
    """Substituted, left out and added words over the words of the references, after ``normalise``.

    Raises:
        DataError: the numbers of texts and references differ, or no reference holds a word.
    """
    return _rate(texts, references, lambda text: normalise(text).split())


def character_error_rate(
    texts: Sequence[str], references: Sequence[str], *, normalise: Callable[[str], str] = english
) -> ErrorRate:
    """The same of characters, single spaces among them: for languages that write no spaces.

    Raises:
        DataError: as `word_error_rate`.
    """
    return _rate(texts, references, lambda text: list(normalise(text)))


def _rate(texts: Sequence[str], references: Sequence[str], units: Callable[[str], list[str]]) -> ErrorRate:
    if len(texts) != len(references):
        raise DataError(f"{len(texts)} texts for {len(references)} references: give one each")
    pairs = [(units(text), units(reference)) for text, reference in zip(texts, references, strict=True)]
    if not any(reference for _, reference in pairs):
        raise DataError("an error rate needs a reference with at least one word")
    return ErrorRate(
        edits=tuple(_edits(text, reference) for text, reference in pairs),
        lengths=tuple(len(reference) for _, reference in pairs),
    )


def _edits(text: list[str], reference: list[str]) -> int:
    """Levenshtein's distance in units: each different one is written as a character of its own."""
    letters = {unit: chr(number) for number, unit in enumerate(dict.fromkeys((*text, *reference)))}
    return edit_distance("".join(letters[u] for u in text), "".join(letters[u] for u in reference))


# ---- sound ----


def mel_distance(
    wave: Float[Tensor, "channels samples"], reference: Float[Tensor, "_channels _samples"], rate: int
) -> float:
    """Mean distance of log10 mel magnitudes, added up over seven windows (Kumar et al. 2023, DAC, arXiv 2306.06546).

    0 for equal waveforms; the published figures of codecs at 44.1 kHz lie between 0.5 and 2.

    Raises:
        DataError: the waveforms differ in shape, or are shorter than the longest window (2,048 samples).
    """
    _check(wave, reference, LONGEST_WINDOW)
    return float(log_mel_distance(wave[None], reference[None], rate))


def log_spectral_distance(
    wave: Float[Tensor, "channels samples"], reference: Float[Tensor, "_channels _samples"], *, window: int = 2048
) -> float:
    """Root mean square over frequencies of the difference of log10 power spectra, averaged over frames.

    Raises:
        DataError: the waveforms differ in shape, or are shorter than ``window``.
    """
    _check(wave, reference, window)
    mine, theirs = (_magnitudes(one, window).square().clamp_min(1e-8).log10() for one in (wave, reference))
    return float((mine - theirs).square().mean(-2).sqrt().mean())


def si_sdr(wave: Float[Tensor, "channels samples"], reference: Float[Tensor, "_channels _samples"]) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, the mean of the channels (Le Roux et al. 2019, 1811.02508).

    Means are taken off; the loudness of ``wave`` does not count. Equal waveforms have 200 dB, the most there is.

    Raises:
        DataError: the waveforms differ in shape, or the reference is silent.
    """
    _check(wave, reference, 1)
    mine, theirs = (one.double() - one.double().mean(1, keepdim=True) for one in (wave, reference))
    power = theirs.square().sum(1, keepdim=True)
    if not power.all():
        raise DataError("the reference is silent: no ratio to it is defined")
    target = (mine * theirs).sum(1, keepdim=True) / power * theirs
    kept, lost = target.square().sum(1), (mine - target).square().sum(1)
    tiny = 1e-20 * (kept + lost).clamp_min(1e-300)
    return float((10 * (kept.maximum(tiny) / lost.maximum(tiny)).log10()).mean())


def _magnitudes(wave: Tensor, window: int) -> Tensor:
    shape = torch.hann_window(window, device=wave.device)
    return torch.stft(wave.float(), window, window // 4, window=shape, return_complex=True).abs()


def _check(wave: Tensor, reference: Tensor, least: int) -> None:
    if wave.shape != reference.shape:
        raise DataError(f"waveforms of {tuple(wave.shape)} and {tuple(reference.shape)}: cut them to the same samples")
    if wave.shape[1] < least:
        raise DataError(f"{wave.shape[1]} samples are too few: {least} at least")
