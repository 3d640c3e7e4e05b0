"""MiniLM with fewer heads, in a dozen ways: how each is made, tuned like all others, and judged."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.layer import MultiHeadAttention
from ..heads.weight_split import HeadLayout
from ..instruments.roofline import layer_work
from ..lab.ladder import fewer_heads, narrow_heads
from ..models.encoder import Encoder, encode, load_minilm
from ..variants.head_gates import HeadGates
from ..variants.head_importance import head_importance, head_means, scaled_heads
from ..variants.mixed_precision import permute_heads, plugged
from ..variants.mixture_of_heads import MixtureOfHeads, balance_loss
from ..variants.prune_heads import prune_model
from .similar_lines import (
    calibration_texts,
    embed_texts,
    pooled,
    ranking_scores,
    scored_texts,
    squared_distances,
    training_batches,
)

Kept = list[list[int]]  # by layer, the heads that stay
OFF = 0.3  # share of the heads that a tuned model lacks
RATE = 2e-4  # of the tuning
NEW = 5  # times as much where layers begin new, and for routers twice that


# What is counted


def attention_flops(
    heads: int,  # that ask
    kv_heads: int,
    head_dim: int,
    embed_dim: int,
    tokens: int,
    is_causal: bool = False,
) -> int:
    "Products of a layer that really has so many heads; 0 where it has none."
    if not heads:
        return 0
    like = dict(batch=1, n=tokens, itemsize=4, is_causal=is_causal)
    one = layer_work(HeadLayout(heads, 1, head_dim), embed_dim, **like)
    return sum(step.flops for step in one.values()) + 4 * tokens * embed_dim * head_dim * (kv_heads - 1)


def largest(
    importance: list[list[float]],  # by layer
    number: int,
    at_least: int = 1,  # that stay in each layer
) -> Kept:
    "Which heads stay: the most important of all, and of each layer the first few."
    places = [(worth, layer, head) for layer, row in enumerate(importance) for head, worth in enumerate(row)]
    first = [sorted((p for p in places if p[1] == layer), reverse=True)[:at_least] for layer in range(len(importance))]
    chosen = [place for row in first for place in row]
    rest = sorted((p for p in places if p not in chosen), reverse=True)
    chosen = sorted([*chosen, *rest[: number - len(chosen)]], key=lambda place: place[1:])
    return [[head for _, at, head in chosen if at == layer] for layer in range(len(importance))]


def drawn(shape: list[int], seed: int) -> list[list[float]]:  # heads of each layer
    "An importance that says nothing."
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.rand(heads, generator=generator, device="cpu").tolist() for heads in shape]


def short(numbers: Any) -> Any:
    "Numbers in lists, to six digits."
    return [short(one) for one in numbers] if isinstance(numbers, list) else float(f"{numbers:.6g}")


# The model and its texts


class EncoderRungs:
    "An encoder in eval mode, which all smaller ones are compared with, and the texts of the comparison."

    name = "encoder"

    def __init__(self, model: Encoder, tokenizer, sizes: dict[str, int], seed: int):
        self.model, self.tokenizer, self.sizes, self.seed = model.requires_grad_(False), tokenizer, sizes, seed
        self.texts = scored_texts(sizes["lines"])
        self.kinds = [text.kind for text in self.texts]
        self.lengths = self.count([text.text for text in self.texts])
        self.names = [f"layers.{i}.attention" for i in range(len(model.layers))]
        self.shape = [model.get_submodule(name).layout.num_heads for name in self.names]
        self.total = sum(self.shape)
        self.device = model.word.weight.device

    @property
    def layouts(self) -> list[list[int]]:
        layouts = (self.model.get_submodule(name).layout for name in self.names)
        return [[*layout, layout.value_dim] for layout in layouts]

    def count(self, texts: list[str]) -> list[int]:
        "Tokens of each text."
        return encode(self.tokenizer, texts)[1].sum(1).tolist()

    def named(self, rows: list) -> dict[str, Any]:
        return dict(zip(self.names, rows, strict=True))

    @cached_property
    def exact(self) -> Tensor:
        "The vectors of the scored texts."
        return self.embed(self.model)

    def embed(self, model: Encoder) -> Tensor:
        return embed_texts(model, self.tokenizer, [text.text for text in self.texts])

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        "What every model is tuned on: texts, and the whole model's vectors."
        found = training_batches(self.sizes["batch"], self.seed)[: self.sizes["steps"]]
        return [self.aimed(texts) for texts in found]

    @torch.no_grad()
    def aimed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids, key_mask = encode(self.tokenizer, texts, self.device)
        return ids, key_mask, pooled(self.model, ids, key_mask)

    def calibration(self, chosen: Callable[[int], bool] = lambda tokens: True) -> list[tuple[Tensor, Tensor]]:
        "Texts on which heads are measured, each batch of one length, so that nothing is padded."
        texts = [text.text for text in calibration_texts(self.sizes["calibration_lines"])]
        by_length: dict[int, list[str]] = {}
        for text, tokens in zip(texts, self.count(texts)):
            if chosen(tokens):
                by_length.setdefault(tokens, []).append(text)
        return [encode(self.tokenizer, part, self.device) for _, part in sorted(by_length.items())]

    def importance(self, chosen: Callable[[int], bool] = lambda tokens: True) -> list[list[float]]:
        "What each head is worth to the pooled vectors, by gradient; a text counts as any other."
        batches = self.calibration(chosen)
        found = torch.zeros(len(self.shape), max(self.shape), device="cpu")
        for batch in batches:
            part = head_importance(self.model, [batch], outputs=pooled, probes=8, seed=self.seed)
            found += torch.stack([part[name].cpu() for name in self.names]) * len(batch[0])
        return short((found / sum(len(ids) for ids, _ in batches)).tolist())

    @cached_property
    def means(self) -> dict[str, Tensor]:
        return head_means(self.model, self.calibration())

    # Making

    def gone(self, kept: Kept) -> dict[str, list[int]]:
        return self.named([[i for i in range(h) if i not in row] for h, row in zip(self.shape, kept, strict=True)])

    def cut(self, kept: Kept) -> Encoder:
        "A copy that has these heads."
        return prune_model(self.model, self.gone(kept))

    @contextmanager
    def only(self, model: Encoder, kept: Kept, means: dict[str, Tensor] | None = None) -> Iterator[None]:
        "In this block all other heads of a model are off."
        scales = [
            torch.tensor([float(i in row) for i in range(h)], device=self.device) for h, row in zip(self.shape, kept)
        ]
        with scaled_heads(model, self.named(scales), means):
            yield

    def with_layers(self, change: Callable[[int, MultiHeadAttention], nn.Module]) -> Encoder:
        "A copy with other attention layers."
        new = copy.deepcopy(self.model)
        for i, name in enumerate(self.names):
            new.set_submodule(name, change(i, new.get_submodule(name)))
        return new.eval()

    # Tuning

    def tune(self, model: Encoder, rate: float = RATE, step: Callable | None = None) -> list[float]:
        """Adam on all but the embeddings, towards the whole model's vectors, in place; the learning rate rises
        for ten steps, then falls to 0. The loss, a mean of each tenth of the steps.
        """
        groups, losses = _trained(model, rate), []
        optimiser = torch.optim.Adam(groups)
        step = step or (lambda number, ids, key_mask, goal: distance(model, ids, key_mask, goal))
        for number, batch in enumerate(self.batches):
            for group in optimiser.param_groups:
                group["lr"] = group["top"] * min(1, (number + 1) / 10) * (1 - number / len(self.batches))
            optimiser.zero_grad()
            loss = step(number, *batch)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        model.requires_grad_(False)
        parts = torch.stack(losses).tensor_split(min(10, len(losses)))
        return short([part.mean().item() for part in parts])

    # Judging

    def flops(self, kept: Kept, head_dim: int | None = None) -> list[int]:  # of each scored text
        "What the attention layers of a model with these heads multiply."
        d, e = head_dim or self.layouts[0][2], self.model.config.embed_dim
        known = {n: sum(attention_flops(len(row), len(row), d, e, n) for row in kept) for n in {*self.lengths}}
        return [known[n] for n in self.lengths]

    def rung(self, name: str, vectors: Tensor, kept: Kept, **more: Any) -> dict[str, Any]:
        "A rung of the file, from the vectors of the scored texts."
        rest = dict(sets=[kept], given=[], active=float(sum(map(len, kept))), flops=self.flops(kept))
        rest |= dict(steps=0, rate=0.0, seconds=0.0, course=[]) | more
        rest["flops"] = short(sum(rest["flops"]) / len(self.texts))
        scores = short(ranking_scores(vectors, self.exact, self.kinds).tolist())
        distances = short(squared_distances(vectors, self.exact).tolist())
        return dict(model=self.name, name=name, **rest, scores=scores, distances=distances)

    def untuned(self, name: str, kept: Kept, means: dict[str, Tensor] | None = None) -> list[dict]:
        with self.only(self.model, kept, means):
            return [self.rung(name, self.embed(self.model), kept)]

    def tuned(self, name: str, model: Encoder, kept: Kept, rate: float = RATE, **more: Any) -> list[dict]:
        "Tune a model, and judge it."
        self.batches, begin = self.batches, time.process_time()  # made before the clock starts
        course = self.tune(model, rate, more.pop("step", None))
        more |= dict(steps=len(self.batches), rate=rate, course=course)
        more["seconds"] = round(more.pop("before", 0.0) + time.process_time() - begin, 1)
        return [self.rung(name, self.embed(model), kept, **more)]


def distance(model: Encoder, ids: Tensor, key_mask: Tensor, goal: Tensor) -> Tensor:
    "Mean squared distance from the whole model's vectors."
    return squared_distances(pooled(model, ids, key_mask), goal).mean()


def _trained(model: Encoder, rate: float) -> list[dict]:
    "All parameters of the blocks; those of routers, which begin new, faster, and not where they are frozen."
    frozen = {id(p) for plug in model.modules() if getattr(plug, "frozen", False) for p in plug.router.parameters()}
    groups = dict(blocks=[], routers=[])
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and id(parameter) not in frozen:
            groups["routers" if ".router." in name else "blocks"].append(parameter.requires_grad_(True))
    tops = dict(blocks=rate, routers=2 * NEW * rate)
    return [dict(params=params, lr=0.0, top=tops[kind]) for kind, params in groups.items() if params]


def load_encoder_rungs(sizes: dict[str, int], seed: int, device: torch.device) -> EncoderRungs:
    "MiniLM."
    return EncoderRungs(*load_minilm(device), sizes, seed)


# Gates


GATES = dict(rate=0.15, price_rate=1.0, stiff=5.0)  # of the gates, of their price, and of the distance from the aim


def learn_gates(on: EncoderRungs, keep: int) -> tuple[list[list[float]], float]:  # log-odds by layer, CPU seconds
    """Gates alone, all weights as they are: the loss, and a price that rises until so many are
    open on average.
    """
    begin, steps = time.process_time(), on.sizes["gate_steps"]
    plugs = {name: HeadGates(h, device=on.device).train() for name, h in zip(on.names, on.shape)}
    price = torch.zeros((), device=on.device, requires_grad=True)
    gates = torch.optim.Adam([plug.log_alpha for plug in plugs.values()], lr=GATES["rate"])
    dear = torch.optim.SGD([price], lr=GATES["price_rate"], maximize=True)
    layers = {on.model.get_submodule(name): dict(finish=plug) for name, plug in plugs.items()}
    with torch.random.fork_rng([on.device] if on.device.type == "cuda" else []), plugged(layers):
        torch.manual_seed(on.seed)
        for number in range(steps):
            batch = on.batches[number % len(on.batches)]
            aim = 1 - (1 - keep / on.total) * min(1.0, number / (0.5 * steps))
            gap = sum(plug.expected_open() for plug in plugs.values()) / on.total - aim
            gates.zero_grad()
            dear.zero_grad()
            (distance(on.model, *batch) + price * gap + GATES["stiff"] * gap.square()).backward()
            gates.step()
            dear.step()
    odds = [plug.log_alpha.detach().cpu().tolist() for plug in plugs.values()]
    return odds, time.process_time() - begin


# Mixtures


SHARED = 1 / 6  # of the heads of a layer
BALANCE = 0.01  # of the balance loss in the loss


def make_mixture(on: EncoderRungs, importance: list[list[float]], frozen: bool = False) -> Encoder:
    "Each token gets the share of heads that stays; the most important ones of a layer are shared."

    def change(i: int, layer: MultiHeadAttention) -> nn.Module:
        order = sorted(range(on.shape[i]), key=lambda head: -importance[i][head])
        new = permute_heads(layer, order)
        active, shared = round((1 - OFF) * len(order)), round(SHARED * len(order))
        like = dict(num_shared=shared, device=on.device)
        new.finish = MixtureOfHeads(on.model.config.embed_dim, len(order), active, **like)
        new.finish.frozen = frozen
        return new

    with torch.random.fork_rng([on.device] if on.device.type == "cuda" else []):
        torch.manual_seed(on.seed)
        return on.with_layers(change)


def mixture_flops(on: EncoderRungs, active: int) -> list[int]:
    "Keys and values of all heads, all else of those that a token gets, and the router."
    e, d, all_heads = on.model.config.embed_dim, on.layouts[0][2], [[*range(h)] for h in on.shape]
    whole, layers, h = on.flops(all_heads), len(on.shape), on.shape[0]
    saved = [(h - active) * n * (4 * e * d + 4 * n * d) for n in on.lengths]  # q and out; logits and values
    return [all_of - layers * (less - 2 * n * e * h) for all_of, less, n in zip(whole, saved, on.lengths)]


def balanced(model: Encoder) -> Callable:
    "The step of a mixture: the distance, and the balance of its routers."
    plugs = [layer.attention.finish for layer in model.layers]

    def step(number: int, ids: Tensor, key_mask: Tensor, goal: Tensor) -> Tensor:
        routes = []
        hooks = [plug.register_forward_hook(lambda plug, args, _: routes.append(plug.route(args[1]))) for plug in plugs]
        try:
            loss = distance(model, ids, key_mask, goal)
        finally:
            for hook in hooks:
                hook.remove()
        return loss + BALANCE * sum(balance_loss(one, key_mask) for one in routes) / len(routes)

    return step
