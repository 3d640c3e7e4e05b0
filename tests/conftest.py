"""Shapes are checked while tests run: every annotated function of the package becomes a test of its own annotations."""

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook("mha_book", "beartype.beartype")


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    "Small tensors are slower with several threads, and a failure should come back."
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def own_messages():
    "Shape checking off: tests of bad input test what the package itself says, which is all that a user's program sees."
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
