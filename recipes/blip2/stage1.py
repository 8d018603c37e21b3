"""BLIP-2, first stage, on captioned pictures of your own: the Q-Former learns what to read of a frozen tower.

command   torchrun --nproc-per-node 16 -m polymodal train recipes/blip2/stage1.py --parallel ddp
machine   16 GPUs of 40 GB
time      the official run with ViT-g: less than six days, on 16 A100
expected  not run here at full size; tests run it at nano size

Paper: Li et al. 2023, arXiv 2301.12597, section 3.4; code: salesforce/LAVIS, projects/blip2/train. The tower is frozen
but for its last norm; the Q-Former starts as BERT, its cross-attention and queries afresh. The contrast needs whole
batches: take more processes, not micro-batches. `recipes.blip2.stage2` goes on from the model that this leaves.

Deviations: pictures are resized and not cropped at random nor mirrored; the schedule falls to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer

import polymodal
from polymodal.connectors.qformer import QFormerConfig, TextTables
from polymodal.core.batch import Batch
from polymodal.core.errors import ConfigError
from polymodal.core.sample import Sample
from polymodal.data.loader import Source
from polymodal.data.readers import open_dataset
from polymodal.data.rows import sample
from polymodal.encoders.vit import ViT
from polymodal.systems.base import System
from polymodal.systems.bert import BERT
from polymodal.systems.blip2_qformer import BLIP2QFormer, BLIP2QFormerConfig
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train import Cosine, Header, Run, Stage

CAPTIONS, PICTURES = "data/coco/annotations/captions_train2014.json", "data/coco/train2014"
LONGEST = 32  # tokens of a caption


@dataclass(frozen=True)
class Captioned:
    """Pictures with a caption each."""

    pairs: Sequence[Sample]
    model: BLIP2QFormer
    longest: int

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return self.model.prepare([self.pairs[i] for i in indices], self.longest)


def model(
    vision: str | System = "Salesforce/blip2-itm-vit-g",
    text: str | System = "google-bert/bert-base-uncased",
    num_queries: int = 32,
    embed_dim: int = 256,
) -> BLIP2QFormer:
    """The tower of one system and, as its Q-Former, the BERT of another, with [DEC] as one more token."""
    seeing, bert = (polymodal.load(s) if isinstance(s, str) else s for s in (vision, text))
    tower = dict(seeing.named_children())["vision"]
    assert isinstance(tower, ViT)
    if tower.config.pre_norm:
        raise ConfigError(f"{seeing.source}: files of BLIP-2 have no place for the first norm of CLIP's tower")
    assert isinstance(bert, BERT)
    assert isinstance(bert.tokenizer, LanguageTokenizer)
    c = bert.config.text
    made = BLIP2QFormer.build(
        BLIP2QFormerConfig(
            vision=tower.config, embed_dim=embed_dim,
            qformer=QFormerConfig(
                num_queries=num_queries, dim=c.dim, num_layers=c.num_layers, num_heads=c.num_heads,
                hidden_dim=c.hidden_dim, activation=c.activation, norm_eps=c.norm_eps,
                text=TextTables(vocab_size=c.vocab_size + 1, context=c.context),
            ),
        )
    )  # fmt: skip
    assert isinstance(made, BLIP2QFormer)
    made.vision.load_state_dict(tower.state_dict())
    start_as_bert(made, bert)
    backend = Tokenizer.from_str(bert.tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken("[DEC]", normalized=False, special=True)])
    made.tokenizer = replace(bert.tokenizer, backend=backend)
    return made


@torch.no_grad()
def start_as_bert(made: BLIP2QFormer, bert: BERT) -> None:
    """Copies what a BERT has of a Q-Former and its head of words; the queries' feed-forward layers are copies, too."""
    assert made.words is not None
    ours = {f"qformer.{name}": tensor for name, tensor in made.qformer.state_dict().items()}
    ours |= {f"words.{name}": tensor for name, tensor in made.words.state_dict().items()}
    theirs = bert.state_dict()
    for name, tensor in ours.items():
        key = name.replace("qformer.", "text.").replace("words.", "head.")
        key = key.replace(".text_mlp.", ".mlp.").replace(".text_norm.", ".mlp_norm.")
        if key in theirs:
            tensor[: len(theirs[key])] = theirs[key]  # the tables have one more row, of [DEC]


def captions() -> Sequence[Sample]:
    return open_dataset(CAPTIONS, root=PICTURES, read=sample)


def run(
    *,
    model: Callable[[], BLIP2QFormer] = model,
    pairs: Callable[[], Sequence[Sample]] = captions,
    steps: int = 250_000,
    batch_size: int = 1680,
    warmup: int = 2000,
    lr: float = 1e-4,
    longest: int = LONGEST,
) -> Run:
    def source() -> Source:
        return Captioned(pairs(), model().to("meta"), longest)

    return Run(
        name="blip2-stage1",
        header=Header(
            command="torchrun --nproc-per-node 16 -m polymodal train recipes/blip2/stage1.py --parallel ddp",
            machine="16 GPUs of 40 GB", time="under six days (official, 16 A100)", expected="not run here",
        ),
        model=model,
        stages=[
            Stage(
                name="represent", steps=steps, batch_size=batch_size, source=source, lr=lr,
                schedule=Cosine(warmup=warmup), weight_decay=0.05, betas=(0.9, 0.98), clip=None, precision="auto",
            )
        ],
    )  # fmt: skip
