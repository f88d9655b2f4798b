"""What is trained, and what is left behind: adapters, adapters on 4-bit weights, whole models, SineProject's projector."""
import copy
import importlib.util
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from safeeraser.cli import app
from safeeraser.core import SafeEraserError
from safeeraser.encoder import Encoder
from safeeraser.export import import_checkpoint, merge
from safeeraser.generate import generate
from safeeraser.rows import read_rows
from safeeraser.model import load_adapter, load_model, vanilla
from safeeraser.predict import batch_tokens
from safeeraser.settings import make_config
from safeeraser.trainer import last_checkpoint, make_trainable, unlearn
from safeeraser.loss import parse_objective

FAST = dict(seed=0, progress=False, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=1, lora_r=4, lora_alpha=8,
            logging_steps=1, use_cpu=True, save_strategy="no")
FOUR_BIT = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is an extra")


@torch.no_grad()
def logits(model, processor):
    inputs = processor(text=[Encoder(processor).prompt("what is this ?")], images=[[Image.new("RGB", (48, 48), "teal")]], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    return model.eval()(**inputs).logits.float()


def run(tiny, out, method="kl+pd", **settings): return unlearn(tiny.model, tiny.data, out, method, **FAST | settings)


def weights(folder): return load_file(next(folder.glob("*model.safetensors")))


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sine_projector_is_saved_as_plain_weights(tiny, tmp_path):
    "Plain PEFT loads it; no weight has moved by more than 1, however large the steps."
    run(tiny, tmp_path / "run", projector="sine", learning_rate=3.)
    net, processor = load_model(tiny.model, "cpu")
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "run")), processor),
                       logits(load_adapter(copy.deepcopy(net), tmp_path / "run"), processor))
    saved = {k.split("multi_modal_projector.")[1]: v for k, v in weights(tmp_path / "run").items() if "projector" in k}
    moved = [(saved[n] - p).abs().max().item() for n, p in net.model.multi_modal_projector.named_parameters()]
    assert len(saved) == len(moved) == 4 and .5 < max(moved) <= 1 + 1e-6


def test_sine_projector_takes_the_first_step_of_gradient_descent_in_delta(tiny, tmp_path):
    "Plain SGD, no clipping: at dW = 0 the sine's slope is 1, so a step of -lr g on dW gives W + sin(-lr g)."
    plain, sine = (tmp_path / p for p in ("plain", "sine"))
    same = dict(max_steps=1, lora_dropout=0., optim="sgd", learning_rate=5., max_grad_norm=0., weight_decay=0., warmup_steps=0, lr_scheduler_type="constant")
    run(tiny, plain, **same)
    run(tiny, sine, projector="sine", **same)
    net, _ = load_model(tiny.model, "cpu")
    start = {f"base_model.model.model.multi_modal_projector.{n}": p for n, p in net.model.multi_modal_projector.named_parameters()}
    for name, w0 in start.items():
        step = weights(plain)[name] - w0
        assert step.abs().max() > 1e-4
        torch.testing.assert_close(weights(sine)[name] - w0, step.sin(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"projector": "sine"}, {"tuning": "full", "reference_copy": True}], ids=str)
def test_killed_and_resumed_is_never_stopped(settings, tiny, tmp_path):
    for name in ("whole", "killed"): run(tiny, tmp_path / name, save_strategy="steps", save_steps=1, **settings)
    killed, expected = tmp_path / "killed", weights(tmp_path / "whole")
    for file in [*killed.glob("*.safetensors"), killed / "checkpoints/checkpoint-3"]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    record = json.loads((killed / "run.json").read_text())
    (killed / "run.json").write_text(json.dumps(record | {"finished": False}))
    assert last_checkpoint(killed / "checkpoints").endswith("-2")
    run(tiny, killed, save_strategy="steps", save_steps=1, **settings)
    assert equal(weights(killed), expected)


def test_gradient_checkpointing_changes_nothing(tiny, tmp_path):
    for settings in ({}, {"packing": "off"}, {"tuning": "full", "reference_copy": True}):
        for on in (False, True): run(tiny, tmp_path / f"{on}", gradient_checkpointing=on, **settings)
        assert equal(weights(tmp_path / "True"), weights(tmp_path / "False"))
        shutil.rmtree(tmp_path / "True"), shutil.rmtree(tmp_path / "False")


def test_a_whole_model_is_compared_with_its_frozen_copy(tiny):
    "Its KL is 0 before training, and afterwards that of two models of which one is the file's."
    objective, net = parse_objective("kl+pd"), load_model(tiny.model, "cpu")[0]
    args = make_config(tiny.root / "unused", tuning="full", reference_copy=True, method="kl+pd", use_cpu=True)
    model, pristine = make_trainable(copy.deepcopy(net), args, objective), net
    from safeeraser.data import load_refusals, load_sets
    from safeeraser.encoder import Collator
    from safeeraser.slots import Slot, SlotDataset
    encoder = Encoder(load_model(tiny.model, "cpu")[1])
    batch = Collator(encoder)([SlotDataset(load_sets(tiny.data), load_refusals(tiny.data), objective.kinds)[Slot(0, (0, 1))]])
    tokens = batch_tokens(model, batch, objective)["retain"]
    assert torch.equal(tokens.log_probs, tokens.ref_log_probs)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.1 * torch.randn_like(p))
    with vanilla(model) as asked, torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "kind", "item", "n_items")}
        assert torch.equal(asked(**inputs).logits, pristine(**inputs).logits)
        assert not torch.allclose(model(**inputs).logits, pristine(**inputs).logits, atol=1e-2)


def test_a_whole_model_is_a_plain_model_folder(tiny, tmp_path):
    out = tmp_path / "run"
    run(tiny, out, "ga", tuning="full")
    before, after = weights(tiny.model), weights(out)
    assert before.keys() == after.keys()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {k for k in before if "vision_tower" not in k}
    rows = read_rows(generate(out, tiny.data, tmp_path / "a.jsonl", splits=["val"], progress=False))
    assert {(r["method"], r["seed"]) for r in rows} == {("ga", 0)}
    for verb in (lambda: generate(tiny.model, tiny.data, tmp_path / "b.jsonl", adapter=out), lambda: merge(out, tmp_path / "c")):
        with pytest.raises(SafeEraserError, match="holds a whole model, not an adapter"): verb()


@pytest.mark.parametrize("settings, sentence", [
    ({"tuning": "full"}, r"method 'kl\+pd' compares with the vanilla model.*reference_copy=true"),
    ({"tuning": "full", "projector": "sine"}, "projector='sine' belongs to an adapter"),
    ({"tuning": "full", "reference_copy": True, "reference_cache_gib": 1.}, "reference_cache_gib > 0 belongs to an adapter"),
    ({"tuning": "lorra"}, "tuning='lorra': one of lora, qlora, full"), ({"projector": "cosine"}, "projector='cosine': one of full, sine")], ids=str)
def test_settings_that_do_not_go_together(settings, sentence, tiny, tmp_path):
    with pytest.raises(SafeEraserError, match=sentence): run(tiny, tmp_path / "run", **settings)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bfloat16(tiny, tmp_path):
    "Trains in bfloat16 with float32 adapters; a merged or whole model comes out in the precision it went in."
    net, processor = load_model(tiny.model, "cpu", dtype=torch.bfloat16)
    for part in (net, processor): part.save_pretrained(tmp_path / "model")
    for name, settings in (("adapter", {}), ("whole", {"tuning": "full"})):
        unlearn(tmp_path / "model", tiny.data, tmp_path / name, "gd+pd", **FAST | settings)
    assert {v.dtype for v in weights(tmp_path / "adapter").values()} == {torch.float32}
    merge(tmp_path / "adapter", tmp_path / "merged", device="cpu")
    for name in ("merged", "whole"):
        assert {v.dtype for v in weights(tmp_path / name).values()} == {torch.bfloat16}
        assert load_model(tmp_path / name, "cpu")[0].dtype == torch.bfloat16


@FOUR_BIT
def test_four_bits(tiny, tmp_path):
    "Language model in 4 bits, tower and projector not; the reference is the 4-bit model; the adapter is plain PEFT and merges into full weights."
    run(tiny, tmp_path / "run", tuning="qlora")
    load = lambda: load_model(tiny.model, "cpu", four_bit=True)
    net, processor = load()
    small = {n for n, m in net.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(small) == 7 * 2 and all(n.startswith("model.language_model.layers.") for n in small)
    adapted = PeftModel.from_pretrained(load()[0], str(tmp_path / "run"))
    assert torch.equal(logits(load_adapter(load()[0], tmp_path / "run"), processor), logits(adapted, processor))
    with vanilla(adapted) as asked: assert torch.equal(logits(asked, processor), logits(net, processor))
    merge(tmp_path / "run", tmp_path / "merged", device="cpu")
    full = logits(load_model(tmp_path / "merged", "cpu")[0], processor)
    assert (full - logits(adapted, processor)).abs().max() < .5 * (logits(net, processor) - logits(adapted, processor)).abs().max()


def test_four_bits_without_bitsandbytes(tiny, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a))
    with pytest.raises(SafeEraserError, match="4-bit weights need bitsandbytes: pip install"): run(tiny, tmp_path / "run", tuning="qlora")


@pytest.fixture
def sibling(tiny, tmp_path):
    "A model of the same shape with other weights."
    net, processor = load_model(tiny.model, "cpu")
    with torch.no_grad(): net.lm_head.weight.mul_(1.1)
    for part in (net, processor): part.save_pretrained(tmp_path / "sibling")
    return tmp_path / "sibling"


def test_an_adapter_of_another_model_is_refused(tiny, sibling, tmp_path):
    "Of the same shape or another, by every verb."
    from safeeraser.tiny_llava import BaseConfig, build_model
    run(tiny, tmp_path / "run")
    for part in build_model(BaseConfig(width=64, vision_width=32)): part.save_pretrained(tmp_path / "wide")
    for other, sentence in ((sibling, "was trained on another model"), (tmp_path / "wide", "was trained on another model|does not fit")):
        for verb in (lambda: merge(tmp_path / "run", tmp_path / "out", other), lambda: generate(other, tiny.data, tmp_path / f"{other.name}.jsonl", tmp_path / "run", progress=False)):
            with pytest.raises(SafeEraserError, match=sentence): verb()
        assert not (tmp_path / "out").exists()
        done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--model", str(other)])
        assert isinstance(done.exception, SafeEraserError)
    (tmp_path / "run/run.json").unlink()  # a PEFT folder from elsewhere: its shape still tells
    with pytest.raises(SafeEraserError, match="does not fit"): merge(tmp_path / "run", tmp_path / "out", tmp_path / "wide")


def test_a_merged_model_goes_through_the_verbs_by_itself(tiny, tmp_path):
    run(tiny, tmp_path / "run", projector="sine")
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")], catch_exceptions=False)
    assert done.exit_code == 0
    answers = lambda model, out, adapter=None: [(r["method"], r["response"]) for r in read_rows(generate(model, tiny.data, tmp_path / out, adapter, splits=["val"], progress=False))]
    assert answers(tmp_path / "merged", "a.jsonl") == answers(tiny.model, "b.jsonl", tmp_path / "run")
    unlearn(tmp_path / "merged", tiny.data, tmp_path / "again", "gd", **FAST)  # and is a vanilla model for another run


def test_a_checkpoint_of_the_authors_is_the_same_model(tiny, tmp_path):
    "Made as their code makes it: PEFT over their module names with their targets, trainable parameters in float16, torch.save."
    from peft import get_peft_model, LoraConfig
    net, processor = load_model(tiny.model, "cpu")
    theirs = get_peft_model(copy.deepcopy(net), LoraConfig(r=4, lora_alpha=16, lora_dropout=.05, bias="none", task_type="CAUSAL_LM",
        target_modules=r".*language_model.*\.(up_proj|k_proj|linear_2|down_proj|v_proj|q_proj|o_proj|gate_proj|linear_1)"))
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "projector" in n: p.requires_grad_(True)
            if p.requires_grad: p.copy_((p + .1 * torch.randn_like(p)).half())
    tensors = {n: p.to(torch.float16).cpu() for n, p in theirs.named_parameters() if p.requires_grad}
    old = {n.replace("model.model.language_model.", "model.language_model.model.").replace("model.model.multi_modal", "model.multi_modal"): v for n, v in tensors.items()}
    assert old.keys().isdisjoint(tensors.keys())  # both spellings: before and after transformers moved the modules
    for k, spelling in enumerate((tensors, old)):
        torch.save(spelling, tmp_path / "checkpoint.pt")
        import_checkpoint(tmp_path / "checkpoint.pt", tiny.model, tmp_path / f"run{k}", alpha=16)
        found = load_adapter(load_model(tiny.model, "cpu")[0], tmp_path / f"run{k}")
        torch.testing.assert_close(logits(found, processor), logits(theirs, processor), atol=1e-5, rtol=1e-5)
    merge(tmp_path / "run0", tmp_path / "merged", device="cpu")
    torch.testing.assert_close(logits(load_model(tmp_path / "merged", "cpu")[0], processor), logits(theirs, processor), atol=1e-4, rtol=1e-4)
    assert math.isfinite(logits(theirs, processor).sum())
