"""A real, tiny language model with the verb of generation, its tokenizer, and the same weights in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated
from polymodal.core.batch import Batch
from polymodal.core.tokens import Modality
from polymodal.nn.cache import KVCache
from polymodal.nn.norm import RMS
from polymodal.nn.rope import Rope
from polymodal.tokenizers.language import LanguageTokenizer


class ToyLM(nn.Module):
    """A Llama that has learned nothing; its weights are wide enough that no two scores are nearly equal."""

    def __init__(
        self, vocab_size: int, *, stop_ids: Sequence[int] = (), dim: int = 32, layers: int = 2, context: int = 256,
        heads: int = 4, hidden: int = 48, std: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.decoder = Decoder(
            DecoderConfig(
                vocab_size=vocab_size, context=context, dim=dim, num_layers=layers, mlp=Gated(hidden_dim=hidden),
                attention=AttentionConfig(num_heads=heads, num_kv_heads=heads // 2, head_dim=dim // heads),
                norm=RMS(), position=Rope(), std=std,
            )
        )  # fmt: skip
        self.decoder.init_weights()
        self.eval().requires_grad_(False)
        self.vocab_size, self.stop_ids = vocab_size, tuple(stop_ids)
        self.memories: list[KVCache] = []
        self.read: list[int] = []  # tokens a row of every call

    def prompt(self, chats: Sequence[Any]) -> Batch:
        """Here a chat is a list of ids."""
        longest = max(map(len, chats))
        ids = torch.tensor([[*chat, *[0] * (longest - len(chat))] for chat in chats])
        return Batch(ids=ids, valid=torch.tensor([[i < len(chat) for i in range(longest)] for chat in chats]))

    def new_memory(self, rows: int, capacity: int) -> KVCache:
        self.memories.append(self.decoder.new_cache(rows, capacity))
        return self.memories[-1]

    def prefill(self, batch: Batch, memory: Any) -> Tensor:
        self.read.append(batch["ids"].shape[1])
        tokens = self.decoder.text(batch["ids"], batch["valid"])
        last = batch["valid"].sum(1) - 1
        return self.decoder.logits(self.decoder(tokens, memory).x[torch.arange(batch.size), last])

    def step(self, ids: Tensor, memory: Any) -> Tensor:
        tokens = memory.next_tokens(self.decoder.embed(ids[:, None]), Modality.TEXT)
        return self.decoder.logits(self.decoder(tokens, memory).x[:, 0])

    def plain_from(self, batch: Batch) -> int:
        return 0

    def resume(self, ids: Tensor, memory: Any) -> Tensor:
        self.read.append(ids.shape[1])
        return self.decoder.logits(self.decoder(memory.after(self.decoder.text(ids)), memory).x[:, -1])


def tokenizer() -> LanguageTokenizer:
    return LanguageTokenizer.train_bpe(["the quick brown fox jumps over a lazy dog, yes or no 12"] * 3, 300)


def llama(model: ToyLM) -> Any:
    """The same model in transformers."""
    import transformers

    c = model.decoder.config
    assert isinstance(c.mlp, Gated)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.mlp.hidden_dim,
            num_hidden_layers=c.num_layers, num_attention_heads=c.attention.num_heads,
            num_key_value_heads=c.attention.num_kv_heads, rms_norm_eps=1e-6, tie_word_embeddings=False,
            max_position_embeddings=c.context, bos_token_id=None, pad_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn": "self_attn"}
    state = {}
    for name, tensor in model.decoder.state_dict().items():
        words = name.replace("blocks", "layers").split(".")
        new = ".".join(names.get(word, word) for word in words)
        state[new if new.startswith("lm_head") else f"model.{new}"] = tensor
    theirs.load_state_dict(state)
    return theirs.eval()
