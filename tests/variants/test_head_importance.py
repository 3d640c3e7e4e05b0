"""What a head is worth: against columns that are set to 0, against gradients and slopes by hand, and all choices."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention
from mha_book.instruments.testing import SIZES
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import OutputGate
from mha_book.variants.head_importance import (
    ScaledHeads,
    ablation_effects,
    head_importance,
    head_means,
    least_heads,
    scaled_heads,
    without_heads,
)
from mha_book.variants.mixed_precision import plugged
from support.mutants_importance import CHOICES, OF_A_LOSS, OF_OUTPUTS, SCALINGS
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
LAYERS = "first", "rest.second"


def build(**options):
    layer = MultiHeadAttention(s.e, s.h, **(dict(num_kv_heads=s.g, head_dim=s.d, value_dim=s.dv) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def tokens(n=s.n, b=s.b, **options):
    return torch.randn(b, n, s.e, **(float64 | options))


class Two(nn.Module):
    "Two layers of other head counts, one inside another module; a list of states, as an encoder gives."

    def __init__(self, **options):
        super().__init__()
        self.first = build(**options)
        self.rest = nn.ModuleDict({"second": build4(**options)})

    def forward(self, x, key_mask=None):
        y = x + self.first(x, key_mask=key_mask)
        return [x, y, y + self.rest["second"](y.tanh(), key_mask=key_mask, is_causal=True)]


def build4(**options):
    layer = MultiHeadAttention(s.e, 4, **(dict(num_kv_heads=2, head_dim=s.d, value_dim=s.dv) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def columns_scaled(layer, scale, fill=None):
    "A copy whose output projection reads each head so much, and the rest of it from a fixed vector: the definition."
    new, dv = copy.deepcopy(layer), layer.layout.value_dim
    with torch.no_grad():
        for i, amount in enumerate(scale.tolist()):
            columns = new.out_proj.weight[:, i * dv : (i + 1) * dv]
            if fill is not None:
                new.out_proj.bias += (1 - amount) * columns @ fill[i]
            columns *= amount
    return new


def each_head(layer, x, **options):
    "What each head adds to the output: h b n e, head by head."
    dv, found = layer.layout.value_dim, []
    for i in range(layer.layout.num_heads):
        only = torch.zeros(layer.layout.num_heads, **float64)
        only[i] = 1
        found.append(columns_scaled(layer, only)(x, **options) - layer.out_proj.bias)
    assert dv == s.dv
    return torch.stack(found)


# Heads that count so much


@pytest.mark.parametrize("with_fill", [False, True])
@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(mask=torch.rand(s.h, s.n, s.n) < 0.8)])
def test_scaled_heads_are_scaled_columns(with_fill, options):
    layer, x = build(), tokens()
    scale, fill = torch.randn(s.h, **float64), torch.randn(s.h, s.dv, **float64)
    expected = columns_scaled(layer, scale, fill if with_fill else None)(x, **options)
    with scaled_heads(layer, {"": scale}, {"": fill} if with_fill else None):
        close(layer(x, **options), expected)
    assert (layer(x, **options) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(s.b, 1), (1, s.n), (s.b, s.n), (1, 1)])
@pytest.mark.parametrize("with_fill", [False, True])
def test_a_scale_of_its_own_for_each_sequence_and_token(shape, with_fill):
    heads, x = torch.randn(s.b, s.n, s.h * s.dv, **float64), tokens()
    scale = torch.randn(*shape, s.h, **float64)
    fill = torch.randn(s.h, s.dv, **float64) if with_fill else None
    found = ScaledHeads(scale, fill=fill)(heads, x)
    for b, n, i in itertools.product(range(s.b), range(s.n), range(s.h)):
        amount, stripe = scale[b % shape[0], n % shape[1], i], slice(i * s.dv, (i + 1) * s.dv)
        rest = 0 if fill is None else (1 - amount) * fill[i]
        close(found[b, n, stripe], amount * heads[b, n, stripe] + rest)


@pytest.mark.parametrize("name", SCALINGS)
def test_wrong_scalings_are_seen(name):
    heads, scale, fill = (torch.randn(*shape, **float64) for shape in ((s.b, s.n, s.h * s.dv), (s.h,), (s.h, s.dv)))
    wrong = SCALINGS[name].apply(heads, scale, fill)
    assert (wrong - ScaledHeads(scale, fill=fill)(heads, tokens())).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_fill", [False, True])
def test_all_heads_at_1_change_no_bit(dtype, with_fill):
    model, x = Two(dtype=dtype), tokens(dtype=dtype)
    exact = model(x)[-1]
    scales = {"first": torch.ones(s.h), "rest.second": torch.ones(s.b, 1, 4)}
    means = {
        name: torch.randn(len(scale.flatten()) // (s.b if scale.dim() > 1 else 1), s.dv)
        for name, scale in scales.items()
    }
    with scaled_heads(model, scales, means if with_fill else None):
        assert torch.equal(model(x)[-1], exact)
        assert model(x)[-1].dtype == dtype


def test_a_head_at_0_has_neither_influence_nor_gradient_and_its_scale_has():
    layer, x = build(num_kv_heads=s.h), tokens()
    scale = torch.ones(s.h, **float64)
    scale[[2, 5]] = 0
    scale.requires_grad_()
    with scaled_heads(layer, {"": scale}):
        y = layer(x)
        y.square().sum().backward()
        grads = {part: layer.in_proj.weight.grad.unflatten(0, (-1, 1))[rows] for part, rows in parts(layer).items()}
        with torch.no_grad():
            for rows in parts(layer).values():
                layer.in_proj.weight[rows[2]].add_(7.0)
        assert torch.equal(layer(x), y)
    for part, grad in grads.items():
        assert not grad[[2, 5]].any() and grad[[0, 1, 3, 4]].flatten(1).any(1).all(), part
    columns = layer.out_proj.weight.grad.unflatten(1, (s.h, s.dv))
    assert not columns[:, [2, 5]].any() and columns[:, 0].any()
    assert scale.grad.all()
    assert (layer(x) - y).abs().max() > 1e-2  # where it is on again, its weights count


def parts(layer):
    "Rows of q, k, v of in_proj for each head: h rows."
    h, d, dv = s.h, s.d, s.dv
    rows = torch.arange(h * (2 * d + dv))
    return dict(q=rows[: h * d].view(h, d), k=rows[h * d : 2 * h * d].view(h, d), v=rows[2 * h * d :].view(h, dv))


def test_a_gate_behind_comes_behind():
    gate = OutputGate(s.e, s.h, head_dim=s.dv, **float64)
    layer, x, scale = build(finish=gate), tokens(), torch.randn(s.h, **float64)
    plain = copy.deepcopy(layer)
    plain.finish = None
    fill = torch.randn(s.h, s.dv, **float64)
    heads = []
    with plugged({plain: dict(finish=lambda y, x: heads.append(y) or y)}):
        plain(x)
    for means, base in ((None, 0), ({"": fill}, fill)):
        each = heads[0].unflatten(-1, (s.h, s.dv))
        each = base + (each - base) * scale[:, None]
        with scaled_heads(layer, {"": scale}, means):
            close(layer(x), layer.out_proj(each.flatten(-2) * gate.gate_proj(x).sigmoid()))
            assert "finish.gate_proj.weight" in layer.state_dict() and gate in [*layer.modules()]
    assert layer.finish is gate


def test_blocks_inside_each_other_multiply_and_all_is_as_before():
    model, x = Two(), tokens()
    exact, a, b = model(x)[-1], torch.randn(s.h, **float64), torch.randn(s.h, **float64)
    with scaled_heads(model, {"first": a * b}):
        product = model(x)[-1]
    with pytest.raises(KeyError), scaled_heads(model, {"first": a}):
        with scaled_heads(model, {"first": b}):
            close(model(x)[-1], product)
        raise KeyError
    assert torch.equal(model(x)[-1], exact) and model.first.finish is None
    with scaled_heads(model, {}), without_heads(model, {}):
        assert torch.equal(model(x)[-1], exact)


def test_without_heads_is_scale_0():
    model, x = Two(), tokens()
    scale, means = torch.ones(s.h, **float64), {"first": torch.randn(s.h, s.dv, **float64)}
    scale[[1, 4]] = 0
    for fill in (None, means):
        with scaled_heads(model, {"first": scale}, fill):
            expected = model(x)[-1]
        with without_heads(model, {"first": [4, 1, 4]}, fill):
            assert torch.equal(model(x)[-1], expected)


# Means


@pytest.mark.parametrize("padded", [False, True])
def test_means_are_those_of_real_tokens(padded):
    model, batches = Two(), []
    for n in (s.n, s.m):
        real = torch.ones(s.b, n, dtype=torch.bool)
        real[1, n - 2 :] = not padded
        batches.append((tokens(n), real) if padded else (tokens(n),))
    found = head_means(model, batches)
    assert list(found) == list(LAYERS)
    for name in LAYERS:
        seen, layer = [], model.get_submodule(name)
        with plugged({layer: dict(finish=lambda y, x: seen.append(y) or y)}):
            for batch in batches:
                model(*batch)
        rows = [y[b, i] for y, (_, *real) in zip(seen, batches) for b in range(s.b) for i in range(y.shape[1])
                if not real or real[0][b, i]]  # fmt: skip
        assert len(rows) == s.b * (s.n + s.m) - 4 * padded
        close(found[name], torch.stack(rows).mean(0).unflatten(0, (-1, s.dv)))


def test_means_of_other_queries_count_all_of_them():
    layer, x, context = build(), tokens(), tokens(s.m)
    real = torch.rand(s.b, s.m) < 0.7
    real[:, 0] = True
    found = head_means(layer, [(x, context)], outputs=lambda m, x, c: m(x, c, key_mask=real))
    seen = []
    with plugged({layer: dict(finish=lambda y, x: seen.append(y) or y)}):
        layer(x, context, key_mask=real)
        close(found[""], seen[0].mean((0, 1)).unflatten(0, (s.h, s.dv)))
        seen.clear()
        cache = KVCache(s.b, s.g, 9, s.d, value_dim=s.dv, **float64)
        layer(x, is_causal=True, cache=cache)
        step = head_means(layer, [(x[:, :1],)], outputs=lambda m, x: m(x, is_causal=True, cache=cache))
        close(step[""], seen[1].mean((0, 1)).unflatten(0, (s.h, s.dv)))


def test_means_of_half_precision_are_float32_and_layers_that_rest_have_none():
    class Half(Two):
        def forward(self, x):
            return self.first(x)

    found = head_means(Half(dtype=torch.bfloat16), [(tokens(dtype=torch.bfloat16),)])
    assert list(found) == ["first"] and found["first"].dtype == torch.float32
    means = {"first": torch.zeros(s.h, s.dv)}
    with refused(ValueError, "means", "'rest.second'", "'first'"):
        ablation_effects(Two(), [(tokens(),)], means=means)


def test_a_head_at_its_mean_on_one_token_changes_nothing():
    model, batches = Two(), [(tokens(1, b=1),)]
    effects = ablation_effects(model, batches, means=head_means(model, batches))
    assert max(effect.max() for effect in effects.values()) < 1e-28
    assert min(effect.min() for effect in ablation_effects(model, batches).values()) > 1e-6


# Ablation


@pytest.mark.parametrize("kind", ["zero", "mean", "off"])
def test_ablation_is_a_model_with_other_columns(kind):
    model, batches = Two(), [(tokens(),), (tokens(s.m),)]
    means = head_means(model, batches) if kind == "mean" else None
    off = {"first": (1,)} if kind == "off" else {}
    told = []
    found = ablation_effects(model, batches, means=means, off=off, progress=lambda *n: told.append(n))
    assert told == [(i, s.h + 4) for i in range(1, s.h + 5)]
    for name, effects in found.items():
        assert effects.dtype == torch.float64 and effects.shape == (model.get_submodule(name).layout.num_heads,)
        for i, effect in enumerate(effects):
            new = copy.deepcopy(model)
            for layer in LAYERS:
                scale = torch.ones(model.get_submodule(layer).layout.num_heads, **float64)
                scale[[*off.get(layer, ())] + [i] * (layer == name)] = 0
                new.set_submodule(layer, columns_scaled(new.get_submodule(layer), scale, means and means[layer]))
            moved = sum((new(*x)[-1] - model(*x)[-1]).square().sum() for x in batches)
            size = sum(model(*x)[-1].square().sum() for x in batches)
            assert effect.item() == pytest.approx((moved / size).item(), rel=1e-9)


def test_ablation_by_a_loss_is_its_rise():
    model, batches = Two(), [(tokens(),), (tokens(s.m),)]
    loss = lambda model, x: model(x)[-1].cos().mean()  # noqa: E731
    found = ablation_effects(model, batches, loss=loss)
    for i in range(4):
        with without_heads(model, {"rest.second": (i,)}):
            without = sum(loss(model, *x) for x in batches) / 2
        rise = without - sum(loss(model, *x) for x in batches) / 2
        assert found["rest.second"][i].item() == pytest.approx(rise.item(), abs=1e-13)
    assert min(found["first"].min(), found["rest.second"].min()) < 0  # a head may do harm


# Importance


def test_importance_of_the_last_layer_is_the_size_of_what_a_head_adds():
    "Where the output is linear in the scales, the slope is the head's part, and so is its ablation: a closed form."
    layer, x = build(), tokens()
    adds = each_head(layer, x).sum((2, 3))  # h b: one number for each sequence, so one sign makes no error
    outputs = lambda layer, x: layer(x).sum((1, 2))  # noqa: E731
    for probes, seed in ((1, 0), (3, 5)):
        found = head_importance(layer, [(x,)], outputs=outputs, probes=probes, seed=seed)[""]
        close(found, adds.square().sum(1) / outputs(layer, x).square().sum())
        close(found, ablation_effects(layer, [(x,)], outputs=outputs)[""])


def test_importance_of_outputs_is_found_by_probes():
    layer, x = build(), tokens()
    exact = each_head(layer, x).square().sum((1, 2, 3)) / layer(x).square().sum()
    close(ablation_effects(layer, [(x,)])[""], exact)
    found = [head_importance(layer, [(x,)], probes=probes)[""] for probes in (4, 1600)]
    errors = [(each / exact - 1).abs().max().item() for each in found]
    assert errors[1] < 0.15 and errors[1] < errors[0]  # as 1/sqrt(probes)
    again = head_importance(layer, [(x,)], probes=4)[""]
    assert torch.equal(again, found[0])
    assert not torch.equal(head_importance(layer, [(x,)], probes=4, seed=1)[""], again)


def slopes(model, batches, of, means=None, step=1e-6):
    "Of each batch d of / dξ by central differences for all sequences and heads: name -> batches of b h."
    found = {name: [] for name in LAYERS}
    for name, (x,) in itertools.product(LAYERS, batches):
        h = model.get_submodule(name).layout.num_heads
        slope = torch.zeros(len(x), h, **float64)
        for b, i in itertools.product(range(len(x)), range(h)):
            both = []
            for sign in (1, -1):
                scale = torch.ones(len(x), 1, h, **float64)
                scale[b, 0, i] += sign * step
                with scaled_heads(model, {name: scale}, means):
                    both.append(of(model, x))
            slope[b, i] = ((both[0] - both[1]) / (2 * step)).sum()  # of all rows: only b's is not 0
        found[name].append(slope)
    return found


@pytest.mark.parametrize("with_means", [False, True])
def test_importance_by_a_loss_is_michels(with_means):
    model, batches = Two(), [(tokens(),), (tokens(s.m, b=3),)]
    loss = lambda model, x: model(x)[-1].cos().mean()  # noqa: E731
    means = head_means(model, batches) if with_means else None
    found = head_importance(model, batches, loss=loss, means=means)
    by_hand = slopes(model, batches, loss, means)
    for name in LAYERS:
        expected = sum(slope.sum(0).abs() for slope in by_hand[name]) / 2
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-9)
        for mutant in OF_A_LOSS.values():
            assert not torch.allclose(found[name], mutant.apply(by_hand[name]) / 2, rtol=1e-2), mutant.name


@pytest.mark.parametrize("with_means", [False, True])
def test_importance_of_a_number_a_sequence_is_the_square_of_its_slope(with_means):
    model, batches = Two(), [(tokens(),), (tokens(s.m, b=3),)]
    of = lambda model, x: model(x)[-1].cos().mean((1, 2))  # noqa: E731
    means = head_means(model, batches) if with_means else None
    size = sum(of(model, *batch).square().sum() for batch in batches)
    found, by_hand = head_importance(model, batches, outputs=of, means=means), slopes(model, batches, of, means)
    for name in LAYERS:
        expected = sum(slope.square().sum(0) for slope in by_hand[name]) / size
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-9)
        for mutant in OF_OUTPUTS.values():
            assert not torch.allclose(found[name], mutant.apply(by_hand[name]) / size, rtol=1e-2), mutant.name


def test_an_output_without_a_row_a_sequence_is_taken_as_a_whole():
    model, batches = Two(), [(tokens(),)]
    of = lambda model, x: model(x)[-1].cos().mean()[None]  # noqa: E731
    found, by_hand = head_importance(model, batches, outputs=of), slopes(model, batches, of)
    for name in LAYERS:
        expected = by_hand[name][0].sum(0).square() / of(model, *batches[0]).square().sum()
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-9)


def test_a_layer_that_runs_twice_has_one_scale():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = build()

        def forward(self, x):
            return self.layer(x + self.layer(x)).sum((1, 2))

    model, x, step = Twice(), tokens(), 1e-6
    found = head_importance(model, [(x,)])["layer"]
    for i in range(s.h):
        both = []
        for sign in (1, -1):
            scale = torch.ones(s.h, **float64)
            scale[i] += sign * step
            with scaled_heads(model, {"layer": scale}):
                both.append(model(x))
        slope = (both[0] - both[1]) / (2 * step)
        assert found[i].item() == pytest.approx((slope.square().sum() / model(x).square().sum()).item(), rel=1e-5)


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_importance_makes_its_own_gradients_and_leaves_none(block):
    model, x = Two(), tokens()
    expected = head_importance(model, [(x,)])
    before = {name: vars(layer).copy() for name, layer in model.named_modules()}
    with block():
        found = head_importance(model, [(x,)])
    assert all(torch.equal(found[name], expected[name]) for name in LAYERS)
    assert all(p.grad is None for p in model.parameters()) and not found["first"].requires_grad
    assert all(vars(layer).keys() == before[name].keys() for name, layer in model.named_modules())


def test_frozen_models_have_importance_too():
    model, x = Two(), tokens()
    expected = head_importance(model, [(x,)])
    found = head_importance(model.requires_grad_(False), [(x,)])
    assert all(torch.equal(found[name], expected[name]) for name in LAYERS)


def test_a_loss_at_its_minimum_is_refused():
    model, x = Two(), tokens()
    exact = model(x)[-1].detach()
    distance = lambda model, x: (model(x)[-1] - exact).square().sum()  # noqa: E731
    with refused(ValueError, "exactly 0", "minimum", "without loss="):
        head_importance(model, [(x,)], loss=distance)
    assert min(e.min() for e in ablation_effects(model, [(x,)], loss=distance).values()) > 0


@pytest.mark.parametrize(
    "options",
    [
        dict(outputs=lambda model, x: model(x)[-1].detach()),
        dict(loss=lambda model, x: model(x)[-1].sum().item()),
        dict(outputs=torch.no_grad()(lambda model, x: model(x)[-1])),
        dict(outputs=lambda model, x: x + 0),
        dict(loss=lambda model, x: model.first.out_proj(x[..., :1].expand(-1, -1, s.h * s.dv)).sum()),
    ],
)
def test_no_gradient_is_refused(options):
    with refused(ValueError, "no gradient", "ablation_effects"):
        head_importance(Two(), [(tokens(),)], **options)


def test_a_layer_that_does_not_run_is_worth_nothing():
    class One(Two):
        def forward(self, x):
            return self.first(x)

    for measure in (head_importance, ablation_effects):
        found = measure(One(), [(tokens(),)])
        assert not found["rest.second"].any() and found["first"].all()


# The heads of least worth


def scores_at_random(keep=1):
    return {name: torch.rand(h, **float64) for name, h in (("a", 3), ("b", 2), ("c", 4))}


def best_by_search(scores, count, keep):
    "The least sum of all choices that leave enough in each layer."
    heads = [(name, i) for name, score in scores.items() for i in range(len(score))]
    ways = []
    for way in itertools.combinations(heads, count):
        if all(len(score) - sum(name == n for n, _ in way) >= min(keep, len(score)) for name, score in scores.items()):
            ways.append((sum(scores[name][i].item() for name, i in way), way))
    found = {}
    for name, i in min(ways)[1]:
        found[name] = (*found.get(name, ()), i)
    return found


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_least_heads_are_the_least_sum_of_all_choices(keep):
    most = sum(max(0, h - keep) for h in (3, 2, 4))
    for count in range(most + 1):
        scores = scores_at_random()
        assert least_heads(scores, count, keep) == best_by_search(scores, count, keep)
    with refused(ValueError, f"count {most + 1}", f"keep {keep}", f"0 to {most} can go"):
        least_heads(scores_at_random(), most + 1, keep)


@pytest.mark.parametrize("name", CHOICES)
def test_wrong_choices_are_seen(name):
    scores = {
        "a": torch.tensor([0.1, 0.2, 0.3]),
        "b": torch.tensor([1.0, 2.0]),
        "c": torch.tensor([4.0, 0.5, 3.0, 9.0]),
    }
    assert least_heads(scores, 3) == {"a": (0, 1), "c": (1,)}
    assert CHOICES[name].apply(scores, 3, 1) != least_heads(scores, 3)


def test_of_equals_the_first_and_heads_of_infinite_worth_last():
    equal = {"z": torch.zeros(3), "a": torch.zeros(3)}
    assert least_heads(equal, 3) == {"z": (0, 1), "a": (0,)}
    assert least_heads({"a": torch.tensor([math.inf, 1.0, -1.0])}, 2) == {"a": (1, 2)}
    assert least_heads({"a": torch.rand(3)}, 0) == {}


def test_least_heads_go_into_without_heads():
    model, batches = Two(), [(tokens(),)]
    effects = ablation_effects(model, batches)
    with without_heads(model, least_heads(effects, 1)):
        moved = (model(*batches[0])[-1]).detach()
    least = min(effect.min().item() for effect in effects.values())
    exact = model(*batches[0])[-1]
    assert ((moved - exact).square().sum() / exact.square().sum()).item() == pytest.approx(least, rel=1e-9)


# What is refused

ones, fine = torch.ones(s.h, **float64), dict(first=torch.ones(s.h, s.dv, **float64))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "scales, means, error, words",
    [
        ([ones], None, TypeError, ["scales", "dict", "list"]),
        ({"third": ones}, None, ValueError, ["third", "first", "rest.second"]),
        ({"first": ones[1:]}, None, ValueError, ["'first'", "(5,)", "h = 6"]),
        ({"first": ones[None]}, None, ValueError, ["'first'", "(1, 6)", "(b, 1, h)"]),
        ({"first": ones.long()}, None, TypeError, ["'first'", "int64"]),
        ({"first": [1.0] * s.h}, None, TypeError, ["'first'", "torch.Tensor"]),
        ({"first": ones, "rest.second": ones[:4]}, fine, ValueError, ["means", "'rest.second'", "'first'"]),
        ({"first": ones}, {"first": fine["first"].mT}, ValueError, ["'first'", "(9, 6)", "(6, 9)"]),
        ({"first": ones}, {"first": fine["first"][:, 1:]}, ValueError, ["'first'", "(6, 8)", "(6, 9)"]),
        ({"first": ones}, [1], TypeError, ["means", "dict", "list"]),
    ],
)
def test_scales_that_are_none(scales, means, error, words):
    model = Two()
    with refused(error, *words), scaled_heads(model, scales, means):
        raise AssertionError
    assert model.first.finish is None and model.rest["second"].finish is None


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("shape", [(3, 1), (1, 4), (s.n, s.b), (2, 1)])
def test_scales_of_other_batches(shape):
    layer = build()
    with refused(ValueError, str((*shape, s.h)), "(5, 5)", "(b, 1, h)"):
        with scaled_heads(layer, {"": torch.ones(*shape, s.h)}):
            layer(tokens(b=5))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("heads", [[6], [-1], [True], ["0"], [0.0]])
def test_heads_that_are_none(heads):
    with refused(ValueError, "'first'", "0 to 5"), without_heads(Two(), {"first": heads}):
        raise AssertionError


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("measure", [ablation_effects, head_importance, head_means])
@pytest.mark.parametrize(
    "model, batches, options, error, words",
    [
        (nn.Linear(3, 3), [(tokens(),)], {}, ValueError, ["Linear", "MultiHeadAttention"]),
        ("model", [(tokens(),)], {}, TypeError, ["nn.Module", "str"]),
        (None, [], {}, ValueError, ["batches", "none"]),
        (None, tokens(), {}, TypeError, ["batch 0", "Tensor"]),
        (None, [(tokens(),)], dict(outputs=len, loss=len), ValueError, ["outputs and loss"]),
        (None, [(tokens() * math.nan,)], dict(outputs=None), ValueError, ["batch 0", "not finite"]),
        (None, [(tokens(),)], dict(outputs=lambda model, x: 3.0), TypeError, ["output", "float"]),
        (None, [(tokens(),)], dict(loss=lambda model, x: model(x)[-1]), TypeError, ["one number", "(2, 5, 20)"]),
    ],
)
def test_what_cannot_be_measured(measure, model, batches, options, error, words):
    if measure is head_means and ("loss" in options or "not finite" in words):
        return  # it knows no loss, and its means are what they are
    with refused(error, *words):
        measure(Two() if model is None else model, batches, **options)


@pytest.mark.usefixtures("own_messages")
def test_dropout_and_counts_are_refused():
    with refused(ValueError, "dropout", "eval"):
        ablation_effects(Two(dropout=0.5), [(tokens(),)])
    with refused(ValueError, "dropout", "eval"):
        head_importance(Two(dropout=0.5), [(tokens(),)])
    with refused(ValueError, "probes", "0"):
        head_importance(Two(), [(tokens(),)], probes=0)
    with refused(ValueError, "no layer was run on a real token"):
        head_means(build(), [(tokens(),)], outputs=lambda m, x: m(x, key_mask=torch.zeros(s.b, s.n).bool()))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "scores, count, keep, error, words",
    [
        ([1.0], 1, 1, TypeError, ["scores", "dict"]),
        ({"a": [1.0, 2.0]}, 1, 1, TypeError, ["'a'", "torch.Tensor"]),
        ({"a": torch.arange(3)}, 1, 1, TypeError, ["'a'", "int64"]),
        ({"a": torch.tensor([1.0, math.nan])}, 1, 1, ValueError, ["'a'", "nan"]),
        ({"a": torch.rand(2, 2)}, 1, 1, ValueError, ["'a'", "each head"]),
        ({"a": torch.rand(2)}, 1.0, 1, TypeError, ["count", "1.0"]),
        ({"a": torch.rand(2)}, True, 1, TypeError, ["count", "True"]),
        ({"a": torch.rand(2)}, 1, None, TypeError, ["keep", "None"]),
        ({"a": torch.rand(2)}, -1, 1, ValueError, ["count -1", "0 to 1"]),
        ({"a": torch.rand(2)}, 1, -1, ValueError, ["keep -1"]),
        ({"a": torch.rand(2), "b": torch.rand(4)}, 5, 1, ValueError, ["count 5", "6 heads", "2 layers", "0 to 4"]),
    ],
)
def test_choices_that_cannot_be_made(scores, count, keep, error, words):
    with refused(error, *words):
        least_heads(scores, count, keep)
