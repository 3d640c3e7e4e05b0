"""SmolLM2 without some of its query heads: what its texts lose, and which heads can be cut for good."""

from functools import cached_property

import torch
from torch import Tensor

from ..lab.ladder import attention_work
from ..lab.one_wrong_line import token_nll
from ..models.language_model import LanguageModel, load_smollm2
from ..variants.head_importance import head_importance, head_means, without_heads
from .climber import Climber, Heads, short
from .subjects import passages, tests

PART = 4  # texts at once


class LanguageRungs(Climber):
    "A language model in eval mode, texts that it is asked about, and others on which its heads are measured."

    name = "language"

    def __init__(self, model: LanguageModel, texts: Tensor, calibration: Tensor, sizes: dict[str, int], seed: int):
        super().__init__(model, sizes, seed)
        self.texts, self.calibration = texts.to(self.device), calibration.to(self.device)
        self.lengths = [texts.shape[1]] * len(texts)

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

    def groups(self, importance: list[list[float]], off: int) -> Heads:
        "Whole groups, those of least summed importance off, but for one of each layer; `off` counts heads."
        sizes = [h // g for h, g, *_ in self.layouts]
        sums = [[sum(row[at : at + r]) for at in range(0, len(row), r)] for row, r in zip(importance, sizes)]
        kept = self.best(sums, sum(map(len, sums)) - off // sizes[0])
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

    def pruned(self, name: str, kept: Heads) -> list[dict]:
        return [self.rung(name, self.cut(kept), kept)]


def load_language_rungs(sizes: dict[str, int], seed: int, device: torch.device) -> LanguageRungs:
    "SmolLM2, passages of plays, and *Hamlet*."
    model, tokenizer = load_smollm2(device)
    calibration = passages(tokenizer, "hamlet", sizes["calibration_texts"], sizes["calibration_tokens"])
    return LanguageRungs(model, tests(tokenizer, sizes["texts"], sizes["tokens"]), calibration, sizes, seed)
