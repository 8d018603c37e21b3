"""Actions and states of robots: statistics, normalisation, grippers, differences. Rotations are in `rotation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from polymodal.core.errors import ConfigError, DataError

Kind: TypeAlias = Literal["quantile", "zscore", "minmax", "identity"]
Vector: TypeAlias = np.ndarray  # of one number for each dimension
QUANTILES: Final = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Of each dimension of the actions or states of one data set, in the robot's units.

    Published statistics lack some: those are None, and a `Normaliser` that needs them raises.

    Attributes:
        mask: False for dimensions that are never normalised (OpenVLA's grippers); None: all are.
        count: rows that they are of; 0 where that is not known.
    """

    min: Vector | None = None
    max: Vector | None = None
    mean: Vector | None = None
    std: Vector | None = None
    q01: Vector | None = None
    q10: Vector | None = None
    q50: Vector | None = None
    q90: Vector | None = None
    q99: Vector | None = None
    mask: tuple[bool, ...] | None = None
    count: int = 0

    def __post_init__(self) -> None:
        known = self.known
        widths = {np.shape(value) for value in known.values()}
        if len(widths) != 1 or len(next(iter(widths))) != 1 or (self.mask is not None and len(self.mask) != self.dim):
            raise ConfigError(
                f"statistics are vectors of one length, not { ({n: np.shape(v) for n, v in known.items()}) }"
            )
        if bad := [name for name, value in known.items() if not np.isfinite(value).all()]:
            raise ConfigError(f"statistics are finite; {', '.join(bad)} are not")
        ranges = (("min", "max"), ("q01", "q99"))
        if any(a in known and b in known and (known[a] > known[b]).any() for a, b in ranges):
            raise ConfigError("statistics with a lower bound above the upper one")
        if self.std is not None and (self.std < 0).any():
            raise ConfigError("statistics with a negative standard deviation")

    @property
    def known(self) -> dict[str, Vector]:
        return {name: value for name in _VECTORS if (value := getattr(self, name)) is not None}

    @property
    def dim(self) -> int:
        return len(next(iter(self.known.values())))

    @classmethod
    def from_array(cls, rows: Shaped[np.ndarray, "rows dim"], *, mask: tuple[bool, ...] | None = None) -> Statistics:
        """Of all rows, exactly.

        Raises:
            DataError: there are none, or a number is not finite.
        """
        rows = np.asarray(rows, np.float64)
        if not len(rows):
            raise DataError("statistics of no rows at all")
        if not np.isfinite(rows).all():
            raise DataError(f"{(~np.isfinite(rows)).any(1).sum()} of {len(rows)} rows have numbers that are not finite")
        quantiles = dict(zip(QUANTILES, np.quantile(rows, list(QUANTILES.values()), axis=0), strict=True))
        bounds = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
        return cls(**bounds, **quantiles, mask=mask, count=len(rows))

    @classmethod
    def merge(cls, parts: Sequence[Statistics]) -> Statistics:
        """Of several data sets together: exact but for the quantiles, which are averaged by count as LeRobot does.

        Raises:
            DataError: there is none, they differ in length or mask, or a count is not known.
        """
        if not parts or len({(p.dim, p.mask) for p in parts}) > 1 or not all(p.count for p in parts):
            raise DataError("statistics are merged where there are some, of one length and mask, with their counts")
        weights = np.array([p.count for p in parts]) / sum(p.count for p in parts)
        names = [name for name in _VECTORS if all(name in p.known for p in parts)]
        of = {name: np.stack([p.known[name] for p in parts]) for name in names}
        out = {name: weights @ values for name, values in of.items() if name not in ("min", "max", "std")}
        if "min" in of and "max" in of:
            out |= {"min": of["min"].min(0), "max": of["max"].max(0)}
        if "std" in of and "mean" in of:
            out["std"] = np.sqrt(weights @ (of["std"] ** 2 + (of["mean"] - out["mean"]) ** 2))
        return cls(**out, mask=parts[0].mask, count=sum(p.count for p in parts))

    def to_json(self) -> dict[str, Any]:
        """In the names of LeRobot's ``stats.json``, with OpenVLA's ``mask`` where there is one."""
        out: dict[str, Any] = {name: value.tolist() for name, value in self.known.items()}
        return out | ({} if self.mask is None else {"mask": list(self.mask)}) | {"count": [self.count]}

    @classmethod
    def from_json(cls, raw: Any) -> Statistics:
        """Reads `to_json`, LeRobot's entries of vectors, OpenVLA's and openpi's; what is not known is an error.

        Raises:
            ConfigError: a field is not known, or is not what it should be.
        """
        unknown = (
            sorted(raw.keys() - {*_VECTORS, "mask", "count"}) if isinstance(raw, Mapping) else [type(raw).__name__]
        )
        if unknown:
            raise ConfigError(f"statistics have {', '.join(_VECTORS)}, mask and count; not {', '.join(unknown)}")
        try:
            vectors = {name: np.array(raw[name], np.float64) for name in _VECTORS if raw.get(name) is not None}
            count = int(np.ravel(raw.get("count", 0))[0])
            mask = None if raw.get("mask") is None else tuple(map(bool, raw["mask"]))
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            raise ConfigError(f"statistics that are no numbers: {error}") from None
        return cls(**vectors, mask=mask, count=count)


_VECTORS: Final = tuple(f.name for f in fields(Statistics) if f.name not in ("mask", "count"))
_NEEDS: Final[Mapping[str, tuple[str, str]]] = {
    "quantile": ("q01", "q99"), "minmax": ("min", "max"), "zscore": ("mean", "std"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Normaliser:
    """The robot's units <-> numbers of about one; ``quantile`` and ``minmax`` put their range on [-1, 1].

    A dimension that never moves is divided by ``floor`` and not by almost nothing (openpi's formula gives -3200): its
    value becomes 0, and what a network writes there comes back as that value. One that moves so rarely that its
    quantiles agree takes its extremes.

    Attributes:
        floor: the least scale, in the robot's units.
        clip: no normalised number is larger; also not one that a network writes.

    Raises:
        ConfigError: the statistics lack what ``kind`` needs.
    """

    statistics: Statistics
    kind: Kind = "quantile"
    mask: tuple[bool, ...] | None = None  # False: left alone; None: the statistics' own
    floor: float = 1e-4
    clip: float = 10.0

    def __post_init__(self) -> None:
        if self.kind != "identity" and self.kind not in _NEEDS:
            raise ConfigError(f"a normaliser is one of {', '.join([*_NEEDS, 'identity'])}, not {self.kind!r}")
        if lacking := [n for n in _NEEDS.get(self.kind, ()) if n not in self.statistics.known]:
            raise ConfigError(
                f"{self.kind} normalisation needs {' and '.join(lacking)}, and the statistics have only "
                f"{', '.join(self.statistics.known)}: compute them again (Statistics.from_array)"
            )
        if self.mask is not None and len(self.mask) != self.statistics.dim:
            raise ConfigError(f"a mask of {len(self.mask)} dimensions for statistics of {self.statistics.dim}")

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """(centre, scale, limit) of each dimension."""
        known, dim = self.statistics.known, self.statistics.dim
        centre, scale = np.zeros(dim), np.ones(dim)
        if self.kind == "zscore":
            centre, scale = known["mean"], known["std"]
        elif self.kind != "identity":
            low, high = (known[name] for name in _NEEDS[self.kind])
            if self.kind == "quantile" and "min" in known and "max" in known:
                still = high - low < 2 * self.floor
                low, high = np.where(still, known["min"], low), np.where(still, known["max"], high)
            centre, scale = (low + high) / 2, (high - low) / 2
        mask = self.mask or self.statistics.mask
        used = np.array(mask or (True,) * dim) & (self.kind != "identity")
        rows = (np.where(used, centre, 0), np.where(used, np.maximum(scale, self.floor), 1))
        limit = np.where(used, self.clip, np.inf)
        return tuple(torch.from_numpy(row).float() for row in (*rows, limit))  # type: ignore[return-value]

    def normalise(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        centre, scale, limit = (each.to(x) for each in self._affine)
        return ((x - centre) / scale).clamp(-limit, limit)

    def restore(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        centre, scale, limit = (each.to(x) for each in self._affine)
        return x.clamp(-limit, limit) * scale + centre


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """What a robot calls open and closed."""

    open: float
    closed: float

    def to(self, other: Gripper, x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The same opening in another's words."""
        return other.closed + (x - self.closed) / (self.open - self.closed) * (other.open - other.closed)

    def snap(self, x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Wholly open or wholly closed, whichever is nearer."""
        return torch.where((x - self.open).abs() < (x - self.closed).abs(), self.open, self.closed).to(x)


GRIPPERS: Final[Mapping[str, Gripper]] = {
    "openvla": Gripper(open=1.0, closed=0.0),  # Open X-Embodiment, bridge
    "robosuite": Gripper(open=-1.0, closed=1.0),  # LIBERO, Meta-World
    "droid": Gripper(open=0.0, closed=1.0),
}


def to_relative(
    actions: Float[Tensor, "*batch horizon dim"], state: Float[Tensor, "*batch dim"], dims: Sequence[bool]
) -> Float[Tensor, "*batch horizon dim"]:
    """Absolute targets as differences from the state that the chunk begins at, where ``dims`` says so."""
    return actions - torch.where(torch.tensor(dims, device=state.device), state, 0)[..., None, :]


def to_absolute(
    actions: Float[Tensor, "*batch horizon dim"], state: Float[Tensor, "*batch dim"], dims: Sequence[bool]
) -> Float[Tensor, "*batch horizon dim"]:
    """The inverse of `to_relative`."""
    return to_relative(actions, -state, dims)


def to_steps(
    actions: Float[Tensor, "*batch horizon dim"], state: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch horizon dim"]:
    """Absolute targets as differences from one step to the next; the first from the state."""
    return torch.diff(actions, dim=-2, prepend=state[..., None, :])


def from_steps(
    actions: Float[Tensor, "*batch horizon dim"], state: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch horizon dim"]:
    """The inverse of `to_steps`."""
    return actions.cumsum(-2) + state[..., None, :]


def without_outliers(statistics: Statistics) -> Statistics:
    """Extremes that agree where the quantiles do: what a network knows that was trained on clipped quantiles."""
    s = statistics
    if s.min is None or s.max is None or s.q01 is None or s.q99 is None:
        return s
    still = s.q01 == s.q99
    return replace(s, min=np.where(still, s.q01, s.min), max=np.where(still, s.q99, s.max))


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundTrip:
    """How far actions are from themselves after a codec, for each dimension in the robot's units."""

    mean: Float[Tensor, " dim"]
    largest: Float[Tensor, " dim"]
    share: Float[Tensor, " dim"]  # the largest, as a share of the range of the actions


def round_trip(
    actions: Float[Tensor, "*batch dim"], normaliser: Normaliser, codec: Callable[[Tensor], Tensor]
) -> RoundTrip:
    """What writing and reading actions costs; ``codec`` encodes and decodes normalised ones."""
    error = (normaliser.restore(codec(normaliser.normalise(actions))) - actions).abs().flatten(0, -2)
    rows = actions.flatten(0, -2)
    largest, spread = error.amax(0), (rows.amax(0) - rows.amin(0)).clamp_min(1e-12)
    return RoundTrip(mean=error.mean(0), largest=largest, share=largest / spread)
