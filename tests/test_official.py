"""The official layout with its quirks is read, faults are all named, and other tables come into the same form."""
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from safeeraser.data import SafeEraserError, load_image, load_sets
from safeeraser.official import Asked, check_dataset, convert, look_at, read_table
from safeeraser.world import World, write_dataset


def run(*arguments):
    code = "from safeeraser.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def folder(tmp_path):
    return write_dataset(World(0), tmp_path / "dataset", {"train": 6, "val": 3})


def edit(folder, change, split="train"):
    file = folder / f"all_{split}.json"
    records = json.loads(file.read_text())
    change(records)
    file.write_text(json.dumps(records))


def with_quirks(folder):
    "As the published copy is: two spellings of a folder, sub-folders, missing pairs, and JSON lines."
    def change(records):
        for k, r in enumerate(records):
            old = folder.parent / r["SDImage_path"]
            new = Path("dataset/pdset/image", ("Hatespeech", "Sex")[k % 2], "train", *(["more"] if k % 2 else []), f"q{k}.png")
            (folder.parent / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(old, folder.parent / new)
            r["SDImage_path"] = new.as_posix()
        records[0].pop("UnharmPair_text1", None)
        records[1]["UnharmPair_image1"] = {}
    edit(folder, change)
    file = folder / "all_train.json"
    file.write_text("\n".join(map(json.dumps, json.loads(file.read_text()))))


def test_counts_are_those_of_the_sets(folder):
    found, sets = check_dataset(folder, progress=False), load_sets(folder)
    assert found["usable"] and found["problems"] == []
    for name in ("forget", "retain", "decouple"): assert sum(found["splits"]["train"][name].values()) == len(getattr(sets, name))
    assert found["splits"]["train"]["forget"] == {c: sum(i.category == c for i in sets.forget) for c in sorted({i.category for i in sets.forget})}


def test_quirks_are_told_not_refused(folder):
    plain = {(i.set, i.question, i.answer) for i in load_sets(folder)}
    with_quirks(folder)
    found = check_dataset(folder, progress=False)
    assert found["usable"]
    text = "\n".join(found["quirks"])
    for said in ("all_train.json is JSON lines", "HateSpeech is also spelt Hatespeech", "3 image paths have sub-folders", "fewer than 4 harmless pairs"): assert said in text
    read = {(i.set, i.question, i.answer) for i in load_sets(folder)}
    assert read < plain and {r for r in plain - read} == {r for r in plain - read if r[0] == "retain"}


@pytest.mark.parametrize("path, category", [("dataset/img/Hatespeech/3.jpg", "HateSpeech"), ("dataset/img/Sex/more/3.jpg", "Sex"), ("mine/img/other/3.jpg", "other"), ("3.jpg", "")])
def test_category_in_the_paper_s_spelling(path, category):
    from safeeraser.data import Record
    assert Record(path, None, ()).category == category


@pytest.mark.parametrize("harm, said", [
    (lambda f: edit(f, lambda r: r[2].update(unsafe_pairs=[])) or edit(f, lambda r: [r[2].pop(k) for k in list(r[2]) if k.startswith("Unharm")]), "record 2, unsafe_pairs: a non-empty list"),
    (lambda f: edit(f, lambda r: r[1]["unsafe_pairs"][1].update(model_response=7)), r"record 1, unsafe_pairs[1].model_response"),
    (lambda f: edit(f, lambda r: r[1].pop("SDImage_path")), "record 1, SDImage_path"),
    (lambda f: edit(f, lambda r: r[0].update(image_path="/etc/passwd")), "record 0, image_path: '/etc/passwd' leads out of the data root"),
    (lambda f: edit(f, lambda r: r[0].update(image_path="dataset/img/none.png")), "no image at 'dataset/img/none.png'"),
    (lambda f: (f.parent / json.loads((f / "all_train.json").read_text())[0]["image_path"]).write_bytes(b""), "not a readable image"),
    (lambda f: (f / "prompt.json").write_text("{}"), "idk: a non-empty list of refusals"),
])
def test_each_fault_is_named_and_the_rest_still_counted(harm, said, folder):
    harm(folder)
    found = check_dataset(folder, progress=False)
    assert not found["usable"] and len(found["problems"]) == 1 and said in found["problems"][0]
    assert len(found["splits"]["val"]["records"]) and sum(found["splits"]["train"]["records"].values()) >= 5
    assert "Traceback" not in (out := run("data", "check", folder)).stderr and out.returncode == 2 and said in out.stdout


def test_a_bomb_is_not_opened(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert "exceeds limit" in look_at(tmp_path / "big.png").problem


def test_a_json_report(folder):
    out = run("data", "check", folder, "--json")
    assert out.returncode == 0 and json.loads(out.stdout)["usable"] is True


def test_two_pictures_of_one_name_stay_two_and_one_of_two_names_is_found(tmp_path):
    for name, colour in (("a/1.png", "red"), ("b/1.png", "blue"), ("c/2.png", "red")):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    asked = [Asked(tmp_path / name, f"what is {name} ?", "this") for name in ("a/1.png", "b/1.png", "c/2.png")]
    assert convert(asked, tmp_path / "dataset") == 2
    sets = load_sets(tmp_path / "dataset")
    assert {i.question: load_image(i.image).getpixel((0, 0)) for i in sets.forget} == {"what is a/1.png ?": (255, 0, 0), "what is b/1.png ?": (0, 0, 255), "what is c/2.png ?": (255, 0, 0)}


ROWS = [{"image": "1.png", "question": "how ?", "answer": "so", "kind": "unsafe", "safe_image": "2.png", "safe_answer": "well"},
        {"image": "1.png", "question": "what ?", "answer": "this", "kind": "harmless", "safe_image": "", "safe_answer": ""}]
MADE = [("forget", "how ?", "so"), ("retain", "what ?", "this"), ("decouple", "how ?", "well")]


def pictures(folder):
    for name, colour in (("1.png", "red"), ("2.png", "green")): Image.new("RGB", (8, 8), colour).save(folder / name)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "folder"])
def test_every_form_of_table(form, tmp_path):
    pictures(tmp_path)
    source = tmp_path / f"table.{form}"
    if form == "csv":
        with source.open("w", newline="") as f:
            writer = csv.DictWriter(f, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    if form == "jsonl": source.write_text("\n".join(map(json.dumps, ROWS)))
    if form in ("parquet", "folder"):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({k: datasets.Image() if "image" in k else datasets.Value("string") for k in ROWS[0]})
        full = [{k: (str(tmp_path / v) if "image" in k else v) if v else None for k, v in r.items()} for r in ROWS]
        table = datasets.Dataset.from_list(full, features=features)
        table.to_parquet(source) if form == "parquet" else table.save_to_disk(source)
    convert(read_table(source), tmp_path / "dataset")
    sets = load_sets(tmp_path / "dataset")
    assert [(i.set, i.question, i.answer) for i in sets] == MADE
    assert [load_image(i.image).getpixel((0, 0)) for i in sets] == [(255, 0, 0), (255, 0, 0), (0, 128, 0)]


def test_the_layout_of_open_mmunlearning(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures(tmp_path)
    features = datasets.Features({"image": datasets.Image(), "ID": datasets.Value("string"), "metadata": [{"Question": datasets.Value("string"), "Answer": datasets.Value("string")}]})
    def save(name, image, pairs):
        datasets.Dataset.from_list([{"image": str(tmp_path / image), "ID": "7", "metadata": [{"Question": q, "Answer": a} for q, a in pairs]}], features=features).to_parquet(tmp_path / name)
    save("forget.parquet", "1.png", [("how ?", "so"), ("why ?", "because")])
    save("retain.parquet", "2.png", [(f"what {k} ?", f"this {k}") for k in range(6)])
    out = run("data", "convert", tmp_path / "forget.parquet", "--harmless", tmp_path / "retain.parquet", "--out", tmp_path / "dataset")
    assert out.returncode == 0, out.stderr
    sets = load_sets(tmp_path / "dataset")
    assert [(i.question, i.answer) for i in sets.forget] == [("how ?", "so"), ("why ?", "because")] and sets.decouple == []
    assert [(i.question, i.answer) for i in sets.retain] == [(f"what {k} ?", f"this {k}") for k in range(6)]
    assert "no prompt-decouple set" in run("data", "check", tmp_path / "dataset").stdout


def test_data_without_safe_images_trains_without_pd_only(tiny, tmp_path):
    from safeeraser.trainer import unlearn
    shutil.copytree(tiny.data, tmp_path / "dataset")
    def change(records):
        for r in records:
            del r["SDImage_path"]
            for p in r["unsafe_pairs"]: del p["sd_response"]
    edit(tmp_path / "dataset", change)
    settings = dict(progress=False, max_steps=1, lora_r=4, use_cpu=True, save_strategy="no")
    assert unlearn(tiny.model, tmp_path / "dataset", tmp_path / "gd", "gd", **settings)["finished"]
    with pytest.raises(SafeEraserError, match=r"'gd\+pd' has a prompt-decouple term, but the data has no safe images"):
        unlearn(tiny.model, tmp_path / "dataset", tmp_path / "gd+pd", "gd+pd", **settings)


@pytest.mark.parametrize("row, said", [
    ({"question": ""}, "record 0, question: a non-empty text"), ({"kind": "bad"}, "record 0, kind: unsafe or harmless"), ({"image": "../x.png"}, "record 0, image: '../x.png' leads out"),
    ({"image": "none.png"}, "record 0, image: no image"), ({"safe_answer": ""}, "record 0, safe_answer: a non-empty text")])
def test_bad_rows_are_named_and_nothing_is_written(row, said, tmp_path):
    pictures(tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps(ROWS[0] | row))
    out = run("data", "convert", tmp_path / "t.jsonl", "--out", tmp_path / "dataset")
    assert out.returncode == 2 and said in out.stderr and len(out.stderr.splitlines()) == 1
    assert not (tmp_path / "dataset" / "all_train.json").exists()


def test_other_sources_and_columns(tmp_path):
    pictures(tmp_path)
    (tmp_path / "t.xlsx").write_text("")
    assert "a .csv, .jsonl" in run("data", "convert", tmp_path / "t.xlsx", "--out", tmp_path / "d").stderr
    assert "no such file" in run("data", "convert", tmp_path / "none.csv", "--out", tmp_path / "d").stderr
    (tmp_path / "t.jsonl").write_text(json.dumps({"file": "1.png", "q": "how ?", "a": "so"}))
    assert "--column x" in run("data", "convert", tmp_path / "t.jsonl", "--out", tmp_path / "d", "--column", "x=q").stderr
    assert run("data", "convert", tmp_path / "t.jsonl", "--out", tmp_path / "d", *(a for c in ("image=file", "question=q", "answer=a") for a in ("--column", c))).returncode == 0
    assert load_sets(tmp_path / "d").forget[0].answer == "so"


def test_answers_of_the_vanilla_model(tiny, tmp_path):
    from safeeraser.generate import answer_batch
    from safeeraser.data import Encoder
    from safeeraser.model import load_model
    pictures(tmp_path)
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({k: v for k, v in r.items() if "answer" not in k}) for r in ROWS))
    out = run("data", "make-answers", tmp_path / "t.jsonl", "--model", tiny.model, "--out", tmp_path / "dataset", "--max-new-tokens", "4")
    assert out.returncode == 0, out.stderr
    sets, (model, processor) = load_sets(tmp_path / "dataset"), load_model(tiny.model, "cpu")
    for item in sets: assert item.answer == answer_batch(model, Encoder(processor), [item], 4)[0]
    assert not list((tmp_path / "dataset").glob(".answers*"))


@pytest.fixture(scope="module")
def official_size(tmp_path_factory):
    "2,400 records and 3,000 small images; the world's own make 540, copied under new names."
    root = tmp_path_factory.mktemp("official")
    data = write_dataset(World(0), root / "dataset", {"train": 60, "val": 2})
    records = json.loads((data / "all_train.json").read_text())
    for k in range(2400 - 60):
        r = json.loads(json.dumps(records[k % 60]))
        source = Image.open(root / r["image_path"])
        source.putpixel((0, 0), (k % 256, k // 256, 7))
        r["image_path"] = str(Path(r["image_path"]).with_name(f"copy_{k}.png"))
        source.save(root / r["image_path"])
        if k % 4 == 0:
            safe = Path(r["SDImage_path"]).with_name(f"copy_{k}.png")
            shutil.copy(root / r["SDImage_path"], root / safe)
            r["SDImage_path"] = str(safe)
        records.append(r)
    (data / "all_train.json").write_text(json.dumps(records))
    return data


def test_an_official_size_folder_is_checked_in_under_a_minute(official_size):
    start = time.perf_counter()
    found = check_dataset(official_size, progress=False)
    assert time.perf_counter() - start < 60
    assert found["images"] >= 3000 and found["usable"]


MEMORY = """
import sys, resource
from safeeraser.trainer import unlearn
unlearn(sys.argv[1], sys.argv[2], sys.argv[3], "gd+pd", progress=False, max_steps=3, lora_r=4, use_cpu=True, save_strategy="no", num_train_epochs=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_training_s_memory_does_not_grow_with_the_folder(official_size, tiny, tmp_path):
    peak = lambda data: float(subprocess.run([sys.executable, "-c", MEMORY, str(tiny.model), str(data), str(tmp_path / data.parent.name)], capture_output=True, text=True, check=True).stdout.split()[-1])
    assert peak(official_size) < peak(tiny.data) + 60  # MiB: the texts of 2,400 records


def test_the_path_of_a_new_user(folder, tiny, tmp_path):
    "The five commands, on 60 records with the official quirks."
    data = write_dataset(World(1), tmp_path / "mine" / "dataset", {"train": 60, "val": 6})
    with_quirks(data)
    out = tmp_path / "run"
    fast = [a for s in ("max_steps=2", "lora_r=4", "use_cpu=true") for a in ("--set", s)]
    for command in (["data", "check", data], ["unlearn", "--model", tiny.model, "--data", data, "--method", "po+pd", "--out", out, *fast],
                    ["generate", "--model", tiny.model, "--adapter", out, "--data", data, "--out", out / "responses.jsonl", "--max-new-tokens", 4],
                    ["judge", out / "responses.jsonl", "--judge", "rule", "--out", out / "judged.jsonl"], ["report", out]):
        done = run(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert "PO+PD" in done.stdout and (out / "report.html").exists()
