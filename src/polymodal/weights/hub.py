"""From a name to a folder: a local path, a model that we ship, or the Hub at a pinned revision."""

from __future__ import annotations

import contextlib
from importlib import resources
from pathlib import Path

from polymodal.core.errors import ConfigError
from polymodal.core.files import cache_dir, read_json, write_json
from polymodal.weights.pipeline import INDEX

# Only data, and only of the top folder: no pickles, no code.
SMALL = ["*.json", "*.txt", "*.model"]
WEIGHTS = ["model*.safetensors", "policy_preprocessor*.safetensors"]  # the latter: statistics of LeRobot's policies
OTHER_WEIGHTS = ["*.safetensors"]  # of a repository without config.json
# Of a pipeline, also of the folders of its parts; but no second copy of its weights, and not the filter of pictures.
PARTS = [f"*/{kind}" for kind in (*SMALL, "model*.safetensors", "diffusion_pytorch_model*.safetensors")]
NO_PARTS = ["*/*/*", "*.fp16*", "*.non_ema*", "safety_checker/*", "vae_1_0/*", "vae_encoder/*", "vae_decoder/*"]


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
        there = ", ".join(models) or "none"
        raise ConfigError(
            f"no shipped model is called {str(name)!r} (there: {there}); name another by its folder, or as on the Hub"
        )
    if path.exists():
        raise ConfigError(f"{path} is a file; a checkpoint is a folder with config.json and safetensors files")
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ConfigError(f"{name}: no such folder, and not a Hub name of the form owner/model")
    return _download(str(name), revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    pins_file = cache_dir() / "pins.json"
    pins = read_json(pins_file) if pins_file.is_file() else {}
    if not isinstance(pins, dict):
        raise ConfigError(f"{pins_file} is not an object of names and commits; delete it")
    pinned = pins.get(name)
    wanted = revision or pinned or "main"
    if wanted == pinned:  # it was whole when it was pinned: no need to ask, unless the cache was cleared since
        with contextlib.suppress(LocalEntryNotFoundError):
            patterns = [*SMALL, *WEIGHTS]
            kept = snapshot_download(
                name, revision=pinned, allow_patterns=patterns, ignore_patterns="*/*", local_files_only=True
            )
            if not (Path(kept) / INDEX).is_file():
                return Path(kept)
            return Path(
                snapshot_download(
                    name, revision=pinned, allow_patterns=PARTS, ignore_patterns=NO_PARTS, local_files_only=True
                )
            )
    try:
        # Each call asks the Hub, and answers from the local cache where the Hub cannot be reached.
        folder = Path(snapshot_download(name, revision=wanted, allow_patterns=SMALL, ignore_patterns="*/*"))
        weights, ignored = WEIGHTS if (folder / "config.json").is_file() else OTHER_WEIGHTS, ["*/*"]
        if weights is OTHER_WEIGHTS and (folder / INDEX).is_file():
            weights, ignored = PARTS, NO_PARTS
        folder = Path(snapshot_download(name, revision=folder.name, allow_patterns=weights, ignore_patterns=ignored))
    except Exception as error:  # what the client raises without a network has no common base
        raise ConfigError(f"{name}: {_reason(error, wanted)}") from error
    commit = folder.name
    if pinned is None or (revision == "main" and pinned != commit):
        write_json(pins_file, pins | {name: commit})
    return folder


def _reason(error: Exception, revision: str) -> str:
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: "its terms have to be accepted on its page of the Hub, and then `hf auth login` run",
        errors.RepositoryNotFoundError: "the Hub has no model of this name, or it is private: `hf auth login`",
        errors.RevisionNotFoundError: f"the Hub has no revision {revision} of it; pass revision='main' for the newest",
        errors.HFValidationError: "no such folder, and not a name that the Hub allows",
        errors.LocalEntryNotFoundError: (
            f"the Hub cannot be reached and revision {revision} is not in the local cache. Load it once with a "
            "network, or give the path of a local folder that holds config.json and model.safetensors"
        ),
    }
    for kind, reason in known.items():
        if isinstance(error, kind):
            return reason
    return f"fetching revision {revision} from the Hub failed: {type(error).__name__}: {error}"
