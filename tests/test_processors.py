"""Processors for pictures: the family's own class and numbers, from the files that lie on a hub."""
import json
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from PIL import Image
from real import REAL
from safeeraser.core import SafeEraserError
from safeeraser.encoder import Encoder
from safeeraser.model import load_model
from safeeraser.processors import copy_processor, image_only, load_processor, NoVideos
from transformers.utils import is_torchvision_available

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24) and not is_torchvision_available()
VIDEOS = [name for name, family in FAMILIES.items() if family.videos]


def saved(name, folder):
    "The family's processor and configuration as a hub has them: image processor and tokenizer each in files of its own."
    family, made = FAMILIES[name], FAMILIES[name].make_processor()
    made.save_pretrained(folder)
    whole = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(whole.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(whole))
    getattr(transformers, family.name + "Config")(**family.config).save_pretrained(folder)
    return made


def inputs(processor, sizes=((112, 56), (56, 56))):
    text = Encoder(processor).prompt("what is this")
    images = [[Image.effect_noise(size, 80).convert("RGB")] for size in sizes]
    torch.manual_seed(0)
    return lambda p: p(text=[text] * len(sizes), images=images, padding=True, padding_side="left", return_tensors="pt")


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_from_a_folder_it_gives_the_same_inputs(name, tmp_path):
    if OLD and name in ("idefics3", "smolvlm"): pytest.skip("this transformers finds these image processors with torchvision only")
    made = saved(name, tmp_path)
    loaded, call = load_processor(tmp_path), inputs(made)
    assert isinstance(loaded, getattr(transformers, FAMILIES[name].name + "Processor"))
    found, expected = call(loaded), call(made)
    assert found.keys() == expected.keys()
    for key in found: torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0 if found[key].dtype == torch.long else 1e-6)


@pytest.mark.skipif(not is_torchvision_available(), reason="transformers builds these with torchvision only")
@pytest.mark.parametrize("name", VIDEOS)
def test_equal_to_the_real_one(name, tmp_path):
    saved(name, tmp_path)
    real = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    call = inputs(real)
    for key, value in call(image_only(type(real)).from_pretrained(tmp_path)).items(): torch.testing.assert_close(value, call(real)[key])


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_is_refused(name):
    if OLD and name == "smolvlm": pytest.skip("this transformers counts videos first")
    processor = FAMILIES[name].make_processor()
    assert isinstance(processor.video_processor, NoVideos)
    with pytest.raises(SafeEraserError, match="videos need torchvision"): processor(text=["<video>"], videos=[torch.zeros(2, 3, 56, 56)], return_tensors="pt")


def test_what_is_copied_is_the_processors_and_nothing_of_the_model(tmp_path):
    source, out = tmp_path / "model", tmp_path / "out"
    saved("qwen2_vl", source)
    out.mkdir()
    for name in ("video_preprocessor_config.json", "model.safetensors.index.json", "run.json", "vocab.txt"): (source / name).write_text("{}")
    copy_processor(source, out)
    assert {"tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json", "vocab.txt"} <= {f.name for f in out.iterdir()}
    assert not {"config.json", "model.safetensors.index.json", "run.json"} & {f.name for f in out.iterdir()}


@pytest.mark.parametrize("missing", ["tokenizer.json", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_part_is_refused_in_a_sentence(missing, tmp_path):
    saved("qwen2_vl", tmp_path)
    FAMILIES["qwen2_vl"].make_model().save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(SafeEraserError, match="no processor of a vision-language model there") as e: load_model(tmp_path, "cpu")
    assert "\n" not in str(e.value)


def test_the_table_of_families_is_the_one_that_was_measured():
    root = Path(__file__).parents[1]
    text = next(t for c in json.loads((root / "nbs/tutorials/your_model.ipynb").read_text())["cells"] if (t := "".join(c["source"])).startswith("## Families"))
    families = json.loads((root / "benchmarks/results/families.json").read_text())["families"]
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert [r[0] for r in rows[2:]] == list(families) == list(REAL)
    for row in rows[2:]:
        assert dict(zip(rows[0][1:], row[1:])) == {k: f"{v:.0e}" if isinstance(v, float) else {True: "yes", False: "no", None: "-"}.get(v, v) for k, v in families[row[0]].items()}


README_NAMES = {"LLaVA": ("llava", "llava, legacy", "llava, tekken"), "LLaVA-NeXT": ("llava_next",), "OneVision": ("llava_onevision",), "InternVL": ("internvl",),
                "Idefics3": ("idefics3",), "SmolVLM": ("smolvlm",), "Qwen-VL 2 to 3": ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl, thinking"),
                "LLaVA-NeXT with a window": ("llava_next, window",), "Gemma 3": ("gemma3",), "Mllama": ("mllama",), "PaliGemma": ("paligemma",)}


def test_the_readme_s_short_table_says_the_same():
    root = Path(__file__).parents[1]
    families = json.loads((root / "benchmarks/results/families.json").read_text())["families"]
    table = (root / "README.md").read_text().split("| families tried |")[1].split("\n\n")[0].splitlines()[2:]
    told = {name: cells[1:] for cells in ([x.strip() for x in line.strip("|").split("|")] for line in table) for name in cells[0].split(", ")}
    assert set(told) == set(README_NAMES) and sorted(n for names in README_NAMES.values() for n in names) == sorted(families)
    for name, (tuned, merged, trained, read) in told.items():
        for f in (families[n] for n in README_NAMES[name]):
            assert (tuned == "yes") == (f["lora"] and f["qlora"] and f["full"]) and (merged == "yes") == f["merge"]
            assert (trained == "image shared") == (f["packing"] == "dense") and (read == "image shared") == (f["generates"] == "shared")


def rewrite(file, change):
    "A JSON file with something changed."
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("name, change, said", [
    ("llava", lambda c: c.pop("num_additional_image_tokens"), r"writes 15 tokens .* 16 features; set num_additional_image_tokens to 1 in processor_config.json \(it is 0\)"),
    ("llava", lambda c: c.update(patch_size=7), "set patch_size to 14"), ("llava", lambda c: c.update(vision_feature_select_strategy="full"), "set vision_feature_select_strategy to 'default'"),
    ("llava", lambda c: c.pop("patch_size"), "does not say patch_size; it belongs there, 14 by the model's config.json"), ("llava_next", lambda c: c.pop("num_additional_image_tokens"), "set num_additional_image_tokens to 1"),
    ("llava_onevision", lambda c: c.update(num_image_tokens=9), "tokens for a picture of which"), ("internvl", lambda c: c.update(image_seq_length=9), "tokens for a picture of which"),
    ("gemma3", lambda c: c.update(image_seq_length=5), "5 tokens for a picture of which the model makes 4 features; .* image_seq_length 5")])
def test_a_setting_by_which_tokens_and_features_differ_is_named(name, change, said, tmp_path):
    saved(name, tmp_path)
    load_processor(tmp_path)
    rewrite(tmp_path / "processor_config.json", change)
    with pytest.raises(SafeEraserError, match=said) as e: load_processor(tmp_path)
    assert "\n" not in str(e.value)


PREPARED, TILE, TOWER = "preprocessor_config.json", "processor_config.json", "config.json"
SQUARE = lambda n: {"height": n, "width": n}


@pytest.mark.parametrize("name, file, change, said", [
    *((name, PREPARED, lambda c, k=k, v=v: c.update({k: v}), f"{PREPARED} makes {k} {v}, and the model takes") for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
      for k, v in (("merge_size", 1), ("merge_size", 4), ("patch_size", 7), ("patch_size", 28), ("temporal_patch_size", 1), ("temporal_patch_size", 4))),
    ("qwen2_vl", TOWER, lambda c: c["vision_config"].update(spatial_merge_size=1), f"{PREPARED} makes merge_size 2, and the model takes 1 by its config.json"),
    *((name, file, change, said) for name in ("idefics3", "smolvlm") for file, change, said in (
        (TILE, lambda c: c.update(image_seq_len=16), f"{TILE} makes image_seq_len 16, and the model takes 4"), (TILE, lambda c: c.pop("image_seq_len"), "makes image_seq_len 169, and the model takes 4"),
        (PREPARED, lambda c: c["max_image_size"].update(longest_edge=112), f"{PREPARED} makes max_image_size 112, and the model takes 56"), (TOWER, lambda c: c.update(scale_factor=1), "makes image_seq_len 4, and the model takes 16"))),
    ("mllama", PREPARED, lambda c: c.update(max_image_tiles=1), "makes max_image_tiles 1, and the model takes 4"), ("mllama", PREPARED, lambda c: c.update(max_image_tiles=8), "makes max_image_tiles 8"),
    *((name, PREPARED, lambda c: c.update(size=SQUARE(28)), "makes size 28 x 28, and the model takes 56 x 56") for name in ("mllama", "paligemma", "gemma3", "llava_onevision", "internvl")),
    *((name, PREPARED, lambda c: c.update(crop_size=SQUARE(112)), "makes crop_size 112 x 112, and the model takes 56 x 56") for name in ("llava", "llava_next"))])
def test_pictures_prepared_for_another_tower_are_named(name, file, change, said, tmp_path):
    if OLD and name in ("idefics3", "smolvlm"): pytest.skip("this transformers finds these image processors with torchvision only")
    saved(name, tmp_path)
    load_processor(tmp_path)
    rewrite(tmp_path / file, change)
    with pytest.raises(SafeEraserError, match=said) as e: load_processor(tmp_path)
    assert "\n" not in str(e.value)


def test_the_model_s_verbs_say_so_too(tiny, tmp_path):
    import shutil
    shutil.copytree(tiny.model, tmp_path / "model")
    rewrite(tmp_path / "model" / "processor_config.json", lambda c: c.pop("num_additional_image_tokens"))
    from safeeraser.check import encoder_for
    for call in (lambda: load_model(tmp_path / "model", "cpu"), lambda: encoder_for(tmp_path / "model")):
        with pytest.raises(SafeEraserError, match="set num_additional_image_tokens to 1"): call()


@pytest.mark.parametrize("layout", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_wherever_a_folder_keeps_its_chat_template(layout, tmp_path):
    made = saved("llava", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(SafeEraserError, match="chat template"): Encoder(load_processor(tmp_path))
    if layout == "tokenizer_config.json": rewrite(tmp_path / layout, lambda c: c.update(chat_template=made.chat_template))
    else: (tmp_path / layout).write_text(made.chat_template if layout.endswith("jinja") else json.dumps({"chat_template": made.chat_template}))
    assert Encoder(load_processor(tmp_path)).prompt("what is this") == Encoder(made).prompt("what is this")


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_model_s_own_code_is_never_run(file, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever answers yes
    saved("llava", tmp_path)
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    own = {"AutoConfig": "theirs.X", "AutoProcessor": "theirs.X", "AutoImageProcessor": "theirs.X", "AutoTokenizer": ["theirs.X", "theirs.X"]}
    def change(c):
        c.update(auto_map=own)
        for kind in ("model_type", "processor_class", "image_processor_type", "tokenizer_class"):
            if kind in c: c[kind] = "theirs"
    rewrite(tmp_path / file, change)
    try: load_processor(tmp_path)
    except SafeEraserError as e: assert "\n" not in str(e)
    assert not (tmp_path / "ran").exists()


def test_a_folder_in_which_nothing_reads_pictures(tmp_path):
    saved("llava", tmp_path)
    for name in ("processor_config.json", "preprocessor_config.json"): (tmp_path / name).unlink()
    with pytest.raises(SafeEraserError, match="no processor"): load_processor(tmp_path)
