"""Training and generation against the published loop on a CPU: writes benchmarks/results/cpu.json.

    python benchmarks/cpu.py            (about 40 minutes on two cores; a run that was stopped goes on)

Ratios of times taken alternately, medians of five; caches start empty, so filling them is charged.
"""
import os
os.environ["OMP_WAIT_POLICY"] = "passive"  # spinning threads turn a step of 2 s into one of 50

import argparse, json, tempfile
from itertools import product
from pathlib import Path

import torch

from loops import generate_published, generate_shared, packed, published, unpacked
from measure import alternate, peak_of, ratios, resident
from safeeraser.core import environment, progress_bar, write_whole
from safeeraser.encoder import Encoder
from safeeraser.loss import parse_objective
from safeeraser.model import add_adapter
from shape import asked, build_model, build_processor, generation_limit, make_records, SHAPES, token_limit

OUT = Path(__file__).parent/"results"/"cpu.json"
METHODS, MEANS = ("gd+pd", "kl+pd", "po+pd"), (30, 100, 250)
NEW_TOKENS = 100
LEVERS = {"published": published,
          "logits at labels, no second model": lambda *a: unpacked(*a, keep_images=False),
          "image seen once": unpacked,
          "packing": packed,
          "reference of an earlier epoch": lambda *a: packed(*a, later_epoch=True)}
LOOPS = {"published": published, "unpacked": unpacked, "packed": packed}


class Bench:
    "Model, processor and a folder for images."
    def __init__(self, shape: str, folder: str):
        self.shape, self.folder = SHAPES[shape], Path(folder)
        self.encoder = Encoder(build_processor(self.shape))
        self.model = build_model(self.shape)

    def adapted(self): return add_adapter(self.model, 32, 256, 0.0).train()

    def records(self, mean: int, per_safe_image: int, questions: int = 4) -> list:
        return make_records(self.folder, self.shape, mean, per_safe_image, questions, per_safe_image)


def training_rows(bench: Bench, model, method: str, mean: int, per_safe_image: int) -> list[dict]:
    "Ours against both baselines."
    objective, records = parse_objective(method), bench.records(mean, per_safe_image)
    seconds = alternate({name: make(model, bench.encoder, objective, records) for name, make in LOOPS.items()})
    peaks = {name: peak_of(name, method, mean, per_safe_image) for name in LOOPS}
    return [{"work": "train", "baseline": base, "method": method, "mean_answer_tokens": mean, "records_per_safe_image": per_safe_image,
             "images_per_batch": 1, **ratios(seconds[base], seconds["packed"]),
             "token_limit": round(token_limit(records, objective, bench.encoder), 3),
             "peak_memory_ratio": round(peaks["packed"] / peaks[base], 3)} for base in ("published", "unpacked")]


def generation_row(bench: Bench, images: int) -> dict:
    "The baseline's cost is that of some answers, times their number: each takes as long as any other."
    items, few = asked(make_records(bench.folder, bench.shape, 100, images)), 4
    seconds = alternate({"published": lambda: generate_published(bench.model, bench.encoder, items[:few], NEW_TOKENS),
                         "shared": lambda: generate_shared(bench.model, bench.encoder, items, NEW_TOKENS)})
    return {"work": "generate", "baseline": "published", "method": "greedy", "mean_answer_tokens": NEW_TOKENS, "records_per_safe_image": 1,
            "images_per_batch": images, **ratios([s * len(items) / few for s in seconds["published"]], seconds["shared"]),
            "token_limit": round(generation_limit(items, bench.encoder, NEW_TOKENS), 3),
            "peak_memory_ratio": round(peak_of("shared", images) / peak_of("batch-1", images), 3)}


def growth(bench: Bench, model) -> list[dict]:
    "Cost of a question by the number of questions an image, beside one row a question."
    rows, objective = [], parse_objective("ga")
    for k in (1, 2, 4, 8, 16, 32):
        records = bench.records(100, 1, k)
        seconds = alternate({name: LOOPS[name](model, bench.encoder, objective, records) for name in ("unpacked", "packed")}, 3)
        rows.append({"questions": k, **ratios(seconds["unpacked"], seconds["packed"]), "token_limit": round(token_limit(records, objective, bench.encoder), 3)})
    return rows


def levers(bench: Bench, model, method: str) -> list[dict]:
    "One change after another, from the published loop to ours: time and memory relative to the published."
    objective, records = parse_objective(method), bench.records(100, 1)
    names = [n for n in LEVERS if objective.reference_kinds or "reference" not in n]
    seconds = alternate({n: LEVERS[n](model, bench.encoder, objective, records) for n in names})
    peaks = {n: peak_of(n, method, 100, 1) for n in names}
    return [{"method": method, "lever": n, **ratios(seconds["published"], seconds[n]), "peak_memory_ratio": round(peaks[n] / peaks["published"], 3)} for n in names]


def print_peak(what: str, *arguments: str):
    "MiB above what the imports take: model, batch, and all that a loop makes."
    torch.set_num_threads(2)
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("cpu", folder)
        if what in ("shared", "batch-1"):
            items = asked(make_records(bench.folder, bench.shape, 100, int(arguments[0])))
            if what == "shared": generate_shared(bench.model, bench.encoder, items, NEW_TOKENS)
            else: generate_published(bench.model, bench.encoder, items[:2], NEW_TOKENS)
        else:
            method, mean, per_safe_image = arguments[0], int(arguments[1]), int(arguments[2])
            model = bench.adapted()
            (LOOPS | LEVERS)[what](model, bench.encoder, parse_objective(method), bench.records(mean, per_safe_image))()
    print(resident("VmHWM") - before)


def main():
    "Measure what the results file does not hold yet, writing it after each case."
    torch.set_num_threads(2)
    where = environment() | {"threads": 2, "shape": "LLaVA-1.5 geometry, Llama 512 x 8, 4,096 words, float32"}
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    if found.get("environment") != where: found = {"environment": where, "rows": [], "growth": [], "levers": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench("cpu", folder)
        plain = [("generate", lambda n=n: found["rows"].append(generation_row(bench, n))) for n in (1, 4)
                 if not any(r["work"] == "generate" and r["images_per_batch"] == n for r in found["rows"])]
        for _, run in progress_bar(plain, desc="generation"): _and_write(run, found)
        model = bench.adapted()
        done = {(r["method"], r["mean_answer_tokens"], r["records_per_safe_image"]) for r in found["rows"]}
        cases = [(lambda c=c: found["rows"].extend(training_rows(bench, model, *c))) for c in product(METHODS, MEANS, (1,)) if c not in done]
        if not found["growth"]: cases.append(lambda: found["growth"].extend(growth(bench, model)))
        cases += [(lambda m=m: found["levers"].extend(levers(bench, model, m))) for m in METHODS[:2] if not any(r["method"] == m for r in found["levers"])]
        cases += [(lambda c=c: found["rows"].extend(training_rows(bench, model, *c))) for c in product(METHODS[:1], MEANS, (4,)) if c not in done]
        for run in progress_bar(cases, desc="training"): _and_write(run, found)


def _and_write(run, found: dict):
    run()
    OUT.parent.mkdir(exist_ok=True)
    write_whole(OUT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", nargs="+", metavar="WHAT", help="print the peak memory of one loop (used by the benchmark itself)")
    arguments = parser.parse_args()
    print_peak(*arguments.peak) if arguments.peak else main()
