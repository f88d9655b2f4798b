"""Real vocabularies, chat templates and folder layouts: what is trained on is what would stand in a row of its own."""
import contextlib
import json
import os
import subprocess
import sys
import unicodedata

import pytest
import torch
from journeys import command
from real import FRAMES, hard_rows, REAL, write_config, write_data, write_model, write_smollm2

from safeeraser.data import load_sets
from safeeraser.encoder import Encoder
from safeeraser.generate import row_key
from safeeraser.rows import read_rows
from safeeraser.model import load_adapter, load_model
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


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
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


def unlearnt(source, data, out, **settings):
    "A short run with packing left to the tool; its record."
    pairs = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "lora_r": 4, "lora_alpha": 8} | settings
    command("unlearn", "--model", source, "--data", data, "--method", "kl+pd", "--out", out, *[x for k, v in pairs.items() for x in ("--set", f"{k}={json.dumps(v)}")])
    return json.loads((out / "run.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("frame", FRAMES)
def test_a_real_language_model_in_a_frame(frame, tmp_path, data):
    "SmolLM2's first layers with its own vocabulary: packed, merged, and the same answers."
    source = write_smollm2(frame, tmp_path / "model", layers=3)
    record = unlearnt(source, data, tmp_path / "run")
    assert record["packing"]["route"] and record["packing"]["difference"] < 1e-3
    said = {}
    command("merge", tmp_path / "run", "--out", tmp_path / "merged")
    for name, how in {"run": ("--model", source, "--adapter", tmp_path / "run"), "merged": ("--model", tmp_path / "merged")}.items():
        command("generate", *how, "--data", data, "--splits", "val", "--out", tmp_path / f"{name}.jsonl")
        said[name] = [r["response"] for r in read_rows(tmp_path / f"{name}.jsonl")]
    assert said["run"] == said["merged"]


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    "One record with two questions to train on, and one in each set to answer."
    data = write_data(tmp_path_factory.mktemp("little"))
    for split, n in (("train", 2), ("val", 1)):
        file = data / f"all_{split}.json"
        record = json.loads(file.read_text())[0]
        record["unsafe_pairs"] = record["unsafe_pairs"][:n]
        del record["UnharmPair_text2"]
        if split == "val": record["unsafe_pairs"][0]["question"] = "Whatever the picture shows: what is the capital of France?"
        file.write_text(json.dumps([record]))
    return data


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_whole_of_smollm2(precision, tmp_path, little):
    "A model that speaks: it knows where Paris is, one small step does not take its speech away, and merged it says the same."
    source = write_smollm2("smollm2 in llava", tmp_path / "model", precision)
    assert unlearnt(source, little, tmp_path / "run", learning_rate=1e-5, max_steps=1)["packing"]["route"]
    command("merge", tmp_path / "run", "--out", tmp_path / "merged")
    said = {}
    for name, how in {"vanilla": [source], "unlearnt": [source, "--adapter", tmp_path / "run"], "merged": [tmp_path / "merged"]}.items():
        out = tmp_path / f"{name}.jsonl"
        command("generate", "--model", *how, "--data", little, "--splits", "val", "--max-new-tokens", 12, "--out", out)
        said[name] = [r["response"] for r in read_rows(out)]
        assert any("Paris" in r["response"] for r in read_rows(out) if "capital" in r["question"])
        command("judge", out, "--out", tmp_path / f"{name}.judged.jsonl")
    if precision == torch.float32: assert said["unlearnt"] == said["merged"]
    adapted, merged = (next_token_log_probs(*how, little) for how in ((source, tmp_path / "run"), (tmp_path / "merged", None)))
    assert (adapted - merged).abs().max() < (1e-3 if precision == torch.float32 else .5)


def next_token_log_probs(model, adapter, data) -> torch.Tensor:
    "What a model thinks comes after a question, for every token."
    net, processor = load_model(model, "cpu")
    net, encoder = load_adapter(net, adapter) if adapter else net, Encoder(processor)
    with torch.no_grad(): logits = net.eval()(**encoder.prompts([load_sets(data, "val").decouple[0]])).logits
    return logits[0, -1].float().log_softmax(-1)


@pytest.mark.slow
def test_a_16_bit_llava_before_a_terminal(tmp_path, data):
    "A process of its own, with the bars that a person sees."
    import fcntl, pty, struct, termios
    source, (here, there) = write_model("llava", tmp_path / "model", torch.bfloat16), pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # without a width no bar is drawn
    argv = [sys.executable, "-m", "safeeraser", "unlearn", "--model", source, "--data", data, "--method", "kl+pd", "--out", tmp_path / "run", "--set", "max_steps=2", "--set", "per_device_train_batch_size=2"]
    done = subprocess.Popen([*map(str, argv)], stdin=there, stdout=there, stderr=there, close_fds=True)
    os.close(there)
    said = b""
    with contextlib.suppress(OSError):  # the terminal closes with the process
        while part := os.read(here, 65536): said += part
    assert done.wait() == 0 and b"kl+pd" in said and b"2/2" in said and b"Traceback" not in said
    assert json.loads((tmp_path / "run/run.json").read_text())["packing"]["route"]
