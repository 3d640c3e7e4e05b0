"""The rungs of the ladder in their order, and what is still to be done."""

from collections.abc import Callable
from functools import partial
from typing import Any

from .ladder_times import encoder_times, language_times
from .rungs import NEW, RATE, EncoderRungs, gated, load_encoder_rungs, longer, mixed, narrow, pruned, smaller
from .rungs_by_input import LENGTHS, by_input
from .rungs_language import LanguageRungs, load_language_rungs

Climb = Callable[[str], list[dict]]  # the rung's name -> it, and others that come with it
SHARES = 0.1, 0.2, 0.3, 0.4, 0.5  # of the encoder's heads that are off
FEWER = 0.05, 0.1, 0.2, 0.3  # of the language model's
SEEDS = range(3)
LADDERS = {"encoder": load_encoder_rungs, "language": load_language_rungs}


def encoder_rungs(on: EncoderRungs, found: dict[str, Any]) -> dict[str, Climb]:
    "The encoder's, those first that matter most."

    def worth() -> list[list[float]]:
        return found["importance"]["encoder"]

    tuned: dict[str, Climb] = {
        "all heads": lambda name: [on.rung(name, on.exact, on.model, [on.all_heads])],
        "pruned by importance": lambda name: pruned(on, name, on.best(worth(), on.kept)),
        "pruned at random 0": lambda name: pruned(on, name, on.drawn(on.kept, 0)),
        "pruned by learned gates": lambda name: gated(on, name),
        "mixture of heads": lambda name: mixed(on, name, worth(), False),
        "narrow heads": lambda name: narrow(on, name),
        "fewer heads from the start": lambda name: smaller(on, name, NEW * RATE),
        "sets by length": lambda name: by_input(on, name, found["importance"]),
        "as many in each layer": lambda name: pruned(on, name, on.alike(worth(), on.same)),
        "pruned by importance, tuned longer": lambda name: longer(on, name, on.best(worth(), on.kept)),
        "pruned by importance to half": lambda name: pruned(on, name, on.best(worth(), sum(on.shape) // 2)),
    }
    return tuned | encoder_untuned(on, worth)


def late_rungs(on: EncoderRungs, found: dict[str, Any]) -> dict[str, Climb]:
    "The encoder's, that come after the times."

    def learned() -> list[list[int]]:
        return next(one for one in found["rungs"] if one["name"] == "pruned by learned gates")["kept"][0]

    return {
        "pruned by learned gates, tuned longer": lambda name: longer(on, name, learned()),
        "mixture, random router": lambda name: mixed(on, name, found["importance"]["encoder"], True),
        "pruned at random 1": lambda name: pruned(on, name, on.drawn(on.kept, 1)),
        "fewer heads from the start, slower": lambda name: smaller(on, name, RATE),
    }


def encoder_untuned(on: EncoderRungs, worth: Callable[[], list[list[float]]]) -> dict[str, Climb]:
    "Heads off, and nothing is trained."
    total, plan = sum(on.shape), {}
    for share in SHARES:
        off = round(share * total)
        plan[f"{off} least important off"] = lambda name, k=total - off: on.untuned(name, on.best(worth(), k))
    for share in SHARES:
        off = round(share * total)
        plan[f"{off} least important at their means"] = lambda name, k=total - off: on.untuned(
            name, on.best(worth(), k), True
        )
    for share in (0.3, 0.5):
        off = round(share * total)
        for seed in SEEDS:
            plan[f"{off} random {seed} off"] = lambda name, k=total - off, seed=seed: on.untuned(
                name, on.drawn(k, seed)
            )
    off = total - on.same * len(on.shape)
    return plan | {f"{off} off, as many in each layer": lambda name: on.untuned(name, on.alike(worth(), on.same))}


def language_rungs(on: LanguageRungs, found: dict[str, Any]) -> dict[str, Climb]:
    "The language model's: nothing is trained."

    def worth() -> list[list[float]]:
        return found["importance"]["language"]

    total, plan = sum(on.shape), {"all heads": lambda name: on.pruned(name, on.all_heads)}
    offs = [round(share * total) for share in FEWER]
    for off in offs:
        plan[f"{off} least important off"] = lambda name, off=off: on.off(name, on.best(worth(), total - off, 0))
    for off in offs[1:]:
        plan[f"{off} off in whole groups"] = lambda name, off=off: on.pruned(name, on.groups(worth(), off))
    for off in offs:
        plan[f"{off} least important at their means"] = lambda name, off=off: on.off(
            name, on.best(worth(), total - off, 0), filled=True
        )
    for seed in SEEDS:
        plan[f"{offs[1]} random {seed} off"] = lambda name, seed=seed: on.off(name, on.drawn(total - offs[1], seed, 0))
    return plan


# What is still to be done


def planned(subjects: list, found: dict[str, Any]) -> list[Callable[[], None]]:
    "The steps that a file lacks: of each model what heads are worth, and its rungs; then times, and late rungs."
    steps = []
    for on in subjects:
        for name, weigh in weighed(on).items():
            if name not in found["importance"]:
                steps.append(partial(_weigh, found, name, weigh))
        steps += _to_climb(on, found, (encoder_rungs if on.name == "encoder" else language_rungs)(on, found))
    timed = {(one["suite"], one["mode"], *one["size"]) for one in found["tables"]}
    for on in subjects:
        times = encoder_times if on.name == "encoder" else language_times
        for place, measure in times(on, found).items():
            if place not in timed:
                steps.append(partial(_time, found, place, measure))
    for on in subjects:
        steps += _to_climb(on, found, late_rungs(on, found)) if on.name == "encoder" else []
    return steps


def _to_climb(on: EncoderRungs | LanguageRungs, found: dict[str, Any], rungs: dict[str, Climb]) -> list:
    climbed = {one["name"] for one in found["rungs"] if one["model"] == on.name}
    return [partial(_climb, found, name, climb) for name, climb in rungs.items() if name not in climbed]


def weighed(on: EncoderRungs | LanguageRungs) -> dict[str, Callable[[], list[list[float]]]]:
    "What heads are worth, and to which texts."
    found: dict[str, Callable] = {on.name: on.importance}
    if on.name == "encoder":
        found |= {f"{on.name}, {name}": partial(on.importance, tokens.__contains__) for name, tokens in LENGTHS.items()}
    return found


def _weigh(found: dict[str, Any], name: str, weigh: Callable) -> None:
    found["importance"][name] = weigh()


def _climb(found: dict[str, Any], name: str, climb: Climb) -> None:
    found["rungs"] += climb(name)


def _time(found: dict[str, Any], place: tuple, measure: Callable[[], list[dict]]) -> None:
    suite, mode, *size = place
    found["tables"].append(dict(suite=suite, mode=mode, size=size, rows=measure()))
