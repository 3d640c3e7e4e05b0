"""Blocks give the numbers of the slab; no block is lost, written twice, or seen by a row that has no part in it."""

import copy
import inspect
import types
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import (
    ATTENDS,
    CUTS,
    POSITIONS,
    REFUSED,
    ROPE,
    assert_same,
    build,
    failing,
    float64,
    new,
    pieces,
    s,
    texts,
)

import mha_book.plugs.paged
from mha_book.plugs.cache import KVCache
from mha_book.plugs.paged import BlockPool, PagedCache
from support.refusals import refused

settings.register_profile("book", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("book")


def pool_of(num_blocks=60, block_size=3, pools=BlockPool):
    return pools(num_blocks, block_size, s.g, s.d, **float64)


def assert_no_block_is_lost(pool, *caches):
    "Every block is counted as often as it stands in tables, and free where that is never."
    standing = Counter(block for cache in caches for table in cache.tables for block in table)
    assert pool.counts == [standing[block] for block in range(len(pool.counts))]
    assert sorted(pool.free) == [block for block, count in enumerate(pool.counts) if count == 0]
    for cache in caches:
        for table, length in zip(cache.tables, cache.lengths):
            assert len(table) == -(-length // pool.block_size)


@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("position", POSITIONS)
@given(data=st.data())
def test_any_cut_gives_what_each_row_gives_alone(position, attend, data):
    cut = data.draw(texts(pieces(padded=data.draw(st.booleans()))))
    pool = pool_of(block_size=data.draw(st.integers(1, 5)))
    cache = PagedCache(pool, s.b)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        assert_same(build(POSITIONS[position], ATTENDS[attend]()), cut, cache)
    assert_no_block_is_lost(pool, cache)


@torch.no_grad()
def check_beside_the_slab(cached=PagedCache, pools=BlockPool):
    for cut in CUTS.values():
        pool, layer = pool_of(pools=pools), build(ROPE())
        cache = cached(pool, s.b)
        assert_same(layer, cut, cache)
        assert_no_block_is_lost(pool, cache)
        cache.reset()
        assert_no_block_is_lost(pool)
        assert cache.seen.tolist() == [0] * s.b


@torch.no_grad()
def check_forks(cached=PagedCache, pools=BlockPool, seed=0):
    "Rows that share, split, die and go on, beside a slab that copies."
    generator = torch.Generator().manual_seed(seed)
    for block_size in 1, 3, 4:
        pool, layer = pool_of(200, block_size, pools), build(ROPE())
        cache, slab = cached(pool, s.b), KVCache(s.b, s.g, 60, s.d, **float64)
        for step in range(14):
            rows, width = len(cache.tables), int(torch.randint(1, 5, (), generator=generator))
            real = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
            x = torch.randn(rows, width, s.e, **float64, generator=generator)
            got, wanted = (layer(x, key_mask=real, is_causal=True, cache=c) for c in (cache, slab))
            torch.testing.assert_close(got[real], wanted[real], atol=1e-12, rtol=0)
            assert_no_block_is_lost(pool, cache)
            if step % 2:
                chosen = torch.randint(rows, (int(torch.randint(1, 5, (), generator=generator)),), generator=generator)
                cache.reorder(chosen)
                slab.reorder(chosen)
                assert_no_block_is_lost(pool, cache)
                assert cache.seen.tolist() == slab.seen.tolist()


def check_one_pool_for_many(cached=PagedCache, pools=BlockPool):
    "Caches of one pool do not see each other, and what one gives back another may have."
    layer, pool, x = build(ROPE()), pool_of(8, 3, pools), torch.randn(1, 7, s.e, **float64)
    with torch.no_grad():
        whole = layer(x, is_causal=True)
        caches = [cached(pool, 1) for _ in range(2)]
        for i in range(7):
            for cache in caches:
                torch.testing.assert_close(
                    layer(x[:, i : i + 1], is_causal=True, cache=cache), whole[:, i : i + 1], atol=1e-12, rtol=0
                )
        assert_no_block_is_lost(pool, *caches)
        third = cached(pool, 1)
        with pytest.raises(ValueError, match="2 of 8 blocks free, and 3 needed"):
            layer(x, is_causal=True, cache=third)
        caches[0].reset()
        torch.testing.assert_close(layer(x, is_causal=True, cache=third), whole, atol=1e-12, rtol=0)
        assert_no_block_is_lost(pool, caches[1], third)


def check_only_what_is_needed(cached=PagedCache, pools=BlockPool):
    "The count before a call is exact: it fits with so many free blocks, and not with one less."
    for rows, taken in ((rows, taken) for rows in (1, 2, 3) for taken in (5, 6, 7, 8)):
        needed = rows * (-(-(taken + 2) // 4) - -(-taken // 4)) + (rows - 1) * (taken % 4 > 0)
        pool = pool_of(20, 4, pools)
        cache = cached(pool, 1)
        cache.append(new(b=1, n=taken), new(b=1, n=taken))
        cache.commit()
        cache.reorder(torch.zeros(rows, dtype=torch.int64))
        free, pool.free = pool.free, pool.free[: max(0, needed - 1)]
        before = copy.deepcopy((pool.counts, pool.free, cache.tables, cache.lengths))
        if needed:
            with pytest.raises(ValueError, match="pool full"):
                cache.append(new(b=rows, n=2), new(b=rows, n=2))
            assert before == (pool.counts, pool.free, cache.tables, cache.lengths)
        pool.free = free[:needed]
        cache.append(new(b=rows, n=2), new(b=rows, n=2))
        cache.commit()
        assert not pool.free


@torch.no_grad()
def check_failures(cached=PagedCache, pools=BlockPool):
    pool = pool_of(14, 3, pools)
    cache, layer, x = cached(pool, s.b), build(ROPE()), torch.randn(s.b, 4, s.e, **float64)
    layer(x, is_causal=True, cache=cache)
    twin = copy.deepcopy(cache)
    fails = failing(layer, cache)
    fails["full"] = lambda: layer(torch.randn(s.b, 40, s.e, **float64), cache=cache)
    for name, call in fails.items():
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            call()
        assert (cache.tables, cache.lengths, pool.counts, pool.free) == (
            twin.tables,
            twin.lengths,
            twin.pool.counts,
            twin.pool.free,
        ), name
    token = torch.randn(s.b, 1, s.e, **float64)
    layer.attention_map(token, cache=cache)
    cache.reorder(torch.arange(s.b))
    with pytest.raises(RuntimeError, match="append comes first"):
        cache.commit()
    assert torch.equal(*(layer(token, is_causal=True, cache=c) for c in (cache, twin)))


def check_two_that_want_the_last_block(cached=PagedCache, pools=BlockPool):
    "Both were told that there is room; the second is refused before it changes anything."
    pool = pool_of(1, 4, pools)
    one, other = cached(pool, 1), cached(pool, 1)
    for cache in one, other:
        cache.append(new(b=1), new(b=1))
    one.commit()
    with pytest.raises(ValueError, match="0 of 1 blocks free"):
        other.commit()
    assert other.tables == [[]] and other.seen.tolist() == [0]
    assert_no_block_is_lost(pool, one, other)


CHECKS = [
    check_beside_the_slab,
    check_forks,
    check_one_pool_for_many,
    check_only_what_is_needed,
    check_failures,
    check_two_that_want_the_last_block,
]


@pytest.mark.parametrize("check", CHECKS)
def test_blocks(check):
    check()


@pytest.mark.parametrize("seed", range(1, 6))
def test_forks_of_other_seeds(seed):
    check_forks(seed=seed)


def test_gradients_are_those_of_the_slab():
    layer, x = build(ROPE()).requires_grad_(True), torch.randn(s.b, 6, s.e, **float64)
    found = []
    for cache in PagedCache(pool_of(), s.b), KVCache(s.b, s.g, 9, s.d, **float64):
        layer.zero_grad()
        layer(x[:, :4], is_causal=True, cache=cache)
        layer(x[:, 4:], is_causal=True, cache=cache).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_values_may_have_a_width_of_their_own():
    pool = BlockPool(9, 4, s.g, s.d, value_dim=s.dv)
    cache = PagedCache(pool, s.b)
    k, v = torch.randn(s.b, s.g, 6, s.d), torch.randn(s.b, s.g, 6, s.dv)
    for i in range(6):
        shown = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        cache.commit()
    assert torch.equal(shown[0], k) and torch.equal(shown[1], v) and shown[2] is None
    assert repr(cache) == "PagedCache(2 rows, 12 tokens in blocks of 4; 5 of 9 blocks free)"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in REFUSED
        if not any(word in name for word in ("full", "too long", "max_len", "float", "window", "first", "roll"))
    ],
)
def test_what_does_not_fit_is_refused_as_by_the_slab(own_messages, name):
    call, error, words = REFUSED[name]
    with refused(error, *words):
        call(PagedCache(pool_of(), s.b))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: BlockPool(0, 4, 1, 1), ValueError, ("num_blocks",)),
        (lambda: BlockPool(4, 4.0, 1, 1), TypeError, ("block_size",)),
        (lambda: PagedCache(pool_of(), 0), ValueError, ("batch_size",)),
    ],
)
def test_sizes_are_counts(own_messages, make, error, words):
    with refused(error, *words):
        make()


FAULTS = {
    "writes into shared blocks": ("if self.counts[block] == 1:", "if True:"),
    "copies keys only": ("for t in self.k, self.v:\n            t[copy", "for t in (self.k,):\n            t[copy"),
    "the copied block keeps its count": ("        self.release(block)\n        return copy", "        return copy"),
    "given back before it is shared": (
        "self.tables = [[self.pool.share(block) for block in old[row]] for row in chosen]",
        "[self.pool.release(block) for block in sum(old, [])]; old = old[:0] + old; self.tables = "
        "[[self.pool.share(block) for block in old[row]] for row in chosen]",
    ),
    "never given back": ("        for block in sum(old, []):\n            self.pool.release(block)\n", ""),
    "a fork that is not counted": ("[self.pool.share(block) for block in old[row]]", "list(old[row])"),
    "one table for all forks": (
        "[[self.pool.share(block) for block in old[row]] for row in chosen]",
        "[[self.pool.share(b) for b in old[chosen[0]]] for row in chosen]",
    ),
    "lengths stay behind": (
        "self.lengths, self._call = [self.lengths[row] for row in chosen], None",
        "self.lengths, self._call = [max(self.lengths)] * len(chosen), None",
    ),
    "a block too few": ("len(table) * size < length + count", "len(table) * size < length + count - 1"),
    "a block too many": ("len(table) * size < length + count", "len(table) * size <= length + count"),
    "places within the block from 1": ("* size + place % size", "* size + (place + 1) % size"),
    "rows aligned at the left": ("- (cache.end - cache.seen)[:, None]", "- 0 * cache.seen[:, None]"),
    "padding is kept": ("x.flatten(0, 1) if real is None else x[real]", "x.flatten(0, 1)[:len(slots)]"),
    "committed at once": (
        "        self._call = added, real, k.detach(), v.detach()\n",
        "        self._call = added, real, k.detach(), v.detach(); self.commit()\n",
    ),
    "does not know that it is full": ("if needed > len(pool.free):", "if False:"),
    "forgets the copies": ("needed += others[last] > 0", "needed += 0"),
    "counts a copy for each": ("needed += others[last] > 0", "needed += pool.counts[last] > 1"),
    "does not look again": ("        _check_blocks(self, added)    # another cache", "        # another cache"),
    "appended and forgotten by nobody": ("for row in chosen], None\n", "for row in chosen], self._call\n"),
    "reset gives nothing back": (
        "        for block in sum(self.tables, []):\n            self.pool.release(block)\n",
        "",
    ),
}


def planted(old, new):
    source = inspect.getsource(mha_book.plugs.paged)
    assert source.count(old) == 1, (old, source.count(old))
    module = types.ModuleType("mha_book.broken_paged")
    module.__package__ = "mha_book"
    exec(source.replace(old, new), module.__dict__)
    return module


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(own_messages, name):
    module = planted(*FAULTS[name])
    with pytest.raises(BaseException) as noticed:
        for check in CHECKS:
            check(module.PagedCache, module.BlockPool)
    assert not isinstance(noticed.value, (NameError, SyntaxError)), noticed.value
