"""What torch does, by its profiler."""

import torch

from mha_book.instruments.device import _quiet_stderr


def operations(call):
    "The torch operations of `call`, backward included, in order, by the profiler."
    with _quiet_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events() if event.name.startswith("aten::")]
