"""A checkpoint is never in memory twice: the peak of a load is little more than the weights themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.systems import TABLE
from tests.nano import NANO

# Prints the peak of resident memory that loading a folder and touching every weight adds, and the bytes of the weights.
SCRIPT = """
import json, re, sys
import torch, polymodal
import polymodal.systems.clip, polymodal.systems.siglip

def memory(what):  # not getrusage: its peak begins with that of the process that started this one
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def load(folder):
    model = polymodal.load(folder)
    for p in model.parameters():
        p.detach().sum()
    return model

load(sys.argv[1])  # a small one first: what is imported and cached by any load is not the weights
before = memory("VmRSS")
model = load(sys.argv[2])
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": memory("VmHWM") - before, "weights": weights}))
"""


def wide(name: str, hidden_dim: int) -> Any:
    """A system with few layers, whose weights can be large."""
    config = NANO[name]
    shape = {"dim": 512, "hidden_dim": hidden_dim, "activation": "gelu", "norm_eps": 1e-5}  # all formats can hold it
    return replace(config, vision=replace(config.vision, **shape), text=replace(config.text, **shape))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "how", "most"),
    [
        ("siglip", {}, 1.1),
        ("siglip", {"shard_bytes": 100 << 20}, 1.1),
        ("clip", {"format_name": "open_clip"}, 1.1),
        ("siglip", {"dtype": torch.bfloat16}, 1.6),  # the weights in fp32, and the file's pages at half their size
    ],
    ids=["one file", "shards", "split and transposed", "bf16"],
)
def test_a_checkpoint_is_never_in_memory_twice(name: str, how: dict[str, Any], most: float, tmp_path: Path) -> None:
    cls = TABLE[name].resolve()
    small, large = (
        cls.build(wide(name, hidden_dim)).save(tmp_path / str(hidden_dim), **how) for hidden_dim in (64, 20_000)
    )
    command = [sys.executable, "-c", SCRIPT, str(small), str(large)]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert done["weights"] > 300e6
    assert done["peak"] <= most * done["weights"], f"{done['peak'] / done['weights']:.2f} times the weights"
