"""What `safeeraser plan` counts beside what a CPU allocates, and its recipes for cards: writes benchmarks/results/plan.json.

    python benchmarks/plan.py            (some minutes)
    python benchmarks/plan.py tiny 7b    (these parts only)

Allocated bytes are the allocator's own events, as PyTorch's profiler records them, over two optimizer steps: all that was there before, and the most that came on top.
"""
import argparse, gc, itertools, json, tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import profile, ProfilerActivity

from safeeraser.core import environment, write_json
from safeeraser.data import load_refusals, load_sets, Sets
from safeeraser.loss import parse_objective
from safeeraser.plan import BlankEncoder, count_pass, ghost_of, plan, shape_of, survey, weight_parts, with_command
from safeeraser.model import load_model
from safeeraser.packed import ROUTES, use_route, Verdict
from safeeraser.settings import make_config, preset
from safeeraser.slots import SlotDataset
from safeeraser.tiny_llava import BaseConfig, build_model as tiny_model
from safeeraser.trainer import make_trainable, UnlearnTrainer
from safeeraser.world import World, write_dataset
from shape import build_model, build_processor, make_records, REFUSAL, Shape

OUT = Path(__file__).parent/"results"/"plan.json"
MIDDLE = Shape(dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, projection_dim=64),
               dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12), 32000, 140)  # 107M weights
STEP = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "lora_r": 8, "use_cpu": True, "group_images": True}


def save(model, processor, folder: Path) -> Path:
    "A model's folder."
    model.save_pretrained(folder), processor.save_pretrained(folder)
    return folder


def tiny(root: Path) -> tuple[Path, Sets, list[str]]:
    "The world's LLaVA, untrained, and some of its data."
    data = write_dataset(World(0), root/"tiny-data", {"train": 8})
    return save(*tiny_model(BaseConfig()), root/"tiny"), load_sets(data), load_refusals(data)


def sets_of(folder: Path, shape: Shape, mean_answer: int, n: int) -> Sets:
    "Records of known lengths as sets."
    folder.mkdir()
    records = make_records(folder, shape, mean_answer, n)
    return Sets(*([row.item for r in records for row in getattr(r, kind)] for kind in ("forget", "retain", "decouple")))


def middle(root: Path) -> tuple[Path, Sets, list[str]]:
    "A hundred million random weights, 32,000 words, and a record with 100 tokens an image."
    refusal = " ".join(f"w{k}" for k in range(70, 70 + REFUSAL))
    model = build_model(MIDDLE)
    model.generation_config.eos_token_id = 2
    return save(model, build_processor(MIDDLE), root/"middle"), sets_of(root/"middle-data", MIDDLE, 60, 1), [refusal]


def peak_of_events(prof: profile) -> int:
    "The most bytes that were allocated since the profiler began."
    events = sorted((e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))


def allocated(model: Path, sets: Sets, refusals: list[str], method: str, settings: dict, batches: list[dict]) -> int:
    "Bytes that the trainer holds at most in two optimizer steps of these passes."
    net, processor = load_model(model, "cpu", torch.bfloat16 if settings.get("bf16") else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        args, objective = make_config(Path(folder), method=method, **settings), parse_objective(method)
        net, route = make_trainable(net, args, objective), settings["packing"] if settings["packing"] in ROUTES else None
        if route: use_route(net, route)
        with mock.patch("safeeraser.trainer.choose_packing", lambda *_: Verdict(route, "given")):  # else as long again
            trainer = UnlearnTrainer(net, args, sets, refusals, processor)
    trainer.create_optimizer()
    held = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in (*net.parameters(), *net.buffers())}.values())
    on = bool(settings.get("gradient_checkpointing"))
    if on: net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    gc.collect()  # whose end would be counted as memory given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        for _ in range(2):
            for batch in batches:
                with trainer.accelerator.autocast(): loss = trainer.pass_loss(net, batch, sum(b["n_items"] for b in batches)).loss
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
    return held + peak_of_events(prof)


def compared(name: str, made: tuple, method: str = "po+pd", **settings) -> dict:
    "A case: predicted and allocated, in MiB."
    model, sets, refusals = made
    settings, on = STEP | settings, settings.get("gradient_checkpointing", False)
    args, objective = make_config(Path("plan"), method=method, **settings), parse_objective(method)
    config, processor = shape_of(model)
    work, batches = survey(BlankEncoder(processor), SlotDataset(sets, refusals, objective.kinds), args, objective)
    ghost, route = ghost_of(config, args, objective, gpu=False), work.packing if work.packing in ROUTES else None
    if route: use_route(ghost, route)
    batch = max(batches, key=lambda b: b["input_ids"].numel())
    held = count_pass(ghost, batch, objective, args, route, on, len(batches) > 1)
    predicted = 1024 * (sum(weight_parts(ghost).values()) + sum(held.gib.values()))
    real = allocated(model, sets, refusals, method, settings, batches) / 2**20
    row = {"model": name, "tuning": args.tuning, "method": method, "packing": work.packing, "checkpointing": on, "bf16": args.bf16,
           "tokens": batch["input_ids"].numel(), "predicted_mib": round(predicted, 1), "allocated_mib": round(real, 1), "ratio": round(predicted / real, 3)}
    print(json.dumps(row), flush=True)
    return row



CASES = ({"packing": "split"}, {"packing": "split", "gradient_checkpointing": True}, {"packing": "off"}, {"packing": "off", "gradient_checkpointing": True},
         {"packing": "split", "bf16": True}, {"packing": "split", "bf16": True, "gradient_checkpointing": True}, {"packing": "split", "method": "kl+pd"},
         {"packing": "split", "tuning": "full"}, {"packing": "split", "tuning": "full", "gradient_checkpointing": True}, {"packing": "off", "tuning": "full"})

FEW = CASES[:3] + CASES[4:5] + CASES[7:8]


def recipes(root: Path, size: str) -> dict:
    "Plans of LLaVA-1.5 for three cards, on records like the official ones: 240 of them, answers of 100 tokens of four letters."
    sets = sets_of(root/size, replace(MIDDLE, pixels=56), 100, 240)
    told = lambda text: "abc " * len(text.split())
    sets = Sets(*([replace(i, question=told(i.question), answer=told(i.answer)) for i in s] for s in (sets.forget, sets.retain, sets.decouple)))
    made = preset(f"paper-{size}")
    planned = plan(made["model"], sets, refusals=["abc " * REFUSAL], **made["settings"])
    typed = ["--preset", f"paper-{size}", "--data", "dataset", "--method", "po+pd"]
    return {f"paper-{size} {gpu}": with_command(replace(planned, gpu=gpu), typed).as_json() for gpu in ("4090-24", "A100-40", "H100-80")}


def main(parts: list[str]):
    "The parts that were named; the file keeps its others."
    found = json.loads(OUT.read_text()) if OUT.is_file() else {"rows": [], "recipes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in parts:
            if name in MODELS:
                made = MODELS[name](Path(folder))
                rows = [compared(name, made, **case) for case in (CASES if name == "tiny" else FEW)]
                found["rows"] = [r for r in found["rows"] if r["model"] != name] + rows
            else: found["recipes"] |= recipes(Path(folder), name)
            write_json(OUT, found | {"environment": environment()})


MODELS = {"tiny": tiny, "middle": middle}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of tiny, middle, 7b, 13b; default: all")
    main(parser.parse_args().parts or [*MODELS, "7b", "13b"])
