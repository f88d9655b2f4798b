"""Kept features and references change nothing but the time, and are never another model's or another image's."""
import errno
import json

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import safeeraser.cache as cache
from safeeraser.cache import FeatureStore, VisionCache, fingerprints, frozen_fingerprint
from safeeraser.data import load_sets
from safeeraser.encoder import Encoder
from safeeraser.slots import Row
from safeeraser.model import load_model
from safeeraser.trainer import unlearn

SMALL = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_cpu": True, "save_strategy": "no", "num_train_epochs": 3, "learning_rate": 1e-2, "seed": 2, "progress": False, "packing": "dense"}


def losses(record): return [h["loss"] for h in record["history"] if "loss" in h]


def test_training_with_and_without(tiny, tmp_path):
    run = lambda name, **more: losses(unlearn(tiny.model, tiny.data, tmp_path / name, "kl+pd", logging_steps=1, **SMALL, **more))
    plain = run("plain", vision_cache_gib=0)
    assert run("vision", vision_cache_gib=1) == pytest.approx(plain, abs=1e-4)
    assert run("both", reference_cache_gib=1) == pytest.approx(plain, abs=1e-4)
    tight = run("tight", vision_cache_gib=1e-6, vision_cache_dir=str(tmp_path / "v"), reference_cache_gib=1e-6, reference_cache_dir=str(tmp_path / "r"))
    assert tight == pytest.approx(plain, abs=1e-4)
    assert list((tmp_path / "v").rglob("*.safetensors")) and list((tmp_path / "r").rglob("*.safetensors"))
    again = run("again", vision_cache_gib=1e-6, vision_cache_dir=str(tmp_path / "v"), reference_cache_gib=1e-6, reference_cache_dir=str(tmp_path / "r"))
    assert again == pytest.approx(plain, abs=1e-4)


def test_the_tower_runs_once_an_image_and_the_reference_once_a_segment(tiny, tmp_path, monkeypatch):
    made = []
    for kind in (cache.VisionCache, cache.ReferenceCache):
        monkeypatch.setattr(f"safeeraser.trainer.{kind.__name__}", lambda *a, kind=kind: made.append(kind(*a)) or made[-1])
    unlearn(tiny.model, tiny.data, tmp_path / "run", "kl+pd", reference_cache_gib=1, **SMALL)
    reference, vision = made
    sets = load_sets(tiny.data)
    assert vision.computed == len({i.image for i in sets}) < vision.seen / 2
    assert reference.computed == 2 * len(sets.retain)  # each is in an epoch's only step twice; two more epochs ask nothing


def pixels_and_model(tiny, seed=None):
    model, processor = load_model(tiny.model, "cpu")
    if seed is not None:
        with torch.no_grad(): next(model.model.vision_tower.parameters()).add_(.1)
    model.requires_grad_(False)
    batch = Encoder(processor).rows([Row("forget", i, i.answer) for i in load_sets(tiny.data).forget[::4]])
    batch.pop("labels")
    return model, batch


def test_another_model_s_features_are_not_used(tiny, tmp_path):
    for seed in (None, 1):
        model, batch = pixels_and_model(tiny, seed)
        with torch.no_grad(): expected = model(**batch).logits
        with VisionCache(model, 0, tmp_path) as kept, torch.no_grad(): found = model(**batch).logits
        assert torch.equal(found, expected) and kept.computed == len(batch["pixel_values"])
    assert len(list(tmp_path.iterdir())) == 2
    with VisionCache(model, 0, tmp_path) as kept, torch.no_grad(): model(**batch)
    assert kept.computed == 0


def test_another_model_s_reference_is_not_used(tiny, tmp_path):
    settings = dict(logging_steps=1, reference_cache_gib=1e-6, reference_cache_dir=str(tmp_path / "r"), **SMALL)
    unlearn(tiny.model, tiny.data, tmp_path / "first", "kl+pd", **settings)
    model, processor = load_model(tiny.model, "cpu")
    with torch.no_grad(): next(model.model.language_model.layers[0].parameters()).mul_(1.5)
    for part in (model, processor): part.save_pretrained(tmp_path / "model")
    found = losses(unlearn(tmp_path / "model", tiny.data, tmp_path / "second", "kl+pd", **settings))
    assert found == pytest.approx(losses(unlearn(tmp_path / "model", tiny.data, tmp_path / "plain", "kl+pd", logging_steps=1, **SMALL)), abs=1e-4)
    assert len(list((tmp_path / "r").iterdir())) == 2


@pytest.mark.parametrize("harm", ["cut", "empty", "other"])
def test_a_broken_file_is_computed_anew(harm, tiny, tmp_path):
    model, batch = pixels_and_model(tiny)
    with VisionCache(model, 0, tmp_path), torch.no_grad(): expected = model(**batch).logits
    files = sorted(tmp_path.rglob("*.safetensors"))
    files[0].write_bytes({"cut": files[0].read_bytes()[:60], "empty": b"", "other": b"no tensors"}[harm])
    with VisionCache(model, 0, tmp_path) as kept, torch.no_grad(): assert torch.equal(model(**batch).logits, expected)
    assert kept.computed == 1
    with VisionCache(model, 0, tmp_path) as kept, torch.no_grad(): model(**batch)
    assert kept.computed == 0


def test_a_full_disk_ends_the_writing_not_the_run(tiny, tmp_path, monkeypatch):
    model, batch = pixels_and_model(tiny)
    with torch.no_grad(): expected = model(**batch).logits
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(cache, "save_file", full)
    with VisionCache(model, 0, tmp_path) as kept, torch.no_grad():
        for _ in range(2): assert torch.equal(model(**batch).logits, expected)
    assert kept.store.disk_full and not list(tmp_path.rglob("*writing*")) and not list(tmp_path.rglob("*.safetensors"))


def test_a_replaced_image_is_another_image(tiny, tmp_path):
    model, batch = pixels_and_model(tiny)
    with VisionCache(model), torch.no_grad(): pass
    changed = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with torch.no_grad(): expected = model(**changed).logits
    with VisionCache(model) as kept, torch.no_grad():
        model(**batch)
        assert torch.allclose(model(**changed).logits, expected, atol=1e-6)
    assert kept.computed == len(batch["pixel_values"])  # the same pixels in another order: nothing new, nothing mixed up


def test_memory_stays_below_its_bound():
    store = FeatureStore(1000)
    for k in range(50): store.put(str(k), {"a": torch.zeros(30)})
    assert store.size <= 1000 and len(store.kept) == 8 and store.get("49") is not None and store.get("0") is None


def test_what_was_used_last_is_kept_longest():
    store = FeatureStore(2 * 40)
    for name in ("a", "b"): store.put(name, {"x": torch.zeros(10)})
    store.get("a")
    store.put("c", {"x": torch.zeros(10)})
    assert [store.get(n) is not None for n in "abc"] == [True, False, True]


def test_a_tower_s_other_inputs_count(tiny):
    "The same pixels under another mask are other features; a mask that is not one a row is left to the tower."
    model, batch = pixels_and_model(tiny)
    pixels, looked = batch["pixel_values"], []
    def tower(pixel_values, mask):
        looked.append(len(pixel_values))
        return BaseModelOutput(last_hidden_state=pixel_values.flatten(1) * mask)
    model.model.vision_tower.forward = tower
    mask = torch.arange(1., len(pixels) + 1)[:, None]
    with VisionCache(model) as kept:
        for m in (mask, 2 * mask, mask, torch.full((1, 1), 3.)):
            assert torch.equal(model.model.vision_tower.forward(pixels, mask=m).last_hidden_state, pixels.flatten(1) * m)
    assert kept.computed == 2 * len(pixels) and len(looked) == 3  # twice kept, the last time only passed on


def test_fingerprints_tell_apart_what_differs():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    swapped = x.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = x[0, 0, 1], x[0, 0, 0]
    names = [n for t in (x, swapped[:1], x.double(), x.reshape(4, 5, 3), torch.zeros(1, 3, 5), torch.zeros(1, 3, 6), -x) for n in fingerprints(t)]
    assert len(set(names)) == len(names)


def test_a_trained_tower_is_left_alone(tiny):
    model, batch = pixels_and_model(tiny)
    model.model.vision_tower.requires_grad_(True)
    with VisionCache(model) as kept: model(**batch)
    assert kept.why == "the vision tower is being trained" and kept.seen == 0
    assert frozen_fingerprint(model.model.vision_tower) == frozen_fingerprint(torch.nn.Identity())


@pytest.mark.parametrize("more", [False, True])  # whether the model does more to its scores than its head
def test_a_reference_kept_in_part_is_asked_anew(more, tiny):
    from safeeraser.model import add_adapter
    from safeeraser.packed import packed_log_probs, use_route
    from safeeraser.packing import Packer, stack_rows
    model, processor = load_model(tiny.model, "cpu")
    plain = model.forward
    def softer(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out
    if more: model.forward = softer
    adapted = add_adapter(model, 4, 8)
    use_route(adapted, "dense")
    retain = load_sets(tiny.data).retain
    batch = lambda items: stack_rows(Packer(Encoder(processor)).pack([Row("retain", i, i.answer) for i in items], list(range(len(items)))), ("retain",))["reference"]
    kept = cache.ReferenceCache(adapted, 2**20)
    for items in (retain[:2], retain[:4], retain[2:4]):
        found = kept.scores(adapted, batch(items), "dense").log_probs()
        with torch.no_grad(), cache.vanilla(adapted): assert torch.allclose(found, packed_log_probs(adapted, batch(items), "dense"), atol=1e-5)
    assert kept.computed == (2 + 4 + 2 if more else 2 + 4) and bool(kept.why) == more


def test_a_pass_that_only_keeps_step_is_kept_apart(tiny):
    "Its labels are gone: what it says is nothing, and never stands for the segment that it was made of."
    from safeeraser.model import add_adapter
    from safeeraser.packed import packed_log_probs, PackedCollator, use_route
    from safeeraser.packing import Packer
    from safeeraser.trainer import silent
    model, processor = load_model(tiny.model, "cpu")
    adapted, sets = add_adapter(model, 4, 8), load_sets(tiny.data)
    use_route(adapted, "dense")
    slots = [[Row("forget", i, i.answer)] for i in sets.forget[:2]] + [[Row("retain", i, i.answer)] for i in sets.retain[:2]]
    collator = PackedCollator(Packer(Encoder(processor)), ("retain",), even=True)
    real, empty = collator(slots)["passes"][0]["reference"], collator(slots[:2])["passes"][0]["reference"]
    with torch.no_grad(), cache.vanilla(adapted): expected = packed_log_probs(adapted, real, "dense")
    kept = cache.ReferenceCache(adapted, 2**20)
    for _ in range(2):
        for batch in (empty, silent(real)): assert kept.scores(adapted, batch, "dense").log_probs().shape == (0, expected.shape[1])
        assert torch.allclose(kept.scores(adapted, real, "dense").log_probs(), expected, atol=1e-5)
    assert kept.why is None


@pytest.mark.slow
def test_several_ranks_keep_references(tiny, tmp_path, run_python):
    script = tmp_path / "ranks.py"
    script.write_text("import sys\nfrom safeeraser.trainer import unlearn\nout, gib = sys.argv[3], float(sys.argv[4])\n"
                      f"unlearn(sys.argv[1], sys.argv[2], out, 'kl+pd', logging_steps=1, ddp_backend='gloo', per_device_train_batch_size=2, gradient_accumulation_steps=2,"
                      f" reference_cache_gib=gib, **{SMALL!r})\n")
    def run(gib):
        done = run_python(str(script), tiny.model, tiny.data, tmp_path / str(gib), gib, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
        assert done.returncode == 0, done.stderr[-3000:]
        return losses(json.loads((tmp_path / str(gib) / "run.json").read_text()))
    assert run(1) == pytest.approx(run(0), abs=1e-4)
