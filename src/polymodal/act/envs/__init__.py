"""Environments by name. Nothing of a simulator is imported before one is made.

The module of a family has ``tasks()``, their names, and a class of environments that takes one of them first.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from polymodal.core.errors import ConfigError, MissingDependency, did_you_mean

if TYPE_CHECKING:
    from polymodal.act.envs.base import RobotEnv


@dataclass(frozen=True)
class Family:
    """Environments of one simulator."""

    purpose: str
    maker: str  # its class
    extra: str  # to install
    default: str  # its task where none is named
    any_size: bool = False  # cameras draw its pictures, of any size


FAMILIES: Final[dict[str, Family]] = {
    "tabletop": Family(
        "put the blue cup on the left plate: words are needed; our own, in MuJoCo",
        "Tabletop",
        "act",
        "pick-place",
        any_size=True,
    ),
    "metaworld": Family(
        "50 tasks of a robot arm, and mt10, ten of them in one", "MetaWorld", "metaworld", "mt10", any_size=True
    ),
    "babyai": Family("a grid world told in a small language; the fastest", "BabyAI", "babyai", "GoToLocal"),
    "miniwob": Family("small web pages worked with mouse and keyboard", "MiniWoB", "miniwob", "click-test"),
}


def make(name: str, **options: Any) -> RobotEnv:
    """An environment by the name of its family or of its task.

    Args:
        name: such as ``tabletop``, ``tabletop/reach``, ``metaworld/push-v3``, ``metaworld/mt10``, ``babyai/GoToLocal``.
        options: of the environment, such as ``size`` (side of the pictures in pixels) and ``cameras`` (their names).

    Raises:
        ConfigError: there is none of that name, or it has no such option.
        MissingDependency: its simulator is not installed.
    """
    family, _, task = name.partition("/")
    maker = getattr(_module(family), FAMILIES[family].maker)
    known = inspect.signature(maker).parameters
    for option in options:
        if option not in known:
            raise ConfigError(f"{family} has no option {option!r}{did_you_mean(option, list(known)[1:])}")
    return maker(task or FAMILIES[family].default, **options)


def tasks(family: str) -> Sequence[str]:
    """The tasks of a family, as ``make`` takes them behind its name."""
    return _module(family).tasks()


def _module(family: str) -> ModuleType:
    if family not in FAMILIES:
        raise ConfigError(f"there is no environment {family!r}{did_you_mean(family, FAMILIES)}")
    try:
        return import_module(f"{__name__}.{family}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("polymodal"):
            raise
        raise MissingDependency(f"the environment {family}", str(error.name), FAMILIES[family].extra) from None


def check_task(family: str, task: str, known: Sequence[str]) -> None:
    """Raises ConfigError where a family has no such task."""
    if task not in known:
        raise ConfigError(f"{family} has no task {task!r}{did_you_mean(task, known)}")
