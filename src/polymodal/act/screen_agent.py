"""A model that chats about pictures as the user of a screen: it sees the picture, is told the task, and writes an act.

What it writes is parsed by the strict grammar of `envs.web.actions`, and nothing else is ever done with it. Places are
in the picture that the model saw, and are put back through whatever resized, cropped or padded it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32, UInt8

from polymodal.act.envs.web.actions import KEYS, WAIT, MalformedAction, Point, ScreenAction, parse, to_vector
from polymodal.core.observation import Observation
from polymodal.modalities.image import View, Views
from polymodal.modalities.marks import BoxTokens, Brackets, JsonPixels, Notation

Picture: TypeAlias = UInt8[np.ndarray, "height width 3"]
Chat: TypeAlias = Callable[[Picture, str], str]
Unit: TypeAlias = Literal["parts", "thousandths", "pixels"]

_UNITS: Final[dict[Unit, tuple[Notation, str, str]]] = {
    "parts": (Brackets(), "parts of the picture's width and height, from 0 to 1", "click(0.31, 0.52)"),
    "thousandths": (BoxTokens(), "thousandths of the picture's width and height", "click(310, 520)"),
    "pixels": (JsonPixels(), "pixels of the picture, which is {width} wide and {height} high", "click(62, 109)"),
}
_PROMPT: Final = """\
The picture is a screen. Your task on it: {task}

Do one of these:
click(x, y), double_click(x, y), right_click(x, y), move(x, y)
drag(x, y, x2, y2)
scroll(dx, dy): notches of the wheel where the pointer is, to the right and down
type('text'): into what has the focus
press('key'): one of {keys}
wait()
Here x and y are {places}, counted from the upper left corner.
{history}
Write the next action as the last line of your answer, for example: {example}"""


class ScreenAgent:
    """A controller for the closed loop (`act.runner`) out of any model that answers a picture and a text with a text.

    With a model of this library, Qwen2.5-VL for one, which counts in pixels of what its processor makes:

        ScreenAgent(lambda seen, prompt: ask(model, [Image(seen), prompt]), unit="pixels", views=model.images)

    Attributes:
        asked: how often the model was asked, second tries included.
        malformed: how many of its answers were no action.

    Args:
        chat: gives the model's answer to a picture and a prompt.
        unit: how the model counts places.
        views: where what the model sees lies in the picture, such as its image processor; None: it sees all of it.
        camera: which picture it is shown.
        memory: its last acts that it is told of.
    """

    def __init__(
        self, chat: Chat, *, unit: Unit = "parts", views: Views | None = None, camera: str = "screen", memory: int = 8
    ) -> None:
        self._chat, self._views, self._camera, self._memory = chat, views, camera, memory
        self._notation, self._places, self._example = _UNITS[unit]
        self.asked = self.malformed = 0
        self._done: list[str] = []

    def reset(self) -> None:
        """An episode begins."""
        self._done = []

    def action(self, observation: Observation) -> Float32[np.ndarray, " action_dim"]:
        """`next_action` as numbers."""
        return to_vector(self.next_action(observation))

    def next_action(self, observation: Observation) -> ScreenAction:
        """What the model does now. It is asked once more where its answer is no action, and then it waits."""
        picture = observation.images[self._camera]
        height, width = picture.shape[:2]
        whole = View(original=(width, height), seen=(width, height), scale=(1.0, 1.0), offset=(0.0, 0.0))
        view = whole if self._views is None else self._views.view(width, height)
        prompt = self._prompt(observation.instruction, view)
        place = partial(_place, notation=self._notation, view=view)
        chosen, written, complaint = WAIT, str(WAIT), ""
        for _ in range(2):
            self.asked += 1
            line = last_line(self._chat(picture, prompt + complaint))
            try:
                found = parse(line, place)
                to_vector(found)  # a text that is longer than a vector cannot be done, either
                chosen, written = found, line
                break
            except MalformedAction as e:
                self.malformed += 1
                complaint = f"\n\nYour last answer was no action: {e}. Write one action as the last line."
        self._done.append(written)
        return chosen

    def _prompt(self, task: str, view: View) -> str:
        width, height = view.seen
        lately = "\n".join(self._done[-self._memory :])
        return _PROMPT.format(
            task=task,
            keys=", ".join(KEYS),
            places=self._places.format(width=width, height=height),
            history=f"You did so far:\n{lately}" if lately else "You did nothing so far.",
            example=self._example,
        )


def last_line(answer: str) -> str:
    """Where the action stands in an answer; without "Action:" before it or backquotes around it."""
    lines = [line.strip("` \t") for line in answer[-4000:].splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    return re.sub(r"^action:", "", last, flags=re.IGNORECASE).strip("` \t")


def _place(point: Point, *, notation: Notation, view: View) -> Point:
    x, y = notation.place(point, view)
    width, height = view.original
    return x / width, y / height
