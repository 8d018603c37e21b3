"""`load` and `build`: the two ways to a system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.core.errors import ConfigError, did_you_mean
from polymodal.core.files import read_json
from polymodal.core.precision import Precision
from polymodal.systems import TABLE
from polymodal.weights.hub import resolve
from polymodal.weights.pipeline import INDEX

if TYPE_CHECKING:
    from polymodal.systems.base import System


def load(name: str | Path, *, precision: Precision = "fp32", revision: str | None = None) -> System:
    """A system with real weights, all of them, ready for inference.

    Args:
        name: a folder in the Hub's format, a model that we ship ("polymodal/nano-clip"), or a Hub name.
        precision: "fp32" to train on or to compare, "bf16", or "auto": bf16 where this machine is faster in it.
        revision: a Hub commit, tag or branch; without one the commit first loaded on this machine is kept.

    Raises:
        ConfigError: nothing has this name, or the config asks for something that is not supported.
        WeightsError: the checkpoint and the config do not fit; every problem is listed.
    """
    folder = resolve(name, revision)
    cls, format_name = identify(folder)
    model = cls.from_folder(folder, format_name, precision=precision)
    model.source = str(name)
    return model


def identify(folder: Path) -> tuple[type[System], str]:
    """The system class and the format that a folder declares: by the files it has, then by `model_type`."""
    from polymodal.systems.clip import CLIP

    if (folder / "open_clip_config.json").is_file() and not (folder / "config.json").is_file():
        return CLIP, "open_clip"
    file = folder / "config.json"
    if not file.is_file() and (folder / INDEX).is_file():
        file = folder / INDEX
    if not file.is_file():
        raise ConfigError(f"{folder} has no config.json: it is not a checkpoint in the format of the Hub")
    config = read_json(file)
    # LeRobot's: type; of diffusers: the class of a pipeline, or of a lone part.
    diffusers = file.name == INDEX or (isinstance(config, dict) and not {"model_type", "type"} & config.keys())
    field = "_class_name" if diffusers else "model_type"
    model_type = config.get(field, config.get("type")) if isinstance(config, dict) else None
    known = {t for entry in TABLE.values() for t in entry.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise ConfigError(f"{file}: no system reads {field} {model_type!r}{did_you_mean(str(model_type), known)}")
    readers = [entry for entry in TABLE.values() if model_type in entry.model_types]
    named = config.get("architectures") or ()
    chosen = [entry for entry in readers if any(name in named for name in entry.architectures)]
    cls = (chosen or readers)[0].resolve()
    return cls, "lerobot" if "model_type" not in config and "lerobot" in cls.formats else "hf"


def build(config: Any) -> System:
    """A system with random weights, initialised as its paper says, from its config; nothing is loaded.

    Raises:
        ConfigError: no system has a config of this type.
    """
    for entry in TABLE.values():
        cls = entry.resolve()
        if cls.__annotations__.get("config") in (type(config), type(config).__name__):
            return cls.build(config)
    known = ", ".join(f"{e.cls}Config" for e in TABLE.values())
    raise ConfigError(f"{type(config).__name__} is not the config of a system; known: {known}")
