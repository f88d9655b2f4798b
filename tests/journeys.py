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

from safeeraser.data import Encoder, Sets
from safeeraser.engine import check_engine
from safeeraser.generate import answer_batch
from safeeraser.model import add_adapter, merge_adapter
from safeeraser.trainer import UnlearnTrainer, make_config

STEPS = dict(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True)


def journey(name: str, sets: Sets, folder: Path, method: str = "kl+pd") -> dict:
    "One line of the table of families; raises where something that must hold doesn't."
    family, items = FAMILIES[name], [*sets.forget[:2], *sets.decouple[:2]]
    processor = family.make_processor()
    encoder, cls = Encoder(processor), getattr(transformers, family.name + "ForConditionalGeneration")
    say = lambda model: answer_batch(model.eval(), encoder, items, 5)

    model = add_adapter(family.make_model(), 2, 4, 0.)
    trainer = UnlearnTrainer(model, make_config(folder / "checkpoints", method=method, **STEPS), sets, ["sorry no"], processor)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if "lora_B" in n or "modules_to_save" in n} <= moved and not any("lora_" not in n and "modules_to_save" not in n for n in moved)
    assert all(torch.tensor(h["loss"]).isfinite() for h in trainer.state.log_history if "loss" in h)

    model.save_pretrained(folder / "adapter")
    answers = say(model)
    assert say(PeftModel.from_pretrained(family.make_model(), str(folder / "adapter"))) == answers
    plain = merge_adapter(model)
    plain.save_pretrained(folder / "merged")
    assert say(cls.from_pretrained(folder / "merged")) == answers
    return {"trains": trainer.packing.route or "a row a question", "lora": True, "merge": True, "generates": check_engine(plain, encoder, items)[1].route or "one by one"}


def main():
    "Try all families; what was found is the table."
    from test_families import make_sets
    from safeeraser.model import environment
    with tempfile.TemporaryDirectory() as folder:
        sets = make_sets(Path(folder))
        found = {name: journey(name, sets, Path(folder) / str(k)) for k, name in enumerate(FAMILIES)}
    out = Path(__file__).parent.parent / "benchmarks/results/families.json"
    out.write_text(json.dumps({"environment": environment(), "families": found}, indent=1) + "\n")


if __name__ == "__main__": main()
