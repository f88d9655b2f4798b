"""LLaVA-1.5-7B's true shape, randomly initialised, bf16, LoRA r 32, on one GPU: writes benchmarks/results/gpu.json.

    python benchmarks/gpu.py                            (begins no case after nine minutes; --seconds says otherwise)
    python benchmarks/gpu.py --shape tiny --device cpu  (tries the script itself; prints, writes nothing)

Within the first minute it prints what one packed pass takes. Cases follow in the order of their worth, each written as
soon as it is measured; `left_out` names those for which no time was left. Training and generation rows have the keys of
cpu.json's and besides: route, samples (forget items) a second, tokens a second, model-FLOP utilisation, peak GiB.
"""
import argparse, json, tempfile, time, warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image

from loops import generate_published, generate_shared, packed, precision, published
from measure import alternate, clock, ratios
from safeeraser.cache import VisionCache
from safeeraser.core import environment, write_whole
from safeeraser.decoding import RowSampler
from safeeraser.encoder import Encoder
from safeeraser.loss import parse_objective
from safeeraser.model import add_adapter
from safeeraser.packed import check_packing, unwrapped
from shape import asked, build_model, build_processor, make_records, Shape, SHAPES, token_counts

OUT = Path(__file__).parent/"results"/"gpu.json"
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s
CASES = [("gd+pd", 100), ("kl+pd", 100), ("po+pd", 100), ("gd+pd", 30), ("gd+pd", 250), ("kl+pd", 30), ("kl+pd", 250), ("po+pd", 30), ("po+pd", 250)]
NEW_TOKENS = 100
REPEATS = 2     # the published loop takes most of the time
SECONDS = 540   # after which no case begins


def utilisation(parameters: int, tokens: float, seconds: float, name: str) -> float | None:
    "Model-FLOP utilisation: 4 FLOPs a frozen weight and token that must be computed; None for a device whose peak is not known."
    peak = next((p for n, p in PEAK.items() if n in name), None)
    return peak and round(4 * parameters * tokens / seconds / peak, 4)


def peak_gib(run: Callable) -> float | None:
    "GiB that a run holds at most; it also warms up."
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    run()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def waits(run: Callable) -> int | None:
    "How often Python waits for the GPU in a run."
    if not torch.cuda.is_available(): return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try: run()
        finally: torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in said)


def first_look(model, encoder: Encoder, records: list) -> dict:
    "The route, and one packed pass by it: four questions and their riders about one image."
    rows = records[0].rows(parse_objective("gd"))
    verdict = check_packing(model, encoder, rows)
    if verdict.route is None: raise SystemExit(f"rows cannot be packed here: {verdict.why}")
    step = packed(model, encoder, parse_objective("gd"), records[:1], verdict.route)
    peak = peak_gib(step)
    return {"route": verdict.route, "pass_seconds": round(clock(step), 4), "pass_peak_gib": peak, "pass_waits": waits(step)}


def training_row(model, encoder: Encoder, records: list, method: str, mean: int, route: str, device: str) -> dict:
    "Ours against the published loop."
    objective = parse_objective(method)
    runs = {"published": published(model, encoder, objective, records), "packed": packed(model, encoder, objective, records, route)}
    peaks = {name: peak_gib(run) for name, run in runs.items()}
    seconds = alternate(runs, REPEATS)
    (apart, shared), mine = token_counts(records, objective, encoder), min(seconds["packed"])
    language = sum(p.numel() for n, p in model.named_parameters() if "language_model" in n and "lora_" not in n)
    return {"work": "train", "baseline": "published", "method": method, "mean_answer_tokens": mean, "records_per_safe_image": 1, "images_per_batch": len(records),
            **ratios(seconds["published"], seconds["packed"]), "token_limit": round(apart / shared, 3),
            "peak_memory_ratio": peaks["packed"] and round(peaks["packed"] / peaks["published"], 3), "route": route,
            "samples_per_second": round(sum(len(r.forget) for r in records) / mine, 3), "tokens_per_second": round(shared / mine, 1),
            "model_flop_utilisation": utilisation(language, shared, mine, device), "peak_gib": peaks}


def generation_row(model, encoder: Encoder, records: list) -> dict:
    "Ours against one answer at a time, whose cost is that of some answers times their number."
    items, few = asked(records), 2
    runs = {"published": lambda: generate_published(model, encoder, items[:few], NEW_TOKENS), "shared": lambda: generate_shared(model, encoder, items, NEW_TOKENS)}
    peaks = {name: peak_gib(run) for name, run in runs.items()}
    seconds = alternate(runs, REPEATS)
    more = [waits(lambda: generate_shared(model, encoder, items, n)) for n in (4, 12)]
    return {"work": "generate", "baseline": "published", "method": "greedy", "mean_answer_tokens": NEW_TOKENS, "records_per_safe_image": 1,
            "images_per_batch": len(records), **ratios([s * len(items) / few for s in seconds["published"]], seconds["shared"]),
            "answers_per_second": round(len(items) / min(seconds["shared"]), 3), "waits_per_token": None if None in more else (more[1] - more[0]) / 8, "peak_gib": peaks}


def sampling_row(words: int, device: str, rows: int = 64) -> dict:
    "What a token's draw takes for a batch."
    scores, written = torch.randn(rows, words, device=device), torch.empty(rows, 0)
    def milliseconds(top_p: float) -> float:
        sampler = RowSampler(range(rows), 1.0, top_p)
        run = lambda: [sampler(written, scores) for _ in range(10)]
        run()
        return round(clock(run) * 100, 3)
    return {"work": "sample", "rows": rows, "words": words, "milliseconds": milliseconds(.9), "milliseconds_without_nucleus": milliseconds(1.0)}


def vision_row(model, encoder: Encoder, records: list, device: str) -> dict:
    "What an image costs in the tower, and out of the cache."
    images = list({row.item.image for r in records for row in (*r.forget, *r.decouple)})
    pixels = encoder.call([encoder.prompt("w70")] * len(images), images, "right")["pixel_values"].to(device)
    base = unwrapped(model)
    @torch.no_grad()
    def look():
        with precision(model): base.get_image_features(pixel_values=pixels)
    def milliseconds() -> float:
        look()
        return round(min(clock(look) for _ in range(3)) / len(images) * 1000, 3)
    plain = milliseconds()
    with VisionCache(model): kept = milliseconds()
    return {"work": "vision", "images": len(images), "milliseconds_in_the_tower": plain, "milliseconds_from_the_cache": kept}


def photo(folder: Path, k: int) -> Path:
    "A JPEG file of 640 x 480 pixels."
    file, g = folder/f"photo-{k}.jpg", torch.Generator().manual_seed(k)
    Image.fromarray(torch.randint(256, (60, 80, 3), generator=g, dtype=torch.uint8).numpy()).resize((640, 480)).save(file, quality=90)
    return file


def loading_row(processor, folder: Path, images: int) -> dict:
    "Images a second that are prepared, in a first epoch and in the one after it, without workers and with four."
    files = [photo(folder, k) for k in range(images)]
    def rates(workers: int) -> list[float]:
        encoder = Encoder(processor)
        text = encoder.prompt("w70")
        loader = torch.utils.data.DataLoader(files, 1, collate_fn=lambda paths: encoder.call([text], paths, "right"),
                                             num_workers=workers, persistent_workers=workers > 0)
        return [round(images / clock(lambda: [None for _ in loader]), 1) for _ in range(2)]
    return {"work": "load", "images": images, "without_workers": rates(0), "with_four": rates(4)}


def cases(model, encoder: Encoder, folder: Path, shape: Shape, route: str, device: str, name: str) -> dict[str, Callable]:
    "Everything that is measured, by name, what is worth most in front; generation takes the adapter off, so it comes last."
    make = lambda mean, n: make_records(folder, shape, mean, n, seed=mean)
    found = {f"{method} {mean}": lambda m=method, n=mean: training_row(model, encoder, make(n, 2), m, n, route, name) for method, mean in CASES}
    found["sample"] = lambda: sampling_row(shape.words, device)
    found["vision"] = lambda: vision_row(model, encoder, make(100, 6), device)
    found["load"] = lambda: loading_row(encoder.processor, folder, 64 if device == "cuda" else 8)
    return found | {f"generate {n}": lambda n=n: generation_row(model.unload().eval(), encoder, make(100, n)) for n in (1, 4)}


def measure(shape: str, device: str, seconds: float, say: Callable[[dict], None]) -> dict:
    "All rows, told after each."
    start, name = time.perf_counter(), torch.cuda.get_device_name() if device == "cuda" else device
    found = {"environment": environment() | {"shape": shape}, "first": None, "rows": [], "left_out": []}
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder(build_processor(SHAPES[shape]))
        model = add_adapter(build_model(SHAPES[shape], torch.bfloat16 if device == "cuda" else torch.float32, device), 32, 256, 0.0).train()
        found["first"] = first_look(model, encoder, make_records(Path(folder), SHAPES[shape], 100, 1, seed=100)) | {"seconds_until_here": round(time.perf_counter() - start, 1)}
        say(found)
        for case, run in cases(model, encoder, Path(folder), SHAPES[shape], found["first"]["route"], device, name).items():
            late = time.perf_counter() - start > seconds
            found["left_out" if late else "rows"].append(case if late else run())
            say(found)
    return found


def told(found: dict, device: str):
    "The newest thing that was found, printed; on a GPU all of it written."
    if found["left_out"]: print(f"no time for {found['left_out'][-1]}")
    elif found["rows"]: print(json.dumps(found["rows"][-1]), flush=True)
    else: print(f"{found['environment']['device']}: {json.dumps(found['first'])}", flush=True)
    if device == "cuda": write_whole(OUT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"after which no case begins (default: {SECONDS})")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()  # the end token of answers that never end
    if arguments.device == "cuda" and not torch.cuda.is_available(): raise SystemExit("no CUDA device here; --shape tiny --device cpu tries the script")
    measure(arguments.shape, arguments.device, arguments.seconds, lambda found: told(found, arguments.device))
