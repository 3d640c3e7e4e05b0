"""Ablations on file: the loss of a language model on two texts, as it is and without each of its heads."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..instruments.device import _alone
from ..lab.one_wrong_line import hamlet, token_nll
from ..lab.what_heads_do import ablation_losses
from ..models.language_model import LanguageModel
from .ending import STOPS
from .measured import Origin, provenance, read_file

# The file


@dataclass(frozen=True)
class Ablations(Origin):
    "A file of losses of a language model without each of its heads: origin, texts, losses."

    seconds: float  # CPU time
    tokens: dict[str, int]  # text -> how many tokens were counted; fewer where it was broken off
    base: dict[str, float]  # text -> loss of the whole model, in nats a token
    losses: dict[str, list[list[float]]]  # text -> layers of heads: loss without it

    def __post_init__(self):
        super().__post_init__()
        self._check_least(seconds=0)
        if not self.tokens or not self.tokens.keys() == self.base.keys() == self.losses.keys():
            raise ValueError(f"texts differ: tokens {[*self.tokens]}, base {[*self.base]}, losses {[*self.losses]}")
        sizes = {tuple(map(len, layers)) for layers in self.losses.values()}
        if len(sizes) > 1 or not all(len(set(size)) == 1 and size[0] for size in sizes):
            raise ValueError("losses are not as many layers of as many heads for every text")
        for name, layers in self.losses.items():
            if min(self.tokens[name], self.base[name], *map(min, layers)) <= 0:
                raise ValueError(f"text {name!r} has no tokens, or a loss that is not above 0")

    def worth(self) -> dict[str, Tensor]:  # text -> layers heads
        "How much larger the loss is without each head, in nats a token."
        return {name: torch.tensor(layers) - self.base[name] for name, layers in self.losses.items()}


def read_ablations(path: Path | str) -> Ablations:  # a file of `make heads`
    "The losses in a file. Raises as `mha_book.bench.measured.read_file` does."
    return read_file(Ablations, path)


# The runs


TOKENS, PERIOD = 256, 64


def texts(
    model: LanguageModel,
    tokenizer,
    passages: int,  # of each kind
    seed: int,  # of the random tokens
) -> dict[str, tuple[int, list[Tensor]]]:  # name -> losses to skip, texts of shape 1 n
    "Passages of Hamlet, one after the other, and random tokens that are repeated."
    words = tokenizer.encode(hamlet("To be, or not to be")).ids[: passages * TOKENS]
    generator = torch.Generator("cpu").manual_seed(seed)
    halves = torch.randint(100, model.config.vocab_size, (passages, PERIOD), generator=generator, device="cpu")
    device = model.word.weight.device
    return {
        "Hamlet": (0, [*torch.tensor(words, device=device).view(passages, 1, TOKENS)]),
        "repeated": (PERIOD - 1, [*torch.cat([halves, halves], 1).to(device)[:, None]]),
    }


def _without_each_head(
    model: LanguageModel, skipped: int, rows: list[Tensor]
) -> Iterator[tuple[float, Tensor]]:  # per text: its loss, and that without each head
    "The mean loss over what is counted, text by text."
    for ids in rows:
        whole = token_nll(model, ids)[0, skipped:].mean().item()
        yield whole, ablation_losses(model, ids)[..., skipped:].mean(-1).cpu()


@torch.no_grad()
def run_ablations(
    model: LanguageModel,
    tokenizer,
    passages: int,  # texts of each kind
    seed: int,
    tell: Callable[[int, int], object],  # told (how many texts are done, of how many)
) -> tuple[dict[str, Any] | None, BaseException | None]:  # an `Ablations` without its command; what stopped it
    "Take every head out, on every text. Ctrl-C or a failure ends it, and the texts that are done are kept."
    chosen = texts(model, tokenizer, passages, seed)
    device, begin, stop = model.word.weight.device, time.process_time(), None
    origin, done = provenance(device), itertools.count(1)
    results = {name: [] for name in chosen}
    with _alone(device):
        try:
            for name, (skipped, rows) in chosen.items():
                for result in _without_each_head(model, skipped, rows):
                    results[name].append(result)
                    tell(next(done), passages * len(chosen))
        except STOPS as error:
            stop = error
        threads = torch.get_num_threads()
    if not any(results.values()):
        return None, stop
    rest = dict(dtype="float32", threads=threads, seed=seed, seconds=round(time.process_time() - begin, 1))
    return origin | rest | _counted(chosen, results), stop


def _counted(chosen: dict[str, tuple[int, list[Tensor]]], results: dict[str, list]) -> dict[str, dict]:
    "Means over the texts that are done, and how many tokens these are."
    tokens, base, losses = {}, {}, {}
    for name, pairs in results.items():
        if pairs:
            skipped, rows = chosen[name]
            tokens[name] = sum(ids.shape[1] - 1 - skipped for ids in rows[: len(pairs)])
            base[name] = sum(whole for whole, _ in pairs) / len(pairs)
            mean = torch.stack([each for _, each in pairs]).mean(0)
            losses[name] = [[round(loss, 5) for loss in layer] for layer in mean.tolist()]
    return dict(tokens=tokens, base=base, losses=losses)


def show_ablations(found: Ablations, most: int = 6) -> str:
    "The heads that are worth most on each text, as layer.head and nats a token."
    lines = []
    for name, nats in found.worth().items():
        best, where = nats.flatten().topk(min(most, nats.numel()))
        heads = "  ".join(
            f"{i // nats.shape[1]}.{i % nats.shape[1]} {worth:.2f}" for worth, i in zip(best.tolist(), where.tolist())
        )
        lines += [
            f"{name}: loss {found.base[name]:.2f} on {found.tokens[name]} tokens",
            f"  worth most: {heads}",
            f"  worth less than 0.01: {(nats < 0.01).sum().item()} of {nats.numel()}",
        ]
    return "\n".join(lines)
