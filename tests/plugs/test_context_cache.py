"""Keys of a context are made once, and each call gives what it gives with the context."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mha_book.heads.layer import Cache, MultiHeadAttention, commit_once
from mha_book.kernels.backends import attention
from mha_book.plugs import cache as module
from mha_book.plugs.cache import ContextCache, KVCache
from mha_book.plugs.positions import ALiBi
from support.caches import ROPE, close, float64, s
from support.refusals import refused

CONTEXT = 19  # its width, where it has one of its own
LAYERS = {
    "one matrix": {},
    "its own width": dict(context_dim=CONTEXT),
    "heads apart": dict(num_kv_heads=s.h),
    "one key head": dict(num_kv_heads=1, context_dim=CONTEXT),
    "norms": dict(qk_norm=nn.RMSNorm),
    "RoPE": dict(position=ROPE()),
    "RoPE, norms, its own width": dict(position=ROPE(), qk_norm=nn.RMSNorm, context_dim=CONTEXT),
    "softcap": dict(attend=partial(attention, softcap=2.0)),
    "ALiBi": dict(attend=ALiBi(s.h)),
    "no bias": dict(bias=False),
}


def made(name="one matrix"):
    torch.manual_seed(1)
    options = dict(num_kv_heads=s.g, head_dim=s.d) | LAYERS[name]
    layer = MultiHeadAttention(s.e, s.h, **float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(name="one matrix", rows=s.b, n=s.n):
    torch.manual_seed(2)
    width = LAYERS[name].get("context_dim", s.e)
    return torch.randn(rows, n, s.e, **float64), torch.randn(rows, s.m, width, **float64)


PADDING = torch.tensor([[True] * s.m, [False, True, True, False, True, True, False]])


def check_steps(name="one matrix", key_mask=None, new=ContextCache, again=False):
    layer, kept, (x, context) = made(name), new(), inputs(name)
    keys = dict(key_mask=key_mask)
    for i, piece in enumerate(x.split((1, 3, 1), dim=1)):
        given, options = (context, keys) if again or not i else (None, {})
        look = layer.attention_map(piece, given, cache=kept, **options)
        close(look, layer.attention_map(piece, context, **keys))
        close(layer(piece, given, cache=kept, **options), layer(piece, context, **keys))
    assert kept.seen.tolist() == [s.m] * s.b


@torch.no_grad()
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("key_mask", [None, PADDING], ids=["all real", "padded"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_call_is_the_call_with_the_context(name, key_mask, again):
    check_steps(name, key_mask, again=again)


@torch.no_grad()
@pytest.mark.parametrize("name", ["one matrix", "its own width", "RoPE"])
def test_values_may_have_an_input_of_their_own(own_messages, name):
    layer, kept, (x, context) = made(name), ContextCache(), inputs(name)
    value = torch.randn_like(context)
    first, *rest = x.split(1, dim=1)
    close(layer(first, context, value=value, cache=kept), layer(first, context, value=value))
    for token in rest:
        close(layer(token, cache=kept), layer(token, context, value=value))
        close(layer(token, context, value=value, cache=kept), layer(token, context, value=value))
    for others in dict(value=value + 1), dict(value=None), dict(context=context + 1, value=value):
        with refused(ValueError, "another context (or value)", "reset"):
            layer(first, cache=kept, **dict(context=context) | others)
    kept.reorder(torch.tensor([1, 0, 1]))
    rows = torch.tensor([1, 0, 1])
    close(layer(x[rows], cache=kept), layer(x[rows], context[rows], value=value[rows]))
    with refused(ValueError, "another context (or value)"):
        layer(x[rows], value=value, cache=kept)


@torch.no_grad()
def test_the_context_is_projected_once():
    layer, kept, (x, context) = made("its own width"), ContextCache(), inputs("its own width")
    seen = []
    layer.context_proj.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    for token in x.split(1, dim=1):
        layer(token, context, cache=kept)
    assert seen == [s.m] + [0] * (s.n - 1)


def test_gradients_of_all_steps_reach_the_context():
    (x, context), layer = inputs("RoPE"), made("RoPE")
    leaves, kept = [x.requires_grad_(), context.requires_grad_(), *layer.parameters()], ContextCache()
    loss = sum(layer(t, context, key_mask=PADDING).square().sum() for t in x.split(1, dim=1))
    wanted = torch.autograd.grad(loss, leaves)
    first, *rest = x.split(1, dim=1)
    loss = layer(first, context, key_mask=PADDING, cache=kept).square().sum()
    loss = loss + sum(layer(t, cache=kept).square().sum() for t in rest)
    for got, right in zip(torch.autograd.grad(loss, leaves), wanted):
        torch.testing.assert_close(got, right, atol=1e-10, rtol=1e-12)


@torch.no_grad()
def test_a_decoder_of_both_kinds_of_attention_steps_and_takes_drafts_back():
    own, cross, (x, context) = made("RoPE"), made(), inputs()
    caches = KVCache(s.b, s.g, 9, s.d, **float64), ContextCache()

    def step(tokens, first):
        with commit_once(*caches):
            y = tokens + own(tokens, is_causal=True, cache=caches[0])
            return cross(y, context if first else None, cache=caches[1])

    y = x + own(x, is_causal=True)
    whole = cross(y, context)
    close(step(x[:, :2], True), whole[:, :2])
    step(torch.randn(s.b, 2, s.e, **float64), False)
    for cache in caches:
        cache.crop(2)
    close(step(x[:, 2:], False), whole[:, 2:])
    beams = torch.tensor([1, 1, 0])
    for cache in caches:
        cache.reorder(beams)
    token = torch.randn(3, 1, s.e, **float64)
    y = torch.cat([x[beams], token], dim=1)
    y = y + own(y, is_causal=True)
    close(step(token, False), cross(y, context[beams])[:, -1:])
    for cache in caches:
        cache.crop(torch.zeros(3).long())
    assert caches[1].k is None and caches[1].seen == 0


@torch.no_grad()
def test_a_block_that_fails_keeps_no_context():
    layer, kept, (x, context) = made(), ContextCache(), inputs()
    with pytest.raises(ZeroDivisionError), commit_once(kept):
        layer(x, context, cache=kept)
        raise ZeroDivisionError
    assert kept.k is None and kept.context is None
    small = KVCache(s.b, s.g, 2, s.d, **float64)
    small.append(*torch.zeros(2, s.b, s.g, 1, s.d, **float64))

    class Fails(KVCache):
        def commit(self):
            raise MemoryError

    broken = Fails(s.b, s.g, 9, s.d, **float64)
    with pytest.raises(MemoryError), commit_once(kept, broken):
        layer(x, context, cache=kept)
        made("no bias")(x, cache=broken)
    assert kept.k is None
    close(layer(x, context, cache=kept), layer(x, context))


@torch.no_grad()
def test_copies_keep_the_context_and_a_reset_forgets_it():
    layer, kept, (x, context) = made(), ContextCache(), inputs()
    layer(x[:, :1], context, key_mask=PADDING, cache=kept)
    copied, mask = copy.deepcopy(kept), dict(key_mask=PADDING)
    kept.reset()
    close(layer(x, cache=copied), layer(x, context, **mask))
    close(layer(x, context * 2, cache=kept), layer(x, context * 2))
    assert isinstance(kept, Cache)
    assert repr(kept) == f"ContextCache(keys of {(s.b, s.g, s.m, s.d)})" and "nothing" in repr(ContextCache())


@torch.no_grad()
def test_half_precision_and_a_mask_of_the_call():
    layer, kept, (x, context) = made().bfloat16(), ContextCache(), (t.bfloat16() for t in inputs())
    mask = torch.rand(s.b, 1, s.n, s.m) < 0.6
    layer(x, context, cache=kept)
    assert torch.equal(layer(x, mask=mask, cache=kept), layer(x, context, mask=mask))
    assert torch.equal(layer(x, key_mask=PADDING, cache=kept), layer(x, context, key_mask=PADDING))
    assert kept.k.dtype == torch.bfloat16 and kept.key_mask is None


def used():
    layer, kept, (x, context) = made(), ContextCache(), inputs()
    layer(x, context, cache=kept)
    return layer, kept, x, context


REFUSED = {
    "no context": (lambda layer, kept, x, c: layer(x, cache=ContextCache()), ValueError, ("first call", "context")),
    "another context": (
        lambda layer, kept, x, c: layer(x, c + 1, cache=kept),
        ValueError,
        ("another context", "reset"),
    ),
    "a longer one": (
        lambda layer, kept, x, c: layer(x, torch.cat([c, c], 1), cache=kept),
        ValueError,
        ("another context", "14"),
    ),
    "in other bits": (lambda layer, kept, x, c: layer(x, c.float(), cache=kept), ValueError, ("another context",)),
    "elsewhere": (lambda layer, kept, x, c: layer(x, c.to("meta"), cache=kept), ValueError, ("another context",)),
    "other rows": (lambda layer, kept, x, c: layer(x[:1], cache=kept), ValueError, ("batch differs", "cache 2", "x 1")),
    "a key_mask of the text": (
        lambda layer, kept, x, c: layer(x, key_mask=torch.ones(s.b, s.n).bool(), cache=kept),
        ValueError,
        ("key_mask", f"({s.b}, {s.m})"),
    ),
    "another layer": (lambda layer, kept, x, c: made("norms")(x * 2, cache=kept), ValueError, ("another layer",)),
    "keys twice": (
        lambda layer, kept, x, c: kept.append(kept.k, kept.v),
        ValueError,
        ("kept already", "7", "reset"),
    ),
    "by hand": (
        lambda layer, kept, x, c: ContextCache().append(*torch.zeros(2, s.b, s.g, 3, s.d, **float64)),
        RuntimeError,
        ("filled by a layer",),
    ),
    "nothing to commit": (lambda layer, kept, x, c: kept.commit(), RuntimeError, ("append",)),
    "rows that are not there": (lambda layer, kept, x, c: kept.reorder(torch.tensor([2])), IndexError, ("0 to 1",)),
    "rows of nothing": (
        lambda layer, kept, x, c: ContextCache().reorder(torch.tensor([0])),
        ValueError,
        ("no rows yet",),
    ),
    "rows as a list": (lambda layer, kept, x, c: kept.reorder([0]), TypeError, ("rows", "int64")),
    "a length with a point": (lambda layer, kept, x, c: kept.crop(0.0), TypeError, ("length", "0.0")),
    "below 0": (lambda layer, kept, x, c: kept.crop(-1), ValueError, ("length", "0 or more")),
    "a cache of texts": (
        lambda layer, kept, x, c: layer(x, c, cache=KVCache(s.b, s.g, 9, s.d, **float64)),
        ValueError,
        ("keeps the keys of x", "ContextCache"),
    ),
    "for all layers": (
        lambda layer, kept, x, c: commit_once(kept, kept).__enter__(),
        ValueError,
        ("one and the same",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(own_messages, name):
    call, error, words = REFUSED[name]
    layer, kept, x, context = used()
    with torch.no_grad():
        with refused(error, *words):
            call(layer, kept, x, context)
        close(layer(x, cache=kept), layer(x, context))


def test_a_call_that_is_run_again_is_refused():
    layer, kept, (x, context) = made(), ContextCache(), inputs()
    y = checkpoint(lambda x: layer(x, context, cache=kept), x.requires_grad_(), use_reentrant=False)
    with refused(RuntimeError, "backward pass"):
        y.sum().backward()


COMPILED = """
import torch
from mha_book import ContextCache, MultiHeadAttention, RoPE

torch.set_grad_enabled(False)
layer = MultiHeadAttention(16, 2, position=RoPE(8), dtype=torch.float64).eval()
made = []
step = torch.compile(layer, backend=lambda graph, inputs: made.append(graph) or graph.forward, fullgraph=True)
x, context = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
for given in context, None:
    kept = ContextCache()
    layer(x, context, cache=kept)
    for token in x.split(1, dim=1):
        torch.testing.assert_close(step(token, given, cache=kept), layer(token, context), atol=1e-12, rtol=0)
assert len(made) <= 4, len(made)
"""


def test_a_compiled_step_reads_it():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- planted faults -------------------------------------------------------------------------------------------------


class MakesThemAgain(ContextCache):
    "Forgets what it has."

    def commit(self):
        super().commit()
        self.k, self.v = torch.zeros_like(self.k), self.v


class LosesThePadding(ContextCache):
    def commit(self):
        super().commit()
        self.key_mask = None


class CountsTheText(ContextCache):
    "Says that the queries' places are those of the text."

    seen = property(lambda self: 0 if self.k is None else torch.zeros(s.b).long())


class TakesAnyContext(ContextCache):
    def ask(self, context):
        return super().ask(context if self.k is None else None)


FAULTS = {
    "forgets what it has": lambda: check_steps(new=MakesThemAgain),
    "loses the padding": lambda: check_steps(key_mask=PADDING, new=LosesThePadding),
    "places by the text": lambda: check_steps("RoPE", new=CountsTheText),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FAULTS)
def test_a_cache_with_a_fault_is_noticed(name):
    with pytest.raises(AssertionError):
        FAULTS[name]()


def test_one_that_takes_any_context_is_noticed(own_messages, monkeypatch):
    monkeypatch.setattr(module, "_check_context", lambda *args: None)
    with pytest.raises(BaseException):  # noqa: B017 pytest's own failure is no Exception
        test_what_does_not_fit_is_refused_and_changes_nothing(None, "another context")


def test_what_is_kept_is_a_copy():
    "A buffer that is filled anew is another context, and a mask that changes later hides nothing."
    layer, kept, (x, context) = made("its own width"), ContextCache(), inputs("its own width")
    mask, meant = torch.ones(s.b, s.m, dtype=torch.bool), layer(x, context)
    layer(x, context, key_mask=mask, cache=kept)
    mask[0, 2:] = False
    close(layer(x, context, cache=kept), meant)
    context.copy_(torch.randn_like(context))
    with refused(ValueError, "another context", "reset()"):
        layer(x, context, cache=kept)
    close(layer(x, cache=kept), meant)


@pytest.mark.usefixtures("own_messages")
@pytest.mark.parametrize("wrong", [None, 1.5, True, -1])
def test_a_length_is_none_before_the_first_call_either(wrong):
    with pytest.raises((TypeError, ValueError), match="length"):
        ContextCache().crop(wrong)
    ContextCache().crop(2**70)
