"""Stable Diffusion at six million parameters: the world of `draw`, painted by a U-Net in the latents of an autoencoder.

command   polymodal train recipes/nano/draw_unet.py --out runs/nano-unet
machine   1 CPU core with AVX512-BF16
time      not yet run to its end
expected  not trained to a number yet: as far as it was trained it painted objects, and did not heed the text; the bars
          are those of `draw`

Deviations from the paper: nothing is trained before. The autoencoder is this run's first stage, without discriminator
and perceptual distance, and begins as one that averages squares of four pixels (`averaging`). The text tower is not
CLIP's frozen one: it learns with the U-Net, from the error of its prediction. The velocity is predicted, and all steps
count alike: min-SNR's weights (Hang et al. 2023) are small where a text decides.
"""

from __future__ import annotations

from polymodal.backbones.unet import Level, Transformers, UNetConfig
from polymodal.core.drawing import Drawing
from polymodal.samplers.diffusion import Diffusion, DPMSolver
from polymodal.systems.stable_diffusion import StableDiffusion, StableDiffusionConfig
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

STEPS = (700, 12_000, 400)  # of the autoencoder, of the painter, of the autoencoder's decoder once more
ROWS = (16, 16, 16)
ASKED = 120  # texts of each kind
READ = Transformers(num_heads=4)
DRAWING = Drawing(steps=20, guidance=4.0, seed=0)


def config() -> StableDiffusionConfig:
    return StableDiffusionConfig(
        text=text_tower(),
        backbone=UNetConfig(
            levels=(Level(dim=64), Level(dim=96, transformers=READ), Level(dim=128, transformers=READ)), middle=READ,
            context_dim=DIM, num_blocks=1, side=SIDE // AUTOENCODER.pyramid.factor,
        ),
        vae=AUTOENCODER,
        sampling=Diffusion(prediction="velocity", solver=DPMSolver(), spacing="trailing"),
    )  # fmt: skip


def painter() -> StableDiffusion:
    made = StableDiffusion.build(config())
    made.text.requires_grad_(True)
    made.tokenizer = tokenizer()
    return made


def run(steps: tuple[int, int, int] = STEPS, rows: tuple[int, int, int] = ROWS, *, count: int = ASKED) -> Run:
    return drawing_run("unet", painter, stages(words, steps, rows), asked_both(count), DRAWING)
