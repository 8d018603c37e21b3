"""A conversation: turns of parts, as a user, a file or an OpenAI-style client writes it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, cast, get_args

from polymodal.core.errors import MediaError, did_you_mean
from polymodal.core.sample import Image, Part, Sample, Text, Video

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


def kind_of(part: Part) -> str:
    """``"text"``, ``"image"`` ...: the word that chat templates use for a part."""
    return type(part).__name__.lower()


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant asks for, e.g. ``ToolCall("weather", {"city": "Oslo"})``."""

    name: str
    arguments: dict[str, Any]
    id: str = field(default="", kw_only=True)


def tool_call(name: Any, arguments: Any, call_id: Any = "") -> ToolCall:
    """A call of what a model or a file says; a `MediaError` if it is none."""
    if not isinstance(name, str) or not name:
        raise MediaError(f"a tool call needs the name of a tool, not {name!r}")
    if not isinstance(arguments, dict):
        raise MediaError(f"the arguments of {name} are an object, not {type(arguments).__name__}")
    return ToolCall(name, arguments, id=_word("id", call_id))


@dataclass(frozen=True)
class Turn:
    """What one side says, in order."""

    role: Role
    parts: tuple[Part, ...]
    calls: tuple[ToolCall, ...] = field(default=(), kw_only=True)  # of an assistant
    name: str = field(default="", kw_only=True)  # of the tool that answers
    call_id: str = field(default="", kw_only=True)  # of the call that the tool answers

    def __post_init__(self) -> None:
        if self.calls and self.role != "assistant":
            raise MediaError(f"only the assistant calls tools, not the {self.role}")

    @property
    def text(self) -> str:
        """The turn's texts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Chat:
    """Turns, and the tools that the assistant may call (JSON schemas as OpenAI's ``tools``)."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not self.turns:
            raise MediaError("a chat needs at least one turn")
        try:
            json.dumps(self.tools)
        except (TypeError, ValueError, RecursionError) as error:
            raise MediaError(f"tools are JSON objects: {error}") from None

    @classmethod
    def of(cls, value: Any) -> Chat:
        """Makes a chat of a chat, of messages, or of anything that `Sample.of` takes (one turn of the user).

        Messages are dicts as OpenAI's: ``{"role": "user", "content": "text" or [part, ...]}``, where a part is
        ``{"type": "text", "text": ...}``, ``{"type": "image", "image": path, bytes, PIL image or array}``,
        ``{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}``, the same with video, or what
        `Sample.of` takes.
        Assistants may have ``tool_calls``. ``{"messages": [...], "tools": [...]}`` is a chat with tools.

        A path in an ``image`` part is opened when somebody looks at the picture: of strangers take ``image_url`` parts
        alone, which hold the bytes. Nothing is ever downloaded.

        Raises:
            MediaError: the value is none of these; the message says which one of the messages.
        """
        if isinstance(value, Chat):
            return value
        if isinstance(value, Mapping) and "messages" in value:
            unknown = value.keys() - {"messages", "tools"}
            if unknown:
                raise MediaError(f"a chat has messages and tools, not {', '.join(map(repr, sorted(unknown, key=str)))}")
            messages, tools = value["messages"], value.get("tools") or ()
            if not isinstance(messages, list | tuple) or not isinstance(tools, list | tuple):
                raise MediaError("the messages and the tools of a chat are lists")
            if not all(isinstance(message, Mapping | Turn) for message in messages):
                raise MediaError("a message is an object with a role and a content")
            if not all(isinstance(tool, Mapping) for tool in tools):
                raise MediaError("tools are JSON objects, as OpenAI's")
            return cls(tuple(_turn(i, message) for i, message in enumerate(messages)), tuple(tools))
        if isinstance(value, Mapping):
            return cls((_turn(0, value),))
        if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping | Turn) for item in value):
            return cls(tuple(_turn(i, message) for i, message in enumerate(value)))
        return cls((Turn("user", Sample.of(value).parts),))

    def parts(self, kind: str) -> list[Part]:
        """All parts of a kind (``"text"``, ``"image"`` ...) in their order."""
        return [part for turn in self.turns for part in turn.parts if kind_of(part) == kind]

    @property
    def images(self) -> list[Image]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Image)]

    def reply(self, text: str, calls: Sequence[ToolCall] = ()) -> Chat:
        """The chat with a turn of the assistant added."""
        return replace(self, turns=(*self.turns, Turn("assistant", (Text(text),), calls=tuple(calls))))

    def ask(self, value: Any) -> Chat:
        """The chat with turns added: a user's, of anything that `Sample.of` takes, or messages."""
        return replace(self, turns=(*self.turns, *Chat.of(value).turns))


# ---- messages ----

_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id"}
_MEDIA: dict[str, type[Image] | type[Video]] = {"image": Image, "video": Video}
_IGNORED = {"refusal", "audio", "annotations", "function_call"}  # of OpenAI's answers, when they are null or empty


def _turn(i: int, message: Mapping[str, Any] | Turn) -> Turn:
    if isinstance(message, Turn):
        return message
    try:
        return _read_turn(message)
    except MediaError as error:
        raise MediaError(f"message {i + 1}: {error}") from None


def _read_turn(message: Mapping[str, Any]) -> Turn:
    for name, value in message.items():
        if name not in _FIELDS and (name not in _IGNORED or value):
            raise MediaError(f"the field {name!r} is not known{did_you_mean(str(name), _FIELDS)}")
    role = message.get("role")
    role = "system" if role == "developer" else role  # OpenAI's newer word for it
    if role not in ROLES:
        raise MediaError(f"{role!r} is no role{did_you_mean(str(role), ROLES)}")
    calls = message.get("tool_calls") or ()
    content = message.get("content")
    if content is None and not calls:
        raise MediaError("it has no content")
    if not isinstance(calls, list | tuple):
        raise MediaError("tool_calls is a list")
    return Turn(
        cast(Role, role),
        _parts(content),
        calls=tuple(map(_call, calls)),
        name=_word("name", message.get("name")),
        call_id=_word("tool_call_id", message.get("tool_call_id")),
    )


def _parts(content: Any) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Text(content),)
    if not isinstance(content, list | tuple):
        raise MediaError(f"content is a str or a list of parts, not {type(content).__name__}")
    return tuple(p for item in content for p in ([_part(item)] if isinstance(item, Mapping) else Sample.of(item).parts))


def _part(item: Mapping[str, Any]) -> Part:
    kind = str(item.get("type"))
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise MediaError(f"a part of the type text has a str under 'text', not {type(item.get('text')).__name__}")
        return Text(item["text"])
    if kind in _MEDIA:
        sources = [item[name] for name in (kind, "path", "url", "base64") if item.get(name) is not None]
        if len(sources) != 1:
            raise MediaError(f"a part of the type {kind} has its {kind} under {kind!r}: a path, bytes, pixels")
        return _MEDIA[kind](_decoded(sources[0]) if "base64" in item else _located(sources[0]))
    if kind in ("image_url", "video_url"):
        url = item.get(kind)
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str) or not url.startswith("data:"):
            raise MediaError(f"an {kind} is a data: URL, not {str(url)[:60]!r}; nothing is downloaded")
        return _MEDIA[kind.removesuffix("_url")](_located(url))
    known = ("text", *_MEDIA, "image_url", "video_url")
    raise MediaError(f"a part of the type {kind!r} is not known{did_you_mean(kind, known)}")


def _located(source: Any) -> Any:
    if not isinstance(source, str):
        return source
    if source.startswith(("http://", "https://")):
        raise MediaError(f"{source[:60]!r} is not downloaded; pass the file or its bytes")
    if not source.startswith("data:"):
        return source
    head, comma, body = source.partition(",")
    if not comma or not head.endswith(";base64"):
        raise MediaError(f"{source[:40]!r}... is no data: URL in base64")
    return _decoded(body)


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise MediaError(f"the picture or clip is not valid base64: {error}") from None


def _call(item: Any) -> ToolCall:
    function = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping):
        raise MediaError("a tool call is an object with a function, its name and its arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes them as text
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise MediaError(f"the arguments of {function.get('name')} are not JSON: {error}") from None
    return tool_call(function.get("name"), arguments, item.get("id"))


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str | None):
        raise MediaError(f"{name} is a str, not {type(value).__name__}")
    return value or ""
