"""BLIP-2, second stage: the Q-Former of the first one learns to speak to a frozen language model.

command   torchrun --nproc-per-node 16 -m polymodal train recipes/blip2/stage2.py --parallel ddp
machine   16 GPUs of 40 GB
time      the official run with ViT-g and Flan-T5 XXL: less than three days, on 16 A100
expected  not run here at full size; tests run it at nano size

Paper: Li et al. 2023, arXiv 2301.12597, section 3.4; code: salesforce/LAVIS, projects/blip2/train. The whole Q-Former,
the tower's last norm and a fresh linear layer learn; the schedule falls to half of its peak. It begins with what
``recipes/blip2/stage1.py`` has left in ``runs/blip2-stage1/model``.

Deviations: pictures are resized and not cropped at random nor mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import polymodal
from polymodal.backbones.decoder import Decoder, DecoderConfig
from polymodal.backbones.encdec import EncDec
from polymodal.backbones.families import ControlIds
from polymodal.core.chat import Chat
from polymodal.data.readers import open_dataset
from polymodal.data.rows import lesson
from polymodal.systems.base import System
from polymodal.systems.blip2 import BLIP2, BLIP2Config
from polymodal.systems.blip2_qformer import BLIP2QFormer
from polymodal.systems.language import LanguageModel
from polymodal.systems.t5 import T5
from polymodal.tokenizers.language import LanguageTokenizer
from polymodal.train import Cosine, Header, Run, Stage
from recipes.blip2.stage1 import CAPTIONS, PICTURES
from recipes.sources import lessons


def model(first: str | Path = "runs/blip2-stage1/model", backbone: str | System = "facebook/opt-2.7b") -> BLIP2:
    """The tower and the Q-Former of the first stage, and a trained language model."""
    stage1 = polymodal.load(first)
    text = polymodal.load(backbone) if isinstance(backbone, str) else backbone
    assert isinstance(stage1, BLIP2QFormer)
    assert isinstance(text, LanguageModel | T5)
    assert isinstance(text.tokenizer, LanguageTokenizer)
    words: Decoder | EncDec = text.backbone
    made = BLIP2.build(
        BLIP2Config(
            vision=stage1.config.vision, qformer=replace(stage1.config.qformer, text=None),
            family=text.config.family if isinstance(text, LanguageModel) else "t5", backbone=words.config,
            image_id=text.tokenizer.vocab_size,
            control=text.config.control if isinstance(text, LanguageModel) else ControlIds(stop=text.config.stop),
        )
    )  # fmt: skip
    assert isinstance(made, BLIP2)
    made.vision.load_state_dict(stage1.vision.state_dict())
    learned, ours = stage1.qformer.state_dict(), made.connector.qformer
    ours.load_state_dict({name: learned[name] for name in ours.state_dict()})
    made.backbone.load_state_dict(words.state_dict())
    made.images = stage1.images
    made.use_tokenizer(text.tokenizer)
    if isinstance(words.config, DecoderConfig):  # a caption ends in a new line
        made.stop_ids = (text.tokenizer.encode("\n", special=False)[-1], *made.stop_ids)
    return made


def captions() -> Sequence[Chat]:
    return open_dataset(CAPTIONS, root=PICTURES, read=partial(lesson, prompt=""))


def run(
    *,
    model: Callable[[], BLIP2] = model,
    chats: Callable[[], Sequence[Chat]] = captions,
    steps: int = 80_000,
    batch_size: int = 1920,
    warmup: int = 2000,
    lr: float = 1e-4,
) -> Run:
    return Run(
        name="blip2-stage2",
        header=Header(
            command="torchrun --nproc-per-node 16 -m polymodal train recipes/blip2/stage2.py --parallel ddp",
            machine="16 GPUs of 40 GB", time="under three days (official, 16 A100)", expected="not run here",
        ),
        model=model,
        stages=[
            Stage(
                name="generate", steps=steps, batch_size=batch_size, source=lessons(model, chats), lr=lr,
                schedule=Cosine(warmup=warmup, final=0.5), weight_decay=0.05, betas=(0.9, 0.98), clip=None,
                precision="auto",
            )
        ],
    )  # fmt: skip
