"""Plugs with every option and under every call of the layer; the clip exact, in place, or refused whole."""

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mha_book.heads.dialects import to_torch
from mha_book.heads.layer import MultiHeadAttention
from mha_book.instruments.gradients import gradient_report
from mha_book.instruments.testing import SIZES, reference_attention
from mha_book.kernels.backends import attention, attention_logits, attention_weights
from mha_book.kernels.merging import attention_with_lse
from mha_book.plugs.logits import HeadTemperature, OutputGate, SinkAttention, largest_logits, qk_clip_, z_loss
from support.mutants import CLIPS
from support.refusals import refused

s = SIZES
float64 = dict(dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)


def heads(n=s.n, m=s.m):
    return (
        torch.randn(s.b, s.h, n, s.d, **float64),
        torch.randn(s.b, s.g, m, s.d, **float64),
        torch.randn(s.b, s.g, m, s.dv, **float64),
    )


def build(g=s.g, **options):
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=g, head_dim=s.d, **float64, **options)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return layer


def gate(**options):
    return OutputGate(s.e, s.h, head_dim=s.d, **float64, **options)


def tokens(n=s.n, width=s.e, size=3.0):
    return size * torch.randn(s.b, n, width, **float64)


def logits_of(layer, *args):
    q, k, _ = layer.qkv(*args)
    return attention_logits(q, k)


# --- plugs -----------------------------------------------------------------------------------------------------------

OPTIONS = [
    dict(),
    dict(is_causal=True),
    dict(mask=torch.rand(s.b, 1, s.n, s.m) < 0.6),
    dict(bias=torch.randn(s.h, s.n, s.m, **float64), is_causal=True),
]
BOUND = [dict(), dict(window=3), dict(softcap=2.0), dict(scale=0.7, impl="math"), dict(impl="sdpa")]


@pytest.mark.parametrize("options, bound", list(itertools.product(OPTIONS, BOUND)))
def test_sinks_are_the_loops(options, bound):
    q, k, v = heads()
    plug = SinkAttention(s.h, attend=partial(attention, **bound), **float64)
    nn.init.normal_(plug.sinks)
    told = {name: value for name, value in bound.items() if name != "impl"}
    out = plug(q, k, v, **options)
    close(out, reference_attention(q, k, v, sinks=plug.sinks, **options, **told))
    out.sum().backward()
    assert (plug.sinks.grad != 0).all()


@pytest.mark.parametrize("options, bound", list(itertools.product(OPTIONS, BOUND)))
def test_a_temperature_divides_what_the_rest_gets(options, bound):
    q, k, v = heads()
    plug = HeadTemperature(s.h, attend=partial(attention, **bound), **float64)
    assert torch.equal(plug(q, k, v, **options), attention(q, k, v, **options, **bound))
    nn.init.normal_(plug.log_temperature)
    told = {name: value for name, value in bound.items() if name != "impl"}
    divided = q / plug.log_temperature.exp()[:, None, None]
    close(plug(q, k, v, **options), reference_attention(divided, k, v, **options, **told))


def test_plugs_stack_and_train_with_the_layer():
    layer = build(attend=HeadTemperature(s.h, attend=SinkAttention(s.h, **float64), **float64))
    names = {name for name, _ in layer.named_parameters()}
    assert {"attend.log_temperature", "attend.attend.sinks"} <= names
    layer(tokens(), is_causal=True).square().sum().backward()
    assert layer.attend.log_temperature.grad.abs().min() > 0 and layer.attend.attend.sinks.grad.abs().min() > 0
    weights = layer.attention_map(tokens(), is_causal=True)
    assert (weights.sum(-1) < 1).all()


@pytest.mark.parametrize("kind", [HeadTemperature, SinkAttention])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plugs_keep_the_dtype_of_the_heads(kind, dtype):
    q, k, v = (t.to(dtype) for t in heads())
    for plug in kind(s.h), kind(s.h, dtype=dtype):  # a plug left in float32 serves a model in bfloat16
        assert plug(q, k, v).dtype == dtype


@pytest.mark.usefixtures("own_messages")
def test_plugs_refuse_counts_that_are_none_or_not_the_heads():
    for kind in HeadTemperature, SinkAttention:
        with refused(TypeError, "num_heads", "4.0"):
            kind(4.0)
        with refused(ValueError, "num_heads", "at least 1"):
            kind(0)
    q, k, v = heads()
    with refused(ValueError, "sinks of shape (5,)", "(6,)"):
        SinkAttention(5, **float64)(q, k, v)
    for count in 5, 1:
        with refused(ValueError, "6 query heads", f"{count} temperatures"):
            HeadTemperature(count, **float64)(q, k, v)


# --- the gate --------------------------------------------------------------------------------------------------------


def opened(gated):
    nn.init.zeros_(gated.finish.gate_proj.weight)
    nn.init.constant_(gated.finish.gate_proj.bias, 40.0)
    return gated


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(qk_norm=nn.RMSNorm),
        dict(attend=partial(attention, window=2, softcap=3.0)),
        dict(out_dim=7),
        dict(position=lambda q, k, *, offset: (2 * q, k / 2)),
    ],
)
def test_an_open_gate_is_the_layer_in_every_call(options):
    plain, gated = build(**options), opened(build(finish=gate(), **options))
    gated.load_state_dict(gated.state_dict() | plain.state_dict())
    x, mask = tokens(), torch.rand(s.n, s.n) < 0.7
    padding = torch.arange(s.n) < torch.tensor([[s.n], [3]])
    for call in (
        dict(),
        dict(is_causal=True),
        dict(mask=mask),
        dict(key_mask=padding),
        dict(bias=torch.randn(s.n, s.n, **float64)),
    ):
        assert torch.equal(gated(x, **call), plain(x, **call))
        assert torch.equal(gated.attention_map(x, **call), plain.attention_map(x, **call))


def test_the_gate_reads_the_tokens_that_ask_and_gates_number_by_number():
    gated = build(finish=gate(), context_dim=11)
    x, context = tokens(), tokens(s.m, 11)
    heads = []
    hook = gated.attend
    gated.attend = lambda *args, **kwargs: heads.append(hook(*args, **kwargs)) or heads[-1]
    got = gated(x, context)
    W, b = gated.finish.gate_proj.weight, gated.finish.gate_proj.bias
    for a, i in itertools.product(range(s.b), range(s.n)):
        gates = 1 / (1 + torch.exp(-(W @ x[a, i] + b)))
        row = torch.cat([heads[0][a, j, i] for j in range(s.h)])
        close(got[a, i], gated.out_proj.weight @ (gates * row) + gated.out_proj.bias)


class Cache:
    "The layer's protocol in a few lines."

    def __init__(self):
        self.k, self.v, self.seen, self.new = None, None, 0, None

    def append(self, k, v, key_mask=None):
        old = () if self.k is None else ((self.k, self.v),)
        self.new = [torch.cat([*parts, t], dim=2) for *parts, t in zip(*old, (k, v))]
        return *self.new, None

    def commit(self):
        (self.k, self.v), self.seen = self.new, self.new[0].shape[2]

    def crop(self, length):
        self.k, self.v, self.seen = self.k[:, :, :length], self.v[:, :, :length], length


def test_a_gated_layer_decodes_token_by_token():
    gated, x, cache = build(finish=gate()), tokens(), Cache()
    rows = [gated(x[:, i : i + 1], is_causal=True, cache=cache) for i in range(s.n)]
    assert cache.seen == s.n
    close(torch.cat(rows, dim=1), gated(x, is_causal=True))


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    gated, cache = build(finish=gate()), Cache()
    gated.finish.gate_proj = nn.Linear(s.e, 3, **float64)
    with refused(ValueError, "3 gates", "48 numbers"):
        gated(tokens(), cache=cache)
    assert cache.k is None and cache.seen == 0


def test_a_gated_layer_is_a_module_like_others():
    gated = build(finish=gate())
    for copied in copy.deepcopy(gated), pickle.loads(pickle.dumps(gated)):
        assert torch.equal(copied(x := tokens()), gated(x))
    with pytest.raises(RuntimeError, match="head"):
        other = MultiHeadAttention(s.e, 2 * s.h, num_kv_heads=2 * s.g, head_dim=s.d // 2)
        other.finish = OutputGate(s.e, 2 * s.h, head_dim=s.d // 2)
        gated.load_state_dict(other.state_dict())
    assert gate(bias=False).gate_proj.bias is None
    assert OutputGate(s.e, 4).gate_proj.out_features == s.e  # e / h a head, unless told
    with pytest.raises(ValueError, match="finish"):
        to_torch(MultiHeadAttention(s.e, 4, finish=OutputGate(s.e, 4)))


def test_dropout_stays_in_training():
    gated, x = build(finish=gate(), dropout=0.5), tokens()
    assert not torch.equal(gated(x), gated(x))
    gated.eval()
    assert torch.equal(gated(x), gated(x))


def test_gradient_report_sees_a_closed_gate():
    gated = opened(build(finish=gate()))
    nn.init.constant_(gated.finish.gate_proj.bias, -800.0)
    report = gradient_report(gated, lambda: gated(tokens()).square().sum())
    assert any("gate closed" in str(row.reason) for row in report.heads)


# --- the largest logit -----------------------------------------------------------------------------------------------


def test_the_largest_logit_is_over_what_is_seen():
    layer, x = build(), tokens()
    raw = logits_of(layer, x).abs()
    close(largest_logits(layer, x), raw.amax((0, 2, 3)))
    causal = raw.tril()
    close(largest_logits(layer, x, is_causal=True), causal.amax((0, 2, 3)))
    near = causal * torch.ones(s.n, s.n).triu(-1)
    close(largest_logits(layer, x, is_causal=True, window=2), near.amax((0, 2, 3)))
    real = torch.arange(s.n) < torch.tensor([[s.n], [3]])
    close(largest_logits(layer, x, key_mask=real), (raw * real[:, None, None]).amax((0, 2, 3)))
    close(largest_logits(layer, x, scale=2.0), 2 * s.d**0.5 * raw.amax((0, 2, 3)))
    # after norm and position
    normed = build(qk_norm=nn.RMSNorm, position=lambda q, k, *, offset: (3 * q, k))
    assert (largest_logits(normed, 100 * x) <= 3 * s.d**0.5).all()


def test_a_negative_logit_counts_by_its_size():
    layer = MultiHeadAttention(4, 1, bias=False)
    with torch.no_grad():
        layer.in_proj.weight.zero_()
        layer.in_proj.weight[0, 0], layer.in_proj.weight[4, 0] = 1.0, -6.0
    x = torch.tensor([[[1.0, 0, 0, 0]]])
    assert largest_logits(layer, x).tolist() == [3.0]  # 6 / √4


def test_nothing_to_see_is_0():
    layer = build()
    hidden = torch.zeros(s.n, s.n, dtype=torch.bool)
    assert largest_logits(layer, tokens(), mask=hidden).tolist() == [0.0] * s.h
    assert largest_logits(layer, torch.empty(0, s.n, s.e, **float64)).tolist() == [0.0] * s.h
    assert largest_logits(layer, torch.empty(s.b, 0, s.e, **float64)).tolist() == [0.0] * s.h


def test_low_precision_is_measured_in_float32_and_leaves_no_graph():
    for dtype in torch.bfloat16, torch.float16:
        layer = build().to(dtype)
        largest = largest_logits(layer, tokens(size=30.0).to(dtype))
        assert largest.dtype == torch.float32 and largest.isfinite().all() and not largest.requires_grad


# --- the clip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "g, context_dim, bias, finish",
    [
        (s.h, None, True, None),
        (s.g, None, True, None),
        (1, None, False, None),
        (s.g, 11, True, None),
        (s.g, 11, False, gate()),
        (s.g, None, True, gate()),
    ],
)
def test_every_head_gets_exactly_its_factor(g, context_dim, bias, finish):
    layer = build(g=g, context_dim=context_dim, bias=bias, finish=copy.deepcopy(finish))
    inputs = tokens(), None if context_dim is None else tokens(s.m, context_dim)
    before, old = logits_of(layer, *inputs), copy.deepcopy(layer.state_dict())
    largest = largest_logits(layer, *inputs)
    factors = qk_clip_(layer, largest, threshold := largest.median().item())
    close(factors, torch.tensor([min(1.0, threshold / size) for size in largest.tolist()], **float64))
    after = logits_of(layer, *inputs)
    close(after, factors[:, None, None] * before)
    same = factors == 1
    assert same.any() and not same.all() and torch.equal(after[:, same], before[:, same])
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, old[name])}
    assert changed <= {f"{proj}.{what}" for proj in ("in_proj", "context_proj") for what in ("weight", "bias")}
    q, k, _ = layer.layout.sizes
    values, start = (layer.in_proj, q + k) if context_dim is None else (layer.context_proj, k)
    name = "in_proj.weight" if context_dim is None else "context_proj.weight"
    assert torch.equal(values.weight[start:], old[name][start:])


def test_a_group_below_the_threshold_is_bitwise_untouched():
    layer = build()
    before = copy.deepcopy(layer)
    largest = torch.full((s.h,), 1.0, **float64)
    largest[0] = 100.0  # its group has a mild head, so the keys stay
    qk_clip_(layer, largest, 10.0)
    assert torch.equal(layer.in_proj.weight[s.d :], before.in_proj.weight[s.d :])
    close(layer.in_proj.weight[: s.d], 0.1 * before.in_proj.weight[: s.d])
    qk_clip_(before, torch.zeros(s.h, **float64), 10.0)  # logits of 0 need no clip


def test_a_head_at_the_threshold_is_bitwise_untouched():
    "Its factor is 1 exactly, though a number times its reciprocal often is not."
    layer = build()
    before, sizes = copy.deepcopy(layer.state_dict()), torch.linspace(0.1, 50.0, 300, **float64)
    assert any(size * (1 / size) != 1 for size in sizes)
    for size in sizes:
        assert (qk_clip_(layer, size.expand(s.h), size.item()) == 1).all()
    assert torch.equal(layer.in_proj.weight, before["in_proj.weight"])


def test_a_clip_under_a_rotation_is_exact():
    def rotate(q, k, *, offset):
        angle = torch.arange(q.shape[2], **float64)[:, None]
        turn = lambda t: torch.cat(
            [t[..., :4] * angle.cos() - t[..., 4:] * angle.sin(), t[..., :4] * angle.sin() + t[..., 4:] * angle.cos()],
            -1,
        )
        return turn(q), turn(k)

    layer, x = build(position=rotate), tokens()
    largest = largest_logits(layer, x, is_causal=True)
    qk_clip_(layer, largest, 1.0)
    close(largest_logits(layer, x, is_causal=True), largest.clamp(max=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_clip_in_low_precision_holds_to_its_rounding(dtype):
    layer, x = build(bias=False).to(dtype), tokens(size=5.0).to(dtype)
    largest = largest_logits(layer, x)
    qk_clip_(layer, largest, 2.0)
    assert layer.in_proj.weight.dtype == dtype
    assert (largest_logits(layer, x) <= 2.0 * (1 + 8 * torch.finfo(dtype).eps)).all()


def test_training_goes_on_after_a_clip():
    layer, x = build(), tokens()
    optimiser = torch.optim.AdamW(layer.parameters())
    for _ in range(3):
        optimiser.zero_grad()
        layer(x, is_causal=True).square().mean().backward()
        optimiser.step()
        qk_clip_(layer, largest_logits(layer, x, is_causal=True), 1.0)
        assert (largest_logits(layer, x, is_causal=True) <= 1.0 + 1e-9).all()
    assert all(p.requires_grad for p in layer.parameters())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def good():
    return torch.full((s.h,), 50.0, **float64)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize(
    "error, words, change",
    [
        (ValueError, ("qk_norm", "undoes"), dict(layer=lambda: build(qk_norm=nn.RMSNorm))),
        (TypeError, ("in_proj", "take off"), dict(layer=lambda: adapted("weight"))),
        (TypeError, ("in_proj", "take off"), dict(layer=lambda: adapted("bias"))),
        (TypeError, ("shares its weights",), dict(layer=lambda: tied())),
        (ValueError, ("threshold 1e-36", "1e+10"), dict(largest=torch.full((s.h,), 1e10), threshold=1e-36)),
        (TypeError, ("largest", "list"), dict(largest=[1.0])),
        (TypeError, ("largest", "int64"), dict(largest=torch.ones(s.h, dtype=torch.long))),
        (ValueError, ("(3,)", "(6,)"), dict(largest=torch.ones(3, **float64))),
        (ValueError, ("meta",), dict(largest=torch.ones(s.h, **float64, device="meta"))),
        (ValueError, ("finite", "nan"), dict(largest=torch.tensor([1, 2, 3, 4, 5, math.nan], **float64))),
        (ValueError, ("finite", "inf"), dict(largest=torch.tensor([1, 2, 3, 4, 5, math.inf], **float64))),
        (ValueError, ("not negative", "-1"), dict(largest=torch.tensor([1, 2, 3, 4, 5, -1], **float64))),
        (TypeError, ("threshold", "None"), dict(threshold=None)),
        (TypeError, ("threshold", "True"), dict(threshold=True)),
        (ValueError, ("threshold 0.0",), dict(threshold=0.0)),
        (ValueError, ("threshold -3",), dict(threshold=-3)),
        (ValueError, ("threshold inf",), dict(threshold=math.inf)),
        (ValueError, ("threshold nan",), dict(threshold=math.nan)),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(error, words, change):
    call = dict(layer=build, largest=good(), threshold=2.0) | change
    call["layer"] = layer = call["layer"]()
    before = copy.deepcopy(layer.state_dict())
    with refused(error, *words):
        qk_clip_(**call)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def adapted(name):
    layer = build()
    parametrize.register_parametrization(layer.in_proj, name, Doubled())
    return layer


def tied():
    layer = MultiHeadAttention(s.e, 2 * s.g, num_kv_heads=s.g, head_dim=s.d, context_dim=s.e, **float64)
    layer.context_proj.weight = layer.in_proj.weight
    return layer


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_that_is_wrong_is_noticed(name):
    layer, x = build(), tokens()
    before, largest = logits_of(layer, x), largest_logits(layer, x)
    factors = (largest.median() / largest).clamp(max=1.0)
    with torch.no_grad():
        CLIPS[name].apply(layer, factors)
    with pytest.raises(AssertionError):
        close(logits_of(layer, x), factors[:, None, None] * before)


# --- z-loss ----------------------------------------------------------------------------------------------------------


def test_z_loss_is_the_mean_over_rows_that_see_something():
    q, k, v = heads()
    mask = torch.rand(s.b, s.h, s.n, s.m) < 0.2
    mask[0, 0] = False
    out, lse = attention_with_lse(q.requires_grad_(), k, v, mask=mask)
    rows = [value for value in lse.flatten().tolist() if value > -math.inf]
    assert len(rows) < lse.numel()
    assert math.isclose(z_loss(lse).item(), sum(value**2 for value in rows) / len(rows), rel_tol=1e-12)
    z_loss(lse).backward()
    assert q.grad.isfinite().all() and (q.grad[0, 0] == 0).all() and q.grad.abs().max() > 0


def test_z_loss_has_the_gradient_that_differences_give():
    logits = torch.randn(3, 4, **float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: z_loss(t.logsumexp(-1)), logits)


def test_a_zero_z_loss_pulls_at_nothing():
    q, k, _ = heads()
    logits = attention_logits(q, k)
    logits = (logits - logits.logsumexp(-1, keepdim=True)).requires_grad_()
    z_loss(logits.logsumexp(-1)).backward()
    assert logits.grad.abs().max() < 1e-15


def test_z_loss_of_no_rows_is_0():
    assert z_loss(torch.empty(0, s.h, s.n)) == 0


def test_an_infinite_sink_is_no_sink():
    q, k, v = heads()
    for impl in "auto", "math", "sdpa":
        plug = SinkAttention(s.h, attend=partial(attention, impl=impl), **float64)
        nn.init.constant_(plug.sinks, -math.inf)
        close(plug(q, k, v), attention(q, k, v))
    close(attention_weights(q, k, sinks=plug.sinks), attention_weights(q, k))


def test_a_layer_may_have_its_output_computed_from_others():
    layer = build()
    parametrize.register_parametrization(layer.out_proj, "weight", Doubled())
    before = layer.in_proj.weight[: s.d].clone()
    qk_clip_(layer, good(), 25.0)
    close(layer.in_proj.weight[: s.d], before * 0.5**0.5)


def test_keys_and_queries_take_a_root_each_and_the_rest_goes_to_queries():
    layer = build(bias=False)
    before = layer.in_proj.weight.clone()
    largest = torch.tensor([40.0, 90.0, 10.0, 20.0, 5.0, 2.0], **float64)  # in groups of two
    factors = qk_clip_(layer, largest, 10.0)
    for i, factor in enumerate((1 / 4, 1 / 9, 1.0, 1 / 2, 1.0, 1.0)):
        rows, keys = layer.layout.rows("q", i), layer.layout.rows("k", i // 2)
        mildest = (1 / 4, 1.0, 1.0)[i // 2]
        close(factors[i].item(), factor)
        close(layer.in_proj.weight[keys], before[keys] * mildest**0.5)
        close(layer.in_proj.weight[rows], before[rows] * factor / mildest**0.5)


def test_a_clip_that_clips_nothing_leaves_a_pending_backward_alone():
    layer, x = build(), tokens()
    y = layer(x)
    factors = qk_clip_(layer, good(), 1e9)
    y.sum().backward()
    assert (factors == 1).all() and layer.in_proj.weight.grad.any()


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_under_autocast_the_largest_logit_is_that_of_float32(cast):
    layer = MultiHeadAttention(4, 1, bias=False)
    with torch.no_grad():
        layer.in_proj.weight.zero_()
        layer.in_proj.weight[0, 0], layer.in_proj.weight[4, 0] = 400.0, -400.0
    with torch.autocast("cpu", dtype=cast):
        size = largest_logits(layer, torch.ones(1, 1, 4))
    assert size.dtype == torch.float32 and size.item() == pytest.approx(80_000, rel=0.01)


@pytest.mark.parametrize("kind", [HeadTemperature, SinkAttention])
def test_plugs_hand_dropout_and_device_on(kind):
    seen = {}

    def attend(q, k, v, **options):
        seen.update(options)
        return q[..., :1] * v[:, :1, :1]

    there = kind(s.h, attend=attend, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in there.parameters()} == {("meta", torch.float64)}
    kind(s.h, attend=attend, **float64)(*heads(), dropout_p=0.25)
    assert seen["dropout_p"] == 0.25


def test_z_loss_of_halves_is_in_float32():
    assert z_loss(torch.full((2, 8), 300.0, dtype=torch.float16)) == 90_000


def test_gradient_report_sees_a_masked_head_behind_a_gate():
    layer, x, mask = build(finish=gate()), tokens(), torch.ones(s.h, s.n, s.n, dtype=torch.bool)
    mask[2] = False
    reasons = [row.reason for row in gradient_report(layer, lambda: layer(x, mask=mask).sum()).heads if row.head == 2]
    assert any("masked everywhere" in (reason or "") for reason in reasons)
