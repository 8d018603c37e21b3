"""What the systems share that write down what is said. Not a system itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from polymodal.core.sample import Audio
from polymodal.core.transcript import Heard, Listening, Segment, Task
from polymodal.modalities.audio import blocks
from polymodal.systems.base import System
from polymodal.weights.format import Format

BLOCK = 10.0  # seconds that are decoded at a time


class Transcriber(System):
    """Base of the systems with the `Transcribes` protocol; a subclass gives `sample_rate` and `transcribe_stream`."""

    @property
    def sample_rate(self) -> int:
        """Samples a second of the waveform that it hears."""
        raise NotImplementedError

    def transcribe_stream(
        self, blocks: Iterable[Float[Tensor, " samples"]], listening: Listening, *, after: Heard | None = None
    ) -> Iterator[Heard]:
        """As `Transcribes` says."""
        raise NotImplementedError

    def load_images(self, folder: Path, fmt: Format) -> None:
        """A preprocessor in these folders is one of sound."""

    def transcribe(
        self, source: Any, *, language: str | None = None, task: Task = "transcribe", words: bool = False
    ) -> list[Segment]:
        """What is said in a file of sound or a clip, or in an `Audio` of any kind, however long.

        Args:
            source: a path, encoded bytes, or an `Audio`.
            language: what is spoken ("en"); found out if not given.
            task: the words as they are spoken, or in English.
            words: whether each word gets its times.

        Raises:
            MediaError: the sound cannot be decoded.
            UnsupportedError: the model knows no such language or task, or lacks what it needs to write.
        """
        audio = source if isinstance(source, Audio) else Audio(source)
        sound = (block[0] for block in blocks(audio, self.sample_rate, BLOCK))
        listening = Listening(language=language, task=task, words=words)
        return [segment for heard in self.transcribe_stream(sound, listening) for segment in heard.segments]
