"""From a name to a folder: a local path, a model that we ship, or the Hub at a pinned revision."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from polymodal.core.errors import ConfigError, did_you_mean
from polymodal.core.files import cache_dir, read_json, write_json

# Only data: no pickles, no code.
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model"]


def shipped() -> dict[str, Path]:
    """The models that come with the package, by name."""
    root = Path(str(resources.files("polymodal"))) / "shipped"
    return {f"polymodal/{p.parent.name}": p.parent for p in sorted(root.glob("*/config.json"))}


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint.

    A Hub name without a ``revision`` is pinned to the commit that was first loaded on this machine (in
    ``pins.json`` of the cache), so that a model does not change under its user; pass ``revision="main"`` to move on.

    Raises:
        ConfigError: nothing has this name, or the Hub cannot be reached and the model is not in the local cache.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if str(name).startswith("polymodal/"):
        models = shipped()
        if str(name) in models:
            return models[str(name)]
        raise ConfigError(f"no shipped model is called {str(name)!r}{did_you_mean(str(name), models)}")
    if path.exists():
        raise ConfigError(f"{path} is a file; a checkpoint is a folder with config.json and safetensors files")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ConfigError(f"{name}: no such folder, and not a Hub name of the form owner/model")
    return _download(str(name), revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    pins_file = cache_dir() / "pins.json"
    pins = read_json(pins_file) if pins_file.is_file() else {}
    try:
        commit = pins.get(name) if revision is None else None
        if commit is None:
            commit = HfApi().model_info(name, revision=revision).sha
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{name} cannot be fetched from the Hub ({type(error).__name__}). Offline? Give the path of a local folder "
            "that holds config.json and model.safetensors"
        ) from error
    if pins.get(name) != commit:
        write_json(pins_file, pins | {name: commit})
    return folder
