"""How sure a share is: Wilson's interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from polymodal.core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A share ``k / n`` with its Wilson interval; printed, it shows no digit that the interval does not support."""

    k: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.k / self.n

    def __str__(self) -> str:
        digits = 1 if self.high - self.low < 0.1 else 0
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.value:.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}] ({self.k}/{self.n})"


def wilson(k: int, n: int, z: float = 1.959964) -> Interval:
    """The Wilson score interval of ``k`` successes in ``n`` trials; 95 % by default.

    Raises:
        DataError: there are no trials, or more successes than trials.
    """
    if n < 1 or not 0 <= k <= n:
        raise DataError(f"{k} of {n} is no share")
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(k=k, n=n, low=max(0.0, centre - half), high=min(1.0, centre + half))
