"""Layers with other heads compute the same or are refused; parts stand as matrices of their own and come back."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mha_book import (
    ALiBi,
    HeadList,
    HeadTemperature,
    MultiHeadAttention,
    OutputGate,
    RelativeBias,
    RoPE,
    SinkAttention,
    align_kv_heads,
    attention,
    fused_attend,
    gradient_report,
    largest_logits,
    mean_kv_heads,
    pad_heads,
    qk_clip_,
    repeat_kv_heads,
    rotate_kv_heads,
    to_torch,
)
from mha_book.heads.head_counts import separate_projections, stack_projections, with_heads
from mha_book.heads.weight_split import HeadLayout, SeparateProjections
from mha_book.instruments.testing import SIZES as s
from mha_book.plugs.cache import KVCache
from support.refusals import refused

float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)
OTHER = 11


def build(**options):
    "A grouped layer in float64 in which no number is 0 or 1."
    layer = MultiHeadAttention(s.e, s.h, **(dict(num_kv_heads=s.g, head_dim=s.d) | float64 | options))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    return layer.eval()


def tokens(n=s.n, width=s.e):
    return torch.randn(s.b, n, width, **float64)


# What counts heads


def by_slopes(q, k, v, **options):
    "A plug that makes its slopes from however many heads it is given: of more heads, others."
    slope = 2.0 ** -(torch.arange(1, q.shape[1] + 1) / q.shape[1])
    return fused_attend(q * slope[:, None, None].to(q), k, v, **options)


def across_heads(heads, x):
    "A finish that looks at all heads together."
    return heads / heads.square().mean(-1, keepdim=True).sqrt()


class FirstIsShort(nn.Module):
    "A position plug with a number for each query head, as a table."

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(0.5, 2, s.h, **float64))

    def forward(self, q, k, *, offset):
        return q * self.table[:, None, None], k


class OneOfEachKeyHead(nn.Module):
    "An attention plug with a number for each key head."

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(0.5, 2, s.g, **float64))

    def forward(self, q, k, v, **options):
        return fused_attend(q, k * self.table[:, None, None], v, **options)


COUNT_QUERY_HEADS = {
    "HeadTemperature": lambda: dict(attend=HeadTemperature(s.h, **float64)),
    "SinkAttention": lambda: dict(attend=SinkAttention(s.h, **float64)),
    "RelativeBias": lambda: dict(attend=RelativeBias(s.h, **float64)),
    "ALiBi": lambda: dict(attend=ALiBi(s.h)),
    "partial(attention, ...)": lambda: dict(attend=partial(attention, sinks=torch.randn(s.h, **float64))),
    "by_slopes": lambda: dict(attend=by_slopes),
    "OutputGate": lambda: dict(finish=OutputGate(s.e, s.h, head_dim=s.d, **float64)),
    "across_heads": lambda: dict(finish=across_heads),
    "FirstIsShort": lambda: dict(position=FirstIsShort()),
}
COUNT_NOTHING = {
    "RoPE": lambda: dict(position=RoPE(s.d)),
    "window": lambda: dict(attend=partial(attention, window=3)),
    "lambda": lambda: dict(attend=lambda q, k, v, **options: fused_attend(q, k, v, **options)),
    "halved": lambda: dict(finish=lambda heads, x: heads / 2),
    "norms": lambda: dict(qk_norm=nn.RMSNorm),
    "dropout": lambda: dict(dropout=0.3),
}


@pytest.mark.parametrize("name", COUNT_QUERY_HEADS)
def test_padding_what_counts_heads_is_refused_by_name_before_anything_is_made(name):
    layer, x = build(**COUNT_QUERY_HEADS[name]()), tokens()
    before, state = layer(x), torch.random.get_rng_state()
    with refused(ValueError, name, f"num_heads={s.h + 4}", "take it off"):
        pad_heads(layer, s.h + 4)
    assert torch.equal(layer(x), before) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("context_dim", [None, OTHER])
@pytest.mark.parametrize("dv", [s.d, 5])
@pytest.mark.parametrize("name", COUNT_NOTHING)
def test_padding_what_does_not_count_heads_computes_the_same(name, dv, context_dim):
    layer = build(**COUNT_NOTHING[name](), value_dim=dv, context_dim=context_dim)
    args = [tokens()] + ([] if context_dim is None else [tokens(s.m, OTHER)])
    wide = pad_heads(layer, s.h + 4)
    assert [*wide.layout] == [s.h + 4, s.g + 2, s.d] and wide.layout.value_dim == dv
    close(wide(*args), layer(*args))
    if not layer.context_proj:
        cache = KVCache(s.b, s.g + 2, s.n, s.d, value_dim=dv, **float64)
        steps = [wide(piece, is_causal=True, cache=cache) for piece in args[0].split((2, s.n - 2), 1)]
        close(torch.cat(steps, 1), layer(*args, is_causal=True))


@pytest.mark.parametrize("dv", [s.d, 5])
@pytest.mark.parametrize("context_dim", [None, OTHER])
def test_functions_of_key_value_heads_compute_the_same_with_values_of_their_own_width(dv, context_dim):
    layer = build(value_dim=dv, context_dim=context_dim)
    args = [tokens()] + ([] if context_dim is None else [tokens(s.m, OTHER)])
    turns = [torch.linalg.qr(torch.randn(s.g, width, width, **float64))[0] for width in (s.d, dv)]
    wide = repeat_kv_heads(layer, s.h)
    for new in (wide, rotate_kv_heads(layer, *turns), align_kv_heads(layer, 1), mean_kv_heads(wide, s.g)):
        assert new.layout.value_dim == dv
        close(new(*args), layer(*args))
    aligned = align_kv_heads(layer, 1, args[-1])
    close(aligned(*args), layer(*args))
    assert mean_kv_heads(aligned, 1)(*args).shape == layer(*args).shape


FUNCTIONS = {
    "pad_heads": lambda layer: pad_heads(layer, 2 * s.h),
    "repeat_kv_heads": lambda layer: repeat_kv_heads(layer, s.h),
    "mean_kv_heads": lambda layer: mean_kv_heads(layer, 1),
    "rotate_kv_heads": lambda layer: rotate_kv_heads(
        layer, values=torch.linalg.qr(torch.randn(s.g, s.d, s.d, **float64))[0]
    ),
    "align_kv_heads": lambda layer: align_kv_heads(layer, 1, parts="v"),
    "with_heads": lambda layer: with_heads(layer, HeadLayout(s.g, s.g, s.d), lambda part, heads: heads[: s.g]),
}


@pytest.mark.parametrize("name", ["pad_heads", "repeat_kv_heads", "mean_kv_heads"])
def test_a_plug_that_counts_key_heads_is_refused_by_name(name):
    with refused(ValueError, "attend=OneOfEachKeyHead", "does not work with"):
        FUNCTIONS[name](build(attend=OneOfEachKeyHead()))


def test_turned_values_need_a_plug_that_mixes_numbers_one_by_one():
    def largest(q, k, v, **options):
        return fused_attend(q, k, v.relu(), **options)

    for name in ("rotate_kv_heads", "align_kv_heads"):
        with refused(ValueError, "attend=largest", "computes something else"):
            FUNCTIONS[name](build(attend=largest))


def wrapped(layer):
    layer.in_proj = nn.Sequential(layer.in_proj)


def doubled(layer):
    layer.out_proj.register_forward_hook(lambda proj, args, y: 2 * y)


def exchanged(layer):
    old = layer.in_proj.forward
    layer.in_proj.forward = lambda x: 2 * old(x)


def its_own_forward(layer):
    old = layer.forward
    layer.forward = lambda *args, **options: 2 * old(*args, **options)


NOT_PLAIN = {
    "in_proj": [wrapped, exchanged, lambda layer: parametrizations.weight_norm(layer.in_proj)],
    "out_proj": [doubled, lambda layer: parametrizations.orthogonal(layer.out_proj)],
    "forward of its own": [its_own_forward],
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name, change", [(name, change) for name in NOT_PLAIN for change in NOT_PLAIN[name]])
def test_heads_of_what_is_not_plain_are_not_changed(function, name, change):
    layer = build()
    change(layer)
    with refused(TypeError, name):
        FUNCTIONS[function](layer)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_goes_with_a_layer_stays(function):
    layer = build().train()
    layer.in_proj.weight.requires_grad_(False)
    new = FUNCTIONS[function](layer)
    assert new.training and not new.in_proj.weight.requires_grad and new.in_proj.bias.requires_grad
    assert new.in_proj.weight.dtype == torch.float64 and type(new.in_proj) is nn.Linear
    assert (
        new.in_proj.out_features == len(new.in_proj.weight) and new.out_proj.in_features == new.out_proj.weight.shape[1]
    )
    with torch.device("meta"):
        small = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d)
    if function in ("pad_heads", "repeat_kv_heads", "mean_kv_heads", "with_heads"):
        assert FUNCTIONS[function](small).in_proj.weight.is_meta


class Residual(MultiHeadAttention):
    "A subclass with a forward of its own."

    def forward(self, x, context=None, **options):
        return x + super().forward(x, context, **options)


class Louder(MultiHeadAttention):
    "A subclass whose queries are not what its rows say."

    def qkv(self, x, context=None, **options):
        q, k, v = super().qkv(x, context, **options)
        return 3 * q + 1, k, v


@pytest.mark.parametrize("kind", [Residual, Louder])
def test_subclasses_keep_their_function_and_are_not_torchs(kind):
    layer, x = kind(48, s.h, **float64), torch.randn(s.b, s.n, 48, **float64)
    close(pad_heads(layer, s.h + 2)(x), layer(x))
    with refused(ValueError, "of its own"):
        to_torch(layer)


def test_a_layer_with_hooks_is_not_torchs():
    layer = MultiHeadAttention(48, s.h)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    with refused(ValueError, "forward hooks"):
        to_torch(layer)


def test_the_clip_needs_queries_that_are_the_rows():
    layer = Louder(s.e, s.h, head_dim=s.d)
    with refused(TypeError, "qkv of its own"):
        qk_clip_(layer, torch.full((s.h,), 9.0), 1.0)
    layer = MultiHeadAttention(s.e, s.h, head_dim=s.d)
    layer.in_proj.register_forward_hook(lambda proj, args, y: y + 1)
    before = layer.in_proj.weight.clone()
    with refused(TypeError, "in_proj", "hooks"):
        qk_clip_(layer, torch.full((s.h,), 9.0), 1.0)
    assert torch.equal(layer.in_proj.weight, before)


# Three matrices, and back


LAYERS = [dict(), dict(context_dim=OTHER), dict(value_dim=5), dict(value_dim=5, context_dim=OTHER), dict(bias=False)]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_parts_that_stand_apart_compute_the_same_and_come_back(options):
    layer = build(**options)
    apart, context = separate_projections(layer), tokens(s.m, options.get("context_dim", s.e))
    x, value, alone = tokens(), torch.randn_like(context), "context_dim" not in options
    home = apart.in_proj if alone else apart.context_proj
    assert {name for name, _ in apart.in_proj.named_children()} == set(
        ["q_proj", "k_proj", "v_proj"][: 3 if alone else 1]
    )
    assert type(home.v_proj) is nn.Linear and home.v_proj.out_features == s.g * options.get("value_dim", s.d)
    close(apart(x, context), layer(x, context))
    close(apart(x, context, value=value), layer(x, context, value=value))
    if alone:
        close(apart(x), layer(x))
        steps = []
        cache = KVCache(s.b, s.g, s.n, s.d, value_dim=layer.layout.value_dim, **float64)
        for piece in x.split((2, s.n - 2), 1):
            steps.append(apart(piece, is_causal=True, cache=cache))
        close(torch.cat(steps, 1), layer(x, is_causal=True))
    back = stack_projections(apart)
    assert back.state_dict().keys() == layer.state_dict().keys()
    for (name, ours), theirs in zip(back.state_dict().items(), layer.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert torch.equal(back(x, context), layer(x, context))
    assert stack_projections(back).state_dict().keys() == layer.state_dict().keys()  # it may be said twice


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_rows_of_parts_that_stand_apart_are_those_of_the_stack(options):
    layer = build(**options)
    apart = separate_projections(layer)
    for part, count in dict(q=s.h, k=s.g, v=s.g, o=s.h).items():
        for head in range(count):
            (proj, rows), (own, at) = apart.rows(part, head), layer.rows(part, head)
            if part == "o":
                assert torch.equal(proj.weight[:, rows], own.weight[:, at])
                continue
            assert proj is apart.get_submodule(f"{layer.place(part, head)[0]}.{part}_proj")
            assert torch.equal(proj.weight[rows], own.weight[at])


class LowRank(nn.Module):
    "What adapters do: a Linear inside, and a product of two thin matrices beside it."

    def __init__(self, base):
        super().__init__()
        self.base, like = base, dict(bias=False, dtype=base.weight.dtype)
        self.down = nn.Linear(base.in_features, 2, **like)
        self.up = nn.Linear(2, base.out_features, **like)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_on_one_part_is_trained_alone_merged_and_stacked():
    layer, x, target = build(), tokens(), tokens()
    apart = separate_projections(layer.requires_grad_(False))
    apart.in_proj.q_proj = LowRank(apart.in_proj.q_proj)
    trained = [name for name, p in apart.named_parameters() if p.requires_grad]
    assert trained == ["in_proj.q_proj.down.weight", "in_proj.q_proj.up.weight"]
    with refused(TypeError, "in_proj.q_proj is LowRank", "take off"):
        stack_projections(apart)
    optimiser = torch.optim.SGD([p for p in apart.parameters() if p.requires_grad], lr=0.01)
    before = (apart(x) - target).square().mean().item()
    for _ in range(5):
        loss = (apart(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < before
    answer, adapter = apart(x).detach(), apart.in_proj.q_proj
    with torch.no_grad():
        adapter.base.weight += adapter.up.weight @ adapter.down.weight
    apart.in_proj.q_proj = adapter.base
    merged = stack_projections(apart)
    close(merged(x), answer)
    q_rows = s.h * s.d
    assert torch.equal(merged.in_proj.weight[q_rows:], layer.in_proj.weight[q_rows:])
    assert not torch.equal(merged.in_proj.weight[:q_rows], layer.in_proj.weight[:q_rows])


def test_parts_that_differ_cannot_be_one_matrix():
    for change in (
        lambda apart: apart.in_proj.q_proj.requires_grad_(False),
        lambda apart: apart.in_proj.v_proj.float(),
        lambda apart: setattr(apart.in_proj.k_proj, "bias", None),
    ):
        apart = separate_projections(build())
        change(apart)
        with refused(ValueError, "in_proj cannot be one matrix", "alike"):
            stack_projections(apart)


def test_what_needs_one_matrix_says_how_to_get_it():
    apart = separate_projections(MultiHeadAttention(48, s.h))
    for function in (to_torch, lambda layer: pad_heads(layer, 8), lambda layer: mean_kv_heads(layer, 1)):
        with refused(TypeError, "in_proj stands as several matrices", "stack_projections"):
            function(apart)
    with refused(TypeError, "in_proj is Sequential"):
        layer = build()
        wrapped(layer)
        separate_projections(layer)


def test_reports_and_clips_reach_parts_that_stand_apart():
    layer, x = build(num_kv_heads=s.h), tokens()
    apart, upstream = separate_projections(layer), tokens()
    ours, theirs = (gradient_report(m, lambda m=m: (m(x) * upstream).sum()) for m in (apart, layer))
    assert len(ours.heads) == len(theirs.heads) == 4 * s.h and not ours.without
    for a, b in zip(ours.heads, theirs.heads):
        assert (a.part, a.head) == (b.part, b.head)
        assert abs(a.norm - b.norm) < 1e-9 * b.norm
    largest = torch.linspace(1, 20, s.h, **float64)
    for module in (apart, layer):
        qk_clip_(module, largest, 5.0)
    assert torch.equal(stack_projections(apart).in_proj.weight, layer.in_proj.weight)


def test_a_report_says_which_layers_have_no_rows():
    model = nn.ModuleDict(dict(first=build(), second=build()))
    model["second"].in_proj = LowRank(model["second"].in_proj)
    report = gradient_report(model, lambda: model["second"](model["first"](tokens())).sum())
    assert {row.name for row in report.heads} == {"first"}
    (name, fault), *others = report.without
    assert name == "second" and "in_proj is LowRank" in fault and not others
    assert f"second: {fault}" in str(report)


def test_a_report_does_not_call_heads_frozen_that_a_hook_trains():
    layer, x = build().requires_grad_(False), tokens()
    adapter = nn.Linear(s.e, layer.in_proj.out_features, bias=False, **float64)
    layer.in_proj.register_forward_hook(lambda proj, args, y: y + adapter(args[0]))
    report = gradient_report(nn.ModuleList([layer, adapter]), lambda: layer(x).square().sum())
    assert not report.heads and ("0", "in_proj is frozen under forward hooks") == (
        report.without[0][0],
        report.without[0][1].split(",")[0],
    )
    layer.requires_grad_(True)  # a hook moves no rows: what comes to them is what autograd says
    report = gradient_report(layer, lambda: layer(x).square().sum())
    layer(x).square().sum().backward()
    proj, at = layer.in_proj, layer.layout.rows("k", 1)
    wanted = torch.cat([proj.weight.grad[at].flatten(), proj.bias.grad[at]]).norm().item()
    (row,) = (row for row in report.heads if (row.part, row.head) == ("k", 1))
    assert abs(row.norm - wanted) < 1e-9 * wanted


def test_a_separate_layer_is_copied_saved_and_its_counts_compared():
    apart, x = separate_projections(build()), tokens()
    assert torch.equal(copy.deepcopy(apart)(x), apart(x)) and isinstance(apart.in_proj, SeparateProjections)
    again = separate_projections(build())
    again.load_state_dict(apart.state_dict())
    assert torch.equal(again(x), apart(x)) and "in_proj.q_proj.weight" in apart.state_dict()
    with refused(RuntimeError, "build the layer with the saved counts"):
        again.load_state_dict(apart.state_dict() | dict(_extra_state=torch.tensor([s.h, s.h, s.d])))


# Between devices


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", ["in_proj", "context_proj"])
def test_a_stacked_matrix_cut_as_one_is_refused_in_words(name):
    "What sharding by columns leaves on one of two devices: half of the rows, whosever they are."
    layer = build(context_dim=OTHER if name == "context_proj" else None, num_kv_heads=s.h, head_dim=s.d)
    proj = getattr(layer, name)
    proj.weight, proj.bias = (nn.Parameter(p[: len(p) // 2]) for p in (proj.weight, proj.bias))
    args = [tokens()] + ([tokens(s.m, OTHER)] if name == "context_proj" else [])
    for call in (layer, layer.qkv, layer.attention_map):
        with refused(ValueError, name, f"{len(proj.weight)} numbers a token", "separate_projections"):
            call(*args)
    with refused(TypeError, name, "cut otherwise"):
        layer.rows("k", 0)


def test_a_layer_cut_between_heads_is_the_sum_of_its_shares():
    "Each of p devices holds h / p heads of every part, and the columns that read them; the outputs are added up."
    layer, x, p = build(num_kv_heads=s.g), tokens(), s.g
    layout, shares = HeadLayout(s.h // p, s.g // p, s.d), []
    for device in range(p):
        share = separate_projections(layer)
        share.layout = layout
        for part in "qkv":
            proj = share.in_proj.get_submodule(f"{part}_proj")
            proj.weight, proj.bias = (nn.Parameter(t.chunk(p)[device]) for t in (proj.weight, proj.bias))
        out = share.out_proj
        out.weight = nn.Parameter(out.weight.chunk(p, 1)[device])
        shares.append(share(x, is_causal=True) - out.bias)
    close(sum(shares) + layer.out_proj.bias, layer(x, is_causal=True))


# What is no layer, and what a copy would share

CHANGES = {
    "pad_heads": lambda layer: pad_heads(layer, 2 * s.h),
    "with_heads": lambda layer: with_heads(layer, HeadLayout(s.h, s.g, s.d), lambda part, heads: heads),
    "separate_projections": separate_projections,
    "stack_projections": stack_projections,
    "repeat_kv_heads": lambda layer: repeat_kv_heads(layer, s.h),
    "mean_kv_heads": lambda layer: mean_kv_heads(layer, 1),
    "rotate_kv_heads": rotate_kv_heads,
    "align_kv_heads": lambda layer: align_kv_heads(layer, 1),
}
READS = {
    "qk_clip_": lambda layer: qk_clip_(layer, torch.ones(s.h, **float64), 2.0),
    "largest_logits": lambda layer: largest_logits(layer, tokens()),
}


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("name", CHANGES | READS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_what_is_no_layer_is_refused_by_its_name(name):
    call, foreign = (CHANGES | READS)[name], nn.MultiheadAttention(s.h * s.d, s.h)
    for wrong in (None, build, nn.Linear(s.e, s.e), HeadList(s.e, s.h, s.d)):
        with refused(TypeError, "layer must be a MultiHeadAttention", type(wrong).__name__):
            call(wrong)
    with refused(TypeError, "MultiheadAttention", "from_torch(layer)"):
        call(foreign)
    for wrapped, way in ((nn.DataParallel(build()), "layer.module"), (torch.compile(build()), "layer._orig_mod")):
        with refused(TypeError, "layer must be a MultiHeadAttention", way):
            call(wrapped)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("method", ["forward", "qkv"])
def test_a_method_that_a_copy_would_share_is_refused(name, method):
    layer = build()
    own = getattr(layer, method)
    setattr(layer, method, lambda *args, **options: own(*args, **options))
    with refused(TypeError, f"a {method} of its own that a copy would share"):
        CHANGES[name](layer)


def bring(layer, _):
    "As an offloading library does: the numbers come when the layer is called."
    for name, numbers in layer.numbers.items():
        module, _, kind = name.rpartition(".")
        setattr(layer.get_submodule(module), kind, nn.Parameter(numbers))


@pytest.mark.parametrize("function", [separate_projections, stack_projections, partial(pad_heads, num_heads=2 * s.h)])
def test_weights_that_hooks_bring_are_not_cut(function):
    layer = build()
    x, layer.numbers = tokens(), {name: p.detach().clone() for name, p in layer.named_parameters()}
    wanted = layer(x)
    if function is stack_projections:
        layer = separate_projections(layer)
    layer.to("meta").register_forward_pre_hook(bring)
    with refused(ValueError, "forward hooks"):
        function(layer)
    if function is not stack_projections:
        close(layer(x), wanted)
    assert function(build().to("meta")).out_proj.weight.is_meta


@pytest.mark.usefixtures("own_messages")
def test_tokens_to_align_on_are_a_tensor():
    with refused(TypeError, "x must be a torch.Tensor", "torch.from_numpy"):
        align_kv_heads(build(), 1, tokens().numpy())


@pytest.mark.usefixtures("own_messages")
def test_rotations_without_numbers_say_so():
    with refused(ValueError, "keys on meta", "no numbers"):
        rotate_kv_heads(build(), torch.eye(s.d, **float64).expand(s.g, -1, -1).to("meta"))
    with refused(ValueError, "keys on cpu", "weights on meta", "no numbers"):
        rotate_kv_heads(build().to("meta"), torch.eye(s.d, **float64).expand(s.g, -1, -1))
