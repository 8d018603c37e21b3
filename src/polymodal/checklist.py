"""The field's checklist: output, encoder, fusion, resolution and token budget, action, evaluation; and what follows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from polymodal.core.errors import ConfigError, UnsupportedError, did_you_mean
from polymodal.nn.skeleton import skeleton
from polymodal.plan import Input, Plan, presets, price
from polymodal.systems import TABLE

_HALF = 2  # bytes of a weight in bf16


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to decide; the first option is the default."""

    key: str
    ask: str
    options: Mapping[str, str]


QUESTIONS: Final = (
    Question(
        key="output", ask="What should come out?",
        options=MappingProxyType({
            "text": "answers or captions in words", "vectors": "vectors, to find and compare things",
            "classes": "which of some labels that you name", "actions": "motions of a robot, or clicks",
        }),
    ),
    Question(
        key="input", ask="What goes in, most of the time?",
        options=MappingProxyType({
            "photos": "photographs", "documents": "pages, charts, screens: small print, any aspect", "clips": "video",
            "words": "text alone",
        }),
    ),
    Question(
        key="goal", ask="What matters more?",
        options=MappingProxyType({"quality": "the best that fits", "speed": "the fewest parameters"}),
    ),
)  # fmt: skip

# Systems by output and input, best first; those that are not in the table are passed over.
_SYSTEMS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("text", "photos"): ("qwen2_5_vl", "qwen2_vl", "llava", "paligemma", "blip2"),
    ("text", "documents"): ("qwen2_5_vl", "qwen2_vl", "llava_next", "paligemma"),
    ("text", "clips"): ("qwen2_5_vl", "qwen2_vl", "llava_next"),
    ("text", "words"): ("language",),
    ("vectors", "photos"): ("siglip", "clip"),
    ("vectors", "documents"): ("siglip2", "siglip"),
    ("vectors", "clips"): ("siglip", "clip"),
    ("classes", "photos"): ("siglip", "clip"),
    ("classes", "documents"): ("siglip2", "siglip"),
    ("classes", "clips"): ("siglip", "clip"),
}
_INPUTS: Final = {
    "photos": Input(), "documents": Input(images=((1240, 1754),)), "clips": Input(frames=32), "words": Input(text=256),
}  # fmt: skip
_ENCODERS: Final = {
    "photos": "a ViT of fixed size: photographs lose little when they are resized to a square",
    "documents": "a tower that keeps the aspect and the pixels: small print does not survive a square of 336 pixels",
    "clips": "a tower for frames; one that joins two frames to a patch halves the tokens",
    "words": "none: a tokenizer feeds the backbone",
}
_EVALUATIONS: Final = {
    ("text", "photos"): "POPE (invented objects), VQA accuracy, CIDEr and CHAIR of captions",
    ("text", "documents"): "ANLS on pages, relaxed accuracy on charts, characters read",
    ("text", "clips"): "questions whose answer is at a known time, by its place in the clip",
    ("text", "words"): "exact match on questions of your own",
}


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A system of the table, the size that fits, its price, and a reason for each step of the checklist."""

    system: str
    preset: str
    steps: tuple[tuple[str, str], ...]
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        return {"system": self.system, "preset": self.preset, "steps": dict(self.steps), "plan": self.plan.to_json()}

    def text(self) -> str:
        width = max(len(step) for step, _ in self.steps)
        lines = [f"{self.preset}: {TABLE[self.system].paper}", ""]
        return "\n".join([*lines, *(f"  {step:<{width}}  {why}" for step, why in self.steps)])


def recommend(answers: Mapping[str, str], memory: float | int) -> Recommendation:
    """What to build on.

    Args:
        answers: to `QUESTIONS`, by key; what is left out is the default.
        memory: GiB that weights, cache and activations may take, in bf16.

    Raises:
        ConfigError: an answer is none of the options, or nothing fits into the memory.
        UnsupportedError: no system of the table does this.
    """
    known = {question.key: question.options for question in QUESTIONS}
    for key, value in answers.items():
        if key not in known:
            raise ConfigError(f"the checklist does not ask for {key!r}{did_you_mean(key, known)}")
        if value not in known[key]:
            raise ConfigError(f"{key}: {value!r} is not an option{did_you_mean(value, known[key])}")
    chosen = {key: answers.get(key, next(iter(options))) for key, options in known.items()}
    output, kind, goal = chosen["output"], chosen["input"], chosen["goal"]
    if output == "actions":
        raise UnsupportedError("no system of the table acts yet: choose text, and let a program act on the answer")
    names = [name for name in _SYSTEMS.get((output, kind), ()) if name in TABLE]
    if not names:
        raise UnsupportedError(f"no system of the table makes {output} of {kind}")
    system, preset, count = _fitting(names, memory, smallest=goal == "speed")
    plan = price(preset, _INPUTS[kind] if output == "text" else replace(_INPUTS[kind], frames=0), dtype="bf16")
    if plan.peak > memory * 2**30:
        raise ConfigError(f"{preset} would take {plan.peak / 2**30:.1f} GiB with such an input, more than {memory:g}")
    return Recommendation(
        system=system, preset=preset, plan=plan, steps=_steps(output, kind, goal, memory, count, plan)
    )


@functools.cache
def _size(preset: str) -> int:
    """Parameters."""
    cls, make = presets()[preset]
    with skeleton():
        return sum(p.numel() for p in cls(make()).parameters())


def _fitting(names: list[str], memory: float | int, *, smallest: bool) -> tuple[str, str, int]:
    """System, preset and parameters: of the best system of which a size fits the largest, or the smallest of all."""
    room, least, fit = memory * 2**30, float("inf"), []
    for name in names:
        sizes = []
        for preset, (cls, _) in presets().items():
            if cls is not TABLE[name].resolve():
                continue
            count = _size(preset)
            least = min(least, count)
            if _HALF * count < room:
                sizes.append((count, preset))
        if sizes and not smallest:
            count, preset = max(sizes)
            return name, preset, count
        fit += [(count, preset, name) for count, preset in sizes]
    if not fit:
        raise ConfigError(f"nothing fits into {memory:g} GiB: the smallest takes {_HALF * least / 2**30:.1f} in bf16")
    count, preset, name = min(fit)
    return name, preset, count


def _steps(
    output: str, kind: str, goal: str, memory: float | int, count: int, plan: Plan
) -> tuple[tuple[str, str], ...]:
    if output != "text":
        fusion = "none: pictures and texts meet in one space, so vectors can be made ahead and kept in an index"
    elif kind == "words":
        fusion = "none: there is one modality"
    else:
        fusion = "a connector puts the features among the tokens of a decoder, which keeps the decoder's own abilities"
    media = sum(n for name, n in plan.tokens.items() if name.startswith(("picture", "clip")))
    budget = f"{media:,} tokens of media" if media else f"{plan.tokens.get('text', 0):,} tokens"
    if "context" in plan.tokens and output == "text":
        budget += f" of a context of {plan.tokens['context']:,}"
    budget += f"; {count / 1e6:,.0f} M parameters, {plan.peak / 2**30:.1f} of {memory:g} GiB in bf16"
    evaluation = _EVALUATIONS.get((output, kind), "recall at 1, 5 and 10 both ways, and zero-shot accuracy")
    return (
        ("output", dict(QUESTIONS[0].options)[output]),
        ("encoder", _ENCODERS[kind]),
        ("fusion", fusion),
        ("resolution and tokens", budget + (", the smallest that fits" if goal == "speed" else ", the best that fits")),
        ("action", "none"),
        ("evaluation", evaluation + "; a blind run and one with shuffled pictures beside it"),
    )
