"""A file of trainings: what was planned and what was run agree, or the file is refused by name."""

import copy
import json

import pytest
import torch

from mha_book.bench.measured import write_file
from mha_book.bench.trials import Trials, read_trials, run_trials, show_trials
from mha_book.lab.stress import Run, Training

pytestmark = pytest.mark.usefixtures("own_messages")
TINY = Training(vocab=7, tokens=10, width=12, heads=3, batch=2, steps=20, warm_up=5, record=5)


@pytest.fixture(scope="module")
def found():
    "Two treatments, two rates and one seed, of a model so small that it takes a second, and learns nothing in it."
    told = []
    names, rates = ["plain", "qk-norm"], [0.01, 0.1]
    data, stop = run_trials(names, rates, range(1), TINY, torch.device("cpu"), lambda *at: told.append(at))
    assert stop is None and told == [(i, 4) for i in range(5)]
    return data | dict(command="mha-book stress")


def test_what_was_run_is_read_back(found, tmp_path):
    write_file(Trials, tmp_path / "stress.json", found)
    data = read_trials(tmp_path / "stress.json")
    assert data.runs == [Run(**run) for run in found["runs"]] and data.complete
    assert show_trials(data.runs, data.training).count("/1") == 4


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda d: d["runs"].pop(), "there are 3 runs of 4"),
        (lambda d: d["runs"].append(d["runs"][0]), "one of them twice"),
        (lambda d: d["runs"][0].update(seed=9), "was not to be run"),
        (lambda d: d["runs"][0]["losses"].append(0.1), "5 losses"),
        (lambda d: d["runs"][0]["losses"].__setitem__(0, None), "None, not float"),
        (lambda d: d["training"].update(heads=5), "heads"),
        (lambda d: d.pop("versions"), "lacks versions"),
    ],
)
def test_every_fault_is_named(found, tmp_path, change, fault):
    data = copy.deepcopy(found)
    change(data)
    (tmp_path / "stress.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="stress.json: ") as error:
        read_trials(tmp_path / "stress.json")
    assert fault in str(error.value)
