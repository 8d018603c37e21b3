"""Other layers in the place of linear ones, for inference on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from polymodal.core.errors import ConfigError, did_you_mean


def replace_linear(
    model: nn.Module, layer: Callable[[Tensor, Tensor | None], nn.Module], kind: str, *, skip: Sequence[str] = ()
) -> nn.Module:
    """Replaces, in place, every `nn.Linear` inside ``model`` by ``layer(weight, bias)``, and gives the model back.

    Args:
        model: built and loaded, on a CPU.
        kind: what to call the new layers in a message.
        skip: names of modules that stay as they are with all that is in them.

    Raises:
        ConfigError: ``skip`` names no module, or a layer is not on the CPU.
    """
    known = {name for name, _ in model.named_modules()}
    for name in skip:
        if name not in known:
            raise ConfigError(f"skip: there is no module {name!r}{did_you_mean(name, known)}")
    kept = tuple(f"{name}." for name in skip)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or not name or f"{name}.".startswith(kept):
            continue
        if module.weight.device.type != "cpu":
            raise ConfigError(f"{name} is on {module.weight.device}: {kind} layers run on the CPU")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer(module.weight, module.bias))
    return model
