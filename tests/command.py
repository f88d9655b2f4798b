"""The `safeeraser` command, and scripts, in processes of their own: exit codes, streams and signals as a shell has them.
Each is forked from a process that has done the imports, which saves it the seconds that they take."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_LATE = "bulk", "calibrate", "check", "convert", "export", "grid", "judges", "page", "plan", "published", "specificity", "sweep", "tiny_llava", "trainer"
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([f"safeeraser.{module}" for module in ("cli", *_LATE)] + ["deepspeed"])  # which accelerate imports where it is installed
_MAIN = "from safeeraser.cli import main; main()"


def _run(code: str, argv: list[str], cwd: str | None, env: dict, streams: list[str]):
    os.environ.clear()
    os.environ.update(env)
    if cwd: os.chdir(cwd)
    for number, file in zip((1, 2), streams): os.dup2(os.open(file, os.O_WRONLY), number)
    sys.argv = argv
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})


def script(code: str, *args, cwd: str | Path | None = None, env: dict | None = None, timeout: float = 600) -> subprocess.CompletedProcess:
    "Run a script's text to its end; `env` is set besides what is there."
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        for file in streams: file.touch()
        argv = ["safeeraser", *map(str, args)]
        told = (code, argv, cwd and str(cwd), os.environ | (env or {}), [str(f) for f in streams])
        process = _PROCESSES.Process(target=_run, args=told)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(argv, timeout)
        out, err = (f.read_text(encoding="utf-8", errors="surrogateescape") for f in streams)
        return subprocess.CompletedProcess(argv, process.exitcode, out, err)


def command(*args, cwd: str | Path | None = None, **env) -> subprocess.CompletedProcess:
    "Run the command to its end."
    return script(_MAIN, *args, cwd=cwd, env=env)
