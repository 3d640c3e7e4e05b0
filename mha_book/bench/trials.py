"""Trainings on file: every run of the stress test with its treatment, learning rate, seed, losses and largest logits.

Counts and verdicts are not in the file: they are computed from the runs. A run that is missing makes the file
incomplete, and the file has to say so.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..instruments.device import _alone
from ..lab.stress import TREATMENTS, Run, Training, learned, train
from .ending import STOPS
from .measured import Origin, provenance, read_file

# The file


@dataclass(frozen=True)
class Trials(Origin):
    "A file of trainings: its origin, what was to be run, and every run."

    complete: bool  # False where it was broken off
    seconds: float  # CPU time of all runs
    training: Training
    treatments: dict[str, str]  # by name, what was done
    rates: list[float]  # ascending
    seeds: int  # how many, from `seed` on
    runs: list[Run]

    def __post_init__(self):
        super().__post_init__()
        self._check_least(seeds=1, seconds=0)
        if not self.treatments or not self.rates or not self.runs:
            raise ValueError("needed is at least one treatment, one rate and one run")
        if self.rates != sorted(set(self.rates)) or not self.rates[0] > 0:
            raise ValueError(f"rates {self.rates} do not ascend from above 0")
        places = [(run.treatment, run.rate, run.seed) for run in self.runs]
        for i, (name, rate, seed) in enumerate(places):
            if not (name in self.treatments and rate in self.rates and self.seed <= seed < self.seed + self.seeds):
                raise ValueError(f"runs[{i}] {places[i]} was not to be run")
        if len(set(places)) < len(places):
            raise ValueError("runs holds one of them twice")
        planned = len(self.treatments) * len(self.rates) * self.seeds
        if self.complete != (len(places) == planned):
            raise ValueError(f"complete is {self.complete}, but there are {len(places)} runs of {planned}")
        for i, run in enumerate(self.runs):
            _check_run(run, self.training, f"runs[{i}]")


def _check_run(run: Run, training: Training, where: str) -> None:
    "ValueError for numbers that no training could have."
    points = training.steps // training.record
    if not len(run.losses) == len(run.largest) <= points:
        raise ValueError(f"{where} has {len(run.losses)} losses and {len(run.largest)} largest logits, of {points}")
    for field in ("losses", "largest"):
        if min(getattr(run, field), default=0) < 0:
            raise ValueError(f"{where}.{field} holds a number below 0")


def read_trials(path: Path | str) -> Trials:  # a file of `mha-book stress`
    "The trainings in a file. Raises as `mha_book.bench.measured.read_file` does."
    return read_file(Trials, path)


# The runs


def run_trials(
    names: list[str],  # of treatments
    rates: list[float],  # learning rates, ascending
    seeds: range,
    training: Training,
    device: torch.device,
    tell: Callable[[int, int], object],  # told (how many are done, of how many)
) -> tuple[dict[str, Any], BaseException | None]:  # a `Trials` without its command; what stopped it
    "Train all, one after the other. Ctrl-C or a failure ends it, and what is done is kept."
    found, runs, stop, begin = provenance(device), [], None, time.process_time()
    plan = list(itertools.product(seeds, rates, names))
    with _alone(device):
        try:
            for seed, rate, name in plan:
                tell(len(runs), len(plan))
                runs.append(train(name, rate, seed, training, device))
            tell(len(runs), len(plan))
        except STOPS as error:
            stop = error
        threads = torch.get_num_threads()
    done = dict(complete=len(runs) == len(plan), seconds=round(time.process_time() - begin, 1))
    plan = dict(rates=rates, seeds=len(seeds), treatments={name: TREATMENTS[name].what for name in names})
    found |= dict(dtype="float32", threads=threads, seed=seeds[0], training=asdict(training))
    return found | done | plan | dict(runs=[asdict(run) for run in runs]), stop


def show_trials(runs: list[Run], training: Training) -> str:
    "How many learned, by treatment and rate, as a table."
    rates = sorted({run.rate for run in runs})
    lines = [f"learned, of those run{'':3}" + "".join(f"{rate:>6g}" for rate in rates)]
    for name in dict.fromkeys(run.treatment for run in runs):
        counts = (learned(runs, training, name, rate) for rate in rates)
        cells = "".join(f"{f'{good}/{of}' if of else '-':>6}" for good, of in counts)
        lines.append(f"  {name:21}{cells}")
    return "\n".join(lines)
