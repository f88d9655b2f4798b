"""Grids: each cell once, whoever does it; killed and gone on with; listed, submitted, typed by hand; and what Slurm is handed."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import command as commands
import pytest
from command import command, script
from safeeraser.core import only_here, SafeEraserError
from safeeraser.grid import Job, plan_grid, run_cell, run_cells, run_grid, state_of, submit_grid
from safeeraser.rows import read_rows
from scripted import scripted
from test_options import parsed

ROOT = Path(__file__).parents[1]
FAST = dict(max_steps=2, lora_r=4, use_cpu=True, save_strategy="no")
SETS = [word for k, v in FAST.items() for word in ("--set", f"{k}={json.dumps(v)}")]


@pytest.fixture
def asked(tiny, tmp_path):
    return dict(model=tiny.model, data=tiny.data, out=tmp_path / "grid", methods=["po", "gd"], seeds=[1], judge="exact", asking={"splits": ["val"]}, **FAST)


def typed(tiny, out, *more): return ["grid", "--model", tiny.model, "--data", tiny.data, "--out", out, "--methods", "po,gd", "--seeds", "1", "--judge", "exact", "--splits", "val", *SETS, *more]


def plain(rows): return [{k: v for k, v in r.items() if k != "run"} for r in rows]


def times(folder): return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def process_of(argv, tmp_path):
    "The command in a process that can be killed."
    streams = [tmp_path / "out.txt", tmp_path / "err.txt"]
    for file in streams: file.touch()
    process = commands._PROCESSES.Process(target=commands._run, args=(commands._MAIN, ["safeeraser", *map(str, argv)], None, dict(os.environ), list(map(str, streams))))
    process.start()
    return process


def wait_until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.05)
    assert true()


@pytest.mark.slow
def test_the_commands_that_a_grid_lists_do_what_it_does(tiny, tmp_path, asked):
    found = run_grid(**asked | {"methods": ["po"]}, progress=False)
    argv = typed(tiny, tmp_path / "hand", "--methods", "po")
    listed = command(*argv, "--list")
    lines = [line.strip() for line in listed.stdout.splitlines() if line.startswith("  safeeraser")]
    assert len(lines) == 3 and not (tmp_path / "hand").exists() and re.findall(r"^(\w+) +\S+/(\w+)$", listed.stdout, re.M) == [("open", "po_seed1")]
    for line in lines:
        done = command(*shlex.split(line)[1:])
        assert done.returncode == 0, done.stderr
    ours, theirs = tmp_path / "grid" / "po_seed1", tmp_path / "hand" / "po_seed1"
    assert (ours / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()
    assert plain(read_rows(ours / "judged.jsonl")) == plain(read_rows(theirs / "judged.jsonl"))
    before = times(tmp_path / "hand")
    done = command(*argv)  # takes what was typed as its own work
    after = times(tmp_path / "hand")
    assert {p.name for p in after if after[p] != before.get(p)} == {"cell.json", "grid.json", "judged.jsonl"}
    assert "cells: 1; done 1" in done.stdout and f"next: safeeraser report {tmp_path / 'hand'}" in done.stdout
    row, = json.loads((tmp_path / "hand" / "grid.json").read_text())["rows"]
    assert found["rows"] == [row | {"seconds": found["rows"][0]["seconds"]}]


def test_a_finished_cell_is_not_done_again_and_what_changed_is(tiny, tmp_path, asked):
    one = asked | {"methods": ["po"]}
    run_grid(**one, progress=False)
    before = times(tmp_path / "grid" / "po_seed1")
    run_grid(**one, progress=False)
    assert times(tmp_path / "grid" / "po_seed1") == before
    run_grid(**one | {"judge": "rule"}, progress=False)
    after = times(tmp_path / "grid" / "po_seed1")
    assert {p.name for p in after if after[p] != before[p]} == {"cell.json", "judged.jsonl"}
    run_grid(**one | {"asking": {"splits": ["val"], "max_new_tokens": 3}}, progress=False)
    assert {r["decoding"]["max_new_tokens"] for r in read_rows(tmp_path / "grid" / "po_seed1" / "judged.jsonl")} == {3}


def test_data_that_were_replaced_are_noticed(tiny, tmp_path, asked):
    import shutil
    shutil.copytree(tiny.data.parent, tmp_path / "world")
    one = asked | {"methods": ["po"], "data": tmp_path / "world" / "dataset"}
    run_grid(**one, progress=False)
    records = json.loads((one["data"] / "all_train.json").read_text())
    (one["data"] / "all_train.json").write_text(json.dumps(records[:-1]))
    with pytest.raises(SafeEraserError, match="1 of 1 cells failed; .*po_seed1: .*was begun with other records"): run_grid(**one, progress=False)
    assert state_of(plan_grid(**one), plan_grid(**one).cells[0]) == "failed"


def test_a_cell_that_is_typed_by_somebody_else_just_now_is_left_alone(asked):
    grid = plan_grid(**asked)
    with only_here(grid.cells[0].folder):  # as unlearn has it
        assert run_cells(grid, progress=False) == ["running", "done"]


SHARED = """
import json, os, sys, time
from pathlib import Path
import safeeraser.grid as module
def work(grid, cell):
    with open(sys.argv[1], "a") as f: f.write(f"{cell.folder.name} {os.getpid()}\\n")
    time.sleep(.15)
    for name in grid.made: (cell.folder/name).write_text("")
module._work = work
grid = module.plan_grid(**json.loads(sys.argv[2]))
print(json.dumps(module.run_cells(grid, progress=False)))
"""


def test_grids_at_once_do_each_cell_once(tmp_path, asked):
    told = json.dumps(asked | {"seeds": [1, 2, 3, 4, 5]}, default=str)
    with ThreadPoolExecutor(3) as pool: done = list(pool.map(lambda _: script(SHARED, tmp_path / "work.txt", told), range(3)))
    assert [d.returncode for d in done] == [0, 0, 0], done[0].stderr
    cells, workers = zip(*(line.split() for line in (tmp_path / "work.txt").read_text().splitlines()))
    assert len(cells) == len(set(cells)) == 10 and len(set(workers)) > 1
    assert {s for d in done for s in json.loads(d.stdout)} <= {"done", "running"}


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_grid_that_was_stopped_goes_on(tiny, tmp_path, asked, number, code):
    longer = asked | {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    argv = typed(tiny, tmp_path / "grid", "--set", "max_steps=12", "--set", "save_strategy=steps", "--set", "save_steps=2")
    whole = run_grid(**longer | {"out": tmp_path / "whole"}, progress=False)
    process = process_of(argv, tmp_path)
    first, second = (tmp_path / "grid" / name for name in ("po_seed1", "gd_seed1"))
    wait_until(lambda: list((second / "checkpoints").glob("checkpoint-*/trainer_state.json")))
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    if number == signal.SIGINT: assert re.search("^safeeraser: stopped after step .*the same call goes on", (tmp_path / "err.txt").read_text(), re.M)
    before, grid = times(first), plan_grid(**longer)
    assert [state_of(grid, c) for c in grid.cells] == ["done", "begun"]
    assert command(*argv).returncode == 0 and times(first) == before
    found = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert found["rows"] == [r | {"seconds": t["seconds"]} for r, t in zip(whole["rows"], found["rows"])]
    assert (second / "adapter_model.safetensors").read_bytes() == (tmp_path / "whole" / "gd_seed1" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_cells_are_done_by_submitted_processes(tiny, tmp_path, asked):
    done = command(*typed(tiny, tmp_path / "grid", "--submit", "local"))
    assert done.returncode == 0 and f"submitted 1 jobs; what they say is in {tmp_path}/grid/jobs" in done.stdout, done.stderr
    grid = plan_grid(**asked)
    wait_until(lambda: [state_of(grid, c) for c in grid.cells] == ["done", "done"])
    table = command(*typed(tiny, tmp_path / "grid")).stdout
    again = run_grid(**asked | {"out": tmp_path / "here"}, progress=False)
    assert "cells: 2; done 2" in table and json.loads((tmp_path / "grid" / "grid.json").read_text())["rows"] == [
        r | {"seconds": t["seconds"]} for r, t in zip(again["rows"], json.loads((tmp_path / "grid" / "grid.json").read_text())["rows"])]
    assert "nothing is left to submit" in command(*typed(tiny, tmp_path / "grid", "--submit", "local")).stdout


@pytest.mark.slow
def test_a_job_that_is_told_that_time_is_up_is_queued_again_and_goes_on(tiny, tmp_path, asked):
    one = asked | {"methods": ["gd"], "max_steps": 24, "save_strategy": "steps", "save_steps": 4}
    grid = plan_grid(**one)
    job, = submit_grid(grid, tmp_path / "grid", "local")
    wait_until(lambda: list((tmp_path / "grid" / "gd_seed1" / "checkpoints").glob("checkpoint-*/trainer_state.json")))
    os.kill(next(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and is_child(p, job.job_id)), signal.SIGUSR2)
    assert job.result() == ["done"] and "Requeued" in job.stderr() + (job.stdout() or "")
    whole = run_grid(**one | {"out": tmp_path / "whole"}, progress=False)
    assert whole["cells"][0]["state"] == "done"
    weights = [tmp_path / name / "gd_seed1" / "adapter_model.safetensors" for name in ("grid", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def is_child(folder, pid):
    try: return folder.joinpath("stat").read_text().rpartition(")")[2].split()[1] == pid
    except OSError: return False


def test_what_is_queued_again_is_the_same_job(asked):
    job = Job(plan_grid(**asked))
    assert job.checkpoint().function == job


SBATCH = '#!/bin/sh\ncp "$1" "$SEEN"\necho "Submitted batch job 12"\n'


def test_slurm_is_handed_an_array_with_a_job_a_cell(tiny, tmp_path, asked, monkeypatch):
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n"), ("sacct", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    run_cell(plan_grid(**asked), plan_grid(**asked).cells[0])
    more = typed(tiny, tmp_path / "grid", "--seeds", "1,2", "--submit", "slurm", "--slurm", "partition=gpu,gpus_per_node=1,exclude=a[1,2]", "--slurm", "timeout_min=90")
    done = command(*more, PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", SEEN=str(tmp_path / "seen"))
    assert done.returncode == 0 and "submitted 3 jobs" in done.stdout, done.stderr
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (tmp_path / "seen").read_text(), re.M))
    assert told["array"].startswith("0-2") and told["partition"] == "gpu" and told["gpus-per-node"] == "1" and told["time"] == "90" and told["exclude"].strip("'") == "a[1,2]"
    assert told["signal"].startswith("USR2@")


def test_the_verb_says_what_is_wrong(tiny, tmp_path):
    def fails(problem, *more):
        done = command(*typed(tiny, tmp_path / "grid"), *more)
        assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr
    fails("--seeds 'a'", "--seeds", "a")
    fails("--seeds '-1'", "--seeds=-1")
    fails("cells are named twice", "--seeds", "1,1")
    fails("unknown term 'nonsense'", "--methods", "po,nonsense")
    fails("--grid lora_r: name=value", "--grid", "lora_r")
    fails("grid seed: seeds are no setting", "--grid", "seed=1,2")
    fails("did you mean learning_rate?", "--set", "learning_rat=1")
    fails("--judge guard wants --judge-set model", "--judge", "guard")
    fails("--judge-set x: name=value", "--judge-set", "x")
    fails("--slurm does nothing without --submit", "--slurm", "partition=gpu")
    fails("--submit 'pbs': one of slurm, local", "--submit", "pbs")
    fails("--submit slurm: submitit won't have it", "--submit", "slurm")
    fails("--slurm does nothing with --submit local", "--submit", "local", "--slurm", "partition=gpu")
    fails("--engine wants --python", "--engine", "vllm")
    fails("greedy responses would all be equal", "--samples", 2)
    fails("no 'test' in", "--splits", "test")
    fails("all_train.json", "--data", tmp_path / "nowhere")
    assert not list((tmp_path / "grid").glob("*seed*"))


def test_methods_and_settings_are_parted_by_commas_outside_parentheses(tiny, tmp_path):
    listed = command(*typed(tiny, tmp_path / "grid", "--methods", "simnpo(beta=2, delta=0.5) + pd,po", "--grid", "lora_r=2,4", "--list"))
    cells = re.findall(r"^open +.*/(.*)$", listed.stdout, re.M)
    assert cells == [f"{m}_seed1_lora_r={r}" for m in ("simnpo(beta=2,delta=0.5)+pd", "po") for r in (2, 4)], listed.stderr
    assert all(parsed(line.strip()) for line in listed.stdout.splitlines() if line.startswith("  safeeraser"))


def test_a_sweep_takes_a_judge_that_wants_to_be_told_which_model(tiny, tmp_path):
    from safeeraser.world import World, write_dataset
    data = write_dataset(World(0), tmp_path / "dataset", {"train": 2, "dev": 1})
    argv = ["sweep", "--model", tiny.model, "--data", data, "--method", "po", "--out", tmp_path / "s", "--grid", "learning_rate=1e-2", *SETS, "--judge", "server"]
    with scripted() as server:
        done = command(*argv, "--judge-set", "model=judge-1", "--judge-set", f"server={server.url}", XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0 and len(server.seen) > 10, done.stderr
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["judge"] == "judge-1 (question)"
    done = command(*argv)
    assert done.returncode == 2 and "judge server wants model" in done.stderr


# ---- slurm/*.sbatch ----------------------------------------------------------------------------------------------------
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
# As the real ones: Python, which listens to what bash makes its background processes ignore. torchrun's ranks are its children.
PROGRAM = """#!{python} -SE
import os, pathlib, signal, subprocess, sys, time
if "rank" not in sys.argv: pathlib.Path(os.environ["SEEN"]).write_text("\\n".join(sys.argv))
if sys.argv[0].endswith("torchrun"): sys.exit(subprocess.run([sys.executable, "-SE", sys.argv[0].replace("torchrun", "safeeraser"), "rank"]).returncode)
for number in (signal.SIGINT, signal.SIGUSR1): signal.signal(number, lambda *_: sys.exit(130))
pathlib.Path(os.environ["SEEN"] + ".ready").touch()
time.sleep(60)
"""


@pytest.fixture
def node(tmp_path):
    "Runs a script as Slurm would, with stand-ins for what it calls; gives the process and the words that were called."
    (tmp_path / "bin").mkdir()
    started = []
    for name, text in (("safeeraser", None), ("torchrun", None), ("scontrol", '#!/bin/sh\necho "$@" > "$SEEN.requeued"\n')):
        (tmp_path / "bin" / name).write_text(text or PROGRAM.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    def start(file):
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"), "SLURM_JOB_ID": "7",
                            "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8"}
        process = subprocess.Popen(["bash", file], env=env, start_new_session=True)
        started.append(process.pid)
        wait_until((tmp_path / "seen.ready").exists, 20)
        return process, (tmp_path / "seen").read_text().splitlines()
    yield start
    for pid in started:
        with suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda p: p.name)
def test_a_script_types_what_can_be_typed_and_is_queued_again_when_told(file, node, tmp_path):
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    process, words = node(file)
    words = words[words.index("-m") + 1:] if "-m" in words else ["safeeraser", *words[1:]]
    assert words[0] == "safeeraser" and parsed(shlex.join(words))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 130
    assert (tmp_path / "seen.requeued").read_text().split() == ["requeue", "7" if file.name == "unlearn.sbatch" else "5_2"]
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", file.read_text(), re.M))
    assert "requeue" in told and told["signal"].startswith("B:USR1@") and told["open-mode"] == "append"


def test_there_is_a_script_for_each_kind_of_work(): assert [p.stem for p in SCRIPTS] == ["generate", "grid", "unlearn"]
