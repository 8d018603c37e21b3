"""LLaVA 1.5 or 1.0 on pictures and conversations of your own: align the connector, then instruct.

command   torchrun --nproc-per-node 8 -m polymodal train recipes/llava.py --parallel fsdp
machine   8 GPUs of 80 GB
time      the official run of 7B: 3.5 hours to align, 10 to instruct, on 8 A100
expected  not run here at full size; tests run it at nano size

Papers: Liu et al. 2023, arXiv 2304.08485 (1.0) and 2310.03744 (1.5); code: haotian-liu/LLaVA, scripts/v1_5. In both
stages the tower is frozen, weight decay is zero, the schedule a cosine after a warm-up of 3 % of the steps.

Other data, another tower or language model: a file of your own with

    from functools import partial
    from recipes import llava
    from polymodal.data.readers import open_dataset

    def run():
        return llava.run(
            model=partial(llava.model, vision="google/siglip-base-patch16-224", backbone="Qwen/Qwen2.5-0.5B-Instruct"),
            align=partial(open_dataset, "captions.jsonl"),
            instruct=partial(open_dataset, "chats.jsonl", root="pictures"),
            numbers=llava.Numbers(steps=(500, 2000), batch_sizes=(32, 16)),
        )

Deviations: captions stand behind their question in the chat template, of which the official code leaves both away;
pictures are cropped as the tower's processor says, where that of 1.5 pads them to a square; a text longer than the
context is refused, where the official code cuts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polymodal
from polymodal.connectors.mlp import MLP, Linear
from polymodal.core.chat import Chat
from polymodal.data.readers import open_dataset
from polymodal.systems.base import System
from polymodal.systems.composed import Composed
from polymodal.train import Cosine, Header, Run, Stage
from recipes.sources import lessons

Chats = Callable[[], Sequence[Chat]]
CAPTIONS = "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
CONVERSATIONS, PICTURES = "data/llava_v1_5_mix665k.json", "data"


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Of align and instruct; by default those of LLaVA 1.5 on its 558,128 and 665,298 rows."""

    steps: tuple[int, int] = (2180, 5197)
    batch_sizes: tuple[int, int] = (256, 128)
    lrs: tuple[float, float] = (1e-3, 2e-5)
    accumulate: int = 1


V1_5 = Numbers()
V1_0 = Numbers(steps=(4651, 14785), batch_sizes=(128, 32), lrs=(2e-3, 2e-5))  # 595,375 rows; 157,712 three times


def model(
    vision: str | System = "openai/clip-vit-large-patch14-336",
    connector: MLP | Linear = MLP(),  # noqa: B008  # frozen; 1.0: Linear() and openai/clip-vit-large-patch14
    backbone: str | System = "lmsys/vicuna-7b-v1.5",
) -> Composed:
    """A trained tower and a trained language model with a fresh connector between them."""
    made = polymodal.compose(vision=vision, connector=connector, backbone=backbone)
    assert isinstance(made, Composed)
    return made


def captions() -> Sequence[Chat]:
    return open_dataset(CAPTIONS)


def conversations() -> Sequence[Chat]:
    return open_dataset(CONVERSATIONS, root=PICTURES)


def run(
    *,
    model: Callable[[], Composed] = model,
    align: Chats = captions,
    instruct: Chats = conversations,
    numbers: Numbers = V1_5,
) -> Run:
    names, sources = ("align", "instruct"), (align, instruct)
    trainable = ({"connector": 1.0}, {"connector": 1.0, "backbone": 1.0})
    return Run(
        name="llava",
        header=Header(
            command="torchrun --nproc-per-node 8 -m polymodal train recipes/llava.py --parallel fsdp",
            machine="8 GPUs of 80 GB", time="3.5 and 10 hours (official, 7B on 8 A100)", expected="not run here",
        ),
        model=model,
        stages=[
            Stage(
                name=names[i], steps=numbers.steps[i], batch_size=numbers.batch_sizes[i], lr=numbers.lrs[i],
                schedule=Cosine(warmup=round(0.03 * numbers.steps[i])), trainable=trainable[i], precision="auto",
                accumulate=numbers.accumulate, source=lessons(model, sources[i]),
            )
            for i in range(2)
        ],
    )  # fmt: skip
