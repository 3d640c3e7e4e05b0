"""A pruned layer is the masked layer, and smaller; models of layers with different heads are saved, loaded, cached."""

import copy
import io
import itertools
import pickle
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mha_book.heads.head_counts import separate_projections
from mha_book.heads.layer import MultiHeadAttention
from mha_book.heads.single_head import fused_attend, plain_attention
from mha_book.heads.weight_split import HeadLayout, SeparateProjections
from mha_book.instruments.cache_size import cache_bytes
from mha_book.instruments.roofline import layer_work
from mha_book.instruments.testing import SIZES as s
from mha_book.instruments.testing import assert_as_exact
from mha_book.kernels.backends import attention
from mha_book.models.encoder import Encoder, EncoderConfig
from mha_book.models.language_model import LanguageModel, LanguageModelConfig, generate
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import HeadTemperature, OutputGate, SinkAttention
from mha_book.plugs.paged import BlockPool, PagedCache
from mha_book.plugs.positions import ALiBi, RelativeBias
from mha_book.plugs.quantize import HeadPrecision
from mha_book.plugs.quantized_cache import QuantizedKVCache
from mha_book.plugs.rope import RoPE
from mha_book.variants.grouped import folded_attend, repeat_kv_heads
from mha_book.variants.mixed_precision import MixedPrecision
from mha_book.variants.prune_heads import match_heads, prune_heads, prune_model
from support.mutants_pruning import PRUNINGS
from support.refusals import refused

pytestmark = pytest.mark.usefixtures("own_messages")
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
WIDE = s.h * s.d
OTHER = 11


def build(**options):
    "A grouped layer in float64 in which no number is 0 or 1."
    layer = MultiHeadAttention(s.e, s.h, **(dict(num_kv_heads=s.g, head_dim=s.d) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4)
    return layer.eval()


def tokens(n=s.n, width=s.e, **options):
    return torch.randn(s.b, n, width, **(float64 | options))


def masked(layer, gone, x, context=None, *, means=None, is_causal=False):
    "The layer's output with these heads at 0, or at their mean: head by head, from the definition."
    q, k, v = layer.qkv(x, context)
    group, heads = layer.layout.num_heads // layer.layout.num_kv_heads, []
    hidden = torch.ones(q.shape[2], k.shape[2]).triu(1).bool() & torch.tensor(is_causal)
    for i in range(layer.layout.num_heads):
        logits = q[:, i] @ k[:, i // group].mT / layer.layout.head_dim**0.5
        own = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, i // group]
        if i in gone:
            own = own * 0 if means is None else means[i].expand(own.shape)
        heads.append(own)
    return layer.out_proj(torch.cat(heads, -1))


def own_rows(layout, part, heads):
    "Rows of these heads, counted from the top of their part."
    width = layout.width(part)
    return torch.cat([torch.arange(i * width, (i + 1) * width) for i in heads])


def kept_of(layer, gone):
    "Query heads and key-value heads that stay."
    h, g, _ = layer.layout
    kept = [i for i in range(h) if i not in gone]
    return kept, sorted({i // (h // g) for i in kept})


def assert_is_masked(prune, layer, gone, *args, **options):
    """Outputs, and gradients of tokens and of every number that stays, as with masked heads; all that is masked
    has no gradient; and the layer is smaller.
    """
    new = prune(layer, gone)
    layout, (kept, kv) = layer.layout, kept_of(layer, gone)
    assert [*new.layout] == [len(kept), len(kv), layout.head_dim] and new.layout.value_dim == layout.value_dim
    assert (
        sum(p.numel() for p in new.parameters())
        == sum(p.numel() for p in layer.parameters())
        - sum(
            (len(p.weight[0]) + (p.bias is not None)) * (layout.count(part) - len(own)) * layout.width(part)
            for part, own in zip("qkv", (kept, kv, kv))
            for p, _ in [layer.rows(part, 0)]
        )
        - len(layer.out_proj.weight) * (layout.num_heads - len(kept)) * layout.value_dim
    )
    args = [x.requires_grad_() for x in args]
    y, wanted = new(*args, **options), masked(layer, gone, *args, **options)
    close(y, wanted)
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, [*args, *new.parameters()], direction)
    exact = torch.autograd.grad(wanted, [*args, *layer.parameters()], direction)
    for one, other in zip(found[: len(args)], exact):
        close(one, other)
    ours, theirs = (
        dict(zip([name for name, _ in of.named_parameters()], grads[len(args) :]))
        for of, grads in ((new, found), (layer, exact))
    )
    for part, own in zip("qkvo", (kept, kv, kv, kept)):
        name, _ = layer.place(part, 0)
        for kind in ["weight"] + ["bias"] * (f"{name}.bias" in theirs and part != "o"):
            whole, small = theirs[f"{name}.{kind}"], ours[f"{name}.{kind}"]
            whole, small = (whole.T, small.T) if part == "o" else (whole, small)
            begin, first = (of.place(part, 0)[1].start for of in (layer, new))
            rows = own_rows(layout, part, own)
            close(small[first : first + len(rows)], whole[begin + rows])
            gone_too = [i for i in range(layout.count(part)) if i not in own]
            assert not any(whole[begin + own_rows(layout, part, [i])].any() for i in gone_too)
    for name in ours.keys() - {f"{layer.place(part, 0)[0]}.{kind}" for part in "qkvo" for kind in ("weight", "bias")}:
        close(ours[name], theirs[name])  # norms
    assert "out_proj.bias" not in ours or torch.equal(ours["out_proj.bias"], theirs["out_proj.bias"])


EQUAL, SHARED = dict(num_kv_heads=s.h), dict(num_kv_heads=1)
LAYERS = {
    "groups": {},
    "heads of their own keys": EQUAL,
    "one key head": SHARED,
    "wide values": dict(value_dim=s.dv),
    "another width out": dict(out_dim=OTHER),
    "no biases": dict(bias=False),
    "RoPE": dict(position=RoPE(s.d)),
    "norms": dict(qk_norm=nn.RMSNorm),
    "all of it": EQUAL | dict(value_dim=s.dv, out_dim=OTHER, position=RoPE(s.d), qk_norm=nn.LayerNorm),
    "a context": dict(context_dim=OTHER),
    "a context of heads, wide values": EQUAL | dict(context_dim=OTHER, value_dim=s.dv, bias=False),
}
GONE = {
    "one of each": [0, 3, 5],
    "a group": [2, 3],
    "two groups": [0, 1, 4, 5],
    "one of each that stays": [1, 2, 3, 4],
    "all but the last": [4, 3, 2, 1, 0],
    "none": [],
}


def inputs(options, **more):
    return [tokens(**more)] + ([tokens(s.m, OTHER, **more)] if "context_dim" in options else [])


@pytest.mark.parametrize("gone", GONE.values(), ids=GONE)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_pruning_is_masking(options, gone):
    assert_is_masked(prune_heads, build(**options), gone, *inputs(options))
    if "context_dim" not in options:
        assert_is_masked(prune_heads, build(**options), gone, *inputs(options), is_causal=True)


@pytest.mark.parametrize("mutant", PRUNINGS.values(), ids=PRUNINGS)
def test_each_wrong_pruning_is_noticed(mutant):
    noticed = 0
    for options, gone in itertools.product((LAYERS["groups"], LAYERS["a context"]), ([0, 1], [0, 3, 5])):
        try:
            assert_is_masked(mutant.apply, build(**options), gone, *inputs(options))
        except AssertionError:
            noticed += 1
    assert noticed >= 2, mutant.says


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_parts_that_stand_apart_are_pruned_and_stand_apart(options):
    layer, args = build(**options), inputs(options)
    apart = separate_projections(layer)
    new = prune_heads(apart, [0, 3, 5])
    assert type(new.in_proj) is SeparateProjections and type(layer.in_proj) is nn.Linear
    close(new(*args), masked(layer, [0, 3, 5], *args))
    close(apart(*args), layer(*args))  # and that is as it was


def test_pruning_twice_is_pruning_once():
    layer, x = build(**EQUAL), tokens()
    once, twice = prune_heads(layer, [0, 2, 5]), prune_heads(prune_heads(layer, [2]), [0, 4])
    for name, p in once.state_dict().items():
        assert torch.equal(p, twice.state_dict()[name])
    assert torch.equal(once(x), twice(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_to_the_rule(dtype):
    layer = build(**EQUAL).to(dtype)
    x = tokens().to(dtype)
    exact = masked(copy.deepcopy(layer).double(), [1, 4], x.double())
    assert_as_exact(prune_heads(layer, [1, 4])(x), exact, masked(layer, [1, 4], x))


# Means


@pytest.mark.parametrize("options", [o for o in LAYERS.values() if o.get("bias", True)])
@pytest.mark.parametrize("gone", [[0, 3, 5], [2, 3], []])
def test_means_stay_in_the_bias(options, gone):
    layer, args = build(**options), inputs(options)
    means = torch.randn(s.h, layer.layout.value_dim, **float64)
    new = prune_heads(layer, gone, means=means)
    close(new(*args), masked(layer, gone, *args, means=means))
    assert gone == [] or not torch.allclose(new(*args), masked(layer, gone, *args))
    for name, p in prune_heads(layer, gone).named_parameters():
        assert name == "out_proj.bias" or torch.equal(p, new.get_parameter(name))


def test_means_in_float32_go_into_a_bfloat16_bias_in_float32():
    layer, means = build(**EQUAL).bfloat16(), torch.randn(s.h, s.d)
    new = prune_heads(layer, [0, 1, 2, 3], means=means)
    exact = layer.out_proj.bias.double() + layer.out_proj.weight[:, : 4 * s.d].double() @ means[:4].double().flatten()
    assert torch.equal(new.out_proj.bias, exact.bfloat16()) and new.out_proj.bias.requires_grad


def test_means_that_have_nowhere_to_go_are_refused():
    means = torch.randn(s.h, s.d, **float64)
    with refused(ValueError, "no bias", "nn.Parameter(torch.zeros("):
        prune_heads(build(bias=False), [0, 1], means=means)
    with refused(ValueError, "finish", "without means"):
        prune_heads(build(finish=lambda heads, x: heads / 2), [0, 1], means=means)
    with refused(ValueError, f"({s.h}, {s.dv})", f"({s.h}, {s.d})"):
        prune_heads(build(value_dim=s.dv), [0, 1], means=means)
    with refused(TypeError, "means", "list"):
        prune_heads(build(), [0, 1], means=means.tolist())
    with refused(TypeError, "means", "int64"):
        prune_heads(build(), [0, 1], means=means.long())
    with refused(ValueError, "device differs", "meta", "cpu"):
        prune_heads(build(), [0, 1], means=means.to("meta"))


# What is refused


def test_only_a_list_of_heads_names_heads():
    layer = build(**EQUAL)
    for wrong in ("01", 3, None, torch.tensor([0])):
        with refused(TypeError, "list of ints", type(wrong).__name__):
            prune_heads(layer, wrong)
    for wrong in ([True], [1.0], ["0"], [None]):
        with refused(TypeError, "heads must be ints", repr(wrong[0])):
            prune_heads(layer, wrong)
    for head in (-1, s.h):
        with refused(IndexError, f"{s.h} heads, 0 to {s.h - 1}", str(head)):
            prune_heads(layer, [head])
    with refused(ValueError, "[2, 4]", "twice"):
        prune_heads(layer, [2, 4, 4, 2, 0])
    with refused(ValueError, f"all {s.h} heads", "at least one stays"):
        prune_heads(layer, range(s.h))
    for fine in ({3, 1}, (3, 1), iter([1, 3]), (i for i in (1, 3)), range(1, 4, 2), {1: "a", 3: "b"}):
        assert prune_heads(layer, fine).layout.num_heads == s.h - 2
    with refused(TypeError, "MultiHeadAttention", "from_torch"):
        prune_heads(nn.MultiheadAttention(WIDE, s.h), [0])


@pytest.mark.parametrize("g", [1, 2, 3, 4, 6, 12])
def test_groups_of_one_size_are_pruned_and_others_refused_with_the_fewest_that_help(g):
    layer, draw = MultiHeadAttention(12, 12, num_kv_heads=g, head_dim=1, **float64), random.Random(g)
    for _ in range(40):
        gone = draw.sample(range(12), draw.randrange(12))
        left = [sum(i not in gone for i in range(j * 12 // g, (j + 1) * 12 // g)) for j in range(g)]
        if len({*left} - {0}) == 1:
            assert [*prune_heads(layer, gone).layout] == [12 - len(gone), sum(map(bool, left)), 1]
            continue
        with pytest.raises(ValueError) as caught:
            prune_heads(layer, gone)
        said = str(caught.value)
        assert str(left) in said and "repeat_kv_heads(layer, 12)" in said
        more = eval(said.split("heads [")[-1].split("]")[0].join("[]"))
        assert prune_heads(layer, gone + more).layout.num_heads == 12 - len(gone) - len(more)
        for few in itertools.combinations(set(range(12)) - set(gone), len(more) - 1):
            counts = [n - sum(i * g // 12 == j for i in few) for j, n in enumerate(left)]
            assert len({*counts} - {0}) != 1
        assert prune_heads(repeat_kv_heads(layer, 12), gone).layout.num_heads == 12 - len(gone)


def by_slopes(q, k, v, **options):
    "A plug that makes its slopes from however many heads it is given: of fewer heads, others."
    slope = 2.0 ** -(torch.arange(1, q.shape[1] + 1) / q.shape[1])
    return fused_attend(q * slope[:, None, None].to(q), k, v, **options)


def across_heads(heads, x):
    "A finish that looks at all heads together."
    return heads / heads.square().mean(-1, keepdim=True).sqrt()


COUNT_HEADS = {
    "HeadTemperature": lambda: dict(attend=HeadTemperature(s.h, **float64)),
    "SinkAttention": lambda: dict(attend=SinkAttention(s.h, **float64)),
    "RelativeBias": lambda: dict(attend=RelativeBias(s.h, **float64)),
    "ALiBi": lambda: dict(attend=ALiBi(s.h)),
    "MixedPrecision": lambda: dict(attend=MixedPrecision(HeadPrecision.uniform(s.g, "int8"))),
    "partial(attention, ...)": lambda: dict(attend=partial(attention, sinks=torch.randn(s.h, **float64))),
    "by_slopes": lambda: dict(attend=by_slopes),
    "OutputGate": lambda: dict(finish=OutputGate(s.e, s.h, head_dim=s.d, **float64)),
    "across_heads": lambda: dict(finish=across_heads),
}
COUNT_NOTHING = {
    "window": lambda: dict(attend=partial(attention, window=3)),
    "folded": lambda: dict(attend=folded_attend),
    "halved": lambda: dict(finish=lambda heads, x: heads / 2),
    "dropout": lambda: dict(dropout=0.3),
    "linear positions": lambda: dict(position=lambda q, k, offset: (2 * q, k)),
}


@pytest.mark.parametrize("name", COUNT_HEADS)
def test_what_counts_heads_is_refused_by_name_before_anything_is_made(name):
    layer, x = build(**COUNT_HEADS[name]()), tokens()
    before, state = layer(x), torch.random.get_rng_state()
    with refused(ValueError, name, "take it off"):
        prune_heads(layer, [0, 1])
    assert torch.equal(layer(x), before) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", COUNT_NOTHING)
def test_what_does_not_count_heads_computes_the_same(name):
    layer, x = build(**COUNT_NOTHING[name]()), tokens()
    zeros = copy.deepcopy(layer)
    nn.init.zeros_(zeros.out_proj.weight.data[:, : 2 * s.d])
    close(prune_heads(layer, [0, 1])(x), zeros(x))


def test_what_counts_key_heads_stays_where_they_all_stay():
    "Formats are those of key-value heads, and none of these goes."
    layer, x = build(attend=MixedPrecision(HeadPrecision(("int8", "int4", "int8"), ("int4",) * 3, group=2))), tokens()
    zeros = copy.deepcopy(layer)
    zeros.out_proj.weight.data.unflatten(1, (s.h, s.d))[:, [0, 3, 5]] = 0
    close(prune_heads(layer, [0, 3, 5])(x), zeros(x))


def wrapped(layer):
    layer.in_proj = nn.Sequential(layer.in_proj)


def doubled(layer):
    layer.out_proj.register_forward_hook(lambda proj, args, y: 2 * y)


def normed(layer):
    nn.utils.parametrizations.weight_norm(layer.out_proj)


def its_own_forward(layer):
    old = layer.forward
    layer.forward = lambda *args, **options: 2 * old(*args, **options)


@pytest.mark.parametrize(
    "change, word", [(wrapped, "in_proj"), (doubled, "out_proj"), (normed, "out_proj"), (its_own_forward, "forward")]
)
def test_projections_that_are_no_plain_matrices_are_refused(change, word):
    layer = build()
    change(layer)
    with refused(TypeError, word):
        prune_heads(layer, [0, 1])
    with refused(TypeError, word):
        prune_heads(layer, [0, 1], means=torch.zeros(s.h, s.d, **float64))


def test_what_goes_with_a_layer_stays():
    layer = build().train()
    layer.in_proj.weight.requires_grad_(False)
    new = prune_heads(layer, [0, 1])
    assert new.training and not new.in_proj.weight.requires_grad and new.in_proj.bias.requires_grad
    assert new.out_proj.weight.is_contiguous() and new.in_proj.weight.dtype == torch.float64
    theirs = {p.data_ptr() for p in layer.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in new.parameters())  # nothing is shared
    with torch.device("meta"):
        small = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, position=RoPE(s.d))
        new = prune_heads(small, [0, 1], means=torch.zeros(s.h, s.d))
    assert new.in_proj.weight.is_meta and new.layout.num_heads == s.h - 2
    new = new.to_empty(device="cpu")
    for module in new.modules():  # as torch makes what was on meta
        getattr(module, "reset_parameters", lambda: None)()
    assert new.in_proj.weight.isfinite().all() and new.in_proj.weight.any()


def test_a_pruned_layer_is_compiled_exported_copied_and_pickled():
    layer, x = prune_heads(build(**EQUAL, position=RoPE(s.d)), [1, 2, 5]), tokens()
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: torch.export.Dim("n")}}).module()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for other in (exported, compiled, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(other(x), layer(x))
        assert (other(x) - layer(x)).abs().max() < 1e-12
    close(exported(tokens(s.m)).shape, layer(tokens(s.m)).shape)


# What it costs


@pytest.mark.parametrize("dv", [s.d, s.dv])
@pytest.mark.parametrize("g, gone", [(s.g, [0, 3, 5]), (s.g, [2, 3]), (s.h, [1]), (1, [0, 1, 2, 3, 4])])
def test_the_flops_that_torch_counts_are_those_of_the_layout(g, gone, dv):
    layer = build(num_kv_heads=g, value_dim=dv, attend=plain_attention)
    counts = []
    for of in (layer, prune_heads(layer, gone)):
        with FlopCounterMode(display=False) as counter:
            of(tokens())
        work = layer_work(of.layout, s.e, batch=s.b, n=s.n, itemsize=8, fused=False)
        assert counter.get_total_flops() == sum(step.flops for step in work.values())
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0]
    if g == s.h:  # nothing is shared, so a head's part is exactly its share
        assert counts[1] * s.h == counts[0] * (s.h - len(gone))


# Models


ENCODER = EncoderConfig(
    vocab_size=23, embed_dim=WIDE, num_layers=3, num_heads=s.h, hidden_dim=14, max_len=16, num_segments=2, eps=1e-12
)
LANGUAGE = LanguageModelConfig(
    vocab_size=23,
    embed_dim=s.e,
    num_layers=3,
    num_heads=s.h,
    num_kv_heads=s.g,
    head_dim=s.d,
    hidden_dim=14,
    max_len=40,
    rope_base=100.0,
    eps=1e-5,
)
HEADS = {"layers.0.attention": [0, 3, 5], "layers.2.attention": [2, 3]}
COUNTS = [(3, 3), (6, 3), (4, 2)]


def model_of(kind=LanguageModel):
    model = kind(LANGUAGE if kind is LanguageModel else ENCODER).double().eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.4)
    return model


def ids(*shape):
    return torch.randint(23, shape)


def with_zeros(model, heads=HEADS):
    "A copy whose heads are still there, with columns of 0."
    model = copy.deepcopy(model)
    for name, gone in heads.items():
        layer = model.get_submodule(name)
        layer.out_proj.weight.data.unflatten(1, (layer.layout.num_heads, -1))[:, gone] = 0
    return model


def last(outputs):
    return outputs[-1] if isinstance(outputs, list) else outputs


def counts(model):
    return [tuple(layer.attention.layout)[:2] for layer in model.layers]


@pytest.mark.parametrize("kind", [Encoder, LanguageModel])
def test_layers_of_a_model_have_different_heads(kind):
    heads = HEADS if kind is LanguageModel else {"layers.0.attention": [0, 3, 5], "layers.2.attention": [1]}
    model, text = model_of(kind), ids(s.b, s.n)
    before = copy.deepcopy(model.state_dict())
    small = prune_model(model, heads)
    assert counts(small) == (COUNTS if kind is LanguageModel else [(3, 3), (6, 6), (5, 5)])
    close(last(small(text)), last(with_zeros(model, heads)(text)))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = ({id(p) for p in of.parameters()} for of in (small, model))
    assert ours.isdisjoint(theirs)
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_the_model_may_be_the_layer():
    layer, x = build(), tokens()
    close(prune_model(layer, {"": [2, 3]})(x), masked(layer, [2, 3], x))
    small = prune_model(layer, {"": [2, 3]})
    again = match_heads(layer, small.state_dict())
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def test_means_are_named_as_their_layers():
    model, text = model_of(Encoder), ids(s.b, s.n)
    means = {"layers.1.attention": torch.randn(s.h, s.d, **float64)}
    heads = {"layers.1.attention": [0, 1], "layers.2.attention": [4]}
    small = prune_model(model, heads, means=means)
    zeros = with_zeros(model, heads)
    moved = model.layers[1].attention.out_proj.weight[:, : 2 * s.d] @ means["layers.1.attention"][:2].flatten()
    with torch.no_grad():
        zeros.layers[1].attention.out_proj.bias += moved
    close(last(small(text)), last(zeros(text)))
    with refused(ValueError, "layers.0.attention", "heads must name"):
        prune_model(model, heads, means={"layers.0.attention": means["layers.1.attention"]})
    with refused(TypeError, "means must be a dict"):
        prune_model(model, heads, means=means["layers.1.attention"])


def test_names_are_checked_before_anything_is_copied(monkeypatch):
    model = model_of()
    monkeypatch.setattr(copy, "deepcopy", None)  # nothing may be copied
    for names in ({"layers.9.attention": [0]}, {"layers.0": [0]}, {"word": [0]}, {0: [0]}):
        with refused(ValueError, repr([*names][0]), "'layers.0.attention'", "of its 3"):
            prune_model(model, {"layers.0.attention": [0, 1]} | names)
    for wrong in ([0], "layers.0.attention", None):
        with refused(TypeError, "heads must be a dict"):
            prune_model(model, wrong)


def test_what_a_layer_refuses_comes_with_its_name():
    model = model_of()
    for wrong, error in (([0], ValueError), ([9], IndexError), ([True], TypeError), (range(s.h), ValueError)):
        with refused(error, "'layers.2.attention'"):
            prune_model(model, {"layers.0.attention": [0, 1], "layers.2.attention": wrong})
    assert counts(model) == [(s.h, s.g)] * 3


class Shared(nn.Module):
    "One layer in two places, and another."

    def __init__(self):
        super().__init__()
        self.first, self.second = build(out_dim=s.e), build(out_dim=s.e)
        self.again = self.first

    def forward(self, x):
        return self.again(x + self.second(x + self.first(x)))


def test_a_layer_in_two_places_is_pruned_in_both():
    model, x = Shared(), tokens()
    small = prune_model(model, {"again": [2, 3]})
    assert small.first is small.again and small.first.layout.num_heads == s.h - 2
    close(small(x), with_zeros(model, {"again": [2, 3]})(x))
    with refused(ValueError, "'first'", "'again'", "one layer"):
        prune_model(model, {"first": [2, 3], "again": [2, 3]})
    again = match_heads(Shared(), small.state_dict())
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x)) and again.first is again.again


def test_tied_weights_are_refused_by_both_names():
    model = Shared()
    model.second.in_proj.weight = model.first.in_proj.weight
    for name, other in (("first", "second"), ("second", "first")):
        with refused(ValueError, f"'{name}.in_proj.weight'", f"'{other}.in_proj.weight'", "untie"):
            prune_model(model, {name: [2, 3]})
    model.second.in_proj.weight = nn.Parameter(model.first.in_proj.weight.detach().clone())
    assert prune_model(model, {"second": [2, 3]}).second.layout.num_heads == s.h - 2


def test_a_plug_with_parameters_that_two_layers_share_would_be_parted():
    model = Shared()
    model.first.finish = model.second.finish = nn.Linear(WIDE, WIDE, **float64)
    with refused(ValueError, "'first.finish.weight'", "'second.finish.weight'"):
        prune_model(model, {"first": [2, 3]})


# Saved and loaded


def by_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_safetensors(state):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install safetensors")
    return safetensors.load(safetensors.save(state))


@pytest.mark.parametrize("way", [by_torch, by_safetensors, lambda state: pickle.loads(pickle.dumps(state))])
@pytest.mark.parametrize("apart", [False, True])
def test_a_saved_model_comes_back_into_one_as_its_class_makes_it(way, apart):
    fresh, small, text = model_of(), prune_model(model_of(), HEADS), ids(s.b, s.n)
    if apart:
        for layer in (*fresh.layers, *small.layers):
            layer.attention = separate_projections(layer.attention)
    state = way(small.state_dict())
    with pytest.raises(RuntimeError, match="heads"):
        copy.deepcopy(fresh).load_state_dict(state)
    matched = match_heads(fresh, state)
    assert counts(matched) == COUNTS and counts(fresh) == [(s.h, s.g)] * 3
    matched.load_state_dict(state)
    assert torch.equal(matched(text), small(text))


def test_models_are_copied_and_pickled_with_their_heads():
    small, text = prune_model(model_of(), HEADS), ids(s.b, s.n)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert counts(other) == COUNTS and torch.equal(other(text), small(text))


def test_a_model_on_meta_is_matched_and_assigned():
    small, text = prune_model(model_of(), HEADS), ids(s.b, s.n)
    with torch.device("meta"):
        fresh = LanguageModel(LANGUAGE).double().eval()
    matched = match_heads(fresh, small.state_dict())
    assert all(p.is_meta for p in matched.parameters())
    matched.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(matched(text), small(text))


def test_more_heads_are_matched_as_well_and_begin_as_layers_begin():
    small, big = prune_model(model_of(), HEADS), model_of()
    matched = match_heads(small, big.state_dict())
    assert counts(matched) == counts(big)
    layer = matched.layers[0].attention
    bound = (6 / (s.e + sum(layer.layout.sizes))) ** 0.5
    assert 0.9 * bound < layer.in_proj.weight.abs().max() <= bound
    assert torch.equal(matched.layers[1].attention.in_proj.weight, small.layers[1].attention.in_proj.weight)
    matched.load_state_dict(big.state_dict())


def test_counts_that_are_absent_or_impossible_are_refused_by_name():
    model, key = model_of(), "layers.1.attention._extra_state"
    state = prune_model(model, HEADS).state_dict()
    with refused(ValueError, key, "'layers.0.attention._extra_state'"):
        match_heads(model, {name: t for name, t in state.items() if name != key})
    with refused(ValueError, "'layers.0.attention._extra_state'", "none"):
        match_heads(model, {name: t for name, t in state.items() if "_extra" not in name})
    with refused(TypeError, "list"):
        match_heads(model, state | {key: [3, 3, 8]})
    for wrong in ([4, 3, s.d], [0, 0, s.d], [3, s.d], [3, 3, 8, 8, 8], [-2, -1, s.d], [2.0, 1.0, 8.0], [[3, 3, 8]]):
        with refused(ValueError, key, "no counts of heads"):
            match_heads(model, state | {key: torch.tensor(wrong)})
    for wrong in ([3, 3, s.d + 1], [3, 3, s.d, s.dv]):
        with refused(ValueError, key, "another width", f"head_dim={wrong[2]}"):
            match_heads(model, state | {key: torch.tensor(wrong)})
    with refused(TypeError, "meta"):
        match_heads(model, state | {key: torch.tensor([3, 3, s.d], device="meta")})


def test_a_plug_that_counts_heads_is_not_matched():
    model = model_of()
    model.layers[2].attention.attend = SinkAttention(s.h, **float64)
    with refused(ValueError, "'layers.2.attention'", "SinkAttention"):
        match_heads(model, prune_model(model_of(), HEADS).state_dict())


# Cached


def test_a_new_cache_has_each_layers_own_heads():
    small = prune_model(model_of(), HEADS)
    cache = small.new_cache(s.b, 9)
    assert [kept.k.shape[1] for kept in cache] == [g for _, g in COUNTS]
    assert sum(kept.nbytes for kept in cache) == sum(
        cache_bytes(1, g, s.d, 9, s.b, dtype=torch.float64) for _, g in COUNTS
    )


def own_caches(kind, model, rows, length):
    layouts = [layer.attention.layout for layer in model.layers]
    if kind == "paged":  # one memory for all layers of as many key heads
        pools = {g: BlockPool(30, 2, g, s.d, **float64) for g in {layout.num_kv_heads for layout in layouts}}
        return [PagedCache(pools[layout.num_kv_heads], rows) for layout in layouts]
    if kind == "rolling":
        return model.new_cache(rows, length, window=length)
    return model.new_cache(rows, length)


@pytest.mark.parametrize("kind", ["plain", "rolling", "paged"])
def test_text_goes_on_from_any_cache_as_the_masked_models(kind):
    model, text = model_of(), ids(s.b, s.m)
    small, cache = prune_model(model, HEADS), None
    cache = own_caches(kind, small, s.b, s.m)
    with torch.no_grad():
        pieces = [small(piece, cache=cache) for piece in text.split([3, 1, 1, s.m - 5], 1)]
        close(torch.cat(pieces, 1), with_zeros(model)(text))


def test_a_cache_in_integers_has_each_layers_own_heads():
    small, text = prune_model(model_of(), HEADS).float(), ids(s.b, s.m)
    for form, allowed in (("float32", 0.0), ("int8", 0.3)):
        precisions = [HeadPrecision.uniform(g, form, group=2) for _, g in COUNTS]
        cache = [QuantizedKVCache(s.b, precision, s.m, s.d) for precision in precisions]
        plain = small.new_cache(s.b, s.m)
        with torch.no_grad():
            for piece in text.split([3, 1, 1, s.m - 5], 1):
                error = (small(piece, cache=cache) - small(piece, cache=plain)).norm() / small(piece).norm()
                assert error <= allowed


def test_generate_writes_what_the_masked_model_writes():
    model, text = model_of(), ids(s.b, 3)
    small, zeros = prune_model(model, HEADS), with_zeros(model)
    ours, theirs = (torch.stack([*generate(of, text, 6)]) for of in (small, zeros))
    assert torch.equal(ours, theirs)


def test_values_of_their_own_width_are_cached_in_it():
    model = model_of()
    for layer in model.layers:
        layer.attention = build(value_dim=s.dv, out_dim=s.e, position=RoPE(s.d, 100.0), bias=False)
    small, text = prune_model(model, HEADS), ids(s.b, s.n)
    cache = small.new_cache(s.b, s.n)
    assert cache[0].v.shape[-1] == s.dv
    with torch.no_grad():
        close(torch.cat([small(one, cache=cache) for one in text.split(1, 1)], 1), small(text))


def test_a_cache_of_other_heads_is_refused():
    model = model_of()
    small = prune_model(model, HEADS)
    with pytest.raises(ValueError):
        small(ids(s.b, 2), cache=model.new_cache(s.b, 4))


# Training goes on


def test_a_pruned_model_has_parameters_that_an_old_optimizer_does_not_know():
    layer, x = build(**EQUAL), tokens()
    old = torch.optim.Adam(layer.parameters(), lr=0.01)
    layer(x).square().sum().backward()
    old.step()
    new = prune_heads(layer, [1, 4])
    known = {id(p) for group in old.param_groups for p in group["params"]}
    assert known.isdisjoint(id(p) for p in new.parameters())
    fresh = torch.optim.Adam(new.parameters(), lr=0.01)
    before = new(x).square().sum()
    before.backward()
    fresh.step()
    assert new(x).square().sum() < before
    with pytest.raises(RuntimeError):  # moments of the old sizes do not fit
        fresh.load_state_dict(old.state_dict())
        fresh.step()


def test_layouts_of_one_head_and_of_many_are_pruned_down_to_one():
    layer = MultiHeadAttention(12, 12, **float64)
    x = tokens(width=12)
    for gone in range(12):
        alone = prune_heads(layer, [i for i in range(12) if i != gone])
        assert alone.layout == HeadLayout(1, 1, 1)
        close(alone(x), masked(layer, [i for i in range(12) if i != gone], x))
    with refused(ValueError, "all 1 heads"):
        prune_heads(alone, [0])


def test_a_cache_keeps_fewer_keys():
    layer, x = prune_heads(build(), [2, 3]), tokens()
    cache = KVCache(s.b, layer.layout.num_kv_heads, s.n, s.d, **float64)
    with torch.no_grad():
        close(torch.cat([layer(one, cache=cache) for one in x.split(1, 1)], 1), layer(x, is_causal=True))
    assert cache.nbytes * s.g == KVCache(s.b, s.g, s.n, s.d, **float64).nbytes * (s.g - 1)


def test_means_of_layers_that_differ():
    layers = nn.Sequential(MultiHeadAttention(24, 6), MultiHeadAttention(24, 4))
    means = {"0": torch.rand(6, 4), "1": torch.rand(4, 6)}
    new = prune_model(layers, {"0": (1,), "1": (0, 3)}, means=means)
    assert [layer.layout.num_heads for layer in new] == [5, 2]
