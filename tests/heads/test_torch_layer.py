"""Torch's own layer, keys that no mask hides, and what stands on a layer: the same numbers, or a refusal in words."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from mha_book import ExtraKeys, MultiHeadAttention, convert_mask, from_torch, to_torch
from mha_book.heads.single_head import causal_mask, plain_attention
from mha_book.instruments.testing import SIZES
from mha_book.kernels.backends import attention, window_mask
from mha_book.plugs.cache import KVCache
from mha_book.plugs.logits import SinkAttention
from mha_book.plugs.positions import ALiBi
from support.refusals import refused

s = SIZES
WIDE = s.h * s.d
EXTRA = pytest.mark.parametrize(
    "learned, zero", [(True, False), (False, True), (True, True)], ids=["learned", "zero", "both"]
)
float64 = dict(dtype=torch.float64)


def heads_of_tokens(h, n, width):
    return torch.randn(s.b, h, n, width, **float64)


def plug(learned, zero, **options):
    made = ExtraKeys(s.g, s.d, learned=learned, zero=zero, **float64, **options)
    for p in made.parameters():
        nn.init.normal_(p)
    return made


def seen(mask, n, m, extra):
    "Who may look where, after the extra keys, which all may see."
    mask = torch.ones(1, dtype=torch.bool) if mask is None else mask
    return torch.cat([torch.ones(s.b, s.h, n, extra, dtype=torch.bool), mask.expand(s.b, s.h, n, m)], dim=3)


def by_hand(extra, q, k, v, mask=None, bias=None, is_causal=False):
    "The definition: one query after the other over a list of keys that begins with the extra ones."
    n, m, r = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    y = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = [] if extra.bias_k is None else [(extra.bias_k[h // r], extra.bias_v[h // r], 0.0)]
        keys += [(q.new_zeros(q.shape[3]), q.new_zeros(v.shape[3]), 0.0)] if extra.zero else []
        for j in range(m):
            hidden = is_causal and j > m - n + i
            if not hidden and (mask is None or mask.expand(*q.shape[:3], m)[b, h, i, j]):
                added = 0.0 if bias is None else bias.expand(*q.shape[:3], m)[b, h, i, j]
                keys.append((k[b, h // r, j], v[b, h // r, j], added))
        weights = torch.stack([q[b, h, i] @ key / q.shape[3] ** 0.5 + added for key, _, added in keys]).softmax(0)
        y[b, h, i] = sum(weight * value for weight, (_, value, _) in zip(weights, keys))
    return y


MASKS = {
    "none": lambda n, m: None,
    "one for all keys": lambda n, m: torch.zeros(1, dtype=torch.bool),
    "no axes": lambda n, m: torch.tensor(False),
    "keys": lambda n, m: torch.arange(m) % 2 == 0,
    "queries": lambda n, m: torch.arange(n)[:, None] % 2 == 0,
    "all four": lambda n, m: torch.rand(s.b, s.h, n, m) < 0.4,
}


@EXTRA
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n, m", [(5, 7), (7, 7), (1, 7), (8, 7), (9, 7), (9, 2)])
@pytest.mark.parametrize("mask", MASKS)
def test_every_query_sees_the_extra_keys(learned, zero, is_causal, n, m, mask):
    torch.manual_seed(0)
    extra, mask = plug(learned, zero), MASKS[mask](n, m)
    q, k, v = heads_of_tokens(s.h, n, s.d), heads_of_tokens(s.g, m, s.d), heads_of_tokens(s.g, m, s.d)
    bias = torch.randn(s.h, 1, m, **float64)
    options = dict(mask=mask, bias=bias, is_causal=is_causal)
    torch.testing.assert_close(extra(q, k, v, **options), by_hand(extra, q, k, v, **options), atol=1e-12, rtol=0)


def test_values_may_have_a_width_of_their_own():
    extra = plug(True, True, value_dim=11)
    q, k, v = heads_of_tokens(s.h, s.n, s.d), heads_of_tokens(s.g, s.m, s.d), heads_of_tokens(s.g, s.m, 11)
    torch.testing.assert_close(extra(q, k, v), by_hand(extra, q, k, v), atol=1e-12, rtol=0)


@EXTRA
@pytest.mark.parametrize("width", [WIDE, 30])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["none", "causal", "mask", "padding", "both", "added"])
def test_torchs_layer_with_extra_keys_answers_the_same(learned, zero, width, bias, kind):
    "Outputs and the gradients of every weight, in training, both ways."
    torch.manual_seed(0)
    options = dict(add_bias_kv=learned, add_zero_attn=zero, bias=bias, kdim=width, vdim=width, batch_first=True)
    theirs = nn.MultiheadAttention(WIDE, s.h, **options, **float64)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours = from_torch(theirs)
    back = to_torch(ours)
    n = m = s.m
    x, context = torch.randn(s.b, n, WIDE, **float64), torch.randn(s.b, m, width, **float64)
    real = torch.arange(m) < torch.tensor([m, 3])[:, None]
    mask = {"causal": causal_mask(n, m), "mask": torch.rand(s.b, s.h, n, m) < 0.5}.get(kind.replace("both", "mask"))
    added = torch.randn(n, m, **float64) if kind == "added" else None
    padded = real if kind in ("padding", "both") else None
    given = dict(
        attn_mask=added if mask is None else convert_mask(mask, "mha_book", "torch", (s.b, s.h, n, m)),
        key_padding_mask=None if padded is None else ~padded,
    )
    own = dict(key_mask=padded, bias=added) | (dict(is_causal=True) if kind == "causal" else dict(mask=mask))
    wanted, got = theirs(x, context, context, **given)[0], ours(x, context, **own)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    assert torch.equal(back(x, context, context, **given)[0], wanted)
    upstream = torch.randn_like(wanted)
    got.backward(upstream)
    wanted.backward(upstream)
    if learned:
        for name in ("bias_k", "bias_v"):
            grad = getattr(theirs, name).grad.view(s.h, -1)
            torch.testing.assert_close(getattr(ours.attend, name).grad, grad, atol=1e-12, rtol=0)
            assert grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad, atol=1e-12, rtol=0)


@EXTRA
def test_there_and_back_nothing_is_lost_or_shared(learned, zero):
    theirs = nn.MultiheadAttention(WIDE, s.h, add_bias_kv=learned, add_zero_attn=zero, batch_first=True).eval()
    theirs.requires_grad_(False)
    before, state = copy.deepcopy(theirs.state_dict()), torch.get_rng_state()
    ours = from_torch(theirs)
    assert torch.equal(torch.get_rng_state(), state)  # no number was drawn
    assert {p.requires_grad for p in ours.parameters()} == {False} and not ours.attend.training
    back = to_torch(ours)
    assert {p.requires_grad for p in back.parameters()} == {False}
    assert back.add_zero_attn == zero and (back.bias_k is not None) == learned
    for p in ours.parameters():
        p.fill_(7)
    for module in (theirs, back):
        found = module.state_dict()
        assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)


def test_extra_keys_start_as_torchs():
    "The same spread, on whatever device they were made, and again after `reset_parameters`."
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(512, 8, add_bias_kv=True)
    made = ExtraKeys(8, 64, device="meta").to_empty(device="cpu")
    made.bias_k.data.fill_(9.0)
    made.reset_parameters()
    for ours in (ExtraKeys(8, 64), made):
        for name in ("bias_k", "bias_v"):
            ratio = getattr(ours, name).std().item() / getattr(theirs, name).std().item()
            assert ratio == pytest.approx(1, abs=0.2)


@EXTRA
def test_a_cache_does_not_hold_the_extra_keys(learned, zero):
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, attend=plug(learned, zero), **float64)
    x = torch.randn(s.b, s.m, s.e, **float64)
    whole, cache = layer(x, is_causal=True), KVCache(s.b, s.g, s.m, s.d, **float64)
    steps = [layer(part, is_causal=True, cache=cache) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-12, rtol=0)
    assert cache.seen.tolist() == [s.m] * s.b


def test_around_the_extra_keys_a_bias_is_counted_from_the_tokens():
    "A plug that adds a bias goes around them; and a window is a mask."
    extra = plug(True, True)
    q, k, v = heads_of_tokens(s.h, s.n, s.d), heads_of_tokens(s.g, s.m, s.d), heads_of_tokens(s.g, s.m, s.d)
    alibi = ALiBi(s.h, attend=extra)
    bias = alibi.bias(s.n, s.m, dtype=torch.float64)
    wanted = by_hand(extra, q, k, v, bias=bias, is_causal=True)
    torch.testing.assert_close(alibi(q, k, v, is_causal=True), wanted, atol=1e-12, rtol=0)
    mask = window_mask(s.n, s.m, 2)
    torch.testing.assert_close(extra(q, k, v, mask=mask), by_hand(extra, q, k, v, mask=mask), atol=1e-12, rtol=0)


def test_sinks_and_extra_keys_in_one():
    sinks = SinkAttention(s.h, attend=plug(True, False, attend=attention), **float64)
    q, k, v = heads_of_tokens(s.h, s.n, s.d), heads_of_tokens(s.g, s.m, s.d), heads_of_tokens(s.g, s.m, s.d)
    assert sinks(q, k, v).shape == (s.b, s.h, s.n, s.d)


def test_what_a_map_shows_of_the_extra_keys():
    "A key of zeros takes its share, a learned value has no column."
    x = torch.randn(s.b, s.m, s.e, **float64)
    layer = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, attend=plug(False, True), **float64)
    shown = layer.attention_map(x)
    q, k, v = layer.qkv(x)
    torch.testing.assert_close(shown @ v.repeat_interleave(2, 1), layer.attend(q, k, v), atol=1e-12, rtol=0)
    assert shown.shape == (s.b, s.h, s.m, s.m) and (shown.sum(-1) < 1).all()
    layer.attend = plug(True, False)
    for tokens in (x, torch.randn(s.b, s.d, s.e, **float64)):  # as many keys as a value is wide, too
        with pytest.raises(ValueError, match="attention_map"):
            layer.attention_map(tokens)


@pytest.mark.usefixtures("own_messages")
def test_extra_keys_compile_whole_and_on_meta():
    extra = ExtraKeys(s.g, s.d, zero=True)
    q, k, v = (t.float() for t in (heads_of_tokens(s.h, s.n, s.d), *[heads_of_tokens(s.g, s.m, s.d)] * 2))
    mask = torch.rand(s.b, 1, s.n, s.m) < 0.5
    compiled = torch.compile(extra, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask=mask), extra(q, k, v, mask=mask))
    there = ExtraKeys(s.g, s.d, zero=True, device="meta")
    assert there(*(t.to("meta") for t in (q, k, v)), is_causal=True).shape == q.shape


@pytest.mark.usefixtures("own_messages")
class TestRefusedOfExtraKeys:
    @pytest.mark.parametrize(
        "options, error, words",
        [
            (dict(num_kv_heads=0), ValueError, ["num_kv_heads", "0"]),
            (dict(head_dim=True), TypeError, ["head_dim", "True"]),
            (dict(value_dim=2.0), TypeError, ["value_dim", "2.0"]),
            (dict(learned=1), TypeError, ["learned", "1"]),
            (dict(zero="no"), TypeError, ["zero", "'no'"]),
            (dict(learned=False), ValueError, ["learned=False", "zero=False"]),
            (dict(attend=partial(attention, window=3)), ValueError, ["window", "mask="]),
        ],
    )
    def test_arguments(self, options, error, words):
        with refused(error, *words):
            ExtraKeys(**dict(num_kv_heads=s.g, head_dim=s.d) | options)

    def test_heads_and_widths_of_another_layer(self):
        q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 11)
        with refused(ValueError, "3 key heads of width 8", "6 of 8"):
            ExtraKeys(6, 8)(q, k, v)
        with refused(ValueError, "11", "8", "value_dim="):
            ExtraKeys(3, 8)(q, k, v)

    def test_masks_are_refused_in_the_shape_that_was_given(self):
        q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8)
        with refused(ValueError, "(5, 6)", "(2, 6, 5, 7)"):
            ExtraKeys(3, 8)(q, k, k, mask=torch.ones(5, 6, dtype=torch.bool))


# What stands on a layer


class Wrapped(nn.Module):
    "An adapter around a projection, which shows the weights of what it holds."

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.more(x)


class Subclassed(nn.Linear):
    "An adapter that is a linear map itself."

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.low = nn.Parameter(torch.ones(base.out_features, base.in_features))

    def forward(self, x):
        return super().forward(x) + x @ self.low.T


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_either_layer_are_not_lost(hook):
    for module, convert in (
        (MultiHeadAttention(WIDE, s.h), to_torch),
        (nn.MultiheadAttention(WIDE, s.h, batch_first=True), from_torch),
    ):
        handle = getattr(module, hook)(lambda *args: None)
        with pytest.raises(ValueError, match="hooks"):
            convert(module)
        handle.remove()
        convert(module)


def test_hooks_that_only_look_at_gradients_are_no_obstacle():
    "They change no output; a full backward hook is not carried."
    layer = MultiHeadAttention(WIDE, s.h)
    layer.register_full_backward_hook(lambda *args: None)
    x = torch.randn(s.b, s.n, WIDE)
    torch.testing.assert_close(to_torch(layer)(x, x, x)[0], layer(x))


THEIRS = {
    "weight norm": lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
    "weight norm of the output": lambda m: setattr(m, "out_proj", parametrizations.weight_norm(m.out_proj)),
    "pruned": lambda m: prune.l1_unstructured(m, "in_proj_weight", amount=0.5),
    "pruned output": lambda m: prune.l1_unstructured(m.out_proj, "weight", amount=0.5),
    "wrapped output": lambda m: setattr(m, "out_proj", Wrapped(m.out_proj)),
    "adapted output": lambda m: setattr(m, "out_proj", Subclassed(m.out_proj)),
}


@pytest.mark.parametrize("change", THEIRS)
def test_weights_of_torchs_layer_that_are_computed_are_refused(change):
    theirs = nn.MultiheadAttention(WIDE, s.h, batch_first=True)
    THEIRS[change](theirs)
    with pytest.raises(ValueError, match="computed|hooks|forward of its own"):
        from_torch(theirs)


class OwnExtraKeys(ExtraKeys):
    def forward(self, q, k, v, **options):
        return 2 * super().forward(q, k, v, **options)


@pytest.mark.parametrize(
    "attend",
    [OwnExtraKeys(s.h, s.d), ExtraKeys(s.h, s.d, attend=ALiBi(s.h)), ExtraKeys(s.h, s.d, attend=attention)],
    ids=["subclass", "ALiBi", "attention"],
)
def test_a_plug_that_torch_has_not_is_refused(attend):
    with pytest.raises(ValueError, match="attend"):
        to_torch(MultiHeadAttention(WIDE, s.h, attend=attend))


def test_the_definition_may_be_inside():
    layer, x = (
        MultiHeadAttention(WIDE, s.h, attend=ExtraKeys(s.h, s.d, attend=plain_attention)),
        torch.randn(2, 5, WIDE),
    )
    torch.testing.assert_close(to_torch(layer)(x, x, x)[0], layer(x))
