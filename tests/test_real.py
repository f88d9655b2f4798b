"""Real vocabularies, chat templates and folder layouts: what is trained on is what would stand in a row of its own."""
import json
import unicodedata

import pytest
import torch
from journeys import command
from real import hard_rows, REAL, write_config, write_data, write_model

from safeeraser.data import Encoder, load_sets
from safeeraser.generate import read_rows, row_key
from safeeraser.model import load_model
from safeeraser.packing import Packer
from safeeraser.processors import load_processor

SHARED = [name for name, real in REAL.items() if name != "paligemma"]  # whose question is part of what the image's tokens see


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    "One of each family's encoders, made once."
    made = {}
    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("real")
            write_config(name, folder)
            made[name] = Encoder(load_processor(folder))
        return made[name]
    return get


@pytest.mark.parametrize("name", REAL)
def test_labels_are_the_answer_and_the_end_of_turn(name, encoders, data):
    encoder, end = encoders(name), REAL[name].end
    for row in hard_rows(data):
        labels = encoder.rows([row])["labels"][0]
        said = encoder.processor.tokenizer.decode(labels[labels != -100], clean_up_tokenization_spaces=False)
        assert unicodedata.normalize("NFC", said.strip()) == unicodedata.normalize("NFC", row.answer) + end


@pytest.mark.parametrize("name", SHARED)
def test_packed_rows_are_the_rows_own_tokens(name, encoders, data):
    encoder, rows, seen = encoders(name), hard_rows(data), set()
    for made in Packer(encoder).pack(rows, list(range(len(rows)))):
        prefix, *segments = torch.tensor(made.ids).split(made.lengths)
        _, *labels = torch.tensor(made.labels).split(made.lengths)
        for item, segment, label in zip(made.items, segments, labels):
            alone = encoder.rows([rows[item]])
            own = alone["labels"][0]
            assert [*prefix.tolist(), *segment.tolist()] == alone["input_ids"][0].tolist(), rows[item].item.question
            assert label[label != -100].tolist() == own[own != -100].tolist(), rows[item].item.question
            seen.add(item)
    assert seen == set(range(len(rows)))


@pytest.mark.parametrize("name", SHARED)
def test_packed_prompts_are_the_prompts_own_tokens(name, encoders, data):
    encoder, items = encoders(name), [r.item for r in hard_rows(data)]
    for made in Packer(encoder).pack_prompts(items):
        prefix, *segments = torch.tensor(made.ids).split(made.lengths)
        for item, segment in zip(made.items, segments):
            assert [*prefix.tolist(), *segment.tolist()] == encoder.prompts([items[item]])["input_ids"][0].tolist(), items[item].question


def test_the_chat_template_in_the_tokenizers_configuration_is_found(tmp_path):
    write_config("llava", tmp_path)
    template = json.loads((tmp_path / "chat_template.json").read_text())["chat_template"]
    (tmp_path / "chat_template.json").unlink()
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    assert "ASSISTANT:" in Encoder(load_processor(tmp_path)).prompt("What is this?")


@pytest.mark.xfail(reason="tokens and features are not compared when a folder is read")
@pytest.mark.parametrize("verb", ["data check", "unlearn", "generate"])
def test_an_older_llava_folder_is_told_what_it_lacks(verb, tmp_path, data, capsys):
    "Folders from before transformers 4.46 say nothing of the token that CLIP puts in front of the patches."
    source = write_model("llava", tmp_path / "model")
    file = source / "processor_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "num_additional_image_tokens"}))
    where = ["--out", tmp_path / "run"] if verb == "unlearn" else ["--out", tmp_path / "r.jsonl"] if verb == "generate" else []
    command(*verb.split(), *([data] if verb == "data check" else ["--data", data]), "--model", source, *where, *(["--method", "po"] if verb == "unlearn" else []), code=2)
    told = [line for line in capsys.readouterr().err.splitlines() if "safeeraser:" in line]
    assert len(told) == 1 and "num_additional_image_tokens" in told[0]


OBEYED = pytest.mark.xfail(reason="what a generation_config asks for beside the end is not obeyed on every route")
ASKING = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[OBEYED] if any(a in real.generation for a in ASKING) else []) for n, real in REAL.items()])
def test_answers_are_those_of_generate_under_the_models_own_configuration(name, tmp_path, data):
    source, length = write_model(name, tmp_path / "model"), 12
    out = tmp_path / "responses.jsonl"
    command("generate", "--model", source, "--data", data, "--splits", "val", "--max-new-tokens", length, "--out", out)
    said = {row_key(r): r["response"] for r in read_rows(out)}
    model, processor = load_model(source, "cpu")
    encoder = Encoder(processor)
    for item in load_sets(data, "val"):
        inputs = encoder.prompts([item])
        own = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        assert said["val", item.set, item.image_id, item.question, 0] == processor.tokenizer.decode(own, skip_special_tokens=True).strip()
