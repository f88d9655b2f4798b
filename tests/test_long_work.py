"""Interrupts keep what is done, full disks and full devices get a sentence, two runs don't write to one place."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from safeeraser.core import SafeEraserError, progress_bar
from safeeraser.generate import generate
from safeeraser.rows import read_rows
from safeeraser.trainer import unlearn

SMALL = {"lora_r": 4, "use_cpu": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
COMMAND = str(Path(sys.executable).parent / "safeeraser")


def start(*args): return subprocess.Popen([COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "never happened"
        time.sleep(.05)


@pytest.mark.slow
def test_interrupted_unlearning_goes_on(tiny, tmp_path):
    settings = [x for k, v in {**SMALL, "max_steps": 400, "save_strategy": "no", "learning_rate": 1e-3, "lora_dropout": .1}.items() for x in ("--set", f"{k}={json.dumps(v)}")]
    args = ("unlearn", "--model", tiny.model, "--data", tiny.data, "--method", "ga+pd", "--out", tmp_path / "run", "--seed", 5, *settings)
    process = start(*args)
    wait_for(lambda: (tmp_path / "run" / "run.json").exists())
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in err and "Traceback" not in err, err
    kept, = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert (kept / "complete").exists() and 0 < int(kept.name.split("-")[1]) < 400
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    done = start(*args)
    assert done.wait(120) == 0, done.stderr.read()
    whole = unlearn(tiny.model, tiny.data, tmp_path / "whole", "ga+pd", seed=5, progress=False, **SMALL, max_steps=400, save_strategy="no", learning_rate=1e-3, lora_dropout=.1)
    assert whole["steps"] == json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 400
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()


def test_interrupted_generation_goes_on(tiny, tmp_path):
    out = tmp_path / "r.jsonl"
    args = ("generate", "--model", tiny.model, "--data", tiny.data, "--out", out, "--batch-size", 1, "--max-new-tokens", 40)
    process = start(*args)
    part = tmp_path / "r.jsonl.part"
    wait_for(lambda: part.exists() and part.read_text().count("\n") > 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in err and "Traceback" not in err, err
    assert not out.exists() and part.read_text().count("\n") > 3
    assert start(*args).wait(120) == 0
    assert out.read_bytes() == generate(tiny.model, tiny.data, tmp_path / "w.jsonl", batch_size=1, max_new_tokens=40, progress=False).read_bytes()


def test_two_runs_into_one_place(tiny, tmp_path):
    process = start("unlearn", "--model", tiny.model, "--data", tiny.data, "--method", "ga", "--out", tmp_path / "run",
                    *(x for k, v in {**SMALL, "max_steps": 4000}.items() for x in ("--set", f"{k}={json.dumps(v)}")))
    try:
        wait_for(lambda: (tmp_path / "run" / "run.json").exists())
        with pytest.raises(SafeEraserError, match="another process is writing there"):
            unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", progress=False, **SMALL, max_steps=4000)
    finally:
        process.kill()
        process.communicate()


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails as on a full disk
sys.argv = ["safeeraser", *sys.argv[2:]]
from safeeraser.cli import main
main()
"""


@pytest.mark.parametrize("verb", ["generate", "unlearn", "judge", "world"])
def test_a_full_disk_leaves_nothing_half_written(verb, tiny, tmp_path, run_python):
    out = tmp_path / "out"
    if verb == "generate": args, limit = ("--model", tiny.model, "--data", tiny.data, "--out", out), 2000
    if verb == "world": args, limit = ("--out", out), 2000
    if verb == "judge":
        generate(tiny.model, tiny.data, tmp_path / "r.jsonl", progress=False)
        args, limit = (tmp_path / "r.jsonl", "--judge", "rule", "--out", out), 2000
    if verb == "unlearn":
        args = ("--model", tiny.model, "--data", tiny.data, "--method", "ga", "--out", out, "--set", "max_steps=1", "--set", "save_strategy=no", "--set", "use_cpu=true")
        limit = 60_000  # run.json fits, the adapter doesn't
    done = run_python(FULL, limit, verb, *args)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-1500:]
    assert "File too large" in done.stderr or "too large" in done.stderr.lower()
    assert not out.is_file() and not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("all_train.json"))
    assert not list(tmp_path.rglob("*.writing"))


def test_a_cache_that_cannot_be_written(tiny, tmp_path, run_python):
    (tmp_path / "cache").write_text("a file")
    code = "import sys; sys.argv[0] = 'safeeraser'; from safeeraser.cli import main; main()"
    done = run_python(code, "world", "--out", tmp_path / "w", env={"SAFEERASER_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2 and "set SAFEERASER_CACHE" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "w" / "model").exists()


def test_out_of_memory_says_what_to_lower(tiny, tmp_path, monkeypatch):
    import safeeraser.generate
    import safeeraser.trainer
    def full(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
    monkeypatch.setattr(safeeraser.trainer, "batch_tokens", full)
    with pytest.raises(SafeEraserError, match=r"per_device_train_batch_size \(now 2; raise gradient_accumulation_steps"):
        unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", progress=False, **SMALL)
    monkeypatch.setattr(safeeraser.generate, "answer_batch", full)
    with pytest.raises(SafeEraserError, match=r"lower --batch-size \(now 8\)"):
        generate(tiny.model, tiny.data, tmp_path / "r.jsonl", progress=False)


def test_the_probe_leaves_no_trace(tiny, tmp_path):
    quiet, told = (unlearn(tiny.model, tiny.data, tmp_path / str(p), "kl+pd", seed=1, progress=p, **SMALL, lora_dropout=.3, max_steps=4) for p in (False, True))
    assert (tmp_path / "True" / "adapter_model.safetensors").read_bytes() == (tmp_path / "False" / "adapter_model.safetensors").read_bytes()
    assert [h.get("loss") for h in quiet["history"]] == [h.get("loss") for h in told["history"]]


def test_bars_do_not_flood_a_log(capsys):
    for _ in progress_bar(range(3000), desc="x"): time.sleep(.0002)
    assert capsys.readouterr().err.count("x:") < 4


def test_fifty_thousand_rows(tiny, tmp_path):
    from safeeraser.judge import judge
    from safeeraser.report import report
    few = [json.loads(line) for line in generate(tiny.model, tiny.data, tmp_path / "few.jsonl", progress=False).read_text().splitlines()]
    with open(tmp_path / "many.jsonl", "w") as file:
        for i in range(50_000):
            file.write(json.dumps(few[i % len(few)] | {"sample": i // len(few)}) + "\n")
    begin = time.time()
    judge(tmp_path / "many.jsonl", "rule", tmp_path / "many.jsonl")
    row, = report(tmp_path / "many.jsonl")["rows"]
    assert time.time() - begin < 60
    assert row["sarr_n"] == sum((r["split"], r["set"]) == ("val", "decouple") for r in read_rows(tmp_path / "many.jsonl"))


def test_the_kernel_s_stop_button(tiny, tmp_path):
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel()
    try:
        client.execute(f"from safeeraser.trainer import unlearn\n"
                       f"unlearn({str(tiny.model)!r}, {str(tiny.data)!r}, {str(tmp_path / 'run')!r}, 'ga', seed=1, max_steps=5000, save_strategy='no', **{SMALL!r})")
        wait_for(lambda: (tmp_path / "run" / "run.json").exists())
        time.sleep(2)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)["content"]
        assert (reply["status"], reply["ename"]) == ("error", "Stopped") and "goes on from there" in reply["evalue"]
        kept, = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
        assert (kept / "complete").exists()
        client.execute("1 + 1", reply=True, timeout=30)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
