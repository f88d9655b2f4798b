"""Environments of a stand-in for vLLM or SGLang: the same command line, the same routes, an answer by a rule.

Variables tell it how to behave: STANDIN_SLOW seconds until it is healthy, STANDIN_DIES at the start ("start") or at
that many calls (only one, where "@" and its GPU follow), STANDIN_DEAF to SIGTERM, STANDIN_DIARY a file where it writes what happens, a line of JSON each."""
import json
import os
import sys
import time
from pathlib import Path

MODULES = {"vllm": "vllm/entrypoints/openai/api_server.py", "sglang": "sglang/launch_server.py"}


def environment(folder: Path, engine: str = "vllm", version: str = "9.9.9") -> str:
    "Make an environment that has the engine and nothing of this one; its Python."
    module = folder / "lib" / MODULES[engine]
    module.parent.mkdir(parents=True)
    module.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom server import main\nmain({engine!r})\n")
    (folder / "lib" / f"{engine}-{version}.dist-info").mkdir()
    (folder / "lib" / f"{engine}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {engine}\nVersion: {version}\n")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder / "lib"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def diary(file: Path) -> list[dict]:
    "What servers have written."
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def alive(pid: int) -> bool:
    "Whether a process is there and is no zombie."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def gone(pids: list[int], seconds: float = 15) -> bool:
    "Whether all these processes have ended within so many seconds."
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end: time.sleep(.05)
    return not any(map(alive, pids))


def pids(file: Path) -> list[int]:
    "Every server and every worker that has been started."
    return [p for d in diary(file) if d["what"] == "start" for p in (d["pid"], d["worker"])]
