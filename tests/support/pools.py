"""What tests of paged caches share: pools, and the sentence that no block is lost."""

from collections import Counter

from mha_book.instruments.testing import SIZES as s
from mha_book.plugs.paged import BlockPool

from .caches import float64


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
