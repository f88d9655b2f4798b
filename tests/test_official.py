"""The official layout with its quirks is read, faults are all named, and other tables come into the same form."""
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from safeeraser.core import SafeEraserError
from safeeraser.data import load_image, load_refusals, load_sets, Record, settings_of
from safeeraser.encoder import Encoder
from safeeraser.slots import Row
from safeeraser.check import check_dataset, look_at
from safeeraser.convert import Asked, convert, make_answers, read_table
from safeeraser.world import World, write_dataset

QUIET = dict(progress=False)


def run(*arguments):
    "The command, in this process."
    from safeeraser.cli import main
    out, err, argv, handler, code = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(signal.SIGINT), 0
    sys.argv = ["safeeraser", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err): main()
    except SystemExit as e: code = e.code or 0
    finally: sys.argv = argv; signal.signal(signal.SIGINT, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), said=[line for line in err.getvalue().splitlines() if line.startswith("safeeraser: ")])


@pytest.fixture
def folder(tmp_path):
    return write_dataset(World(0), tmp_path / "dataset", {"train": 6, "val": 3})


def records_of(folder, split="train"): return json.loads((folder / f"all_{split}.json").read_text())


def edit(folder, change, split="train"):
    records = records_of(folder, split)
    change(records)
    (folder / f"all_{split}.json").write_text(json.dumps(records))


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


# The official folder

def test_counts_are_those_of_the_records(folder):
    found = check_dataset(folder, **QUIET)
    assert found["usable"] and found["problems"] == [] and found["images"] == 18
    categories = [Path(r["image_path"]).parent.name for r in records_of(folder)]
    assert found["splits"]["train"]["records"] == Counter(categories)
    for name in ("forget", "retain", "decouple"): assert found["splits"]["train"][name] == {c: 4 * n for c, n in Counter(categories).items()}


def test_quirks_are_told_not_refused(folder):
    plain = {(i.set, i.question, i.answer) for i in load_sets(folder)}
    with_quirks(folder)
    found = check_dataset(folder, **QUIET)
    assert found["usable"]
    text = "\n".join(found["quirks"])
    for said in ("all_train.json is JSON lines", "HateSpeech is also spelt Hatespeech", "3 image paths have sub-folders", "2 records have fewer than 4 harmless pairs"): assert said in text
    read = {(i.set, i.question, i.answer) for i in load_sets(folder)}
    assert read < plain and {r[0] for r in plain - read} == {"retain"}


def test_copies_with_other_names_and_paths_below_the_folder_itself(folder):
    "As the data set also circulates: `image_id`, `Answer`, and paths that begin at the dataset folder."
    plain = list(load_sets(folder))
    def change(records):
        for r in records:
            r["image_id"], r["SDImage_path"] = r.pop("image_path").removeprefix("dataset/"), r["SDImage_path"].removeprefix("dataset/")
            for key in r:
                if key.startswith("Unharm"): r[key] = {"Question": r[key]["Question"], "Answer": r[key]["Prediction"]}
    edit(folder, change)
    assert list(load_sets(folder)) == plain
    assert check_dataset(folder, **QUIET)["usable"]


@pytest.mark.parametrize("path, category", [("dataset/img/Hatespeech/3.jpg", "HateSpeech"), ("dataset/img/Sex/more/3.jpg", "Sex"), ("mine/img/other/3.jpg", "other"), ("3.jpg", "")])
def test_category_in_the_paper_s_spelling(path, category): assert Record(path, None, ()).category == category


def image_of(folder, k=0): return folder.parent / records_of(folder)[k]["image_path"]


FAULTS = [
    (lambda f: edit(f, lambda r: r[2].pop("unsafe_pairs")), "record 2, unsafe_pairs: a non-empty list"),
    (lambda f: edit(f, lambda r: r[1]["unsafe_pairs"][1].update(model_response=7)), "record 1, unsafe_pairs[1].model_response"),
    (lambda f: edit(f, lambda r: r[1]["unsafe_pairs"][0].update(question=" ")), "record 1, unsafe_pairs[0].question: a non-empty text"),
    (lambda f: edit(f, lambda r: r.insert(1, 3)), "record 1, record: an object belongs here"),
    (lambda f: edit(f, lambda r: r.clear()), "holds no record"),
    (lambda f: edit(f, lambda r: r[1].pop("SDImage_path")), "record 1, SDImage_path"),
    (lambda f: edit(f, lambda r: r[0].update(image_path="/etc/passwd")), "record 0, image_path: '/etc/passwd' leads out of the data root"),
    (lambda f: edit(f, lambda r: r[0].update(image_path="../../etc/passwd")), "'../../etc/passwd' leads out of the data root"),
    (lambda f: (image_of(f).unlink(), image_of(f).symlink_to("/etc/passwd")), "leads out of the data root"),
    (lambda f: edit(f, lambda r: r[0].update(image_path="dataset/img/none.png")), "no image at 'dataset/img/none.png'"),
    (lambda f: image_of(f).write_bytes(b""), "not a readable image"),
    (lambda f: image_of(f).write_text("hello"), "not a readable image"),
    (lambda f: image_of(f).write_bytes(image_of(f).read_bytes()[:150]), "not a readable image"),
    (lambda f: (f / "prompt.json").write_text('{"idk": []}'), "idk: a non-empty list belongs here"),
    (lambda f: (f / "settings.json").write_text("[3]"), "settings.json: an object belongs here"),
]


@pytest.mark.parametrize("harm, said", FAULTS, ids=[said for _, said in FAULTS])
def test_each_fault_is_named_as_the_loader_names_it_and_the_rest_still_counted(harm, said, folder):
    def load():
        settings_of(folder), load_refusals(folder)
        for i in load_sets(folder): load_image(i.image)
    load()
    harm(folder)
    found = check_dataset(folder, **QUIET)
    assert not found["usable"] and len(found["problems"]) == 1 and said in found["problems"][0]
    assert sum(found["splits"]["val"]["records"].values()) == 3
    with pytest.raises(SafeEraserError): load()
    out = run("data", "check", folder)
    assert out.code == 2 and len(out.said) == 1 and said in out.said[0] and "val       all" in out.out


@pytest.mark.parametrize("path, said", [("none", "no all_train.json there"), ("dataset/all_train.json", "no all_train.json there"), ("bad", "line 1: neither a JSON list nor JSON lines")])
def test_what_is_no_data_set(path, said, folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "all_train.json").write_text("no json")
    out = run("data", "check", tmp_path / path)
    assert out.code == 2 and len(out.said) == 1 and said in out.said[0]


def test_the_report_as_json_whether_usable_or_not(folder):
    assert json.loads(run("data", "check", folder, "--json").out)["usable"] is True
    image_of(folder).write_bytes(b"")
    out = run("data", "check", folder, "--json")
    assert out.code == 2 and json.loads(out.out)["usable"] is False


def test_overlap_and_doubles_go_by_content(folder):
    val = folder.parent / records_of(folder, "val")[0]["image_path"]
    Image.open(image_of(folder)).save(val.with_suffix(".bmp"))  # another file, the same picture
    edit(folder, lambda r: r[0].update(image_path=val.with_suffix(".bmp").relative_to(folder.parent).as_posix()), "val")
    edit(folder, lambda r: r[1].update(SDImage_path=r[0]["image_path"]))
    edit(folder, lambda r: r.append(r[2]))
    found = check_dataset(folder, **QUIET)
    assert [b for _, b in found["overlap_with_train"]["val"]] == [val.with_suffix(".bmp").relative_to(folder.parent).as_posix()]
    assert found["both_ways"] == [(records_of(folder, "val")[0]["image_path"], records_of(folder)[0]["image_path"])]
    assert len(found["same_pictures"]) == 1 and found["repeated_questions"]["train"] == 8


def test_rows_too_long_for_a_model_are_counted_as_training_counts(folder, tiny):
    from transformers import AutoProcessor
    edit(folder, lambda r: r[3]["unsafe_pairs"][2].update(model_response="red " * 200))
    edit(folder, lambda r: r[4]["UnharmPair_text1"].update(Question="what is <image> ?"))
    out = run("data", "check", folder, "--model", tiny.model)
    n = len(Encoder(AutoProcessor.from_pretrained(tiny.model)).rows([Row("forget", load_sets(folder).forget[14], "red " * 199 + "red")])["input_ids"][0])
    assert out.code == 2 and "rows that the model cannot take: 2" in out.out
    assert f"record 3, unsafe_pairs[2].model_response: {n} tokens with question and image, more than 128" in out.out and "record 4, UnharmPair_text1: " in out.out
    assert "red red red" not in out.out  # where it stands, not what it says
    assert run("data", "check", folder).code == 0
    assert "no processor" in run("data", "check", folder, "--model", folder).said[0]


# Images

def test_a_bomb_is_not_opened(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert "exceeds limit" in look_at(tmp_path / "big.png").problem


@pytest.mark.filterwarnings("ignore")
def test_however_an_image_is_broken_it_is_one_sentence(tmp_path):
    noise, rng = Image.effect_noise((40, 30), 80).convert("RGB"), random.Random(0)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "PPM", "WEBP"):
        whole = io.BytesIO()
        noise.save(whole, form)
        for k in range(60):
            broken = bytearray(whole.getvalue())
            for _ in range(rng.randint(1, 8)): broken[rng.randrange(min(200, len(broken)))] = rng.randrange(256)
            (tmp_path / "x").write_bytes(broken[:rng.randrange(len(broken))] if k % 4 == 0 else broken)
            try: load_image(tmp_path / "x")
            except SafeEraserError as e: assert "x: not a readable image" in str(e)
            assert look_at(tmp_path / "x").digest or look_at(tmp_path / "x").problem


def test_two_pictures_of_one_name_stay_two_from_record_to_pixels(tiny, tmp_path):
    from transformers import AutoProcessor
    def record(k): return {"image_path": f"dataset/img/{('Weapon', 'Privacy')[k]}/1.png", "unsafe_pairs": [{"question": "how is this moved ?", "model_response": "slowly"}]}
    for k, colour in enumerate(("red", "blue")):
        (tmp_path / record(k)["image_path"]).parent.mkdir(parents=True)
        Image.new("RGB", (48, 48), colour).save(tmp_path / record(k)["image_path"])
    (tmp_path / "dataset" / "all_train.json").write_text(json.dumps([record(0), record(1)]))
    pixels = Encoder(AutoProcessor.from_pretrained(tiny.model)).prompts(load_sets(tmp_path / "dataset").forget)["pixel_values"]
    assert pixels[0, 0].mean() > pixels[1, 0].mean() and pixels[0, 2].mean() < pixels[1, 2].mean()


# Other data

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


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("1.png", "red"), ("2.png", "green")): Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


def write_csv(file, rows):
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet", "saved", "saved splits", "parquet folder", "image folder"])
def test_every_form_of_table(form, pictures):
    source = pictures / f"table.{form}"
    if form == "csv": write_csv(source, ROWS)
    if form == "jsonl": source.write_text("\n".join(map(json.dumps, ROWS)))
    if form == "json": source.write_text(json.dumps(ROWS))
    if form == "image folder":
        source.mkdir()
        for name in ("1.png", "2.png"): shutil.copy(pictures / name, source)
        write_csv(source / "metadata.csv", [{"file_name" if k == "image" else k: v for k, v in r.items()} for r in ROWS])
    if form in ("parquet", "saved", "saved splits", "parquet folder"):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({k: datasets.Image() if "image" in k else datasets.Value("string") for k in ROWS[0]})
        full = [{k: ({"bytes": (pictures / v).read_bytes(), "path": v} if "image" in k else v) if v else None for k, v in r.items()} for r in ROWS]
        table = datasets.Dataset.from_list(full, features=features)
        if form == "parquet": table.to_parquet(source)
        if form == "saved": table.save_to_disk(source)
        if form == "saved splits": datasets.DatasetDict({"train": table}).save_to_disk(source)
        if form == "parquet folder": table.to_parquet(source / "data" / "train-00000-of-00001.parquet")
    convert(read_table(source), pictures / "out" / "dataset")
    sets = load_sets(pictures / "out" / "dataset")
    assert [(i.set, i.question, i.answer) for i in sets] == MADE
    assert [load_image(i.image).getpixel((0, 0)) for i in sets] == [(255, 0, 0), (255, 0, 0), (0, 128, 0)]
    assert [p.name for p in (pictures / "out").iterdir()] == ["dataset"]


def test_the_layout_of_open_mmunlearning(pictures):
    "A row an image; `metadata` is JSON text; the same image again among the harmless ones, which stand in a file of their own."
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    def save(name, image, pairs):
        metadata = json.dumps([{"ID": f"forget:0:{k}", "Question": q, "Answer": a} for k, (q, a) in enumerate(pairs)])
        rows = [{"image": {"bytes": (pictures / image).read_bytes(), "path": None}, "ID": "forget:0", "metadata": metadata, "source_split": "forget", "qa_count": len(pairs)}]
        (pictures / name).mkdir()
        parquet.write_table(pa.Table.from_pylist(rows), pictures / name / "train-00000-of-00001.parquet")
    save("forget", "1.png", [("how ?", "so"), ("why ?", "because")])
    save("retain", "1.png", [(f"what {k} ?", f"this {k}") for k in range(6)])
    out = run("data", "convert", pictures / "forget", "--harmless", pictures / "retain", "--out", pictures / "dataset")
    assert out.code == 0, out.said
    sets, records = load_sets(pictures / "dataset"), records_of(pictures / "dataset")
    assert [(i.question, i.answer) for i in sets.forget] == [("how ?", "so"), ("why ?", "because")] and sets.decouple == []
    assert [(i.question, i.answer) for i in sets.retain] == [(f"what {k} ?", f"this {k}") for k in range(6)]
    assert len({r["image_path"] for r in records}) == 1 and "UnharmPair_text1" in records[0]
    assert "no prompt-decouple set" in run("data", "check", pictures / "dataset").out


def test_several_safe_partners_and_categories(pictures):
    Image.new("RGB", (8, 8), "blue").save(pictures / "3.png")
    rows = [{"image": "1.png", "question": f"how {k} ?", "answer": f"so {k}", "category": "hatespeech", "safe_image": f"{2 + k}.png", "safe_answer": f"well {k}"} for k in (0, 1)]
    convert(read_table(write_csv(pictures / "t.csv", rows)), pictures / "dataset")
    sets = load_sets(pictures / "dataset")
    assert {i.category for i in sets} == {"HateSpeech"} and len(records_of(pictures / "dataset")) == 2
    assert [(f.answer, d.answer, load_image(d.image).getpixel((0, 0))) for f, d in zip(sets.forget, sets.decouple)] == [("so 0", "well 0", (0, 128, 0)), ("so 1", "well 1", (0, 0, 255))]


def test_a_second_split_joins_the_first(pictures):
    for split in ("train", "val"): assert run("data", "convert", write_csv(pictures / "t.csv", ROWS), "--out", pictures / "dataset", "--split", split).code == 0
    assert [(i.set, i.question, i.answer) for i in load_sets(pictures / "dataset", "val")] == MADE
    assert "is there already" in run("data", "convert", pictures / "t.csv", "--out", pictures / "dataset").said[0]
    assert len(check_dataset(pictures / "dataset", **QUIET)["overlap_with_train"]["val"]) == 2


@pytest.mark.parametrize("row, said", [
    ({"question": ""}, "record 1, question: a non-empty text"), ({"question": 3}, "record 1, question: a non-empty text belongs here, found 3"), ({"answer": None}, "record 1, answer: a non-empty text"),
    ({"kind": "bad"}, "record 1, kind: unsafe or harmless"), ({"image": "../x.png"}, "record 1, image: '../x.png' leads out"), ({"image": "/etc/passwd"}, "leads out"),
    ({"image": "none.png"}, "record 1, image: no image"), ({"image": "t.jsonl"}, "record 1, image: not a readable image"), ({"safe_answer": ""}, "record 1, safe_answer: a non-empty text"), ({"safe_image": ""}, "record 1, safe_image: missing, though other"),
    ({"image": {"bytes": None, "path": None}}, "record 1, image: a non-empty text")])
def test_bad_rows_are_named_and_nothing_is_written(row, said, pictures):
    (pictures / "t.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[0] | row))
    out = run("data", "convert", pictures / "t.jsonl", "--out", pictures / "dataset")
    assert out.code == 2 and len(out.said) == 1 and said in out.said[0]
    assert sorted(p.name for p in pictures.iterdir()) == ["1.png", "2.png", "t.jsonl"]


@pytest.mark.parametrize("name, content, said", [
    ("t.xlsx", b"", "a .csv, .jsonl"), ("t.csv", "image,question\n1.png,größer ?".encode("latin-1"), "t.csv: cannot be read"), ("t.csv", b'image,question\n"1.png,how', "t.csv: cannot be read"),
    ("t.csv", b"", "holds no question"), ("t.json", b"[]", "holds no question"), ("t.json", b"[3]", "record 0, row: an object"), ("t.jsonl", b'{"image":', "line 1: neither a JSON list"),
    ("t.csv", b"file,q,answer\n1.png,how ?,so", "no such column among file, q, answer; --column image=THEIRS"), ("t.parquet", b"PAR1", "t.parquet: cannot be read"),
    ("t.json", json.dumps([{"image": "1.png", "metadata": "[3"}]).encode(), "metadata: a list of Question and Answer"),
    ("t.json", json.dumps([{"image": "1.png", "metadata": [{"Answer": "so"}]}]).encode(), "question: a non-empty text"), ("t/x", b"", "neither saved by `datasets`"), ("t/state.json", b"{}", "t: cannot be read")])
def test_bad_tables(name, content, said, pictures):
    (pictures / name).parent.mkdir(exist_ok=True)
    (pictures / name).write_bytes(content)
    out = run("data", "convert", pictures / name.split("/")[0], "--out", pictures / "dataset")
    assert out.code == 2 and len(out.said) == 1 and said in out.said[0]
    assert not list(pictures.glob("*dataset*"))


def test_other_columns_and_places(pictures):
    (pictures / "t.jsonl").write_text(json.dumps({"file": "1.png", "q": "how ?", "a": "so"}))
    assert "no such file" in run("data", "convert", pictures / "none.csv", "--out", pictures / "d").said[0]
    assert "--column x" in run("data", "convert", pictures / "t.jsonl", "--out", pictures / "d", "--column", "x=q").said[0]
    columns = [a for c in ("image=file", "question=q", "answer=a") for a in ("--column", c)]
    for out, said in ((pictures / "1.png", "is a file"), (pictures / "1.png" / "d", "cannot be written")):
        done = run("data", "convert", pictures / "t.jsonl", "--out", out, *columns)
        assert done.code == 2 and said in done.said[0]
    assert run("data", "convert", pictures / "t.jsonl", "--out", pictures / "d", *columns).code == 0
    assert load_sets(pictures / "d").forget[0].answer == "so"


def test_a_full_disk_leaves_nothing(pictures):
    Image.effect_noise((300, 300), 90).save(pictures / "1.png")
    write_csv(pictures / "t.csv", ROWS)
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from safeeraser.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "data", "convert", pictures / "t.csv", "--out", pictures / "dataset"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "too large" in done.stderr
    assert sorted(p.name for p in pictures.iterdir()) == ["1.png", "2.png", "t.csv"]


MEMORY = """
import re, sys
from pathlib import Path
def memory(what): return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # MiB; ru_maxrss would begin at the parent's
"""
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")


def measured(code, *arguments):
    "What a new process prints last: MiB."
    done = subprocess.run([sys.executable, "-c", MEMORY + code, *map(str, arguments)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


CONVERT = """
from safeeraser.convert import convert, read_table
import pyarrow.parquet
most = [memory("RssAnon")]
def watched(rows):
    for r in rows:
        most.append(memory("RssAnon"))
        yield r
convert(watched(read_table(sys.argv[1])), sys.argv[2])
print(max(most) - most[0])
"""


@on_linux
def test_images_only_pass_through_memory(tmp_path):
    "300 images of 1 MB in a single page of a parquet file."
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    def image(k):
        file, picture = io.BytesIO(), Image.new("RGB", (600, 600))
        picture.putpixel((0, 0), (k % 256, k // 256, 9))
        picture.save(file, "BMP")
        return file.getvalue()
    table = pa.Table.from_pylist([{"image": {"bytes": image(k), "path": None}, "metadata": json.dumps([{"Question": "how ?", "Answer": "so"}])} for k in range(300)])
    parquet.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    assert (tmp_path / "t.parquet").stat().st_size > 300e6
    del table
    assert measured(CONVERT, tmp_path / "t.parquet", tmp_path / "dataset") < 160


# Answers of the vanilla model

ASK = dict(max_new_tokens=4, device="cpu", progress=False)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_answers_of_the_vanilla_model(form, tiny, pictures):
    from safeeraser.generate import answer_batch
    from safeeraser.model import load_model
    source = pictures / f"t.{form}"
    if form == "jsonl": source.write_text("\n".join(json.dumps({k: v for k, v in r.items() if "answer" not in k}) for r in ROWS))
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist([{k: {"bytes": (pictures / v).read_bytes()} if "image" in k and v else v or None for k, v in r.items() if "answer" not in k} for r in ROWS]), source)
    out = run("data", "make-answers", source, "--model", tiny.model, "--out", pictures / "dataset", "--max-new-tokens", "4")
    assert out.code == 0, out.said
    sets, (model, processor) = load_sets(pictures / "dataset"), load_model(tiny.model, "cpu")
    assert [(i.set, i.question) for i in sets] == [(s, q) for s, q, _ in MADE]
    for item in sets: assert item.answer == answer_batch(model, Encoder(processor), [item], 4)[0]
    assert not list(pictures.glob(".*"))


def test_the_same_answers_again(tiny, pictures, monkeypatch):
    "Finished is finished, as long as nothing it was made from, and nothing it made, has changed."
    out = pictures / "dataset"
    again = lambda **more: make_answers(tiny.model, many(pictures), out, **ASK | more)
    first, files = again(), {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr("safeeraser.generate.generate", None)  # nothing is asked again
    assert again() == first and {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files
    for call in (lambda: again(max_new_tokens=3), lambda: make_answers(tiny.model, many(pictures, 5), out, **ASK), lambda: convert(many(pictures), out)):
        with pytest.raises(SafeEraserError, match="is there already"): call()
    image = next(out.rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(SafeEraserError, match="is there already"): again()
    assert not list(pictures.glob(".*"))


def test_two_answers_to_one_question(tiny, pictures):
    "About one picture in one set; elsewhere they are no contradiction."
    ask = lambda n, answer, kind="harmless": Asked(pictures / f"{n}.png", "what ?", answer, kind)
    convert([ask(1, "a cup"), ask(1, "a hat"), ask(2, "a cup"), ask(1, "a sign", "unsafe")], pictures / "dataset")
    found = check_dataset(pictures / "dataset", progress=False)
    assert len(found["two_answers"]) == 1 and found["usable"]
    assert re.fullmatch(r"retain of train, dataset/img/other/.*: 'what \?' has 2 answers, 'a cup' and 'a hat'", found["two_answers"][0])
    done = run("data", "check", pictures / "dataset")
    assert done.code == 0


def many(pictures, n=6): return [Asked(pictures / f"{1 + k % 2}.png", f"what {k} ?", kind="harmless" if k % 3 == 0 else "unsafe") for k in range(n)]


def test_an_interrupted_run_goes_on_unless_an_image_was_replaced(tiny, pictures, monkeypatch):
    from safeeraser.generate import LocalModel
    asked, ask = [], LocalModel.ask
    def once(self, batch):
        if asked: raise KeyboardInterrupt
        asked.extend(batch)
        return ask(self, batch)
    undisturbed = pictures / "undisturbed" / "dataset"
    make_answers(tiny.model, many(pictures), undisturbed, batch_size=2, **ASK)
    monkeypatch.setattr(LocalModel, "ask", once)
    with pytest.raises(KeyboardInterrupt): make_answers(tiny.model, many(pictures), pictures / "dataset", batch_size=2, **ASK)
    assert not (pictures / "dataset").exists()
    monkeypatch.setattr(LocalModel, "ask", lambda self, batch: asked.extend(batch) or ask(self, batch))
    kept = (pictures / "1.png").read_bytes()
    Image.new("RGB", (8, 8), "blue").save(pictures / "1.png")
    with pytest.raises(SafeEraserError, match="begun with other"): make_answers(tiny.model, many(pictures), pictures / "dataset", batch_size=2, **ASK)
    (pictures / "1.png").write_bytes(kept)
    make_answers(tiny.model, many(pictures), pictures / "dataset", batch_size=2, **ASK)
    assert len(asked) == 6 and sorted(p.name for p in pictures.iterdir()) == ["1.png", "2.png", "dataset", "undisturbed"]
    assert (pictures / "dataset" / "all_train.json").read_text() == (undisturbed / "all_train.json").read_text()


def test_empty_answers_are_left_out_and_counted(tiny, pictures, monkeypatch):
    from safeeraser.generate import LocalModel
    monkeypatch.setattr(LocalModel, "ask", lambda self, batch: [{"response": "" if r.item.question in ("what 0 ?", "what 1 ?", "what 5 ?") else "so"} for r in batch])
    assert make_answers(tiny.model, many(pictures), pictures / "dataset", **ASK) == (2, 3)
    assert {(i.set, i.question) for i in load_sets(pictures / "dataset")} == {("forget", "what 2 ?"), ("retain", "what 3 ?"), ("forget", "what 4 ?")}


def test_bad_models_and_settings_leave_nothing(tiny, pictures):
    write_csv(pictures / "t.csv", ROWS)
    (pictures / "empty").mkdir()
    for more, said in ((["--model", pictures / "empty"], "no config.json there"), (["--model", tiny.model, "--out", pictures / "1.png"], "is a file")):
        done = run("data", "make-answers", pictures / "t.csv", "--out", pictures / "dataset", *more)
        assert done.code == 2 and len(done.said) == 1 and said in done.said[0]
    assert sorted(p.name for p in pictures.iterdir()) == ["1.png", "2.png", "empty", "t.csv"]


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


def test_a_run_does_not_go_on_with_an_image_that_was_replaced(tiny, tmp_path):
    from safeeraser.trainer import unlearn
    shutil.copytree(tiny.data.parent, tmp_path / "w")
    data = tmp_path / "w" / "dataset"
    again = lambda: unlearn(tiny.model, data, tmp_path / "run", "ga", progress=False, max_steps=1, lora_r=4, use_cpu=True, save_strategy="no")
    first, image = again(), image_of(data)
    kept = image.read_bytes()
    Image.new("RGB", (48, 48), "blue").save(image)
    with pytest.raises(SafeEraserError, match="begun with other records or images"): again()
    image.write_bytes(kept)
    assert again() == json.loads(json.dumps(first))


# The official size

@pytest.fixture(scope="module")
def official_size(tmp_path_factory):
    "2,400 records and 3,000 pictures of 256 x 256: small files, 590 MB were they all decoded at once. Beside it `lean`, the same with a question of each set, and `few`, 100 of these."
    root = tmp_path_factory.mktemp("official")
    data = write_dataset(World(0), root / "dataset", {"train": 60})
    made = records_of(data)
    def picture(old, folder, k):
        image = Image.open(root / old).resize((256, 256))
        image.paste((k % 256, k // 256 * 20, 7), (0, 0, 16, 16))
        path = f"{folder}/{k}.jpg"
        image.save(root / path, quality=60)
        return path
    folders = {c: Path("dataset/img", c) for c in {Path(r["image_path"]).parent.name for r in made}}
    (data / "pdset/image/Sex/train/more").mkdir(parents=True)
    safe = [picture(made[k % 60]["SDImage_path"], "dataset/pdset/image/Sex/train/more", k) for k in range(600)]
    records = [r | {"image_path": picture(r["image_path"], folders[Path(r["image_path"]).parent.name].as_posix(), k), "SDImage_path": safe[k % 600]}
               for k, r in ((k, made[k % 60]) for k in range(2400))]
    (data / "all_train.json").write_text(json.dumps(records))
    lean = [{k: v[:1] if k == "unsafe_pairs" else v for k, v in r.items() if k not in ("UnharmPair_text2", "UnharmPair_image1", "UnharmPair_image2")} for r in records]
    for name, size in (("lean", 2400), ("few", 100)):
        (root / name).mkdir()
        (root / name / "all_train.json").write_text(json.dumps(lean[:size]))
        shutil.copy(data / "prompt.json", root / name)
    return data


def test_an_official_size_folder_is_checked_in_under_a_minute(official_size):
    start = time.perf_counter()
    found = check_dataset(official_size, **QUIET)
    assert time.perf_counter() - start < 60
    assert found["images"] == 3000 and found["usable"] and found["same_pictures"] == []
    assert sum(found["splits"]["train"]["forget"].values()) == 9600


TRAIN = """
import safeeraser.encoder
from safeeraser.trainer import unlearn
safeeraser.encoder.PICTURE_BYTES = 0
unlearn(sys.argv[1], sys.argv[2], sys.argv[3], "gd+pd", progress=False, num_train_epochs=1, lora_r=4, use_cpu=True, save_strategy="no",
        per_device_train_batch_size=20, gradient_accumulation_steps=1, vision_cache_gib=0)
print(memory("VmHWM"))
"""


@on_linux
@pytest.mark.slow
def test_training_s_memory_does_not_grow_with_the_folder(official_size, tiny, tmp_path):
    "An epoch that sees each image, none of it kept on purpose."
    few, lean = (measured(TRAIN, tiny.model, official_size.parent / name, tmp_path / name) for name in ("few", "lean"))
    assert lean < few + 60  # texts; 590 were the images all in memory


# A new user

def test_the_path_of_a_new_user(tiny, tmp_path, monkeypatch):
    "The five commands of the README, word for word but for the model, on 60 records with the official quirks."
    data = write_dataset(World(1), tmp_path / "dataset", {"train": 60, "val": 6})
    with_quirks(data)
    (data / "settings.json").write_text(json.dumps({"unlearn": {"default": {"max_steps": 2, "lora_r": 4, "use_cpu": True}}, "generate": {"max_new_tokens": 4}}))
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(b for b in re.findall(r"```bash\n(.*?)```", readme, re.S) if b.startswith("safeeraser data check"))
    commands = [line.replace("llava-hf/llava-1.5-7b-hf", str(tiny.model)).split()[1:] for line in block.splitlines()]
    assert [c[0] for c in commands] == ["data", "unlearn", "generate", "judge", "report"]
    monkeypatch.chdir(tmp_path)
    for command in commands:
        done = run(*command)
        assert done.code == 0, (command, done.out, done.said)
        if command[0] == "data": assert all(said in done.out for said in ("JSON lines", "Hatespeech", "sub-folders", "is usable"))
    assert "PO+PD" in done.out and (tmp_path / "runs" / "po+pd" / "report.html").exists()
    assert len((tmp_path / "runs" / "po+pd" / "judged.jsonl").read_text().splitlines()) == 4 * 60 + 3 * 4 * 6


# What training would refuse, the check refuses

def test_without_refusals_the_methods_that_need_none_run(folder, tiny, tmp_path):
    from safeeraser.trainer import unlearn
    (folder / "prompt.json").unlink()
    (folder / "settings.json").unlink()
    out = run("data", "check", folder, "--model", tiny.model)
    assert out.code == 0 and "is usable, for methods without refusals (there is no prompt.json)" in out.out
    assert unlearn(tiny.model, folder, tmp_path / "gd", "gd+pd", seed=0, progress=False, max_steps=1, per_device_train_batch_size=2)["steps"] == 1
    with pytest.raises(SafeEraserError, match="prompt.json: no such file; it holds the refusals that this method teaches"): unlearn(tiny.model, folder, tmp_path / "po", "po+pd", progress=False)
    assert not (tmp_path / "po").exists()


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>"])
def test_a_token_in_a_refusal_is_found_by_the_check(token, folder, tiny):
    (folder / "prompt.json").write_text(json.dumps({"idk": ["sorry no .", f"sorry {token} no ."]}))
    out = run("data", "check", folder, "--model", tiny.model)
    assert out.code == 2 and len(out.said) == 1 and "prompt.json, idk[1]: " in out.said[0] and token in out.said[0]


def family(name, folder):
    "A family's folder as a hub has it, without weights."
    from test_processors import saved
    return saved(name, folder)


@pytest.mark.parametrize("size", [(2000, 8), (8, 3000)])
def test_an_image_that_the_model_s_processor_cannot_take_is_named(size, folder, tmp_path):
    family("qwen2_vl", tmp_path / "model")
    Image.new("RGB", size, "red").save(image_of(folder, 2))
    out = run("data", "check", folder, "--model", tmp_path / "model")
    name = records_of(folder)[2]["image_path"]
    assert out.code == 2 and len(out.said) == 1 and "record 2, " in out.said[0] and name in out.said[0] and f"{size[0]} x {size[1]}" in out.said[0]


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "smolvlm", "llava_onevision"])
def test_processors_that_would_want_videos_are_checked_without(name, folder, tmp_path):
    family(name, tmp_path / "model")
    assert run("data", "check", folder, "--model", tmp_path / "model").code == 0


@pytest.mark.parametrize("token", ["<boi>", "<image>", "</s>", "<video>"])
def test_signals_of_any_kind_in_a_text_are_named(token, folder, tmp_path):
    family("gemma3", tmp_path / "model")
    edit(folder, lambda r: r[1]["unsafe_pairs"][0].update(question=f"what {token} is it ?"))
    edit(folder, lambda r: r[2]["UnharmPair_text1"].update(Prediction=f"it {token} is"))
    out = run("data", "check", folder, "--model", tmp_path / "model")
    for where in ("record 1, unsafe_pairs[0].model_response", "record 1, unsafe_pairs[0].sd_response", "record 2, UnharmPair_text1"): assert where in out.out
    assert out.code == 2 and "rows that the model cannot take: 3" in out.out and token in out.said[0]


# Tables and names that are none

@pytest.mark.parametrize("split", ["", "a/b", "../x", ".", "..", ".x", "a\0b", "a b", "-x"])
def test_splits_that_are_no_names(split, pictures, tiny):
    before = sorted(pictures.rglob("*"))
    rows = [Asked(pictures / "1.png", "q", "a")]
    for call in (lambda: convert(rows, pictures / "dataset", split), lambda: make_answers(tiny.model, rows, pictures / "dataset", split)):
        with pytest.raises(SafeEraserError, match="--split"): call()
    assert sorted(pictures.rglob("*")) == before


@pytest.mark.parametrize("name, content, said", [
    ("t.csv", "image,question,answer\n1.png,a,b,c\n", "record 0: 1 more cells"), ("t.json", '[{"image": "\\u0000", "question": "q", "answer": "a"}]', "record 0, image: "),
    ("t.json", '[{"image": "\\ud800", "question": "q", "answer": "a"}]', "image: half of a surrogate pair"), ("t.jsonl", '{"image": "1.png", "question": "\\udfff", "answer": "a"}\n{}', "line 1, question: half"),
    ("t.json", "[" * 10**5, "not JSON"), ("t.json", '[{"image": "1.png", "metadata": "' + "[" * 10**4 + '"}]', "metadata"), ("t.json", '[{"image": [1], "question": "q", "answer": "a"}]', "record 0, image"),
    ("t.json", '[{"image": {"bytes": 5}, "question": "q", "answer": "a"}]', "record 0, image"), ("t.json", '[{"image": "1.png", "question": ["q"], "answer": "a"}]', "record 0, question"),
    ("t.json", '[{"image": "1.png", "question": "q", "answer": "a", "kind": ["unsafe"]}]', "record 0, kind"), ("t.json", '[{"image": "1.png", "question": "q", "answer": "a", "category": 5}]', "record 0, category"),
    ("t.csv", "image,question,answer\n1.png,\x00,b\n", ""), ("t.parquet", "PAR1", "cannot be read")])
def test_tables_of_another_form(name, content, said, pictures):
    (pictures / name).write_text(content)
    out = run("data", "convert", pictures / name, "--out", pictures / "dataset")
    if said: assert out.code == 2 and len(out.said) == 1 and name in out.said[0] and said in out.said[0] and not (pictures / "dataset").exists()


def test_lines_of_tables_end_at_newlines_only(pictures):
    (pictures / "t.jsonl").write_text("\ufeff" + json.dumps({"image": "1.png", "question": "a\u2028b", "answer": "c\x85d"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [(r.question, r.answer) for r in read_table(pictures / "t.jsonl")] == [("a\u2028b", "c\x85d")]


@pytest.mark.parametrize("settings, said", [({"learning_rat": 1}, "learning_rat"), ({"lora_r": "x"}, "lora_r"), ({"threads": 0}, "threads")])
def test_recommended_settings_that_training_would_refuse(settings, said, folder, tiny, tmp_path):
    from safeeraser.trainer import unlearn
    (folder / "settings.json").write_text(json.dumps({"unlearn": {"default": settings}}))
    out = run("data", "check", folder)
    assert out.code == 2 and "settings.json, unlearn.default: " in out.said[0] and said in out.said[0]
    with pytest.raises(SafeEraserError, match=f"settings.json, unlearn.default: .*{said}"): unlearn(tiny.model, folder, tmp_path / "run", "ga", progress=False)
