"""What packing rows saves: the share of padding, and the time of a training step, for lengths as of instruction data.

python -m benchmarks.bench_packing
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from benchmarks._report import machine, report
from polymodal.backbones.decoder import AttentionConfig, Decoder, DecoderConfig, Gated
from polymodal.core.packing import Packing
from polymodal.heads.lm import next_token_loss
from polymodal.nn.norm import RMS
from polymodal.nn.rope import Rope

ROWS, PICTURE, TEXT, LIMIT = 16, 64, 60, 512  # four in five rows have a picture; texts are log-normal
REPEATS = 5


def lengths(rng: np.random.Generator, rows: int) -> list[int]:
    text = np.exp(rng.normal(np.log(TEXT), 0.8, rows)).astype(int)
    return np.minimum(text + PICTURE * (rng.random(rows) < 0.8), LIMIT).tolist()


def valid(counts: list[int]) -> torch.Tensor:
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def main() -> None:
    figures = {"machine": machine(), "padding": {}}
    for rows in (ROWS, 64, 256):
        rng = np.random.default_rng(0)
        shares = [Packing.of(valid(lengths(rng, rows))).padding for _ in range(20)]
        before, after = (statistics.mean(each) for each in zip(*shares, strict=True))
        figures["padding"][f"{rows} rows"] = {"lone": round(before, 3), "packed": round(after, 3)}
    config = DecoderConfig(
        vocab_size=4000, context=LIMIT, dim=256, num_layers=6, mlp=Gated(hidden_dim=768), norm=RMS(), position=Rope(),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(config)
    model.init_weights()
    places = valid(lengths(np.random.default_rng(0), ROWS))
    ids = torch.randint(0, config.vocab_size, places.shape)
    labels = ids.masked_fill(~places, -100)

    def step() -> tuple[float, float]:
        began = time.process_time()  # of this process alone: the core is shared
        loss = next_token_loss(model(model.text(ids, places)).x, labels, model.logits).mean
        loss.backward()
        return time.process_time() - began, float(loss.detach())

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(REPEATS + 1):
        for packed in seconds:
            model.packed = packed
            model.zero_grad(set_to_none=True)
            took, loss = step()
            if repeat:  # the first warms up
                seconds[packed].append(took)
            figures.setdefault("loss", {})["packed" if packed else "lone"] = loss
    lone, together = (statistics.median(seconds[packed]) for packed in (False, True))
    before, after = Packing.of(places).padding
    figures["step"] = {
        "rows": ROWS, "padding_lone": round(before, 3), "padding_packed": round(after, 3),
        "cpu_seconds_lone": round(lone, 3), "cpu_seconds_packed": round(together, 3),
        "times": round(lone / together, 2),
    }  # fmt: skip
    report("packing", figures)


if __name__ == "__main__":
    main()
