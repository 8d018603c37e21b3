"""Towers that do not learn."""

from __future__ import annotations

from polymodal.encoders.vit import ViT, ViTConfig


class FrozenViT(ViT):
    """A tower of which the last norm alone learns; it stays in eval mode whatever the system around it does."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.requires_grad_(False)
        self.norm.requires_grad_(True)
        self.eval()

    def train(self, mode: bool = True) -> FrozenViT:
        super().train(False)
        return self
