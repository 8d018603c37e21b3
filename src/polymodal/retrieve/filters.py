"""A small filter language, translated into SQL by us, so that nothing that a user types is ever run."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass

from polymodal.core.errors import ConfigError, did_you_mean

GRAMMAR = """\
  expression:  test, joined by  and  or  not  and parentheses
  test:        FIELD OPERATOR VALUE
  fields:      path (text)   width height bytes (numbers)   time modified (dates)
  operators:   =  !=  <  <=  >  >=   and for text  ~  (contains, in any case)
  values:      12   1.5M   "text"   2020-01-31   2020-01-31T10:20:30
  time is when the picture was taken (EXIF): pictures that do not say so match no test of it. modified is the file's.
  example:     width>=640 and path~"holiday" and not time<2020-01-01"""

_FIELDS = {
    "path": "text",
    "width": "number",
    "height": "number",
    "bytes": "number",
    "time": "date",
    "modified": "date",
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_MAX_LENGTH = 2000
_MAX_DEPTH = 50

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<open>\() | (?P<close>\)) |
      (?P<operator><=|>=|!=|=|<|>|~) |
      "(?P<double>[^"]*)" | '(?P<single>[^']*)' |
      (?P<date>\d{4}-\d{2}-\d{2}(?:T\d{2}:\d{2}(?::\d{2})?)?)(?![\w.:-]) |
      (?P<number>\d+(?:\.\d+)?[kKmMgG]?)(?![\w.:-]) |
      (?P<word>[A-Za-z_]+)
    )""",
    re.VERBOSE | re.ASCII,
)


def to_sql(expression: str) -> str:
    """Translates a filter into a condition of the table of pictures.

    Only known fields and operators pass; text is quoted, numbers and dates are parsed and printed again.

    Raises:
        ConfigError: it is not a sentence of the language; the message shows where and teaches the grammar.
    """
    if len(expression) > _MAX_LENGTH:
        raise _error(expression[:60] + "...", 0, f"longer than {_MAX_LENGTH} characters")
    parser = _Parser(expression, _tokens(expression))
    sql = parser.any_of(0)
    token = parser.peek
    if token.kind != "end":
        raise _error(expression, token.at, "'and' or 'or' was expected here")
    return sql


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


def _tokens(expression: str) -> list[_Token]:
    tokens, at = [], 0
    while expression[at:].strip():
        match = _TOKEN.match(expression, at)
        if match is None:
            start = at + len(expression[at:]) - len(expression[at:].lstrip())
            raise _error(expression, start, "not understood")
        kind = str(match.lastgroup)
        tokens.append(_Token("text" if kind in ("double", "single") else kind, match[kind], match.start(kind)))
        at = match.end()
    return [*tokens, _Token("end", "", len(expression))]


class _Parser:
    def __init__(self, expression: str, tokens: list[_Token]) -> None:
        self.expression = expression
        self.tokens = tokens
        self.next = 0

    @property
    def peek(self) -> _Token:
        return self.tokens[self.next]

    def take(self) -> _Token:
        token = self.peek
        self.next += token.kind != "end"
        return token

    def word(self, word: str) -> bool:
        if self.peek.kind == "word" and self.peek.text.lower() == word:
            self.next += 1
            return True
        return False

    def any_of(self, depth: int) -> str:
        terms = [self.all_of(depth)]
        while self.word("or"):
            terms.append(self.all_of(depth))
        return terms[0] if len(terms) == 1 else "(" + " OR ".join(terms) + ")"

    def all_of(self, depth: int) -> str:
        terms = [self.one(depth)]
        while self.word("and"):
            terms.append(self.one(depth))
        return terms[0] if len(terms) == 1 else "(" + " AND ".join(terms) + ")"

    def one(self, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise _error(self.expression, self.peek.at, "nested too deeply")
        if self.word("not"):
            return f"(NOT {self.one(depth + 1)})"
        token = self.take()
        if token.kind == "open":
            inner = self.any_of(depth + 1)
            if self.take().kind != "close":
                raise _error(self.expression, self.peek.at, "a ')' is missing")
            return inner
        field = token.text.lower()
        if token.kind != "word":
            raise _error(self.expression, token.at, "a field was expected here")
        if field not in _FIELDS:
            raise _error(self.expression, token.at, f"no field is called {token.text!r}{did_you_mean(field, _FIELDS)}")
        operator = self.take()
        if operator.kind != "operator":
            raise _error(self.expression, operator.at, "an operator was expected here")
        return self.test(field, operator, self.take())

    def test(self, field: str, operator: _Token, value: _Token) -> str:
        kind = _FIELDS[field]
        if value.kind != kind:
            raise _error(self.expression, value.at, f"{field} is compared with a {kind}")
        if kind == "text":
            quoted = _quote(value.text.lower() if operator.text == "~" else value.text)
            if operator.text == "~":
                return f"contains(lower({field}), {quoted})"
            if operator.text not in ("=", "!="):
                raise _error(self.expression, operator.at, "text is compared with = != or ~")
            return f"({field} {operator.text} {quoted})"
        if operator.text == "~":
            raise _error(self.expression, operator.at, f"~ is for text, and {field} is a {kind}")
        return f"({field} {operator.text} {self.literal(value)})"

    def literal(self, value: _Token) -> str:
        if value.kind == "number":
            digits = value.text.rstrip("kKmMgG")
            number = float(digits) * _UNITS[value.text[len(digits) :].lower()]
            if number > 2**62:
                raise _error(self.expression, value.at, "too large a number")
            return str(int(number)) if number.is_integer() else repr(number)
        try:
            moment = dt.datetime.fromisoformat(value.text)
        except ValueError:
            raise _error(self.expression, value.at, "no such date") from None
        return f"timestamp '{moment.isoformat(sep=' ')}'"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def any_path(paths: list[str]) -> str:
    """The condition that holds for exactly these paths."""
    return f"path IN ({', '.join(map(_quote, paths))})"


def _error(expression: str, at: int, what: str) -> ConfigError:
    return ConfigError(
        f"the filter is not understood: {what}\n  {expression}\n  {' ' * at}^\nA filter is written so:\n{GRAMMAR}"
    )
