"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) as a transform over a built model, in PEFT's file format.

An adapter for a model of transformers has that library's names: ``load_peft(model, folder, names=model.hub_layers())``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, WeightsError
from polymodal.core.files import atomic_path, read_json, write_json, write_tensors

Model = TypeVar("Model", bound=nn.Module)
PREFIX = "base_model.model."
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"}
# Fields of an adapter_config.json that do not change the numbers of a plain LoRA. Any other must be empty.
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # speaks of modules_to_save only
    "eva_config",
    "inference_mode",
    "init_lora_weights",  # how A and B began; inits that change the base are refused below
    "lora_ga_config",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # of use_qalora
    "revision",
    "runtime_config",
    "task_type",
}


class LoraLinear(nn.Linear):
    """A frozen linear layer plus a low-rank one: ``W x + b + alpha / rank * B A dropout(x)``.

    It keeps the names ``weight`` and ``bias``, so that nothing else about the model changes. The adapter of a half
    precision layer is fp32, as in PEFT.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.rank = rank
        self.alpha = alpha
        self.active = True  # see `without_lora`
        half = base.weight.dtype in (torch.bfloat16, torch.float16)
        kind: dict[str, Any] = {
            "device": base.weight.device,
            "dtype": torch.float32 if half else base.weight.dtype,
        }
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **kind)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **kind)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        y = F.linear(x, self.weight, self.bias)
        if not self.active:
            return y
        low = self.lora_B(self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype))))
        return y + (low * self.scale).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same: rounded once, to the dtype of the base."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        # A new tensor: a weight that is tied to another layer must not change there.
        plain.weight = nn.Parameter((self.weight.to(delta.dtype) + delta).to(self.weight.dtype), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)


def add_lora(
    model: Model,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> Model:
    """Freezes ``model`` and puts a trainable low-rank adapter beside each targeted linear layer, in place.

    Args:
        targets: names of layers, or ends of names: "q_proj", "vision.blocks.3.q_proj".

    Raises:
        ConfigError: a target is no linear layer, a number is out of range, or the model has adapters already.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise ConfigError(f"LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1, not {rank}, {alpha} and {dropout}")
    chosen: dict[str, nn.Linear] = {}
    layers = layers_to_adapt(model)
    for target in targets:
        matched = {name: layer for name, layer in layers.items() if _is_target(name, target)}
        if not matched:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            raise ConfigError(f"no linear layer is called {target!r}; these would match: {', '.join(ends)}")
        chosen |= matched
    model.requires_grad_(False)
    for name, layer in chosen.items():
        put_adapter(model, name, layer, rank=rank, alpha=alpha, dropout=dropout)
    return model


def layers_to_adapt(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that may have an adapter, by name.

    Raises:
        ConfigError: some have one already.
    """
    if _adapters(model):
        raise ConfigError("the model has LoRA adapters already: merge_lora(model) first")
    return _linears(model)


def put_adapter(
    model: nn.Module, name: str, layer: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0
) -> LoraLinear:
    """Puts an adapter in the place of one layer."""
    adapter = LoraLinear(layer, rank=rank, alpha=alpha, dropout=dropout).train(layer.training)
    model.set_submodule(name, adapter)
    return adapter


def merge_lora(model: Model) -> Model:
    """Adds each adapter to its layer and removes it, in place. The merged weights stay frozen."""
    for name, adapter in _adapters(model).items():
        model.set_submodule(name, adapter.merged())
    return model


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what it did before it got adapters."""
    adapters = _adapters(model).values()
    for adapter in adapters:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.active = True


def save_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    convolutions: Collection[str] = (),
) -> None:
    """Writes the adapters as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        names: our names of layers -> those in the file; a layer without an entry keeps its own.
        convolutions: our names of layers that are 1x1 convolutions there: ``model.hub_convolutions()``.

    Raises:
        ConfigError: the model has no adapters, or they differ in more than their values, as those of `load_lora` may.
    """
    adapters = _adapters(model)
    if not adapters:
        raise ConfigError("the model has no LoRA adapters to save: add_lora(model) makes them")
    kinds = {(adapter.rank, adapter.alpha, adapter.lora_dropout.p) for adapter in adapters.values()}
    if len(kinds) > 1:  # the file would be read with those of the first
        raise ConfigError(
            f"adapters of several (rank, alpha, dropout), {sorted(kinds)}, do not fit into one adapter_config.json: "
            "merge_lora(model) and save the model"
        )
    names = names or {}
    axes = {names.get(name, name): (1, 1) for name in convolutions}
    adapters = {names.get(name, name): adapter for name, adapter in adapters.items()}
    first = next(iter(adapters.values()))
    ends = sorted({name.rpartition(".")[2] for name in adapters})
    others = [name for name in _linears(model) if any(_is_target(names.get(name, name), end) for end in ends)]
    folder = Path(folder)
    tensors = {
        f"{PREFIX}{name}.{part}.weight": matrix.reshape(*matrix.shape, *axes.get(name, ())).cpu().contiguous()
        for name, adapter in adapters.items()
        for part, matrix in (("lora_A", adapter.lora_A.weight.detach()), ("lora_B", adapter.lora_B.weight.detach()))
    }
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        write_tensors(temporary, tensors)
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "r": first.rank,
            "lora_alpha": first.alpha,
            "lora_dropout": first.lora_dropout.p,
            "target_modules": sorted(adapters) if others else ends,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "inference_mode": True,
        },
    )


def load_peft(model: Model, folder: str | Path, *, names: Mapping[str, str] | None = None) -> Model:
    """Adds the adapters of a PEFT folder to ``model``, in place and completely.

    Args:
        names: our names of layers -> those in the file; a layer without an entry has its own there.

    Raises:
        ConfigError: the adapter is no plain LoRA (DoRA, rsLoRA, ranks that differ by layer, trained biases ...).
        WeightsError: tensors are missing, left over or of another shape; the model was not changed.
    """
    linears = layers_to_adapt(model)
    config = plain_config(Path(folder) / "adapter_config.json")
    path = Path(folder) / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(str(path), [f"it cannot be read: {error}"]) from None
    tensors = {key: as_matrix(tensor) for key, tensor in tensors.items()}
    targets, rank = config["target_modules"], config["r"]
    ours = {(names or {}).get(name, name): name for name in linears}
    layers = {theirs: linears[name] for theirs, name in ours.items()}
    if isinstance(targets, str):  # a regular expression: PEFT has written a pair for each layer that it matched
        held = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
        chosen = [name for name in layers if name in held]
    else:
        chosen = [name for name in layers if any(_is_target(name, target) for target in targets)]
    expected = {}
    for name in chosen:
        wide, narrow = layers[name].weight.shape
        expected[f"{PREFIX}{name}.lora_A.weight"] = (rank, narrow)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (wide, rank)
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    problems += [f"{key} fits no layer that target_modules names" for key in tensors if key not in expected]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the model needs {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if problems or not chosen:
        raise WeightsError(str(path), problems or [f"no linear layer of the model matches {targets}"])
    add_lora(
        model,
        [ours[name] for name in chosen],
        rank=rank,
        alpha=float(config["lora_alpha"]),
        dropout=float(config["lora_dropout"]),
    )
    with torch.no_grad():
        for key, tensor in tensors.items():
            name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
            model.get_parameter(f"{ours[name]}.lora_{part}").copy_(tensor)
    return model


def plain_config(path: Path) -> dict[str, Any]:
    """PEFT's settings of a plain LoRA.

    Raises:
        ConfigError: there are none, or they ask for more.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} should hold an object, not a {type(config).__name__}")
    asks = {
        key: value
        for key, value in config.items()
        if key not in READ | IGNORED and value not in (None, False, "none", {}, [])
    }
    if config.get("peft_type") != "LORA":
        asks["peft_type"] = config.get("peft_type")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        asks["init_lora_weights"] = config["init_lora_weights"]  # these inits change the base
    if asks:
        raise ConfigError(f"{path} is no plain LoRA adapter, it asks for {asks}")
    kinds: dict[str, Any] = {
        "r": int,
        "lora_alpha": int | float,
        "lora_dropout": int | float,
        "target_modules": list | str,
    }
    wrong = [f"{key} is {config.get(key)!r}" for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    if wrong:
        raise ConfigError(f"{path} is malformed: {'; '.join(wrong)}")
    return config


def as_matrix(tensor: Tensor) -> Tensor:
    """Half an adapter: of a 1x1 convolution, files have it with more axes."""
    return tensor.flatten(1) if tensor.ndim > 2 and tensor.shape[2:].numel() == 1 else tensor


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    # Only the plain class: torch's own attention reads the weight of its subclass and would pass an adapter by.
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}


def _adapters(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
