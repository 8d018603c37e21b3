"""Decoding speed against transformers: the same weights, the same prompt, in one run.

    python -m benchmarks.bench_decode [--tokens 64] [--rounds 3] [--dim 1024] [--layers 24]

Bars: one stream in fp32 >= transformers' greedy `generate`; int8 >= 3x it; 8 streams >= 4x the tokens of one.
A Llama of random weights (300M parameters with the defaults, about the least that people talk to), saved by
transformers, loaded by both, answers a prompt of 32 tokens greedily, the reading of the prompt included. ``packed`` is
fp32 with the weights laid out as oneDNN reads them (`polymodal.nn.packed`), as commands have them. All take turns
on one thread, and the ratios are those of the medians of CPU time: what else runs on the machine takes no part. What
int8 costs is given as the error of the scores along a greedy answer; random weights have no text to be worse at.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks._report import machine, report
from polymodal.api import load
from polymodal.core.batch import Batch
from polymodal.nn.packed import pack
from polymodal.nn.quantise import quantise_int8
from polymodal.samplers.autoregressive import Completion, Settings, complete
from polymodal.serve.engine import Engine
from polymodal.systems.language import LanguageModel
from polymodal.tokenizers.language import LanguageTokenizer

PROMPT, STREAMS = 32, 8


def compare(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, measured in turn so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for warm in [True, *[False] * rounds]:
        for name, work in works.items():
            began = time.process_time()
            work()
            if not warm:
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tokens, dim = arguments.tokens, arguments.dim
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=dim, intermediate_size=dim * 11 // 4, num_hidden_layers=arguments.layers,
        num_attention_heads=dim // 64, num_key_value_heads=dim // 128, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
        ours = load(Path(folder))
    assert isinstance(ours, LanguageModel)
    small = copy.deepcopy(ours)
    quantise_int8(small)
    packed = copy.deepcopy(ours)
    pack(packed)
    words = LanguageTokenizer.train_bpe(["a language of few words"], 300)
    ids = torch.randint(1, 8192, (STREAMS, PROMPT))
    one, all_ = (Batch(ids=x, valid=torch.ones_like(x, dtype=torch.bool)) for x in (ids[:1], ids))
    settings = Settings(max_new_tokens=tokens)

    def answer(model: LanguageModel, batch: Batch) -> list[Completion]:
        return complete(model, batch, settings, words)

    def reference() -> Any:
        return theirs.generate(
            ids[:1], attention_mask=torch.ones_like(ids[:1]), do_sample=False, max_new_tokens=tokens
        )[0, PROMPT:].tolist()

    with Engine(packed, words) as engine:

        def submitted() -> list[Completion]:
            handles = [engine.submit(all_.rows(i, i + 1), settings) for i in range(STREAMS)]
            return [handle.result()[0] for handle in handles]

        seconds = compare(
            {
                "transformers": reference,
                "fp32": lambda: answer(ours, one),
                "int8": lambda: answer(small, one),
                "fp32, 8 streams": lambda: answer(ours, all_),
                "int8, 8 streams": lambda: answer(small, all_),
                "packed": lambda: answer(packed, one),
                "packed, 8 streams": lambda: answer(packed, all_),
                "packed, 8 streams in the engine": submitted,
            },
            arguments.rounds,
        )
        greedy = answer(ours, one)[0].ids
        same = [a.ids for a in submitted()] == [answer(packed, all_.rows(i, i + 1))[0].ids for i in range(STREAMS)]
    rate = {name: tokens * (STREAMS if "8 streams" in name else 1) / s for name, s in seconds.items()}
    path = torch.tensor([[*ids[0].tolist(), *greedy]])
    exact, rough = (model(Batch(ids=path))[0, PROMPT:] for model in (ours, small))
    divergence = (exact.softmax(-1) * (exact.log_softmax(-1) - rough.log_softmax(-1))).sum(-1)
    figures = {
        "machine": machine(),
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "threads": torch.get_num_threads(),
        "tokens read, written": [PROMPT, tokens],
        "tokens per CPU second": {name: round(r, 1) for name, r in rate.items()},
        "fp32 / transformers": round(rate["fp32"] / rate["transformers"], 3),
        "int8 / transformers": round(rate["int8"] / rate["transformers"], 3),
        "int8 / fp32": round(rate["int8"] / rate["fp32"], 3),
        "8 streams / one, fp32": round(rate["fp32, 8 streams"] / rate["fp32"], 3),
        "8 streams / one, int8": round(rate["int8, 8 streams"] / rate["int8"], 3),
        "packed / transformers": round(rate["packed"] / rate["transformers"], 3),
        "8 streams / one, packed": round(rate["packed, 8 streams"] / rate["packed"], 3),
        "8 streams in the engine / one, packed": round(rate["packed, 8 streams in the engine"] / rate["packed"], 3),
        "greedy tokens equal transformers": greedy == reference(),
        "greedy tokens equal alone and in the engine": same,
        "int8: relative error of the scores": round(float((rough - exact).norm() / exact.norm()), 5),
        "int8: mean divergence (nats)": round(float(divergence.mean()), 6),
        "int8: same best token": round(float((rough.argmax(-1) == exact.argmax(-1)).float().mean()), 4),
    }
    report("decode", figures)


if __name__ == "__main__":
    main()
