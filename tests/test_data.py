"""Bad data gets one sentence that names file, record and field."""
import json

import pytest
from PIL import Image

from safeeraser.core import SafeEraserError, Place
from safeeraser.data import load_image, load_records, load_refusals, load_sets, parse_record, to_json

GOOD = {"image_path": "dataset/img/Weapon/1.png", "SDImage_path": "dataset/pdset/image/Weapon/train/1.png",
        "unsafe_pairs": [{"question": "q", "model_response": "a", "sd_response": "s"}],
        "UnharmPair_text1": {"Question": "q", "Prediction": "p"}}


@pytest.fixture
def folder(tmp_path):
    for key in ("image_path", "SDImage_path"):
        path = tmp_path / GOOD[key]
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)

    def write(records, name="all_train.json"):
        (tmp_path / "dataset" / name).write_text(records if isinstance(records, str) else json.dumps(records))
        return tmp_path / "dataset"
    return write


def test_list_lines_and_missing_pairs_are_fine(folder):
    assert load_records(folder([GOOD])) == load_records(folder(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD)))[:1]
    assert load_sets(folder([{k: v for k, v in GOOD.items() if "Unharm" not in k}])).retain == []
    assert load_sets(folder([GOOD | {"UnharmPair_text2": {}, "UnharmPair_image1": None}])).retain[0].answer == "p"


def test_round_trip():
    assert to_json(parse_record(GOOD, Place("x"))) == GOOD


@pytest.mark.parametrize("change, problem", [
    ({"unsafe_pairs": None}, "record 1, unsafe_pairs: a non-empty list"),
    ({"unsafe_pairs": [], "UnharmPair_text1": {}}, "record 1, unsafe_pairs: a non-empty list"),
    ({"unsafe_pairs": ["q"]}, r"record 1, unsafe_pairs\[0\]: an object"),
    ({"unsafe_pairs": [{"question": " ", "model_response": "a", "sd_response": "s"}]}, r"record 1, unsafe_pairs\[0\].question: a non-empty text"),
    ({"unsafe_pairs": [{"question": "q", "model_response": 7, "sd_response": "s"}]}, r"unsafe_pairs\[0\].model_response: .*found 7"),
    ({"unsafe_pairs": [{"question": "q", "model_response": "a"}]}, r"unsafe_pairs\[0\].sd_response: .*missing"),
    ({"UnharmPair_text1": "q"}, "record 1, UnharmPair_text1: an object"),
    ({"UnharmPair_text1": {"Question": "q"}}, "UnharmPair_text1.Prediction: .*missing"),
    ({"image_path": 3}, "record 1, image_path: .*found 3"),
    ({"image_path": "dataset/img/Weapon/2.png"}, "record 1, image_path: no image at"),
    ({"image_path": "../../etc/passwd"}, "record 1, image_path: .*leads out of the data root"),
    ({"SDImage_path": "/etc/passwd"}, "record 1, SDImage_path: .*leads out of the data root"),
    ({"image_path": "dataset/link.png"}, "record 1, image_path: .*leads out of the data root"),
])
def test_what_is_wrong_is_named(change, problem, folder, tmp_path):
    data = folder([GOOD, GOOD | change])
    (data / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(SafeEraserError, match=f"all_train.json, {problem}" if problem.startswith("record") else problem):
        load_records(data)


@pytest.mark.parametrize("text, problem", [("", "holds no record"), ("[]", "holds no record"), ("no json", "line 1: neither a JSON list nor JSON lines"),
                                           ("[3]", "record 0, record: an object")])
def test_files_that_are_no_records(text, problem, folder):
    with pytest.raises(SafeEraserError, match=problem): load_records(folder(text))


def test_refusals(folder):
    assert load_refusals(folder({"idk": [" no "]}, "prompt.json")) == ["no"]
    for bad in ({}, {"idk": []}, {"idk": "no"}, {"idk": ["no", 3]}):
        with pytest.raises(SafeEraserError, match="prompt.json, idk"): load_refusals(folder(bad, "prompt.json"))


def test_images_that_are_none(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    Image.effect_noise((64, 64), 90).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png"):
        with pytest.raises(SafeEraserError, match=f"{name}: not a readable image"): load_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SafeEraserError, match="good.png: not a readable image .*bomb"): load_image(good)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (4, 4)).save(file)
    assert load_image(file).mode == "RGB"


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (8, 4)
