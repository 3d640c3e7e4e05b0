"""What every command does in the end, and meanwhile: write its file, show what is in it, tell how far it is."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable

from .ending import exit_code, give_up, is_watched, reason, say, undisturbed, warn
from .ladder_sizes import SIZES
from .measured import Origin, write_file
from .mixing_sizes import SIZES as MIXING_SIZES
from .subjects import TEXTS


def _keep(
    args: argparse.Namespace,
    kind: type[Origin],
    found: dict | None,  # a `kind` without its command; None where nothing was measured
    stop: BaseException | None,  # what broke the command off
    show: Callable[[], str] | None = None,  # what is printed in the end
) -> int:
    "Write down what was measured, whatever broke the command off; then show it, and say how it ended: an exit code."
    written, faults = False, [stop]
    if found and args.json is not None:  # first of all, whatever happens to the screen
        written, late = _write(args, kind, found)
        faults.append(late)
    if found and not isinstance(stop, OSError):  # somebody still reads
        last = f"written: {args.json}" if written else "" if args.json is not None else "not written: no --json"
        try:
            say("\n".join([show() if show else "", last]).rstrip(), flush=True)
        except OSError as unread:
            faults.append(unread)
    outcome = f"in {args.json}" if written else "not in a file"
    outcome = f"what was measured is {outcome}" if found else "nothing was measured, and nothing is written"
    for fault in filter(None, faults):
        warn("\n" * is_watched() + f"{reason(fault)}; {outcome}")
    give_up(sys.stdout)
    return max(map(exit_code, faults))


def _write(args: argparse.Namespace, kind: type[Origin], found: dict) -> tuple[bool, BaseException | None]:
    "Write the file of --json: whether it is written, and what failed or came meanwhile."
    written = False
    try:
        with undisturbed():
            write_file(kind, args.json, found | dict(command=_command(args)))
            written = True
    except (KeyboardInterrupt, OSError, ValueError) as error:
        return written, error
    return written, None


def _progress() -> Callable[[int, int], None]:
    "Tells the person at the screen how many are done, and how long the rest takes."
    begin = time.monotonic()

    def tell(done, of):
        if is_watched():
            left = (time.monotonic() - begin) / max(done, 1) * (of - done) / 60
            text = f"  {done} of {of} done, about {left:.0f} min left"
            warn("\r\033[K" + (text if 0 < done < of else ""), end="")

    return tell


def _command(args: argparse.Namespace) -> str:
    "The command that was given, without what only this machine knows: the file's folder."
    given = vars(args)
    words = ["mha-book", args.command, *(given.get("suites") or given.get("treatments") or given.get("models") or ())]
    last = "device", "dtype", "rounds", "seeds", "seed", "steps"
    first = [name for name in ("passages", *TEXTS, *SIZES, *MIXING_SIZES) if name not in last]
    for name in dict.fromkeys((*first, *last)):  # each once
        if given.get(name) is not None:
            words += [f"--{name.replace('_', '-')}", str(given[name])]
    for name in ("sizes", "rates"):
        words += [f"--{name}", *map(str, given[name])] if given.get(name) else []
    words += ["--quick"] * given.get("quick", False)
    return shlex.join([*words, "--json", args.json.name])
