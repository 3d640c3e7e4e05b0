"""The nine ways are one function of one set of weights, and a way that is not is noticed."""

import pickle

import pytest
import torch
from torch import nn

from mha_book import MultiHeadAttention
from mha_book.heads.single_head import plain_attention
from mha_book.lab import nine_ways
from mha_book.lab.nine_ways import NINE_WAYS
from support.mutants import WAYS

F = nn.functional
FUSED = ["SDPA, causal flag", "SDPA, mask", "nn.MultiheadAttention, no weights"]
TORCHS = ["nn.MultiheadAttention", "nn.MultiheadAttention, no weights"]


def plain_layer(bias=True, embed_dim=48, num_heads=6):
    layer = MultiHeadAttention(embed_dim, num_heads, bias=bias, dtype=torch.float64)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def results(call, layer, x, upstream, backward):
    "The output, and the gradients of the input and of every parameter."
    layer.zero_grad()
    leaf = x.clone().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        y = call(leaf)
    if not backward:
        return [y]
    y.backward(upstream)
    return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]


def disagreement(name, layer, n=5):
    "The largest distance of a way from the definition, relative where numbers are large."
    x, upstream = torch.randn(2, 2, n, layer.in_proj.in_features, dtype=torch.float64)
    definition = MultiHeadAttention(
        layer.in_proj.in_features,
        layer.layout.num_heads,
        attend=plain_attention,
        bias=layer.in_proj.bias is not None,
        dtype=torch.float64,
    )
    definition.in_proj, definition.out_proj = layer.in_proj, layer.out_proj
    backward = name != "FlexAttention"  # it has none on a CPU
    wanted = results(lambda x: definition(x, is_causal=True), layer, x, upstream, backward)
    got = results(NINE_WAYS[name](layer), layer, x, upstream, backward)
    assert len(got) == len(wanted)
    return max(((a - b).abs().max() / max(1, b.abs().max())).item() for a, b in zip(got, wanted))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads, n", [(6, 5), (1, 7), (4, 1)])
@pytest.mark.parametrize("name", NINE_WAYS)
def test_each_way_is_the_definition(name, heads, n, bias):
    assert disagreement(name, plain_layer(bias, num_heads=heads), n) < 1e-12


def test_one_step_moves_all():
    layer, x = plain_layer(), torch.randn(2, 5, 48, dtype=torch.float64)
    modules = [way(layer) for way in NINE_WAYS.values()]
    before = [p.clone() for p in layer.parameters()]
    optimiser = torch.optim.SGD(modules[0].parameters(), lr=1e-4)
    modules[0](x).square().sum().backward()
    optimiser.step()
    assert all(not torch.equal(p, old) for p, old in zip(layer.parameters(), before))
    with torch.no_grad():
        for module in modules:
            torch.testing.assert_close(module(x), layer(x, is_causal=True), atol=1e-12, rtol=0)


# A way that is wrong is noticed


@pytest.mark.parametrize("mutant", WAYS)
@pytest.mark.parametrize("name", NINE_WAYS)
def test_a_wrong_way_is_noticed(monkeypatch, name, mutant):
    layer = plain_layer()
    WAYS[mutant].apply(monkeypatch, nine_ways, name)
    assert disagreement(name, layer) > 1e-3


# What not all nine can express is refused


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", NINE_WAYS)
@pytest.mark.parametrize(
    "options, said",
    [
        (dict(num_kv_heads=3), "num_kv_heads 3, num_heads 6"),
        (dict(head_dim=5), "6 heads of 5 in a width of 48"),
        (dict(value_dim=5), "values of width 5"),
        (dict(out_dim=20), "out_dim 20 with embed_dim 48"),
        (dict(context_dim=9), "context_dim"),
        (dict(qk_norm=nn.RMSNorm), "qk_norm"),
        (dict(position=lambda q, k, *, offset: (q, k)), "position"),
        (dict(attend=plain_attention), "attend"),
        (dict(dropout=0.1), "dropout 0.1"),
    ],
)
def test_other_layers_are_refused(name, options, said):
    with pytest.raises(ValueError, match=f"{said}.*MultiHeadAttention\\(embed_dim, num_heads\\)"):
        NINE_WAYS[name](MultiHeadAttention(48, 6, **options))


@pytest.mark.parametrize("name", NINE_WAYS)
def test_layers_that_are_more_than_their_rows_are_refused(name):
    layer = plain_layer()
    layer.out_proj.register_forward_hook(lambda proj, args, y: 2 * y)
    with pytest.raises(TypeError, match="out_proj has forward hooks"):
        NINE_WAYS[name](layer)
    layer = plain_layer()
    layer.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="forward hooks.*MultiHeadAttention"):
        NINE_WAYS[name](layer)


@pytest.mark.usefixtures("own_messages")
def test_another_class_is_refused():
    with pytest.raises(TypeError, match="must be a MultiHeadAttention, got Linear"):
        NINE_WAYS["split"](nn.Linear(48, 48))


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", NINE_WAYS)
def test_each_way_is_one_graph(name):
    layer, x = plain_layer(), torch.randn(2, 5, 48, dtype=torch.float64)
    module = NINE_WAYS[name](layer)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = module(x)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NINE_WAYS)
def test_no_tokens_give_no_outputs(name):
    layer = plain_layer()
    with torch.no_grad():
        assert NINE_WAYS[name](layer)(torch.zeros(2, 0, 48, dtype=torch.float64)).shape == (2, 0, 48)


@pytest.mark.parametrize("name", NINE_WAYS)
def test_each_way_can_be_copied_after_a_call(name):
    x, module = torch.randn(2, 5, 48, dtype=torch.float64), NINE_WAYS[name](plain_layer())
    with torch.no_grad():
        wanted = module(x)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), wanted)


@pytest.mark.usefixtures("own_messages")
def test_gradients_on_a_cpu_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="no backward on a CPU.*no_grad"):
        NINE_WAYS["FlexAttention"](plain_layer())(torch.randn(2, 5, 48, dtype=torch.float64))
