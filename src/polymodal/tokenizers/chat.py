"""Chats to prompts by the template of a checkpoint, and tool calls out of answers.

A template is a program that came from outside. It runs in jinja2's sandbox, sees nothing but JSON values, and every
character that it makes and every turn of its loops is charged to a budget *before* it is made.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from polymodal.core.chat import Chat, ToolCall, Turn, kind_of, tool_call
from polymodal.core.errors import ConfigError, MediaError
from polymodal.core.files import atomic_write, read_json
from polymodal.core.sample import Text
from polymodal.tokenizers.language import MARK, Guard, LanguageTokenizer, read_tokenizer_config
from polymodal.tokenizers.text import quoted

MAX_TEMPLATE = 200_000  # characters; the longest of the Hub have some 20,000


@dataclass(frozen=True)
class Placeholder:
    """What stands for a picture or a clip in a prompt: one token, and the text that frames it.

    The frame is written where the template wants a turn as one string. Templates that go through the parts of a turn
    write their own.
    """

    token: str
    before: str = field(default="", kw_only=True)
    after: str = field(default="", kw_only=True)

    @property
    def text(self) -> str:
        return self.before + self.token + self.after


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template as checkpoints of the Hub have it.

    ``media`` is the system's to say: what stands for an image, a video. ``tokens`` are the names that a template may
    write, such as ``bos_token``. ``with_tools`` is the template for chats with tools where the checkpoint has two.
    """

    source: str
    media: Mapping[str, Placeholder] = field(default_factory=dict, kw_only=True)
    tokens: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    with_tools: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for source in (self.source, self.with_tools or ""):
            _compiled(source)  # errors of syntax now, not in the first chat

    @classmethod
    def of(cls, tokenizer: LanguageTokenizer, *, media: Mapping[str, Placeholder] | None = None) -> ChatTemplate:
        """The template in the configuration of a tokenizer."""
        templates = _listed(tokenizer.config.get("chat_template"), "the tokenizer's configuration")
        return cls._chosen(templates, media or {}, tokenizer.tokens, "the tokenizer")

    @classmethod
    def from_folder(cls, folder: str | Path, *, media: Mapping[str, Placeholder] | None = None) -> ChatTemplate:
        """Reads ``chat_template.jinja`` (with ``additional_chat_templates/``), else ``chat_template.json``, else the
        ``chat_template`` of ``tokenizer_config.json``.

        Raises:
            ConfigError: there is none, or it is broken.
        """
        found = cls.find(folder, media=media)
        if found is None:
            raise ConfigError(
                f"{folder} has no chat template: it was not trained to chat, or the template is to be given"
            )
        return found

    @classmethod
    def find(cls, folder: str | Path, *, media: Mapping[str, Placeholder] | None = None) -> ChatTemplate | None:
        """The same, or None where a folder has no template.

        Raises:
            ConfigError: there is one, and it is broken.
        """
        folder = Path(folder)
        config = read_tokenizer_config(folder)
        text, wrapped = folder / "chat_template.jinja", folder / "chat_template.json"
        if text.is_file():
            more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
            templates = {"default": _read(text), **{path.stem: _read(path) for path in more}}
        elif wrapped.is_file():
            read = read_json(wrapped)
            templates = _listed(read.get("chat_template") if isinstance(read, dict) else read, str(wrapped))
        else:
            templates = _listed(config.get("chat_template"), str(folder / "tokenizer_config.json"))
        tokens = {n: t if isinstance(t, str) else t["content"] for n, t in config.items() if _names_token(n, t)}
        if not templates:
            return None
        return cls._chosen(templates, media or {}, tokens, str(folder))

    def save(self, folder: str | Path) -> None:
        """Writes ``chat_template.jinja``, and the template for chats with tools where there is another."""
        folder = Path(folder)
        atomic_write(folder / "chat_template.jinja", self.source)
        if self.with_tools is not None:
            atomic_write(folder / "additional_chat_templates" / "tool_use.jinja", self.with_tools)

    @classmethod
    def _chosen(
        cls, templates: Mapping[str, str], media: Mapping[str, Placeholder], tokens: Mapping[str, str], where: str
    ) -> ChatTemplate:
        if "default" not in templates:
            raise ConfigError(
                f"{where} has no chat template: it was not trained to chat, or the template is to be given"
            )
        return cls(templates["default"], media=media, tokens=tokens, with_tools=templates.get("tool_use"))

    # -- prompts --

    def render(
        self, chat: Chat, *, add_generation_prompt: bool = True, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The prompt as text. For a model use `tokenize`: here a typed control token looks like the template's own.

        Args:
            chat: what was said.
            add_generation_prompt: with the beginning of the assistant's turn.
            tools: in place of the chat's.

        Raises:
            MediaError: the template refuses the chat (e.g. two turns of the user in a row), or has no place for a part.
            ConfigError: the template fails, or does what no template may.
        """
        tools = chat.tools if tools is None else tools
        return self._run([self._message(turn) for turn in chat.turns], list(tools), add_generation_prompt)

    def tokenize(self, chat: Chat, tokenizer: LanguageTokenizer, *, add_generation_prompt: bool = True) -> list[int]:
        """The prompt as ids, with one placeholder token for each picture and clip.

        Control tokens and placeholders in what was typed, by users, systems and tools, are spelled out. So are the
        special ones in turns of the assistant, whose ``<think>`` and ``<tool_call>`` marks are read as the template's.

        Raises:
            MediaError: as `render`; or a text is none, see `LanguageTokenizer.encode`.
            ConfigError: as `render`; or a placeholder is no token, or the prompt has more or fewer than the chat has
                media.
        """
        placeholders = {kind: self._placeholder_id(kind, tokenizer) for kind in self.media}
        names = [placeholder.token for placeholder in self.media.values()]
        own = tokenizer.guard(names)  # for the assistant's turns
        typed = tokenizer.guard([*names, *self._written(tokenizer, bool(chat.tools))])
        plain = True

        def hidden(value: Any, guard: Guard) -> Any:
            nonlocal plain
            if isinstance(value, str):
                plain = plain and guard.is_plain(value)
                return guard.hide(value)
            if isinstance(value, Mapping):
                return {hidden(key, guard): hidden(item, guard) for key, item in value.items()}
            return [hidden(item, guard) for item in value] if isinstance(value, list | tuple) else value

        messages = []
        for turn in chat.turns:
            guard = own if turn.role == "assistant" else typed
            messages.append(self._message(turn, functools.partial(hidden, guard=guard)))
        prompt = self._run(messages, hidden(list(chat.tools), typed), add_generation_prompt)
        ids = typed.encode_prompt(prompt, plain=plain)
        for kind, token in placeholders.items():
            wanted, found = len(chat.parts(kind)), ids.count(token)
            if wanted != found:
                raise ConfigError(
                    f"the chat has {wanted} of the kind {kind}, but the template wrote {self.media[kind].token!r} "
                    f"{found} times: it does not fit this model, or leaves out parts of such a turn"
                )
        return ids

    def _placeholder_id(self, kind: str, tokenizer: LanguageTokenizer) -> int:
        token = self.media[kind].token
        found = tokenizer.backend.token_to_id(token)
        if token not in tokenizer.added or found is None:
            raise ConfigError(f"the placeholder {token!r} for {kind} is no token of this tokenizer")
        return found

    def _written(self, tokenizer: LanguageTokenizer, with_tools: bool) -> list[str]:
        """Tokens that are not marked as special but that the template writes, as Qwen's <tool_response>.

        White space apart: Gemma has tokens for line ends, which texts need.
        """
        literals = _literals(self._source(with_tools))
        return [t for t in tokenizer.added - tokenizer.special if not t.isspace() and t in literals]

    # -- messages as templates read them --

    def _message(self, turn: Turn, hide: Callable[[Any], Any] = lambda value: value) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role, "content": self._content(turn, hide)}
        if turn.calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": hide(call.id)} if call.id else {}),
                    "function": {"name": hide(call.name), "arguments": hide(call.arguments)},
                }
                for call in turn.calls
            ]
        if turn.name:
            message["name"] = hide(turn.name)
        if turn.call_id:
            message["tool_call_id"] = hide(turn.call_id)
        return message

    def _content(self, turn: Turn, hide: Callable[[Any], Any]) -> str | list[dict[str, Any]]:
        for part in turn.parts:
            if not isinstance(part, Text) and kind_of(part) not in self.media:
                known = ", ".join(sorted(self.media)) or "text only"
                raise MediaError(f"this model's chats have no place for the kind {kind_of(part)}; they take: {known}")
        if turn.role in self._list_roles and turn.parts:
            return [
                {"type": "text", "text": hide(part.text)} if isinstance(part, Text) else {"type": kind_of(part)}
                for part in turn.parts
            ]
        # Texts beside one another are hidden as one: halves of a control token meet here.
        pieces: list[str] = []
        text = ""
        for part in turn.parts:
            if isinstance(part, Text):
                text += part.text
            else:
                pieces += [hide(text), self.media[kind_of(part)].text]
                text = ""
        return "".join([*pieces, hide(text)])

    @functools.cached_property
    def _list_roles(self) -> frozenset[str]:
        """The roles whose content the template goes through part by part: it prints the text of a list and no more."""

        def listed(role: str) -> bool:
            probe: dict[str, Any] = {"role": role, "content": [{"type": "text", "text": "a polymodal probe"}]}
            user = {"role": "user", "content": [{"type": "text", "text": "hi"}] if role != "user" and reads else "hi"}
            messages = {"system": [probe, user], "user": [probe], "assistant": [user, probe]}[role]
            try:
                out = self._run(messages, [], False)
            except (ConfigError, MediaError):
                return False
            return "a polymodal probe" in out and not re.search(r"""(['"])a polymodal probe\1""", out)

        reads = False
        reads = listed("user")
        return frozenset(role for role in ("system", "user", "assistant") if listed(role))

    # -- running it --

    def _source(self, with_tools: bool) -> str:
        return self.with_tools if with_tools and self.with_tools is not None else self.source

    def _run(self, messages: list[dict[str, Any]], tools: list[Any], add_generation_prompt: bool) -> str:
        template = _compiled(self._source(bool(tools)))
        budget = _Budget(_FREE + _FOR_EACH * _size([messages, tools], 1 << 40))
        token = _budget.set(budget)
        try:
            return "".join(
                template.generate(
                    messages=messages,
                    tools=tools or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self.tokens,
                )
            )
        except _Refusal as error:
            raise MediaError(f"the chat template refuses this chat: {error}") from None
        except _FAILURES as error:
            raise ConfigError(f"the chat template failed: {type(error).__name__}: {error}") from error
        finally:
            _budget.reset(token)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None


def _names_token(name: str, value: Any) -> bool:
    return name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _listed(value: Any, where: str) -> dict[str, str]:
    """A template, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(item["name"]): str(item["template"]) for item in value}
    except (TypeError, KeyError):
        raise ConfigError(f"{where}: chat_template is neither a template nor a list of named templates") from None


# ---- the sandbox ----

_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
# What templates of the Hub use, less what makes long texts of short ones (center, indent, format ...).
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper",
)  # fmt: skip
_STR_METHODS = {
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower",
    "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines",
    "startswith", "strip", "swapcase", "title", "upper",
}  # fmt: skip
# A template copies what was said some ten times; what it adds itself is short.
_FREE, _FOR_EACH, _STEP = 2_000_000, 32, 16


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _Budget:
    """What a run may still make: a character costs 1, what takes longer more: an item of a list, a turn of a loop."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SecurityError("the template makes too much: its loops are too long or its output too large")


_budget: ContextVar[_Budget] = ContextVar("budget")


def _size(value: Any, most: int) -> int:
    """The cost of a value with all that is in it, however often; counting ends above ``most``."""
    total, todo = 0, [value]
    while todo and total <= most:
        item = todo.pop()
        total += _STEP
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list | tuple | set):
            if _STEP * len(item) > most - total:
                return most + 1
            todo += item
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
    return total


def _spend(value: Any) -> Any:
    """Charges a value with all that is in it, and returns it."""
    budget = _budget.get()
    budget.spend(_size(value, budget.left))
    return value


def _spend_replacing(text: str, old: Any, new: Any) -> None:
    _budget.get().spend(len(text) + (text.count(str(old)) + 1) * len(str(new)))


class _Meter(Extension):
    """The charges that `_Metered` writes into a template. As methods of an extension no template can redefine them."""

    def tick(self) -> str:
        _budget.get().spend(_STEP)
        return ""

    def spend(self, value: Any) -> Any:
        return _spend(value)

    def read(self, value: Any) -> Any:
        if isinstance(value, str | list):
            _budget.get().spend(len(value) // 64)
        return value

    def joined(self, values: list[Any]) -> str:
        return "".join(str(_spend(value)) for value in values)


class _Metered(NodeTransformer):
    """Writes charges into a parsed template."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.meter = environment.extensions[_Meter.identifier]

    def _call(self, method: str, *args: nodes.Expr, lineno: int) -> nodes.Call:
        return self.meter.call_method(method, list(args), lineno=lineno)

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(self._call("tick", lineno=node.lineno))
        node.body.insert(0, tick.set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = _ticking

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._ticking(node)
        if node.test is not None:
            node.test = self._call("spend", cast(nodes.Expr, node.test), lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._call("spend", cast(nodes.Expr, child), lineno=node.lineno) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("joined", nodes.List(node.nodes), lineno=node.lineno)

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else self._call("spend", node, lineno=node.lineno)

    visit_List = visit_Tuple = visit_Dict = _made

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._call("read", node, lineno=node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._call("read", node.expr, lineno=node.lineno)
        for operand in node.ops:
            operand.expr = self._call("read", operand.expr, lineno=node.lineno)
        return node

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        if node.attr.startswith("_"):
            raise SecurityError(f"a template may not set {node.attr}")
        return node


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said. It is read and has no effect."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("a template may not call str.format")
        return None

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [isinstance(value, str | list | tuple) for value in (left, right)]
        if operator == "%" and isinstance(left, str):
            raise SecurityError("a template may not format by %")
        if operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
            raise SecurityError("a template may not raise to such powers")
        if operator == "*" and not any(sizes) and max(abs(left), abs(right)) > 2**64:
            raise SecurityError("a template may not multiply such numbers")
        if operator == "*" and any(sizes):
            number, repeated = (left, right) if sizes[1] else (right, left)
            if isinstance(number, int) and number > 0:
                _budget.get().spend(number * _size(repeated, _budget.get().left))
        else:
            _spend([left, right])
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # names as jinja2's
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, _Meter):
            return __obj(*args)
        if __obj is Namespace and any(name.startswith("__") for name in kwargs):
            raise SecurityError("a template may not set names that begin with _")
        if isinstance(owner, str):
            if __obj.__name__ not in _STR_METHODS:
                raise SecurityError(f"a template may not call str.{__obj.__name__}")
            if __obj.__name__ == "replace" and len(args) >= 2:
                _spend_replacing(owner, args[0], args[1])
            elif __obj.__name__ == "join":
                args = (list(args[0]),)
                _budget.get().spend(_size(args[0], _budget.get().left) + len(args[0]) * len(owner))
            else:
                _budget.get().spend(1 + len(owner))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, dict | list | tuple):
            _spend(result)
        return result


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # jinja2's marks of what is passed first come along
    def metered(*args: Any, **kwargs: Any) -> Any:
        values = [value for value in args if not isinstance(value, jinja2.Environment | jinja2.runtime.Context)]
        values = values[1:] if type(values[0]).__name__ == "EvalContext" else values
        first = values[0] if values else ""
        if name == "replace" and len(values) >= 3:
            _spend_replacing(str(first), values[1], values[2])
        elif name == "join":
            first = list(first)
            glue = values[1] if len(values) > 1 else kwargs.get("d", "")
            _budget.get().spend(_size(first, _budget.get().left) + len(first) * len(str(glue)))
            args = tuple(first if value is values[0] else value for value in args)
        elif name in ("string", "sum", "sort", "unique", "dictsort", "groupby", "e", "escape") or isinstance(
            first, str
        ):
            _spend(first)
        result = function(*args, **kwargs)
        if isinstance(result, list):
            _budget.get().spend(len(result))
        return result

    return metered


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError(f"a template may not indent by {indent}")
    _spend(value)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_no_json
    )
    return _spend(text.replace(json.dumps(MARK)[1:-1], MARK))


def _no_json(value: Any) -> Any:
    raise TypeError(f"tojson of {type(value).__name__}")


def _raise_exception(message: Any) -> None:
    raise _Refusal(str(message)[:1000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 64 or re.search(r"\d\d", pattern):
        raise SecurityError("a template may not write dates of that form")
    return datetime.now().strftime(pattern)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation, _Meter], optimized=False
    )
    filters = {name: _metered_filter(name, environment.filters[name]) for name in _FILTERS}
    environment.filters = {**filters, "tojson": _tojson}
    environment.globals = {
        "range": environment.globals["range"],
        "dict": dict,
        "namespace": Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE:
        raise ConfigError(f"a chat template of {len(source):,} characters, more than the {MAX_TEMPLATE:,} allowed")
    environment = _environment()
    try:
        tree = _Metered(environment).visit(environment.parse(source))
        tree.set_environment(environment)
        return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is no template: line {error.lineno}: {error.message}") from None
    except (SecurityError, SyntaxError, *_FAILURES) as error:
        raise ConfigError(f"the chat template cannot be read: {type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=64)
def _literals(source: str) -> str:
    """All text that a template holds, in pieces that no search joins."""
    tree = _environment().parse(source)
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([*constants, *(node.data for node in tree.find_all(nodes.TemplateData))])


# ---- tool calls in answers ----


@dataclass(frozen=True)
class BrokenCall:
    """What looks like a tool call and is none: the model's mistake, to be shown to it or to the user."""

    text: str
    problem: str


@dataclass(frozen=True)
class Answer:
    """An answer taken apart."""

    text: str  # without the calls
    calls: tuple[ToolCall, ...] = ()
    broken: tuple[BrokenCall, ...] = ()


def hermes_calls(text: str) -> Answer:
    """Takes ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` out of an answer (Hermes, Qwen)."""
    rest, found = [], []
    pieces = text.split("<tool_call>")
    rest.append(pieces[0])
    for piece in pieces[1:]:
        inside, closed, after = piece.partition("</tool_call>")
        found.append(_json_call(inside, "arguments") if closed else BrokenCall(inside, "<tool_call> is not closed"))
        rest.append(after)
    return _answer("".join(rest), found)


def llama_calls(text: str) -> Answer:
    """Reads an answer of Llama 3 that is calls: ``{"name": ..., "parameters": {...}}`` (several with ``;`` between),
    ``[weather(city="Oslo"), time()]`` or ``search.call(query="...")``, with or without ``<|python_tag|>`` before.

    Any other answer is text. Without the tag, what begins like a call and is none is text too.
    """
    before, tag, body = text.partition("<|python_tag|>")
    if not tag:
        before, body = "", text
    stripped = body.strip()
    if stripped.startswith("{"):
        found = _json_calls(stripped, "parameters")
    else:
        found = _python_calls(stripped)
    if not tag and any(isinstance(item, BrokenCall) for item in found):
        return Answer(text)
    return _answer(before, found)


def mistral_calls(text: str) -> Answer:
    """Takes ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]`` or ``[TOOL_CALLS]name[ARGS]{...}`` out of an answer.

    The tag is a special token: decode with ``skip_special=False``.
    """
    before, *pieces = text.split("[TOOL_CALLS]")
    rest = [before]
    found: list[ToolCall | BrokenCall] = []
    for piece in pieces:
        name, args, body = piece.partition("[ARGS]")
        value, end, problem = _json_value(body if args else piece)
        if problem:
            found.append(BrokenCall(piece, problem))
        elif args:
            found.append(_call(name.strip(), value, piece))
        else:
            items = value if isinstance(value, list) else [value]
            found += [_object_call(item, "arguments", piece) for item in items]
        if not problem:
            rest.append((body if args else piece)[end:])
    return _answer("".join(rest), found)


def _answer(text: str, found: Sequence[ToolCall | BrokenCall]) -> Answer:
    calls = tuple(item for item in found if isinstance(item, ToolCall))
    return Answer(text.strip(), calls, tuple(item for item in found if isinstance(item, BrokenCall)))


def _json_value(text: str) -> tuple[Any, int, str]:
    """The JSON value that a text begins with, where it ends, and what is wrong with it."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        return None, 0, f"no valid JSON: {error}"
    return value, end, ""


def _json_call(text: str, key: str) -> ToolCall | BrokenCall:
    value, end, problem = _json_value(text)
    if not problem and text[end:].strip():
        problem = f"more than one JSON value: {quoted(text[end:].strip())}"
    return BrokenCall(text, problem) if problem else _object_call(value, key, text)


def _json_calls(text: str, key: str) -> list[ToolCall | BrokenCall]:
    found: list[ToolCall | BrokenCall] = []
    while text:
        value, end, problem = _json_value(text)
        rest = text[end:].strip()
        if problem or (rest and not rest.startswith(";")):
            return [*found, BrokenCall(text, problem or f"more than one JSON value: {quoted(rest)}")]
        found.append(_object_call(value, key, text[:end]))
        text = rest[1:].strip()
    return found


def _object_call(value: Any, key: str, text: str) -> ToolCall | BrokenCall:
    if not isinstance(value, dict):
        return BrokenCall(text, f"a call is an object, not {type(value).__name__}")
    call_id = value.get("id")
    return _call(value.get("name"), value.get(key, {}), text, call_id if isinstance(call_id, str) else "")


def _call(name: Any, arguments: Any, text: str, call_id: str = "") -> ToolCall | BrokenCall:
    try:
        return tool_call(name, arguments, call_id)
    except MediaError as error:
        return BrokenCall(text, str(error))


def _python_calls(text: str) -> list[ToolCall | BrokenCall]:
    if len(text) > 100_000:
        return [BrokenCall(text, "too long for a call")]
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) and tree.elts else [tree]
        return [_python_call(node) for node in calls]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [BrokenCall(text, f"no valid call: {error}")]


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("a call is name(argument=value, ...)")
    name = ast.unparse(node.func).removesuffix(".call")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{quoted(name)} is no name of a tool")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("a call is name(argument=value, ...)")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ToolCall(name, arguments)
