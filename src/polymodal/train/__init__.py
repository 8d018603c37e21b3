"""The one training loop, its stages, checkpoints and adapters."""

from polymodal.train.loop import Result, fit
from polymodal.train.lora import add_lora, load_peft, merge_lora, save_peft
from polymodal.train.run import Bar, Constant, Cosine, Header, Linear, Run, Stage, load_run

__all__ = [
    "Bar",
    "Constant",
    "Cosine",
    "Header",
    "Linear",
    "Result",
    "Run",
    "Stage",
    "add_lora",
    "fit",
    "load_peft",
    "load_run",
    "merge_lora",
    "save_peft",
]
