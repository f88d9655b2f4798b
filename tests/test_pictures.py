"""An image file is decoded and prepared once, whatever the family, and nothing of it changes."""
import os
from collections import Counter

import numpy as np
import pytest
import torch
from families import FAMILIES, make_sets
from PIL import Image

import safeeraser.encoder as encoding
from safeeraser.cache import VisionCache
from safeeraser.data import load_image, load_sets
from safeeraser.encoder import Encoder, Kept, nbytes, process, PreparedOnce, Unopened
from safeeraser.trainer import unlearn


@pytest.fixture(scope="module")
def sets(tmp_path_factory): return make_sets(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def opened(monkeypatch):
    "How often each file was decoded."
    seen = Counter()
    monkeypatch.setattr(encoding, "load_image", lambda path: seen.update([path.name]) or load_image(path))
    return seen


def same(a, b): return np.array_equal(a, b) if not isinstance(a, (list, tuple)) else len(a) == len(b) and all(map(same, a, b))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_inputs_are_the_processor_s_own(name, sets, opened):
    "Bit for bit: images of two sizes, one by one, some of a size, all of them, and all of them again."
    encoder = Encoder(FAMILIES[name].make_processor())
    files = list(dict.fromkeys(i.image for i in sets))
    size = {f: Image.open(f).size for f in files}
    alike = [f for f in files if size[f] == size[files[0]]]
    assert 1 < len(alike) < len(files)
    for pictures in (files[:1], alike, alike[::-1] + alike[:1], files, files[:1], alike, files):
        texts = [encoder.prompt(f"what is this {'thing ' * k}") for k, _ in enumerate(pictures)]
        found, expected = encoder.call(texts, pictures, "right"), process(encoder.processor, texts, [load_image(f) for f in pictures], "right")
        assert found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in expected)
    assert encoder.looking.image_processor.joins
    shapes = {v.shape[1:] for f in files for k, v in encoder.call(texts[:1], [f], "right").items() if k == "pixel_values"}
    assert max(opened.values()) == 1 or len(shapes) > 1  # where images are filled up to the largest, the processor is asked itself


SMALL = {"lora_r": 4, "lora_alpha": 8, "use_cpu": True, "save_strategy": "no", "num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
         "learning_rate": 1e-2, "seed": 2, "progress": False, "logging_steps": 1}


def history(record): return [(h["loss"], h["grad_norm"]) for h in record["history"] if "loss" in h]


@pytest.mark.parametrize("packing", ["off", "split"])
def test_three_epochs_decode_and_look_once(packing, tiny, tmp_path, opened, monkeypatch):
    caches, prepared = [], []
    monkeypatch.setattr("safeeraser.trainer.VisionCache", lambda *a: caches.append(VisionCache(*a)) or caches[-1])
    real = PreparedOnce._one
    monkeypatch.setattr(PreparedOnce, "_one", lambda self, *a: prepared.append(self) or real(self, *a))
    found = history(unlearn(tiny.model, tiny.data, tmp_path / "run", "gd+pd", packing=packing, **SMALL))
    files = {i.image for i in load_sets(tiny.data)}
    assert opened == Counter(f.name for f in files)
    assert caches[0].computed == len(files) < caches[0].seen / 2
    assert len(prepared[-1].kept.kept) == len(files)
    monkeypatch.setattr(encoding, "PICTURE_BYTES", 0)
    opened.clear()
    assert history(unlearn(tiny.model, tiny.data, tmp_path / "none", "gd+pd", packing=packing, **SMALL)) == found
    assert opened.total() > 2 * len(files)


def test_memory_is_bounded_and_shared_among_workers(tmp_path, monkeypatch, opened):
    processor = FAMILIES["llava"].make_processor()
    files = [tmp_path / f"{k}.png" for k in range(6)]
    for k, f in enumerate(files): Image.new("RGB", (60, 60), (k, 0, 0)).save(f)
    once = PreparedOnce(processor.image_processor)
    look = lambda f: once([[Unopened(f)]], return_tensors="pt")["pixel_values"]
    one = look(files[0]).nbytes
    monkeypatch.setattr(encoding, "PICTURE_BYTES", 4 * one)
    for f in files: look(f)
    assert len(once.kept.kept) == 4 and once.kept.size == 4 * one == nbytes([*once.kept.kept.values()])
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: type("Info", (), {"num_workers": 2}))
    look(files[0])
    assert len(once.kept.kept) == 2
    look(files[0]).fill_(9)  # what is handed out is the caller's
    assert (look(files[0]) != 9).all() and opened["0.png"] == 2


def test_what_is_put_again_is_counted_once():
    kept = Kept(100)
    for _ in range(5): kept.put("a", torch.zeros(10))
    assert kept.size == 40 and list(kept.kept) == ["a"]


def test_a_file_replaced_in_its_place_is_prepared_anew(tmp_path):
    encoder, file = Encoder(FAMILIES["llava"].make_processor()), tmp_path / "1.png"
    seen = []
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (60, 60), colour).save(file)
        os.utime(file, ns=(0, 0))
        seen.append(encoder.call([encoder.prompt("what")], [file], "right")["pixel_values"])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
