"""A file that is measured step by step: kept after every step, and taken up again where it was broken off."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch

from ..instruments.device import _alone
from .ending import STOPS
from .measured import Origin

Found = dict[str, Any]  # the fields of a file, but for its command


def taken_up(
    found: Found,  # of a file in which nothing is measured
    before: Origin | None,  # an unfinished file; None where there is none
    settings: Iterable[str],  # fields that must be the same in both
    results: Iterable[str],  # fields that are taken from it
) -> Found:
    "The fields of a file in which nothing is measured, or what was. ValueError where that is of other settings."
    if before is None:
        return found
    for field in settings:
        if getattr(before, field) != found[field]:
            raise ValueError(
                f"the file was begun with another {field}: {str(getattr(before, field))[:80]}, now "
                f"{str(found[field])[:80]}; take it up as it was begun, or give another name"
            )
    return found | {name: asdict(before)[name] for name in results}


def run_steps(
    found: Found,  # filled in place
    device: torch.device,
    planned: Callable[[], list[Callable[[], None]]],  # the steps that `found` lacks
    tell: Callable[[int, int], object],  # told (how much is done, of how much)
    keep: Callable[[Found], object],  # gets what is there after each step
) -> BaseException | None:  # what stopped it
    "Do the steps. Ctrl-C or a failure ends it, and what is done is kept."
    begin, spent, stop = time.process_time(), found["seconds"], None
    with _alone(device):
        found["threads"] = torch.get_num_threads()
        steps = planned()
        try:
            for done, step in enumerate(steps):
                tell(done, len(steps))
                step()
                found["seconds"] = round(spent + time.process_time() - begin, 1)
                found["complete"] = done + 1 == len(steps)
                keep(found)
            tell(len(steps), len(steps))
        except STOPS as error:
            stop = error
    found["complete"] = not planned()
    return stop
