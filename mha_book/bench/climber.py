"""What an encoder and a language model that do without heads have in common: their layers, and which heads stay."""

from typing import Any

import torch
from torch import nn

from ..variants.head_importance import least_heads
from ..variants.prune_heads import prune_model

Heads = list[list[int]]  # by layer


def short(numbers: Any) -> Any:
    "Numbers in lists, to six digits."
    return [short(one) for one in numbers] if isinstance(numbers, list) else float(f"{numbers:.6g}")


class Climber:
    "A model in eval mode, which is left as it is, and its attention layers."

    name: str
    lengths: list[int]  # of the texts that it is asked about, in tokens

    def __init__(self, model: nn.Module, sizes: dict[str, int], seed: int):
        self.model, self.sizes, self.seed = model.requires_grad_(False), sizes, seed
        self.names = [f"layers.{i}.attention" for i in range(len(model.layers))]
        self.layers = [model.get_submodule(name) for name in self.names]
        self.shape = [layer.layout.num_heads for layer in self.layers]
        self.device = model.word.weight.device

    @property
    def layouts(self) -> list[list[int]]:
        "Of each layer h, g, d, dv."
        return [[*layer.layout, layer.layout.value_dim] for layer in self.layers]

    @property
    def all_heads(self) -> Heads:
        return [[*range(h)] for h in self.shape]

    def named(self, rows: list) -> dict[str, Any]:
        return dict(zip(self.names, rows, strict=True))

    def best(
        self,
        importance: list[list[float]],  # by layer, of heads or of groups
        number: int,  # that stay
        keep: int = 1,  # of each layer at least
    ) -> Heads:
        "The most important ones of all layers."
        gone = least_heads(
            self.named([torch.tensor(row, device="cpu") for row in importance]),
            sum(map(len, importance)) - number,
            keep,
        )
        rows = self.named(importance).items()
        return [[i for i in range(len(row)) if i not in gone.get(name, ())] for name, row in rows]

    def drawn(self, number: int, seed: int, keep: int = 1) -> Heads:
        "So many at random."
        generator = torch.Generator("cpu").manual_seed(self.seed + seed)
        worth = [torch.rand(h, generator=generator, device="cpu").tolist() for h in self.shape]
        return self.best(worth, number, keep)

    def alike(self, importance: list[list[float]], number: int) -> Heads:
        "The most important ones of each layer, as many of each."
        return [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:number]) for row in importance]

    def gone(self, kept: Heads) -> dict[str, list[int]]:
        "By layer's name, the others."
        return self.named([[i for i in range(h) if i not in row] for h, row in zip(self.shape, kept, strict=True)])

    def cut(self, kept: Heads, means: dict | None = None) -> Any:
        "A copy of the model that has these heads."
        return prune_model(self.model, self.gone(kept), means=means)
