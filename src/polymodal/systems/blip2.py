"""BLIP-2, second stage: what a Q-Former's queries read of a picture, as soft tokens before a frozen language model.

Paper: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models", 2023, https://arxiv.org/abs/2301.12597. Official code: salesforce/LAVIS. The first stage is `blip2_qformer`.
Hub: Salesforce/blip2-opt-2.7b, Salesforce/blip2-flan-t5-xl, ...

    picture -> frozen ViT -> norm -> Q-Former: 32 queries -> linear --+-> OPT: 32 tokens, prompt, answer
    prompt -> embedding ----------------------------------------------+-> Flan-T5: the encoder reads both

Training details kept here: the tower and the language model are frozen and stay in eval mode; the tower's last norm,
the Q-Former and the linear layer learn; the queries start at N(0, 0.02): at zero, as in transformers, the norm behind
them multiplies their first gradient by a million. The loss is on answers only, which end in a new line (OPT) or in
``</s>`` (T5). Flan-T5 runs with the exact form of GELU, as the official code runs it.

Deviations: no dropout in the Q-Former (0.1 in the paper). Without a prompt, the official code also learns the start
token behind the queries, which is always the same; here it belongs to the prompt. The tower is computed in the
precision of the whole (official: fp16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from PIL import Image as PILImage
from torch import Tensor

from polymodal.backbones.decoder import DecoderConfig
from polymodal.backbones.encdec import EncDecConfig
from polymodal.backbones.encdec_families import read_t5, t5_rules, write_t5
from polymodal.backbones.families import FAMILIES, ControlIds
from polymodal.connectors.qformer import QFormerConfig, QueryConnector
from polymodal.core.batch import Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.frozen import FrozenViT
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.lm import IGNORE
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, Exact, ImageProcessor
from polymodal.systems.seq2seq import EitherGenerator
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference
from polymodal.weights.layouts import qformer_rules, read_qformer, write_qformer
from polymodal.weights.rules import Rule, rule

TOWER = VISION_FAMILIES["blip_2_vision_model"]
T5 = "t5"


@dataclass(frozen=True, kw_only=True)
class BLIP2Config:
    """A tower, a Q-Former and a language model.

    Attributes:
        family: the `model_type` of the language model.
        image_id: the token in whose place a query is put.
    """

    vision: ViTConfig
    qformer: QFormerConfig
    family: str
    backbone: DecoderConfig | EncDecConfig
    image_id: int
    control: ControlIds = field(default_factory=ControlIds)


@final
class BLIP2(EitherGenerator):
    """A frozen tower and a frozen language model with a Q-Former between them."""

    config: BLIP2Config
    has_template = False

    def __init__(self, config: BLIP2Config) -> None:
        super().__init__(config)
        c = config
        self.vision = FrozenViT(c.vision)
        self.connector = QueryConnector(c.qformer, c.vision.dim, c.backbone.dim)
        self.add_backbone(c.backbone)
        self.backbone.requires_grad_(False)
        self.media_id, self.stop_ids = c.image_id, c.control.stop

    @torch.no_grad()
    def init_weights(self) -> None:
        TOWER.init(self.vision)
        self.connector.init_weights()
        self.init_backbone()

    def train(self, mode: bool = True) -> BLIP2:
        super().train(mode)
        self.backbone.eval()
        return self

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, n, image_id = self.config.vision, self.config.qformer.num_queries, self.config.image_id
        high = min(self.vocab_size, image_id)
        labels = (
            TensorSpec(shape=(n + 6,), dtype=torch.int64, high=high, head=(IGNORE,) * n)
            if self.seq2seq is None
            else TensorSpec(shape=(5,), dtype=torch.int64, high=high)
        )
        return {
            "ids": TensorSpec(shape=(n + 6,), dtype=torch.int64, high=high, head=(image_id,) * n),
            "labels": labels,
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "pixels_row": TensorSpec(shape=(), dtype=torch.int64, rows=True),
        }

    # -- reading

    def see(self, pictures: Sequence[PILImage.Image]) -> tuple[list[list[int]], Batch]:
        return self.see_whole(pictures, self.config.qformer.num_queries)

    def features(self, batch: Batch) -> Float[Tensor, "features dim"]:
        return self.connector(self.vision(batch["pixels"]).x).flatten(0, 1)

    # -- prompts

    def write_prompt(self, chat: Chat) -> list[int]:
        """``picture <start> text`` (OPT) or ``picture text </s>`` (T5): text as its tokenizer frames it."""
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} has no tokenizer.json")
        if len(chat.turns) != 1 or chat.turns[0].role != "user" or len(chat.images) != 1:
            raise MediaError("BLIP-2 goes on from one picture and one text of a user, e.g. 'Question: ... Answer:'")
        return [self.config.image_id, *self.tokenizer.encode(chat.turns[0].text, special=True)]

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(resize=Exact(height=side, width=side), mean=CLIP_MEAN, std=CLIP_STD)

    reference = Reference(
        package="transformers", cls="Blip2ForConditionalGeneration",
        inputs={"ids": "input_ids", "valid": "attention_mask", "labels": "labels", "pixels": "pixel_values"},
        output="logits",
    )  # fmt: skip


STOP = {"opt": (2,), T5: (1,)}  # of their config classes, where a file leaves it out


def read_hf(raw: Mapping[str, Any]) -> tuple[BLIP2Config, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "blip-2")
    f.require("architectures", ["Blip2ForConditionalGeneration"])
    v, q, t = f.child("vision_config"), f.child("qformer_config"), f.child("text_config")
    v.require("model_type", TOWER.model_type)
    q.require("use_qformer_text_input", False)
    q.ignore("no text goes through the Q-Former here", "vocab_size", "max_position_embeddings")
    f.ignore("it follows from the language model", "use_decoder_only_language_model")
    f.ignore("of the first stage's heads", "image_text_hidden_size")
    vision, shape = TOWER.read(v), read_qformer(q)
    qformer = QFormerConfig(num_queries=f.take("num_query_tokens", int, 32), **shape)
    family = t.choose("model_type", {name: name for name in (*FAMILIES, T5)}, "opt")
    backbone = read_t5(t) if family == T5 else FAMILIES[family].read(t)
    name = "image_token_id" if "image_token_id" in f else "image_token_index"
    image_id = f.take(name, int, least=0, most=backbone.vocab_size - 1)
    control = ControlIds.read(t)
    report = f.done()
    return BLIP2Config(
        vision=vision, qformer=qformer, family=family, backbone=backbone, image_id=image_id,
        control=control if t.has("eos_token_id") else replace(control, stop=STOP.get(family, ())),
    ), report  # fmt: skip


def write_hf(c: BLIP2Config) -> dict[str, Any]:
    t5 = isinstance(c.backbone, EncDecConfig)
    text = write_t5(c.backbone) if isinstance(c.backbone, EncDecConfig) else FAMILIES[c.family].write(c.backbone)
    return {
        "architectures": ["Blip2ForConditionalGeneration"], "model_type": "blip-2",
        "vision_config": TOWER.write(c.vision), "qformer_config": write_qformer(c.qformer),
        "text_config": {"model_type": c.family, **text, **c.control.write()},
        "num_query_tokens": c.qformer.num_queries, "image_token_index": c.image_id,
        "use_decoder_only_language_model": not t5,
    }  # fmt: skip


def rules_hf(c: BLIP2Config) -> list[Rule]:
    if isinstance(c.backbone, EncDecConfig):
        text = t5_rules(c.backbone, "language_model.", "backbone.")
    else:
        family = FAMILIES[c.family]
        text = family.rules(c.backbone, f"language_model.{family.base}", "language_model.lm_head", "backbone")
    return [
        *TOWER.rules("vision_model", "vision"),
        *qformer_rules("connector.qformer"),
        rule("language_projection.{p}", "connector.proj.{p}"),
        *text,
    ]


BLIP2.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}

OPT = {
    "model_type": "opt", "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 50304, "eos_token_id": 50118, "bos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
FLAN_T5 = {
    "model_type": T5, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
    "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False,
}  # fmt: skip


def preset(text: Mapping[str, Any], image_id: int) -> Callable[[], BLIP2Config]:
    return lambda: read_hf({"model_type": "blip-2", "text_config": text, "image_token_index": image_id})[0]


PRESETS = {
    "Salesforce/blip2-opt-2.7b": preset(OPT, 50265),
    "Salesforce/blip2-flan-t5-xl": preset(FLAN_T5, 32100),
}
