"""What the systems share that hear a window of sound at a time and write it down. Not a system itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.backbones.decoder import Learned
from polymodal.backbones.encdec import Block, CrossDecoder, EncDecMemory, Source
from polymodal.core.errors import UnsupportedError
from polymodal.core.files import read_json, write_json
from polymodal.core.sample import Sample
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.transcript import Heard, Listening
from polymodal.encoders.whisper import WhisperEncoder
from polymodal.modalities.audio import seconds
from polymodal.modalities.mel import PREPROCESSOR, WhisperMel, declared_whisper
from polymodal.samplers.speech import Decoding, Tape, hear_all
from polymodal.samplers.timestamps import SpeechTokens
from polymodal.systems.listening import Transcriber
from polymodal.systems.whisper_files import GENERATION, Heads, read_generation, write_generation
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.tokenizers.speech import spell


class WindowListener(Transcriber):
    """Base of the systems of Whisper's kind: what `samplers.speech` needs of them, and their files."""

    encoder: WhisperEncoder
    backbone: CrossDecoder
    mel: WhisperMel
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]
    tokens: SpeechTokens | None = None  # set it, and `tokenizer`, on a model that was built and not loaded
    heads: Heads = ()  # (layer, head) of the attention that follows the sound; the later half of all, if none
    decoding = Decoding()

    def encode_sound(self, features: Float[Tensor, "batch mels frames"]) -> Tokens:
        """What the decoder reads of a window."""
        return Tokens.of(self.encoder(features), causal=False, modality=Modality.AUDIO)

    @property
    def speech(self) -> SpeechTokens:
        """The control tokens, or an `UnsupportedError`."""
        if self.tokens is None:
            raise UnsupportedError(f"{self.source} has no {GENERATION}: its control tokens are not known")
        return self.tokens

    @property
    def context(self) -> int:
        position = self.config.backbone.position
        assert isinstance(position, Learned)
        return position.count

    @torch.no_grad()
    def hear(self, features: Float[Tensor, "mels frames"]) -> Source:
        weight = self.backbone.embed_tokens.weight
        return self.backbone.source(self.encode_sound(features[None].to(weight.device, weight.dtype)))

    @torch.no_grad()
    def begin(
        self, heard: Source, ids: Sequence[int], places: Sequence[int]
    ) -> tuple[EncDecMemory, Float[Tensor, "n vocab"]]:
        memory = self.backbone.new_memory(1, self.context)
        memory.source = heard
        read = self.backbone.target(torch.tensor([ids], device=self.device))
        return memory, self.backbone.logits(self.backbone.decoder(read, heard, memory).x[0, list(places)]).float()

    def step(self, ids: Int[Tensor, " rows"], memory: EncDecMemory) -> Float[Tensor, "rows vocab"]:
        return self.backbone.step(ids, memory)

    def text(self, ids: Sequence[int]) -> str:
        return self.words().decode(ids)

    def spell(self, ids: Sequence[int], language: str | None) -> list[list[int]]:
        return spell(self.words(), ids, language)

    @torch.no_grad()
    def align(
        self, heard: Source, ids: Sequence[int], steps: int
    ) -> tuple[Float[Tensor, "heads tokens steps"], Float[Tensor, "tokens vocab"]]:
        blocks, looks = self.backbone.decoder.blocks, dict[int, Tensor]()

        def watch(number: int, block: Block) -> Any:
            def look(attention: Any, inputs: tuple[Any, ...]) -> None:
                q = rearrange(attention.q_proj(inputs[0])[0], "n (h d) -> h n d", h=attention.config.num_heads)
                scores = q @ inputs[1][0, :, :steps].transpose(1, 2) * q.shape[-1] ** -0.5
                looks[number] = scores.float().softmax(-1)

            assert block.cross_attn is not None
            return block.cross_attn.register_forward_pre_hook(look)

        hooks = [watch(number, block) for number, block in enumerate(blocks) if isinstance(block, Block)]
        try:
            x = self.backbone.decoder(self.backbone.target(torch.tensor([ids], device=self.device)), heard).x[0]
        finally:
            for hook in hooks:
                hook.remove()
        later = range(len(blocks) // 2, len(blocks))
        heads = self.heads or [(i, h) for i in later for h in range(self.config.backbone.decoder.num_heads)]
        return torch.stack([looks[layer][head] for layer, head in heads]), self.backbone.logits(x).float()

    # -- the Transcribes protocol

    @property
    def sample_rate(self) -> int:
        return self.mel.sample_rate

    def transcribe_stream(
        self, blocks: Iterable[Float[Tensor, " samples"]], listening: Listening, *, after: Heard | None = None
    ) -> Iterator[Heard]:
        assert self.speech  # errors of what is missing now, and not when the sound is there
        self.words()
        tape = Tape(blocks)

        def window(at: int) -> tuple[Tensor, int] | None:
            wave = tape.read(at, self.mel.num_samples)
            return (self.mel(wave[None])[0], len(wave)) if len(wave) >= self.mel.hop else None

        return hear_all(self, window, self.sample_rate, listening, self.decoding, after)

    def count(self, sample: Sample) -> int:
        """Vectors that the encoder makes of the sounds of a sample: whole windows."""
        windows = sum(math.ceil(seconds(audio) / self.mel.seconds) for audio in sample.audios)
        return windows * self.config.encoder.positions

    # -- files

    def words(self) -> LanguageTokenizer:
        """The tokenizer, or an `UnsupportedError`."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} writes no text: no tokenizer.json was beside its weights")
        return self.tokenizer

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the config, the pre-processing and the rules of writing."""
        rules = (super().fingerprint, self.mel, self.tokens, self.heads, self.decoding)
        return hashlib.sha256(repr(rules).encode()).hexdigest()[:16]

    def load_processors(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)
        if (folder / GENERATION).is_file():
            raw = read_json(folder / GENERATION)
            if isinstance(raw, Mapping) and "no_timestamps_token_id" in raw:  # else it is of a bare backbone
                self.tokens, self.heads = read_generation(raw, self.config.backbone)
        self.mel = declared_whisper(folder, self.mel)

    def save_processors(self, folder: Path) -> None:
        super().save_processors(folder)
        write_json(folder / PREPROCESSOR, self.mel.to_hf())
        if self.tokens is not None:
            write_json(folder / GENERATION, write_generation(self.tokens, self.heads, self.context))
