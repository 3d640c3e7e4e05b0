"""Rules of bits: each against its definition, at equal memory, and what a model sees of them."""

import copy

import pytest
import torch

from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.weight_split import HeadLayout
from mha_book.lab.frontier import (
    TRAITS,
    RotatedHeads,
    Storage,
    TokenScales,
    bootstrap,
    by_entropy,
    fit_bits,
    hand_out,
    head_traits,
    kv_layouts,
    lean,
    precision_at,
    random_scores,
    rank_correlation,
    spare,
    stored_as,
)
from mha_book.plugs.quantize import HeadPrecision, round_keys, round_values
from mha_book.plugs.rope import RoPE
from mha_book.variants.mixed_precision import MixedPrecision, RotatedPosition, hadamard, rotate_heads
from support.refusals import refused

TWO = {"one": HeadLayout(6, 3, 32), "two": HeadLayout(6, 2, 64, 16)}
ALIKE = {f"layer {i}": HeadLayout(6, 3, 64) for i in range(4)}


def two_layers(**options):
    "A model of two attention layers, one behind the other, in float64."
    layers = [MultiHeadAttention(24, 6, num_kv_heads=3, head_dim=8, dtype=torch.float64, **options) for _ in range(2)]
    return torch.nn.Sequential(*layers).requires_grad_(False)


def total_bits(layouts, precisions, token_keys=False):
    "Everything that is stored of a whole block of tokens, counted one by one, over the numbers."
    bits = numbers = 0
    for name, at in layouts.items():
        policy = precisions[name]
        for key, value in zip(policy.keys, policy.values):
            bits += int(key[3:]) * policy.group * at.head_dim + int(value[3:]) * policy.group * at.value_dim
            bits += 32 * policy.group  # scale and zero point of each value
            bits += 32 * (policy.group if token_keys else at.head_dim)
            numbers += policy.group * (at.head_dim + at.value_dim)
    return bits / numbers


# Equal memory


@pytest.mark.parametrize("layouts", [TWO, ALIKE])
@pytest.mark.parametrize("token_keys", [False, True])
@pytest.mark.parametrize("budget", [4.5, 5.1, 7.75])
def test_a_rule_uses_the_budget_and_not_a_bit_more(layouts, token_keys, budget):
    for wanted in (
        None,
        lean(layouts, 2),
        by_entropy(random_scores(layouts, 1), 3.0),
        spare(random_scores(layouts, 2), 2),
    ):
        policies = fit_bits(layouts, budget, wanted, token_keys=token_keys, group=16)
        used = Storage(policies, token_keys=token_keys).bits(layouts)
        assert used == pytest.approx(total_bits(layouts, policies, token_keys))
        one_more = max(max(at.head_dim, at.value_dim) for at in layouts.values())
        numbers = sum(at.num_kv_heads * (at.head_dim + at.value_dim) for at in layouts.values())
        assert budget - one_more / numbers < used <= budget + 1e-9


def test_where_nothing_is_wanted_all_are_alike_as_far_as_the_budget_divides():
    policies = fit_bits(ALIKE, 4.5)
    assert set(policies.values()) == {HeadPrecision.uniform(3, "int4")}
    more = fit_bits(ALIKE, 4.5 + 6 / 24)  # six of 24 parts get one bit more, spread over the layers
    counts = [sum(form == "int5" for form in policy.keys + policy.values) for policy in more.values()]
    assert sorted(counts) == [1, 1, 2, 2] or counts == [2, 2, 2, 0] or sum(counts) == 6 and max(counts) <= 2
    assert {form for policy in more.values() for form in policy.keys + policy.values} == {"int4", "int5"}


@pytest.mark.parametrize("more, keys, values", [(2, "int5", "int3"), (4, "int6", "int2"), (-2, "int3", "int5")])
def test_keys_get_more_bits_than_values(more, keys, values):
    policies = fit_bits(ALIKE, 4.5, lean(ALIKE, more), exact_first=1)
    assert set(policies.values()) == {HeadPrecision.uniform(3, keys, values, exact_first=1)}


def test_rounded_wishes_are_the_definition():
    "round(wanted + s) with the largest s: tried for every s on a grid."
    wanted = {name: 3 * torch.rand(2, 3) for name in ALIKE}
    policies = fit_bits(ALIKE, 4.5, wanted)
    got = torch.tensor([[[int(f[3:]) for f in part] for part in (p.keys, p.values)] for p in policies.values()])
    wish = torch.stack([*wanted.values()])
    shifts = torch.linspace(-4, 8, 100_001)
    means = torch.stack([(wish + s).round().clamp(2, 8).mean() for s in shifts[::50]])
    s = shifts[::50][means <= 4.0][-1]
    assert ((wish + s).round().clamp(2, 8) == got).sum() >= 23  # of 24: what is left goes to one of them


def test_spared_heads_have_all_bits_and_the_others_pay():
    scores = random_scores(ALIKE, 3)
    policies = fit_bits(ALIKE, 4.5, spare(scores, 2))
    order = torch.cat([*scores.values()]).argsort(descending=True).tolist()
    formats = [pair for policy in policies.values() for pair in zip(policy.keys, policy.values)]
    assert [formats[i] for i in order[:2]] == [("int8", "int8")] * 2
    assert {form for i in order[2:] for form in formats[i]} <= {"int3", "int4"}


def test_too_small_a_budget_is_refused_with_the_least():
    with refused(ValueError, "budget 2.4", "2.5 bits"):
        fit_bits(ALIKE, 2.4)


def test_other_heads_get_the_same_formats():
    formats = tuple(f"int{bits}" for bits in (8, 2, 5, 3, 4, 7))
    policies = {
        "one": HeadPrecision(formats[:3], ("int2",) * 3, 32, 1),
        "two": HeadPrecision(formats[3:], ("int6",) * 3, 32, 1),
    }
    scores = {"one": torch.tensor([0.1, 0.6, 0.3]), "two": torch.tensor([0.9, 0.0, 0.2])}
    given = hand_out(policies, scores)
    assert given["one"] == HeadPrecision(("int3", "int7", "int5"), ("int2", "int6", "int6"), 32, 1)
    assert given["two"] == HeadPrecision(("int8", "int2", "int4"), ("int6", "int2", "int2"), 32, 1)


def test_random_scores_come_from_the_seed():
    first, again, other = (random_scores(ALIKE, seed) for seed in (1, 1, 2))
    assert all(first[name].equal(again[name]) for name in ALIKE)
    assert not all(first[name].equal(other[name]) for name in ALIKE)


# What a model sees


def test_a_rotation_is_exact_before_rounding_and_after_it_the_one_of_the_weights():
    model, x = two_layers(), torch.randn(2, 70, 24, dtype=torch.float64)
    y = model(x)
    wide = {name: HeadPrecision.uniform(3, "float32") for name in kv_layouts(model)}
    wide = Storage({name: HeadPrecision(("bfloat16",) * 3, ("int5",) * 3) for name in wide}, rotated=True)
    turn = hadamard(8, dtype=torch.float64)
    folded = torch.nn.Sequential(*(rotate_heads(layer, turn, turn) for layer in model))
    assert (folded(x) - y).abs().max() < 1e-12
    with stored_as(model, wide):
        ours = model(x)
    with stored_as(folded, Storage(wide.precisions)):
        theirs = folded(x)
    assert (ours - theirs).abs().max() < 1e-9 < (ours - y).abs().max()
    assert model(x).equal(y)  # its own plugs are back


def test_behind_rotary_positions_the_rotation_is_a_position():
    model, x = two_layers(position=RoPE(8)), torch.randn(1, 70, 24, dtype=torch.float64)
    policies = {name: HeadPrecision.uniform(3, "int4") for name in kv_layouts(model)}
    turn = hadamard(8, dtype=torch.float64)
    folded = torch.nn.Sequential(*(rotate_heads(layer, None, turn) for layer in model))
    for layer in folded:
        layer.position = RotatedPosition(layer.position, turn)
    with stored_as(model, Storage(policies, rotated=True)), stored_as(folded, Storage(policies)):
        assert (model(x) - folded(x)).abs().max() < 1e-9


def test_one_scale_a_token_is_the_definition():
    q, k, v = (torch.randn(2, 3, 70, 8) for _ in range(3))
    policy = HeadPrecision(("int3", "int5", "int5"), ("int4", "int4", "int2"), exact_first=2)
    seen = []
    TokenScales(policy, lambda q, k, v: seen.extend((k, v)) or q)(q, k, v)
    for x, got, formats in ((k, seen[0], policy.keys), (v, seen[1], policy.values)):
        assert got[:, :, :2].equal(x[:, :, :2])
        for head, form in enumerate(formats):
            for token in range(2, 70):
                one = x[:, head, token]
                low, high = one.amin(-1, keepdim=True), one.amax(-1, keepdim=True)
                step = (high - low) / (2 ** int(form[3:]) - 1)
                assert (got[:, head, token] - one).abs().le(0.51 * step + 1e-2).all()
            assert got[:, head, 2:].equal(round_values(x[:, head : head + 1, 2:], form)[:, 0])


def test_plugs_are_those_of_the_policy_and_come_back_after_a_failure():
    model = two_layers()
    own = [layer.attend for layer in model]
    policies = {name: HeadPrecision.uniform(3, "int4") for name in kv_layouts(model)}
    for storage, kinds in (
        (Storage(policies), MixedPrecision),
        (Storage(policies, token_keys=True), TokenScales),
        (Storage(policies, rotated=True), RotatedHeads),
    ):
        with pytest.raises(ZeroDivisionError), stored_as(model, storage):
            assert all(isinstance(layer.attend, kinds) for layer in model)
            raise ZeroDivisionError
        assert all(layer.attend is plug for layer, plug in zip(model, own))
    with refused(ValueError, "Sequential", "'three'"), stored_as(model, Storage({"three": policies["0"]})):
        pass
    with refused(ValueError, "Linear holds no MultiHeadAttention"):
        kv_layouts(torch.nn.Linear(1, 1))


def test_keys_of_a_policy_are_rounded_in_blocks():
    model, x = two_layers(), torch.randn(1, 64, 24, dtype=torch.float64)
    layer = copy.deepcopy(model[0])
    layer.attend = lambda q, k, v, **rest: model[0].attend(q, round_keys(k, "int3"), round_values(v, "int6"), **rest)
    with stored_as(model, Storage({"0": HeadPrecision.uniform(3, "int3", "int6")})):
        assert model[0](x).equal(layer(x))


# What is seen of heads


def test_traits_are_those_of_the_attention_maps():
    model, x = two_layers(), torch.randn(2, 9, 24, dtype=torch.float64)
    traits = head_traits(model, [(x[:1],), (x[1:],)])
    weights = {"0": model[0].attention_map(x), "1": model[1].attention_map(model[0](x))}
    for name, layer in zip("01", model):
        q, k, _ = layer.qkv(x if name == "0" else model[0](x))
        for g in range(3):
            heads = [2 * g, 2 * g + 1]
            logits = torch.stack([q[:, h] @ k[:, g].mT / 8**0.5 for h in heads])
            maps = weights[name][:, heads]
            assert traits["largest logit"][name][g] == pytest.approx(logits.abs().max())
            assert traits["entropy"][name][g] == pytest.approx(-maps.square().sum(-1).log().mean())
            assert traits["weight on the first token"][name][g] == pytest.approx(maps[..., 0].mean())
    assert tuple(traits) == TRAITS and model[0].attend(q, k, k) is not None


def test_a_causal_layer_has_no_infinite_logit():
    layer = MultiHeadAttention(24, 6)

    class Causal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, is_causal=True)

    traits = head_traits(Causal(), [(torch.randn(1, 5, 24),)])
    assert all(values["layer"].isfinite().all() and len(values["layer"]) == 6 for values in traits.values())


# Comparing


def test_rank_correlation_is_spearmans():
    a, b = torch.rand(50), torch.rand(50)
    far = sum((i - j) ** 2 for i, j in zip(a.argsort().argsort().tolist(), b.argsort().argsort().tolist()))
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * far / (50 * (50**2 - 1)))
    assert rank_correlation(a, a.exp()) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)


def test_precision_at_counts_the_best():
    truth, guess = torch.tensor([5.0, 4, 3, 2, 1]), torch.tensor([1.0, 5, 4, 2, 3])
    assert [precision_at(k, truth, guess) for k in (1, 2, 3, 5)] == [0, 1 / 2, 2 / 3, 1]


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_error():
    samples = torch.randn(200, 1, dtype=torch.float64) + 3
    value, low, high = bootstrap(samples, lambda rows: rows[..., 0].mean(-1))
    error = samples.std() / 200**0.5
    assert value == pytest.approx(samples.mean()) and low < value < high
    assert 3.4 * error < high - low < 4.4 * error
    pair = torch.cat([samples, samples + 1], dim=1)  # differences that are all alike hang on no text
    gap = bootstrap(pair, lambda rows: (rows[..., 1] - rows[..., 0]).mean(-1))
    assert gap == pytest.approx((1, 1, 1))
    twice = [bootstrap(samples, lambda rows: rows.mean((-1, -2)), seed) for seed in (0, 0, 1)]
    assert twice[0] == twice[1] != twice[2]
