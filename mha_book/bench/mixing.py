"""Heads that talk, on file: how models with each kind of mixing learn two tasks, and how long they take.

What follows from the losses is not in the file: differences, intervals and verdicts are computed from them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as shorter
from time import process_time
from typing import Any

import torch

from ..instruments.device import benchmark
from .climber import short
from .measured import Origin, Row, Table, provenance, read_file
from .mixing_kinds import CONTROLS, KINDS, PLACED, PLAIN
from .mixing_sizes import RATES
from .mixing_tasks import HEADS, TASKS
from .stepwise import run_steps, taken_up

# The file


@dataclass(frozen=True)
class Training:
    "A model that was trained once."

    task: str
    kind: str
    heads: int  # of a layer
    rate: float  # of AdamW
    seed: int
    steps: int
    parameters: int
    hidden: int  # width of the gated maps, which pays for the mixing; 0 where there are none
    seconds: float  # CPU time
    chosen_on: float  # loss by which a rate is chosen
    loss: float  # on what neither training nor that choice has seen
    course: list[float]  # the loss in training, tenth by tenth
    alike: list[float]  # of each layer, how alike its heads look; none where weights do not describe it
    mixing: dict[str, list[list[float]]]  # learned matrices of heads, by their names in the model


@dataclass(frozen=True)
class Mixing(Origin):
    "A file of trainings: origin, trainings, and times."

    complete: bool  # False where it was broken off
    seconds: float  # CPU time
    sizes: dict[str, int]  # steps, seeds, rounds
    rates: dict[str, list[float]]  # task -> rates that every kind was tried with
    runs: list[Training]
    tables: list[Table]

    def __post_init__(self):
        super().__post_init__()
        self._check_least(seconds=0)
        if self.rates.keys() != TASKS.keys() or not all(map(_rising, self.rates.values())):
            raise ValueError(f"rates {shorter(self.rates)} are not rising rates of {', '.join(TASKS)}")
        for i, run in enumerate(self.runs):
            _check_run(run, self, f"runs[{i}]")
        runs = [(run.task, run.kind, run.heads, run.rate, run.seed) for run in self.runs]
        for places in runs, [(table.mode, *table.size) for table in self.tables]:
            if len(set(places)) < len(places):
                raise ValueError("the same was measured twice")

    def tried(self, task: str, kind: str, heads: int = HEADS) -> list[Training]:
        "The trainings by which the rate was chosen, by rate."
        return [one for one in self._of(task, kind, heads) if one.seed == self.tuned_with]

    def rate(self, task: str, kind: str, heads: int = HEADS) -> float | None:
        "The best of all rates that were tried; None before all of them were."
        tried = self.tried(task, kind, heads)
        if len(tried) < len(self.rates[task]):
            return None
        return min(tried, key=lambda one: one.chosen_on).rate

    def trained(self, task: str, kind: str, heads: int = HEADS) -> list[Training]:
        "The trainings at that rate, by seed."
        return [one for one in self._of(task, kind, heads) if one.seed != self.tuned_with]

    def _of(self, task: str, kind: str, heads: int) -> list[Training]:
        found = [one for one in self.runs if (one.task, one.kind, one.heads) == (task, kind, heads)]
        return sorted(found, key=lambda one: (one.seed, one.rate))

    @property
    def tuned_with(self) -> int:
        "The seed with which rates are tried; the others' differ from it."
        return self.seed + self.sizes["seeds"]

    def table(self, mode: str, tokens: int) -> Table | None:
        "Times of that mode, for inputs of so many tokens, if they were measured."
        return next((one for one in self.tables if (one.mode, one.size[1]) == (mode, tokens)), None)


def _rising(rates: list[float]) -> bool:
    return len(rates) > 0 and min(rates) > 0 and rates == sorted(set(rates))


def _check_run(run: Training, file: Mixing, where: str) -> None:
    "ValueError for numbers that no training could have."
    if run.task not in TASKS or run.kind not in KINDS | CONTROLS:
        raise ValueError(f"{where}: there is no task {shorter(run.task)}, or no kind {shorter(run.kind)}")
    if run.rate not in file.rates[run.task] or not file.seed <= run.seed <= file.tuned_with:
        raise ValueError(f"{where}: rate {run.rate} or seed {run.seed} is none of the file's")
    if min(run.heads, run.parameters, run.steps) < 1 or run.hidden < 0:
        raise ValueError(
            f"{where}: heads {run.heads}, parameters {run.parameters}, steps {run.steps}, hidden {run.hidden}"
        )
    if min(run.seconds, run.chosen_on, run.loss, *run.course) < 0 or not all(-1.001 <= x <= 1.001 for x in run.alike):
        raise ValueError(f"{where} holds a loss below 0, or a resemblance beyond 1")
    for name, rows in run.mixing.items():
        if not rows or any(len(row) != len(rows) for row in rows):
            raise ValueError(f"{where}: {shorter(name)} is no square matrix")


def as_mixing(found: dict[str, Any]) -> Mixing:
    "What `run_mixing` found, as it would be read from its file."
    tables = [Table(**one | dict(rows=[Row(**row) for row in one["rows"]])) for one in found["tables"]]
    return Mixing(**found | dict(command="-", runs=[Training(**one) for one in found["runs"]], tables=tables))


def read_mixing(path: Path | str) -> Mixing:  # a file of `mha-book mixing`
    "The trainings in a file. Raises as `mha_book.bench.measured.read_file` does."
    return read_file(Mixing, path)


# The run


MORE_HEADS = 2, 8, 16  # of plain layers, on shifts
INPUTS = [(16, 64, 64, 4), (2, 512, 512, 8)]  # sequences, tokens, width, heads of what is timed


def contestants(task: str) -> list[tuple[str, int]]:  # kind, heads
    "Who learns a task."
    if task == "shifts":
        return [(kind, HEADS) for kind in KINDS if kind != PLACED] + [(PLAIN, h) for h in MORE_HEADS]
    return [(kind, HEADS) for kind in KINDS | CONTROLS]


def run_mixing(
    sizes: dict[str, int],  # as in `SIZES`
    seed: int,
    device: torch.device,
    before: Mixing | None,  # an unfinished file of the same settings
    tell: Callable[[int, int], object],  # told (how much is done, of how much)
    keep: Callable[[dict[str, Any]], object] = lambda found: None,  # gets what is there after each step
) -> tuple[dict[str, Any], BaseException | None]:  # a `Mixing` without its command; what stopped it
    "Choose a rate for each kind, train it with every seed, time it. Ctrl-C ends it, and what is done is kept."
    found = dict(dtype="float32", threads=1, seed=seed, complete=False, seconds=0.0, sizes=sizes, rates=RATES)
    found = taken_up(
        found | dict(runs=[], tables=[]), before, ("seed", "sizes", "rates"), ("seconds", "runs", "tables")
    )
    found = provenance(device) | found
    return found, run_steps(found, device, lambda: planned(found, device), tell, keep)


def planned(found: dict[str, Any], device: torch.device) -> list[Callable[[], None]]:
    "The steps that a file lacks: of each task its rates, then its trainings, seed by seed; and times between them."
    done = {(one["task"], one["kind"], one["heads"], one["rate"], one["seed"]) for one in found["runs"]}
    ended = {(one["task"], one["kind"], one["heads"], one["seed"]) for one in found["runs"]}
    steps = []
    for task in TASKS:
        tuned_with = found["seed"] + found["sizes"]["seeds"]
        for kind, heads in contestants(task):
            at = [(task, kind, heads, rate, tuned_with) for rate in found["rates"][task]]
            steps += [partial(_try, found, device, *place) for place in at if place not in done]
        for seed in range(found["seed"], tuned_with):
            at = [(task, kind, heads, seed) for kind, heads in contestants(task)]
            steps += [partial(_train, found, device, *place) for place in at if place not in ended]
        steps += times(found, device) if task == "shifts" else []
    return steps


def _try(found: dict[str, Any], device: torch.device, task: str, kind: str, heads: int, rate: float, seed: int) -> None:
    begin, steps = process_time(), found["sizes"][f"{task.removesuffix('s')}_steps"]
    learned = TASKS[task](kind, heads, rate, seed, steps, device)
    numbers = {name: short(learned[name]) for name in ("chosen_on", "loss")}
    place = dict(task=task, kind=kind, heads=heads, rate=rate, seed=seed, steps=steps)
    found["runs"].append(place | learned | numbers | dict(seconds=round(process_time() - begin, 2)))


def _train(found: dict[str, Any], device: torch.device, task: str, kind: str, heads: int, seed: int) -> None:
    "At the best rate, which is known by then."
    _try(found, device, task, kind, heads, as_mixing(found).rate(task, kind, heads), seed)


# Times


def times(found: dict[str, Any], device: torch.device) -> list[Callable[[], None]]:
    "The tables that a file lacks: of one layer, a call as it is used and a step of its training."
    timed = {(one["mode"], *one["size"]) for one in found["tables"]}
    places = [(mode, *size) for size in INPUTS for mode in CALLS]
    return [partial(_time, found, device, *place) for place in places if place not in timed]


def _call(kind: str, layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    served = KINDS[kind].served(layer).eval()

    def call() -> object:
        with torch.no_grad():
            return served(x, is_causal=True)

    return call


def _step(kind: str, layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x, is_causal=True).sum().backward()


CALLS = {"a call": _call, "a step of training": _step}


def _time(found: dict[str, Any], device: torch.device, mode: str, *size: int) -> None:
    "All kinds in turns, plain first."
    batch, tokens, width, heads = size
    x = torch.randn(batch, tokens, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device)
    sizes = dict(embed_dim=width, num_heads=heads, head_dim=width // heads, out_dim=width)
    calls = {
        name: CALLS[mode](name, kind.make(sizes, 0).to(device), x) for name, kind in KINDS.items() if name != PLACED
    }
    rows = []
    for name, timing in benchmark(calls, device=device, rounds=found["sizes"]["rounds"]).items():
        numbers = [short(getattr(timing, field)) for field in ("ratio", "low", "high", "seconds")]
        rows.append(asdict(Row(name, *numbers, timing.peak_bytes, share=None, compile_seconds=None, note="")))
    found["tables"].append(dict(suite="mixing", mode=mode, size=list(size), rows=rows))


# What it says


def show_mixing(found: Mixing) -> str:
    "Each kind's losses, and its times."
    lines = []
    for task in TASKS:
        lines.append(f"{task}: parameters, rate, mean loss, and of each seed")
        for kind, heads in contestants(task):
            runs = found.trained(task, kind, heads)
            if runs:
                losses = [run.loss for run in runs]
                numbers = f"{runs[0].parameters:8}  {runs[0].rate:6.3f}  {sum(losses) / len(losses):.4f}  "
                lines.append(f"  {kind + f', {heads} heads':36}{numbers}{' '.join(f'{x:.4f}' for x in losses)}")
    for table in found.tables:
        lines.append(f"{table.mode}, {' x '.join(map(str, table.size))}: time, band ±{table.band:.3f}")
        lines += [f"  {row.name:36}{row.ratio:6.3f} ({row.low:.3f} to {row.high:.3f})" for row in table.rows]
    return "\n".join(lines)
