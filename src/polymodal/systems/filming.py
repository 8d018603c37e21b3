"""What the systems share that make films: the verb `film`. Not a system itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from polymodal.core.drawing import Glimpse, any_seed, check_sides
from polymodal.core.errors import MediaError, UnsupportedError
from polymodal.core.filming import Filming, SettledFilm
from polymodal.systems.base import System


class FilmMaker(System):
    """Base of the systems that make films: the `Films` protocol. Inside, pixels are in [-1, 1].

    A subclass sets these, which hold where nothing else is asked for, and gives `made`. ``motion`` is None where the
    model is not told of it.
    """

    size: tuple[int, int]
    multiple: int  # pixels that the sides are multiples of
    frames: int
    fps: int = 8
    steps: int = 25
    guidance: float = 3.0
    motion: int | None = None

    def check_frames(self, frames: int) -> None:
        """Raises a `ConfigError` where the model makes no film of so many."""

    def made(
        self,
        prompt: str,
        settled: SettledFilm,
        image: Float[Tensor, "1 3 height width"] | None,
        watch: Callable[[int, Callable[[], Tensor]], None],
    ) -> Float[Tensor, "frames 3 height width"]:
        """The frames of a film; ``watch`` is given the number of steps done and what makes the frames to expect."""
        raise NotImplementedError

    def settled_film(self, filming: Filming, *, begun: tuple[int, int] | None = None) -> SettledFilm:
        """See `core.verbs.Films`."""
        f = filming
        size, frames = f.size or begun or self.size, f.frames or self.frames
        check_sides(f"{type(self).__name__} films", size, self.multiple)
        if f.motion is not None and self.motion is None:
            raise UnsupportedError(f"{type(self).__name__} ({self.source}) is not told how much is to move")
        self.check_frames(frames)
        return SettledFilm(
            frames=frames, fps=f.fps or self.fps, motion=f.motion or self.motion, steps=f.steps or self.steps,
            guidance=self.guidance if f.guidance is None else f.guidance, size=size,
            seed=any_seed() if f.seed is None else f.seed,
        )  # fmt: skip

    @torch.no_grad()
    def film(
        self,
        prompt: str,
        filming: Filming,
        *,
        image: Float[Tensor, "3 height width"] | None = None,
        watch: Callable[[Glimpse], None] | None = None,
    ) -> Float[Tensor, "frames 3 height width"]:
        """See `core.verbs.Films`."""
        f = self.settled_film(filming, begun=None if image is None else (image.shape[2], image.shape[1]))
        if image is not None and (image.shape[2], image.shape[1]) != f.size:
            raise MediaError(
                f"the picture to begin with has {image.shape[2]} x {image.shape[1]} pixels, the film "
                f"{f.size[0]} x {f.size[1]}"
            )

        def tell(step: int, pixels: Callable[[], Tensor]) -> None:
            if watch is not None:
                watch(Glimpse(step=step, steps=f.steps, pictures=lambda: _seen(pixels())))

        with self.evaluating():
            begun = None if image is None else image[None].float().to(self.device) * 2 - 1
            return _seen(self.made(prompt, f, begun, tell))


def _seen(pixels: Tensor) -> Float[Tensor, "frames 3 height width"]:
    """In [0, 1], on the CPU."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()
