"""Rows are measured, all of them, before the first step; none is lost; and they can be made in processes of their own."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from safeeraser.core import SafeEraserError
from safeeraser.data import load_refusals, load_sets
from safeeraser.encoder import Collator, Encoder
from safeeraser.slots import epoch_plan, SlotDataset
from safeeraser.model import load_model
from safeeraser.packed import PackedCollator
from safeeraser.packing import Packer
from safeeraser.trainer import unlearn

SMALL = dict(seed=1, progress=False, max_steps=1, lora_r=4, use_cpu=True, save_strategy="no", per_device_train_batch_size=4, gradient_accumulation_steps=1)


@pytest.fixture
def editable(tiny, tmp_path):
    "A copy of the tiny data set; `edit(change)` changes its records, `refuse(texts)` its refusals."
    data = shutil.copytree(tiny.data.parent, tmp_path / "world") / "dataset"
    (data / "settings.json").unlink()
    def edit(change):
        records = json.loads((data / "all_train.json").read_text())
        change(records)
        (data / "all_train.json").write_text(json.dumps(records))
    return SimpleNamespace(data=data, edit=edit, refuse=lambda texts: (data / "prompt.json").write_text(json.dumps({"idk": texts})))


MANY, LONG = "a " * 40, "x" * 500  # many tokens of few signs, and one token of many
PLACES = {"retain": lambda r: r[0]["UnharmPair_text1"].update(Prediction=MANY), "forget": lambda r: r[1]["unsafe_pairs"][0].update(model_response=MANY),
          "decouple": lambda r: r[1]["unsafe_pairs"][1].update(sd_response=MANY), "question": lambda r: r[2]["unsafe_pairs"][0].update(question=MANY), "refusal": None}


@pytest.mark.parametrize("packing", ["dense", "off"])
@pytest.mark.parametrize("place", PLACES)
def test_the_longest_row_is_found_before_the_first_step(place, packing, editable, tiny, tmp_path):
    editable.edit(lambda r: r[0]["unsafe_pairs"][0].update(model_response=LONG))  # the most signs, few tokens
    editable.refuse(["No .", "Sorry , no .", "No ."] + ([MANY] if place == "refusal" else []))
    if PLACES[place]: editable.edit(PLACES[place])
    method, run = "po+pd" if place == "refusal" else "gd+pd", dict(SMALL, max_length=60, packing=packing)
    with pytest.raises(SafeEraserError, match="question .* tokens with its answer and image, more than max_length=60"):
        unlearn(tiny.model, editable.data, tmp_path / "run", method, **run)
    assert not (tmp_path / "run" / "run.json").exists()
    assert unlearn(tiny.model, editable.data, tmp_path / "run", method, **run | {"max_length": 200})["finished"]


@pytest.mark.parametrize("place, text", [("model_response", "Yes.</s> No"), ("question", "is <image> it"), ("idk", "I </s> can't")])
def test_a_signal_in_the_data_stops_unlearning_before_it_starts(place, text, editable, tiny, tmp_path):
    if place == "idk": editable.refuse(["No .", text])
    else: editable.edit(lambda r: r[-1]["unsafe_pairs"][-1].update({place: text}))
    with pytest.raises(SafeEraserError, match=f"question .*{'idk of prompt.json' if place == 'idk' else 'model_response'}: the .* contains <"):
        unlearn(tiny.model, editable.data, tmp_path / "run", "po+pd" if place == "idk" else "gd", **SMALL)


@pytest.mark.parametrize("together", [True, False])
def test_harmless_questions_about_an_image_without_unsafe_ones_are_all_asked(together):
    forget, retain = ["a"] * 3 + ["b"] * 4, ["a", "z", "z", "y", "b", "z", "a"]
    for epoch in range(5):
        plan = epoch_plan(forget, retain, 2, seed=1, epoch=epoch, together=together)
        assert sorted(s.forget for s in plan) == list(range(7)) and sorted(i for s in plan for i in s.retain) == list(range(7))
        assert max(len(s.retain) for s in plan) <= 2


def test_an_image_with_harmless_questions_only_trains_packed(editable, tiny, tmp_path):
    editable.edit(lambda r: r.append({"image_path": r[0]["SDImage_path"], "unsafe_pairs": [], "UnharmPair_text1": {"Question": "what is this ?", "Prediction": "a ring ."}}))
    record = unlearn(tiny.model, editable.data, tmp_path / "run", "gd+pd", packing="dense", group_images=True, **SMALL)
    assert record["finished"] and record["packing"]["images_grouped"]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_made_in_processes_that_were_started_afresh(packed, tiny):
    "Where a system has no fork, a process is sent all it needs."
    encoder = Encoder(load_model(tiny.model, "cpu")[1], 200)
    data, collator = SlotDataset(load_sets(tiny.data), load_refusals(tiny.data)), PackedCollator(Packer(encoder)) if packed else Collator(encoder)
    slots = epoch_plan(list("aabbccddeef"), list("abcdef"), 2, seed=1, epoch=0)
    made = lambda **how: list(DataLoader(data, batch_size=6, sampler=slots, collate_fn=collator, **how))
    for a, b in zip(made(), made(num_workers=2, multiprocessing_context="spawn"), strict=True):
        assert torch.equal(a["n_items"], b["n_items"])
        for x, y in zip(a.get("passes", [a]), b.get("passes", [b]), strict=True): assert torch.equal(x["input_ids"], y["input_ids"]) and torch.equal(x["labels"], y["labels"])
