"""What a run is told is checked before work begins, and what it was told acts in full."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safeeraser.core import SafeEraserError
from safeeraser.loss import parse_objective
from safeeraser.model import load_model
from safeeraser.settings import read_config
from safeeraser.sweep import sweep
from safeeraser.trainer import plan_text, unlearn, UnlearnTrainer

SMALL = dict(seed=1, progress=False, lora_r=2, use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=1, warmup_steps=0)

REFUSED = [
    {"lora_r": 1.5}, {"lora_r": "x"}, {"lora_r": 0}, {"lora_r": 10**9}, {"learning_rate": float("nan")}, {"learning_rate": float("inf")}, {"learning_rate": -1.}, {"max_steps": 1.5},
    {"max_steps": 0}, {"max_steps": -2}, {"threads": 0}, {"threads": 1.5}, {"per_device_train_batch_size": 1.5}, {"gradient_accumulation_steps": 0},
    {"gradient_accumulation_steps": -1}, {"report_to": "tensorboard"}, {"report_to": "nonsense"}, {"stop_forget_ce": "abc"}, {"stop_forget_ce": float("nan")}, {"max_length": "abc"},
    {"max_length": 0}, {"deepspeed": "/nowhere.json"}, {"dataloader_num_workers": -1}, {"neftune_noise_alpha": 5.}, {"fsdp": "full_shard"}, {"auto_find_batch_size": True},
    {"label_smoothing_factor": .1}, {"train_sampling_strategy": "group_by_length"}, {"data_seed": 5}, {"fp16": True}, {"eval_strategy": "steps"}, {"load_best_model_at_end": True},
    {"seed": -1}, {"seed": 2**32}, {"seed": 10**30}, {"num_train_epochs": 0}, {"num_train_epochs": float("inf")}, {"weight_decay": float("nan")}, {"adam_beta1": 1.},
    {"save_total_limit": 1}, {"torch_compile": True}, {"optim": "nonsense"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lora_dropout": 1.}, {"vision_cache_gib": -1.},
    {"save_only_model": True}, {"ignore_data_skip": True}, {"dataloader_drop_last": True}, {"bf16": "yes"}, {"use_cpu": 1}, {"output_dir": "elsewhere"}, {"push_to_hub": True}]


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_settings_are_refused_before_work_begins(settings, tiny, tmp_path, monkeypatch):
    import safeeraser.trainer
    monkeypatch.setattr(safeeraser.trainer, "load_model", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(SafeEraserError, match=f"(?i){next(iter(settings))}") as found: unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", **{**SMALL, **settings})
    assert "\n" not in str(found.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["npo(beta=0)", "npo(beta=nan)", "npo(beta=-1)", "simnpo(beta=inf)", "dpo(beta=-0.1)+ce", "simnpo(delta=nan)", f"{'9' * 400} ga"])
def test_a_term_s_options_have_a_range(method):
    with pytest.raises(SafeEraserError, match="above 0 belongs here|finite"): parse_objective(method)


def test_a_preset_inside_a_spelling():
    with pytest.raises(SafeEraserError, match=r"po is a preset, not a term; in a spelling write its terms: idk \+ ce"): parse_objective("po + kl")


def test_a_stopping_rule_that_nothing_reads(tiny, tmp_path):
    with pytest.raises(SafeEraserError, match="stop_forget_ce=3.0 looks at the harmful answers, which method 'po' never reads"):
        unlearn(tiny.model, tiny.data, tmp_path / "run", "po", **SMALL, stop_forget_ce=3.)


@pytest.mark.parametrize("text, said", [("model: 5", "model: a text"), ("out: 5", "out: a text"), ("data: [a]", "data: a text"), ("preset: [a]", "preset: a text"), ("method: [a]", "method: a text"),
                                        ("seed: x", "seed: a whole number"), ("settings: [a]", "settings: an object"), ("5", "keys and values"), ("a: [", "not YAML")])
def test_configuration_files(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SafeEraserError, match=said): read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("epochs, steps", [(.5, 3), (1, 6), (1.5, 9), (2, 12)])
def test_the_plan_counts_the_steps_that_are_made(epochs, steps, tiny, tmp_path, monkeypatch):
    plans = []
    init = UnlearnTrainer.train
    monkeypatch.setattr(UnlearnTrainer, "train", lambda self, **k: (plans.append(plan_text(self)), init(self, **k))[1])
    record = unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", **SMALL, num_train_epochs=epochs, save_strategy="no")
    assert record["steps"] == steps and re.search(r"(\d+) steps of 2", plans[0])[1] == str(steps)


def test_other_weights_between_two_legs_and_after_the_last(tiny, tmp_path):
    import shutil
    model, out = shutil.copytree(tiny.model, tmp_path / "model"), tmp_path / "run"
    unlearn(model, tiny.data, out, "ga", **SMALL, max_steps=1, save_strategy="no")
    weights = load_file(model / "model.safetensors")
    last = max(weights)
    weights[last] = weights[last].clone()
    weights[last].view(-1)[-1] += 1e-3
    for finished in (True, False):
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps(record | {"finished": finished}))
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SafeEraserError, match="was begun with other weights"): unlearn(model, tiny.data, out, "ga", **SMALL, max_steps=1, save_strategy="no")
    shutil.copy(tiny.model / "model.safetensors", model)
    assert unlearn(model, tiny.data, out, "ga", **SMALL, max_steps=1, save_strategy="no")["finished"]


def test_weights_that_grew_beyond_numbers_finish_no_run(tiny, tmp_path, monkeypatch):
    def overflow(self, args, state, control, model=None, **_): next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))
    monkeypatch.setattr("safeeraser.trainer.StopInTime.on_step_end", overflow, raising=False)  # as the last update of a run may
    with pytest.raises(SafeEraserError, match="hold NaN or infinity, so this run is not finished; lower learning_rate"):
        unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", **SMALL, max_steps=1, save_strategy="no", packing="off")
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"] and not (tmp_path / "run" / "adapter_model.safetensors").exists()


LEG = """
import os, signal, sys, time
from transformers import TrainerCallback
import safeeraser.trainer as t
model, data, out, at = sys.argv[1:5]
class Act(TrainerCallback):
    def on_step_end(self, args, state, control, **k):
        time.sleep(.2)
        if at == str(state.global_step): os.kill(os.getpid(), signal.SIGKILL)
init = t.UnlearnTrainer.__init__
def act(self, *a, **k): init(self, *a, **k); self.add_callback(Act())
t.UnlearnTrainer.__init__ = act
if at == "saving": t.save_trained = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
if at == "last checkpoint":
    save = t.UnlearnTrainer._save_checkpoint
    def interrupted(self, *a):
        if self.state.global_step == 8: os.kill(os.getpid(), signal.SIGINT)
        return save(self, *a)
    t.UnlearnTrainer._save_checkpoint = interrupted
try: t.unlearn(model, data, out, "ga+pd", seed=1, progress=False, lora_r=2, use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=8, learning_rate=1e-2,
               save_strategy="epoch" if at in ("saving", "last checkpoint", "whole") else "steps", save_steps=3, packing="dense")
except KeyboardInterrupt: sys.exit(130)
"""


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("legs") / "run"
    unlearn(tiny.model, tiny.data, out, "ga+pd", **SMALL | {"warmup_steps": .06}, max_steps=8, learning_rate=1e-2, packing="dense")
    return out


@pytest.mark.parametrize("at, code", [("saving", -9), ("last checkpoint", 130)])
def test_a_run_at_its_end_only_saves(at, code, tiny, tmp_path, whole, run_python):
    assert run_python(LEG, tiny.model, tiny.data, tmp_path / "run", at).returncode == code
    assert run_python(LEG, tiny.model, tiny.data, tmp_path / "run", "whole").returncode == 0
    a, b = (json.loads((o / "run.json").read_text()) for o in (tmp_path / "run", whole))
    assert a["steps"] == b["steps"] == 8
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert [h["loss"] for h in a["history"] if "loss" in h] == [h["loss"] for h in b["history"] if "loss" in h]


def test_legs_add_up_and_each_step_is_told_once(tiny, tmp_path, run_python):
    assert run_python(LEG, tiny.model, tiny.data, tmp_path / "run", "5").returncode == -9
    assert run_python(LEG, tiny.model, tiny.data, tmp_path / "run", "none").returncode == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "checkpoints" / "composition.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] >= 8 * .2  # each step slept so long; the second leg made five of them


def test_a_full_disk_during_a_checkpoint(tiny, tmp_path, run_python):
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails as on a full disk
import safeeraser.trainer as t
save = t.UnlearnTrainer._save_checkpoint
def full(self, *a):
    if sys.argv[4] == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    return save(self, *a)
t.UnlearnTrainer._save_checkpoint = full
try: t.unlearn(*sys.argv[1:4], "ga", seed=1, progress=False, lora_r=2, use_cpu=True, max_steps=2)
except t.SafeEraserError as e: print(e); sys.exit(2)
"""
    done = run_python(code, tiny.model, tiny.data, tmp_path / "run", "full")
    assert done.returncode == 2 and re.search(r"checkpoint-\d: the checkpoint cannot be written; is the disk full\?", done.stdout), done.stderr[-1500:]
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    for out in ("run", "other"): assert run_python(code, tiny.model, tiny.data, tmp_path / out, "not").returncode == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == (tmp_path / "other" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("tuning", ["lora", "qlora", "full", "sine"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bf16", [None, True, False])
def test_precisions(tuning, weights, bf16, tiny, tmp_path):
    "Trains, with progress on and rows packed, or says in a sentence why not."
    if tuning == "qlora": pytest.importorskip("bitsandbytes")
    net, processor = load_model(tiny.model, "cpu", dtype=weights)
    for part in (net, processor): part.save_pretrained(tmp_path / "model")
    own = {"tuning": tuning} if tuning != "sine" else {"projector": "sine"}
    call = lambda: unlearn(tmp_path / "model", tiny.data, tmp_path / "run", "gd+pd", **SMALL | {"progress": True}, max_steps=2, save_strategy="no", group_images=True, **own, **{} if bf16 is None else {"bf16": bf16})
    if bf16 is False and weights == torch.bfloat16 and tuning != "full":
        with pytest.raises(SafeEraserError, match="bf16=false, but the model's weights are bfloat16"): call()
        return
    record = call()
    assert record["finished"] and record["packing"]["route"], record["packing"]


def test_one_bar_and_nothing_dead(tiny, tmp_path, capsys, monkeypatch):
    import tqdm.auto
    drawn, make = [], tqdm.auto.tqdm.__init__
    monkeypatch.setattr(tqdm.auto.tqdm, "__init__", lambda self, *a, **k: (drawn.append(k.get("desc")) if not k.get("disable") else None, make(self, *a, **k))[1])
    unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", **SMALL | {"progress": True}, max_steps=2)
    assert drawn == ["ga"]
    assert "0/2" not in capsys.readouterr().err.split("\r")[-1]


def test_a_sweep_is_checked_before_it_trains(tiny, tmp_path):
    from safeeraser.world import World, write_dataset
    data = write_dataset(World(0), tmp_path / "dataset", {"train": 2, "dev": 2})
    whole = dict(model=tiny.model, data=data, out=tmp_path / "s", method="po", grid={"lora_r": [4]}, judge="exact", progress=False)
    for wrong in ({"grid": {"lora_r": [4, "x"]}}, {"grid": {"learning_rate": [1e-3, float("nan")]}}, {"grid": {"seed": [1, 2]}}, {"grid": {"lora_r": []}}, {"grid": {"lora_r": [4, 4]}},
                  {"judge": "nonsense"}, {"method": "nonsense"}, {"grid": {"tuning": ["lora", "full"]}, "projector": "sine"}, {"seed": -1}):
        with pytest.raises(SafeEraserError): sweep(**whole | wrong)
    assert not (tmp_path / "s").exists()


DEMO = """
import sys, time
from safeeraser import cli
def wait(*a): time.sleep(600)
if __name__ == "__main__":
    with cli._executor(2) as pool:
        for f in [pool.submit(time.sleep, 600) for _ in range(2)]: f.result()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(how, tmp_path):
    (tmp_path / "demo.py").write_text(DEMO)
    parent = subprocess.Popen([sys.executable, tmp_path / "demo.py"])
    children = lambda: [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and f"\nPPid:\t{parent.pid}\n" in _status(p) and b"spawn_main" in (p / "cmdline").read_bytes()]
    _wait(lambda: len(children()) >= 2)
    time.sleep(15)  # until they have imported torch and wait for work
    workers = children()
    os.kill(parent.pid, how)
    parent.wait()
    _wait(lambda: not any(Path(f"/proc/{w}").exists() and "State:\tZ" not in _status(Path(f"/proc/{w}")) for w in workers), 20)


def _status(process: Path) -> str:
    try: return (process / "status").read_text()
    except OSError: return ""


def _wait(condition, seconds=60):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "never happened"
        time.sleep(.1)
