"""Rows come and go, and no other row's numbers change."""

import copy

import pytest
import torch
from torch import nn

from mha_book.heads.layer import MultiHeadAttention, commit_once
from mha_book.plugs.cache import KVCache
from mha_book.plugs.paged import BlockPool, PagedCache
from support.caches import ROLLING, ROPE, build, cache_for, close, float64, new, rolling_mask, s, scattered, serve
from support.mutants_caches import SLAB_ROWS
from support.refusals import refused


def slab(rows, max_len=40, **options):
    return cache_for(rows, max_len, **options)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rolling", ROLLING)
@pytest.mark.parametrize("seed", range(6))
def test_in_a_running_batch_each_row_is_the_row_alone(rolling, seed, grad):
    options = ROLLING[rolling]
    layer = build(ROPE(), qk_norm=nn.RMSNorm)
    with torch.set_grad_enabled(grad):
        serve(layer, lambda rows: slab(rows, 12 if options else 40, **options), seed, **options)


@torch.no_grad()
def check_rows_of_all_lengths(kind=KVCache):
    "Named forms of what is drawn above."
    layer, x = build(ROPE()), torch.randn(4, 9, s.e, **float64)
    for options in ROLLING.values():
        for mine, theirs in ((3, 3), (4, 1), (1, 4), (5, 0), (0, 2)):
            cache, other = (cache_for(2, 30, kind=kind, **options) for _ in range(2))
            for kept, rows, n in ((cache, x[:2], mine), (other, x[2:], theirs)):
                if n:
                    layer(rows[:, :n], is_causal=True, cache=kept)
            cache.join(other)
            assert cache.seen.tolist() == [mine] * 2 + [theirs] * 2 and other.seen.tolist() == [0, 0]
            rows = [torch.cat([x[r, :n], x[r, 5:7]]) for r, n in enumerate((mine, mine, theirs, theirs))]
            y = layer(x[:, 5:7], is_causal=True, cache=cache)
            for r, row in enumerate(rows):
                mask = rolling_mask(len(row), **options)
                close(y[r], layer(row[None], mask=mask, is_causal=True)[0, -2:])
            cache.drop(torch.tensor([0, 2]))
            forked = cache.fork(torch.tensor([1, 0, 1]))
            assert cache.seen.tolist() == [mine + 2, theirs + 2]
            for kept, chosen in ((forked, (3, 1, 3)), (cache, (1, 3))):
                y = layer(x[list(chosen), 7:8], is_causal=True, cache=kept)
                for r, place in enumerate(chosen):
                    row = torch.cat([rows[place], x[place, 7:8]])
                    close(y[r], layer(row[None], mask=rolling_mask(len(row), **options), is_causal=True)[0, -1:])


def test_rows_of_all_lengths():
    check_rows_of_all_lengths()


@torch.no_grad()
def check_room(kind=KVCache):
    "What the longest row took is free when it is gone."
    for leave in (
        lambda cache: cache.drop(torch.tensor([0])),
        lambda cache: cache.reorder(torch.tensor([1])),
        lambda cache: cache.crop(torch.tensor([1, 1])),
    ):
        cache = cache_for(2, 8, kind=kind)
        cache.append(new(n=6), new(n=6), torch.tensor([[True] * 6, [True] + [False] * 5]))
        cache.commit()
        leave(cache)
        rows = len(cache.seen)
        assert not cache.ragged and cache.slots.length == 1
        k, _, mask = cache.append(new(rows, n=7), new(rows, n=7))
        cache.commit()
        assert mask is None and cache.seen.tolist() == [8] * rows


def test_the_longest_rows_slots_are_free_when_it_is_gone():
    check_room()


@torch.no_grad()
def check_copies(kind=KVCache):
    layer, cache, x = build(ROPE()), cache_for(2, 12, kind=kind), torch.randn(2, 9, s.e, **float64)
    layer(x[:, :3], is_causal=True, cache=cache)
    for copied in copy.copy(cache), copy.deepcopy(cache), cache.fork(torch.arange(2)):
        assert copied.k.data_ptr() != cache.k.data_ptr()
        layer(-x[:, :2], is_causal=True, cache=copied)  # and what one writes, the other never sees
        assert copied.seen.tolist() == [5, 5] and cache.seen.tolist() == [3, 3]
    close(layer(x[:, 3:], is_causal=True, cache=cache), layer(x, is_causal=True)[:, 3:])


def test_a_copy_has_memory_of_its_own():
    check_copies()


@torch.no_grad()
def test_a_fork_in_a_step_leaves_the_step_as_it_is():
    layer, cache, x = build(ROPE()), cache_for(2, 12), torch.randn(2, 6, s.e, **float64)
    layer(x[:, :2], is_causal=True, cache=cache)
    with commit_once(cache):
        layer(x[:, 2:4], is_causal=True, cache=cache)
        forked = cache.fork(torch.tensor([1, 0]))
        assert forked.seen.tolist() == [2, 2]
        y = layer(x[[1, 0], 2:4], is_causal=True, cache=forked)
    assert cache.seen.tolist() == forked.seen.tolist() == [4, 4]
    close(y, layer(x[[1, 0], :4], is_causal=True)[:, 2:])
    close(layer(x[:, 4:], is_causal=True, cache=cache), layer(x, is_causal=True)[:, 4:])


@torch.no_grad()
def test_what_was_appended_is_forgotten():
    cache, other = cache_for(2, 8), cache_for(2, 8)
    for kept in cache, other:
        kept.append(new(n=2), new(n=2))
        kept.commit()
    for change in (
        lambda: cache.join(other),
        lambda: cache.drop(torch.tensor([1])),
        lambda: cache.fork(torch.tensor([0, 2])).commit(),
    ):
        rows = len(cache.seen)
        cache.append(new(rows), new(rows))
        other.append(new(), new())
        with refused(RuntimeError, "append comes first"):
            change()
            cache.commit()
    cache.join(other)
    with refused(RuntimeError, "append comes first"):
        other.commit()


def test_inference_mode_joins_what_was_made_outside():
    layer, x = build(ROPE()), torch.randn(3, 4, s.e, **float64)
    cache, other = cache_for(2, 8), cache_for(1, 8)
    with torch.inference_mode():
        layer(x[:2, :3], is_causal=True, cache=cache)
        layer(x[2:, :2], is_causal=True, cache=other)
        cache.join(other)
        cache.drop(torch.tensor([0]))
    y = layer(x[1:, 3:], is_causal=True, cache=cache)
    close(y[0], layer(x[1:2], is_causal=True)[0, 3:])
    close(y[1], layer(x[2:, [0, 1, 3]], is_causal=True)[0, 2:])


# --- writing at given places ----------------------------------------------------------------------------------------

CACHES = {
    "slab": lambda: KVCache(3, s.g, 20, s.d, **float64),
    "blocks": lambda: PagedCache(BlockPool(40, 3, s.g, s.d, **float64), 3),
}


@torch.no_grad()
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_crop_and_a_call_write_at_given_places(make):
    layer, cache = build(ROPE()), make()
    buffers = torch.full((2, 3, s.g, 20, s.d), float("nan"), **float64)
    for n, indices in ((5, (0, 0, 0)), (2, (5, 3, 1)), (1, (2, 5, 0)), (3, (3, 6, 1)), (4, (0, 9, 4)), (1, (4, 2, 0))):
        x = torch.randn(3, n, s.e, **float64)
        cache.crop(torch.tensor(indices))
        close(layer(x, is_causal=True, cache=cache), scattered(layer, buffers, x, indices))
        assert cache.seen.tolist() == [i + n for i in indices]


# --- what is refused ------------------------------------------------------------------------------------------------


def filled(rows=s.b, n=2, g=s.g, d=s.d, dtype=torch.float64, **options):
    cache = KVCache(rows, g, options.pop("max_len", 8), d, dtype=dtype, **options)
    cache.append(*torch.zeros(2, rows, g, n, d, dtype=dtype))
    cache.commit()
    return cache


def of_another_layer():
    "Rows of a layer that lives."
    torch.manual_seed(6)
    layer, cache = MultiHeadAttention(s.e, s.h, num_kv_heads=s.g, head_dim=s.d, **float64), filled()
    cache.reset()
    layer(torch.randn(s.b, 2, s.e, **float64), cache=cache)
    cache.layer = layer
    return cache


def two_layers():
    of_another_layer().join(of_another_layer())


REFUSED = {
    "join, no cache": (lambda c: c.join(c.k), TypeError, ("KVCache", "Tensor")),
    "join, blocks": (lambda c: c.join(CACHES["blocks"]()), TypeError, ("KVCache", "PagedCache")),
    "join, a list": (lambda c: c.join([filled()]), TypeError, ("KVCache", "list")),
    "join, itself": (lambda c: c.join(c), ValueError, ("itself", "reorder")),
    "join, heads": (lambda c: c.join(filled(g=6)), ValueError, ("heads differs", "3", "6")),
    "join, width": (lambda c: c.join(filled(d=9)), ValueError, ("head_dim differs", "8", "9")),
    "join, values": (
        lambda c: c.join(KVCache(1, s.g, 8, s.d, value_dim=9, **float64)),
        ValueError,
        ("value_dim differs", "8", "9"),
    ),
    "join, dtype": (lambda c: c.join(filled(dtype=torch.half)), ValueError, ("dtype differs", "float64", "float16")),
    "join, device": (
        lambda c: c.join(KVCache(1, s.g, 8, s.d, device="meta", **float64)),
        ValueError,
        ("device differs", "cpu", "meta"),
    ),
    "join, window": (lambda c: c.join(filled(window=4)), ValueError, ("window differs", "None", "4")),
    "join, first tokens": (
        lambda c: filled(window=4).join(filled(window=4, keep_first=1)),
        ValueError,
        ("keep_first differs", "0", "1"),
    ),
    "join, longer": (lambda c: c.join(filled(n=9, max_len=9)), ValueError, ("cache full", "9", "8", "max_len")),
    "join, two layers": (lambda c: two_layers(), ValueError, ("another layer", "deepcopy")),
    "drop, a row twice": (lambda c: c.drop(torch.tensor([1, 1])), ValueError, ("[1, 1]", "twice")),
    "drop, all": (lambda c: c.drop(torch.tensor([1, 0])), ValueError, ("all that there are", "reset")),
    "drop, not there": (lambda c: c.drop(torch.tensor([2])), IndexError, ("0 to 1",)),
    "drop, below 0": (lambda c: c.drop(torch.tensor([-1])), IndexError, ("0 to 1",)),
    "drop, none": (lambda c: c.drop(torch.zeros(0).long()), ValueError, ("at least one",)),
    "drop, a list": (lambda c: c.drop([0]), TypeError, ("rows", "int64")),
    "drop, a number": (lambda c: c.drop(0), TypeError, ("rows", "int64")),
    "drop, bools": (lambda c: c.drop(torch.tensor([True, False])), TypeError, ("rows", "bool")),
    "drop, numpy": (lambda c: c.drop(torch.tensor([0]).numpy()), TypeError, ("rows", "int64")),
    "drop, floats": (lambda c: c.drop(torch.tensor([0.0])), TypeError, ("rows", "float32")),
    "drop, elsewhere": (lambda c: c.drop(torch.tensor([0], device="meta")), ValueError, ("device differs", "meta")),
    "fork, not there": (lambda c: c.fork(torch.tensor([0, 2])), IndexError, ("0 to 1",)),
    "fork, bools": (lambda c: c.fork(torch.tensor([True, False])), TypeError, ("rows", "bool")),
    "fork, a list": (lambda c: c.fork([0]), TypeError, ("rows", "int64")),
    "fork, a length with a point": (lambda c: c.fork(torch.tensor([0]), 1.0), TypeError, ("length", "1.0")),
    "fork, a length that is a bool": (lambda c: c.fork(torch.tensor([0]), True), TypeError, ("length", "bool")),
    "fork, below 0": (lambda c: c.fork(torch.tensor([0]), -1), ValueError, ("length", "0 or more")),
    "fork, lengths of other rows": (
        lambda c: c.fork(torch.tensor([0, 1, 0]), torch.tensor([1, 1])),
        ValueError,
        ("length", "(2,)", "(3,)"),
    ),
    "fork, numpy": (lambda c: c.fork(torch.tensor([0]), torch.tensor([1]).numpy()), TypeError, ("length",)),
    "reorder, bools": (lambda c: c.reorder(torch.tensor([True, False])), TypeError, ("rows", "bool")),
    "reorder, numpy": (lambda c: c.reorder(torch.tensor([0]).numpy()), TypeError, ("rows",)),
    "crop, numpy": (lambda c: c.crop(torch.tensor([0, 0]).numpy()), TypeError, ("length",)),
    "crop, bools": (lambda c: c.crop(torch.tensor([True, False])), TypeError, ("length", "bool")),
    "crop, nothing": (lambda c: c.crop(None), TypeError, ("length", "None")),
    "append, numpy": (
        lambda c: c.append(new().numpy(), new().numpy()),
        TypeError,
        ("k must be", "numpy"),
    ),
    "append, values in numpy": (lambda c: c.append(new(), new().numpy()), TypeError, ("v must be", "numpy")),
    "append, a list": (lambda c: c.append([1.0], [1.0]), TypeError, ("k must be a torch.Tensor", "list")),
    "append, a mask in numpy": (
        lambda c: c.append(new(), new(), torch.ones(s.b, 1).bool().numpy()),
        TypeError,
        ("key_mask must be", "numpy"),
    ),
    "commit twice": (
        lambda c: (c.append(new(n=0), new(n=0)), c.commit(), c.commit()),
        RuntimeError,
        ("append comes first",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(own_messages, name):
    call, error, words = REFUSED[name]
    cache = filled()
    before = cache.k[:, :, :2].clone(), cache.start, cache.end, cache.ragged, cache.seen.tolist()
    with refused(error, *words):
        call(cache)
    after = cache.k[:, :, :2], cache.start, cache.end, cache.ragged, cache.seen.tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


# --- planted faults -------------------------------------------------------------------------------------------------


def check_all():
    for options in {}, dict(window=3), dict(window=2, keep_first=2):
        for seed in range(3):
            with torch.no_grad():
                serve(build(ROPE()), lambda rows: slab(rows, 12 if options else 40, **options), seed, **options)  # noqa: B023
    check_rows_of_all_lengths()
    check_room()
    check_copies()
    for name in "join, window", "join, longer", "join, two layers", "drop, a row twice":
        test_what_does_not_fit_is_refused_and_changes_nothing(None, name)


def test_the_short_form_passes_without_a_fault(own_messages):
    check_all()


@pytest.mark.parametrize("name", SLAB_ROWS)
def test_a_cache_with_a_fault_is_noticed(own_messages, monkeypatch, name):
    SLAB_ROWS[name].plant(monkeypatch)
    with pytest.raises(BaseException) as noticed:
        check_all()
    assert not isinstance(noticed.value, (NameError, SyntaxError)), noticed.value
