"""Stable Diffusion 3 at six million parameters: the world of `draw`, painted by a flow and a Transformer.

command   polymodal train recipes/nano/draw_flow.py --out runs/nano-flow
machine   1 CPU core with AVX512-BF16
time      not yet run to its end
expected  not trained to a number yet: the bars are those of `draw`

Deviations from the paper: nothing is trained before. Both text towers learn with the flow, and there is no T5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from polymodal.backbones.mmdit import CentreCrop, MMDiTConfig
from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing
from polymodal.data.worlds.prompts import Prompt
from polymodal.nn.norm import RMS
from polymodal.samplers.flow import Flow
from polymodal.systems.sd3 import SD3, SD3Config
from polymodal.train.run import Run
from recipes.nano.painted import (
    AUTOENCODER,
    DIM,
    SIDE,
    asked_both,
    drawing_run,
    stages,
    text_tower,
    tokenizer,
    words,
)

DRAWING = Drawing(steps=20, guidance=4.0, seed=0)


def painter() -> SD3:
    side, dim, tower = SIDE // AUTOENCODER.pyramid.factor // 2, 192, replace(text_tower(), embed_dim=DIM)
    backbone = MMDiTConfig(
        values=16, out_values=16, dim=dim, num_layers=5, num_heads=6, hidden_dim=4 * dim, context_dim=2 * DIM,
        pooled_dim=2 * DIM, position=CentreCrop(side=side, base=side), qk_norm=RMS(),
    )  # fmt: skip
    config = SD3Config(
        clip=tower, clip_large=tower, t5=None, backbone=backbone, vae=AUTOENCODER, sampling=Flow(), t5_tokens=1,
        side=side,
    )  # fmt: skip
    made = SD3.build(config)
    for part in (made.clip, made.clip_large):
        part.requires_grad_(True)
    made.tokenizer = made.tokenizer_large = tokenizer()
    return made


def both(wanted: Sequence[Prompt], pixels: Tensor) -> Batch:
    """The same ids for both towers."""
    read = words(wanted, pixels)
    return Batch(read, large_ids=read["ids"])


def run(
    steps: tuple[int, int, int] = (700, 6000, 400), rows: tuple[int, int, int] = (16, 32, 16), *, count: int = 120
) -> Run:
    todo = stages(both, steps, rows, trainable=["painter.clip", "painter.clip_large", "painter.backbone"])
    return drawing_run("flow", painter, todo, asked_both(count), DRAWING)
