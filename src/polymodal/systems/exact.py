"""What the codecs of sound and of pictures share: they compute in fp32. Not a system itself."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from polymodal.core.errors import UnsupportedError
from polymodal.core.precision import Precision
from polymodal.systems.base import System

E = TypeVar("E", bound="ExactSystem")


class ExactSystem(System):
    """A system whose vectors stand for codes: rounded, they would be nearest to others."""

    @classmethod
    def from_folder(cls: type[E], folder: Path, format_name: str, *, precision: Precision = "fp32") -> E:
        """As of every system; always in fp32.

        Raises:
            UnsupportedError: bf16 is asked for.
        """
        if precision == "bf16":
            raise UnsupportedError(f"{cls.__name__} runs in fp32 only: rounded vectors would have other codes")
        return super().from_folder(folder, format_name, precision="fp32")
