"""BLIP-2, first stage: a Q-Former learns what to read of a picture from three losses under three masks.

Paper: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models", 2023, https://arxiv.org/abs/2301.12597, section 3.2. Official code: salesforce/LAVIS (``Blip2Qformer``).
Hub: Salesforce/blip2-itm-vit-g, ... (for retrieval: without the head of words)

    picture -> frozen ViT -> norm --+   contrast (ITC): queries alone, text alone; the best query of 32 against [CLS]
                                    +-> matching (ITM): queries and text see each other; mean over the queries
    text ---------------------------+   captions (ITG): text sees the queries and its own beginning, after [DEC]

Training details kept here: the tower is frozen and in eval mode, its last norm learns; a learned temperature that
divides, from 0.07; label smoothing of 0.1 in contrast and captions; for matching each picture and each text gets a
negative drawn by the contrast's softmax, never one of its own picture (``image_id`` tells where several texts have
one); the queries run once for contrast and captions; the three losses are added.

Deviations: no dropout (0.1 in the paper). Vectors are gathered from all ranks with their gradient; the official code
gathers those of the contrast without. The caption loss is the mean over the tokens of a micro-batch, as the official
one is over those of a GPU. A trained file has the temperature and the head of words under the official names, which
transformers does not know and leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from polymodal.backbones.bert import BertConfig, MaskedHead
from polymodal.backbones.encdec_families import masked_head_rules, read_architecture
from polymodal.connectors.qformer import QFormer, QFormerConfig, Seen, TextTables
from polymodal.core.batch import Batch, Loss, text_batch
from polymodal.core.distributed import gather_with_grad, rank
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.frozen import FrozenViT
from polymodal.encoders.vision_families import VISION_FAMILIES
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.matching import SMOOTHING, MatchingHead, QueryContrastiveHead, best_cosines, hard_negatives
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, Exact, ImageProcessor
from polymodal.systems.base import System
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.weights.fields import Fields
from polymodal.weights.format import Format, Reference
from polymodal.weights.layouts import qformer_rules, read_qformer, write_qformer
from polymodal.weights.rules import Rule, rule

TOWER = VISION_FAMILIES["blip_2_vision_model"]


@dataclass(frozen=True, kw_only=True)
class BLIP2QFormerConfig:
    """A tower and a Q-Former that reads text.

    Attributes:
        embed_dim: of the space in which pictures and texts are compared.
        trains: whether there are a temperature and a head of words; files for retrieval have none.
        image_id: a placeholder for pictures that the processor of a file writes before texts; it is never read here.
    """

    vision: ViTConfig
    qformer: QFormerConfig
    embed_dim: int = 256
    trains: bool = True
    image_id: int | None = None

    @property
    def text(self) -> TextTables:
        assert self.qformer.text is not None, "the first stage reads text"
        return self.qformer.text

    @property
    def start_id(self) -> int:
        """[DEC], which a caption begins with: added to BERT's vocabulary as its last token."""
        return self.text.vocab_size - 1


@final
class BLIP2QFormer(System):
    """Contrast, matching and captions with one Q-Former."""

    config: BLIP2QFormerConfig
    tokenizer: LanguageTokenizer | None = None  # type: ignore[assignment]

    def __init__(self, config: BLIP2QFormerConfig) -> None:
        super().__init__(config)
        c, q = config, config.qformer
        self.vision = FrozenViT(c.vision)
        self.qformer = QFormer(q, c.vision.dim)
        self.image_projection = nn.Linear(q.dim, c.embed_dim)
        self.text_projection = nn.Linear(q.dim, c.embed_dim)
        self.matching = MatchingHead(q.dim)
        self.contrast = QueryContrastiveHead() if c.trains else None
        self.words = None
        if c.trains:
            bert = BertConfig(
                vocab_size=c.text.vocab_size, context=c.text.context, dim=q.dim, num_layers=q.num_layers,
                num_heads=q.num_heads, hidden_dim=q.hidden_dim, activation=q.activation, norm_eps=q.norm_eps,
            )  # fmt: skip
            self.words = MaskedHead(bert)

    @torch.no_grad()
    def init_weights(self) -> None:
        TOWER.init(self.vision)
        self.qformer.init_weights()
        layers = [self.image_projection, self.text_projection, self.matching.proj]
        for layer in layers if self.words is None else [*layers, self.words.proj]:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, text = self.config.vision, self.config.text
        length = min(9, text.context)
        return {
            "pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size)),
            "ids": TensorSpec(shape=(length,), dtype=torch.int64, high=text.vocab_size),
            "valid": TensorSpec(shape=(length,), dtype=torch.bool),
        }

    # -- the three masks

    def image_vectors(self, seen: Seen) -> Float[Tensor, "images queries dim"]:
        """A unit vector for each query, in fp32."""
        return F.normalize(self.image_projection(seen.x).float(), dim=-1)

    def text_vectors(
        self, ids: Int[Tensor, "texts tokens"], valid: Bool[Tensor, "texts tokens"] | None = None
    ) -> Float[Tensor, "texts dim"]:
        """A unit vector for each text, of its first token, in fp32."""
        return F.normalize(self.text_projection(self.qformer.read(ids, valid)[:, 0]).float(), dim=-1)

    def match(
        self,
        image: Float[Tensor, "pairs patches source"],
        ids: Int[Tensor, "pairs tokens"],
        valid: Bool[Tensor, "pairs tokens"] | None = None,
    ) -> Float[Tensor, "pairs 2"]:
        """Scores for no and yes: does the text belong to the picture, given as the tower's features?"""
        return self.matching(self.qformer.read_both(image, ids, valid)).float()

    def caption_loss(
        self, seen: Seen, ids: Int[Tensor, "rows tokens"], valid: Bool[Tensor, "rows tokens"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy of each token given the queries and the tokens before it; [DEC] stands for the first."""
        assert self.words is not None
        assert self.qformer.embed_tokens is not None
        begun = torch.cat([torch.full_like(ids[:, :1], self.config.start_id), ids[:, 1:]], 1)
        learned = valid[:, 1:]
        hidden = self.qformer.tell(begun, seen, valid)[:, :-1][learned]
        scores = self.words(hidden, self.qformer.embed_tokens.weight).float()
        total = F.cross_entropy(scores, ids[:, 1:][learned], label_smoothing=SMOOTHING, reduction="sum")
        return total / learned.sum().clamp(min=1)

    def forward(self, batch: Batch) -> Float[Tensor, "images texts"]:
        """The cosine of each text with the query that fits it best."""
        seen = self.qformer(self.vision(batch["pixels"]).x)
        return best_cosines(self.image_vectors(seen), self.text_vectors(batch["ids"], batch.get("valid")))

    def loss(self, batch: Batch) -> Loss:
        """The sum of contrast, matching and captions; ``ids`` begin with [CLS] and are as long on every rank.

        Raises:
            UnsupportedError: the files were for retrieval alone.
            TrainError: all pairs of the batch have one picture.
        """
        if self.contrast is None:
            raise UnsupportedError(f"{self.source} has no head of words: it was written for retrieval, not training")
        ids, rows = batch["ids"], batch.size
        valid = batch["valid"] if "valid" in batch else torch.ones_like(ids, dtype=torch.bool)
        group = batch["image_id"] if "image_id" in batch else torch.arange(rows, device=ids.device) + rank() * rows
        same = group[:, None] == gather_with_grad(group)
        image = self.vision(batch["pixels"]).x
        seen = self.qformer(image)
        images, texts = self.image_vectors(seen), self.text_vectors(ids, valid)
        contrast = self.contrast.contrast(images, texts, gather_with_grad(images), gather_with_grad(texts), same)

        other_image = gather_with_grad(image)[hard_negatives(contrast.by_text, same)]
        drawn = hard_negatives(contrast.by_image, same)
        other_ids, other_valid = gather_with_grad(ids)[drawn], gather_with_grad(valid.long())[drawn].bool()
        scores = self.match(
            torch.cat([image, other_image, image]), torch.cat([ids, ids, other_ids]),
            torch.cat([valid, valid, other_valid]),
        )  # fmt: skip
        belongs = torch.arange(3 * rows, device=ids.device) < rows
        matching = F.cross_entropy(scores, belongs.long())
        captions = self.caption_loss(seen, ids, valid)
        right = (scores.detach().argmax(1) == belongs.long()).float().mean()
        return Loss(
            total=contrast.total + rows * (matching + captions),
            weight=rows,
            metrics={
                "contrast": contrast.total.detach() / rows, "matching": matching.detach(),
                "captions": captions.detach(), "matched": right, "temperature": self.contrast.temperature.detach(),
            },
        )  # fmt: skip

    # -- data

    def default_images(self) -> ImageProcessor:
        side = self.config.vision.image_size
        return ImageProcessor(resize=Exact(height=side, width=side), mean=CLIP_MEAN, std=CLIP_STD)

    def load_processors(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = LanguageTokenizer.from_folder(folder)

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise UnsupportedError(f"{self.source} reads no text: no tokenizer.json was beside its weights")
        return self.tokenizer.encode(text, special=True)

    def prepare(self, pairs: Sequence[Sample], length: int = 32) -> Batch:
        """Pictures with a text each as a batch for `loss`; texts are padded to ``length``, so that ranks agree.

        Raises:
            MediaError: a sample is no picture with a text, or its text is longer: nothing is cut.
        """
        if not isinstance(self.images, ImageProcessor):
            raise UnsupportedError(f"{self.source} has no image processor")
        rows = []
        for row, pair in enumerate(pairs):
            if len(pair.images) != 1 or len(pair.texts) != 1:
                raise MediaError(f"a pair is a picture and a text; sample {row} has {len(pair.parts)} parts")
            text = self._ids(pair.texts[0].text)
            if len(text) > length:
                raise MediaError(f"the text of sample {row} has {len(text)} tokens, more than {length}")
            rows.append(text)
        return Batch(text_batch(rows, width=length) | {"pixels": self.images([pair.images[0] for pair in pairs])})

    def count(self, sample: Sample) -> int:
        """Tokens of a sample: the queries of each picture, and its texts with [CLS] and [SEP]."""
        return len(sample.images) * self.config.qformer.num_queries + sum(len(self._ids(t.text)) for t in sample.texts)

    reference = Reference(
        package="transformers", cls="Blip2ForImageTextRetrieval",
        inputs={"pixels": "pixel_values", "ids": "input_ids", "valid": "attention_mask"}, output="logits_per_image",
        loss=False,
    )  # fmt: skip


RETRIEVAL, WHOLE = "Blip2ForImageTextRetrieval", "Blip2Qformer"


def read_hf(raw: Mapping[str, Any]) -> tuple[BLIP2QFormerConfig, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "blip-2")
    whole = read_architecture(f, (RETRIEVAL, WHOLE)) == WHOLE
    v, q = f.child("vision_config"), f.child("qformer_config")
    v.require("model_type", TOWER.model_type)
    q.require("use_qformer_text_input", True)
    f.ignore("a language model, of which the file has nothing", "text_config", "use_decoder_only_language_model")
    text = TextTables(vocab_size=q.take("vocab_size", int, 30522), context=q.take("max_position_embeddings", int, 512))
    vision, shape = TOWER.read(v), read_qformer(q)
    qformer = QFormerConfig(num_queries=f.take("num_query_tokens", int, 32), text=text, **shape)
    embed_dim, image_id = f.take("image_text_hidden_size", int, 256), f.optional("image_token_index", int)
    report = f.done()
    return BLIP2QFormerConfig(
        vision=vision, qformer=qformer, embed_dim=embed_dim, trains=whole, image_id=image_id
    ), report  # fmt: skip


def write_hf(c: BLIP2QFormerConfig) -> dict[str, Any]:
    text = {"vocab_size": c.text.vocab_size, "max_position_embeddings": c.text.context, "use_qformer_text_input": True}
    return {
        "architectures": [WHOLE if c.trains else RETRIEVAL], "model_type": "blip-2",
        "vision_config": TOWER.write(c.vision), "qformer_config": write_qformer(c.qformer) | text,
        "num_query_tokens": c.qformer.num_queries, "image_text_hidden_size": c.embed_dim,
        "image_token_index": c.image_id,
    }  # fmt: skip


def rules_hf(c: BLIP2QFormerConfig) -> list[Rule]:
    return [
        *TOWER.rules("vision_model", "vision"),
        *qformer_rules("qformer"),
        rule("vision_projection.{p}", "image_projection.{p}"),
        rule("text_projection.{p}", "text_projection.{p}"),
        rule("itm_head.{p}", "matching.proj.{p}"),
        rule("temp", "contrast.temperature"),
        *masked_head_rules("cls.predictions.", "words."),
    ]


BLIP2QFormer.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}

VIT_G = ViTConfig(image_size=224, patch_size=14, dim=1408, num_layers=39, num_heads=16, hidden_dim=6144)
PRESETS = {
    "LAVIS blip2 pretrain": lambda: BLIP2QFormerConfig(vision=VIT_G, qformer=QFormerConfig(text=TextTables())),
    "Salesforce/blip2-itm-vit-g": lambda: BLIP2QFormerConfig(
        vision=VIT_G, qformer=QFormerConfig(text=TextTables()), trains=False
    ),
}
