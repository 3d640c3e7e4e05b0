"""The shifts task against its own words, the floor against singular values, resemblance against a loop, and intervals
against SciPy and a simulation.
"""

import itertools
import math

import pytest
import torch

from mha_book.lab.head_mixing import (
    filters_floor,
    head_resemblance,
    paired_difference,
    shift_task,
    shifted,
    t_quantile,
)
from support.refusals import refused


def drawn(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


# The task


def test_the_target_holds_each_token_and_those_before_it_in_a_circle():
    b, n, k, w = 2, 7, 5, 3
    x, target = shift_task(b, n, k, w, drawn())
    assert x.shape == (b, n, w) and target.shape == (b, n, k * w)
    for i, steps in itertools.product(range(n), range(k)):
        assert target[:, i, steps * w : (steps + 1) * w].equal(x[:, (i - steps) % n])


def test_the_generator_alone_draws_the_tokens():
    first, again, other = (shift_task(3, 6, 2, 4, drawn(seed))[0] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    many = shift_task(500, 20, 1, 5, drawn())[0]
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


def operator(n, k, w):
    "The target as a matrix, (query, output) by (key, input)."
    basis = torch.eye(n * w, dtype=torch.float64).view(n * w, n, w)
    return shifted(basis, k).permute(1, 2, 0).reshape(n * k * w, n * w)


def flattened(matrix, n, k, w):
    "One row for each pair of query and key, one column for each pair of input and output."
    return matrix.view(n, k * w, n, w).permute(0, 2, 1, 3).reshape(n * n, k * w * w)


@pytest.mark.parametrize("n, k, w", [(7, 5, 3), (6, 6, 1), (9, 2, 4)])
def test_the_floor_is_what_singular_values_leave(n, k, w):
    values = torch.linalg.svdvals(flattened(operator(n, k, w), n, k, w)) ** 2
    for h in range(1, k + 3):
        assert abs(values[h:].sum() / values.sum() - filters_floor(k, h)) < 1e-12


def test_no_layer_of_fewer_maps_comes_below_the_floor():
    "Alternating least squares over maps and matrices of any sign reaches the floor, from any start, and not less."
    n, k, w, h = 7, 5, 2, 3
    target = flattened(operator(n, k, w), n, k, w)
    for seed in range(5):
        maps = torch.randn(n * n, h, generator=drawn(seed), dtype=torch.float64)
        for _ in range(40):
            matrices = torch.linalg.lstsq(maps, target).solution
            maps = torch.linalg.lstsq(matrices.mT, target.mT).solution.mT
        left = (target - maps @ matrices).square().sum() / target.square().sum()
        assert abs(left - filters_floor(k, h)) < 1e-9


def test_the_task_refuses_what_it_cannot_draw():
    with refused(ValueError, "num_shifts 6", "5 tokens"):
        shift_task(2, 5, 6, 3, drawn())
    with refused(ValueError, "width", "0"):
        shift_task(2, 5, 4, 0, drawn())
    with refused(TypeError, "num_shifts", "2.0"):
        shifted(torch.randn(2, 5, 3), 2.0)
    with refused(TypeError, "x"):
        shifted(torch.ones(2, 5, 3, dtype=torch.int64), 2)
    with refused(ValueError, "num_heads", "0"):
        filters_floor(4, 0)


# Resemblance


def by_loop(maps):
    b, h, n, m = maps.shape
    found = torch.zeros(h, h, dtype=torch.float64)
    for i, j in itertools.product(range(h), range(h)):
        shares = []
        for batch, query in itertools.product(range(b), range(n)):
            one, two = (maps[batch, head, query].double().tolist() for head in (i, j))
            total = sum(map(abs, one)) + sum(map(abs, two))
            if total:
                shares.append(1 - sum(abs(x - y) for x, y in zip(one, two)) / total)
        found[i, j] = sum(shares) / len(shares)
    return found


def test_resemblance_is_the_loop():
    logits = 2 * torch.randn(2, 4, 5, 7, generator=drawn())
    maps = logits.softmax(-1)
    signed = maps - 0.4 * maps.roll(1, 1)
    hidden = torch.where(torch.arange(5)[:, None] == 2, 0.0, maps)
    for each in maps, signed, hidden, maps.double():
        assert (head_resemblance(each) - by_loop(each)).abs().max() < 1e-12
    smallest = torch.minimum(maps[:, :, None].double(), maps[:, None].double()).sum(-1).mean((0, 3))
    assert (head_resemblance(maps) - smallest).abs().max() < 1e-6


def test_resemblance_of_closed_cases():
    eye = torch.eye(4).expand(2, 1, 4, 4)
    for other, value in (eye, 1), (eye.roll(1, -1), 0), (-eye, 0), (torch.full((2, 1, 4, 4), 0.25), 0.25):
        found = head_resemblance(torch.cat([eye, other], 1))
        assert found[0, 1] == found[1, 0] == value and found[0, 0] == found[1, 1] == 1
    found = head_resemblance(torch.cat([eye, eye / 3], 1))
    assert abs(found[0, 1] - 0.5) < 1e-7
    nothing = head_resemblance(torch.cat([eye, 0 * eye, 0 * eye], 1))
    assert nothing[0, 1] == 0 and nothing[1, 2].isnan()


def test_resemblance_refuses_what_has_no_weight():
    with refused(ValueError, "maps", "(1, 2, 3, 3)"):
        head_resemblance(torch.zeros(1, 2, 3, 3))
    with refused(ValueError, "maps", "(1, 0, 3, 3)"):
        head_resemblance(torch.zeros(1, 0, 3, 3))
    with refused(TypeError, "maps"):
        head_resemblance(torch.ones(1, 2, 3, 3, dtype=torch.bool))


# Intervals


def test_quantiles_are_those_of_the_table_and_of_scipy():
    table = {(0.975, 1): 12.706, (0.975, 4): 2.776, (0.975, 9): 2.262, (0.995, 4): 4.604, (0.95, 30): 1.697}
    for (probability, freedom), value in table.items():
        assert abs(t_quantile(probability, freedom) - value) < 5e-4
    stats = pytest.importorskip("scipy.stats")
    for probability, freedom in itertools.product((0.6, 0.975, 0.9975, 0.99975), (*range(1, 12), 40, 41)):
        exact = stats.t.ppf(probability, freedom)
        assert math.isclose(t_quantile(probability, freedom), exact, rel_tol=1e-9)


def test_an_interval_is_the_textbook_one():
    kind, base = [3.0, 5.0, 4.0, 6.0, 7.0], [1.0, 4.0, 2.0, 2.0, 6.0]
    mean, low, high = paired_difference(kind, base)  # differences 2, 1, 2, 4, 1: mean 2, variance 1.5
    assert mean == 2.0 and abs(high - 2 - 2.776445 * math.sqrt(1.5 / 5)) < 1e-5 and abs(low + high - 4) < 1e-12
    wide = paired_difference(kind, base, comparisons=10)
    assert abs(wide.high - 2 - 5.597568 * math.sqrt(1.5 / 5)) < 1e-5
    assert paired_difference(base, kind).mean == -2.0 and paired_difference(kind, kind) == (0.0, 0.0, 0.0)
    narrow = paired_difference(kind, base, level=0.5)
    assert low < narrow.low < narrow.high < high


@pytest.mark.parametrize("comparisons", [1, 9])
def test_false_alarms_are_as_rare_as_promised(comparisons):
    "Kinds that do not differ, each against the baseline of the same five seeds."
    generator, trials = drawn(), 1500
    alarms = families = 0
    for _ in range(trials):
        base, *kinds = torch.randn(10, 5, generator=generator, dtype=torch.float64).tolist()
        intervals = [paired_difference(kind, base, comparisons) for kind in kinds]
        missed = sum(not low < 0 < high for _, low, high in intervals)
        alarms, families = alarms + missed, families + (missed > 0)
    if comparisons == 1:
        assert abs(alarms / (9 * trials) - 0.05) < 0.01 and families / trials > 0.2
    else:
        assert families / trials < 0.06


def test_intervals_refuse_seeds_that_do_not_pair():
    with refused(ValueError, "2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with refused(ValueError, "1 and 1", "two seeds"):
        paired_difference([1.0], [2.0])
    with refused(ValueError, "probability 0.5"):
        t_quantile(0.5, 4)
    with refused(ValueError, "freedom", "0"):
        t_quantile(0.9, 0)
    with refused(TypeError, "probability"):
        t_quantile("0.9", 4)
