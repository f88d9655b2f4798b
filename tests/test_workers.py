"""Workers prepare rows, and change nothing: not a number, not what a kill leaves behind."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safeeraser.core import SafeEraserError
from safeeraser.settings import make_config, spare_cores
from safeeraser.trainer import unlearn

SETTINGS = dict(lora_r=4, lora_alpha=8, lora_dropout=.2, use_cpu=True, num_train_epochs=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                learning_rate=1e-2, seed=2, progress=False, logging_steps=1, save_strategy="no")


def weights(folder: Path) -> dict: return load_file(folder / "adapter_model.safetensors")


def equal(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def children(parent: int) -> list[int]:
    "Processes that a process started and that are still at work."
    def of(p):
        try: return int((p / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        except OSError: return False
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and of(p)]


def alive(process: int) -> bool:
    try: return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError: return False


@pytest.mark.parametrize("more", [{"packing": "split"}, {"packing": "off", "dataloader_persistent_workers": False}], ids=["packed", "workers of an epoch"])
def test_workers_change_nothing(more, tiny, tmp_path):
    "With dropout, over several epochs: the random numbers go on as without them."
    runs = {n: unlearn(tiny.model, tiny.data, tmp_path / str(n), "kl+pd", dataloader_num_workers=n, **SETTINGS | {k: v for k, v in more.items() if n or k == "packing"}) for n in (0, 2)}
    losses = lambda record: [(h["loss"], h["grad_norm"]) for h in record["history"] if "loss" in h]
    assert losses(runs[0]) == losses(runs[2]) and len(losses(runs[0])) >= 9
    assert equal(weights(tmp_path / "0"), weights(tmp_path / "2"))
    if Path("/proc").is_dir(): assert not [c for c in children(os.getpid()) if alive(c) and b"multiprocessing" not in Path(f"/proc/{c}/cmdline").read_bytes()]


def test_how_many_there_are_by_default(monkeypatch):
    assert make_config(Path("x"), use_cpu=True).dataloader_num_workers == 0 and not make_config(Path("x"), use_cpu=True).dataloader_persistent_workers
    asked = make_config(Path("x"), use_cpu=True, dataloader_num_workers=3)
    assert asked.dataloader_num_workers == 3 and asked.dataloader_persistent_workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert spare_cores() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert spare_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert spare_cores() == 0
    with pytest.raises(SafeEraserError, match="dataloader_persistent_workers=true, but dataloader_num_workers is 0"): make_config(Path("x"), use_cpu=True, dataloader_persistent_workers=True)


RUN = """
import json, sys
from safeeraser.trainer import unlearn
if __name__ == "__main__": unlearn(*sys.argv[1:4], "gd+pd", dataloader_num_workers=2, num_train_epochs=8, save_strategy="steps", save_steps=3, **json.loads(sys.argv[4]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_with_workers_survives_a_kill(how, tiny, tmp_path):
    "The kill of the one process, and Ctrl-C, which reaches the workers too; the same call goes on, and no worker is left."
    settings = {k: v for k, v in SETTINGS.items() if k not in ("num_train_epochs", "save_strategy")}
    (tmp_path / "run.py").write_text(RUN)
    start = lambda: subprocess.Popen([sys.executable, tmp_path / "run.py", tiny.model, tiny.data, tmp_path / "killed", json.dumps(settings)], start_new_session=True,
                                     stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run, checkpoint = start(), tmp_path / "killed" / "checkpoints" / "checkpoint-6" / "complete"
    while not checkpoint.exists():
        assert run.poll() is None
        time.sleep(.05)
    workers = children(run.pid)
    assert len(workers) == 2
    os.kill(run.pid, how) if how == signal.SIGKILL else os.killpg(run.pid, how)
    assert run.wait(60) != 0
    until = time.time() + 20
    while any(map(alive, workers)):
        assert time.time() < until, "workers are left"
        time.sleep(.1)
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["finished"] is False
    assert start().wait(200) == 0
    unlearn(tiny.model, tiny.data, tmp_path / "whole", "gd+pd", num_train_epochs=8, **settings, save_strategy="no")
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
