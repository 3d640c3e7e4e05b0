"""Each head alone against what can be computed by hand; allocations against all that there are."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.instruments.testing import SIZES
from mha_book.plugs.logits import SinkAttention
from mha_book.plugs.quantize import HeadPrecision, round_keys, round_values
from mha_book.variants.mixed_precision import use_precision
from mha_book.variants.sensitivity import (
    Sensitivity,
    allocate_precision,
    allocation_bound,
    head_sensitivity,
    joint_effect,
)
from support.mutants_sensitivity import ALLOCATIONS
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(pytest.approx, rel=1e-9)
GROUP, TOKENS = 4, 11  # two whole blocks, and three keys that stay


def build(**options):
    layer = MultiHeadAttention(
        s.e, s.h, **(dict(num_kv_heads=s.g, head_dim=s.d, value_dim=s.d - 2) | float64 | options)
    )
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer


def batch(n=TOKENS, **options):
    return (torch.randn(s.b, n, s.e, **(float64 | options)),)


class Two(nn.Module):
    "Two layers, one inside another module; a list of states, as an encoder gives."

    def __init__(self, **options):
        super().__init__()
        self.first, self.rest = build(**options), nn.ModuleDict({"second": build(**options)})

    def forward(self, x):
        y = x + self.first(x)
        return [x, y, y + self.rest["second"](y, is_causal=True)]


def by_hand(layer, x, part, head, form, **options):
    "The output of a layer in which one head's keys or values are others, from its definition."
    q, k, v = layer.qkv(x)
    if part == 0:
        k = torch.cat([k[:, :head], round_keys(k[:, head : head + 1], form, GROUP), k[:, head + 1 :]], 1)
    else:
        v = torch.cat([v[:, :head], round_values(v[:, head : head + 1], form), v[:, head + 1 :]], 1)
    r, outs = s.h // s.g, []
    for i in range(s.h):
        logits = q[:, i] @ k[:, i // r].mT / s.d**0.5
        outs.append(logits.softmax(-1) @ v[:, i // r])
    return layer.out_proj(torch.cat(outs, -1))


# Each head alone


@pytest.mark.parametrize("form", ["int3", "int8", "float8_e4m3fn", "bfloat16", "float32"])
def test_effects_are_those_of_the_definition(form):
    layer, batches = build(), [batch(), batch(13)]
    found = head_sensitivity(layer, batches, [form], group=GROUP).effects[""]
    assert found.shape == (2, s.g, 1) and found.dtype == torch.float64
    for part, head in itertools.product(range(2), range(s.g)):
        moved = size = 0.0
        for (x,) in batches:
            moved += (by_hand(layer, x, part, head, form) - layer(x)).square().sum().item()
            size += layer(x).square().sum().item()
        assert found[part, head, 0] == pytest.approx(moved / size, rel=1e-5, abs=1e-25)
    assert found.min() > 0


def test_a_value_head_alone_is_linear():
    "Its error goes through the weights and the output projection, and nothing else."
    layer, (x,) = build(bias=False), batch()
    found, weights = head_sensitivity(layer, [(x,)], ["int4"], group=GROUP).effects[""], layer.attention_map(x)
    _, _, v = layer.qkv(x)
    for head in range(s.g):
        error = round_values(v[:, head : head + 1], "int4") - v[:, head : head + 1]
        heads = torch.zeros(s.b, s.h, *error.shape[2:], **float64)
        group = slice(head * s.h // s.g, (head + 1) * s.h // s.g)
        heads[:, group] = weights[:, group] @ error
        y = heads.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T
        assert found[1, head, 0] == close((y.square().sum() / layer(x).square().sum()).item())


def test_two_value_heads_together_are_their_sum_and_twice_their_product():
    layer, batches = build(), [batch()]
    ((x,),) = batches
    alone = head_sensitivity(layer, batches, ["int3"], group=GROUP).effects[""]
    one, other = (by_hand(layer, x, 1, head, "int3") - layer(x) for head in (0, 1))
    formats = ("int3", "int3") + ("float32",) * (s.g - 2)
    policy = HeadPrecision(("float32",) * s.g, formats, GROUP)
    cross = 2 * (one * other).sum() / layer(x).square().sum()
    assert joint_effect(layer, batches, {"": policy}) == pytest.approx(
        (alone[1, :2].sum() + cross).item(),
        rel=1e-4,  # float32 is not exact here
    )
    assert abs(cross) > 1e-3 * alone[1, :2].sum()


@pytest.mark.parametrize("dtype, exact", [(torch.float32, 1), (torch.bfloat16, 2), (torch.float64, 0)])
def test_formats_that_hold_the_input_cost_exactly_nothing(dtype, exact):
    layer = build(dtype=dtype)
    found = head_sensitivity(layer, [batch(dtype=dtype)], ["float32", "bfloat16", "int8"], group=GROUP)
    costless = [bool((found.effects[""][..., i] == 0).all()) for i in range(3)]
    assert costless == [exact >= 1, exact >= 2, False]
    if exact:
        policy = HeadPrecision.uniform(s.g, "float32", group=GROUP)
        assert joint_effect(layer, [batch(dtype=dtype)], {"": policy}) == 0.0


def test_layers_of_a_model_have_their_names_and_the_last_state_counts():
    model, batches = Two(), [batch(), batch()]
    found = head_sensitivity(model, batches, ["int4", torch.bfloat16], group=GROUP)
    assert list(found.effects) == ["first", "rest.second"] and found.formats == ("int4", "bfloat16")
    assert found.head_dims == dict.fromkeys(found.effects, (s.d, s.d - 2))
    only = dict(outputs=lambda m, x: m(x)[-1], layers=["rest.second"])
    last = head_sensitivity(model, batches, ["int4"], group=GROUP, **only)
    assert torch.equal(last.effects["rest.second"][..., 0], found.effects["rest.second"][..., 0])
    assert list(last.effects) == ["rest.second"]
    middle = head_sensitivity(model, batches, ["int4"], group=GROUP, outputs=lambda m, x: m(x)[1])
    assert (middle.effects["rest.second"] == 0).all() and (middle.effects["first"] > 0).all()


def test_a_layer_that_takes_no_part_costs_nothing():
    model = Two()
    model.unused = build()
    assert (head_sensitivity(model, [batch()], ["int4"], group=GROUP).effects["unused"] == 0).all()


def test_the_loss_rises_by_what_is_said():
    layer, batches = build(), [batch(), batch()]

    def loss(module, x):
        return module(x).square().mean()

    found = head_sensitivity(layer, batches, ["int3"], group=GROUP, loss=loss).effects[""]
    rise = sum(by_hand(layer, x, 1, 0, "int3").square().mean() - loss(layer, x) for (x,) in batches) / 2
    assert found[1, 0, 0] == pytest.approx(rise.item(), rel=1e-6)
    falls = head_sensitivity(layer, batches, ["int3"], group=GROUP, loss=lambda m, x: -loss(m, x).item())
    assert torch.allclose(falls.effects[""], -found, rtol=1e-4)  # numbers, and negative ones, are losses too


def test_padding_changes_no_effect():
    "The second block of keys holds two real tokens and two that are none."
    layer, (x,) = build(), batch(6)
    key_mask = torch.arange(13).expand(s.b, -1) < 6

    def measured(size, key_mask):
        padded = torch.cat([x, size * torch.randn(s.b, 7, s.e, **float64)], 1)
        batches = [(padded, key_mask)]
        return head_sensitivity(layer, batches, ["int4"], group=GROUP, outputs=real).effects[""]

    def real(module, x, key_mask):
        return module(x, key_mask=key_mask)[:, :6]

    assert torch.allclose(measured(0.1, key_mask), measured(1e3, key_mask), rtol=1e-9)
    assert not torch.allclose(measured(0.1, None), measured(1e3, None), rtol=0.5)


def test_what_ruins_the_output_costs_inf_and_is_not_chosen():
    "Integers have scales in float16, and these values are beyond its range."
    layer = build(bias=False)
    with torch.no_grad():
        layer.in_proj.weight[-s.g * (s.d - 2) :] *= 1e6
    found = head_sensitivity(layer, [batch()], ["int8", "bfloat16"], group=GROUP)
    assert (found.effects[""][1, :, 0] == math.inf).all() and found.effects[""][:, :, 1].isfinite().all()
    assert found.effects[""][0].isfinite().all()
    assert allocate_precision(found, 16.0)[""].values == ("bfloat16",) * s.g
    assert joint_effect(layer, [batch()], {"": HeadPrecision.uniform(s.g, "int8", group=GROUP)}) == math.inf


class Noted(nn.Module):
    "A plug that keeps what it is given."

    def __init__(self):
        super().__init__()
        self.calls, self.scale = [], nn.Parameter(torch.ones(()))

    def forward(self, q, k, v, **options):
        self.calls.append((k.clone(), v.clone()))
        weights = (q @ k.repeat_interleave(s.h // s.g, 1).mT).softmax(-1)
        return weights @ v.repeat_interleave(s.h // s.g, 1) * self.scale


def test_first_tokens_and_other_heads_stay_exact():
    layer = build(attend=Noted())
    policy = HeadPrecision(("int3",) + ("float32",) * (s.g - 1), ("int2",) * s.g, GROUP, exact_first=3)
    joint_effect(layer, [batch()], {"": policy})
    (k, v), (rounded_k, rounded_v) = layer.attend.calls[0], layer.attend.calls[-1]
    assert torch.equal(rounded_k[:, :, :3], k[:, :, :3]) and torch.equal(rounded_v[:, :, :3], v[:, :, :3])
    assert torch.equal(rounded_k[:, :1, 3:], round_keys(k[:, :1, 3:], "int3", GROUP))
    assert torch.equal(rounded_v[:, :, 3:], round_values(v[:, :, 3:], "int2"))
    layer.attend.calls.clear()
    head_sensitivity(layer, [batch()], ["int3"], group=GROUP, exact_first=3)
    (k, v), last = layer.attend.calls[0], layer.attend.calls[-1]
    assert torch.equal(last[0], k) and torch.equal(last[1][:, :-1], v[:, :-1])
    assert torch.equal(last[1][:, -1:, 3:], round_values(v[:, -1:, 3:], "int3"))
    assert len(layer.attend.calls) == 2 + 2 * s.g


def test_a_joint_effect_is_that_of_the_policy_in_use():
    model, batches = Two(), [batch(), batch()]
    precisions = {
        "first": HeadPrecision(("int3", "int8", "int8")[: s.g], ("int4",) * s.g, GROUP, exact_first=1),
        "rest.second": HeadPrecision.uniform(s.g, "int2", "int5", group=3),
    }
    moved = size = 0.0
    for (x,) in batches:
        y = model(x)[-1]
        with use_precision(model, precisions):
            moved += (model(x)[-1] - y).square().sum().item()
        size += y.square().sum().item()
    assert joint_effect(model, batches, precisions) == close(moved / size)


# What is left behind


@pytest.mark.parametrize("plug", [None, SinkAttention(s.h, **float64), Noted()])
@pytest.mark.parametrize("fails", [False, True])
def test_every_plug_is_put_back(plug, fails):
    model = Two(attend=plug)
    before = [layer.attend for layer in (model.first, model.rest["second"])]
    names = [name for name, _ in model.named_parameters()], [name for name, _ in model.named_modules()]
    calls = itertools.count()

    def outputs(module, x):
        if fails and next(calls) == 5:
            raise KeyboardInterrupt
        return module(x)[-1]

    policies = {"first": HeadPrecision.uniform(s.g, "int4", group=GROUP)}
    for measure in (
        lambda: head_sensitivity(model, [batch()], ["int4"], group=GROUP, outputs=outputs),
        lambda: joint_effect(model, [batch()] * 2, policies, outputs=outputs),
    ):
        calls = itertools.count()
        if fails:
            with pytest.raises(KeyboardInterrupt):
                measure()
        else:
            measure()
        after = [layer.attend for layer in (model.first, model.rest["second"])]
        assert all(a is b for a, b in zip(after, before))
        assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())
        assert names == ([n for n, _ in model.named_parameters()], [n for n, _ in model.named_modules()])
        assert all(("attend" in vars(layer)) == (plug is None) for layer in (model.first, model.rest["second"]))


def test_nothing_is_recorded_for_gradients():
    layer, recorded = build(), []

    def outputs(module, x):
        recorded.append((y := module(x)).requires_grad)
        return y

    head_sensitivity(layer, [batch()], ["int4"], group=GROUP, outputs=outputs)
    joint_effect(layer, [batch()], {"": HeadPrecision.uniform(s.g, "int4", group=GROUP)}, outputs=outputs)
    assert len(recorded) == 2 + 2 * s.g + 3 and not any(recorded)


def test_progress_is_told():
    told = []
    head_sensitivity(
        build(), [batch()], ["int4", "float16"], group=GROUP, progress=lambda done, of: told.append((done, of))
    )
    assert told == [(i + 1, 4 * s.g) for i in range(4 * s.g)]


def test_the_same_format_twice_is_one():
    found = head_sensitivity(build(), [batch()], ["bfloat16", torch.bfloat16, "int4"], group=GROUP)
    assert found.formats == ("bfloat16", "int4")


def dropped():
    layer = build(dropout=0.5)
    return layer.train()


def with_nan():
    return (torch.full((s.b, TOKENS, s.e), math.nan, **float64),)


def silent():
    layer = build()
    nn.init.zeros_(layer.out_proj.weight)
    nn.init.zeros_(layer.out_proj.bias)
    return layer


measure = head_sensitivity
BAD = {
    "no module": (lambda x: measure(len, [x], ["int4"]), TypeError, ["module", "builtin_function"]),
    "no attention": (lambda x: measure(nn.Linear(3, 3), [x], ["int4"]), ValueError, ["Linear", "MultiHead"]),
    "no batches": (lambda x: measure(build(), [], ["int4"]), ValueError, ["batches", "at least one"]),
    "a tensor as batches": (lambda x: measure(build(), x[0], ["int4"]), TypeError, ["batch 0", "[(x,)]"]),
    "tensors as batches": (lambda x: measure(build(), [x[0]], ["int4"]), TypeError, ["batch 0", "[(x,)]"]),
    "no formats": (lambda x: measure(build(), [x], []), ValueError, ["dtypes", "KV_FORMATS"]),
    "unknown format": (lambda x: measure(build(), [x], ["int9"]), ValueError, ["dtypes", "int9", "int8"]),
    "unknown dtype": (lambda x: measure(build(), [x], [torch.int32]), ValueError, ["dtypes", "int32"]),
    "group": (lambda x: measure(build(), [x], ["int4"], group=0), ValueError, ["group", "0"]),
    "exact_first": (lambda x: measure(build(), [x], ["int4"], exact_first=-1), ValueError, ["exact_first", "-1"]),
    "short": (lambda x: measure(build(), [x], ["int4"]), ValueError, ["11 keys", "64", "smaller group"]),
    "not finite": (lambda x: measure(build(), [x, with_nan()], ["int4"], group=4), ValueError, ["batch 1", "finite"]),
    "random": (lambda x: measure(dropped(), [x], ["int4"], group=4), ValueError, ["again", "module.eval()"]),
    "nothing": (lambda x: measure(silent(), [x], ["int4"], group=4), ValueError, ["output is 0"]),
    "unknown layer": (lambda x: measure(Two(), [x], ["int4"], layers=["third"]), ValueError, ["third", "rest.second"]),
    "no layer": (lambda x: measure(Two(), [x], ["int4"], layers=[]), ValueError, ["layers []", "'first'"]),
    "no tensor": (
        lambda x: measure(build(), [x], ["int4"], group=4, outputs=lambda m, x: (m(x), 1)),
        TypeError,
        ["tuple", "outputs=lambda"],
    ),
    "loss of many": (
        lambda x: measure(build(), [x], ["int4"], group=4, loss=lambda m, x: m(x)),
        TypeError,
        ["loss", "one number"],
    ),
    "both": (lambda x: measure(build(), [x], ["int4"], group=4, loss=abs, outputs=abs), ValueError, ["loss", "both"]),
    "joint, unknown layer": (
        lambda x: joint_effect(Two(), [x], {"third": HeadPrecision.uniform(s.g, "int4")}),
        ValueError,
        ["third", "rest.second"],
    ),
    "joint, other heads": (
        lambda x: joint_effect(build(), [x], {"": HeadPrecision.uniform(s.g + 1, "int4")}),
        ValueError,
        [f"the layer has {s.g}", f"{s.g + 1}"],
    ),
    "joint, no policy": (lambda x: joint_effect(build(), [x], {"": "int4"}), TypeError, ["HeadPrecision", "str"]),
}


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    call, error, words = BAD[name]
    with refused(error, *words):
        call(batch())


# Allocations


def sensitivity(seed=0, layers=((3, 8, 8),), formats=("int2", "int4", "int7"), group=16, convex=False):
    "Effects drawn at random: w · 4^-b, times noise unless convex."
    rng = torch.Generator().manual_seed(seed)
    effects, dims = {}, {}
    bits = torch.tensor([float(form.removeprefix("int")) for form in formats], dtype=torch.float64)
    for i, (heads, d, dv) in enumerate(layers):
        weight = torch.exp(3 * torch.randn(2, heads, 1, generator=rng, dtype=torch.float64))
        noise = torch.rand(2, heads, len(formats), generator=rng, dtype=torch.float64) * 4 + 0.1
        effects[f"layer{i}"] = weight * 4**-bits * (1 if convex else noise)
        dims[f"layer{i}"] = d, dv
    return Sensitivity(effects, formats, group, 1, dims)


def spent(found, precisions):
    "Bits a number on average, from `HeadPrecision.bits`."
    bits = numbers = 0
    for name, precision in precisions.items():
        width = found.effects[name].shape[1] * sum(found.head_dims[name])
        bits, numbers = bits + width * precision.bits(*found.head_dims[name]), numbers + width
    return bits / numbers


def everything(found):
    "All allocations: (bits, effect)."
    places = [(name, part, head) for name, e in found.effects.items() for part in (0, 1) for head in range(e.shape[1])]
    for forms in itertools.product(found.formats, repeat=len(places)):
        chosen = dict(zip(places, forms))
        policies = {
            name: HeadPrecision(
                *(tuple(chosen[name, part, head] for head in range(e.shape[1])) for part in (0, 1)), found.group, 1
            )
            for name, e in found.effects.items()
        }
        yield spent(found, policies), found.predict(policies)


CASES = {
    "one layer": dict(),
    "wide values": dict(layers=((3, 8, 24),), seed=1),
    "two layers": dict(layers=((2, 8, 16), (1, 32, 8)), seed=2, group=12),
    "convex": dict(convex=True, seed=3),
    "floats too": dict(formats=("int3", "float8_e4m3fn", "bfloat16"), seed=4),
}


def case(name):
    options = dict(CASES[name])
    if name != "floats too":
        return sensitivity(**options)
    found = sensitivity(**options | dict(formats=("int3", "int8", "int2")))
    return Sensitivity(found.effects, options["formats"], found.group, 1, found.head_dims)


def budgets(found):
    allowed = sorted({round(bits, 9) for bits, _ in everything(found)})
    return [allowed[0], *allowed[1 :: max(1, len(allowed) // 12)], allowed[-1], allowed[-1] + 3]


def judge(found, allocate):
    "What is wrong with an allocation, over all budgets."
    every, faults = list(everything(found)), []
    for budget in budgets(found):
        try:
            policies = allocate(found, budget)
        except Exception as error:
            faults.append(f"raises {error!r}")
            continue
        if spent(found, policies) > budget * (1 + 1e-8):
            faults.append("above the budget")
        elif found.predict(policies) > (1 + 1e-9) * min(e for bits, e in every if bits <= budget * (1 + 1e-9)):
            faults.append("not the best")
    return faults


@pytest.mark.parametrize("name", CASES)
def test_the_allocation_is_the_best_of_all(name):
    assert judge(case(name), allocate_precision) == []


@pytest.mark.parametrize("mutant", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_a_wrong_allocation_is_seen(mutant):
    found = [fault for name in CASES if name != "floats too" for fault in judge(case(name), mutant.apply)]
    assert found, mutant.says


def dual(found, budget):
    "The largest value of the Lagrangian, over all slopes: it can have a kink nowhere else."
    rows = []
    for name, effects in found.effects.items():
        for part, width in enumerate(found.head_dims[name]):
            one = HeadPrecision.uniform
            for row in effects[part].tolist():
                costs = []
                for form in found.formats:
                    policy = one(1, form, group=found.group)  # bits of keys alone, and of values alone
                    costs.append(width * (policy.bits(10**9, 1) if part == 0 else policy.bits(width, width)))
                if part == 1:  # (keys + values) / 2 -> values
                    keys = [one(1, form, group=found.group).bits(10**9, 1) for form in found.formats]
                    costs = [2 * cost - width * key for cost, key in zip(costs, keys)]
                rows.append(list(zip(costs, row)))
    numbers = sum(found.effects[name].shape[1] * sum(found.head_dims[name]) for name in found.effects)
    slopes = {0.0}
    for row in rows:
        for (c1, e1), (c2, e2) in itertools.combinations(row, 2):
            if abs(c1 - c2) > 1e-6:
                slopes.add(max(0.0, (e1 - e2) / (c2 - c1)))
    return max(sum(min(e + t * c for c, e in row) for row in rows) - t * budget * numbers for t in slopes)


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_the_lagrangian_dual_and_below_every_optimum(name):
    found = case(name)
    for budget in budgets(found):
        best, bound = found.predict(allocate_precision(found, budget)), allocation_bound(found, budget)
        assert bound <= best * (1 + 1e-9)
        assert bound == pytest.approx(dual(found, budget), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_more_budget_is_never_worse_and_hull_points_are_reached(seed):
    found = sensitivity(seed, layers=((6, 16, 16), (5, 16, 16)), formats=tuple(f"int{b}" for b in range(2, 9)))
    last, tight = math.inf, 0
    for step in range(7 * 22):  # every number of bits that can be spent
        budget = 4 + step / 22
        best = found.predict(allocate_precision(found, budget))
        assert best <= last * (1 + 1e-12)
        tight += best <= allocation_bound(found, budget) * (1 + 1e-6)
        last = best
    assert tight >= 20


def test_with_convex_effects_every_budget_is_a_hull_point():
    found = sensitivity(layers=((3, 16, 16),), formats=tuple(f"int{b}" for b in range(2, 9)), convex=True)
    for step in range(6 * 6 + 1):
        budget = 2 + 2 + step / 6  # scales and zero points: 32 bits for 16 numbers
        assert found.predict(allocate_precision(found, budget)) == pytest.approx(
            allocation_bound(found, budget), rel=1e-6
        )


def test_equal_effects_take_the_cheaper_format_and_infinite_ones_none():
    effects = torch.tensor([[[math.inf, 3.0, 3.0]], [[0.0, 0.0, 0.0]]], dtype=torch.float64)
    found = Sensitivity({"a": effects}, ("int2", "int4", "int6"), 16, 0, {"a": (8, 8)})
    assert allocate_precision(found, 100.0)["a"] == HeadPrecision(("int4",), ("int2",), 16)
    assert allocation_bound(found, 100.0) == 3.0
    with refused(ValueError, "least", "6"):  # keys 4 + 2, values 2 + 4
        allocate_precision(found, 5.99)
    effects[1] = math.nan
    with refused(ValueError, "'a'", "values of head 0", "finite"):
        allocate_precision(found, 6.0)


@pytest.mark.parametrize("group", [48, 64, 7])
def test_what_uniform_costs_is_enough_for_uniform(group):
    found = sensitivity(layers=((5, 32, 64), (3, 24, 40)), formats=("int4", "int6", "int8"), group=group)
    for form in found.formats:
        policies = {
            name: HeadPrecision.uniform(effects.shape[1], form, group=group, exact_first=1)
            for name, effects in found.effects.items()
        }
        best = allocate_precision(found, spent(found, policies))
        assert found.predict(best) <= found.predict(policies) * (1 + 1e-12)
        assert spent(found, best) <= spent(found, policies) * (1 + 1e-8)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("allocate", [allocate_precision, allocation_bound])
@pytest.mark.parametrize(
    "budget, error, words",
    [
        ("4", TypeError, ["budget", "'4'"]),
        (None, TypeError, ["budget", "None"]),
        (True, TypeError, ["budget", "True"]),
        (math.nan, ValueError, ["budget", "nan"]),
        (math.inf, ValueError, ["budget", "inf"]),
        (-1.0, ValueError, ["-1", "least"]),
        (4.9, ValueError, ["4.9", "5 is the least", "scales"]),
    ],
)
def test_budgets_that_are_none(allocate, budget, error, words):
    with refused(error, *words):
        allocate(sensitivity(), budget)  # int2: keys 2 + 32/16, values 2 + 32/8


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "policies, error, words",
    [
        ({"other": HeadPrecision.uniform(3, "int4", group=16, exact_first=1)}, ValueError, ["other", "layer0"]),
        ({"layer0": HeadPrecision.uniform(2, "int4", group=16, exact_first=1)}, ValueError, ["3", "2"]),
        ({"layer0": HeadPrecision.uniform(3, "int4", group=8, exact_first=1)}, ValueError, ["group 8", "16"]),
        ({"layer0": HeadPrecision.uniform(3, "int4", group=16)}, ValueError, ["exact_first 0"]),
        ({"layer0": HeadPrecision.uniform(3, "float32", group=16, exact_first=1)}, ValueError, ["float32", "int7"]),
        ({"layer0": "int4"}, TypeError, ["HeadPrecision", "str"]),
    ],
)
def test_predictions_that_cannot_be_made(policies, error, words):
    with refused(error, *words):
        sensitivity().predict(policies)


def test_a_model_of_thirty_layers_is_allocated():
    found = sensitivity(layers=((3, 64, 64),) * 30, formats=tuple(f"int{b}" for b in range(2, 9)), group=64)
    best = allocate_precision(found, 4.5)
    assert len(best) == 30 and 4.49 < spent(found, best) <= 4.5
    bound = allocation_bound(found, 4.5)
    assert bound <= found.predict(best) < 1.05 * bound
