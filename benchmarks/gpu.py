"""LLaVA-1.5-7B's true shape, randomly initialised, bf16, LoRA r 32, on one GPU: writes benchmarks/results/gpu.json.

    python benchmarks/gpu.py                            (under ten minutes on an H100)
    python benchmarks/gpu.py --shape tiny --device cpu  (tries the script itself; prints, writes nothing)

Rows have the keys of cpu.json's and besides: route, samples (forget items) a second, tokens a second, model-FLOP utilisation, peak GiB.
"""
import argparse, json, tempfile
from pathlib import Path

import torch

from loops import generate_published, generate_shared, packed, published
from measure import alternate, ratios
from safeeraser.core import environment, progress_bar, write_whole
from safeeraser.encoder import Encoder
from safeeraser.loss import parse_objective
from safeeraser.model import add_adapter
from safeeraser.packed import check_packing
from shape import asked, build_model, build_processor, make_records, SHAPES, token_counts

OUT = Path(__file__).parent/"results"/"gpu.json"
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s
METHODS, MEANS = ("gd+pd", "kl+pd", "po+pd"), (30, 100, 250)
NEW_TOKENS = 100


def utilisation(parameters: int, tokens: float, seconds: float, name: str) -> float | None:
    "Model-FLOP utilisation: 4 FLOPs a frozen weight and token that must be computed; None for a device whose peak is not known."
    peak = next((p for n, p in PEAK.items() if n in name), None)
    return peak and round(4 * parameters * tokens / seconds / peak, 4)


def peak_gib(run) -> float | None:
    "GiB that a run holds at most."
    if not torch.cuda.is_available(): return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def training_row(model, encoder: Encoder, records: list, method: str, mean: int, device: str) -> dict:
    "Ours against the published loop."
    objective = parse_objective(method)
    verdict = check_packing(model, encoder, records[0].rows(objective))
    if verdict.route is None: raise SystemExit(f"rows cannot be packed here: {verdict.why}")
    runs = {"published": published(model, encoder, objective, records), "packed": packed(model, encoder, objective, records, verdict.route)}
    for run in runs.values(): run()
    peaks = {name: peak_gib(run) for name, run in runs.items()}
    seconds = alternate(runs)
    (apart, shared), mine = token_counts(records, objective, encoder), min(seconds["packed"])
    language = sum(p.numel() for n, p in model.named_parameters() if "language_model" in n and "lora_" not in n)
    return {"work": "train", "baseline": "published", "method": method, "mean_answer_tokens": mean, "records_per_safe_image": 1, "images_per_batch": len(records),
            **ratios(seconds["published"], seconds["packed"]), "token_limit": round(apart / shared, 3),
            "peak_memory_ratio": peaks["packed"] and round(peaks["packed"] / peaks["published"], 3), "route": verdict.route,
            "samples_per_second": round(sum(len(r.forget) for r in records) / mine, 3), "tokens_per_second": round(shared / mine, 1),
            "model_flop_utilisation": utilisation(language, shared, mine, device), "peak_gib": peaks}


def generation_row(model, encoder: Encoder, records: list, device: str) -> dict:
    "Ours against one answer at a time, whose cost is that of some answers times their number."
    items, few = asked(records), 4
    runs = {"published": lambda: generate_published(model, encoder, items[:few], NEW_TOKENS), "shared": lambda: generate_shared(model, encoder, items, NEW_TOKENS)}
    for run in runs.values(): run()
    seconds = alternate(runs, 3)
    return {"work": "generate", "baseline": "published", "method": "greedy", "mean_answer_tokens": NEW_TOKENS, "records_per_safe_image": 1,
            "images_per_batch": len(records), **ratios([s * len(items) / few for s in seconds["published"]], seconds["shared"]),
            "answers_per_second": round(len(items) / min(seconds["shared"]), 3), "peak_gib": {n: peak_gib(r) for n, r in runs.items()}}


def main(shape: str, device: str):
    "All rows; written after each."
    name = torch.cuda.get_device_name() if device == "cuda" else device
    found = {"environment": environment() | {"shape": shape}, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder(build_processor(SHAPES[shape]))
        model = build_model(SHAPES[shape], torch.bfloat16 if device == "cuda" else torch.float32, device)
        make = lambda mean, n: make_records(Path(folder), SHAPES[shape], mean, n, seed=mean)
        cases = [lambda n=n: generation_row(model, encoder, make(100, n), name) for n in (1, 4)]
        for case in progress_bar(cases, desc="generation"): found["rows"].append(_written(case(), found, device))
        adapted = add_adapter(model, 32, 256, 0.0).train()
        cases = [lambda m=m, mean=mean: training_row(adapted, encoder, make(mean, 2), m, mean, name) for m in METHODS for mean in MEANS]
        for case in progress_bar(cases, desc="training"): found["rows"].append(_written(case(), found, device))


def _written(row: dict, found: dict, device: str) -> dict:
    print(json.dumps(row))
    if device == "cuda": write_whole(OUT, json.dumps(found | {"rows": [*found["rows"], row]}, indent=1) + "\n")
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available(): raise SystemExit("no CUDA device here; --shape tiny --device cpu tries the script")
    main(arguments.shape, arguments.device)
