"""SmolLM2 without some of its query heads: what its texts lose, and which heads can be cut for good."""

from functools import cached_property

import torch
from torch import Tensor

from ..lab.ladder import attention_work
from ..lab.one_wrong_line import token_nll
from ..models.language_model import LanguageModel, load_smollm2
from ..variants.head_importance import head_importance, head_means, least_heads, without_heads
from ..variants.prune_heads import prune_model
from .rungs import Heads, short
from .subjects import passages, tests

PART = 4  # texts at once


class LanguageRungs:
    "A language model in eval mode, texts that it is asked about, and others on which its heads are measured."

    name = "language"

    def __init__(
        self, model: LanguageModel, texts: Tensor, calibration: Tensor, sizes: dict[str, int], seed: int
    ):
        self.model, self.sizes, self.seed = model.requires_grad_(False), sizes, seed
        self.device = model.word.weight.device
        self.texts, self.calibration = texts.to(self.device), calibration.to(self.device)
        self.lengths = [texts.shape[1]] * len(texts)
        self.names = [f"layers.{i}.attention" for i in range(len(model.layers))]
        self.layers = [model.get_submodule(name) for name in self.names]
        self.shape = [layer.layout.num_heads for layer in self.layers]

    @property
    def layouts(self) -> list[list[int]]:
        return [[*layer.layout, layer.layout.value_dim] for layer in self.layers]

    def importance(self) -> list[list[float]]:
        "Michel's rule: the mean of |dL/dξ|, a text a batch."
        found = head_importance(
            self.model, [(ids[None],) for ids in self.calibration], loss=lambda model, ids: token_nll(model, ids).mean()
        )
        return short([found[name].tolist() for name in self.names])

    @cached_property
    def means(self) -> dict[str, Tensor]:
        batches = [(ids[None],) for ids in self.calibration]
        return head_means(self.model, batches, outputs=lambda model, ids: model.states(ids))

    @torch.no_grad()
    def losses(self, model: LanguageModel) -> list[float]:
        "Of each text, in nats a token."
        return short(torch.cat([token_nll(model, ids).mean(1) for ids in self.texts.split(PART)]).tolist())

    # Which heads stay

    def gone(self, kept: Heads) -> dict[str, list[int]]:
        rows = ([i for i in range(h) if i not in row] for h, row in zip(self.shape, kept, strict=True))
        return dict(zip(self.names, rows, strict=True))

    def best(self, importance: list[list[float]], off: int, keep: int = 0) -> Heads:
        "All but those of least importance."
        scores = dict(zip(self.names, [torch.tensor(row, device="cpu") for row in importance], strict=True))
        gone = least_heads(scores, off, keep)
        return [[i for i in range(len(row)) if i not in gone.get(name, ())] for name, row in zip(self.names, importance)]

    def drawn(self, off: int, seed: int) -> Heads:
        generator = torch.Generator("cpu").manual_seed(self.seed + seed)
        return self.best([torch.rand(h, generator=generator, device="cpu").tolist() for h in self.shape], off)

    def groups(self, importance: list[list[float]], off: int) -> Heads:
        "Whole groups, those of least summed importance off, but for one of each layer; `off` counts heads."
        sizes = [h // g for h, g, *_ in self.layouts]
        sums = [[sum(row[at : at + r]) for at in range(0, len(row), r)] for row, r in zip(importance, sizes)]
        kept = self.best(sums, off // sizes[0], 1)
        return [[j * r + i for j in row for i in range(r)] for row, r in zip(kept, sizes)]

    # Judging

    def rung(self, name: str, model: LanguageModel, kept: Heads) -> dict:
        "A rung of the file."
        flops = attention_work(model, self.lengths, is_causal=True) / len(self.lengths)
        return dict(
            model=self.name,
            name=name,
            kept=[kept],
            given=[],
            active=float(sum(map(len, kept))),
            flops=short(flops),
            steps=0,
            rate=0.0,
            seconds=0.0,
            course=[],
            scores=self.losses(model),
            distances=[],
        )

    def off(self, name: str, kept: Heads, filled: bool = False) -> list[dict]:
        "Heads off, though they are computed: their groups would be of different sizes."
        with without_heads(self.model, self.gone(kept), self.means if filled else None):
            return [self.rung(name, self.model, kept)]

    def cut(self, kept: Heads) -> LanguageModel:
        return prune_model(self.model, self.gone(kept))

    def pruned(self, name: str, kept: Heads) -> list[dict]:
        return [self.rung(name, self.cut(kept), kept)]


def load_language_rungs(sizes: dict[str, int], seed: int, device: torch.device) -> LanguageRungs:
    "SmolLM2, passages of plays, and *Hamlet*."
    model, tokenizer = load_smollm2(device)
    calibration = passages(tokenizer, "hamlet", sizes["calibration_texts"], sizes["calibration_tokens"])
    return LanguageRungs(model, tests(tokenizer, sizes["texts"], sizes["tokens"]), calibration, sizes, seed)
