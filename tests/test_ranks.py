"""Several ranks make the steps that one process makes, stop after the same one, and go on from there in other numbers."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import script
from two_ranks import batch, CONFIGS, difference, ENGINES, PACKINGS, SMALL, together, TUNINGS, UNLEARN, unlearn_together

from safeeraser.core import SafeEraserError
from safeeraser.ranks import engine_conflicts, engine_of, share_batch
from safeeraser.settings import make_config
from safeeraser.trainer import unlearn

needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")
engines = [pytest.param(name, marks=needs_deepspeed) if name.startswith("zero") else name for name in ENGINES]


def fine(done): assert [d.returncode for d in done] == [0] * len(done), "\n".join(d.stderr[-2000:] for d in done)


def record(run: Path) -> dict: return json.loads((run / "run.json").read_text())


PIECES = """
import json, os, sys, signal, torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from safeeraser.core import SafeEraserError
from safeeraser.ranks import *
dist.init_process_group("gloo")
mine, tmp, said = rank(), Path(sys.argv[1]), {}
def fails(): raise SafeEraserError("the disk is full")
def error(work):
    try: work()
    except SafeEraserError as e: return str(e)
said["first"] = first_does(lambda: f"rank {rank()}")
said["failed"] = error(lambda: first_does(fails))
said["everywhere"] = everywhere(mine == 0)
(tmp/str(mine)).mkdir(exist_ok=True)
said["shared"] = error(lambda: check_shared(tmp/"shared"))
said["apart"] = error(lambda: check_shared(tmp/str(mine)/"run", patience=.2))
flags = stop_flags(signal.SIGTERM if mine else None)
dist.all_reduce(flags)
said["heard"] = heard(flags)
torch.manual_seed(0)
layer = torch.nn.Linear(3, 5)
layer.bias.requires_grad_(False)
expected = {k: v.clone() for k, v in layer.state_dict().items()}
fully_shard(layer, mesh=init_device_mesh("cpu", (world_size(),)))
whole = whole_state(layer)
said["whole"] = sorted(whole), all(torch.equal(whole[k], expected[k]) for k in whole)
said["part"] = layer.weight.to_local().shape[0]
layer(torch.full((1, 3), float("inf") if mine else 1.)).sum().backward()
finite = torch.tensor(float(gradients_finite(layer)))
dist.all_reduce(finite, dist.ReduceOp.MIN)
said["finite"] = bool(finite)
print(json.dumps(said))
"""


def test_the_pieces_on_two_ranks(tmp_path):
    done = together(PIECES, tmp_path)
    fine(done)
    first, second = (json.loads(d.stdout.splitlines()[-1]) for d in done)
    for said in (first, second):
        assert said["first"] == "rank 0" and said["failed"] == "the disk is full" and said["everywhere"] == [1]
        assert said["shared"] is None and "rank 1 does not see what rank 0 writes there" in said["apart"]
        assert said["heard"] == signal.SIGTERM and said["finite"] is False
    assert first["whole"] == [["bias", "weight"], True] and second["whole"] == [[], True]
    assert {first["part"], second["part"]} == {2, 3}
    assert not list(tmp_path.glob("**/.*seen*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_one_process_with_a_checkpoint(number, tiny, tmp_path):
    run = [{"model": tiny.model, "data": tiny.data, "out": tmp_path / "run", **SMALL, **batch(2, 1), "max_steps": 4, "kill": [0, 2, number]}]
    stopped = script(UNLEARN, json.dumps(run, default=str), cwd=Path(__file__).parent)
    assert stopped.returncode == 128 + number
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "complete").is_file() and not record(tmp_path / "run")["finished"]


def test_the_command_says_by_what_it_was_stopped(tiny, tmp_path):
    code = "from two_ranks import kill_at; kill_at(0, 1, 15); from safeeraser.cli import main; main()"
    done = script(code, "unlearn", "--model", tiny.model, "--data", tiny.data, "--method", "gd", "--out", tmp_path / "run",
                  "--set", "max_steps=2", "--set", "lora_r=2", "--set", "use_cpu=true", cwd=Path(__file__).parent)
    assert done.returncode == 143 and done.stderr.endswith("safeeraser: stopped after step 1; the same call goes on from there\n"), done.stderr


def test_settings_of_fewer_ranks_are_the_same_task(tiny, tmp_path):
    "Of the same batch; another batch is another task."
    out, said = tmp_path / "run", {"progress": False, "model": tiny.model, "data": tiny.data, "out": tmp_path / "run"}
    small = {**SMALL, "max_steps": 1, "use_cpu": True}
    assert unlearn(**said, **small, **batch(2, 2))["effective_batch"] == 4
    made = record(out)
    (out / "run.json").write_text(json.dumps(made | {"finished": False, "effective_batch": 8}))  # as of two ranks
    with pytest.raises(SafeEraserError, match="holds another run"): unlearn(**said, **small, **batch(2, 1))
    assert unlearn(**said, **small, **batch(2, 4))["effective_batch"] == 8   # as a preset would spell it for one
    (out / "run.json").write_text(json.dumps(made | {"finished": False, "effective_batch": 8}))
    assert unlearn(**said, **small, **batch(2, 2))["effective_batch"] == 8   # the same command


def test_what_an_engine_cannot_do_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(SafeEraserError, match="fsdp2 is for several processes"): make_config(tmp_path, fsdp=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    said = lambda **args: " ".join(engine_conflicts(SimpleNamespace(**{"deepspeed_plugin": None, "fsdp": None, "world_size": 2, "tuning": "lora", **args})))
    assert not said() and not said(tuning="qlora") and not said(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    assert "zero3 does not split 4-bit weights" in said(deepspeed_plugin=SimpleNamespace(zero_stage=3), tuning="qlora")
    assert "that is ddp" in said(deepspeed_plugin=SimpleNamespace(zero_stage=0))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "take version 2" in said()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert not said() and "fsdp2 does not split 4-bit weights" in said(tuning="qlora")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert "set it to false" in said()


def launch_environment(file: Path) -> dict:
    "What `accelerate launch` would tell the ranks."
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env
    args = launch.launch_command_parser().parse_args(["--config_file", str(file), "-m", "safeeraser"])
    args, *_ = launch._validate_launch_command(args)
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(("ACCELERATE", "FSDP"))}


def test_the_files_that_are_shipped(tmp_path, monkeypatch):
    assert sorted(p.name for p in CONFIGS.iterdir()) == ["ddp.yaml", "deepspeed_zero2.json", "fsdp2.yaml", "zero3.json"]
    ddp, fsdp = (launch_environment(CONFIGS / f"{name}.yaml") for name in ("ddp", "fsdp2"))
    assert "ACCELERATE_USE_FSDP" not in ddp and fsdp["FSDP_VERSION"] == "2" and fsdp["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    for name, value in fsdp.items(): monkeypatch.setenv(name, value)
    assert engine_of(SimpleNamespace(deepspeed_plugin=None, fsdp=None, world_size=8)) == "fsdp2"


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines)
def test_two_ranks_are_one_process(engine, tiny, tmp_path):
    "Weights and gradient norms; packed rows make several passes a step."
    cases = [(tuning, packing) for tuning in TUNINGS for packing in PACKINGS]
    said = {case: {"model": tiny.model, "data": tiny.data, **SMALL, **TUNINGS[case[0]], **PACKINGS[case[1]]} for case in cases}
    done = unlearn_together(*({**said[c], "out": tmp_path / "-".join(c), **batch(2, 2), **ENGINES[engine]} for c in cases))
    fine(done)
    made = json.loads(done[0].stdout.splitlines()[-1])["passes"]
    assert all(min(passes) >= 2 for (_, packing), passes in zip(cases, made) if packing == "split")
    for case in cases:
        two, one = tmp_path / "-".join(case), tmp_path / f"one-{'-'.join(case)}"
        alone = unlearn(progress=False, out=one, **said[case], **batch(2, 4))
        norms = [[h["grad_norm"] for h in r["history"] if "grad_norm" in h] for r in (alone, record(two))]
        assert difference(two, one) < (1e-4 if case[0] == "full" else 1e-5), case
        assert norms[1] == pytest.approx(norms[0], rel=1e-4) and len(norms[0]) == 3
        assert record(two)["effective_batch"] == alone["effective_batch"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines)
def test_a_stop_of_one_rank_stops_all_and_they_go_on(engine, tiny, tmp_path):
    said = {"model": tiny.model, "data": tiny.data, **SMALL, **ENGINES[engine], **PACKINGS["split"], **batch(2, 1), "max_steps": 5, "lora_dropout": .2}
    stopped = unlearn_together({**said, "out": tmp_path / "run", "kill": [1, 3, signal.SIGTERM]})
    assert [d.returncode for d in stopped] == [143, 143], stopped[0].stderr[-2000:]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]  # heard with the next step's counts; in the second epoch
    fine(unlearn_together({**said, "out": tmp_path / "run"}))
    fine(unlearn_together({**said, "out": tmp_path / "whole"}))
    assert difference(tmp_path / "run", tmp_path / "whole") == 0


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_ranks_and_the_same_batch(tiny, tmp_path):
    for packing in PACKINGS:
        said = {"model": tiny.model, "data": tiny.data, **SMALL, **PACKINGS[packing], "max_steps": 5}
        out = tmp_path / packing
        unlearn_together({**said, **batch(2, 1), "out": out, "kill": [0, 3, signal.SIGTERM]})
        made = unlearn(progress=False, out=out, **said, **batch(2, 1))
        assert made["effective_batch"] == 4
        unlearn(progress=False, out=tmp_path / f"one-{packing}", **said, **batch(2, 2))
        assert difference(out, tmp_path / f"one-{packing}") < 1e-5
    with pytest.raises(SafeEraserError, match="cannot share equally"): share_batch(4, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", engines)
def test_no_update_is_made_from_a_gradient_that_is_none(engine, tiny, tmp_path):
    "Whichever rank meets it; and the limit on forgetting holds under engines that step by themselves."
    done = together(BLOWS_UP, json.dumps({"model": tiny.model, "data": tiny.data, "out": tmp_path / "run", **SMALL, **ENGINES[engine], **batch(2, 2), "packing": "off"}, default=str))
    fine(done)
    assert record(tmp_path / "run")["stopped"] == {"step": 2, "reason": "a gradient was not finite"}
    one = unlearn(progress=False, out=tmp_path / "one", model=tiny.model, data=tiny.data, **SMALL | {"method": "ga", "max_steps": 1, "lr_scheduler_type": "constant"}, **batch(2, 4), packing="off")
    limit = {"method": "ga", "stop_forget_ce": -one["history"][0]["ga"] + 1e-3, "lr_scheduler_type": "constant", "learning_rate": .1, "num_train_epochs": 9, "max_steps": -1}
    said = {"model": tiny.model, "data": tiny.data, **SMALL | limit, "packing": "off"}
    fine(unlearn_together({**said, "out": tmp_path / "limit", **batch(2, 2), **ENGINES[engine]}))
    alone = unlearn(progress=False, out=tmp_path / "alone", **said, **batch(2, 4))
    assert record(tmp_path / "limit")["stopped"] == alone["stopped"] and alone["stopped"]
    assert difference(tmp_path / "limit", tmp_path / "alone") < 1e-5


BLOWS_UP = """
import json, math, os, sys
import two_ranks
from safeeraser.loss import Objective, Term
run = json.loads(sys.argv[1])
calls = iter(range(100))
def blows_up(t): return t.mean(t.logp) * (math.inf if next(calls) == 3 and os.environ["RANK"] == "1" else 1.0)
two_ranks.work([run | {"method": "custom", "objective": Objective({"boom": Term(blows_up, ("forget",))}, {})}])
"""


@pytest.mark.slow
def test_under_torchrun(tiny, tmp_path):
    "The launcher hands SIGTERM on; a folder that each machine has for itself is refused; a killed rank ends all."
    file = tmp_path / "work.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + UNLEARN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(file)]
    start = lambda **run: subprocess.Popen([*launcher, json.dumps([{"model": tiny.model, "data": tiny.data, **SMALL, **batch(2, 1), **run}], default=str)],
                                           stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    run = {"out": tmp_path / "run", "max_steps": -1, "num_train_epochs": 1000}
    begun = start(**run)
    while not (tmp_path / "run" / "run.json").exists() and begun.poll() is None: time.sleep(.1)
    time.sleep(2)  # it is written before the first step
    begun.send_signal(signal.SIGTERM)
    begun.communicate(timeout=400)
    found = list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert len(found) == 1 and (found[0] / "complete").is_file()
    assert json.loads((found[0] / "complete").read_text())["ranks"] == 2
    apart = start(out=[tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert "rank 1 does not see what rank 0 writes there" in apart.communicate(timeout=400)[1] and apart.returncode
    killed = start(**run | {"kill": [1, 4, signal.SIGKILL], "out": tmp_path / "killed"})
    killed.communicate(timeout=400)
    assert killed.returncode and not record(tmp_path / "killed")["finished"]
