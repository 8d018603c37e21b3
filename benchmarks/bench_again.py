"""The same picture again: time to the first token against that of the first time, through the engine.

    python -m benchmarks.bench_again [--rounds 5] [--dim 512] [--layers 12]

Bar: at most 1/5. A LLaVA of random weights whose tower dominates, as in real systems (576 patches of a 336 px picture;
half as wide and half as deep as CLIP-L by default) reads a file and a short question, from the file to the first token:
decoding, pre-processing and hashing take part. Each round takes a new picture, and asks of it

- something, for the first time;
- something else: prompt and picture begin alike, and are read no more (prefix cache);
- something behind other words: the language model reads all, the tower nothing (feature cache).

Times are CPU time of one thread, ratios those of the medians: what else runs on the machine takes no part.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

import polymodal
from benchmarks._report import machine, report
from polymodal.asking import ask, request
from polymodal.backbones.decoder import AttentionConfig, DecoderConfig, Gated
from polymodal.connectors.mlp import MLP
from polymodal.core.sample import Image
from polymodal.encoders.vit import ViTConfig
from polymodal.nn.feature_cache import FeatureCache
from polymodal.nn.norm import RMS
from polymodal.nn.rope import Rope
from polymodal.samplers.autoregressive import Settings
from polymodal.serve.engine import Engine
from polymodal.systems.generator import Generator
from polymodal.systems.llava import LlavaConfig
from polymodal.tokenizers.language import LanguageTokenizer

SIDE = 336
WORDS = ["what is it? which colour does it have? how many are there? look at this:"]
LM = {"dim": 256, "layers": 4}
FIRST, PREFIX, FEATURES = "first", "another question", "behind other words"


def build(dim: int, layers: int) -> Generator:
    words = LanguageTokenizer.train_bpe(WORDS * 20, 300)
    place = words.backend.token_to_id("<|image|>")
    assert place is not None
    heads = LM["dim"] // 64
    model = polymodal.build(
        LlavaConfig(
            vision_family="clip_vision_model", layers=layers - 1, connector=MLP(), family="llama", image_id=place,
            vision=ViTConfig(
                dim=dim, num_layers=layers, num_heads=dim // 64, hidden_dim=4 * dim, image_size=SIDE, patch_size=14,
                activation="quick_gelu", norm_eps=1e-5, patch_bias=False, pre_norm=True,
            ),
            backbone=DecoderConfig(
                vocab_size=words.vocab_size, context=1024, dim=LM["dim"], num_layers=LM["layers"], norm=RMS(),
                position=Rope(), mlp=Gated(hidden_dim=LM["dim"] * 11 // 4),
                attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=64),
            ),
        )
    )  # fmt: skip
    assert isinstance(model, Generator)
    model.use_tokenizer(words)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = build(arguments.dim, arguments.layers)
    settings = Settings(max_new_tokens=1)
    seconds: dict[str, list[float]] = {FIRST: [], PREFIX: [], FEATURES: []}
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.png") for number in range(arguments.rounds + 1)]
        for file in files:
            coarse = PILImage.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
            coarse.resize((640, 426), PILImage.Resampling.BICUBIC).save(file)
        model.feature_cache = FeatureCache(2**28)
        with Engine(model, model.tokenizer) as engine:

            def first_token(value: Any) -> tuple[str, float]:
                began = time.process_time()
                batch, (fitting,), _ = request(model, [value], settings)
                said = engine.submit(batch, fitting).result()[0].text
                return said, time.process_time() - began

            said = []
            for number, file in enumerate(files):
                for name, value in (
                    (FIRST, [Image(file), "what is it?"]),
                    (PREFIX, [Image(file), "how many are there?"]),
                    (FEATURES, ["look at this:", Image(file), "what is it?"]),
                ):
                    answer, took = first_token(value)
                    said.append((value, answer))
                    if number:  # the first round warms up
                        seconds[name].append(took)
            hits = engine.prefixes.hits if engine.prefixes else 0
        features, model.feature_cache = model.feature_cache.hits, None
        same = all(ask(model, value, settings) == answer for value, answer in said)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    report(
        "again",
        {
            "machine": machine(),
            "tower": {"parameters": sum(p.numel() for p in model.vision.parameters()), "patches": (SIDE // 14) ** 2},
            "language model": {"parameters": sum(p.numel() for p in model.backbone.parameters())},
            "threads": torch.get_num_threads(),
            "CPU seconds to the first token": {name: round(value, 4) for name, value in middle.items()},
            "another question / first": round(middle[PREFIX] / middle[FIRST], 3),
            "behind other words / first": round(middle[FEATURES] / middle[FIRST], 3),
            "prefixes found": f"{hits} of {len(files)}",
            "features found": f"{features} of {len(files)}",
            "first tokens equal those without caches": same,
        },
    )


if __name__ == "__main__":
    main()
