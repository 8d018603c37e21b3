"""What policies in LeRobot's format have in common: features in the config, and statistics. Not a system itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from polymodal.encoders.resnet import STAGES, ResNetConfig
from polymodal.modalities.action import Statistics
from polymodal.modalities.image import IMAGENET_MEAN, IMAGENET_STD, Exact, ImageProcessor
from polymodal.modalities.stacked import Colour
from polymodal.systems.acting import STATISTICS, Policy
from polymodal.systems.base import PREPROCESSOR
from polymodal.weights.fields import Fields
from polymodal.weights.files import SINGLE, Checkpoint
from polymodal.weights.format import Format
from polymodal.weights.rules import Rule, drop

_CAMERA, _STATE, _ACTION = "observation.images.", "observation.state", "action"
_DEPTHS: Final = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
_OLD: Final = "normalize_inputs.buffer_"
_VECTORS: Final = ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99")


def read_features(f: Fields) -> dict[str, Any]:
    """Cameras (those of the usual names by their last part), the size of their pictures, widths of state and action."""
    wanted, given = f.take("input_features", dict), f.take("output_features", dict)
    shapes = {key: _shape(f, "input_features", key, ("VISUAL", "STATE")) for key in wanted}
    shapes |= {key: _shape(f, "output_features", key, ("ACTION",)) for key in given}
    pictures = [key for key in wanted if key != _STATE]
    sizes = {shapes[key] for key in pictures}
    if len(sizes) > 1 or any(len(size) != 3 or size[0] != 3 for size in sizes):
        f.problems.append(f"config.json: pictures of all cameras have one size and three colours, not {sorted(sizes)}")
    for key in (_STATE, _ACTION):
        if len(shapes.get(key, ())) != 1:
            f.problems.append(f"config.json: {key} is needed, as one row of numbers")
    _, height, width = next(iter(sizes), (3, 1, 1)) if not f.problems else (3, 1, 1)
    return {
        "cameras": tuple(key.removeprefix(_CAMERA) for key in pictures),
        "image_height": height, "image_width": width,
        "state_width": next(iter(shapes.get(_STATE, (1,)))), "action_width": next(iter(shapes.get(_ACTION, (1,)))),
    }  # fmt: skip


def _shape(f: Fields, name: str, key: str, kinds: Sequence[str]) -> tuple[int, ...]:
    feature = f.child(name).child(key)
    feature.choose("type", {kind: kind for kind in kinds})
    return feature.numbers("shape", int) or (1,)


def write_features(c: Any) -> dict[str, Any]:
    """The fields of `read_features`."""
    keys = [name if "." in name else _CAMERA + name for name in c.cameras]
    pictures = {key: {"type": "VISUAL", "shape": [3, c.image_height, c.image_width]} for key in keys}
    return {
        "input_features": {_STATE: {"type": "STATE", "shape": [c.state_width]}, **pictures},
        "output_features": {_ACTION: {"type": "ACTION", "shape": [c.action_width]}},
    }


def read_common(f: Fields, normalisation: str) -> None:
    """Fields of every policy that say nothing of the network."""
    f.require("normalization_mapping", {"VISUAL": "MEAN_STD", "STATE": normalisation, "ACTION": normalisation})
    f.require("use_peft", False)
    f.ignore("how many steps of a chunk are carried out is said to the runner", "n_action_steps")
    f.ignore("a ResNet's first weights are in the file, as trained", "pretrained_backbone_weights")
    f.ignore(
        "where and how it was trained and published", "device", "use_amp", "push_to_hub", "repo_id", "private", "tags",
        "license", "pretrained_path", "pretrained_revision", "optimizer_lr", "optimizer_weight_decay",
        "optimizer_lr_backbone", "optimizer_betas", "optimizer_eps", "scheduler_name", "scheduler_warmup_steps",
        "drop_n_last_frames", "compile_model", "compile_mode", "gradient_checkpointing",
    )  # fmt: skip


def read_backbone(f: Fields) -> dict[str, Any]:
    """Depths and widths of a ResNet; ours are written where they are not those of a name that LeRobot knows."""
    name = f.choose("vision_backbone", {n: n for n in (*_DEPTHS, "polymodal")}, "resnet18")
    if name == "polymodal" or f.has("vision_depths"):
        return {"depths": f.numbers("vision_depths", int), "widths": f.numbers("vision_widths", int)}
    return {"depths": _DEPTHS[name]}


def write_backbone(vision: ResNetConfig) -> dict[str, Any]:
    """The fields of `read_backbone`."""
    for name, depths in _DEPTHS.items():
        if (vision.depths, vision.widths) == (depths, STAGES):
            return {"vision_backbone": name}
    own = {"vision_depths": list(vision.depths), "vision_widths": list(vision.widths)}
    return {"vision_backbone": "polymodal", **own}


def statistics_rules() -> list[Rule]:
    """Until 2025 the weights' file held statistics, too."""
    return [
        drop(f"{name}.{{feature}}.{{what}}", "statistics of the data set, which the policy reads on its own")
        for name in ("normalize_inputs", "normalize_targets", "unnormalize_outputs")
    ]


def find_statistics(folder: Path) -> dict[str, dict[str, Tensor]]:
    """LeRobot's statistics, feature -> name -> vector: of the file of its processor, or of the old weights' file."""
    files = sorted(folder.glob("policy_preprocessor*normalizer*.safetensors"))
    found: dict[str, dict[str, Tensor]] = {}
    with Checkpoint(folder, files[0].name if files else SINGLE) as checkpoint:
        for name in checkpoint.meta():
            feature, _, what = name.rpartition(".")
            if not files:
                if not name.startswith((_OLD, "unnormalize_outputs.buffer_")):
                    continue
                feature = feature.partition(".buffer_")[2]
            found.setdefault(feature.replace("_", "."), {})[what] = checkpoint.read(name)
    return found


def robot_statistics(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Statistics]]:
    """Those of state and action, as of a data set called ``lerobot``; none where there are none."""
    names = {"state": _STATE, "action": _ACTION}
    out: dict[str, Statistics] = {}
    for ours, key in names.items():
        if key in found:
            kept = {name: value.tolist() for name, value in found[key].items() if name in _VECTORS}
            out[ours] = Statistics.from_json(kept)
    return {"lerobot": out} if out else {}


def processor(c: Any, found: Mapping[str, Mapping[str, Tensor]] | None = None) -> ImageProcessor:
    """Pictures at the size of the config; the colours of the first camera's statistics, else ImageNet's."""
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    for name in c.cameras:
        colours = (found or {}).get((name if "." in name else _CAMERA + name).replace("_", "."))
        if colours is not None:
            mean, std = _colour(colours["mean"]), _colour(colours["std"])
            break
    size = Exact(height=c.image_height, width=c.image_width)
    return ImageProcessor(resize=size, resample="bilinear", mean=mean, std=std)


def _colour(values: Tensor) -> Colour:
    red, green, blue = values.flatten().tolist()
    return red, green, blue


class LeRobotPolicy(Policy):
    """Base of those whose pre-processing and statistics may be LeRobot's, where there are none of our own."""

    def default_images(self) -> ImageProcessor:
        return processor(self.config)

    def load_images(self, folder: Path, fmt: Format) -> Any:
        if (folder / PREPROCESSOR).is_file():
            return super().load_images(folder, fmt)
        return processor(self.config, find_statistics(folder))

    def load_processors(self, folder: Path) -> None:
        super().load_processors(folder)
        if not (folder / STATISTICS).is_file():
            self.use_statistics(robot_statistics(find_statistics(folder)))
