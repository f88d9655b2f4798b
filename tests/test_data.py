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


def test_content_decides_whether_an_image_is_new(tmp_path):
    import os

    from safeeraser.encoder import image_digest
    file, seen = tmp_path / "a.bmp", set()
    for colour in ("red", "blue"):  # two files of one size, and one time stamp
        Image.new("RGB", (8, 8), colour).save(file)
        os.utime(file, ns=(0, 0))
        seen.add(image_digest(file))
    assert len(seen) == 2


def ink(mode):
    "A black dot on a transparent ground whose hidden colour is blue."
    image = Image.new("RGBA", (2, 1), (0, 0, 255, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    if mode == "P":
        picture = Image.new("P", (2, 1), 1)
        picture.putpalette([0, 0, 0, 0, 0, 255])
        picture.putpixel((0, 0), 0)
        picture.info["transparency"] = 1
        return picture
    return image.convert(mode)


@pytest.mark.parametrize("mode, form", [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF")])
def test_ink_on_a_transparent_ground_is_ink_on_white(mode, form, tmp_path):
    ink(mode).save(tmp_path / "a", form, **({"lossless": True} if form == "WEBP" else {}))
    assert [load_image(tmp_path / "a").getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_a_transparent_colour_of_plain_modes(tmp_path):
    for name, image, clear in (("rgb", Image.new("RGB", (2, 1), (9, 9, 9)), (9, 9, 9)), ("l", Image.new("L", (2, 1), 9), 9), ("deep", Image.new("I;16", (2, 1), 9), 9)):
        image.putpixel((0, 0), 0 if image.mode != "RGB" else (0, 0, 0))
        image.save(tmp_path / f"{name}.png", transparency=clear)
        assert [load_image(tmp_path / f"{name}.png").getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)], name


@pytest.mark.parametrize("form, kind, brightest", [("PNG", "uint16", 65535), ("TIFF", "uint16", 65535), ("TIFF", "uint16", 4095), ("TIFF", "int32", 65535), ("TIFF", "int32", 10**6),
                                                   ("TIFF", "float32", 1), ("TIFF", "float32", 255), ("TIFF", "float32", 10**6), ("PPM", "uint16", 65535)])
def test_deeper_greys_are_scaled(form, kind, brightest, tmp_path):
    import numpy as np
    levels = np.linspace(0, brightest, 5).reshape(1, 5).astype(kind)
    Image.fromarray(levels).save(tmp_path / "a", form)
    assert [load_image(tmp_path / "a").getpixel((x, 0))[0] for x in range(5)] == pytest.approx([0, 64, 128, 191, 255], abs=1)


BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c"


def test_a_line_ends_at_a_newline_only_and_a_byte_order_mark_is_fine(folder):
    record = GOOD | {"unsafe_pairs": [{"question": f"q{BREAKS}q", "model_response": "a", "sd_response": "s"}]}
    raw = json.dumps(record, ensure_ascii=False)
    for text in (raw + "\n" + raw, raw + "\r\n" + raw + "\r\n", f"\ufeff[{raw}, {raw}]", "\ufeff" + raw + "\n" + raw):
        assert [r.unsafe[0].question for r in load_records(folder(text))] == [f"q{BREAKS}q"] * 2


@pytest.mark.parametrize("change, said", [
    ({"image_path": "dataset/img/\x00.png"}, r"record 1, image_path: 'dataset/img/\\x00.png' can be no file's name"),
    ({"SDImage_path": "dataset/" + 300 * "a"}, "record 1, SDImage_path: no image at"),
    ({"image_path": "dataset/img/\ud800.png"}, r"\[1\].image_path: half of a surrogate pair"),
    ({"UnharmPair_text1": {"Question": "\udc00?", "Prediction": "p"}}, r"\[1\].UnharmPair_text1.Question: half of a surrogate pair"),
    ({"image_path": "/"}, "record 1, image_path: '/' leads out"),
    ({"image_path": "dataset"}, "record 1, image_path: no image at"),
])
def test_what_can_be_no_path_or_no_text(change, said, folder):
    with pytest.raises(SafeEraserError, match=said): load_records(folder([GOOD, GOOD | change]))


@pytest.mark.parametrize("text", ["[" * 10**5, '[{"image_path": ' + "9" * 5000 + "}]", "{", '[{"a": 1}', "\x00", '{"a": 1}\n{"a"'], ids=range(6))
@pytest.mark.parametrize("name", ["all_train.json", "prompt.json", "settings.json"])
def test_files_that_are_no_json(name, text, folder):
    from safeeraser.data import settings_of
    data = folder([GOOD])
    folder(text, name)
    read = {"all_train.json": load_records, "prompt.json": load_refusals, "settings.json": settings_of}[name]
    with pytest.raises(SafeEraserError, match=f"{name}.*JSON"): read(data)


@pytest.mark.parametrize("settings, said", [([], "settings.json: an object"), ({"unlearn": 5}, "unlearn: an object"), ({"unlearn": {"ga": 5}}, "unlearn.ga: an object"),
                                            ({"generate": []}, "generate: an object"), ({"generate": {"batch_size": "x"}}, "generate.batch_size: a whole number"),
                                            ({"generate": {"batch_size": 1.5}}, "generate.batch_size: a whole number"), ({"generate": {"max_new_tokens": -1}}, "generate.max_new_tokens: input should be greater than 0"),
                                            ({"generate": {"batch_size": True}}, "generate.batch_size: a whole number"), ({"generate": {"beams": 3}}, "generate.beams: is not known here")])
def test_recommended_settings_of_another_form(settings, said, folder):
    from safeeraser.data import settings_of
    data = folder([GOOD])
    folder(settings, "settings.json")
    with pytest.raises(SafeEraserError, match=said): settings_of(data)


@pytest.mark.parametrize("text", ["[]", "", "3", "[[]]", '{"idk": [" "]}', '{"idk": ["no", null]}', '{"idk": {"a": 1}}'])
def test_refusals_of_another_form(text, folder):
    data = folder([GOOD])
    folder(text, "prompt.json")
    with pytest.raises(SafeEraserError, match="prompt.json"): load_refusals(data)
