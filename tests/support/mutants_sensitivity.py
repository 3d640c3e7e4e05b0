"""Allocations that are wrong in one way: sensitivity, budget -> precisions."""

from mha_book.plugs.quantize import HeadPrecision, key_bits, value_bits
from support.mutants import Mutant, named


def _policies(sensitivity, chosen):
    "From {(name, part, head): format}."
    return {
        name: HeadPrecision(
            *(tuple(chosen[name, part, head] for head in range(effects.shape[1])) for part in (0, 1)),
            sensitivity.group,
            sensitivity.exact_first,
        )
        for name, effects in sensitivity.effects.items()
    }


def _greedy(sensitivity, budget, scales=True, per_bit=True):
    "The step that helps most a bit, again and again, while it fits."
    form_bits = {form: int(form.removeprefix("int")) for form in sensitivity.formats}
    numbers, cost, effect = 0, {}, {}
    for name, effects in sensitivity.effects.items():
        d, dv = sensitivity.head_dims[name]
        numbers += effects.shape[1] * (d + dv)
        for part, width in enumerate((d, dv)):
            for head in range(effects.shape[1]):
                for i, form in enumerate(sensitivity.formats):
                    bits = key_bits(form, sensitivity.group) if part == 0 else value_bits(form, dv)
                    cost[name, part, head, form] = width * (bits if scales else form_bits[form])
                    effect[name, part, head, form] = float(effects[part, head, i])
    order = sorted(sensitivity.formats, key=form_bits.get)
    chosen = {place[:3]: order[0] for place in cost}
    while True:
        spent = sum(cost[*place, form] for place, form in chosen.items())
        steps = []
        for place, form in chosen.items():
            if form != order[-1]:
                better = order[order.index(form) + 1]
                more = cost[*place, better] - cost[*place, form]
                gain = effect[*place, form] - effect[*place, better]
                if spent + more <= budget * numbers * (1 + 1e-9):
                    steps.append((gain / more if per_bit else gain, place, better))
        if not steps or max(steps)[0] <= 0:
            return _policies(sensitivity, chosen)
        _, place, better = max(steps)
        chosen[place] = better


def _by_head(sensitivity, budget):
    "The best single format for all: uniform."
    found = None
    for form in sensitivity.formats:
        policy = {
            name: HeadPrecision.uniform(
                effects.shape[1], form, group=sensitivity.group, exact_first=sensitivity.exact_first
            )
            for name, effects in sensitivity.effects.items()
        }
        if int(form.removeprefix("int")) < budget - 1 and (
            found is None or sensitivity.predict(policy) < sensitivity.predict(found)
        ):
            found = policy
    return found


ALLOCATIONS = named(
    Mutant("greedy", "The best step is taken first, though effects are not convex.", _greedy),
    Mutant(
        "scales are free",
        "Bits are counted without scales and zero points, so that more is spent than there is.",
        lambda sensitivity, budget: _greedy(sensitivity, budget, scales=False),
    ),
    Mutant(
        "wide heads for nothing",
        "The next step goes to whom it helps most, whatever it costs.",
        lambda sensitivity, budget: _greedy(sensitivity, budget, per_bit=False),
    ),
    Mutant("all alike", "Every head gets the same format.", _by_head),
)
