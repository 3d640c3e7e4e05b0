"""Commands that are measured step by step, and taken up again where they were broken off: `mha-book precision`,
`ladder` and `mixing`; and what all commands have in common.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ..instruments.device import pick_device
from ..lab.one_wrong_line import HAMLET
from ..models.language_model import SMOLLM2
from .files import check_writable
from .keeping import _command, _keep, _progress
from .ladder import Ladder, as_ladder, read_ladder, run_ladder, show_ladder
from .ladder_plan import LADDERS
from .ladder_sizes import SIZES as LADDER_SIZES
from .measured import OTHERS, Origin, write_file
from .mixing import Mixing, as_mixing, read_mixing, run_mixing, show_mixing
from .mixing_sizes import SIZES as MIXING_SIZES
from .precision import Precision, as_precision, read_precision, run_precision, show_precision
from .subjects import SUBJECTS, TEXTS, check_packages, checked_models, checked_sizes

# What all commands have in common


def check_common(args: argparse.Namespace) -> torch.device:
    "Seed, file and device of a command; its files are told from the others' by name."
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} must be 0 or more, and below 2**63")
    if args.json is not None:
        _check_file(args.json, args.command)
    device = pick_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: there is no clock for it; use cpu or cuda")
    return device


def _check_file(file: Path, command: str) -> None:
    "ValueError for a file that cannot be written, and for the name of another command's."
    if not file.name.isprintable() or len(file.name) > 200 or file.name == "-":
        raise ValueError(f"--json {str(file)!r}: needed is a name in print, up to 200 letters")
    try:
        check_writable(file)
    except ValueError as error:
        raise ValueError(f"--json {error}") from None
    named = [other for other in OTHERS if file.name.startswith(other)]
    if named != [command] * (command in OTHERS):
        raise ValueError(
            f"--json {file}: names of the stress test's files, and no others, begin with stress, as in "
            f"stress-yours.json, those of the heads with heads, of the ladder with ladder, of mixing with mixing, "
            f"and those of precision with precision"
        )


# mha-book precision, mha-book ladder: models are asked step by step, and files are taken up again


def add_precision(commands: argparse._SubParsersAction) -> None:
    "`mha-book precision`, what it takes and what it does."
    text, lots = "store keys and values in few bits, by a dozen rules", "of the rules that draw lots"
    _add_stepwise(commands, "precision", text, TEXTS, lots, read_precision, _precision)


def add_ladder(commands: argparse._SubParsersAction) -> None:
    "`mha-book ladder`, what it takes and what it does."
    text, lots = "do without heads, by some twenty rules and trainings", "of all that is drawn"
    _add_stepwise(commands, "ladder", text, LADDER_SIZES, lots, read_ladder, _ladder)


def _add_stepwise(
    commands: argparse._SubParsersAction, name: str, text: str, allowed: dict, lots: str, read: Callable, run: Callable
) -> None:
    "A command on models that is measured step by step, with the sizes that it allows."
    command = commands.add_parser(name, help=text)
    add = command.add_argument
    add("models", nargs="*", metavar="MODEL", help=f"{', '.join(SUBJECTS)}; both unless told")
    for size, (_, usual, _, what) in allowed.items():
        add(f"--{size.replace('_', '-')}", type=int, default=usual, metavar="N", help=what)
    add("--device", default="cpu", help="cpu (unless told), cuda, cuda:1")
    add("--seed", type=int, default=0, help=f"{lots}, and of the intervals (0)")
    kept = f"write all scores: {name}-yours.json, say; one that was broken off is taken up"
    add("--json", type=Path, metavar="FILE", help=kept)
    command.set_defaults(refuse=command.error, plan=partial(_plan_stepwise, allowed=allowed, read=read), run=run)


def _plan_stepwise(
    args: argparse.Namespace, allowed: dict, read: Callable[[Path], Origin]
) -> tuple[list[str], dict[str, int], Origin | None, torch.device]:
    "Of which models, on how many texts, what is measured already, and where; ValueError says why not."
    models, sizes = checked_models(args.models), checked_sizes(vars(args), allowed)
    check_packages(*[SMOLLM2] * ("language" in models), HAMLET)
    device = check_common(args)
    return models, sizes, _before(args, read), device


# mha-book mixing


def add_mixing(commands: argparse._SubParsersAction) -> None:
    "`mha-book mixing`, what it takes and what it does."
    mixing = commands.add_parser("mixing", help="train a dozen ways to mix heads on two tasks, and time them")
    add = mixing.add_argument
    for size, (_, usual, _, what) in MIXING_SIZES.items():
        add(f"--{size.replace('_', '-')}", type=int, default=usual, metavar="N", help=what)
    add("--device", default="cpu", help="cpu (unless told), cuda, cuda:1")
    add("--seed", type=int, default=0, help="the first of the seeds (0)")
    kept = "write all trainings: mixing-yours.json, say; one that was broken off is taken up"
    add("--json", type=Path, metavar="FILE", help=kept)
    mixing.set_defaults(refuse=mixing.error, plan=_plan_mixing, run=_mixing)


def _plan_mixing(args: argparse.Namespace) -> tuple[dict[str, int], Mixing | None, torch.device]:
    "How long, what is measured already, and where; ValueError says why not."
    sizes = checked_sizes(vars(args), MIXING_SIZES)
    check_packages(HAMLET)
    device = check_common(args)
    return sizes, _before(args, read_mixing), device


def _before(args: argparse.Namespace, read: Callable[[Path], Origin]) -> Origin | None:
    "What the file of --json holds already."
    return read(args.json) if args.json is not None and args.json.exists() else None


# Measuring


def _precision(
    args: argparse.Namespace, models: list[str], sizes: dict[str, int], before: Precision | None, device: torch.device
) -> int:
    "Measure heads and try the rules, write every score down at once, and show what they come to: an exit code."
    subjects = [SUBJECTS[name](sizes, device) for name in models]
    measure = partial(run_precision, subjects, sizes, args.seed, before)
    results = "traits", "effects", "points"
    return _by_steps(args, Precision, measure, results, lambda found: show_precision(as_precision(found)))


def _ladder(
    args: argparse.Namespace, models: list[str], sizes: dict[str, int], before: Ladder | None, device: torch.device
) -> int:
    "Climb every rung, write each down at once, and show what they come to: an exit code."
    subjects = [LADDERS[name](sizes, args.seed, device) for name in models]
    measure = partial(run_ladder, subjects, sizes, args.seed, before)
    results = "importance", "rungs", "tables"
    return _by_steps(args, Ladder, measure, results, lambda found: show_ladder(as_ladder(found)))


def _mixing(args: argparse.Namespace, sizes: dict[str, int], before: Mixing | None, device: torch.device) -> int:
    "Train and time every kind, write each down at once, and show what they come to: an exit code."
    measure = partial(run_mixing, sizes, args.seed, device, before)
    return _by_steps(args, Mixing, measure, ("runs", "tables"), lambda found: show_mixing(as_mixing(found)))


def _by_steps(
    args: argparse.Namespace, kind: type[Origin], measure: Callable, results: tuple[str, ...], show: Callable
) -> int:
    "Measure, and write the file after every step; a file without any of the results is not written in the end."

    def keep(found: dict) -> None:
        if args.json is not None:
            write_file(kind, args.json, found | dict(command=_command(args)))

    try:
        found, stop = measure(_progress(), keep)
    except ValueError as error:
        args.refuse(f"--json {args.json}: {error}")
    empty = not any(found[name] for name in results)
    return _keep(args, kind, None if empty else found, stop, lambda: show(found))
