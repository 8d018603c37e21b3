"""What a row of a data set means: a conversation to learn from, or media and their caption."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from polymodal.core.chat import Chat
from polymodal.core.errors import DataError, did_you_mean
from polymodal.core.sample import Image, Sample, Video

DESCRIBE: Final = "Describe this picture in one sentence."
_TALKS: Final = ("messages", "conversations")
_MEDIA: Final = {"image": Image, "images": Image, "video": Video, "videos": Video}
_SPEAKERS: Final = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
_MARKER: Final = re.compile(r"\n*<(image|video)>\n*")


@dataclass(frozen=True)
class Stored:
    """A medium inside an archive or a table; ``name`` is what it is called there."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class Media:
    """Finds what rows say of their media.

    Args:
        root: the folder under which paths lie.
        checking: look whether files are there, and read none of the media.
    """

    root: Path
    checking: bool = False
    known: dict[str, bool] = field(default_factory=dict)  # paths that were looked up

    def __call__(self, kind: type[Image | Video], value: Any) -> Image | Video | dict[str, Any]:
        """A medium, or the part of a message that `Chat.of` decodes.

        Raises:
            DataError: it is no path below the root, or there is no such file, or nothing that media are.
        """
        if isinstance(value, Stored):
            return kind(b"" if self.checking else value.read(), name=value.name)
        if isinstance(value, Mapping):  # of tables of the Hub
            name = value.get("path") or ""
            if (content := value.get("bytes")) is not None:
                if not isinstance(content, bytes):  # a text would be opened as a path, wherever it leads
                    raise DataError(f"the bytes of a {kind.__name__.lower()} are bytes, not {content!r:.60}")
                return kind(content, name=name if isinstance(name, str) else "")
            value = value.get("path") or value.get("url")
        if isinstance(value, bytes):
            return kind(value)
        if not isinstance(value, str) or not value:
            raise DataError(f"a {kind.__name__.lower()} is a path, a data: URL or bytes, not {value!r:.60}")
        if value.startswith("data:"):
            what = f"{kind.__name__.lower()}_url"
            return {"type": what, what: {"url": value}}
        return kind(self.path(value), name=value)

    def path(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if "://" in name:
            raise DataError(f"{name!r:.80} is not downloaded: put the file below {self.root} and name it from there")
        if not inside(name):
            raise DataError(f"{name!r:.80} leaves the folder of the media, {self.root}: name files from there")
        path = self.root / pure
        if self.checking and name not in self.known:
            try:
                self.known[name] = path.is_file()
            except OSError:  # a name that is too long
                self.known[name] = False
        if not self.known.get(name, True):
            raise DataError(f"{name!r:.120} is not in {self.root}")
        return path


def inside(name: str) -> bool:
    """Whether a name stays in the folder that it is looked up in, on every system."""
    pure, windows = PurePosixPath(name), PureWindowsPath(name)
    parts = {*pure.parts, *windows.parts}
    return bool(pure.name) and not pure.is_absolute() and not windows.anchor and ".." not in parts and "\0" not in name


def lesson(row: Any, media: Media, prompt: str = DESCRIBE) -> Chat:
    """The conversation of a row, in which a user speaks first and the assistant last.

    A row is an object with one of these, or a list of messages itself:

    - ``messages`` (or ``conversations``): ``{"role": "user", "content": ...}`` as `Chat.of` takes them, or
      ``{"from": "human", "value": ...}`` as LLaVA and ShareGPT write them; with ``system`` and ``tools`` if it has any
    - ``question`` and ``answer``, or ``answers``, of which the most frequent is learned
    - ``caption``, or ``text``: the answer to ``prompt``

    Media lie under ``image``, ``images``, ``video`` or ``videos``. Their places are ``<image>`` and ``<video>`` in what
    a user says, or parts of that type without a source; without any place they come first.

    Raises:
        DataError: the row is none of these, or its media are not those of its places.
        MediaError: a message is not what `Chat.of` takes.
    """
    row = {_TALKS[0]: row} if isinstance(row, list) else _object(row)
    queues = _Queues(row, media)
    read = [_message(each, queues, media) for each in _messages(row, prompt, bool(queues.left()))]
    left = queues.left()
    if left:
        if queues.placed:
            raise DataError(f"{queues.placed + len(left)} media, of which {len(left)} have no place in what is said")
        first = next((message for message in read if message["role"] == "user"), None)
        if first is None:
            raise DataError("it has media, and no user speaks")
        first["content"] = [*left, *first["content"]]
    chat = Chat.of({"messages": read, "tools": row.get("tools") or ()})
    if chat.turns[-1].role != "assistant" or chat.turns[0].role == "assistant":
        raise DataError("a user should speak first and the assistant last")
    return chat


def sample(row: Any, media: Media) -> Sample:
    """The media of a row and its caption if it has one: what embeds, or learns to.

    Raises:
        DataError: the row has neither, or is a conversation.
    """
    row = _object(row)
    if (talk := next((name for name in (*_TALKS, "question") if row.get(name) is not None), None)) is not None:
        raise DataError(f"it has {talk!r}: read conversations as lessons")
    said = _first(row, "caption", "text")
    parts = [*_Queues(row, media).left(), *([] if said is None else [_text(said)])]
    if not parts:
        raise DataError(f"it has no medium and no caption: {_names(row)}")
    return Sample(Chat.of([{"role": "user", "content": parts}]).turns[0].parts)


class _Queues:
    """The media of a row in their order; each place takes the next of its kind."""

    def __init__(self, row: Mapping[str, Any], media: Media) -> None:
        self.placed = 0  # media that have a place in what is said
        self._next: dict[str, list[Any]] = {"image": [], "video": []}
        for name, kind in _MEDIA.items():
            values = row.get(name)
            values = values if isinstance(values, list | tuple) else [] if values is None else [values]
            self._next[kind.__name__.lower()] += [media(kind, value) for value in values]

    def take(self, kind: str) -> Any:
        if not self._next[kind]:
            raise DataError(f"more places for {kind}s than the row has {kind}s")
        self.placed += 1
        return self._next[kind].pop(0)

    def left(self) -> list[Any]:
        return [*self._next["image"], *self._next["video"]]


def _messages(row: Mapping[str, Any], prompt: str, shown: bool) -> list[Any]:
    talk, asked, said = _first(row, *_TALKS), row.get("question"), _first(row, "caption", "text")
    if talk is not None:
        if not isinstance(talk, list) or not talk:
            raise DataError(f"its messages are a list that is not empty, not {talk!r:.60}")
        system = row.get("system")
        return [{"role": "system", "content": system}, *talk] if system else talk
    if asked is not None:
        answer = row.get("answer")
        return _exchange(_text(asked), majority(row.get("answers")) if answer is None else answer)
    if said is not None:
        if not shown:
            raise DataError("it is a text with no medium that it is a caption of")
        return _exchange(prompt, said)
    raise DataError(f"it has no messages, question or caption: {_names(row)}")


def _exchange(asked: str, answer: Any) -> list[Any]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(answer)}]


def majority(answers: Any) -> str:
    """The most frequent of several people's answers, the first of those where there are more.

    Raises:
        DataError: they are no list of texts, or of objects with a text under ``answer``, or there is none.
    """
    if not isinstance(answers, list | tuple) or not answers:
        raise DataError(f"answers are a list that is not empty, not {answers!r:.60}")
    said = [_text(each.get("answer") if isinstance(each, Mapping) else each) for each in answers]
    return Counter(said).most_common(1)[0][0]


def _message(message: Any, queues: _Queues, media: Media) -> dict[str, Any]:
    """A message as `Chat.of` takes it, its media in their places."""
    given = {name: value for name, value in _object(message).items() if value is not None}
    who = given.pop("from", None) or given.pop("role", None)
    if not isinstance(who, str) or who not in _SPEAKERS:
        raise DataError(f"nobody is called {who!r:.40}{did_you_mean(str(who)[:40], _SPEAKERS)}")
    role = _SPEAKERS[who]
    said = given.pop("value", None) if "value" in given else given.pop("content", None)
    if said is None and not given.get("tool_calls"):
        raise DataError(f"a message of the {role} says nothing")
    if isinstance(said, str):
        content = list(_placed(said, queues)) if role == "user" else [said]
    elif isinstance(said, list):
        content = [read for part in said for read in _part(part, role, queues, media)]
    elif said is None:
        content = []
    else:
        raise DataError(f"a message is a text or a list of parts, not {said!r:.60}")
    return {**given, "role": role, "content": content}


def _placed(text: str, queues: _Queues) -> Iterator[Any]:
    pieces = _MARKER.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            yield queues.take(piece)
        elif piece or len(pieces) == 1:
            yield piece


def _part(part: Any, role: str, queues: _Queues, media: Media) -> list[Any]:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if isinstance(text, str):
        return list(_placed(text, queues)) if role == "user" else [text]
    part = {name: value for name, value in _object(part).items() if value is not None}
    kind = str(part.get("type"))
    base = kind.removesuffix("_url")
    if base not in ("image", "video") or "base64" in part:
        return [part]
    source = _first(part, kind, base, "path", "url")
    if kind != base and isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        return [queues.take(base)]
    queues.placed += 1
    return [media(_MEDIA[base], source)]


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"it should be an object, not {value!r:.60}")
    return dict(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"it should be a text that is not empty, not {value!r:.60}")
    return value


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _names(row: Mapping[str, Any]) -> str:
    return f"it has {', '.join(map(str, row)) or 'nothing'}"
