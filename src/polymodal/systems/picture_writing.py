"""What the systems share that write pictures as codes, one after another: the verb `draw`. Not a system itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from polymodal.core.batch import Batch
from polymodal.core.drawing import Drawing, Glimpse, Settled, any_seed
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.samplers.autoregressive import Settings, sample
from polymodal.samplers.modes import Wordless
from polymodal.systems.base import System
from polymodal.tokenizers.vq import VQModel

_PLAIN: Final = Drawing()


class PictureWriter(System):
    """The `Draws` protocol of a system that writes codes; ``painter`` makes pixels of them.

    A subclass gives ``writing`` (how codes are drawn, where nothing else is asked for) and the methods below.
    """

    writing: ClassVar[Settings]

    @property
    def painter(self) -> VQModel:
        raise NotImplementedError

    @property
    def writer(self) -> Any:
        """What the loop of generation runs."""
        return self

    def asked(self, texts: Sequence[str]) -> Batch:
        """Prompts for pictures; the empty text is one that says nothing."""
        raise NotImplementedError

    def picture_settings(self) -> Settings:
        """``writing`` for one picture: its tokens, and what constrains them."""
        raise NotImplementedError

    def codes_of(self, ids: Sequence[int]) -> list[int]:
        """The codes among the tokens that were written so far."""
        raise NotImplementedError

    @property
    def multiple(self) -> int:
        """Pixels that the sides of a picture are multiples of: it has one size."""
        return self.painter.config.resolution

    def paint(self, codes: Int[Tensor, "pictures codes"]) -> Float[Tensor, "pictures 3 height width"]:
        """Pictures of their codes, row by row, in [0, 1], on the CPU.

        Raises:
            UnsupportedError: the weights have no decoder.
        """
        side = self.painter.config.grid
        if self.painter.decoder is None:
            raise self._blind()
        # One by one: in a batch the last bits of a picture would depend on its neighbours.
        pixels = torch.cat([self.painter.decode(each) for each in codes.unflatten(1, (side, side)).split(1)])
        return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)

    def _blind(self) -> UnsupportedError:
        return UnsupportedError(f"the weights of {self.source} have no decoder: they read pictures, and paint none")

    def settled(self, drawing: Drawing, *, begun: tuple[int, int] | None = None, masked: bool = False) -> Settled:
        """See `core.verbs.Draws`; no picture is begun with, and each token is a step."""
        d, side, steps = drawing, self.painter.config.resolution, self.picture_settings().max_new_tokens
        if begun is not None or masked:
            raise UnsupportedError(f"{type(self).__name__} makes pictures of texts alone")
        if d.size not in (None, (side, side)):
            raise ConfigError(f"{type(self).__name__} ({self.source}) paints pictures of {side} x {side} pixels")
        whole = d.strength is None and (d.rescale, d.interval) == (_PLAIN.rescale, _PLAIN.interval)
        if d.steps not in (None, steps) or not whole:
            raise UnsupportedError(
                f"{type(self).__name__} writes a picture code by code: it takes {steps} steps, has no "
                "strength, and guidance that is the same from the first code to the last"
            )
        return Settled(
            size=(side, side), steps=steps, guidance=self.writing.guidance if d.guidance is None else d.guidance,
            negative=d.negative, seed=any_seed() if d.seed is None else d.seed,
        )  # fmt: skip

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        drawing: Drawing,
        *,
        image: Float[Tensor, "images 3 height width"] | None = None,
        mask: Float[Tensor, "masks 1 mask_height mask_width"] | None = None,
        control: Float[Tensor, "controls 3 control_height control_width"] | None = None,
        watch: Callable[[Glimpse], None] | None = None,
    ) -> Float[Tensor, "pictures 3 height width"]:
        """See `core.verbs.Draws`; a glimpse shows the codes so far, and the first code in the place of the others."""
        if not (image is None and mask is None and control is None):
            raise UnsupportedError(f"{type(self).__name__} makes pictures of texts alone")
        if not prompts:
            raise ConfigError("there is no prompt")
        if self.painter.decoder is None:
            raise self._blind()
        d, base = self.settled(drawing), self.picture_settings()
        settings = [replace(base, guidance=float(d.guidance), seed=d.seed + i) for i in range(len(prompts))]
        against = None if d.guidance == 1 else self.asked([d.negative] * len(prompts))
        written: list[list[int]] = [[] for _ in prompts]
        count = self.painter.config.num_codes

        def codes() -> Int[Tensor, "pictures codes"]:
            rows = [self.codes_of(ids)[:count] for ids in written]
            return torch.tensor([[*row, *[0] * (count - len(row))] for row in rows], device=self.device)

        for step in sample(self.writer, self.asked(prompts), settings, Wordless(), against=against):
            if step.token is not None:
                written[step.row].append(step.token)
            if watch is not None and step.row == len(prompts) - 1:
                done, steps = len(written[-1]), base.max_new_tokens
                watch(Glimpse(step=done, steps=steps, pictures=lambda: self.paint(codes())))
        assert all(len(self.codes_of(ids)) == count for ids in written), "a picture was cut"
        return self.paint(codes())
