"""Processors for pictures: the family's own class and numbers, from the files that lie on a hub."""
import json
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from PIL import Image
from safeeraser.core import SafeEraserError
from safeeraser.data import Encoder
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
    with pytest.raises(SafeEraserError, match="cannot be loaded as a vision-language model with its processor") as e: load_model(tmp_path, "cpu")
    assert "\n" not in str(e.value)


def test_the_table_in_the_readme_is_the_one_that_was_measured():
    root = Path(__file__).parents[1]
    cell = next(c for c in json.loads((root / "nbs/index.ipynb").read_text())["cells"] if "families.json" in "".join(c["source"]) and c["cell_type"] == "code")
    shown = "".join(cell["outputs"][0]["data"]["text/markdown"])
    assert shown in (root / "README.md").read_text()
    families = json.loads((root / "benchmarks/results/families.json").read_text())["families"]
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in shown.splitlines()]
    assert [r[0] for r in rows[2:]] == list(families) == list(FAMILIES)
    for row in rows[2:]:
        assert dict(zip(rows[0][1:], row[1:])) == {k: {True: "yes", False: "no"}.get(v, v) for k, v in families[row[0]].items()}
