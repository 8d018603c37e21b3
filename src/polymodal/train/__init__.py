"""The one training loop, its stages, checkpoints and adapters."""

from polymodal.train.dpo import DPO, Preference, Preferences, read_preference
from polymodal.train.grpo import GRPO, Prompts
from polymodal.train.loop import Result, fit
from polymodal.train.lora import add_lora, load_peft, merge_lora, save_peft
from polymodal.train.lora_files import load_lora
from polymodal.train.rl import Practice, Scenes
from polymodal.train.run import Bar, Constant, Cosine, Header, Linear, Run, Stage, load_run

__all__ = [
    "DPO",
    "GRPO",
    "Bar",
    "Constant",
    "Cosine",
    "Header",
    "Linear",
    "Practice",
    "Preference",
    "Preferences",
    "Prompts",
    "Result",
    "Run",
    "Scenes",
    "Stage",
    "add_lora",
    "fit",
    "load_lora",
    "load_peft",
    "load_run",
    "merge_lora",
    "read_preference",
    "save_peft",
]
