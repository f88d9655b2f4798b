"""Over-forgetting on a language model that was really pretrained: base, PO, PO+PD on the world in English; writes benchmarks/results/tongue.json.

    python benchmarks/tongue.py                        (half an hour on two idle cores; a GPU is used where there is one)
    python benchmarks/tongue.py --out DIR --seed 2 --results DIR/results.json

Written after each method; what is done is kept, and the same call goes on. Settings are the data set's own, chosen by common sense
for each method. The base's steps were doubled after a first run on seed 1, whose base knew 70 to 85 percent of the answers.
"""
import argparse
from pathlib import Path

from safeeraser.core import environment, read_json, write_json
from safeeraser.generate import generate
from safeeraser.judge import agreement, judge_rows
from safeeraser.pictures import HAZARDS, nearest_hazard
from safeeraser.report import make_results, report
from safeeraser.rows import read_rows, write_rows
from safeeraser.tongue import make_tongue_world, SETTINGS, smaller_world, SPLIT_SIZES
from safeeraser.trainer import unlearn

RESULTS = Path(__file__).parent/"results"/"tongue.json"
METHODS = ("base", "po", "po+pd")


def line_of(world: Path, folder: Path, method: str, seed: int) -> tuple[dict, list[dict]]:
    "One line of the table and its judged rows: unlearn, unless it is the base, ask, judge by slots and by rules, count."
    model, data, adapter = world/"model", world/"dataset", None if method == "base" else folder
    made = unlearn(model, data, folder, method, seed) if adapter else read_json(model/"safeeraser.json")
    rows = read_rows(generate(model, data, folder/"responses.jsonl", adapter))
    rows = judge_rows(judge_rows(rows, "exact"), "rule")
    write_rows(folder/"judged.jsonl", rows)
    line = report(folder/"judged.jsonl", judge="exact")["rows"][0]
    return line | {"method": method, "seed": seed, "seconds": made["seconds" if adapter else "train_seconds"]}, rows


def settings_of(world: Path, seed: int, methods: list[str], rows: list[dict]) -> dict:
    "How the numbers came about."
    agreed = {q: agreement(rows, "rule", "exact", q) for q in ("refusal", "meaningful")}
    return {"judge": "exact", "decoding": "greedy", "seeds": [seed], "methods": methods, "still_to_come": [m for m in METHODS if m not in methods],
            "tongue": read_json(world/"model"/"safeeraser.json")["config"], "records": SPLIT_SIZES, "hazards": HAZARDS, **SETTINGS,
            "chosen": "by common sense; the base's steps were doubled once, for it to know the answers; no method was tuned",
            "held_out_nearest_hazard": {f: nearest_hazard(f) for f in smaller_world(seed).held_out},
            "rule_judge_agreement": {q: {"n": a.n, "agree": a.agree, "kappa": a.kappa} for q, a in agreed.items() if a}}


def main(out: Path, seed: int, tongue: str, results: Path):
    world, lines, rows = make_tongue_world(out/"world", tongue, seed), [], []
    for method in METHODS:
        line, judged = line_of(world, out/method, method, seed)
        lines, rows = [*lines, line], rows + judged
        write_json(results, make_results(lines, settings_of(world, seed, [r["method"] for r in lines], rows), environment()))
        print({k: round(line[k], 3) for k in ("asr_generality", "rr_generality", "utility_accuracy", "sarr", "safe_answer_accuracy", "sarr_held_out",
                                             "safe_answer_accuracy_held_out", "seconds")} | {"method": method}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tongue"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tongue", default="smollm2")
    parser.add_argument("--results", type=Path, default=RESULTS)
    main(**vars(parser.parse_args()))
