"""The head of `systems.chunk_heads` that writes a chunk of actions as FAST tokens. Not a system itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated
from polymodal.core.batch import IGNORE, Batch, Loss
from polymodal.core.tokens import Modality
from polymodal.core.tokens import Tokens as Sequence
from polymodal.heads.lm import ahead, next_token_loss
from polymodal.nn.cache import KVCache
from polymodal.nn.norm import RMS
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.samplers.modes import Wordless
from polymodal.tokenizers.fast import FAST

_MOST_BYTES = 3  # of one character: no token is shorter than a byte


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A few FAST tokens, one after the other (pi0-FAST).

    Attributes:
        vocab_size: of the tokenizer, which is fitted to the chunks of a data set (`tokenizers.fast.FAST.fit`).
    """

    vocab_size: int = 1024
    hidden_dim: int = 256
    num_layers: int = 3
    num_heads: int = 4

    def build(self, dim: int, horizon: int, width: int) -> TokenActions:
        return TokenActions(self, dim, horizon, width)


class TokenActions(nn.Module):
    """A small decoder whose first token is what the trunk says; it `Generates`."""

    stop_ids: tuple[int, ...] = ()  # an answer ends with the chunk

    def __init__(self, config: Tokens, dim: int, horizon: int, width: int) -> None:
        super().__init__()
        c, self.longest = config, _MOST_BYTES * horizon * width
        self.vocab_size = c.vocab_size
        self.first = nn.Linear(dim, c.hidden_dim)
        self.backbone = Decoder(
            DecoderConfig(
                vocab_size=c.vocab_size, context=1 + self.longest, dim=c.hidden_dim, num_layers=c.num_layers,
                attention=AttentionConfig(
                    num_heads=c.num_heads, num_kv_heads=c.num_heads, head_dim=c.hidden_dim // c.num_heads
                ),
                mlp=Gated(hidden_dim=2 * c.hidden_dim), norm=RMS(), position=Rope(),
            )
        )  # fmt: skip

    def init_weights(self) -> None:
        self.backbone.init_weights()

    def loss(self, condition: Float[Tensor, "batch dim"], labels: Int[Tensor, "batch tokens"]) -> Loss:
        """Cross-entropy of each token given those before it; labels are `IGNORE` behind a chunk's last."""
        ids = labels.clamp(min=0)
        x = torch.cat([self.first(condition)[:, None], self.backbone.embed(ids[:, :-1])], 1)
        vectors = self.backbone(Sequence.of(x, causal=True, modality=Modality.ACTION, valid=labels != IGNORE)).x
        return next_token_loss(*ahead(vectors, labels), self.backbone.logits)

    def predict(self, condition: Float[Tensor, "batch dim"], fast: FAST) -> Float[Tensor, "batch horizon action_width"]:
        """The likeliest token each time, of those that a chunk may go on with."""
        ids = torch.zeros(len(condition), 1, dtype=torch.int64)
        prompt = Batch(ids=ids, valid=torch.ones_like(ids, dtype=torch.bool), condition=condition)
        settings = Settings(constraint=fast.constraint(size=self.vocab_size), max_new_tokens=self.longest)
        return fast.decode([answer.ids for answer in complete(self, prompt, settings, Wordless())]).to(condition)

    def prompt(self, chats: object) -> Batch:
        raise NotImplementedError("what is asked is a vector")

    def new_memory(self, rows: int, capacity: int) -> KVCache:
        return self.backbone.new_cache(rows, capacity)

    @torch.no_grad()
    def prefill(self, batch: Batch, memory: KVCache) -> Float[Tensor, "rows vocab"]:
        x = self.first(batch["condition"])[:, None]
        return self._scores(Sequence.of(x, causal=True, modality=Modality.ACTION), memory)

    @torch.no_grad()
    def step(self, ids: Int[Tensor, " rows"], memory: KVCache) -> Float[Tensor, "rows vocab"]:
        x = self.backbone.embed(ids.to(self.first.weight.device)[:, None])
        return self._scores(memory.next_tokens(x, Modality.ACTION), memory)

    def _scores(self, tokens: Sequence, memory: KVCache) -> Float[Tensor, "rows vocab"]:
        return self.backbone.logits(self.backbone(tokens, memory).x[:, 0]).float()
