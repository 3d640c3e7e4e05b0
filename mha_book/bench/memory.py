"""What a machine cannot measure: a format that it only imitates, and sizes for which there is no memory."""

import re
from pathlib import Path

import torch

from ..instruments.device import benchmark
from .suites import Setting

# Formats


def chosen_dtype(
    name: str | None,  # such as "float32"; None = what suits the device
    device: torch.device,
) -> torch.dtype:
    "The dtype of that name; ValueError where its numbers would describe something else."
    if name is None:
        real = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        name = "float32" if device.type == "cpu" else "bfloat16" if real else "float16"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"--dtype {name}: needed is float32, bfloat16, float16 or float64")
    if device.type == "cuda" and dtype == torch.float64:
        raise ValueError(
            "--dtype float64: torch's fused kernels do not take it on a GPU, so every way would be timed "
            "through the same unfused one"
        )
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        single, half = (torch.ones(256, 256, dtype=t, device="cpu") for t in (torch.float32, dtype))
        products = {"float32": lambda: single @ single, name: lambda: half @ half}
        if (slower := benchmark(products, device="cpu")[name]).low > 1:
            raise ValueError(
                f"--dtype {name}: on this CPU a product takes {slower.ratio:.1f} x as long as in float32 "
                f"(just measured), so the times would say nothing about attention; use float32"
            )
    return dtype


# Memory


def free_bytes(device: torch.device) -> int | None:
    "Memory that is free; None where it cannot be read."
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    for name, form, unit in (
        ("/proc/meminfo", r"MemAvailable: *(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"(\d+)\s*", 1),
    ):
        text = Path(name).read_text(encoding="utf8") if Path(name).exists() else ""
        if match := re.search(form, text):
            found.append(int(match[1]) * unit)
    return min(found, default=None)


LOGITS = 8  # tensors of the logits' size that the hungriest way holds at once


def check_memory(at: Setting) -> None:
    "ValueError where the ways that hold the logits would not fit into memory."
    logits = at.batch * at.heads * at.tokens**2
    rest = 12 * at.width**2 + 16 * at.batch * at.tokens * at.width  # weights, and tokens
    needed, free = (LOGITS * logits + rest) * at.dtype.itemsize, free_bytes(at.device)
    size = ",".join(map(str, at.size))
    if free is not None and needed > free:
        raise ValueError(
            f"--sizes {size}: ways that hold the logits need up to "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            f"take fewer sequences or tokens"
        )
