"""Hard-concrete gates: by their definition in plain numbers, their chances and their price; open gates as the plain
layer, closed ones without influence; in training, in eval mode, in low precision, compiled; taken out of a layer and
of a model; what is refused."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from mha_book.heads.head_counts import separate_projections
from mha_book.heads.layer import MultiHeadAttention
from mha_book.instruments.testing import SIZES
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import OutputGate, SinkAttention
from mha_book.variants import head_gates
from mha_book.variants.head_gates import HeadGates, add_gates, open_price, prune_gated
from mha_book.variants.mixed_precision import fill_socket
from support.mutants_gates import FOLDS, GATES
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
MIXED = (-3.0, -1.0, 0.5, 40.0, -9.0, 2.0)  # closed, between, and open


def build(**options):
    layer = MultiHeadAttention(s.e, s.h, **(dict(head_dim=s.d, value_dim=s.d - 2) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.eval()


def tokens(n=s.n, **options):
    return torch.randn(s.b, n, s.e, **(float64 | options))


def gated(log_alpha=MIXED, make=HeadGates, **options):
    "A layer with gates, behind which its own plug stands."
    layer = build(**options)
    gates = make(s.h, finish=layer.finish, **float64)
    gates.log_alpha.data = torch.tensor(log_alpha, **float64)
    fill_socket(layer, "finish", gates.eval())
    return layer


def by_hand(u, log_alpha):
    "One gate, from its definition."
    concrete = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, concrete * 1.2 - 0.1))


def scaled(layer, x, gates, plug=None):
    "The layer's definition with gates, a number for each sequence and head: b 1 h."
    q, k, v = layer.qkv(x)
    heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    heads = (heads * gates.mT[..., None]).transpose(1, 2).flatten(2)
    return layer.out_proj(heads if plug is None else plug(heads, x))


# --- the definition: each holds for `HeadGates`, and one at least fails for every mutant ----------------------------


def drawn_as_defined(make):
    gates = make(s.h, **float64)
    gates.log_alpha.data = torch.tensor(MIXED, **float64)
    torch.manual_seed(3)
    found = gates.draw(s.b)
    torch.manual_seed(3)
    u = torch.rand(s.b, 1, s.h, **float64)
    wanted = [[[by_hand(*pair) for pair in zip(row[0].tolist(), MIXED)]] for row in u]
    close(found, torch.tensor(wanted, **float64))


def chances_as_counted(make):
    gates = make(4, **float64)
    for alphas in ((-4.0, -2.4, -1.0, 0.0), (0.3, 1.0, 2.0, 3.0)):
        gates.log_alpha.data = torch.tensor(alphas, **float64)
        rows = gates.draw(100_000)[:, 0]
        open_, full = (rows > 0).double().mean(0), (rows == 1).double().mean(0)
        wanted = [1 / (1 + math.exp(-(a + 2 / 3 * math.log(11)))) for a in alphas]
        assert gates.expected_open().item() == pytest.approx(sum(wanted), abs=1e-12)
        close(open_, torch.tensor(wanted, **float64), atol=0.008, rtol=0)  # five deviations
        opposite = [1 / (1 + math.exp(a - 2 / 3 * math.log(11))) for a in alphas]
        close(full, 1 - torch.tensor(opposite, **float64), atol=0.008, rtol=0)


def once_for_each_sequence(make):
    layer, x = gated((0.0,) * s.h, make), tokens()
    layer.train()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    drawn = layer.finish.draw(s.b)
    close(y, scaled(layer, x, drawn))
    assert not torch.equal(drawn[0], drawn[1])


def without_chance_in_eval_mode(make):
    layer, x = gated(MIXED, make), tokens()
    wanted = torch.tensor([by_hand(0.5, a * 2 / 3) for a in MIXED], **float64)
    close(layer.finish.gates(), wanted)
    close(layer(x), scaled(layer, x, wanted.expand(s.b, 1, -1)))
    assert layer.finish.closed() == [0, 4]


def before_the_other_plug(make):
    plug = nn.RMSNorm(s.h * (s.d - 2), **float64)
    layer, x = gated(MIXED, make, finish=lambda heads, x: plug(heads)), tokens()
    gates = torch.tensor([by_hand(0.5, a * 2 / 3) for a in MIXED], **float64)
    close(layer(x), scaled(layer, x, gates.expand(s.b, 1, -1), lambda heads, x: plug(heads)))


def in_float32_at_least(make):
    gates = make(s.h, start=-2.3125, dtype=torch.bfloat16)
    exact = by_hand(0.5, -2.3125 * 2 / 3)
    assert gates.gates().dtype == gates.draw(s.b).dtype == gates.expected_open().dtype == torch.float32
    assert gates.gates()[0].item() == pytest.approx(exact, rel=1e-4)
    y = gates.eval()(torch.ones(s.b, s.n, 36, dtype=torch.bfloat16), torch.zeros(s.b, s.n, s.e))
    assert y.dtype == torch.bfloat16 and y[0, 0, 0].item() == pytest.approx(exact, rel=2**-8)


PROPERTIES = (
    drawn_as_defined,
    chances_as_counted,
    once_for_each_sequence,
    without_chance_in_eval_mode,
    before_the_other_plug,
    in_float32_at_least,
)


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
def test_gates_are_what_they_are_defined_to_be(holds):
    holds(HeadGates)


@pytest.mark.parametrize("mutant", GATES.values(), ids=GATES)
def test_wrong_gates_are_noticed(mutant):
    def fails(holds):
        try:
            holds(mutant.apply)
        except AssertionError:
            return True
        return False

    assert any(map(fails, PROPERTIES)), mutant.says


# --- open, closed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(num_kv_heads=s.g, dropout=0.3), dict(finish=OutputGate)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_open_gates_are_the_plain_layer_to_the_bit(options, dtype):
    if "finish" in options:
        options = dict(finish=OutputGate(s.e, s.h, head_dim=s.d - 2, dtype=dtype))
    layer, x = build(dtype=dtype, **options), tokens(dtype=dtype)
    with_gates = copy.deepcopy(layer)
    add_gates(with_gates, start=40.0)
    for mode in (True, False):
        answers = []
        for one in (layer.train(mode), with_gates.train(mode)):
            one.zero_grad()
            torch.manual_seed(7)
            one(x).square().sum().backward()
            torch.manual_seed(7)
            answers.append([one(x), *(p.grad for name, p in one.named_parameters() if "in_proj" in name)])
        assert all(map(torch.equal, *answers))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
def test_a_closed_head_has_no_influence_and_no_gradient(mode):
    layer, x = gated((40.0, -40.0, 40.0, 0.0, 40.0, -40.0)).train(mode), tokens()
    torch.manual_seed(0)
    before = layer(x)
    before.square().sum().backward()
    for head in (1, 5):
        for part in "qkvo":
            proj, rows = layer.rows(part, head)
            grad = proj.weight.grad[:, rows] if part == "o" else proj.weight.grad[rows]
            assert not grad.any(), (part, head)
            with torch.no_grad():
                (proj.weight[:, rows] if part == "o" else proj.weight[rows]).normal_()
    assert [bool(g) for g in layer.finish.log_alpha.grad != 0] == [False, False, False, True, False, False]
    torch.manual_seed(0)
    assert torch.equal(layer(x), before)


def test_the_price_is_differentiable_everywhere():
    gates = HeadGates(3, **float64)
    gates.log_alpha.data = torch.tensor([-9.0, 0.3, 9.0], **float64)
    (grad,) = torch.autograd.grad(gates.expected_open(), gates.log_alpha)
    chance = torch.sigmoid(gates.log_alpha.detach() + 2 / 3 * math.log(11))
    close(grad, chance * (1 - chance))
    assert (grad > 0).all()


# --- within torch ---------------------------------------------------------------------------------------------------


def test_gates_are_trained_saved_and_loaded_with_the_layer():
    layer, x = gated(), tokens()
    assert "finish.log_alpha" in dict(layer.named_parameters())
    other = build()
    add_gates(other)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with refused(RuntimeError, "log_alpha"):
        HeadGates(s.h + 1).load_state_dict(HeadGates(s.h).state_dict())


@pytest.mark.usefixtures("own_messages")
def test_compiled_once_for_all_batches():
    layer = gated((40.0, 40.0, -40.0, 40.0, -40.0, 40.0))
    run, x = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager"), tokens()
    for mode in (True, False):
        layer.train(mode)
        for rows in (x, x[:1], torch.cat([x, x])):
            assert torch.equal(run(rows), layer(rows))


def test_under_vmap_and_autocast():
    layer, x = gated(), tokens()
    each = torch.func.vmap(layer)(x[:, None])
    close(each[:, 0], layer(x))
    rows = torch.func.vmap(layer.train(), randomness="different")(x[:, None])
    assert rows.shape == (s.b, 1, s.n, s.e)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.float()(x.float())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.finish.log_alpha.grad.dtype == torch.float32


def test_with_a_cache_gates_of_eval_mode_are_those_of_the_whole():
    layer, x = gated(), tokens()
    cache = KVCache(s.b, s.h, s.n, s.d, value_dim=s.d - 2, **float64)
    steps = [layer(x[:, at : at + 1], is_causal=True, cache=cache) for at in range(s.n)]
    close(torch.cat(steps, 1), layer(x, is_causal=True))


# --- out of a layer, and of a model ---------------------------------------------------------------------------------


LAYERS = {
    "plain": {},
    "grouped": dict(num_kv_heads=2, log_alpha=(-9.0, -9.0, -9.0, 0.5, 40.0, -1.0)),
    "none closed": dict(log_alpha=(0.0, -1.0, 0.5, 40.0, 1.0, 2.0)),
    "no biases, out_dim": dict(bias=False, out_dim=40),
    "sinks are folded as well": dict(num_kv_heads=1, attend="sinks", log_alpha=(0.0, -1.0, 0.5, 40.0, 1.0, 2.0)),
    "a plug that counts nothing": dict(finish=lambda heads, x: heads * x.mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_pruned_layer_is_the_gated_one(name):
    options = dict(LAYERS[name])
    if options.get("attend") == "sinks":
        options["attend"] = SinkAttention(s.h, **float64)
    layer, x = gated(**options), tokens()
    before = copy.deepcopy(layer.state_dict())
    new = prune_gated(layer)
    close(new(x), layer(x))
    assert new.layout.num_heads == s.h - len(layer.finish.closed())
    assert new.finish is layer.finish.finish
    assert not any(isinstance(part, HeadGates) for part in new.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values()))


@pytest.mark.parametrize("mutant", FOLDS.values(), ids=FOLDS)
def test_wrong_folds_are_noticed(mutant):
    layer, x = gated(), tokens()
    assert (mutant.apply(layer)(x) - layer(x)).abs().max() > 1e-3, mutant.says


def test_projections_that_stand_apart_stay_apart():
    layer, x = gated(), tokens()
    new = prune_gated(separate_projections(layer))
    close(new(x), layer(x))
    assert "in_proj.q_proj.weight" in dict(new.named_parameters())


def test_gates_in_bfloat16_are_folded_with_one_rounding():
    layer, x = gated().bfloat16(), tokens(dtype=torch.bfloat16)
    new = prune_gated(layer)
    wide = copy.deepcopy(layer).double()
    exact, far = wide(x.double()), []
    for one in (layer, new):
        far.append((one(x).double() - exact).abs().max())
    assert far[1] <= 2 * far[0]


class Two(nn.Module):
    "Two layers; the first stands in two places, and something else has a layer's name."

    def __init__(self, **options):
        super().__init__()
        self.first, self.rest = build(**options), nn.ModuleDict({"second": build(**options)})
        self.again, self.finish = self.first, nn.Linear(s.e, 3, **float64)

    def forward(self, x):
        x = x + self.first(x)
        return self.finish(self.again(x + self.rest["second"](x)))


def test_a_model_gets_gates_in_place_and_gives_them_back():
    model, x = Two(), tokens()
    y = model(x)
    gates = add_gates(model, start=40.0)
    assert [*gates] == ["first", "rest.second"] and gates["first"] is model.again.finish
    assert not any(part.training for part in gates.values())
    assert torch.equal(model(x), y)
    assert open_price(model).item() == pytest.approx(2 * s.h)
    gates["first"].log_alpha.data = torch.tensor(MIXED, **float64)
    gates["rest.second"].log_alpha.data[1:] = -40.0
    pruned = prune_gated(model)
    close(pruned(x), model(x))
    assert pruned.again is pruned.first and pruned.first.layout.num_heads == 4
    assert pruned.rest["second"].layout.num_heads == 1
    assert model.first.layout.num_heads == s.h and isinstance(model.first.finish, HeadGates)


def test_the_price_is_the_sum_over_layers():
    model = Two()
    gates = add_gates(model, start=-0.5)
    price = open_price(model)
    close(price, sum(part.expected_open() for part in gates.values()))
    price.backward()
    assert all((part.log_alpha.grad > 0).all() for part in gates.values())


def test_a_bfloat16_layer_gets_gates_of_float32():
    (gates,) = add_gates(build(dtype=torch.bfloat16)).values()
    assert gates.log_alpha.dtype == torch.float32
    (gates,) = add_gates(build()).values()
    assert gates.log_alpha.dtype == torch.float64


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_messages")
def test_bad_gates_are_refused():
    for count in (0, -1):
        with refused(ValueError, "num_heads", str(count)):
            HeadGates(count)
    for count in (2.0, True, "6"):
        with refused(TypeError, "num_heads"):
            HeadGates(count)
    with refused(ValueError, "start", "finite"):
        HeadGates(3, start=math.nan)
    with refused(TypeError, "start"):
        HeadGates(3, start="open")
    with refused(TypeError, "finish", "3"):
        HeadGates(3, finish=3)
    for dtype in (torch.int64, "float32", torch.complex64):
        with refused(TypeError, "dtype"):
            HeadGates(3, dtype=dtype)
    with refused(ValueError, "batch_size"):
        HeadGates(3).draw(0)
    with refused(TypeError, "batch_size"):
        HeadGates(3).draw(2.0)
    layer = build()
    fill_socket(layer, "finish", HeadGates(7, **float64))
    with refused(ValueError, "7 gates", "36", "num_heads"):
        layer(tokens())


@pytest.mark.usefixtures("own_messages")
def test_what_cannot_be_gated_is_refused_and_left_as_it_is():
    with refused(ValueError, "Linear", "MultiHeadAttention"):
        add_gates(nn.Linear(2, 2))
    model = Two()
    add_gates(model.rest)
    with refused(ValueError, "rest.second", "already"):
        add_gates(model)
    assert model.first.finish is None
    with refused(TypeError, "start"):
        add_gates(model.first, start=None)
    with refused(ValueError, "no gates", "add_gates"):
        open_price(model.first)


@pytest.mark.usefixtures("own_messages")
def test_what_cannot_be_pruned_is_refused():
    with refused(ValueError, "no gates", "NoneType"):
        prune_gated(build())
    with refused(ValueError, "Linear", "gates"):
        prune_gated(nn.Linear(2, 2))
    with refused(ValueError, "all 6 gates", "at least one head", "log_alpha"):
        prune_gated(gated((-40.0,) * s.h))
    layer = gated()
    fill_socket(layer, "finish", HeadGates(s.h // 2, **float64))
    with refused(ValueError, "6 heads", "3 gates"):
        prune_gated(layer)
    with refused(ValueError, "groups"):
        prune_gated(gated((-9.0, -9.0, 0.0, 0.0, -9.0, 0.0), num_kv_heads=2))
    with refused(ValueError, "meta", "load"):
        prune_gated(copy.deepcopy(gated()).to("meta"))
    model = Two()
    add_gates(model, start=-40.0)
    with refused(ValueError, "'first'", "all 6 gates"):
        prune_gated(model)


@pytest.mark.usefixtures("own_messages")
def test_plugs_behind_the_gates_that_count_heads_or_mix_them_are_refused():
    with refused(ValueError, "OutputGate", "take it off"):
        prune_gated(gated(finish=OutputGate(s.e, s.h, head_dim=s.d - 2, **float64)))

    def norm(heads, x):
        return heads / heads.square().mean(-1, keepdim=True).sqrt()

    with refused(ValueError, "norm", "something else"):  # also where no gate is closed
        prune_gated(gated((0.0, 1.0, -1.0, 2.0, 0.5, 0.3), finish=norm))


@pytest.mark.usefixtures("own_messages")
def test_weights_that_others_use_are_not_parted():
    model = Two()
    model.rest["second"].out_proj.weight = model.first.out_proj.weight
    add_gates(model)
    with refused(ValueError, "out_proj.weight", "untie"):
        prune_gated(model)


def test_every_public_name_of_the_module_is_tested_here():
    assert {*head_gates.__all__} == {"HeadGates", "add_gates", "open_price", "prune_gated"}
