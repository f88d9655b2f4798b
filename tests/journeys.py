"""What a family of models can do, found by doing it: from the files of a published model to a merged one and a report, by
the commands that a person types, with their progress on.

    python tests/journeys.py   writes benchmarks/results/families.json, whose table tutorials/your_model shows
"""
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from peft import PeftModel
from real import hard_rows, REAL, write_data, write_model
from safetensors.torch import load_file
from test_families import packed, separate

from safeeraser.cli import main as safeeraser
from safeeraser.encoder import Encoder
from safeeraser.generate import row_key
from safeeraser.rows import read_rows
from safeeraser.model import anatomy, load_model
from safeeraser.packed import in_precision, use_route
from safeeraser.packing import Packer, passes
from safeeraser.processors import NoVideos

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = {"float32": 1e-4, "bfloat16": .12}  # nats
SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0, "lora_r": 2, "lora_alpha": 4}
TUNINGS = {"lora": {}, "qlora": {"tuning": "qlora"}, "sine": {"projector": "sine"}, "full": {"tuning": "full", "reference_copy": True, "learning_rate": 1e-3}}


def command(*args, code: int = 0) -> str:
    "The command line in this process; what it printed."
    said, status = io.StringIO(), 0
    with mock.patch.object(sys, "argv", ["safeeraser", *map(str, args)]), contextlib.redirect_stdout(said):
        try: safeeraser()
        except SystemExit as e: status = e.code or 0
    assert status == code, (args, status, said.getvalue())
    return said.getvalue()


def unlearn(source: Path, data: Path, out: Path, tuning: str) -> str | None:
    "Two steps of KL+PD, which needs all three sets and the vanilla model; the route by which rows shared their image."
    settings = [x for name, value in (SETTINGS | TUNINGS[tuning]).items() for x in ("--set", f"{name}={json.dumps(value)}")]
    said = command("unlearn", "--model", source, "--data", data, "--method", "kl+pd", "--out", out, "--seed", 0, *settings)
    record = json.loads((out / "run.json").read_text())
    assert "2 steps" in said and record["steps"] == 2 and record["packing"]["route"] or record["packing"]["why"]
    return record["packing"]["route"]


def check_weights(source: Path, out: Path):
    "All that should have moved has, nothing else; and every number is one."
    whole = (out / "model.safetensors").is_file()
    weights = load_file(out / ("model.safetensors" if whole else "adapter_model.safetensors"))
    assert all(t.isfinite().all() for t in weights.values())
    if whole:
        model, before = load_model(out, "cpu")[0], load_model(source, "cpu")[0].state_dict()
        parts = anatomy(model)
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        projector = tuple(p + "." for p in parts.projector)
        assert moved and not {n for n in moved if n.startswith(parts.vision + ".") and not n.startswith(projector)}
    else:
        assert {n for n in weights if "lora_B" in n} and not [n for n, t in weights.items() if "lora_B" in n and not t.any()]


def answers(source: Path, data: Path, out: Path, *more) -> dict:
    "What a model answers, by question."
    command("generate", "--model", source, "--data", data, "--out", out, *more)
    return {row_key(r): r["response"] for r in read_rows(out)}


def largest_difference(model, encoder: Encoder, rows: list, route: str) -> float:
    "Of a label's log-probability, between packed rows and rows alone, in nats."
    with torch.no_grad(), in_precision(model):
        use_route(model, "dense")
        expected = separate(model, encoder, rows)
        use_route(model, route)
        found = packed(model, encoder, passes(Packer(encoder).pack(rows, list(range(len(rows))))), route)
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def check_report(judged: list[Path], out: Path):
    "The table and the page of judged responses: no figure is no number."
    told = command("report", *judged, "--out", out / "results.json")
    assert "KL+PD" in told and "NaN" not in (out / "results.json").read_text()


def journey(name: str, precision: str, folder: Path, data: Path) -> dict:
    "One line of the table of families; raises where something that must hold doesn't."
    source = write_model(name, folder / "model", PRECISIONS[precision])
    generation, training, _ = command("check-packing", source).splitlines()
    routes = {tuning: unlearn(source, data, folder / tuning, tuning) for tuning in TUNINGS}
    for tuning in TUNINGS: check_weights(source, folder / tuning)
    assert len(set(routes.values())) == 1, routes

    lora, full = folder / "lora", folder / "full"
    said = {tuning: answers(source, data, folder / tuning / "responses.jsonl", "--adapter", folder / tuning) for tuning in ("lora", "qlora", "sine")}
    said["full"] = answers(full, data, full / "responses.jsonl")
    assert all(s.keys() == said["lora"].keys() for s in said.values())
    command("merge", lora, "--out", folder / "merged")
    assert json.loads((folder / "merged/safeeraser.json").read_text())["change_by_merging"] <= ROUNDING[precision]
    assert precision != "float32" or answers(folder / "merged", data, folder / "merged/responses.jsonl") == said["lora"]
    for run in (lora, full): command("judge", run / "responses.jsonl", "--out", run / "judged.jsonl")
    check_report([lora, full], folder)

    model, processor = load_model(source, "cpu")
    adapted = PeftModel.from_pretrained(model, str(lora)).eval()  # plain PEFT reads the adapter
    route, shared = ("" if "shared: no" in line else re.search(r"shared: (\w+)", line)[1] for line in (training, generation))
    assert bool(routes["lora"]) == REAL[name].shares, (routes, training)
    off = largest_difference(adapted, Encoder(processor), hard_rows(data), route) if route else None
    assert off is None or off <= ROUNDING[precision], off
    pictures = isinstance(getattr(processor, "video_processor", None), NoVideos)
    return {"processor": "pictures only" if pictures else "its own", "vocabulary": REAL[name].vocabulary, "packing": route or "a row a question",
            **{t: True for t in ("lora", "qlora", "full", "merge")}, "generates": shared or "one by one", "difference": off}


def table(found: dict) -> dict:
    "Both precisions of a family in one line."
    def line(name):
        one, other = (found[name][p] for p in PRECISIONS)
        agreed = {k: v for k, v in one.items() if k != "difference"}
        assert agreed == {k: v for k, v in other.items() if k != "difference"}, (name, one, other)
        return agreed | {p: found[name][p]["difference"] for p in PRECISIONS}
    return {name: line(name) for name in found}


def main():
    "Try all families; what was found is the table."
    from safeeraser.core import environment
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        for k, name in enumerate(REAL): found[name] = {p: journey(name, p, Path(folder) / f"{k}-{p}", data) for p in PRECISIONS}
    out = Path(__file__).parent.parent / "benchmarks/results/families.json"
    out.write_text(json.dumps({"environment": environment(), "families": table(found)}, indent=1) + "\n")


if __name__ == "__main__": main()
