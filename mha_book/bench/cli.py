"""The command `mha-book`: `bench` times, `stress` trains until it breaks, `heads` takes heads out, `precision` rounds
them, `ladder` does without them, `mixing` lets them talk; each can refuse.

A number can be printed for any setting. A setting whose number would mean nothing is refused, with the reason and with
what would do. A command that is broken off writes what was measured, and says so in one line.
"""

import argparse
import math
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..instruments.device import _alone
from ..instruments.roofline import measure_machine
from ..lab.one_wrong_line import HAMLET
from ..lab.stress import TREATMENTS, Run, Training
from ..models.language_model import SMOLLM2, load_smollm2
from .ablations import Ablations, run_ablations, show_ablations
from .by_steps import add_ladder, add_mixing, add_precision, check_common
from .contests import announce, hold_suite
from .ending import STOPS, to_the_end, warn
from .keeping import _keep, _progress
from .measured import Measurement, provenance
from .memory import check_memory, chosen_dtype
from .subjects import check_packages
from .suites import Setting, no_compiler
from .suites_flex import SUITES  # with the model's and FlexAttention's
from .trials import Trials, run_trials, show_trials

# The command line, and what is refused: mha-book bench


SIZES = {  # such that all of it takes a CPU a quarter of an hour
    "layers": [[1, 8, 64, 4], [4, 256, 768, 12], [8, 1024, 768, 12]],
    "ways": [[4, 256, 768, 12], [1, 1024, 768, 12]],
    "backends": [[4, 256, 768, 12]],
    "compile": [[4, 256, 768, 12]],
    "decode": [[1, 128, 768, 12], [1, 1024, 768, 12], [1, 4096, 768, 12]],
    "language": [[1, 256, 576, 9], [1, 512, 576, 9]],
    "flex": [[1, 4096, 512, 8]],
}
COMPILED = "compile", "flex"  # they need a compiler
FRUGAL = "decode", "language"  # they hold no logits
LARGE = [8, 1024, 768, 12]  # a GPU takes every suite at this size, too
QUICK = [[2, 64, 128, 4]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mha-book", description="Measure multi-head attention on this machine.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True)
    for add_to in _add_bench, _add_stress, _add_heads, add_precision, add_ladder, add_mixing:
        add_to(commands)
    return parser


def _add_bench(commands: argparse._SubParsersAction) -> None:
    "`mha-book bench`, what it takes and what it does."
    bench = commands.add_parser(
        "bench",
        help="time the book's layers, ways and kernels, beside their noise",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:9} {suite.__doc__}" for name, suite in SUITES.items()),
    )
    add = bench.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}; or all of them")
    add("--device", help="cpu, cuda, cuda:1; unless told $MHA_BOOK_DEVICE, or the best")
    add("--dtype", help="float32 on a CPU and bfloat16 on a GPU unless told")
    add("--sizes", nargs="+", metavar="B,N,E,H", help="batch, tokens, width, heads")
    add("--rounds", type=int, default=15, help="how often each is timed (15)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the measurement, with its origin")
    add("--quick", action="store_true", help="one small size: a look, not a result")
    bench.set_defaults(refuse=bench.error, plan=_plan, run=_bench)


def _version() -> str:
    try:
        return version("mha-book")
    except PackageNotFoundError:
        return "mha-book, not installed"


def _check_arguments(args: argparse.Namespace) -> None:
    "Refuse what no machine could measure; ValueError says why."
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        raise ValueError(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    if args.rounds < 15:
        raise ValueError(
            f"--rounds {args.rounds}: quartiles of fewer than 15 rounds are themselves noise; ask for 15 or more"
        )
    if args.quick and args.sizes:
        raise ValueError("--quick has a size of its own; give --sizes or --quick, not both")


def _size(text: str) -> list[int]:
    "`4,256,768,12` as numbers; ValueError where they make no layer."
    try:
        batch, tokens, width, heads = size = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--sizes {text}: needed are four integers, batch,tokens,width,heads, such as 4,256,768,12"
        ) from None
    if min(size) < 1:
        raise ValueError(f"--sizes {text}: every number must be at least 1")
    if width % heads:
        raise ValueError(f"--sizes {text}: {heads} heads do not divide a width of {width}")
    return size


# mha-book stress


RATES = [0.04, 0.057, 0.08, 0.11, 0.16, 0.23, 0.32, 0.45, 0.64, 0.9]  # each √2 times the last


def _add_stress(commands: argparse._SubParsersAction) -> None:
    "`mha-book stress`, what it takes and what it does."
    stress = commands.add_parser(
        "stress",
        help="train a small model at rising learning rates, until it breaks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:12} {one.what}" for name, one in TREATMENTS.items()),
    )
    add = stress.add_argument
    add("treatments", nargs="*", metavar="TREATMENT", help="those below; all unless told")
    add("--device", default="cpu", help="cpu (unless told), cuda, cuda:1")
    add("--rates", nargs="+", type=float, metavar="RATE", help="learning rates")
    add("--seeds", type=int, default=5, help="how often each is trained (5)")
    add("--seed", type=int, default=0, help="the first of the seeds (0)")
    add("--steps", type=int, default=Training.steps, help="of a training (200)")
    add("--json", type=Path, metavar="FILE", help="write all runs: stress-yours.json, say")
    stress.set_defaults(refuse=stress.error, plan=_plan_stress, run=_stress)


def _plan_stress(args: argparse.Namespace) -> tuple[list[str], list[float], Training, torch.device]:
    "What is to be trained, and where; ValueError says why not."
    names = list(dict.fromkeys(args.treatments or TREATMENTS))
    unknown = [name for name in names if name not in TREATMENTS]
    if unknown:
        raise ValueError(f"unknown treatment {unknown[0]!r}; there are {', '.join(TREATMENTS)}")
    rates = sorted(set(args.rates or RATES))
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"--rates {rates}: learning rates are above 0 and finite")
    if args.seeds < 1 or args.seed + args.seeds > 2**31:
        raise ValueError(f"--seeds {args.seeds} from {args.seed} on: at least one, below 2**31")
    return names, rates, Training(steps=args.steps), check_common(args)


# mha-book heads


def _add_heads(commands: argparse._SubParsersAction) -> None:
    "`mha-book heads`, what it takes and what it does."
    heads = commands.add_parser("heads", help="take each head out of a language model, and see what that costs")
    add = heads.add_argument
    add("--passages", type=int, default=4, help="texts of each kind (4)")
    add("--device", default="cpu", help="cpu (unless told), cuda, cuda:1")
    add("--seed", type=int, default=0, help="of the random tokens (0)")
    add("--json", type=Path, metavar="FILE", help="write the losses: heads-yours.json, say")
    heads.set_defaults(refuse=heads.error, plan=_plan_heads, run=_heads)


def _plan_heads(args: argparse.Namespace) -> tuple[torch.device]:
    "Where; ValueError says why not."
    if not 1 <= args.passages <= 100:
        raise ValueError(f"--passages {args.passages} must be 1 to 100")
    check_packages(SMOLLM2, HAMLET)
    return (check_common(args),)


# The plan of a benchmark


def _plan(args: argparse.Namespace) -> tuple[torch.device, torch.dtype, list[tuple[str, Setting]]]:
    "Where, in what and what: all that could be refused, is refused here."
    _check_arguments(args)
    device = check_common(args)
    given = QUICK if args.quick else [_size(text) for text in args.sizes or ()]
    dtype = chosen_dtype(args.dtype, device)
    more = [LARGE] if device.type == "cuda" else []
    plan = [
        (suite, Setting(*size, device, dtype))
        for suite in _suites(args, device)
        for size in given or [s for s in SIZES[suite] if s not in more] + more
    ]
    for setting in [at for suite, at in plan if suite not in FRUGAL]:
        check_memory(setting)
    return device, dtype, plan


def _suites(args: argparse.Namespace, device: torch.device) -> list[str]:
    "Those asked for, or all; ValueError where one of them has to be compiled and cannot."
    suites = list(dict.fromkeys(args.suites or SUITES))
    compiled = [suite for suite in suites if suite in COMPILED]
    reason = no_compiler(device) if compiled else ""
    if reason and args.suites:
        raise ValueError(f"suite {compiled[0]}: {reason}")
    if reason:
        warn(f"Nothing is compiled: {reason}")
    return [suite for suite in suites if not (reason and suite in compiled)]


# Measuring


def _bench(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, plan: list[tuple[str, Setting]]) -> int:
    "Measure what was planned, print it, and write down what was measured: an exit code."
    origin, tables, codes, stop = provenance(device), [], [0], None
    name = str(dtype).removeprefix("torch.")
    with _alone(device):  # what is compiled, is compiled for so many threads
        try:
            machine = measure_machine(device, dtype)
            announce(origin, name, machine)
            for suite, at in plan:
                codes.append(hold_suite(suite, at, args.seed, args.rounds, machine, tables))
        except STOPS as error:
            stop = error
        threads = torch.get_num_threads()
    if not tables:
        return max(*codes, _keep(args, Measurement, None, stop))
    rest = dict(dtype=name, threads=threads, seed=args.seed, rounds=args.rounds)
    rest |= dict(machine=dict(flops=machine.flops, bandwidth=machine.bandwidth))
    return max(*codes, _keep(args, Measurement, origin | rest | dict(tables=[asdict(t) for t in tables]), stop))


# Training, and taking heads out


def _stress(
    args: argparse.Namespace, names: list[str], rates: list[float], training: Training, device: torch.device
) -> int:
    "Train what was planned, write it down, and show what came of it: an exit code."
    seeds = range(args.seed, args.seed + args.seeds)
    found, stop = run_trials(names, rates, seeds, training, device, _progress())
    runs = [Run(**run) for run in found["runs"]]
    return _keep(args, Trials, found if runs else None, stop, lambda: show_trials(runs, training))


def _heads(args: argparse.Namespace, device: torch.device) -> int:
    "Take the heads out, write down all losses, and show the largest: an exit code."
    model, tokenizer = load_smollm2(device)
    found, stop = run_ablations(model, tokenizer, args.passages, args.seed, _progress())
    return _keep(args, Ablations, found, stop, lambda: show_ablations(Ablations(**found, command="heads")))


# The command


def main(
    argv: list[str] | None = None,  # the command line; sys.argv's unless told
) -> int:  # 0; 1 where something failed, 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads on
    "The command `mha-book`. A setting that is refused exits with 2."

    def command() -> int:
        args = _parser().parse_args(argv)
        try:
            plan = args.plan(args)
        except ValueError as error:
            args.refuse(str(error))
        return args.run(args, *plan)

    return to_the_end(command)
