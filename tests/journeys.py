"""What a family of models can do, found by doing it on its tiny model: train, save, load with plain PEFT, merge, generate.

    python tests/journeys.py   writes benchmarks/results/families.json, from which the README's table is made
"""
import json
import tempfile
from pathlib import Path

import torch
import transformers
from families import FAMILIES
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from safeeraser.data import Encoder, Sets
from safeeraser.engine import check_engine
from safeeraser.generate import answer_batch
from safeeraser.loss import parse_objective
from safeeraser.model import load_adapter, load_model, model_fingerprint
from safeeraser.processors import NoVideos
from safeeraser.trainer import make_config, make_trainable, save_trained, UnlearnTrainer
from safeeraser.export import merge

STEPS = dict(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, use_cpu=True, save_strategy="no",
             logging_steps=1, disable_tqdm=True, lora_r=2, lora_alpha=4, lora_dropout=0., group_images=False)  # packed, though these images are small


def trained(model, processor, sets: Sets, folder: Path, **settings):
    "The model after two steps of KL+PD, which needs all three sets and the vanilla model; and how its rows were packed."
    args = make_config(folder / "checkpoints", method="kl+pd", **STEPS, **settings)
    model = make_trainable(model, args, parse_objective(args.method))
    trainer = UnlearnTrainer(model, args, sets, ["sorry no"], processor)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    learns = {n for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n}  # with B at 0, A has no gradient at first
    assert moved and moved <= learns | {n for n in before if "lora_A" in n}
    assert args.tuning == "full" or learns <= moved and {n for n in learns if "lora_" not in n and "modules_to_save" not in n} == set()
    assert all(torch.tensor(h["loss"]).isfinite() for h in trainer.state.log_history if "loss" in h)
    return model, trainer.packing.route or "a row a question"


def journey(name: str, sets: Sets, folder: Path) -> dict:
    "One line of the table of families; raises where something that must hold doesn't."
    family, items, source = FAMILIES[name], [*sets.forget[:2], *sets.decouple[:2]], folder / "model"
    for part in (family.make_model(), family.make_processor()): part.save_pretrained(source)
    fresh = lambda **how: load_model(source, "cpu", **how)[0]
    processor = load_model(source, "cpu")[1]
    encoder = Encoder(processor)
    say = lambda model: answer_batch(model.eval(), encoder, items, 5)

    model, route = trained(fresh(), processor, sets, folder)
    answers, run = say(model), folder / "adapter"
    save_trained(model, _new(run), source, {})
    (run / "run.json").write_text(json.dumps({"model": str(source), "method": "kl+pd", "seed": 0, "model_fingerprint": model_fingerprint(fresh())}))
    assert say(PeftModel.from_pretrained(fresh(), str(run))) == say(load_adapter(fresh(), run)) == answers
    merge(run, folder / "merged", device="cpu")
    plain = AutoModelForImageTextToText.from_pretrained(folder / "merged")
    assert type(plain) is getattr(transformers, family.name + "ForConditionalGeneration") and say(plain) == answers
    assert say(load_model(folder / "merged", "cpu")[0]) == answers  # its processor came along

    small, _ = trained(fresh(four_bit=True), processor, sets, folder, tuning="qlora")
    save_trained(small, _new(folder / "small"), source, {})
    assert say(PeftModel.from_pretrained(fresh(four_bit=True), str(folder / "small"))) == say(small)

    whole, _ = trained(fresh(), processor, sets, folder, tuning="full", reference_copy=True)
    save_trained(whole, _new(folder / "whole"), source, {})
    assert say(load_model(folder / "whole", "cpu")[0]) == say(whole)

    pictures = isinstance(getattr(processor, "video_processor", None), NoVideos)
    return {"processor": "pictures only" if pictures else "its own", "packing": route, "lora": True, "qlora": True, "full": True, "merge": True,
            "generates": check_engine(plain, encoder, items)[1].route or "one by one"}


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main():
    "Try all families; what was found is the table."
    from test_families import make_sets
    from safeeraser.core import environment
    with tempfile.TemporaryDirectory() as folder:
        sets = make_sets(Path(folder))
        found = {name: journey(name, sets, _new(Path(folder) / str(k))) for k, name in enumerate(FAMILIES)}
    out = Path(__file__).parent.parent / "benchmarks/results/families.json"
    out.write_text(json.dumps({"environment": environment(), "families": found}, indent=1) + "\n")


if __name__ == "__main__": main()
