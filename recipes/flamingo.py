"""Flamingo on pages and captioned pictures of your own: resampler and gated layers learn between frozen parts.

command   torchrun --nproc-per-node 8 -m polymodal train recipes/flamingo.py --parallel ddp
machine   64 GPUs of 40 GB for the numbers here
time      not measured
expected  not run here at full size; tests run it at nano size

Papers: Alayrac et al. 2022, arXiv 2204.14198; Awadalla et al. 2023, arXiv 2308.01390 (code: mlfoundations/
open_flamingo). Every step reads all data sets: of each a mean over its own labels, times its weight (1 for interleaved
pages, 0.2 for pairs), added up before the step. Rows are drawn with replacement, as OpenFlamingo recommends. A page is
a conversation in which the user shows a picture and the assistant says the text behind it:

    {"images": ["a.jpg", "b.jpg"], "messages": [
        {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A tower."},
        {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "The same at night."}]}

so that text before the first picture, which OpenFlamingo does not learn, belongs to the user.

Deviations: the sum is divided by the sum of the weights, which Adam does not see but the clipping of gradients does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer

import polymodal
from polymodal.connectors.gated import GatedConfig
from polymodal.connectors.resampler import ResamplerConfig
from polymodal.core.batch import IGNORE, Batch
from polymodal.core.chat import Chat
from polymodal.core.errors import DataError
from polymodal.data.loader import Source
from polymodal.data.readers import open_dataset
from polymodal.data.rows import lesson
from polymodal.encoders.vit import ViT
from polymodal.systems.base import System
from polymodal.systems.flamingo import Flamingo, FlamingoConfig
from polymodal.systems.language import LanguageModel
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train import Constant, Header, Run, Stage
from recipes.sources import lessons

Chats = Callable[[], Sequence[Chat]]
PAGES, PAIRS = "data/pages.jsonl", "data/pairs.jsonl"


@dataclass(frozen=True, kw_only=True)
class Share:
    """A data set's part of every step."""

    chats: Chats
    rows: int
    weight: float


SHARES = (
    Share(chats=partial(open_dataset, PAGES), rows=1, weight=1.0),
    Share(chats=partial(open_dataset, PAIRS, read=partial(lesson, prompt="")), rows=2, weight=0.2),
)


class Joint:
    """So many rows of each source in every batch, weighted so that the loss adds up their means.

    Args:
        sources: what to read.
        rows: of each source, in proportion; a batch is a multiple of their sum.
        weights: of the mean loss of each.
    """

    def __init__(self, sources: Sequence[Source], rows: Sequence[int], weights: Sequence[float]) -> None:
        self.parts = list(zip(sources, rows, weights, strict=True))

    def __len__(self) -> int:
        return sum(len(source) for source, _, _ in self.parts)

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        times, left = divmod(len(indices), sum(rows for _, rows, _ in self.parts))
        if left:
            raise DataError(f"{len(indices)} rows do not divide into {[rows for _, rows, _ in self.parts]} of each set")
        batches = []
        for source, rows, weight in self.parts:
            batch = source.batch(rng.integers(len(source), size=times * rows).tolist(), rng)
            learned = int((batch["labels"][:, 1:] != IGNORE).sum())
            batches.append(Batch(batch | {"weights": torch.full((times * rows,), weight / learned)}))
        return Batch.join(batches)


def model(
    vision: str | System = "openai/clip-vit-large-patch14",
    backbone: str | System = "facebook/opt-1.3b",
    every: int = 1,
    resampler: ResamplerConfig = ResamplerConfig(),  # noqa: B008  # frozen
    heads: int = 8,
    head_dim: int = 64,
) -> Flamingo:
    """A trained tower and a trained language model with closed gates between them."""
    seeing, text = (polymodal.load(s) if isinstance(s, str) else s for s in (vision, backbone))
    tower = dict(seeing.named_children())["vision"]
    assert isinstance(tower, ViT)
    assert isinstance(text, LanguageModel)
    assert isinstance(text.tokenizer, LanguageTokenizer)
    backend = Tokenizer.from_str(text.tokenizer.backend.to_str())
    old = text.tokenizer.vocab_size  # rows of the table behind it are padding
    backend.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in ("<|endofchunk|>", "<image>")])
    config = FlamingoConfig(
        vision=tower.config, resampler=resampler, family=text.config.family, control=text.config.control, every=every,
        gated=GatedConfig(num_heads=heads, head_dim=head_dim, hidden_dim=4 * text.backbone.config.dim),
        backbone=replace(text.backbone.config, vocab_size=old), new_tokens=2, chunk_id=old, image_id=old + 1,
    )  # fmt: skip
    made = Flamingo.join(config, tower, text.backbone)
    made.use_tokenizer(replace(text.tokenizer, backend=backend))
    return made


def run(
    *,
    model: Callable[[], Flamingo] = model,
    shares: Sequence[Share] = SHARES,
    steps: int = 29_296,
    batch_size: int = 6144,
    accumulate: int = 1,
    warmup: int = 1875,
    lr: float = 1e-4,
) -> Run:
    def source() -> Source:
        sources = [lessons(model, share.chats)() for share in shares]
        return Joint(sources, [share.rows for share in shares], [share.weight for share in shares])

    return Run(
        name="flamingo",
        header=Header(
            command="torchrun --nproc-per-node 8 -m polymodal train recipes/flamingo.py --parallel ddp",
            machine="64 GPUs of 40 GB", time="not measured", expected="not run here",
        ),
        model=model,
        stages=[
            Stage(
                name="interleave", steps=steps, batch_size=batch_size, accumulate=accumulate, source=source, lr=lr,
                schedule=Constant(warmup=warmup), weight_decay=0.1, precision="auto",
            )
        ],
    )  # fmt: skip
