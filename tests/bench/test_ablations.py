"""A file of ablations: what it says of single heads, and what it must not say."""

import json

import pytest
import torch

from mha_book.bench.ablations import Ablations, read_ablations, show_ablations
from mha_book.bench.measured import provenance

pytestmark = pytest.mark.usefixtures("own_messages")
GOOD = provenance(torch.device("cpu")) | dict(
    command="made up",
    dtype="float32",
    threads=1,
    seed=0,
    seconds=1.0,
    tokens={"one": 5},
    base={"one": 2.0},
    losses={"one": [[2.5, 2.0], [2.0, 3.0]]},
)


def read(folder, data):
    "What is read from a file with this in it."
    path = folder / "heads.json"
    path.write_text(json.dumps(data), encoding="utf8")
    return read_ablations(path)


def test_the_worth_of_a_head_is_what_the_loss_gains_without_it(tmp_path):
    found = read(tmp_path, GOOD)
    assert found == Ablations(**GOOD)
    assert found.worth()["one"].tolist() == [[0.5, 0.0], [0.0, 1.0]]
    assert "worth most: 1.1 1.00  0.0 0.50" in show_ablations(found, 2)


@pytest.mark.parametrize(
    "change, fault",
    [
        (dict(base={"two": 2.0}), "texts differ"),
        (dict(losses={"one": [[2.5], [2.0, 3.0]]}), "layers of as many heads"),
        (dict(losses={"one": [[2.5, 0.0], [2.0, 3.0]]}), "not above 0"),
        (dict(seconds=None), "seconds is None"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path, change, fault):
    with pytest.raises(ValueError, match=fault):
        read(tmp_path, GOOD | change)


def test_a_field_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="lacks seconds"):
        read(tmp_path, {key: value for key, value in GOOD.items() if key != "seconds"})
