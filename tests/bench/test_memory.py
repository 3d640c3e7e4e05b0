"""What does not fit into memory is refused with both numbers, and what fits is not."""

import pytest
import torch

from mha_book.bench import memory
from mha_book.bench.memory import check_memory, free_bytes
from mha_book.bench.suites import Setting

pytestmark = pytest.mark.usefixtures("own_messages")


def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch):
    at = Setting(1, 1024, 64, 4, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**26)
    with pytest.raises(ValueError, match=r"need up to 0\.1 GiB, and 0\.1 GiB are free; take fewer"):
        check_memory(at)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**28)
    check_memory(at)


def test_free_memory_is_a_number_of_bytes_or_unknown():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**60
