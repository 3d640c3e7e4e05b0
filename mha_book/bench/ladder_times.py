"""How long the rungs take. Times hang on shapes, so models are made again from the heads that the file says they have,
and not tuned.
"""

import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..instruments.device import benchmark
from ..lab.ladder import fewer_heads, narrow_heads
from ..models.encoder import Encoder, encode
from ..variants.head_budget import AdaptiveHeads, HeadBudget
from ..variants.mixture_of_heads import skip_heads
from .measured import Row
from .rungs import OFF, EncoderRungs, make_mixture
from .rungs_by_input import ALL, features, set_by_length
from .rungs_language import LanguageRungs
from .similar_lines import pooled

INPUTS = [(64, 14), (8, 128)]  # sequences, tokens
MIXED = 32  # texts of the mixed set in a batch
SPOKEN = (1, 512)
CUT = "pruned by importance", "pruned by learned gates", "as many in each layer", "pruned by importance to half"


class Skipping(nn.Module):
    "A layer with a mixture that skips the heads that are not chosen."

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return skip_heads(self.layer, x, key_mask=key_mask)


def skipping(model: Encoder) -> Encoder:
    "The model, in place."
    for layer in model.layers:
        layer.attention = Skipping(layer.attention)
    return model


def remade(on: EncoderRungs, found: dict[str, Any]) -> dict[str, Encoder]:
    "By name, models of the shapes of the rungs that are in the file."
    rungs = {one["name"]: one for one in found["rungs"] if one["model"] == on.name}
    worth = found["importance"][on.name]
    models = {"all heads": on.model}
    models |= {name: on.cut(rungs[name]["kept"][0]) for name in CUT}
    width = round((1 - OFF) * on.layers[0].layout.head_dim)
    models["narrow heads"] = on.with_layers(lambda i, layer: narrow_heads(layer, width))
    models["fewer heads from the start"] = on.with_layers(lambda i, layer: fewer_heads(layer, on.same))
    models["mixture, all heads computed"] = make_mixture(on, worth)
    models["mixture, heads skipped"] = skipping(make_mixture(on, worth))
    sets = rungs["sets by length"]["kept"]
    return models | {f"sets by length, set {i}": on.cut(kept) for i, kept in enumerate(sets[:ALL])}


def for_tokens(models: dict[str, Encoder], tokens: int) -> dict[str, Encoder]:
    "Of the sets the one for this length: all inputs of the batch have it."
    mine = f"sets by length, set {set_by_length(tokens)}"
    return {
        name.partition(", set ")[0]: model for name, model in models.items() if ", set " not in name or name == mine
    }


def rows(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> list[dict]:
    "Timed in turns, as rows of a table."
    with torch.inference_mode():
        found = benchmark(calls, device=device, rounds=rounds)
    more = dict(share=None, compile_seconds=None, note="")
    return [asdict(Row(name, *_numbers(timing), **more)) for name, timing in found.items()]


def _numbers(timing: Any) -> tuple:
    return *(float(f"{x:.5g}") for x in (timing.ratio, timing.low, timing.high, timing.seconds)), timing.peak_bytes


# The encoder


def encoder_times(on: EncoderRungs, found: dict[str, Any]) -> dict[tuple, Callable[[], list[dict]]]:
    "Suite, mode and size of each table, and what measures it."
    sizes = on.model.config.embed_dim, on.shape[0]
    plan: dict[tuple, Callable] = {}
    for batch, tokens in INPUTS:
        place = partial(at_length, on, found, batch, tokens)
        plan[on.name, "attention layers", batch, tokens, *sizes] = partial(place, True)
        plan[on.name, "whole model", batch, tokens, *sizes] = partial(place, False)
    longest = max(on.lengths)
    return plan | {(on.name, "mixed set", MIXED, longest, *sizes): partial(on_mixed_set, on, found)}


def at_length(on: EncoderRungs, found: dict[str, Any], batch: int, tokens: int, layers_only: bool) -> list[dict]:
    "The attention layers, one after the other, on the same tokens; or the whole model."
    generator = torch.Generator("cpu").manual_seed(on.seed)
    config = on.model.config
    x = torch.randn(batch, tokens, config.embed_dim, generator=generator, device="cpu").to(on.device)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=generator, device="cpu").to(on.device)

    def call(model: Encoder) -> Callable[[], object]:
        if layers_only:
            return lambda: [layer.attention(x) for layer in model.layers]
        return lambda: model(ids)

    models = for_tokens(remade(on, found), tokens)
    return rows({name: call(model) for name, model in models.items()}, on.device, on.sizes["rounds"])


def mixed_batches(on: EncoderRungs) -> list[list[int]]:
    "Texts of all lengths side by side."
    order = [*range(len(on.texts))]
    random.Random(on.seed).shuffle(order)
    return [order[at : at + MIXED] for at in range(0, len(order), MIXED)][: on.sizes["mixed_batches"]]


def on_mixed_set(on: EncoderRungs, found: dict[str, Any]) -> list[dict]:
    "Whole models on batches of texts of all lengths, padded to the longest; grouped ones to that of the group."
    parts = mixed_batches(on)
    batches = [encode(on.tokenizer, [on.texts[i] for i in part], on.device) for part in parts]
    models = remade(on, found)
    names = "all heads", CUT[0], CUT[-1], "narrow heads", "mixture, all heads computed", "mixture, heads skipped"
    calls = {name: lambda model=models[name]: [pooled(model, *batch) for batch in batches] for name in names}
    grouped = {
        "all heads, grouped by length": [{}] * ALL,
        "pruned by importance, grouped by length": [on.gone(_kept(found, on.name, CUT[0]))] * ALL,
        "sets by length": [on.gone(kept) for kept in _rung(found, on.name, "sets by length")["kept"]],
    }
    given = [torch.tensor([set_by_length(on.lengths[i]) for i in part], device=on.device) for part in parts]
    calls |= {name: grouped_call(on, levels, batches, given) for name, levels in grouped.items()}
    levels = grouped["sets by length"]
    for one in found["rungs"]:
        if one["name"].startswith("controller"):
            given = [torch.tensor([one["given"][i] for i in part], device=on.device) for part in parts]
            calls[one["name"]] = grouped_call(on, levels, batches, given, controlled=True)
    return rows(calls, on.device, on.sizes["rounds"])


def grouped_call(on: EncoderRungs, levels: list, batches: list, given: list, controlled: bool = False) -> Callable:
    "One call for each set that a batch has, padding trimmed; a controller works, and its choice is the file's."
    control = HeadBudget(on.model.config.embed_dim + 1, len(levels), device=on.device)
    model = AdaptiveHeads(on.model, levels, control, features, outputs=trimmed)

    def call() -> list:
        for batch in batches if controlled else ():
            model.choose(*batch)
        return [model(*batch, levels=own).output for batch, own in zip(batches, given)]

    return call


def trimmed(model: Encoder, ids: Tensor, key_mask: Tensor) -> Tensor:
    "Pooled, without the columns in which all are padding."
    longest = int(key_mask.sum(1).max())
    return pooled(model, ids[:, :longest], key_mask[:, :longest])


def _rung(found: dict[str, Any], model: str, name: str) -> dict:
    return next(one for one in found["rungs"] if (one["model"], one["name"]) == (model, name))


def _kept(found: dict[str, Any], model: str, name: str) -> list[list[int]]:
    return _rung(found, model, name)["kept"][0]


# The language model


def language_times(on: LanguageRungs, found: dict[str, Any]) -> dict[tuple, Callable[[], list[dict]]]:
    "Its attention layers with all heads, and with whole groups cut."
    sizes = on.model.config.embed_dim, on.shape[0]
    return {(on.name, "attention layers", *SPOKEN, *sizes): partial(spoken, on, found)}


def spoken(on: LanguageRungs, found: dict[str, Any]) -> list[dict]:
    generator = torch.Generator("cpu").manual_seed(on.seed)
    x = torch.randn(*SPOKEN, on.model.config.embed_dim, generator=generator, device="cpu").to(on.device)
    names = [one["name"] for one in found["rungs"] if one["model"] == on.name and "in whole groups" in one["name"]]
    models = {"all heads": on.model} | {name: on.cut(_kept(found, on.name, name)) for name in names}
    calls = {
        name: lambda model=model: [layer.attention(x, is_causal=True) for layer in model.layers]
        for name, model in models.items()
    }
    return rows(calls, on.device, on.sizes["rounds"])
