"""What `plan` says of time against what this machine takes: ratios, one thread.

    python -m benchmarks.bench_plan [--rounds 5]

Bar: within 25 %. The machine is measured first. Models of random weights read prompts and pictures, write, and train;
their time is the least CPU time of some runs, as that of the measured rates: what else runs on the machine only adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image as PILImage

import polymodal
from benchmarks._report import machine, report
from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated
from polymodal.backbones.families import ControlIds
from polymodal.connectors.mlp import MLP
from polymodal.core.batch import Batch
from polymodal.core.sample import Image, Sample
from polymodal.encoders.vit import ViTConfig
from polymodal.heads.lm import IGNORE
from polymodal.machine import calibrate
from polymodal.nn.norm import RMS
from polymodal.nn.packed import pack
from polymodal.nn.precision import cast
from polymodal.nn.quantise import quantise_int8
from polymodal.nn.rope import Rope
from polymodal.plan import DType, Input, price, prompt
from polymodal.systems.llava import LlavaConfig

DECODER = DecoderConfig(
    vocab_size=16000, context=1024, dim=512, num_layers=8, mlp=Gated(hidden_dim=1408), norm=RMS(), position=Rope(),
    attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64),
)  # fmt: skip
MODEL = LlavaConfig(
    vision_family="siglip_vision_model", layers=6, connector=MLP(), family="llama", backbone=DECODER, image_id=15999,
    control=ControlIds(start=1, stop=(2,)),
    vision=ViTConfig(
        dim=384, num_layers=6, num_heads=6, hidden_dim=1536, image_size=224, patch_size=16, class_token=False,
        activation="gelu_tanh",
    ),
)  # fmt: skip


def seconds(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of the fastest run."""
    work()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def writer(dtype: DType, given: Input, rounds: int) -> dict[str, float]:
    """Predicted over measured time of reading a prompt with a picture and of a token in the middle of the answer."""
    plan = price(MODEL, given, dtype=dtype)
    model: Any = cast(polymodal.build(MODEL).eval(), "bf16" if dtype == "bf16" else "fp32")
    if dtype == "int8":
        quantise_int8(model)
    else:
        pack(model)
    batch = prompt(model, given, {})
    length, rows = batch["ids"].shape[1], given.batch

    def prefill() -> None:
        model.prefill(batch, model.new_memory(rows, length + given.new))

    memory = model.new_memory(rows, length + given.new)

    def step() -> None:
        memory.lengths = [length + given.new // 2] * rows
        model.step(torch.zeros(rows, dtype=torch.int64), memory)

    with torch.no_grad():
        real = {"prefill": seconds(prefill, rounds), "step": seconds(step, 8 * rounds)}
    return {name: (plan.phases[name].seconds or 0.0) / took for name, took in real.items()}


def trainer(given: Input, rounds: int) -> float:
    plan, model = price(MODEL, given, train=True), polymodal.build(MODEL)
    batch = prompt(model, replace(given, text=given.text + given.new), {})
    labels = batch["ids"].clone()
    labels[:, : -given.new] = IGNORE
    batch = Batch(batch | {"labels": labels})

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(batch).mean.backward()  # type: ignore[operator]

    return (plan.phases["train"].seconds or 0.0) / seconds(step, rounds)


def embedder(given: Input, rounds: int) -> float:
    name = "polymodal/nano-clip"
    plan, model = price(name, given), pack(polymodal.load(name))
    batch = model.prepare_images([Sample((Image(PILImage.new("RGB", (640, 480))),))] * given.batch)  # type: ignore[operator]
    with torch.no_grad():
        return (plan.phases["pictures"].seconds or 0.0) / seconds(lambda: model.encode(batch), 4 * rounds)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    about = machine()
    rates = calibrate()
    one, four = Input(text=32, new=32), Input(text=32, new=32, batch=4)
    ratios: dict[str, float] = {}
    for dtype in ("fp32", "bf16", "int8"):
        for given in (one, four):
            for phase, ratio in writer(dtype, given, rounds).items():
                ratios[f"{phase}, {dtype}, batch {given.batch}"] = round(ratio, 3)
    ratios["training step, fp32"] = round(trainer(one, rounds), 3)
    ratios["nano-clip, 8 pictures"] = round(embedder(Input(batch=8), rounds), 3)
    worst = max(abs(ratio - 1) for ratio in ratios.values())
    report(
        "plan",
        {
            "machine": about,
            "predicted over measured": ratios,
            "worst": round(worst, 3),
            "bar": 0.25,
            "call": rates.call,
        },
    )


if __name__ == "__main__":
    main()
