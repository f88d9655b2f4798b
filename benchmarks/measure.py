"""Times taken alternately, and the most memory a process of its own ever held."""
import os, statistics, subprocess, sys, time
from collections.abc import Callable
from pathlib import Path

import torch


def clock(run: Callable) -> float:
    "Seconds."
    if torch.cuda.is_available(): torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(runs: dict[str, Callable], times: int = 5) -> dict[str, list[float]]:
    "Seconds of each run, taken in turn: what disturbs the machine disturbs all."
    seconds = {name: [] for name in runs}
    for k in range(times):
        for name in list(runs)[k % len(runs):] + list(runs)[:k % len(runs)]: seconds[name].append(clock(runs[name]))
    return seconds


def ratios(slow: list[float], fast: list[float]) -> dict:
    "Median, smallest and largest ratio of neighbours."
    found = [a / b for a, b in zip(slow, fast)]
    return {"ratio": round(statistics.median(found), 3), "ratio_min": round(min(found), 3), "ratio_max": round(max(found), 3)}


def resident(what: str = "VmRSS") -> float:
    "This process's memory in MiB: VmRSS now, VmHWM at its highest."
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(what))
    return int(line.split()[1]) / 1024


def peak_of(*arguments: str) -> float:
    "MiB that `cpu.py --peak ARGUMENTS` needed in a process of its own; glibc is told to give freed tensors back at once, lest what it retains be counted."
    out = subprocess.run([sys.executable, str(Path(__file__).with_name("cpu.py")), "--peak", *map(str, arguments)], capture_output=True, text=True,
                         env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    if out.returncode: raise RuntimeError(out.stderr.strip().splitlines()[-1])
    return float(out.stdout.split()[-1])
