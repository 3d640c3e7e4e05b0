"""Holding a contest: its calls are timed in turns, its table is printed as soon as it is there."""

from contextlib import suppress

import torch

from ..instruments.device import benchmark
from ..instruments.roofline import Machine
from .ending import is_watched, say, warn
from .measured import Row, Table, is_busy, memory, ratio_and_spread, share_of_peak
from .suites import Contest, Setting
from .suites_flex import SUITES  # with the model's and FlexAttention's


def hold(suite: str, at: Setting, contest: Contest, rounds: int, machine: Machine) -> Table:
    "Hold a contest."

    def progress(done, total):
        if is_watched():
            end = "\r\033[K" if done == total else ""  # in the end the line is empty
            warn(f"\r  {suite}, {contest.mode}: {done} of {total}", end)

    with torch.set_grad_enabled(contest.train):
        timings = benchmark(contest.calls, device=at.device, rounds=rounds, progress=progress)
    rows = []
    for name, t in timings.items():
        share = None if name in contest.others else contest.flops / t.seconds / machine.flops
        compiling, note = contest.compile_seconds.get(name), contest.notes.get(name, "")
        rows.append(Row(name, t.ratio, t.low, t.high, t.seconds, t.peak_bytes, share, compiling, note))
    rows += [Row(name, *[None] * 7, note) for name, note in contest.absent.items()]
    return Table(suite, contest.mode, at.size, rows)


def show(table: Table) -> str:
    "A table, as it is printed."
    widest = max(len(row.name) for row in table.rows)
    b, n, e, h = table.size
    lines = [
        f"\n{table.suite}: {table.mode}. Batch {b}, {n} tokens, width {e}, {h} heads",
        f"  {'':{widest}}  {'ratio':22} {'ms':>9} {'peak':>12} {'of peak rate':>12}",
    ]
    for i, row in enumerate(table.rows):
        if row.ratio is None:
            lines.append(f"  {row.name:{widest}}  {row.note}")
            continue
        note = "  <- A/A band" if i == 0 else ""
        if row.compile_seconds is not None:
            note = f"  compiled in {row.compile_seconds:.1f} s"
        note += f"  {row.note}" if row.note else ""
        lines.append(
            f"  {row.name:{widest}}  {ratio_and_spread(table, row):22} "
            f"{row.seconds * 1e3:9.3f} {memory(table, row):>12} "
            f"{'' if row.share is None else share_of_peak(table, row):>12}{note}"
        )
    return "\n".join(lines)


def hold_suite(
    suite: str,
    at: Setting,
    seed: int,
    rounds: int,
    machine: Machine,  # its rate of matrix products
    tables: list[Table],  # each contest adds its own
) -> int:  # an exit code
    "Hold a suite's contests. One that fails ends the suite, not the run."
    torch.manual_seed(seed)
    try:
        for contest in SUITES[suite](at):
            tables.append(hold(suite, at, contest, rounds, machine))
            say(show(tables[-1]), flush=True)
    except (RuntimeError, ValueError, MemoryError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        warn(f"\n{suite}, {','.join(map(str, at.size))}: the rest failed: {text[:300]}")
        return 1
    return 0


def announce(origin: dict, dtype: str, machine: Machine) -> None:
    "Say where this is measured, and warn where others are at work."
    load, cores = origin["load"], origin["cores"]
    if is_busy(load, cores):
        warn(
            f"WARNING: this machine is busy (load {load} on {cores} cores); the numbers "
            f"will show its neighbours too. The file will say so."
        )
    with suppress(BrokenPipeError):  # whoever reads no results is noticed at the first one, when it is there to be kept
        say(
            f"{origin['device']['name']}, {dtype}, torch {torch.__version__}; "
            f"measured: {machine.flops / 1e9:,.0f} GFLOP/s in products, "
            f"{machine.bandwidth / 1e9:,.0f} GB/s\n"
            "ratio: time over the first row's, with the middle half of the rounds; = is no difference"
        )
