"""Rules of bits on file: what two models lose when keys and values are stored in few bits, rule by rule.

What a rule decides is not in the file: it is computed from the effects and traits of the heads, which are.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as shorter
from typing import Any

import torch
from torch import Tensor

from ..heads.weight_split import HeadLayout
from ..lab.frontier import (
    TRAITS,
    Storage,
    bootstrap,
    by_entropy,
    fit_bits,
    hand_out,
    lean,
    random_scores,
    spare,
)
from ..plugs.quantize import KV_FORMATS
from ..variants.sensitivity import Sensitivity, allocate_precision
from .measured import Origin, provenance, read_file
from .stepwise import run_steps, taken_up
from .subjects import GROUP, Subject

# The file


NUMBERS = dict(dtype=torch.float64, device="cpu")  # of a file, wherever its model was


@dataclass(frozen=True)
class Effects:
    "What rounding the heads of one layer costs, each alone: squared relative errors of the last hidden states."

    model: str
    exact_first: int  # first tokens that stayed as they are
    layer: str
    effects: list[list[list[float]]]  # keys, values -> key-value heads -> formats


@dataclass(frozen=True)
class Point:
    "How a model does with its keys and values stored by one rule."

    model: str
    rule: str
    budget: float  # bits a number that the rule could spend
    exact_first: int
    way: str  # "rounded", or "cache"
    bits: float  # that it spent, scales counted
    scores: list[float]  # of each text: the encoder's squared relative errors, the language model's losses


@dataclass(frozen=True)
class Precision(Origin):
    "A file of rules of bits: origin, models, what was seen and measured of their heads, and every rule's scores."

    complete: bool  # False where it was broken off
    seconds: float  # CPU time
    sizes: dict[str, int]  # how many texts, of how many tokens
    layouts: dict[str, dict[str, list[int]]]  # model -> layer -> h, g, d, dv
    formats: dict[str, list[str]]  # model -> those that were measured
    traits: dict[str, dict[str, dict[str, list[float]]]]  # model -> trait -> layer -> key-value heads
    effects: list[Effects]
    points: list[Point]

    def __post_init__(self):
        super().__post_init__()
        self._check_least(seconds=0)
        _check_models(self.layouts, self.formats, self.traits)
        for i, one in enumerate(self.effects):
            _check_effects(one, self.layouts, self.formats, f"effects[{i}]")
        texts: dict[str, int] = {}
        for i, point in enumerate(self.points):
            if texts.setdefault(point.model, len(point.scores)) != len(point.scores) or not point.scores:
                raise ValueError(f"points[{i}] has {len(point.scores)} scores, another {texts[point.model]}")
            if min(point.scores) < 0 or not 0 < point.bits <= 32 or point.model not in self.layouts:
                raise ValueError(f"points[{i}] has a score below 0, no bits, or no model")
        for places in [(one.model, one.exact_first, one.layer) for one in self.effects], [*map(_key, self.points)]:
            if len(set(places)) < len(places):
                raise ValueError("the same was measured twice")

    def heads(
        self,
        model: str,
    ) -> dict[str, HeadLayout]:  # layer -> its heads
        "How the model's layers are cut into heads."
        return {name: HeadLayout(*sizes) for name, sizes in self.layouts[model].items()}

    def trait(
        self,
        model: str,
        name: str,  # one of TRAITS
    ) -> dict[str, Tensor]:  # layer -> key-value heads
        "What was seen of the heads."
        return {layer: torch.tensor(values, device="cpu") for layer, values in self.traits[model][name].items()}

    def sensitivity(
        self,
        model: str,
        exact_first: int = 0,
    ) -> Sensitivity:
        "The effects, as `allocate_precision` takes them. ValueError where some are missing."
        found = {
            one.layer: torch.tensor(one.effects, **NUMBERS)
            for one in self.effects
            if (one.model, one.exact_first) == (model, exact_first)
        }
        if missing := [name for name in self.layouts[model] if name not in found]:
            raise ValueError(f"{model}, exact_first {exact_first}: not measured yet in {', '.join(missing)}")
        found = {name: found[name] for name in self.layouts[model]}
        widths = {name: (d, dv) for name, (_, _, d, dv) in self.layouts[model].items()}
        return Sensitivity(found, tuple(self.formats[model]), GROUP, exact_first, widths)

    def point(
        self,
        model: str,
        rule: str,
        budget: float = 32.0,  # 32: the exact model
        exact_first: int = 0,
        way: str = "rounded",
    ) -> Point | None:
        "The scores of a rule, if they were measured."
        wanted = model, rule, budget, exact_first, way
        return next((point for point in self.points if _key(point) == wanted), None)

    def loss(
        self,
        point: Point,
        base: Point | None = None,  # compared with this; unless told with the exact model
    ) -> tuple[float, float, float]:  # what it is, and the interval over texts
        """What a rule costs: the encoder's relative error, or its ratio to `base`'s; the language
        model's perplexity as a multiple of the exact model's, or of `base`'s.
        """
        if point.model == "language":
            base = base or self.point("language", "exact")
            pairs = torch.tensor([point.scores, base.scores], **NUMBERS)
            return bootstrap(pairs.mT, lambda rows: (rows[..., 0] - rows[..., 1]).mean(-1).exp(), self.seed)
        pairs = torch.tensor([point.scores, (base or point).scores], **NUMBERS).mT
        if base is None:
            return bootstrap(pairs, lambda rows: rows[..., 0].mean(-1).sqrt(), self.seed)
        return bootstrap(pairs, lambda rows: (rows[..., 0].mean(-1) / rows[..., 1].mean(-1)).sqrt(), self.seed)


def _check_models(layouts: dict, formats: dict, traits: dict) -> None:
    "ValueError for models that differ, for layers that are not cut into heads, and for formats that there are not."
    if not layouts or not layouts.keys() == formats.keys() or not {*traits} <= {*layouts}:
        raise ValueError(
            f"models differ: layouts {shorter([*layouts])}, formats {shorter([*formats])}, traits {shorter([*traits])}"
        )
    for model, layers in layouts.items():
        if unknown := [form for form in formats[model] if form not in KV_FORMATS]:
            raise ValueError(f"formats of {shorter(model)}: {shorter(unknown[0])} is none of {', '.join(KV_FORMATS)}")
        for name, sizes in layers.items():
            try:
                HeadLayout(*sizes)
            except (TypeError, ValueError) as error:
                raise ValueError(f"layer {shorter(name)}: {shorter(sizes)} is not h, g, d, dv: {error}") from None


def _check_effects(one: Effects, layouts: dict, formats: dict, where: str) -> None:
    "ValueError for another number of heads or formats than the model has, and for effects below 0."
    try:
        _, g, *_ = layouts[one.model][one.layer]
    except KeyError:
        raise ValueError(f"{where}: {shorter(one.model)} has no layer {shorter(one.layer)}") from None
    shape = [len(formats[one.model])] * g
    if [[*map(len, heads)] for heads in one.effects] != [shape, shape]:
        raise ValueError(f"{where} is not of 2 parts, {g} heads and {shape[0]} formats")
    if min(itertools.chain(*itertools.chain(*one.effects))) < 0:
        raise ValueError(f"{where} holds a number below 0")


def _key(point: Point) -> tuple:
    return point.model, point.rule, point.budget, point.exact_first, point.way


def as_precision(found: dict[str, Any]) -> Precision:
    "What `run_precision` found, as it would be read from its file."
    effects, points = [Effects(**one) for one in found["effects"]], [Point(**one) for one in found["points"]]
    return Precision(**found | dict(command="-", effects=effects, points=points))


def read_precision(path: Path | str) -> Precision:  # a file of `mha-book precision`
    "The rules of bits in a file. Raises as `mha_book.bench.measured.read_file` does."
    return read_file(Precision, path)


# The rules


class Known:
    "What a rule may know of a model's heads when it decides."

    def __init__(self, file: Precision, model: str, budget: float, exact_first: int):
        self.file, self.model, self.budget, self.exact_first = file, model, budget, exact_first
        self.layouts, self.seed = file.heads(model), file.seed

    def fit(self, wanted: dict[str, Tensor] | None = None, token_keys: bool = False, rotated: bool = False) -> Storage:
        rest = dict(group=GROUP, exact_first=self.exact_first)
        fitted = fit_bits(self.layouts, self.budget, wanted, token_keys=token_keys, **rest)
        return Storage(fitted, rotated, token_keys)

    def trait(self, index: int) -> dict[str, Tensor]:
        return self.file.trait(self.model, TRAITS[index])

    @cached_property
    def best(self) -> dict:
        return allocate_precision(self.file.sensitivity(self.model, self.exact_first), self.budget)

    def handed(self, scores: dict[str, Tensor]) -> Storage:
        return Storage(hand_out(self.best, scores))


def negative(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    "The lowest first."
    return {name: -score for name, score in scores.items()}


def added(*wishes: dict[str, Tensor]) -> dict[str, Tensor]:
    "What two rules want together."
    return {name: sum(wish[name] for wish in wishes) for name in wishes[0]}


RANDOM = 3  # seeds
SPARED = 3  # heads
BEST = "mixed, by effect"
RULES: dict[str, Callable[[Known], Storage]] = {
    "uniform": lambda known: known.fit(),
    "keys +2 bits": lambda known: known.fit(lean(known.layouts, 2)),
    "keys +4 bits": lambda known: known.fit(lean(known.layouts, 4)),
    "values +2 bits": lambda known: known.fit(lean(known.layouts, -2)),
    "one scale a token": lambda known: known.fit(token_keys=True),
    "rotated": lambda known: known.fit(rotated=True),
    "rotated, one scale a token": lambda known: known.fit(token_keys=True, rotated=True),
    "bits by entropy": lambda known: known.fit(by_entropy(known.trait(1))),
    "bits by entropy, twice the slope": lambda known: known.fit(by_entropy(known.trait(1), 0.5)),
    "first-token heads spared": lambda known: known.fit(spare(known.trait(2), SPARED)),
    "low-entropy heads spared, others by entropy": lambda known: known.fit(
        added(spare(negative(known.trait(1)), SPARED), by_entropy(known.trait(1)))
    ),
    BEST: lambda known: Storage(known.best),
    f"{BEST}, rotated": lambda known: Storage(known.best, rotated=True),
    "same formats, largest logit first": lambda known: known.handed(known.trait(0)),
    "same formats, lowest entropy first": lambda known: known.handed(negative(known.trait(1))),
    "same formats, first token first": lambda known: known.handed(known.trait(2)),
}
for number in range(RANDOM):
    RULES[f"same formats, random heads {number}"] = lambda known, number=number: known.handed(
        random_scores(known.layouts, known.seed + number)
    )
EXACT_TOO = "uniform", "keys +2 bits", "rotated, one scale a token", BEST  # with the first token exact, too
FEWER = "uniform", "keys +2 bits", "values +2 bits", BEST  # of a language model, at other budgets
CACHED = "uniform", "keys +2 bits", BEST


def planned(subject: Subject) -> list[tuple]:  # keys of points
    "Which rules are tried on a model, the main budget first; of a language model, which takes long, fewer elsewhere."
    name, main, speaks = subject.name, subject.main, subject.name == "language"
    plan = [(name, "exact", 32.0, 0, "rounded")] if speaks else []
    for budget in main, *(budget for budget in subject.budgets if budget != main):
        rules = FEWER if speaks and budget != main else RULES
        tried = [
            (first, rule) for first, rule in itertools.product(subject.firsts, rules) if not first or rule in EXACT_TOO
        ]
        plan += [(name, rule, budget, first, "rounded") for first, rule in tried]
        if speaks and budget == main:
            plan += [(name, rule, budget, first, "cache") for first, rule in itertools.product(subject.firsts, CACHED)]
    return plan


# The runs


def run_precision(
    subjects: list[Subject],
    sizes: dict[str, int],
    seed: int,
    before: Precision | None,  # an unfinished file of the same settings
    tell: Callable[[int, int], object],  # told (how much is done, of how much)
    keep: Callable[[dict[str, Any]], object] = lambda found: None,  # gets what is there after each step
) -> tuple[dict[str, Any], BaseException | None]:  # a `Precision` without its command; what stopped it
    "Measure the heads, then try each rule. Ctrl-C or a failure ends it, and what is done is kept."
    device = subjects[0].tests.device
    found = provenance(device) | _begun(subjects, sizes, seed, before)
    return found, run_steps(found, device, lambda: _steps(subjects, found), tell, keep)


def _begun(subjects: list[Subject], sizes: dict[str, int], seed: int, before: Precision | None) -> dict[str, Any]:
    "The fields of a file in which nothing is measured, or what was. ValueError where that is of other settings."
    layouts = {one.name: {name: [*at, at.value_dim] for name, at in one.layouts.items()} for one in subjects}
    formats = {one.name: [*one.formats] for one in subjects}
    found = dict(dtype="float32", threads=1, seed=seed, complete=False, seconds=0.0, sizes=sizes)
    found |= dict(layouts=layouts, formats=formats, traits={}, effects=[], points=[])
    settings = "seed", "sizes", "layouts", "formats"
    return taken_up(found, before, settings, ("seconds", "traits", "effects", "points"))


def _steps(subjects: list[Subject], found: dict[str, Any]) -> list[Callable[[], None]]:
    "What is still to be measured."
    measured = {(one["model"], one["exact_first"], one["layer"]) for one in found["effects"]}
    tried = {_key(Point(**point)) for point in found["points"]}
    steps = []
    for subject in subjects:
        if subject.name not in found["traits"]:
            steps.append(lambda subject=subject: _see(subject, found))
        for place in itertools.product([subject.name], subject.firsts, subject.layouts):
            if place not in measured:
                steps.append(lambda subject=subject, place=place: _measure(subject, found, *place))
        steps += [
            lambda subject=subject, key=key: _try(subject, found, *key) for key in planned(subject) if key not in tried
        ]
    return steps


def _short(numbers: Any) -> Any:
    "Numbers in lists, to four digits: that is more than any of them is certain to."
    return [_short(one) for one in numbers] if isinstance(numbers, list) else float(f"{numbers:.4g}")


def _see(subject: Subject, found: dict[str, Any]) -> None:
    traits = subject.traits()
    found["traits"][subject.name] = {
        trait: {name: _short(values.tolist()) for name, values in seen.items()} for trait, seen in traits.items()
    }


def _measure(subject: Subject, found: dict[str, Any], model: str, exact_first: int, layer: str) -> None:
    effects = _short(subject.effects(layer, exact_first).tolist())
    found["effects"].append(asdict(Effects(model, exact_first, layer, effects)))


def _try(
    subject: Subject, found: dict[str, Any], model: str, rule: str, budget: float, exact_first: int, way: str
) -> None:
    storage, bits = None, 32.0
    if rule != "exact":
        storage = RULES[rule](Known(as_precision(found), model, budget, exact_first))
        bits = storage.bits(subject.layouts)
    scores = [float(f"{score:.6g}") for score in subject.scores(storage, way).tolist()]
    found["points"].append(asdict(Point(model, rule, budget, exact_first, way, round(bits, 4), scores)))


# What it says


def main_budget(found: Precision, model: str) -> float | None:
    "The budget at which most rules were tried; None where none was."
    budgets = [point.budget for point in found.points if point.model == model and point.rule != "exact"]
    return max(budgets, key=budgets.count, default=None)


def show_precision(found: Precision) -> str:
    "What each rule costs at the main budget of each model, best first, with the interval over texts."
    lines = []
    for model in found.layouts:
        budget = main_budget(found, model)
        chosen = [point for point in found.points if (point.model, point.budget) == (model, budget)]
        base = found.point(model, "uniform", budget)
        what = {"encoder": "relative error", "language": "perplexity, as a multiple of the exact model's"}[model]
        lines += [f"{model}, at most {budget} bits a number: {what}; beside uniform"] if chosen else []
        for point in sorted(chosen, key=lambda point: found.loss(point)[0]):
            name = point.rule + ", first token exact" * point.exact_first + ", in the cache" * (point.way == "cache")
            value, low, high = found.loss(point)
            more = "{:.3f} ({:.3f} to {:.3f})".format(*found.loss(point, base)) if base else ""
            lines.append(f"  {name:52} {value:.4f} ({low:.4f} to {high:.4f})  {more}  {point.bits:.2f} bits")
    return "\n".join(lines)
