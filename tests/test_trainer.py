"""Gradients don't depend on how a step is split; a killed run ends where an undisturbed one does."""
import json
import math
import shutil

import pytest
import torch
from transformers import TrainerCallback

from safeeraser.core import SafeEraserError
from safeeraser.data import load_refusals, load_sets
from safeeraser.encoder import Encoder
from safeeraser.slots import epoch_plan, Row, SlotDataset
from safeeraser.loss import METHODS, Objective, Term
from safeeraser.model import add_adapter, load_adapter, load_model, vanilla
from safeeraser.settings import UnlearnConfig
from safeeraser.trainer import last_checkpoint, unlearn, UnlearnTrainer

SMALL = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_cpu": True, "save_strategy": "no", "warmup_steps": 0}
SPELLED = [*METHODS, "npo(beta=0.5)+kl+pd", "simnpo+ce", "dpo+0.5 ce+pd", "undial+ce"]


class Gradients(TrainerCallback):
    def __init__(self): self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n.replace("module.", "", 1): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_trainer(tiny, out, method, batch=1, accumulation=1, objective=None, **settings):
    model, processor = load_model(tiny.model, "cpu")
    args = UnlearnConfig(str(out), method=method, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
                         disable_tqdm=True, **{**SMALL, "learning_rate": 0.0, "weight_decay": 0.0, "num_train_epochs": 1, "max_grad_norm": 0.0, **settings})
    adapted = add_adapter(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    jitter(adapted)
    return UnlearnTrainer(adapted, args, load_sets(tiny.data), load_refusals(tiny.data), processor, objective)


def jitter(adapted, seed=0, size=.05):
    "Away from theta_0, where KL is flat and LoRA's B is zero."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad: p.add_(size * torch.randn(p.shape, generator=g))


def gradients(tiny, out, method, batch, accumulation):
    trainer, seen = make_trainer(tiny, out, method, batch, accumulation), Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps


def assert_same(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * a[name].norm() + 1e-8, name


@pytest.mark.parametrize("method", SPELLED)
def test_one_by_eight_is_eight_by_one(method, tiny, tmp_path):
    whole = gradients(tiny, tmp_path, method, 8, 1)
    assert len(whole) == 2  # 8 and a rest of 3
    for batch, accumulation in ((1, 8), (2, 4)):
        for a, b in zip(whole, gradients(tiny, tmp_path, method, batch, accumulation), strict=True):
            assert_same(a, b)
    assert max(g.norm() for g in whole[1].values()) > 1e-4


def naive_gradient(tiny, method, items):
    "Row by row through transformers' own loss: the mean of items' token means, weighted as the paper has it."
    model, processor = load_model(tiny.model, "cpu")
    adapted = add_adapter(model, 4, 8, 0.0, UnlearnConfig.seed)
    jitter(adapted)
    encoder, rows = Encoder(processor), [r for slot in items for r in slot]
    weights = {"ga+pd": {"forget": -1, "decouple": .5}, "gd+pd": {"forget": -1, "retain": .5, "decouple": .5}, "po": {"refusal": 1, "retain": 1}}[method]
    for kind, weight in weights.items():
        own = [r for r in rows if r.kind == kind]
        for row in own:
            (weight * adapted(**encoder.rows([row])).loss / len(own)).backward()
    return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["ga+pd", "gd+pd", "po"])
def test_gradient_is_that_of_single_rows(method, tiny, tmp_path):
    sets, refusals = load_sets(tiny.data), load_refusals(tiny.data)
    plan = epoch_plan([i.image_id for i in sets.forget], [i.image_id for i in sets.retain], len(refusals), UnlearnConfig.seed, epoch=0)
    expected = naive_gradient(tiny, method, [SlotDataset(sets, refusals)[s] for s in plan[:8]])
    assert_same(expected, gradients(tiny, tmp_path, method, 4, 2)[0])


def test_reference_is_the_pristine_model(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, "kl+pd", 4, learning_rate=1e-2)
    trainer.train()
    pristine, processor = load_model(tiny.model, "cpu")
    batch = Encoder(processor).rows([Row("retain", i, i.answer) for i in load_sets(tiny.data).retain])
    with torch.no_grad():
        expected = pristine(**batch).logits
        with vanilla(trainer.model): off = trainer.model(**batch).logits
        assert torch.equal(off, expected)
        assert not torch.allclose(trainer.model(**batch).logits, expected, atol=1e-2)


def test_nothing_in_the_vision_tower_moves(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, "gd", 4, learning_rate=1e-2)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in n or "modules_to_save" in n for n in moved)
    assert any("lora_" in n for n in moved) and any("projector" in n for n in moved)
    assert not any("vision_tower" in n for n in moved)


def test_saved_adapter_gives_equal_outputs(tiny, tmp_path):
    record = unlearn(tiny.model, tiny.data, tmp_path / "run", "po+pd", seed=3, progress=False, max_steps=3, learning_rate=1e-2, **SMALL)
    again = load_adapter(load_model(tiny.model, "cpu")[0], tmp_path / "run")
    twin = unlearn(tiny.model, tiny.data, tmp_path / "twin", "po+pd", seed=3, progress=False, max_steps=3, learning_rate=1e-2, **SMALL)
    model, processor = load_model(tiny.model, "cpu")
    batch = Encoder(processor).rows([Row("forget", i, i.answer) for i in load_sets(tiny.data).forget])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, load_adapter(model, tmp_path / "twin")(**batch).logits)
        assert not torch.equal(again(**batch).logits, load_model(tiny.model, "cpu")[0](**batch).logits)
    shares = [{k: h[k] for k in record["objective"]} for h in record["history"] if "loss" in h]
    assert shares == [{k: h[k] for k in record["objective"]} for h in twin["history"] if "loss" in h]


def test_terms_are_logged_and_add_up(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, "gd+pd", 2, 2, learning_rate=1e-3, logging_steps=1)
    trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    assert len(logs) == 3
    for h in logs:
        assert h["loss"] == pytest.approx(h["ga"] + .5 * h["ce"] + .5 * h["pd"], abs=2e-4)


def test_stopping_rule_stops_before_the_update(tiny, tmp_path):
    free = make_trainer(tiny, tmp_path, "ga", 4, learning_rate=5e-2, num_train_epochs=8, logging_steps=1)
    free.train()
    ces = [-h["ga"] for h in free.state.log_history if "loss" in h]
    limit = ces[0] + .5 * (max(ces) - ces[0])
    trainer = make_trainer(tiny, tmp_path, "ga", 4, learning_rate=5e-2, num_train_epochs=8, stop_forget_ce=limit)
    trainer.train()
    first = next(i for i, c in enumerate(ces) if c >= limit)
    assert trainer.stopped["step"] == first and "stop_forget_ce" in trainer.stopped["reason"]
    until = make_trainer(tiny, tmp_path, "ga", 4, learning_rate=5e-2, num_train_epochs=8)
    until.add_callback(StopAfter(first))
    until.train()
    for (n, a), (_, b) in zip(trainer.model.named_parameters(), until.model.named_parameters()):
        assert torch.equal(a, b), n


class StopAfter(TrainerCallback):
    def __init__(self, steps): self.steps = steps
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop |= state.global_step >= self.steps


def test_divergence_keeps_the_last_good_weights(tiny, tmp_path):
    calls = iter(range(100))
    def blows_up(t): return t.mean(t.logp) * (math.inf if next(calls) == 2 else 1.0)
    trainer = make_trainer(tiny, tmp_path, "custom", 4, learning_rate=1e-2, num_train_epochs=3,
                           objective=Objective({"boom": Term(blows_up, ("forget",))}, {}))
    trainer.train()
    assert trainer.stopped == {"step": 2, "reason": "a gradient was not finite"}
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    good = make_trainer(tiny, tmp_path, "ga", 4, learning_rate=1e-2, num_train_epochs=3)
    good.add_callback(StopAfter(2))
    good.train()
    for a, b in zip(trainer.model.parameters(), good.model.parameters()): assert torch.equal(a, b)


TWO_PROCESSES = """
import sys, torch
from types import SimpleNamespace
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, str(Path(__file__).parent) if "__file__" in globals() else ".")
from test_trainer import Gradients, make_trainer

tiny, out, method = SimpleNamespace(model=Path(sys.argv[1]), data=Path(sys.argv[2])), Path(sys.argv[3]), sys.argv[4]
trainer, seen = make_trainer(tiny, out / "ddp", method, batch=2, accumulation=2, ddp_backend="gloo"), Gradients()
trainer.add_callback(seen)
trainer.train()
assert isinstance(trainer.model_wrapped, DistributedDataParallel), type(trainer.model_wrapped)
if trainer.is_world_process_zero(): torch.save(seen.steps, out / "ddp.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gd+pd", "kl+pd"])
def test_two_processes_give_one_process_gradients(method, tiny, tmp_path, run_python):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.replace("sys.path.insert(0, str(Path(__file__).parent) if \"__file__\" in globals() else \".\")", f"sys.path.insert(0, {str(__import__('pathlib').Path(__file__).parent)!r})"))
    done = run_python(str(script), tiny.model, tiny.data, tmp_path, method,
                      launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = torch.load(tmp_path / "ddp.pt"), gradients(tiny, tmp_path, method, 8, 1)
    assert len(two) == len(one) == 2  # the second step has 3 items: one rank sees a dead batch
    for a, b in zip(one, two): assert_same(a, b)


KILLED = """
import os, signal, sys
import torch
from safeeraser.trainer import unlearn, UnlearnTrainer
from transformers import TrainerCallback

model, data, out, where = sys.argv[1:5]
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)

if where == "training":
    init = UnlearnTrainer.__init__
    def with_kill(self, *a, **k): init(self, *a, **k); self.add_callback(Kill())
    UnlearnTrainer.__init__ = with_kill
if where == "checkpoint":  # the second checkpoint: adapter written, optimizer only half
    save, calls = torch.save, iter(range(99))
    def half(obj, f, *a, **k):
        if "checkpoint-6" in str(f):
            open(f, "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return save(obj, f, *a, **k)
    torch.save = half
unlearn(model, data, out, "gd+pd", seed=7, progress=False, max_steps=8, save_strategy="steps", save_steps=3, use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, lora_r=4, lora_alpha=8, lora_dropout=0.2)
"""


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    unlearn(tiny.model, tiny.data, out, "gd+pd", seed=7, progress=False, max_steps=8, save_strategy="steps", save_steps=3, use_cpu=True,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, lora_r=4, lora_alpha=8, lora_dropout=0.2)
    return out


@pytest.mark.parametrize("where", ["training", "checkpoint"])
def test_killed_and_resumed_is_never_stopped(where, tiny, tmp_path, undisturbed, run_python):
    out = tmp_path / "run"
    killed = run_python(KILLED, tiny.model, tiny.data, out, where)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert not json.loads((out / "run.json").read_text())["finished"] and not (out / "adapter_model.safetensors").exists()
    if where == "checkpoint": assert (out / "checkpoints" / "checkpoint-6").exists()
    done = run_python(KILLED, tiny.model, tiny.data, out, "not")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "adapter_model.safetensors").read_bytes() == (undisturbed / "adapter_model.safetensors").read_bytes()
    resumed, whole = (json.loads((o / "run.json").read_text()) for o in (out, undisturbed))
    assert resumed["steps"] == whole["steps"] == 8


def test_only_whole_checkpoints_count(undisturbed, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(undisturbed / "checkpoints", folder)
    assert last_checkpoint(folder).endswith("checkpoint-8")
    (folder / "checkpoint-8" / "complete").unlink()
    assert last_checkpoint(folder).endswith("checkpoint-6") and not (folder / "checkpoint-8").exists()
    assert last_checkpoint(tmp_path / "nothing") is None


def test_an_epoch_shows_what_it_promises(tiny):
    sets = load_sets(tiny.data)
    plan = epoch_plan([i.image_id for i in sets.forget], [i.image_id for i in sets.retain], 5, seed=1, epoch=3)
    rows = [r for s in plan for r in SlotDataset(sets, load_refusals(tiny.data))[s]]
    count = lambda kind: sorted(r.item.image_id + r.item.question for r in rows if r.kind == kind)
    assert count("forget") == sorted(i.image_id + i.question for i in sets.forget)
    assert count("decouple") == sorted(i.image_id + i.question for i in sets.decouple)
    assert count("retain") == sorted([i.image_id + i.question for i in sets.retain] * 2)  # 6 of them beside 11 forget items: twice each
    for slot in plan:
        forget, partner = (next(r for r in SlotDataset(sets, load_refusals(tiny.data))[slot] if r.kind == k).item for k in ("forget", "decouple"))
        assert forget.question == partner.question and forget.image != partner.image


def test_errors_name_the_remedy(tiny, tmp_path):
    with pytest.raises(SafeEraserError, match="did you mean learning_rate"):
        unlearn(tiny.model, tiny.data, tmp_path / "a", "ga", lerning_rate=1)
    with pytest.raises(SafeEraserError, match="unknown term"):
        unlearn(tiny.model, tiny.data, tmp_path / "a", "gp")
    (tmp_path / "file").write_text("")
    with pytest.raises(SafeEraserError, match="is a file"):
        unlearn(tiny.model, tiny.data, tmp_path / "file", "ga")
    with pytest.raises(SafeEraserError, match="max_length=10"):
        unlearn(tiny.model, tiny.data, tmp_path / "b", "ga", max_length=10, **SMALL)
    with pytest.raises(SafeEraserError, match="no config.json"):
        unlearn(tiny.data, tiny.data, tmp_path / "c", "ga", **SMALL)
    assert not any((tmp_path / n).exists() for n in "abc")


def test_bfloat16_models_train_in_float32_and_answer(tiny, tmp_path):
    from safeeraser.generate import generate
    from safeeraser.rows import read_rows
    model, processor = load_model(tiny.model, "cpu")
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
        loaded, _ = load_model(folder, "cpu")
        assert loaded.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in add_adapter(loaded).parameters() if p.requires_grad)
        record = unlearn(folder, tiny.data, folder / "run", "kl+pd", seed=1, progress=False, max_steps=2, **SMALL)
        assert record["finished"] and all(math.isfinite(h["loss"]) for h in record["history"] if "loss" in h)
        assert read_rows(generate(folder, tiny.data, folder / "r.jsonl", folder / "run", progress=False))


def test_settings_that_do_not_fit(tiny, tmp_path):
    for bad in ({"max_steps": "many"}, {"lora_dropout": 2}, {"lr_scheduler_type": "zigzag"}):
        with pytest.raises(SafeEraserError): unlearn(tiny.model, tiny.data, tmp_path / "o", "ga", **SMALL | bad)
