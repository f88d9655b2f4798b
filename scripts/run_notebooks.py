"""Run nbdev_test and insist that it ran every notebook; closes with 'N passed, N failed'.

nbdev_test alone prints no count, succeeds when it finds nothing (or drops a notebook: a `.notest` file,
another kernel), and waits for ever. So its own run is watched: what it handed out, and what came back.
"""
import argparse, functools, json, re, signal, sys
from pathlib import Path

import nbdev.test
from nbdev.config import get_config

SKIP = re.compile(r"^\s*(- )?skip_exec:\s*(true|yes|y|on|1)\s*$", re.I | re.M)


def asks_to_be_skipped(nb: Path) -> bool:
    "Does its front matter say `skip_exec: true`?"
    cells = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    return any(c["cell_type"] != "code" and SKIP.search("".join(c["source"])) for c in cells)


def notebooks(root: Path) -> list[Path]:
    "All notebooks but private ones: `_draft.ipynb`, `.ipynb_checkpoints/`."
    private = lambda p: any(part.startswith(("_", ".")) for part in p.relative_to(root).parts)
    return sorted(p for p in root.rglob("*.ipynb") if not private(p))


def within(seconds, test_nb, nb, **kwargs):
    "`test_nb(nb)`, with an exception raised in the notebook's running cell when time is up."
    def expire(*_): raise TimeoutError(f"{nb.name} took more than {seconds} s")
    signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try: return test_nb(nb, **kwargs)
    finally: signal.alarm(0)


def run(flags: str, limit: int) -> dict[Path, tuple[bool, float]]:
    "Notebook -> (passed, seconds), as nbdev_test saw it; those it left out or did not execute are missing."
    seen, parallel = {}, nbdev.test.parallel
    def watched(test_nb, files, **kwargs):
        results = parallel(functools.partial(within, limit, test_nb), files, **kwargs)
        seen.update(zip(files, results))
        return results
    nbdev.test.parallel = watched
    try: nbdev.test.nbdev_test(flags=flags)
    except SystemExit: pass                       # its way to say that one failed: `seen` tells which
    return {nb: result for nb, result in seen.items() if result[1] > 0}   # not executed: 0 seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flags", default="", help="flags of tst_flags to run all the same, e.g. 'gpu slow'")
    parser.add_argument("--limit", type=int, default=1200, help="seconds allowed to one notebook")
    args = parser.parse_args()

    root = get_config().nbs_path.absolute()
    skipped, due = [], []
    for nb in notebooks(root): (skipped if asks_to_be_skipped(nb) else due).append(nb)
    if not due: sys.exit(f"no notebook to run under {root.name}/")

    ran = run(args.flags, args.limit)
    for nb, (ok, seconds) in sorted(ran.items()):
        print(f"{nb.relative_to(root)}: {'ok' if ok else 'FAILED'}, {seconds:.1f} s")
    for nb in sorted(set(due) - set(ran)): print(f"{nb.relative_to(root)}: FAILED, nbdev_test did not run it")
    for nb in sorted(set(ran) - set(due)): print(f"{nb.relative_to(root)}: FAILED, ran although it was not expected to")
    passed = sum(nb in ran and ran[nb][0] for nb in due)
    failed = len(set(due) | set(ran)) - passed
    print(f"{passed} passed, {failed} failed" + (f", {len(skipped)} skipped" if skipped else ""))
    return int(failed > 0)


if __name__ == "__main__":
    from run_notebooks import main   # a notebook replaces its worker's __main__, so `within` must be found by another name
    sys.exit(main())
