"""VALL-E: speech of a text with a voice that it heard for three seconds, as codes of a neural codec.

Paper: Wang et al., "Neural Codec Language Models are Zero-Shot Text to Speech Synthesizers", 2023,
https://arxiv.org/abs/2301.02111. No official code and no official weights.

    phonemes, end, codes of book 1 of the voice and so far -> causal decoder -> next code of book 1, or the end
    phonemes, end | all books of the voice, summed | books below one level, summed -> Transformer that sees everything
        and knows the level (AdaLN) -> that level's book of all frames, for levels 2 to 8 -> EnCodec -> samples

Training details kept here: two models without a shared weight, trained beside each other; the first is a plain causal
language model, any beginning is its prompt; the second learns one level a step, drawn from 2 to 8, with three seconds
of the same recording as its prompt; positions are waves that begin anew for phonemes, prompt and speech; output layers
are the tables that read the same books. The first model's codes are drawn, the second one takes the best. The paper
trains on 10 to 20 s of a recording with AdamW, warmed up to 5e-4 over 32,000 steps, then falling linearly.

Deviations: no dropout (the paper has 0.1). The prompt of the second model is not learned, so that nothing is copied.
What the paper leaves open: norms stand before the layers, initialisation is MusicGen's for the first model and normals
of 0.02 for the second. Phonemes come from espeak-ng, where the paper aligns them by a recogniser. Long texts are said
sentence by sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.backbones.conditioned import ConditionedConfig, ConditionedDecoder, cosines
from polymodal.backbones.encdec import EncDecMemory, StackConfig, Unbiased
from polymodal.backbones.levels import LevelConfig, LevelTransformer
from polymodal.core.batch import IGNORE, Batch, Loss, padded
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sounding import Sounding, Voice
from polymodal.core.verbs import TensorSpec
from polymodal.modalities.audio import decode
from polymodal.nn.init import cut_normal_
from polymodal.samplers.delayed import Drawing, whole
from polymodal.systems.base import System
from polymodal.systems.seanet_codec import Chunk, EnCodecConfig, SEANetCodec
from polymodal.tokenizers.phonemes import ENGLISH, PAUSE, Alphabet, phonemes, sentences
from polymodal.tokenizers.rvq import agreed
from polymodal.weights.native import native_format

SECONDS: Final = 20.0  # of a sentence at most, as long as what the paper trains on


@dataclass(frozen=True, kw_only=True)
class VALLEConfig:
    """An alphabet, the two models, and the codec.

    Attributes:
        symbols: the phonemes.
        voice: of espeak-ng, whose phonemes these are.
        prompt_seconds: of the same recording, that the second model is shown in training.
    """

    symbols: tuple[str, ...]
    first: ConditionedConfig
    rest: LevelConfig
    codec: EnCodecConfig
    voice: str = "en-us"
    prompt_seconds: float = 3.0

    def __post_init__(self) -> None:
        c = self.codec
        if c.num_codebooks < 2 or c.seanet.channels != 1 or c.normalize or c.chunk is not None:
            raise ConfigError("VALL-E writes two books or more of one channel in one piece, with no loudness beside")
        if self.first.dim % 2 or self.rest.dim % 2 or not self.symbols:
            raise ConfigError("VALL-E needs phonemes, and widths of pairs of waves")


@final
class VALLE(System):
    """A causal model of the first book, and one of the others that sees everything."""

    config: VALLEConfig
    delays = (0,)

    def __init__(self, config: VALLEConfig) -> None:
        super().__init__(config)
        c, size, books = config, config.codec.codebook_size, config.codec.num_codebooks
        self.alphabet = Alphabet(c.symbols)
        self.end_id = self.special_id = size
        self.first_text = nn.Embedding(len(c.symbols) + 1, c.first.dim)
        self.first_codes = nn.Embedding(size + 1, c.first.dim)  # the last one is the end; the output layer, too
        self.first = ConditionedDecoder(c.first, None)
        self.rest_text = nn.Embedding(len(c.symbols) + 1, c.rest.dim)
        self.rest_codes = nn.ModuleList(nn.Embedding(size, c.rest.dim) for _ in range(books))
        self.rest = LevelTransformer(c.rest, books - 1)
        self.codec = SEANetCodec(c.codec).requires_grad_(False)
        self.sample_rate, self.channels, self.hop = c.codec.sample_rate, 1, c.codec.seanet.hop

    def train(self, mode: bool = True) -> VALLE:
        super().train(mode)
        self.codec.eval()  # its codebooks would follow what they are shown
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        self.first.init_weights()
        self.rest.init_weights()
        for table in (self.first_text, self.first_codes, self.rest_text, *self.rest_codes):
            assert isinstance(table, nn.Embedding)
            cut_normal_(table.weight, table.embedding_dim**-0.5)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        c = self.config
        return {
            "ids": TensorSpec(shape=(7,), dtype=torch.int64, high=len(c.symbols), last=len(c.symbols)),
            "valid": TensorSpec(shape=(7,), dtype=torch.bool),
            "codes": TensorSpec(shape=(c.codec.num_codebooks, 12), dtype=torch.int64, high=c.codec.codebook_size),
        }

    # -- what is read

    def spell(self, texts: Sequence[Sequence[str]]) -> Batch:
        """Rows of phonemes as ``ids``, the end behind each."""
        rows = [self.alphabet(text) for text in texts]
        return Batch(ids=padded(rows), valid=padded([[True] * len(row) for row in rows], fill=False))

    def lesson(self, texts: Sequence[Sequence[str]], waves: Float[Tensor, "batch 1 samples"]) -> Batch:
        """What `loss` reads: phonemes, and the codes of the speech."""
        return Batch(self.spell(texts), codes=self.quantize(waves))

    def joined(
        self, batch: Batch, codes: Int[Tensor, "batch frames"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """What the first model reads: vectors, positions and validity of phonemes and then codes, without a gap.

        Padding, the codes that are `IGNORE` among it, comes to the end of each row.
        """
        valid = torch.cat([batch["valid"], codes >= 0], 1)
        x = torch.cat([self.first_text(batch["ids"]), self.first_codes(codes.clamp(min=0))], 1)
        place = torch.cat([torch.arange(n, device=codes.device) for n in (batch["ids"].shape[1], codes.shape[1])])
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        return x.take_along_dim(order[..., None], 1), place[order], valid.gather(1, order)

    # -- the first model

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens codes"]:
        """The first model's scores of what follows each of its tokens, the end behind the last code."""
        x, place, valid = self.joined(batch, batch["codes"][:, 0])
        return self.first(x, place=place, valid=valid) @ self.first_codes.weight.T

    def _first_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the codes of book 1 and the end."""
        codes, scores = batch["codes"][:, 0], self(batch)
        asked, spoken = batch["valid"].sum(1, keepdim=True), (codes >= 0).sum(1, keepdim=True)
        said = F.pad(codes, (0, 1), value=IGNORE).scatter(1, spoken, self.end_id)
        place = asked - 1 + torch.arange(said.shape[1], device=codes.device)  # the end of the text says the first code
        scores = scores.take_along_dim(place.clamp(max=scores.shape[1] - 1)[..., None], 1)
        return F.cross_entropy(scores.float().transpose(1, 2), said, ignore_index=IGNORE)

    # -- the other one

    def level_scores(
        self, batch: Batch, prompt: Int[Tensor, "batch books prompt"], codes: Int[Tensor, "batch lower frames"]
    ) -> Float[Tensor, "batch frames codes"]:
        """Scores of the book above those of ``codes``, for all frames at once."""
        level, tables = codes.shape[1], list(self.rest_codes)
        parts = [self.rest_text(batch["ids"])]
        for each, books in ((prompt, len(tables)), (codes, level)):
            kept = each.clamp(min=0)
            parts.append(torch.stack([tables[book](kept[:, book]) for book in range(books)]).sum(0))
        place = [torch.arange(part.shape[1], device=codes.device).expand(len(codes), -1) for part in parts]
        x = torch.cat(
            [part + cosines(at, part.shape[2]).to(part.dtype) for part, at in zip(parts, place, strict=True)], 1
        )
        valid = torch.cat([batch["valid"], prompt[:, 0] >= 0, codes[:, 0] >= 0], 1)
        said = self.rest(x, level - 1, valid)[:, -codes.shape[2] :]
        table = tables[level]
        assert isinstance(table, nn.Embedding)
        return said @ table.weight.T

    def _rest_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of a level that is drawn, but where its prompt lies."""
        codes, (books, frames) = batch["codes"], batch["codes"].shape[1:]
        length = min(self._frames(self.config.prompt_seconds), frames // 2)
        drawn = agreed(torch.randint(2**31, (2,), device=codes.device)).tolist()  # the same level on all processes
        level, start = 1 + drawn[0] % (books - 1), drawn[1] % (frames - length + 1)
        shown = slice(start, start + length)
        labels = codes[:, level].clone()
        labels[:, shown] = IGNORE
        scores = self.level_scores(batch, codes[..., shown], codes[:, :level])
        each = F.cross_entropy(scores.float().transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum")
        return each / (labels != IGNORE).sum().clamp(min=1)

    def loss(self, batch: Batch) -> Loss:
        """Of both models; its weight is the number of frames. ``codes`` are `IGNORE` behind the end of a row."""
        parts = {"first": self._first_loss(batch), "rest": self._rest_loss(batch)}
        frames = float((batch["codes"][:, 0] >= 0).sum())
        metrics = {name: part.detach() for name, part in parts.items()}
        return Loss(total=frames * (parts["first"] + parts["rest"]), weight=frames, metrics=metrics)

    # -- writing

    def new_memory(self, batch: Batch, steps: int) -> EncDecMemory:
        read = batch["ids"].shape[1] + (batch["prompt"].shape[2] if "prompt" in batch else 0)
        return self.first.new_memory(batch.size, read + steps)

    @torch.no_grad()
    def begin(self, batch: Batch, memory: EncDecMemory) -> Float[Tensor, "rows books codes"]:
        """Reads phonemes and, where there is one, the ``prompt`` of a voice: book 1 of it is what was said before."""
        batch = batch.to(self.device)
        spoken = batch["prompt"][:, 0] if "prompt" in batch else batch["ids"][:, :0]
        x, place, valid = self.joined(batch, spoken)
        said = self.first(x, memory=memory, place=place, valid=valid)
        said = said[torch.arange(len(x), device=x.device), valid.sum(1) - 1]
        memory.next_position = (spoken >= 0).sum(1, keepdim=True)  # those of codes go on, not those of tokens
        return (said @ self.first_codes.weight.T).float()[:, None]

    @torch.no_grad()
    def step(self, codes: Int[Tensor, "rows books"], memory: EncDecMemory) -> Float[Tensor, "rows books codes"]:
        return (self.first(self.first_codes(codes), memory=memory) @ self.first_codes.weight.T).float()

    @torch.no_grad()
    def write(self, batch: Batch, drawings: Drawing | Sequence[Drawing]) -> list[Int[Tensor, "books frames"]]:
        """All books of each row: the first is drawn until it ends, the others are the best ones, level by level.

        Args:
            batch: phonemes, those of the prompt first; ``prompt``, all books of a voice, `IGNORE` behind its end.
            drawings: as of `samplers.delayed.generate`.
        """
        out = []
        for row, first in enumerate(whole(self, batch, drawings)):
            alone, codes = batch.take([row]).to(self.device), first[None].to(self.device)
            prompt = alone.get("prompt", codes.new_zeros(1, len(self.rest_codes), 0))
            for _ in range(len(self.rest_codes) - 1):
                best = self.level_scores(alone, prompt, codes).argmax(2)
                codes = torch.cat([codes, best[:, None]], 1)
            out.append(codes[0])
        return out

    # -- sound

    @torch.no_grad()
    def quantize(self, wave: Float[Tensor, "batch 1 samples"]) -> Int[Tensor, "batch books frames"]:
        return self.codec.encode_chunks(wave.to(self.device))[0].codes

    @torch.no_grad()
    def reconstruct(self, codes: Int[Tensor, "batch books frames"]) -> Float[Tensor, "batch 1 samples"]:
        return self.codec.decode_chunks([Chunk(codes.to(self.device), None)])

    def _frames(self, seconds: float) -> int:
        return max(1, round(seconds * self.sample_rate / self.hop))

    def sound(
        self, text: str, sounding: Sounding, *, voice: Voice | None = None
    ) -> Iterator[Float[Tensor, "channels samples"]]:
        """Speech, a sentence at a time, by the voice or, without one, by the voice that the first sentence got."""
        if sounding.guidance not in (None, 1):
            raise UnsupportedError("VALL-E always learned from a text: there is nothing to guide it away from")
        said = [phonemes(sentence, self.config.voice) for sentence in sentences(text)]
        if voice is None:
            return self._sentences(said, sounding, [], None)
        known = phonemes(voice.text, self.config.voice)
        self.alphabet(known)
        return self._sentences(said, sounding, known, self.quantize(decode(voice.sound, self.sample_rate)[None]))

    def _sentences(
        self, said: Sequence[list[str]], sounding: Sounding, known: list[str], prompt: Tensor | None
    ) -> Iterator[Float[Tensor, "channels samples"]]:
        s, left = sounding, self._frames(SECONDS * len(said) if sounding.seconds is None else sounding.seconds)
        for number, sentence in enumerate(said):
            if left < 1:
                return
            batch = self.spell([[*known, PAUSE, *sentence] if known else sentence])
            if prompt is not None:
                batch["prompt"] = prompt
            drawing = Drawing(
                frames=min(left, self._frames(SECONDS)), temperature=1.0 if s.temperature is None else s.temperature,
                top_k=s.top_k, seed=None if s.seed is None else s.seed + number,
            )  # fmt: skip
            (codes,) = self.write(batch, drawing)
            left -= codes.shape[1]
            yield self.reconstruct(codes[None])[0]
            if prompt is None:
                known, prompt = sentence, codes[None]


VALLE.formats = {"hf": native_format("polymodal_valle", VALLEConfig)}


def paper() -> VALLEConfig:
    """The sizes of the paper, with the codec of 24 kHz at 6 kbit/s."""
    mlp = Unbiased(hidden_dim=4096)
    return VALLEConfig(
        symbols=ENGLISH,
        first=ConditionedConfig(dim=1024, stack=StackConfig(num_layers=12, num_heads=16, head_dim=64, mlp=mlp)),
        rest=LevelConfig(dim=1024, num_layers=12, num_heads=16, hidden_dim=4096),
        codec=EnCodecConfig(bandwidths=(6.0,)),
    )


PRESETS = {"paper": paper}
