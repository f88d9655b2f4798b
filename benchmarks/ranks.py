"""Two ranks against one process: do they train the same weights, and do they after a stop or a kill?

    python benchmarks/ranks.py [ENGINE ...]    some ten minutes on two cores; writes benchmarks/results/ranks.json

Gloo, on CPUs, with an untrained tiny LLaVA: what is checked is arithmetic and agreement, not speed. `difference` is the
largest over weights of |a - b| / |b|. One process takes 8 items in 4 micro-batches of 2, each of two ranks 2 of 2; packed rows
are cut into several passes a step.
"""
import json, signal, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_tiny  # noqa: E402
from two_ranks import batch, difference, ENGINES, PACKINGS, SMALL, TUNINGS, unlearn_together  # noqa: E402
from safeeraser.core import environment, write_json  # noqa: E402
from safeeraser.trainer import unlearn  # noqa: E402

CASES = [("gd+pd", tuning, packing) for tuning in TUNINGS for packing in PACKINGS] + [("kl+pd", "lora", "split")]


def said(method: str, tuning: str, packing: str) -> dict:
    return SMALL | {"method": method} | TUNINGS[tuning] | PACKINGS[packing]


def checked(done: list) -> dict:
    "What the first rank tells at its end; raises where one failed."
    for d in done:
        if d.returncode: raise RuntimeError(d.stderr[-2000:])
    return json.loads(done[0].stdout.splitlines()[-1])


def equality(engine: str, tiny: dict, root: Path, alone: dict) -> list[dict]:
    "Each case on two ranks, beside one process."
    outs = {case: root / engine / "-".join(case) for case in CASES}
    told = checked(unlearn_together(*({**tiny, **said(*case), "out": outs[case], **batch(2, 2), **ENGINES[engine]} for case in CASES), timeout=900))
    return [{"engine": engine, "method": case[0], "tuning": case[1], "packing": case[2], "passes_a_step": told["passes"][n] if case[2] != "off" else [],
             "difference": difference(outs[case], alone[case])} for n, case in enumerate(CASES)]


def interrupted(engine: str, tiny: dict, root: Path) -> list[dict]:
    "A run that goes on after a stop, or after a kill, beside one that nobody disturbed; with dropout."
    steps = {**tiny, **SMALL, **PACKINGS["split"], **ENGINES[engine], **batch(2, 1), "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lora_dropout": .2}
    checked(unlearn_together({**steps, "out": root / engine / "whole"}))
    rows = []
    for name, kill in (("SIGTERM of one rank", [1, 3, signal.SIGTERM]), ("SIGKILL of one rank", [1, 4, signal.SIGKILL])):
        out = root / engine / name
        codes = [d.returncode for d in unlearn_together({**steps, "out": out, "kill": kill})]
        left = sorted(int(p.parent.name.split("-")[1]) for p in (out / "checkpoints").glob("*/complete"))
        checked(unlearn_together({**steps, "out": out}))
        rows.append({"engine": engine, "what": name, "exit_codes": codes, "went_on_after_step": left[-1], "ranks": [2, 2], "difference": difference(out, root / engine / "whole")})
    return rows


def fewer(tiny: dict, root: Path) -> dict:
    "Two ranks stopped, one process goes on with the same batch."
    steps = {**tiny, **SMALL, **PACKINGS["split"], "max_steps": 6}
    codes = [d.returncode for d in unlearn_together({**steps, **batch(2, 1), "out": root / "fewer", "kill": [0, 3, signal.SIGTERM]})]
    made = unlearn(progress=False, out=root / "fewer", **steps, **batch(2, 1))
    unlearn(progress=False, out=root / "fewer-one", **steps, **batch(2, 2))
    return {"engine": "ddp", "what": "SIGTERM of one rank, then one process", "exit_codes": codes, "went_on_after_step": 4, "ranks": [2, 1],
            "effective_batch": made["effective_batch"], "difference": difference(root / "fewer", root / "fewer-one")}


def merged(found: dict, engine: str, rows: list[dict], kills: list[dict]) -> dict:
    "The results with an engine's put in the place of earlier ones."
    others = lambda part: [row for row in found.get(part, []) if row["engine"] != engine]
    return {"environment": environment(), "rows": others("rows") + rows, "kills": others("kills") + kills}


def main(engines: list[str]):
    file = ROOT / "benchmarks/results/ranks.json"
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        made = make_tiny(root / "tiny")
        tiny = {"model": str(made.model), "data": str(made.data)}
        alone = {case: root / "one" / "-".join(case) for case in CASES}
        for case, out in alone.items(): unlearn(progress=False, out=out, **tiny, **said(*case), **batch(2, 4))
        for engine in engines:
            rows, kills = equality(engine, tiny, root, alone), interrupted(engine, tiny, root)
            if engine == "ddp": kills.append(fewer(tiny, root))
            for row in rows + kills: print(row, flush=True)
            write_json(file, merged(json.loads(file.read_text()) if file.exists() else {}, engine, rows, kills))


if __name__ == "__main__": main(sys.argv[1:] or list(ENGINES))
