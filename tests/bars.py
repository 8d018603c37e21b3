"""What a model misses of the bars of its recipe."""

from __future__ import annotations

import torch
from torch import nn

from polymodal.train import Run


def missed(run: Run, model: nn.Module) -> list[str]:
    """Each figure that is below its bar, measured now."""
    assert run.evaluate is not None
    with torch.no_grad():
        found = run.evaluate(model)
    return [f"{name}: {found[name]:.3f} < {bar.value}" for name, bar in run.expect.items() if found[name] < bar.value]
