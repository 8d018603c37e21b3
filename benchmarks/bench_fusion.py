"""Native against late fusion: the same questions about the same pictures of shapes, at the same compute, three seeds.

Native is Chameleon: a picture is codes of a VQGAN in the vocabulary of one decoder. Late is the composition of a tower,
a connector and a decoder of the same shape. Both read 64 tokens a picture, see the same pictures and questions in the
same order, and learn answers alone. The training of the VQGAN, which sees those pictures, too, is part of native's
compute; the hidden layers of the tower are as wide as makes late's total the same. Operations are counted on real
steps. ``shuffled`` asks about pictures of other questions: what is left is what a guess is worth.

python -m benchmarks.bench_fusion [--steps 500] [--seeds 3] [--asked 200]

writes results/fusion.json and results/fusion.md. Intervals: of a mean over seeds by Student's t, at 95 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._report import RESULTS, machine, report
from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated
from polymodal.backbones.families import ControlIds
from polymodal.connectors.mlp import MLP
from polymodal.core.batch import IGNORE, Batch, padded, text_batch
from polymodal.core.files import atomic_write
from polymodal.data.worlds import questions, shapes
from polymodal.encoders.vit import ViTConfig
from polymodal.modalities.image import HALF, Exact, ImageProcessor
from polymodal.nn.norm import RMS, Heads
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings, complete
from polymodal.systems.chameleon import Chameleon
from polymodal.systems.chameleon_files import ChameleonConfig
from polymodal.systems.composed import Composed, ComposedConfig
from polymodal.systems.generator import Generator
from polymodal.systems.vqgan import VQGAN
from polymodal.tokenizers.pyramid import PyramidConfig
from polymodal.tokenizers.vq import AveragedCodes, VQConfig
from polymodal.train import fit
from polymodal.train.run import Cosine, Header, Run, Stage
from recipes.nano.asked import tokenizer

SIDE, PATCH, CODES = 32, 4, 256
TOKENS: Final = (SIDE // PATCH) ** 2
KINDS: Final = ("colour", "shape", "existence", "count", "relation")
TURNS, BATCH = 4, 32  # questions of a picture, pictures of a step
CODEC_SHARE = 0.3  # steps of the VQGAN for each of the decoder
IMAGES = ImageProcessor(resize=Exact(height=SIDE, width=SIDE), mean=HALF, std=HALF)
T95: Final = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a mean of so many


# ---- pictures and questions


def pair(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        found = str(rng.choice([*shapes.COLOURS])), str(rng.choice(shapes.SHAPES))
        if found not in shapes.HELD_OUT:
            return found


def scene(rng: np.random.Generator) -> shapes.Scene:
    """One to three objects that are large enough for so few pixels."""
    kinds = [pair(rng) for _ in range(rng.integers(1, 4))]
    return shapes.arrange(kinds, rng, sizes_of=("medium", "large"), materials=("plain",))


def asked(found: shapes.Scene, rng: np.random.Generator, kinds: Sequence[str]) -> list[tuple[str, str]]:
    each = [questions.ask(found, rng, kind=kind) for kind in kinds]
    return [*dict.fromkeys((one.question, one.answer) for one in each if one is not None)]


@lru_cache(maxsize=100_000)
def ids(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text, special=False))


def mark(name: str) -> int:
    found = tokenizer().backend.token_to_id(name)
    assert found is not None
    return found


@dataclass(frozen=True)
class Scenes:
    """New scenes; number ``i`` is the same picture with the same questions for every model."""

    seed: int

    def __len__(self) -> int:
        return 1_000_000

    def draw(self, index: int) -> tuple[torch.Tensor, list[tuple[str, str]]]:
        rng = np.random.default_rng([self.seed, index])
        found = scene(rng)
        return pixels([found])[0], asked(found, rng, [str(rng.choice(KINDS)) for _ in range(TURNS)])

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        return Batch(pixels=torch.stack([self.draw(i)[0] for i in indices]))


@dataclass(frozen=True)
class Lessons(Scenes):
    """The same as rows: what stands for the picture, then questions and their answers, which are learned."""

    picture: tuple[int, ...]

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        drawn = [self.draw(i) for i in indices]
        ask, end = mark("<|im_start|>"), mark("<|im_end|>")
        rows, labels = [], []
        for _, said in drawn:
            row, label = [*self.picture], [IGNORE] * len(self.picture)
            for question, answer in said:
                row += [*ids(question), ask, *ids(answer), end]
                label += [*[IGNORE] * (len(ids(question)) + 1), *ids(answer), end]
            rows.append(row)
            labels.append(label)
        return Batch(text_batch(rows), labels=padded(labels, fill=IGNORE), **media([p for p, _ in drawn]))


def pixels(found: Sequence[shapes.Scene]) -> torch.Tensor:
    drawn = np.stack([shapes.render(each, SIDE) for each in found])
    return IMAGES.normalise(torch.from_numpy(drawn).permute(0, 3, 1, 2))


def media(pictures: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    number = torch.arange(len(pictures))
    return {
        "pixels": torch.stack([*pictures]), "pixels_row": number, "frames": torch.ones_like(number),
        "frames_row": number,
    }  # fmt: skip


# ---- the two


def decoder(vocab_size: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size, context=256, dim=128, num_layers=3, mlp=Gated(hidden_dim=384), norm=RMS(),
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=32, qk_norm=Heads()), position=Rope(),
    )  # fmt: skip


def codec() -> VQGAN:
    net = PyramidConfig(widths=(32, 32, 64), num_blocks=1, latent_dim=64, middle_attention=False)
    return VQGAN.build(VQConfig(net=net, codes=AveragedCodes(size=CODES, dim=16), resolution=SIDE))


def native(vision: VQGAN) -> Chameleon:
    words, control = tokenizer().vocab_size, ControlIds(stop=tokenizer().eos_ids)
    config = ChameleonConfig(
        backbone=decoder(words + CODES + 2), vision=vision.config, code_ids=tuple(range(words, words + CODES)),
        image_id=words + CODES + 2, start_id=words + CODES, end_id=words + CODES + 1, control=control,
    )  # fmt: skip
    model = Chameleon.build(config)
    model.vision.load_state_dict(vision.codec.state_dict())
    return model


def late(hidden_dim: int) -> Composed:
    tower = ViTConfig(
        image_size=SIDE, patch_size=PATCH, dim=128, num_layers=4, num_heads=4, hidden_dim=hidden_dim, class_token=False
    )
    words, image = tokenizer().vocab_size, mark("<|image|>")
    control = ControlIds(stop=tokenizer().eos_ids)
    return Composed.build(
        ComposedConfig(vision=tower, connector=MLP(), backbone=decoder(words), image_id=image, control=control)
    )


def standing(model: Generator) -> tuple[int, ...]:
    """The ids of a picture in a row."""
    assert model.media_id is not None
    row = (model.media_id,) * TOKENS
    return (model.config.start_id, *row, model.config.end_id) if isinstance(model, Chameleon) else row


# ---- compute


def operations(model: nn.Module, batch: Batch) -> int:
    """Of a training step, a forward and a backward pass, by torch's own counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train().loss(batch).mean.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def matched(steps: int, codec_steps: int) -> tuple[int, dict[str, float]]:
    """The width of late's tower at which both cost the same, and what they cost in all."""
    some = range(8)
    vision, first = codec(), late(128)
    tokenised = native(vision)
    rows = [Lessons(0, standing(model)).batch(some, np.random.default_rng(0)) for model in (tokenised, first)]
    spent = {
        "VQGAN": codec_steps * operations(vision, Scenes(0).batch(some, np.random.default_rng(0))),
        "decoder": steps * operations(tokenised, rows[0]),
    }
    budget = sum(spent.values())
    least, more = (steps * operations(model, rows[1]) for model in (first, late(256)))
    width = 128 + max(-7, round(8 * (budget - least) / (more - least))) * 16
    total = steps * operations(late(width), rows[1])
    assert abs(total / budget - 1) < 0.05, f"{total} operations of late, {budget} of native: not at the same compute"
    scale = BATCH / len(some)
    return width, {"native": budget * scale, "VQGAN of it": spent["VQGAN"] * scale, "late": total * scale}


# ---- learning and asking


def learned(make: Callable[[], nn.Module], source: Scenes, steps: int, seed: int, lr: float) -> nn.Module:
    stage = Stage(
        name="learn", steps=steps, batch_size=BATCH, source=lambda: source, lr=lr, weight_decay=0.05,
        betas=(0.9, 0.95), schedule=Cosine(warmup=min(50, steps // 4)), precision="auto", workers=0,
    )  # fmt: skip
    header = Header(
        command="python -m benchmarks.bench_fusion", machine="1 CPU core", time="minutes", expected="a table"
    )
    with tempfile.TemporaryDirectory() as folder:
        return fit(Run(name="fusion", header=header, model=make, stages=[stage], seed=seed), folder, device="cpu").model


@torch.inference_mode()
def answered(model: Generator, kind: str, count: int, *, shuffled: bool = False) -> list[bool]:
    """Whether each of so many questions about new scenes is answered right, word for word."""
    rng, found = np.random.default_rng([99, KINDS.index(kind)]), list[tuple[shapes.Scene, str, str]]()
    while len(found) < count:
        drawn = scene(rng)
        found += [(drawn, *one) for one in asked(drawn, rng, [kind])]
    seen = pixels([one[0] for one in found])
    seen = seen.roll(1, 0) if shuffled else seen
    text = model.interleaved(6, most={"image": 0}) if isinstance(model, Chameleon) else None
    settings, right = Settings(max_new_tokens=6, constraint=text), list[bool]()
    for start in range(0, count, 50):
        few = found[start : start + 50]
        batch = text_batch([[*standing(model), *ids(question), mark("<|im_start|>")] for _, question, _ in few])
        batch = Batch(batch, **media([*seen[start : start + 50]]))
        said = complete(model, batch, settings, tokenizer())
        right += [one.text.strip() == answer for one, (_, _, answer) in zip(said, few, strict=True)]
    return right


def trial(seed: int, steps: int, codec_steps: int, width: int, count: int) -> dict[str, Any]:
    """Both trained with one seed: the share of right answers to each kind, and what it took."""
    out: dict[str, Any] = {}
    for name in ("native", "late"):
        began = time.process_time()
        if name == "native":
            vision = learned(codec, Scenes(seed), codec_steps, seed, 2e-3)
            assert isinstance(vision, VQGAN)
            model = learned(partial(native, vision), Lessons(seed, standing(native(vision))), steps, seed, 2e-3)
        else:
            model = learned(partial(late, width), Lessons(seed, standing(late(width))), steps, seed, 2e-3)
        assert isinstance(model, Generator)
        out[name] = {
            "cpu_seconds": round(time.process_time() - began),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for shuffled in (False, True):
            shares = {kind: statistics.mean(answered(model.eval(), kind, count, shuffled=shuffled)) for kind in KINDS}
            out[name]["shuffled" if shuffled else "right"] = shares | {"all": statistics.mean(shares.values())}
    return out


# ---- the table


def interval(values: Sequence[float]) -> str:
    """A mean over seeds in per cent, with its interval."""
    mean = 100 * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} ± {half:.1f}"


def table(trials: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| questions | native | late | native - late | native, shuffled | late, shuffled |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        right = {name: [each[name]["right"][kind] for each in trials] for name in ("native", "late")}
        apart = [a - b for a, b in zip(right["native"], right["late"], strict=True)]
        blind = [[each[name]["shuffled"][kind] for each in trials] for name in ("native", "late")]
        lines.append(f"| {kind} | " + " | ".join(map(interval, (*right.values(), apart, *blind))) + " |")
    return "\n".join(lines)


def compare(steps: int, seeds: int, count: int) -> dict[str, Any]:
    codec_steps = max(1, round(CODEC_SHARE * steps))
    width, compute = matched(steps, codec_steps)
    figures = {
        "machine": machine(), "steps": steps, "codec_steps": codec_steps, "pictures": steps * BATCH, "asked": count,
        "tower_hidden_dim": width, "operations": compute,
    }  # fmt: skip
    trials = [trial(seed, steps, codec_steps, width, count) for seed in range(seeds)]
    return {**figures, "trials": trials, "table": table(trials).splitlines()}


def main() -> None:
    parser = argparse.ArgumentParser(description="native against late fusion")
    for name, default in (("steps", 500), ("asked", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, default=3, choices=(1, *T95))
    options = parser.parse_args()
    figures = compare(options.steps, options.seeds, options.asked)
    report("fusion", figures)
    atomic_write(RESULTS / "fusion.md", "\n".join(figures["table"]) + "\n")


if __name__ == "__main__":
    main()
