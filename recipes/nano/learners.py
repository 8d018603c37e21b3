"""What the nano recipes share that train a system by a loss of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from polymodal.systems.base import System


class Around(nn.Module):
    """A module around a system; a subclass gives the loss, the system says the rest of `core.verbs.Trains`.

    Attributes:
        inner: the name that the subclass holds the system by.
    """

    inner: ClassVar[str]

    @property
    def system(self) -> System:
        found = self.get_submodule(self.inner)
        assert isinstance(found, System)
        return found

    def after_step(self, step: int, total_steps: int) -> None:
        self.system.after_step(step, total_steps)

    def no_decay(self) -> Iterable[str]:
        return (f"{self.inner}.{name}" for name in self.system.no_decay())

    def blocks(self) -> Iterable[nn.Module]:
        return self.system.blocks()
