"""The shipped polymodal/nano-clip: CLIP of 3.75 million parameters on pictures that people drew for other purposes.

It knows emoji, icons and simple shapes by their names and keywords in seven languages (en de fr es it pt nl); it does
not know photographs.

command   polymodal train recipes/nano/clip.py --out runs/nano-clip
machine   2 CPU cores with AVX512-BF16
time      three hours
expected  see `expect` below; chance stands beside each bar
"""

from __future__ import annotations

from functools import partial

from torch import nn

from polymodal.encoders.text import TextConfig
from polymodal.encoders.vit import ViTConfig
from polymodal.modalities.image import CLIP_MEAN, CLIP_STD, Exact, ImageProcessor
from polymodal.systems.clip import CLIP, CLIPConfig
from polymodal.train.run import Bar, Cosine, Header, Run, Stage
from recipes.nano.pictures import CONTEXT, SIZE, Captions, Forms, Questions, Shapes, tokenizer

STEPS = (2000, 1300, 1700, 900)


def config(vocab_size: int) -> CLIPConfig:
    return CLIPConfig(
        vision=ViTConfig(
            image_size=SIZE, patch_size=8, dim=192, num_layers=5, num_heads=4, hidden_dim=768, norm_eps=1e-5,
            activation="quick_gelu", patch_bias=False, pre_norm=True,
        ),
        text=TextConfig(
            vocab_size=vocab_size, context=CONTEXT, dim=128, num_layers=4, num_heads=4, hidden_dim=512,
            activation="quick_gelu",
        ),
        embed_dim=128, eot_id=vocab_size - 1,
    )  # fmt: skip


def model() -> nn.Module:
    words = tokenizer()
    clip = CLIP.build(config(words.vocab_size))
    clip.tokenizer = words
    return clip


IMAGES = ImageProcessor(resize=Exact(height=SIZE, width=SIZE), mean=CLIP_MEAN, std=CLIP_STD)


def pictures(kind: type[Captions]) -> Captions:
    return kind(images=IMAGES, tokenizer=tokenizer())


def evaluate(clip: nn.Module) -> dict[str, float]:
    return Questions(clip).ask()


def run(steps: tuple[int, int, int, int] = STEPS, batch_size: int = 256) -> Run:
    stage = partial(
        Stage, batch_size=batch_size, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-6, precision="auto", workers=1
    )
    return Run(
        name="nano-clip",
        header=Header(
            command="polymodal train recipes/nano/clip.py --out runs/nano-clip",
            machine="2 CPU cores with AVX512-BF16", time="three hours", expected="the bars of `expect`",
        ),
        model=model,
        stages=[
            stage(
                name="contrast", steps=steps[0], source=partial(pictures, Captions), lr=1e-3, ema=0.999,
                schedule=Cosine(warmup=min(200, steps[0] // 10)),
            ),
            stage(
                name="form", steps=steps[1], source=partial(pictures, Forms), lr=7e-4, ema=0.995,
                schedule=Cosine(warmup=min(50, steps[1] // 10)),
            ),
            stage(
                name="shape", steps=steps[2], source=partial(pictures, Shapes), lr=7e-4, ema=0.995,
                schedule=Cosine(warmup=min(50, steps[2] // 10)),
            ),
            stage(
                name="again", steps=steps[3], source=partial(pictures, Shapes), lr=5e-4, ema=0.995,
                schedule=Cosine(warmup=min(50, steps[3] // 10)),
            ),
        ],
        evaluate=evaluate,
        evaluate_every=max(steps[0] // 2, 1),
        # Set before the first run from sketches a fortieth as long (another model, the same kinds of question).
        expect={
            "concepts/r10": Bar(value=0.35, chance=0.10),
            "symbola/r10": Bar(value=0.20, chance=0.01),
            "seen/r10": Bar(value=0.80, chance=0.01),
            "combinations/tone": Bar(value=0.85, chance=0.20),
            "shapes/colour": Bar(value=0.80, chance=0.083),
            "shapes/shape": Bar(value=0.80, chance=0.07),
            "language ca/r10": Bar(value=0.15, chance=0.01),
        },
    )  # fmt: skip
