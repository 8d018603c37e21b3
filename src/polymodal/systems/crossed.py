"""What the systems share whose text sees pictures through gated cross-attention. Not a system itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from PIL import Image as PILImage
from torch import Tensor, nn

from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.families import ControlIds
from polymodal.connectors.gated import GatedBlock, GatedConfig, MediaCache, MediaSight
from polymodal.connectors.resampler import Resampler, ResamplerConfig
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Image, Text
from polymodal.core.tokens import Modality, Tokens
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.fresh import init_tower
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.nn.cache import KVCache
from polymodal.systems.generator import Generator

TOWER = "clip_vision_model"


@dataclass(frozen=True, kw_only=True)
class CrossedConfig:
    """A tower, a resampler, gated blocks and a decoder.

    Attributes:
        resampler: None where text sees the tower's features themselves.
        backbone: the language model as it was trained, without the new tokens.
        new_tokens: how many tokens were added behind its vocabulary.
        image_id: the token that stands where a picture is; it is text like any other.
        every: there is one gated block for so many layers of the language model.
    """

    vision: ViTConfig
    resampler: ResamplerConfig | None
    gated: GatedConfig
    backbone: DecoderConfig
    new_tokens: int
    image_id: int
    every: int = 1
    control: ControlIds = field(default_factory=ControlIds)

    def __post_init__(self) -> None:
        if self.every < 1 or self.backbone.num_layers < self.every:
            raise ConfigError(f"a gated block for each {self.every} of {self.backbone.num_layers} layers")
        if not 0 <= self.image_id < self.backbone.vocab_size + self.new_tokens:
            raise ConfigError(
                f"image_id {self.image_id} is no token of {self.backbone.vocab_size} and {self.new_tokens} new ones"
            )
        if self.backbone.embed_scale is not None or self.backbone.soft_cap is not None:
            raise ConfigError("new tokens are not made for a backbone that scales embeddings or caps logits (Gemma)")

    @property
    def keep_class(self) -> bool:
        """Whether the tower's class token is a feature, too."""
        return False

    @property
    def gated_layers(self) -> tuple[int, ...]:
        """The layers of the language model before which a gated block stands."""
        return tuple(range(self.every - 1, self.backbone.num_layers, self.every))

    @property
    def num_features(self) -> int:
        """Vectors of a picture that text sees."""
        if self.resampler is not None:
            return self.resampler.num_latents
        side = self.vision.image_size
        return self.vision.count(side, side) - (0 if self.keep_class else self.vision.num_prefix)


class CrossedGenerator(Generator):
    """Base of the Flamingo family: `CrossedConfig`'s parts, what they read and remember; all of it frozen but for the
    resampler, the gated blocks and the new tokens."""

    config: CrossedConfig
    has_template = False

    def __init__(self, config: CrossedConfig) -> None:
        super().__init__(config)
        c, dim = config, config.backbone.dim
        self.vision = ViT(c.vision)
        self.resampler = None if c.resampler is None else Resampler(c.resampler, c.vision.dim)
        self.gated_blocks = nn.ModuleList(GatedBlock(c.gated, dim, c.vision.dim) for _ in c.gated_layers)
        self.backbone = Decoder(c.backbone)
        self.new_tokens = nn.Embedding(c.new_tokens, dim) if c.new_tokens else None
        tied = c.backbone.tied or not c.new_tokens
        self.new_logits = None if tied else nn.Linear(dim, c.new_tokens, bias=False)
        self.media_id, self.stop_ids = c.image_id, c.control.stop
        self.vision.requires_grad_(False)
        self.backbone.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self, std: float | None = None) -> None:
        """Closed gates, latents of deviation one; other new layers normal with ``std``, or as torch has them."""
        init_tower(self.vision)
        self.backbone.init_weights()
        if self.resampler is not None:
            self.resampler.init_weights(std)
        for block in self.gated_blocks:
            assert isinstance(block, GatedBlock)
            block.init_weights(std)
        for table in (self.new_tokens, self.new_logits):
            if table is not None:
                nn.init.normal_(table.weight, std=self.config.backbone.std)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, high = self.config.vision, min(self.vocab_size, self.config.image_id)
        return {
            "ids": TensorSpec(shape=(8,), dtype=torch.int64, high=high, head=(self.config.image_id,)),
            "labels": TensorSpec(shape=(8,), dtype=torch.int64, high=high),
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "pixels_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }

    # -- text

    @property
    def vocab_size(self) -> int:
        return self.config.backbone.vocab_size + self.config.new_tokens

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        """Vectors of token ids, of the old vocabulary and of the new tokens behind it."""
        old = self.config.backbone.vocab_size
        x = self.backbone.embed(ids.clamp(max=old - 1))
        if self.new_tokens is None:
            return x
        return torch.where((ids >= old).unsqueeze(-1), self.new_tokens((ids - old).clamp(min=0)), x)

    def scores(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of the next token from vectors after the last norm."""
        scores = self.backbone.logits(x)
        if self.new_tokens is None:
            return scores
        table = self.new_tokens.weight if self.new_logits is None else self.new_logits.weight
        return torch.cat([scores, nn.functional.linear(x, table)], -1)

    # -- pictures

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        return self.see_whole(pictures, 1)

    def features(self, batch: Batch) -> Float[Tensor, "pictures features source"]:
        """What text sees of each picture: one entry for each `media_id`, unlike in models that put features there."""
        c = self.config
        x = self.vision(batch["pixels"], layers=c.vision.num_layers).x
        x = x if c.keep_class else x[:, c.vision.num_prefix :]
        return x if self.resampler is None else self.resampler(x)

    def order(self, ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
        """The number of the picture that each token sees, counted from one: the last up to and with its own place."""
        return (ids == self.config.image_id).long().cumsum(1)

    def in_rows(self, batch: Batch) -> Float[Tensor, "batch keys source"] | None:
        """The features of each row's pictures, one after the other, zeros behind them; None if there are none.

        Raises:
            MediaError: a row has more or fewer places for pictures than pictures.
        """
        places = (batch["ids"] == self.config.image_id).sum(1)
        row = batch.get("pixels_row", places.new_zeros(0))
        counts = torch.bincount(row, minlength=len(places))
        if counts.tolist() != places.tolist():
            raise MediaError(f"rows with {places.tolist()} places for pictures, and {counts.tolist()} pictures")
        if not len(row):
            # A picture that no text sees, since no place for one stands before it.
            return self.features(self.blank()).flatten(0, 1).expand(len(places), -1, -1) if self.must_see else None
        x = self.features(batch)
        index = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        out = x.new_zeros(len(places), int(counts.max()), *x.shape[1:])
        return out.index_put((row, index), x).flatten(1, 2)

    # -- reading

    def read_prompt(self, batch: Batch, memory: MediaCache | None = None) -> Float[Tensor, "batch tokens dim"]:
        """Vectors after the last norm; with a memory, what the rows hold from now on is kept in it."""
        media, size = self.in_rows(batch), self.config.num_features
        tokens, order = self.layout(batch, self.embed(batch["ids"])), self.order(batch["ids"])
        sight = None if media is None else MediaSight.of_last(order, media.shape[1] // size, size)
        last = order.gather(1, tokens.valid.sum(1, keepdim=True).clamp(min=1) - 1).squeeze(1)
        return self._run(tokens, sight, memory, media, last)

    def read_on(self, tokens: Tokens, memory: MediaCache) -> Float[Tensor, "batch tokens dim"]:
        """The same for plain text behind what the rows hold."""
        return self._run(tokens, memory.sight_of(tokens.shape[1]), memory)

    def _run(
        self,
        tokens: Tokens,
        sight: MediaSight | None,
        memory: MediaCache | None,
        media: Float[Tensor, "batch keys source"] | None = None,
        last: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        if self.backbone.packed:
            raise UnsupportedError(f"{type(self).__name__} sees pictures row by row: its rows cannot be packed")
        number = {layer: i for i, layer in enumerate(self.config.gated_layers)}
        x = self.backbone.enter(tokens)
        views = self.backbone.views(tokens, memory)
        for layer, (block, view) in enumerate(zip(self.backbone.blocks, views, strict=True)):
            if layer in number:
                gated = self.gated_blocks[number[layer]]
                assert isinstance(gated, GatedBlock)
                seen = None
                if media is not None:
                    seen = gated.forward_media(media)
                    if memory is not None and last is not None:
                        memory.keep(number[layer], *seen, last)
                elif sight is not None and memory is not None:
                    seen = memory.recall(number[layer])
                x = gated(x, seen, sight)
            x = block(x, view, memory)
        if memory is not None:
            memory.advance(tokens)
        return self.backbone.norm(x)

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        return self.scores(self.read_prompt(batch))

    def supervised(self, batch: Batch) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        return self.read_prompt(batch), batch["labels"], self.scores

    # -- prompts

    def spell(self, chat: Chat) -> Iterator[str | int]:
        """A chat as texts and control tokens."""
        raise NotImplementedError

    def write_prompt(self, chat: Chat) -> list[int]:
        """Texts and pictures in their order, few-shot prompts among them; chat templates have no place for these."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} has no tokenizer.json (see use_tokenizer)")
        ids = list(self.tokenizer.prefix)
        for piece in self.spell(chat):
            ids += self.tokenizer.encode(piece, special=False) if isinstance(piece, str) else [piece]
        return ids

    # -- generation

    def new_memory(self, rows: int, capacity: int) -> MediaCache:
        c, weight = self.config, self.backbone.embed_tokens.weight
        a, g = c.backbone.attention, c.gated
        return MediaCache(
            media_shape=(len(self.gated_blocks), g.num_heads, c.num_features, g.head_dim),
            num_layers=c.backbone.num_layers, rows=rows, capacity=min(capacity, c.backbone.context),
            num_kv_heads=a.num_kv_heads, head_dim=a.head_dim, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    @torch.no_grad()
    def prefill(self, batch: Batch, memory: KVCache) -> Float[Tensor, "rows vocab"]:
        assert isinstance(memory, MediaCache)
        batch = batch.to(self.device)
        x = self.read_prompt(batch, memory)
        last = batch.get("valid", torch.ones_like(batch["ids"])).sum(1) - 1
        return self.scores(x[torch.arange(len(x), device=x.device), last]).float()

    @torch.no_grad()
    def resume(self, ids: Int[Tensor, "rows tokens"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        assert isinstance(memory, MediaCache)
        tokens = Tokens.of(self.embed(ids.to(self.device)), causal=True, modality=Modality.TEXT)
        return self.scores(self.read_on(memory.after(tokens), memory)[:, -1]).float()

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " rows"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        assert isinstance(memory, MediaCache)
        x = self.embed(ids.to(self.device)[:, None])
        return self.scores(self.read_on(memory.next_tokens(x, Modality.TEXT), memory)[:, 0]).float()


def parts_of(chat: Chat) -> Iterator[tuple[str, str | Image]]:
    """(role, text or picture) in order; texts of one turn that stand together are one.

    Raises:
        MediaError: a part is neither.
    """
    for turn in chat.turns:
        text = ""
        for part in turn.parts:
            if isinstance(part, Text):
                text += part.text
            elif isinstance(part, Image):
                if text:
                    yield turn.role, text
                yield turn.role, part
                text = ""
            else:
                raise MediaError("this model reads pictures and texts, no clips: give it frames as pictures")
        if text:
            yield turn.role, text
