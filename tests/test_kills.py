"""Every verb is killed at its file operations, and runs into a full disk there; the same command again gives the same result.

An operation is a call that makes, writes, renames or removes something below the output folder. The slow test tries
a sample of them, spread over each verb; KILLS=all in the environment tries all, before, after and in the middle of each.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SAMPLE = 3  # operations tried a verb and way, without KILLS=all
VOLATILE = {"seconds", "environment", "git", "history", "train_seconds", "written"}  # of a record: what two equal runs differ in

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="the shim in front of libc wants Linux and gcc")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "Runs a trial: `server(argv, root, how, at)`."
    shim = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, HERE / "kills" / "shim.c", "-ldl"], check=True)
    process = subprocess.Popen([sys.executable, HERE / "kills" / "server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    def ask(argv, root, how="count", at=0):
        process.stdin.write(json.dumps({"argv": [str(a) for a in argv], "root": str(root), "how": how, "at": at}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield ask
    process.stdin.close()
    process.wait()


def unlearning(tiny, root):
    return ["unlearn", "--model", tiny.model, "--data", tiny.data, "--method", "po+pd", "--out", root / "run", "--seed", 1, "--set", "max_steps=3", "--set", "save_strategy=steps",
            "--set", "save_steps=2", "--set", "per_device_train_batch_size=2", "--set", "gradient_accumulation_steps=1", "--set", "lora_r=2"]


def make_run(tiny, root, server):
    assert server(unlearning(tiny, root), root)["code"] == 0


def make_responses(tiny, root, server):
    assert server(["generate", "--model", tiny.model, "--data", tiny.data, "--out", root / "run" / "responses.jsonl"], root)["code"] == 0


def make_judged(tiny, root, server):
    make_responses(tiny, root, server)
    assert server(["judge", root / "run" / "responses.jsonl", "--judge", "exact", "--out", root / "run" / "judged.jsonl"], root)["code"] == 0


def make_table(tiny, root, server):
    (root / "table.jsonl").write_text("".join(json.dumps({"image": str(next(tiny.data.parent.rglob("*.png")).relative_to(tiny.data.parent)), "question": f"what is it ? {n}"}) + "\n" for n in range(3)))
    shutil.copytree(tiny.data, root / "dataset")


VERBS = {  # what must be there before, and the command
    "world": (None, lambda tiny, root: ["world", "--out", root / "w", "--records", 6, "--seed", 0]),
    "unlearn": (None, unlearning),
    "generate": (None, lambda tiny, root: ["generate", "--model", tiny.model, "--data", tiny.data, "--out", root / "responses.jsonl"]),
    "judge": (make_responses, lambda tiny, root: ["judge", root / "run" / "responses.jsonl", "--judge", "rule", "--out", root / "run" / "judged.jsonl"]),
    "report": (make_judged, lambda tiny, root: ["report", root / "run", "--out", root / "results.json", "--csv", root / "r.csv", "--markdown", root / "r.md"]),
    "merge": (make_run, lambda tiny, root: ["merge", root / "run", "--out", root / "merged"]),
    "make-answers": (make_table, lambda tiny, root: ["data", "make-answers", root / "table.jsonl", "--model", tiny.model, "--out", root / "made", "--max-new-tokens", 4]),
}


def content(root: Path) -> dict:
    "All files below a folder, by name; of a JSON record what two equal runs have in common."
    return {str(p.relative_to(root)): _stable(p, root) for p in sorted(root.rglob("*"))
            if p.is_file() and "checkpoints" not in p.parts and p.name != "README.md" and p.suffix != ".lock"}


def _stable(path: Path, root: Path):
    data = path.read_bytes().replace(str(root).encode(), b"ROOT")
    if path.name in ("run.json", "safeeraser.json"): return {k: v for k, v in json.loads(data).items() if k not in VOLATILE}
    return data


def chosen(n: int) -> list[int]:
    "Operations to try: all, or a sample that has the first and the last."
    if os.environ.get("KILLS") == "all" or n <= SAMPLE: return list(range(1, n + 1))
    return sorted({1 + round(k * (n - 1) / (SAMPLE - 1)) for k in range(SAMPLE)})


@pytest.fixture
def tried(tiny, tmp_path, server):
    "`tried(verb, how)`: how many operations were tried, and a line about each that did not hold."
    def run(verb, how):
        before, command = VERBS[verb]
        start, whole, root = tmp_path / "start", tmp_path / "whole", tmp_path / "root"
        root.mkdir()
        if before: before(tiny, root, server)
        shutil.copytree(root, start)
        first = server(command(tiny, root), root)
        assert first["code"] == 0, first["said"]
        expected, wrong = content(root), []
        at = [n for n in chosen(len(first["log"])) if how != "half" or first["log"][n - 1].startswith("write")]
        for n in at:
            shutil.rmtree(root)
            shutil.copytree(start, root)
            broken = server(command(tiny, root), root, how, n)
            what = f"{verb}, {how} operation {n} ({first['log'][n - 1]})"
            if how == "full":
                lines = [x for x in broken["said"].splitlines() if x.startswith("safeeraser: ")]
                if broken["code"] == 0: pass  # what could not be written was not needed (a cache, a lock's removal)
                elif broken["code"] != 2 or len(lines) != 1 or "Traceback" in broken["said"]: wrong.append(f"{what}: exit {broken['code']}, said {broken['said'][-300:]!r}")
            elif broken["code"] != -9: wrong.append(f"{what}: was not reached (exit {broken['code']})")
            again = server(command(tiny, root), root)
            if again["code"] != 0:  # also where it was killed behind its last file: it has finished, and says so
                wrong.append(f"{what}: then exit {again['code']}: {again['said'][-300:]!r}")
                continue
            found = content(root)
            differs = [f"{n} is {'missing' if n not in found else 'left over' if n not in expected else 'another'}" for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n)]
            if differs: wrong.append(f"{what}: then {'; '.join(differs[:3])} ({len(differs)} in all)")
        print(f"{verb}, {how}: {len(at)} of {len(first['log'])} operations tried, {len({w.split(':')[0] for w in wrong})} did not hold")
        return len(at), wrong
    return run


@pytest.mark.parametrize("how", ["before", "after", "half", "full"])
@pytest.mark.parametrize("verb", VERBS)
def test_the_same_command_again_gives_the_same_result(tried, verb, how):
    n, wrong = tried(verb, how)
    assert n > 0 or how == "half"
    assert not wrong, "\n".join(wrong)
