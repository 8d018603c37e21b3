"""DINOv2: a ViT that learns from pictures alone, by agreeing with a moving average of itself.

Paper: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023,
https://arxiv.org/abs/2304.07193. Official code: facebookresearch/dinov2.
Hub: facebook/dinov2-small, -base, -large, -giant.

    2 global crops ------------> teacher (moving average of the student) -> heads -> Sinkhorn-Knopp -> targets
    2 global crops, masked ----> student -> class tokens -> DINO head ----> the other crop's target
                                         -> masked patches -> iBOT head --> the same patch's target
    n local crops -------------> student -> class tokens -> DINO head ----> both crops' targets

A system of a Hub checkpoint, which holds the backbone only, has no objective: it embeds. `DINOv2.pretrain` makes one
that trains on. What is embedded and saved is the teacher.

Training details kept here (ssl_meta_arch.py and its configs): a global crop is matched with the other global crop's
target only; all DINO terms are divided by their number, local and global; Sinkhorn-Knopp over all ranks and both crops
in place of centring; teacher temperature 0.04 to 0.07, linearly; teacher momentum to 1 along a cosine; KoLeo inside
each crop; last layers frozen at first; the teacher without stochastic depth.

Deviations: positions are resized to an exact grid (as transformers does), the official code passes a scale factor that
is 0.1 of a patch larger; stochastic depth draws per sample, not a fixed number of samples; class and mask tokens take
no weight decay; with gradient accumulation, Sinkhorn-Knopp and KoLeo see one micro-batch. The rise of the weight decay
and the lower learning rate of the patch embedding are a recipe's affair and not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from polymodal.core.batch import Batch, Loss
from polymodal.core.errors import ConfigError, UnsupportedError
from polymodal.core.sample import Sample
from polymodal.core.verbs import TensorSpec
from polymodal.encoders.timm import init_timm
from polymodal.encoders.vit import ViT, ViTConfig
from polymodal.heads.distillation import (
    DistillationConfig,
    PrototypeHead,
    distillation,
    koleo,
    masked_mean,
    prototype_heads,
    sinkhorn_knopp,
)
from polymodal.modalities.image import IMAGENET_MEAN, IMAGENET_STD, CenterCrop, ImageProcessor, ShortestEdge
from polymodal.systems.base import Embedder, Format, Reference
from polymodal.weights.fields import IMAGE_FIELDS, Fields, FieldTable, read_fields, write_fields
from polymodal.weights.layouts import dinov2_rules
from polymodal.weights.rules import Rule, init


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """The backbone, and the objective if it is to be trained."""

    vision: ViTConfig
    objective: DistillationConfig | None = None

    def __post_init__(self) -> None:
        if not (self.vision.class_token and self.vision.mask_token and self.vision.layer_scale is not None):
            raise ConfigError("DINOv2's backbone has a class token, a mask token and layer scale")


def swiglu_dim(dim: int, ratio: float) -> int:
    """Two thirds of what an MLP would have, so that both have as many weights; a multiple of eight."""
    return (int(int(dim * ratio) * 2 / 3) + 7) // 8 * 8


def preset(dim: int, layers: int, heads: int, hidden: int) -> DINOv2Config:
    return DINOv2Config(
        vision=ViTConfig(
            image_size=518, patch_size=14, dim=dim, num_layers=layers, num_heads=heads, hidden_dim=hidden,
            activation="gelu" if hidden == 4 * dim else "swiglu", layer_scale=1.0, mask_token=True,
        )
    )  # fmt: skip


PRESETS = {
    "facebook/dinov2-small": lambda: preset(384, 12, 6, 1536),
    "facebook/dinov2-base": lambda: preset(768, 12, 12, 3072),
    "facebook/dinov2-large": lambda: preset(1024, 24, 16, 4096),
    "facebook/dinov2-giant": lambda: preset(1536, 40, 24, 4096),
}


@final
class DINOv2(Embedder):
    """Self-distillation with masked patches. ``vision`` is the product: the teacher, where there is an objective."""

    config: DINOv2Config
    teacher_temperature: Tensor

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__(config)
        self.vision = ViT(config.vision)
        if (o := config.objective) is None:
            return
        self.student = ViT(config.vision)
        self.student_heads = prototype_heads(config.vision.dim, o)
        self.teacher_heads = prototype_heads(config.vision.dim, o)
        # A buffer, since it changes after each step and a resumed run needs it.
        self.register_buffer("teacher_temperature", torch.tensor(o.temperatures[0]))
        for module in (self.vision, self.teacher_heads):
            module.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """timm's scheme for ViTs: truncated normals of 0.02; class token 1e-6, mask token zero."""
        init_timm(self.vision)
        if self.config.objective is not None:
            self._start()

    def _start(self) -> None:
        """Student and teacher begin as one: the backbone's weights, and fresh heads."""
        for head in self.student_heads.values():
            assert isinstance(head, PrototypeHead)
            head.init_weights()
        self.student.load_state_dict(self.vision.state_dict())
        self.teacher_heads.load_state_dict(self.student_heads.state_dict())

    def pretrain(self, objective: DistillationConfig) -> DINOv2:
        """A new system that trains on from this backbone: it is student and teacher; the heads are random."""
        model = DINOv2(replace(self.config, objective=objective))
        model.vision.load_state_dict(self.vision.state_dict())
        model._start()
        model.images, model.source = self.images, f"{self.source}, to be trained on with new heads"
        return model

    def train(self, mode: bool = True) -> DINOv2:
        super().train(mode)
        if self.config.objective is not None:
            self.vision.eval()  # the teacher is never dropped from
        return self

    def inputs_spec(self) -> dict[str, TensorSpec]:
        v, o = self.config.vision, self.config.objective
        if o is None:
            return {"pixels": TensorSpec(shape=(v.num_channels, v.image_size, v.image_size))}
        return {
            "global": TensorSpec(shape=(2, v.num_channels, o.global_size, o.global_size)),
            "local": TensorSpec(shape=(o.num_locals, v.num_channels, o.local_size, o.local_size)),
            "masks": TensorSpec(shape=(2, (o.global_size // v.patch_size) ** 2), dtype=torch.bool),
        }

    @property
    def embedding_dim(self) -> int:
        return self.config.vision.dim

    def encode(self, batch: Batch) -> Float[Tensor, "samples dim"]:
        """The (teacher's) class token after the last norm, at unit length."""
        return F.normalize(self.vision.class_vector(batch["pixels"].to(self.device)).float(), dim=-1)

    def forward(self, batch: Batch) -> Float[Tensor, "batch tokens dim"]:
        """All (the teacher's) tokens after the last norm; the mask token replaces patches where ``masked`` is True."""
        return self.vision(batch["pixels"], masked=batch.get("masked")).x

    def loss(self, batch: Batch) -> Loss:
        """DINO, iBOT and KoLeo of the crops ``global`` (batch, 2, ...), under ``masks``, and ``local`` (batch, n, ...).

        Raises:
            UnsupportedError: the system was made without an objective.
            DataError: the micro-batch has one picture only.
        """
        o, size = self.config.objective, batch.size
        if o is None:
            raise UnsupportedError("this DINOv2 has no heads to train: take model.pretrain(DistillationConfig())")
        crops, local = (rearrange(batch[n], "b v ... -> (v b) ...") for n in ("global", "local"))
        masks = rearrange(batch["masks"], "b v n -> (v b) n")
        targets, patch_targets = self.targets(crops, masks)
        tokens = self.student(crops, masked=masks).x
        patches = self.student_heads["ibot"](tokens[:, self.config.vision.num_prefix :][masks])
        student = self.student_heads["dino"](torch.cat([tokens[:, 0], self.student.class_vector(local)]))
        student = rearrange(student, "(v b) k -> v b k", b=size)
        # Sums over the batch of what the official code averages; terms are pairs of a student's and a teacher's view.
        terms = 2 * (len(student) - 1)
        temperature = o.student_temperature
        global_loss = distillation(student[:2], targets.flip(0), temperature).sum() / terms
        local_loss = distillation(student[2:], targets.sum(0), temperature).sum() / terms
        patch_loss = masked_mean(distillation(patches, patch_targets, temperature), masks) / 2
        spread = o.koleo_weight * size * torch.stack([koleo(view) for view in tokens[:, 0].chunk(2)]).sum()
        parts = {"dino_global": global_loss, "dino_local": local_loss, "ibot": patch_loss, "koleo": spread}
        total = torch.stack(list(parts.values())).sum()
        return Loss(total=total, weight=size, metrics={n: p.detach() / size for n, p in parts.items()})

    @torch.no_grad()
    def targets(
        self, crops: Float[Tensor, "two_batch channels height width"], masks: Bool[Tensor, "two_batch patches"]
    ) -> tuple[Float[Tensor, "2 batch prototypes"], Float[Tensor, "masked prototypes"]]:
        """The teacher's assignments of both global crops, and of the patches that the student does not see."""
        tokens = self.vision(crops).x
        classes = sinkhorn_knopp(self.teacher_heads["dino"](tokens[:, 0]), self.teacher_temperature)
        hidden = self.teacher_heads["ibot"](tokens[:, self.config.vision.num_prefix :][masks])
        return rearrange(classes, "(v b) k -> v b k", v=2), sinkhorn_knopp(hidden, self.teacher_temperature)

    @torch.no_grad()
    def after_step(self, step: int, total_steps: int) -> None:
        """Moves the teacher towards the student, sets its temperature, holds the last layers while they are frozen."""
        o = self.config.objective
        if o is None:
            return
        frozen = step <= o.frozen * total_steps
        pairs = [*zip(self.vision.parameters(), self.student.parameters(), strict=True)]
        heads = zip(self.teacher_heads.named_parameters(), self.student_heads.parameters(), strict=True)
        for (name, teacher), student in heads:
            if frozen and name.endswith((".prototypes", ".scale")):
                student.copy_(teacher)  # which has not moved either: an optimiser step at learning rate zero
            pairs.append((teacher, student))
        for teacher, student in pairs:
            teacher.lerp_(student, 1 - o.momentum_at(step - 1, total_steps))
        self.teacher_temperature.fill_(o.temperature_at(step, total_steps))

    def count(self, sample: Sample) -> int:
        """Tokens that the tower computes for the pictures of a sample, at the size of its processor."""
        crop = self.images.crop if isinstance(self.images, ImageProcessor) else None
        height, width = (crop.height, crop.width) if crop else (self.config.vision.image_size,) * 2
        return len(sample.images) * self.config.vision.count(height, width)

    def default_images(self) -> ImageProcessor:
        """The evaluation view: a seventh of the shorter side is cut off; 224 pixels unless the objective has others."""
        side = 224 if self.config.objective is None else self.config.objective.global_size
        crop, resize = CenterCrop(height=side, width=side), ShortestEdge(size=side * 8 // 7)
        return ImageProcessor(resize=resize, crop=crop, resample="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)

    reference = Reference(
        package="transformers", cls="Dinov2Model", inputs={"pixels": "pixel_values"}, output="last_hidden_state",
        loss=False,
    )  # fmt: skip


VISION: FieldTable = (
    *IMAGE_FIELDS, ("hidden_size", "dim", 768), ("num_hidden_layers", "num_layers", 12),
    ("num_attention_heads", "num_heads", 12), ("layer_norm_eps", "norm_eps", 1e-6), ("qkv_bias", "qkv_bias", True),
    ("layerscale_value", "layer_scale", 1.0), ("drop_path_rate", "drop_path", 0.0),
)  # fmt: skip


def read_hf(raw: Mapping[str, Any]) -> tuple[DINOv2Config, dict[str, str]]:
    f = Fields(raw)
    f.require("model_type", "dinov2")
    f.require("use_mask_token", True)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        f.require(name, 0.0)
    reason = "says which feature maps transformers' backbone class returns"
    f.ignore(reason, "apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names")
    vision, ratio = read_fields(f, VISION), f.take("mlp_ratio", float, 4.0)
    if f.take("use_swiglu_ffn", bool, False):
        f.ignore("SwiGLU has its own activation", "hidden_act")
        vision |= {"activation": "swiglu", "hidden_dim": swiglu_dim(vision["dim"], ratio)}
    else:
        vision |= read_fields(f, (("hidden_act", "activation", "gelu"),)) | {"hidden_dim": int(vision["dim"] * ratio)}
    report = f.done()
    return DINOv2Config(vision=ViTConfig(**vision, mask_token=True)), report


def write_hf(c: DINOv2Config) -> dict[str, Any]:
    v, swiglu = c.vision, c.vision.activation == "swiglu"
    ratios = [r for r in range(1, 17) if (swiglu_dim(v.dim, float(r)) if swiglu else r * v.dim) == v.hidden_dim]
    activation = {} if swiglu else write_fields(v, (("hidden_act", "activation", "gelu"),))
    fields = write_fields(v, VISION) | {"mlp_ratio": (*ratios, 4)[0], "use_swiglu_ffn": swiglu, "use_mask_token": True}
    raw = {"architectures": ["Dinov2Model"], "model_type": "dinov2"} | fields | activation
    if read_hf(raw)[0] != replace(c, objective=None):
        raise ConfigError(f"the Hub's format has no field for something here (hidden_dim is a multiple of dim): {c}")
    return raw


def rules_hf(config: DINOv2Config) -> list[Rule]:
    swiglu = config.vision.activation == "swiglu"
    reason = "only training needs it: files of the Hub hold the teacher's backbone"
    heads = ("mlp.{i}.{p}", "prototypes", "scale")
    return [
        *dinov2_rules("vision", swiglu=swiglu),
        *(init(name, reason) for r in dinov2_rules("student", swiglu=swiglu) for name in r.ours),
        *(init(f"{who}_heads.{{head}}.{part}", reason) for who in ("student", "teacher") for part in heads),
        init("teacher_temperature", reason),
    ]


DINOv2.formats = {"hf": Format(read=read_hf, write=write_hf, rules=rules_hf)}
