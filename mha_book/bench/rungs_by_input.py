"""A set of heads for each input: one model tuned for several sets, a rule that goes by length, and controllers that
choose for themselves.
"""

import time
from typing import Any

import torch
from torch import Tensor

from ..lab.ladder import attention_work
from ..models.encoder import Encoder, mean_pool
from ..variants.head_budget import HeadBudget, budget_loss
from ..variants.head_importance import without_heads
from ..variants.prune_heads import prune_model
from .climber import Heads, short
from .rungs import RATE, EncoderRungs, distance
from .similar_lines import embed_texts, pooled, squared_distances, training_batches, unit_mean

LENGTHS = {"short": range(0, 9), "middle": range(9, 33), "long": range(33, 10**6)}  # of a text, in tokens
ALL = len(LENGTHS)  # the last set has all heads
EVERY = 4  # one step of so many trains with all heads
PRICES = 0.07, 0.1, 0.15  # of all heads of the model, in squared distances
CONTROL = dict(rate=3e-3, steps=300, decay=0.1)  # of the controllers


def set_by_length(tokens: int) -> int:
    "The rule: the set that was made for texts of this length."
    return next(i for i, length in enumerate(LENGTHS.values()) if tokens in length)


def sets_by_length(on: EncoderRungs, importance: dict[str, list[list[float]]]) -> list[Heads]:
    "The most important heads for texts of each length, as many for each, and at last all."
    sets = [on.best(importance[f"{on.name}, {name}"], on.kept) for name in LENGTHS]
    return [*sets, on.all_heads]


def features(model: Encoder, ids: Tensor, key_mask: Tensor) -> Tensor:  # b (e + 1)
    "What a controller sees before the first layer: how long a text is, and its mean embedding."
    return torch.cat([key_mask.sum(1, keepdim=True).log(), mean_pool(model.word(ids), key_mask)], 1)


def tuned_for_sets(on: EncoderRungs, sets: list[Heads]) -> tuple[Encoder, list[float]]:  # and its losses
    "One model for all sets: each batch trains that of its length, and every fourth all heads."
    model = on.with_layers(lambda i, layer: layer)
    gone = [on.gone(kept) for kept in sets]

    def step(number: int, ids: Tensor, key_mask: Tensor, goal: Tensor) -> Tensor:
        one = ALL if number % EVERY == EVERY - 1 else set_by_length(round(key_mask.sum().item() / len(ids)))
        with without_heads(model, gone[one]):
            return distance(model, ids, key_mask, goal)

    return model, on.tune(model, step=step)


@torch.no_grad()
def controllers(on: EncoderRungs, model: Encoder, sets: list[Heads]) -> dict[float, HeadBudget]:
    "For each price one, trained on what each set costs texts that the model was not tuned on."
    seen, errors, steps = [], [], on.sizes["steps"]
    for texts in training_batches(on.sizes["batch"], on.seed)[steps : steps + on.sizes["control_batches"]]:
        ids, key_mask, goal = on.aimed(texts)
        seen.append(features(model, ids, key_mask))
        rows = []
        for kept in sets:
            with without_heads(model, on.gone(kept)):
                rows.append(squared_distances(pooled(model, ids, key_mask), unit_mean(goal, key_mask)))
        errors.append(torch.stack(rows, 1))
    costs = torch.tensor([float(sum(map(len, kept))) for kept in sets], device=on.device) / sum(on.shape)
    return {price: controller(torch.cat(seen), torch.cat(errors), costs, price, on.seed) for price in PRICES}


@torch.enable_grad()
def controller(seen: Tensor, errors: Tensor, costs: Tensor, price: float, seed: int) -> HeadBudget:
    "The one that loses least on these texts, heads paid for."
    with torch.random.fork_rng([seen.device] if seen.device.type == "cuda" else []):
        torch.manual_seed(seed)
        found = HeadBudget(seen.shape[1], errors.shape[1], device=seen.device).fit(seen)
    like = dict(lr=CONTROL["rate"], weight_decay=CONTROL["decay"])
    optimiser = torch.optim.AdamW(found.parameters(), **like)
    for _ in range(CONTROL["steps"]):
        optimiser.zero_grad()
        budget_loss(found(seen), errors, costs, price).backward()
        optimiser.step()
    return found.requires_grad_(False)


@torch.no_grad()
def chosen(on: EncoderRungs, model: Encoder, one: HeadBudget) -> list[int]:
    "Which set a controller gives to each scored text."
    scores = embed_texts(model, on.tokenizer, on.texts, embed=lambda *batch: one(features(model, *batch)))
    return scores.argmax(-1).tolist()


def by_input(on: EncoderRungs, name: str, importance: dict[str, list[list[float]]]) -> list[dict]:
    "All rungs of the tuned model: by the rule, by each controller, by what is best in hindsight, and one set for all."
    on.batches, begin = on.batches, time.process_time()
    sets = sets_by_length(on, importance)
    model, course = tuned_for_sets(on, sets)
    seconds = round(time.process_time() - begin, 1)
    vectors = [on.vectors(on_set(on, model, kept)) for kept in sets]
    errors = torch.stack([squared_distances(each, on.exact) for each in vectors])
    ways: dict[str, list[int]] = {name: [set_by_length(n) for n in on.lengths]}
    for price, one in controllers(on, model, sets).items():
        ways[f"controller, price {price}"] = chosen(on, model, one)
    ways["the best set in hindsight"] = errors[:ALL].argmin(0).tolist()
    for i, length in enumerate((*LENGTHS, "all")):
        ways[f"tuned for sets, {length} for all"] = [i] * len(on.texts)
    told = dict(steps=len(on.batches), rate=RATE, seconds=seconds, course=course)
    return [given_rung(on, way, model, sets, vectors, given, **told) for way, given in ways.items()]


def on_set(on: EncoderRungs, model: Encoder, kept: Heads) -> Encoder:
    "The tuned model with these heads."
    return prune_model(model, on.gone(kept))


def given_rung(
    on: EncoderRungs, name: str, model: Encoder, sets: list[Heads], vectors: list[Tensor], given: list[int], **told: Any
) -> dict:
    "The rung where each text gets the set that it is given."
    rows = torch.stack([vectors[one][i] for i, one in enumerate(given)])
    lengths = [[n for n, one in zip(on.lengths, given) if one == i] for i in range(len(sets))]
    work = [attention_work(on_set(on, model, kept), own) for kept, own in zip(sets, lengths) if own]
    active = sum(sum(map(len, sets[one])) for one in given) / len(given)
    more = dict(given=given, active=short(active), flops=sum(work) / len(given))
    return on.rung(name, rows, model, sets, **more, **told)
