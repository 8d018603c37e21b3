"""What the recipes on data of your own share: conversations on disk as the source of a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polymodal.core.chat import Chat
from polymodal.data.lessons import Lessons
from polymodal.data.loader import Source
from polymodal.systems.generator import Generator


def lessons(model: Callable[[], Generator], chats: Callable[[], Sequence[Chat]]) -> Callable[[], Source]:
    """Makes the source when its stage begins; the model is made for its tokenizer and processors alone."""
    return lambda: Lessons(chats(), model().to("meta").lesson)
