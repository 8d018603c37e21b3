"""What the systems share that paint pictures out of noise: the verb `draw` and the loss. Not a system itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from polymodal.core.batch import Batch, Loss
from polymodal.core.drawing import Drawing, Glimpse, Settled, any_seed, check_sides
from polymodal.core.errors import ConfigError, MediaError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.heads.diffusion import diffusion_loss
from polymodal.heads.flow import LogitNormal, between, flow_loss
from polymodal.nn.noise import add_noise
from polymodal.samplers.diffusion import Point
from polymodal.samplers.flow import Flow, Sampling
from polymodal.samplers.guidance import Dice, Guidance
from polymodal.systems.base import System

Condition: TypeAlias = Batch
"""Named tensors that tell `Painter.denoise` what is to be seen; the first axis of each is the batch."""
STRENGTH = 0.8  # of a change, where nothing else is asked for


class Painter(System):
    """Base of the systems that paint: the `Draws` protocol. Latents are what is painted; pixels are in [-1, 1].

    A subclass sets ``sampling`` (the schedule it is trained with, what it predicts, how it is sampled) and gives the
    methods below. A batch of `loss` holds ``pixels`` (batch 3 height width), or ``latents`` that were encoded before,
    and what `prompt` makes; it may hold what else would be drawn at random: ``noise``, ``when`` (steps of a diffusion,
    times of a flow), ``posterior`` (noise of the autoencoder's posterior) and ``chance`` (0 to 99: rows below
    ``dropped`` have their condition dropped).
    """

    sampling: Sampling
    steps: int = 50  # of a picture, where nothing else is asked for
    guidance: float = 7.5
    dropped: int = 10  # per cent of the conditions in training
    gamma: float | None = None  # of min-SNR weights, which a diffusion may be trained with
    embeds_guidance: bool = False  # distilled: denoise reads condition["guidance"] (batch), and is asked once

    # -- what subclasses give

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a picture, where nothing else is asked for."""
        raise NotImplementedError

    @property
    def multiple(self) -> int:
        """Pixels that the sides of a picture are multiples of."""
        raise NotImplementedError

    def prompt(self, texts: Sequence[str]) -> Batch:
        """Texts as tensors; no learned layer. The empty text is a condition too: the one that says nothing.

        Raises:
            UnsupportedError: there is no tokenizer.
            MediaError: a text is longer than the model reads: nothing is cut.
        """
        raise NotImplementedError

    def condition(self, batch: Batch) -> Condition:
        """What `denoise` reads of what `prompt` made (of a batch that may hold more)."""
        raise NotImplementedError

    def drop(self, batch: Batch, rows: Bool[Tensor, " batch"]) -> Batch:
        """The batch with what `prompt` makes of the empty text in these rows; no tokenizer is needed."""
        raise NotImplementedError

    def latents(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Channels, rows and columns of one picture's latents; ``size`` is width and height in pixels."""
        raise NotImplementedError

    def places(self, size: tuple[int, int]) -> int:
        """Tokens of one picture, which a dynamic shift of times goes by."""
        return math.prod(self.latents(size)[1:])

    def denoise(
        self, x: Float[Tensor, "batch *latents"], when: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch *latents"]:
        """What the model predicts (as ``sampling`` says) of noisy latents, which have the precision of its weights.

        ``when`` is the step (0 to 999, perhaps between two) of a diffusion, or the time of a flow: 1 is noise, 0 data.
        """
        raise NotImplementedError

    def encode_pixels(
        self, pixels: Float[Tensor, "batch 3 height width"], posterior: Float[Tensor, "batch *latents"] | None = None
    ) -> Float[Tensor, "batch *latents"]:
        """Latents, scaled as `denoise` reads them: with ``posterior`` (standard normal) drawn, else the likeliest.

        Pixels, latents and noise are in fp32, here and in `decode_latents`.
        """
        raise NotImplementedError

    def decode_latents(self, latents: Float[Tensor, "batch *latents"]) -> Float[Tensor, "batch 3 height width"]:
        """Pixels of latents."""
        raise NotImplementedError

    def look_at(
        self, condition: Condition, control: Float[Tensor, "batch 3 height width"], *, against: bool = False
    ) -> Condition:
        """The condition with what ``control`` (in [0, 1]) shows; for models that look at such.

        ``against`` says whether it is the condition that guidance leads away from.
        """
        raise UnsupportedError(f"{type(self).__name__} ({self.source}) looks at no control picture; take a ControlNet")

    # -- training

    def text_condition(self, texts: Sequence[str]) -> Condition:
        """`condition` of `prompt`, on the model's device."""
        return self.condition(self.prompt(texts).to(self.device))

    def lesson(self, texts: Sequence[str], pixels: Float[Tensor, "batch 3 height width"]) -> Batch:
        """What `loss` reads."""
        return Batch(self.prompt(texts), pixels=pixels)

    def forward(self, batch: Batch) -> Float[Tensor, "batch *latents"]:
        """The prediction for ``latents`` (or ``pixels``) with ``noise`` at ``when``; nothing is dropped."""
        x, noise, when = self._painted(batch), batch["noise"], batch["when"]
        flow = isinstance(self.sampling, Flow)
        noisy = between(x, noise, when) if flow else add_noise(x, noise, when, self.sampling.schedule.left)  # type: ignore[union-attr]
        return self.denoise(noisy, when.float(), self.condition(batch))

    def loss(self, batch: Batch) -> Loss:
        """Squared error of the prediction at a drawn step, with some conditions dropped while training."""
        if self.training:
            size = batch["latents" if "latents" in batch else "pixels"].shape[:1]
            chance = batch["chance"] if "chance" in batch else torch.randint(100, size, device=self.device)
            batch = self.drop(batch, chance < self.dropped)
        x, condition, s = self._painted(batch), self.condition(batch), self.sampling

        def model(x: Tensor, when: Tensor) -> Tensor:
            return self.denoise(x, when.float(), condition)

        noise, when = batch.get("noise"), batch.get("when")
        if isinstance(s, Flow):
            return flow_loss(model, x, times=LogitNormal(), noise=noise, t=when)
        return diffusion_loss(
            model, x, left=s.schedule.left, prediction=s.prediction, gamma=self.gamma, noise=noise, step=when
        )

    def _painted(self, batch: Batch) -> Float[Tensor, "batch *latents"]:
        """The latents of a batch; the autoencoder learns nothing of them."""
        if "latents" in batch:
            return batch["latents"]
        pixels = batch["pixels"]
        shape = (len(pixels), *self.latents((pixels.shape[3], pixels.shape[2])))
        with torch.no_grad():
            posterior = batch["posterior"] if "posterior" in batch else torch.randn(shape, device=pixels.device)
            return self.encode_pixels(pixels, posterior)

    def count(self, sample: Sample) -> int:
        """Tokens of texts, and of pictures of the size that it paints."""
        texts = [self.prompt([part.text]) for part in sample.texts]
        tokens = sum(int(batch["valid"].sum()) if "valid" in batch else batch["ids"].shape[1] for batch in texts)
        return tokens + self.places(self.size) * len(sample.images)

    # -- drawing

    def settled(self, drawing: Drawing, *, begun: tuple[int, int] | None = None, masked: bool = False) -> Settled:
        """See `core.verbs.Draws`."""
        d = drawing
        if begun is None and (masked or d.strength is not None):
            raise ConfigError("a mask and a strength are of a picture to begin with, and there is none")
        size = d.size or begun or self.size
        check_sides(f"{type(self).__name__} paints", size, self.multiple)
        guidance = self.guidance if d.guidance is None else d.guidance
        if d.of_guidance and self.embeds_guidance:
            name = f"{type(self).__name__} ({self.source})"
            raise UnsupportedError(
                f"{d.of_guidance}: {name} is distilled, and has no second prediction to be guided by"
            )
        strength = None if begun is None else d.strength or (1.0 if masked else STRENGTH)
        return Settled(
            steps=d.steps or self.steps, guidance=guidance,
            rescale=d.rescale, interval=d.interval, size=size, negative=d.negative, strength=strength,
            seed=any_seed() if d.seed is None else d.seed,
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
        """See `core.verbs.Draws`."""
        if not prompts:
            raise ConfigError("there is no prompt")
        begun = None if image is None else (image.shape[3], image.shape[2])
        d = self.settled(drawing, begun=begun, masked=mask is not None)
        width, height = d.size
        given = (("picture to begin with", image), ("mask", mask), ("control picture", control))
        for name, other in given:
            if other is not None and (other.shape[3], other.shape[2]) != (width, height):
                across, down = other.shape[3], other.shape[2]
                raise MediaError(f"the {name} has {across} x {down} pixels, what is painted {width} x {height}")
            if other is not None and len(other) not in (1, len(prompts)):
                raise MediaError(f"{len(other)} pictures for {len(prompts)} prompts: the {name} is one, or one each")
        with self.evaluating():
            return self._draw(prompts, d, image, mask, control, watch)

    def _draw(
        self, prompts: Sequence[str], d: Settled, image: Tensor | None, mask: Tensor | None, control: Tensor | None,
        watch: Callable[[Glimpse], None] | None,
    ) -> Tensor:  # fmt: skip
        rows, shape = len(prompts), self.latents(d.size)
        points: Sequence[Point] = self.sampling.points(d.steps, self.places(d.size))
        dice = Dice(range(d.seed, d.seed + rows))
        noise = x = dice(shape, self.device)
        model, adjust = self._model(prompts, d, control), None
        if image is not None:
            assert d.strength is not None, "a picture is begun with"
            pixels = image.to(self.device).expand(rows, -1, -1, -1) * 2 - 1  # each row draws its own of the posterior
            posterior = dice(shape, self.device)
            start = self.encode_pixels(pixels.float(), posterior)
            taken = max(1, int((len(points) - 1) * d.strength))
            points = points[-1 - taken :]
            x = noise if d.strength == 1 else _noisy(start, noise, points[0])
            adjust = None if mask is None else self._keep(start, noise, mask)

        def tell(step: int, sample: Tensor) -> None:
            if watch is not None:
                watch(Glimpse(step=step, steps=len(points) - 1, pictures=lambda: self._pictures(sample)))

        x = self.sampling.sample(
            model, x, points, fresh=lambda: dice(shape, self.device), adjust=adjust, watch=tell
        )  # fmt: skip
        pictures = self._pictures(x)
        if mask is not None and image is not None:  # what is kept is kept to the pixel
            pictures = torch.where(mask.cpu() > 0, pictures, image.cpu())
        return pictures

    def _keep(self, start: Tensor, noise: Tensor, mask: Tensor) -> Callable[[Tensor, Point], Tensor]:
        """Puts back what is not painted after each step; latents that hold any pixel of the mask are painted."""
        anew = F.adaptive_max_pool2d(mask.to(self.device).float(), start.shape[-2:])
        return lambda x, point: anew * x + (1 - anew) * _noisy(start, noise, point)

    def _model(self, prompts: Sequence[str], d: Settled, control: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided prediction."""
        rows, scale = len(prompts), float(d.guidance)
        shown = None if control is None else control.to(self.device).expand(rows, -1, -1, -1)

        def told(texts: Sequence[str], *, against: bool = False) -> Condition:
            condition = self.text_condition(texts)
            return condition if shown is None else self.look_at(condition, shown, against=against)

        asked = told(prompts)
        if self.embeds_guidance:
            asked, scale = Batch(asked, guidance=torch.full((rows,), scale, device=self.device)), 1.0
        guide = Guidance(scale=scale, rescale=float(d.rescale), interval=d.interval)
        both = asked if scale == 1 else Batch.join([told([d.negative] * rows, against=True), asked])

        def model(x: Tensor, when: Tensor) -> Tensor:
            x, when = x.to(self.dtype), when.float()
            if not guide.at(self.sampling.progress(float(when[0]))):
                return self.denoise(x, when, asked).float()
            against, wanted = self.denoise(torch.cat([x, x]), torch.cat([when, when]), both).float().chunk(2)
            return guide.mix(wanted, against)

        return model

    def _pictures(self, latents: Tensor) -> Float[Tensor, "pictures 3 height width"]:
        """In [0, 1], on the CPU."""
        return (self.decode_latents(latents.float()) / 2 + 0.5).clamp(0, 1).cpu()


def _noisy(x: Tensor, noise: Tensor, point: Point) -> Tensor:
    return point.signal * x + point.rest * noise
