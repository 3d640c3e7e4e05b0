"""MiniLM with fewer heads, in a dozen ways: how each is made, tuned like all others, and judged."""

import copy
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.layer import MultiHeadAttention
from ..lab.ladder import attention_work, fewer_heads, narrow_heads
from ..models.encoder import Encoder, encode, load_minilm
from ..variants.head_gates import HeadGates
from ..variants.head_importance import head_importance, head_means
from ..variants.mixed_precision import permute_heads, plugged
from ..variants.mixture_of_heads import MixtureOfHeads, balance_loss, recorded_routes
from .climber import Climber, Heads, short
from .similar_lines import (
    calibration_texts,
    embed_texts,
    pooled,
    ranking_scores,
    scored_texts,
    squared_distances,
    training_batches,
    unit_mean,
)

OFF = 0.3  # share of the heads that a tuned model lacks
RATE = 2e-4  # of the tuning
NEW = 2.5  # times as much where layers begin new
ROUTER = 10  # and for routers
LONGER = 4  # times the steps of all others


# The model and its texts


class EncoderRungs(Climber):
    "An encoder in eval mode, which all smaller ones are compared with, and the texts of the comparison."

    name = "encoder"

    def __init__(self, model: Encoder, tokenizer, sizes: dict[str, int], seed: int):
        super().__init__(model, sizes, seed)
        self.tokenizer = tokenizer
        scored = scored_texts(sizes["lines"])
        self.texts, self.kinds = [one.text for one in scored], [one.kind for one in scored]
        self.lengths = self.count(self.texts)

    @property
    def kept(self) -> int:
        "How many heads of all layers a tuned model has."
        return sum(self.shape) - round(OFF * sum(self.shape))

    @property
    def same(self) -> int:
        "How many heads of each layer, where that is the same number."
        return round((1 - OFF) * self.shape[0])

    def count(self, texts: list[str]) -> list[int]:
        "Tokens of each text."
        return encode(self.tokenizer, texts)[1].sum(1).tolist()

    def vectors(self, model: Encoder) -> Tensor:
        "Of the scored texts."
        return embed_texts(model, self.tokenizer, self.texts)

    @cached_property
    def exact(self) -> Tensor:
        return self.vectors(self.model)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        "What every model is tuned on: texts, and the whole model's last hidden states."
        return self.aimed_batches(self.sizes["steps"])

    def aimed_batches(self, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [self.aimed(texts) for texts in training_batches(self.sizes["batch"], self.seed)[:steps]]

    @torch.no_grad()
    def aimed(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids, key_mask = encode(self.tokenizer, texts, self.device)
        return ids, key_mask, self.model(ids, key_mask)[-1]

    def calibration(self, chosen: Callable[[int], bool] = lambda tokens: True) -> list[tuple[Tensor, Tensor]]:
        "Texts on which heads are measured, those of about one length together."
        texts = sorted((one.text for one in calibration_texts(self.sizes["calibration_lines"])), key=len)
        texts = [text for text, tokens in zip(texts, self.count(texts)) if chosen(tokens)]
        size = self.sizes["batch"]
        return [encode(self.tokenizer, texts[at : at + size], self.device) for at in range(0, len(texts), size)]

    def importance(self, chosen: Callable[[int], bool] = lambda tokens: True) -> list[list[float]]:
        "What each head is worth to the pooled vectors, by gradient."
        found = head_importance(self.model, self.calibration(chosen), outputs=pooled, probes=8, seed=self.seed)
        return short([found[name].tolist() for name in self.names])

    @cached_property
    def means(self) -> dict[str, Tensor]:
        return head_means(self.model, self.calibration())

    # Making

    def with_layers(self, change: Callable[[int, MultiHeadAttention], nn.Module]) -> Encoder:
        "A copy with other attention layers."
        new = copy.deepcopy(self.model)
        for i, name in enumerate(self.names):
            new.set_submodule(name, change(i, new.get_submodule(name)))
        return new.eval()

    # Tuning

    def tune(
        self, model: Encoder, rate: float = RATE, step: Callable | None = None, batches: list | None = None
    ) -> list[float]:
        """Adam on all but the embeddings, towards the whole model, in place; the learning rate rises
        for ten steps, then falls to 0. The loss, a mean of each tenth of the steps.
        """
        optimiser, losses, batches = torch.optim.Adam(_trained(model, rate)), [], batches or self.batches
        step = step or (lambda number, *batch: distance(model, *batch))
        for number, batch in enumerate(batches):
            for group in optimiser.param_groups:
                group["lr"] = group["top"] * min(1, (number + 1) / 10) * (1 - number / len(batches))
            optimiser.zero_grad()
            loss = step(number, *batch)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        model.requires_grad_(False)
        parts = torch.stack(losses).tensor_split(min(10, len(losses)))
        return short([part.mean().item() for part in parts])

    # Judging

    def rung(self, name: str, vectors: Tensor, model: Encoder, kept: list[Heads], **more: Any) -> dict[str, Any]:
        "A rung of the file, from the vectors of the scored texts."
        rest = dict(kept=kept, given=[], active=float(sum(map(len, kept[0]))))
        rest |= dict(steps=0, rate=0.0, seconds=0.0, course=[]) | more
        rest["flops"] = short(rest.get("flops") or attention_work(model, self.lengths) / len(self.texts))
        scores = short(ranking_scores(vectors, self.exact, self.kinds).tolist())
        distances = short(squared_distances(vectors, self.exact).tolist())
        return dict(model=self.name, name=name, **rest, scores=scores, distances=distances)

    def untuned(self, name: str, kept: Heads, filled: bool = False) -> list[dict]:
        "Cut, and judged."
        model = self.cut(kept, self.means if filled else None)
        return [self.rung(name, self.vectors(model), model, [kept])]

    def tuned(self, name: str, model: Encoder, kept: Heads, rate: float = RATE, **more: Any) -> list[dict]:
        "Tuned, and judged."
        batches = more.pop("batches", None) or self.batches
        begin = time.process_time()
        course = self.tune(model, rate, more.pop("step", None), batches)
        more |= dict(steps=len(batches), rate=rate, course=course)
        more["seconds"] = round(more.get("seconds", 0.0) + time.process_time() - begin, 1)
        return [self.rung(name, self.vectors(model), model, [kept], **more)]


def distance(model: Encoder, ids: Tensor, key_mask: Tensor, goal: Tensor) -> Tensor:
    """How far a model is from the whole one, whose last hidden states are given: the mean squared distance
    of the texts' vectors, and the squared relative error of the states of all tokens.
    """
    states, real = model(ids, key_mask)[-1], key_mask[..., None]
    vectors = squared_distances(unit_mean(states, key_mask), unit_mean(goal, key_mask)).mean()
    return vectors + ((states - goal) * real).square().sum() / (goal * real).square().sum()


def _trained(model: Encoder, rate: float) -> list[dict]:
    "All parameters of the blocks; those of routers, which begin new, faster, and not where they are frozen."
    groups: dict[str, list] = dict(blocks=[], routers=[])
    for name, parameter in model.named_parameters():
        of_router = ".finish." in name
        if name.startswith("layers.") and not (of_router and getattr(model, "routers_frozen", False)):
            groups["routers" if of_router else "blocks"].append(parameter.requires_grad_(True))
    tops = dict(blocks=rate, routers=ROUTER * rate)
    return [dict(params=params, lr=0.0, top=tops[kind]) for kind, params in groups.items() if params]


def load_encoder_rungs(sizes: dict[str, int], seed: int, device: torch.device) -> EncoderRungs:
    "MiniLM."
    return EncoderRungs(*load_minilm(device), sizes, seed)


# Gates


GATES = dict(rate=0.15, price_rate=1.0, stiff=5.0)  # of the gates, of their price, and of the distance from the aim


def learn_gates(on: EncoderRungs) -> list[list[float]]:  # log-odds of each gate, by layer
    """Gates alone, all weights as they are: the loss, and a price that rises until as many are
    open on average as are to stay.
    """
    steps, total = on.sizes["gate_steps"], sum(on.shape)
    plugs = [HeadGates(h, device=on.device).train() for h in on.shape]
    price = torch.zeros((), device=on.device, requires_grad=True)
    gates = torch.optim.Adam([plug.log_alpha for plug in plugs], lr=GATES["rate"])
    dear = torch.optim.SGD([price], lr=GATES["price_rate"], maximize=True)
    fork = torch.random.fork_rng([on.device] if on.device.type == "cuda" else [])
    with fork, plugged({layer: dict(finish=plug) for layer, plug in zip(on.layers, plugs)}):
        torch.manual_seed(on.seed)
        for number in range(steps):
            aim = 1 - (1 - on.kept / total) * min(1.0, number / (0.5 * steps))
            gap = sum(plug.expected_open() for plug in plugs) / total - aim
            gates.zero_grad()
            dear.zero_grad()
            loss = distance(on.model, *on.batches[number % len(on.batches)])
            (loss + price * gap + GATES["stiff"] * gap.square()).backward()
            gates.step()
            dear.step()
    return [plug.log_alpha.detach().cpu().tolist() for plug in plugs]


# Mixtures


SHARED = 1 / 6  # of the heads of a layer
BALANCE = 0.01  # of the balance loss in the loss


def make_mixture(on: EncoderRungs, importance: list[list[float]], frozen: bool = False) -> Encoder:
    "Each token gets the share of heads that stays; the most important ones of a layer are shared."

    def change(i: int, layer: MultiHeadAttention) -> nn.Module:
        order = sorted(range(on.shape[i]), key=lambda head: -importance[i][head])
        new, width = permute_heads(layer, order), on.model.config.embed_dim
        active, shared = round((1 - OFF) * len(order)), round(SHARED * len(order))
        new.finish = MixtureOfHeads(width, len(order), active, num_shared=shared, device=on.device)
        return new

    with torch.random.fork_rng([on.device] if on.device.type == "cuda" else []):
        torch.manual_seed(on.seed)
        new = on.with_layers(change)
    new.routers_frozen = frozen
    return new


def balanced(model: Encoder) -> Callable:
    "The step of a mixture: the distance, and the balance of its routers."

    def step(number: int, ids: Tensor, key_mask: Tensor, goal: Tensor) -> Tensor:
        with recorded_routes(model) as routes:
            loss = distance(model, ids, key_mask, goal)
        balances = [balance_loss(one, key_mask) for calls in routes.values() for one in calls]
        return loss + BALANCE * sum(balances) / len(balances)

    return step


def mixed(on: EncoderRungs, name: str, importance: list[list[float]], frozen: bool) -> list[dict]:
    "A mixture with a router that learns, or with one that stays as it was drawn."
    model = make_mixture(on, importance, frozen)
    active = float(sum(layer.attention.finish.num_active for layer in model.layers))
    step = None if frozen else balanced(model)
    return on.tuned(name, model, on.all_heads, active=active, step=step)


# All of them


def longer(on: EncoderRungs, name: str, kept: Heads) -> list[dict]:
    "Tuned four times as long as all others, as far as there are texts."
    return on.tuned(name, on.cut(kept), kept, batches=on.aimed_batches(LONGER * on.sizes["steps"]))


def gated(on: EncoderRungs, name: str) -> list[dict]:
    on.batches, begin = on.batches, time.process_time()
    kept = on.best(learn_gates(on), on.kept)
    return on.tuned(name, on.cut(kept), kept, seconds=time.process_time() - begin)


def narrow(on: EncoderRungs, name: str) -> list[dict]:
    model = on.with_layers(lambda i, layer: narrow_heads(layer, round((1 - OFF) * layer.layout.head_dim)))
    return on.tuned(name, model, on.all_heads)


def smaller(on: EncoderRungs, name: str, rate: float) -> list[dict]:
    model = on.with_layers(lambda i, layer: fewer_heads(layer, on.same, on.seed + i))
    return on.tuned(name, model, [[*range(on.same)]] * len(on.shape), rate)


def pruned(on: EncoderRungs, name: str, kept: Heads) -> list[dict]:
    return on.tuned(name, on.cut(kept), kept)
