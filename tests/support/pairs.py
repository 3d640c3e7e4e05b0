"""Few cases that cover every pair of choices, instead of all combinations."""

import itertools
import random


def every_pair(choices: dict[str, list], seed: int = 0) -> list[dict]:
    """Cases such that any two values of any two choices meet in at least one of them.

    Greedy: of some random cases that hold a pair still missing, the one that holds the most missing pairs is taken.
    """
    rng = random.Random(seed)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(choices, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing)
        tries = [{name: rng.randrange(len(choices[name])) for name in choices} | {a: i, b: j} for _ in range(50)]
        best = max(tries, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append({name: choices[name][index] for name, index in best.items()})
    return cases


def pairs_of(case: dict[str, int]) -> set[tuple]:
    "All pairs of choices that meet in a case."
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(case, 2)}


def full_grid(choices: dict[str, list]) -> list[dict]:
    "Every combination."
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]
