"""Run nbdev_test on every notebook and say how many passed.

nbdev_test prints no count and calls an empty selection a success, so the notebooks are counted here
and compared with those that it says it has completed.
"""
import re
import subprocess
import sys
from pathlib import Path

NBS = Path(__file__).parents[1] / "nbs"
TIMEOUT = 1500  # seconds for all of them


def notebooks() -> set[str]:
    found = (p for p in NBS.rglob("*.ipynb") if not p.name.startswith(("_", ".")) and ".ipynb_checkpoints" not in p.parts)
    return {p.name for p in found}


def main() -> int:
    expected = notebooks()
    run = subprocess.run(["nbdev_test", "--do_print", "--timing", "--n_workers", "2"], cwd=NBS.parent, text=True, timeout=TIMEOUT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    completed = {Path(name).name for name in re.findall(r"^- Completed (\S+\.ipynb)", run.stdout, re.M)}
    failed = set(re.findall(r"^\s+(\S+\.ipynb)$", run.stdout.partition("nbdev Tests Failed")[2], re.M)) | expected - completed
    if run.returncode or failed:
        print(run.stdout[-20_000:])
    for line in re.findall(r"^\S+\.ipynb: \d+ secs$", run.stdout, re.M):
        print("  " + line)
    print(f"notebooks: {len(expected - failed)} passed, {len(failed)} failed {' '.join(sorted(failed))}")
    return int(bool(run.returncode or failed or not expected))


if __name__ == "__main__":
    sys.exit(main())
