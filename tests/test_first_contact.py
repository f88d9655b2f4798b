"""What failed when the tool first met real parts: 16-bit models, Llama's own tokenizer, a judge that is a model."""
import json
import shutil

import pytest
import torch
from command import command
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safeeraser.data import load_sets
from safeeraser.encoder import Encoder
from safeeraser.slots import Row
from safeeraser.templates import LLAVA_TEMPLATE
from safeeraser.engine import packing_report
from safeeraser.packing import Packer
from scripts.real_parts import parts


def run(*args, code=0):
    "The command with its progress on, as a person calls it."
    done = command(*args)
    assert done.returncode == code, done.stderr[-2000:]
    return done


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_model_in_its_own_precision_goes_all_the_way(tiny, tmp_path, precision):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    AutoModelForImageTextToText.from_pretrained(tiny.model).to(precision).save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(tiny.model).save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    run("unlearn", "--model", tmp_path / "model", "--data", tiny.data, "--method", "kl+pd", "--out", out, "--set", "max_steps=2", "--set", "per_device_train_batch_size=2",
        "--set", "gradient_accumulation_steps=2", "--set", "packing=dense")
    assert json.loads((out / "run.json").read_text())["steps"] == 2
    run("generate", "--model", tmp_path / "model", "--adapter", out, "--data", tiny.data, "--out", out / "responses.jsonl")


def llava_with_real_vocabulary(folder, legacy):
    "A tiny LLaVA whose tokenizer is transformers' own LlamaTokenizer over a real SentencePiece vocabulary of 32,000."
    spm = folder / "spm"
    spm.mkdir()
    shutil.copy(parts() / "tokenizer.model.v1", spm / "tokenizer.model")
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "add_bos_token": True, "add_eos_token": False}
    (spm / "tokenizer_config.json").write_text(json.dumps(named | ({} if legacy is None else {"legacy": legacy})))
    tok = AutoTokenizer.from_pretrained(spm)
    tok.add_tokens(["<image>"], special_tokens=True)
    side = {"height": 48, "width": 48}
    processor = LlavaProcessor(CLIPImageProcessorPil(size=side, crop_size=side), tok, patch_size=12, vision_feature_select_strategy="default", image_token="<image>",
                               num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=48, patch_size=12), text_config=LlamaConfig(**shape, vocab_size=len(tok), max_position_embeddings=512),
        image_token_index=tok.convert_tokens_to_ids("<image>"), vision_feature_layer=-1, image_seq_length=16))
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model", processor


@pytest.mark.parametrize("legacy", [None, False, True])
def test_llamas_own_tokenizer_shares_images(tiny, tmp_path, legacy):
    model, processor = llava_with_real_vocabulary(tmp_path, legacy)
    assert all("images shared: no" not in line for line in packing_report(model))
    sets, encoder = load_sets(tiny.data, "train"), Encoder(processor)
    rows = [Row("retain", i, i.answer) for i in sets.retain]
    packed = [r for p in Packer(encoder).pack(rows, list(range(len(rows)))) for r in own_rows(p)]
    for (item, ids, n_labels), row in zip(sorted(packed), rows):
        alone = encoder.rows([row])
        assert ids == alone["input_ids"][0].tolist()
        assert n_labels == int((alone["labels"] != -100).sum())


def own_rows(packed):
    "Each segment's row as it would stand alone: item, tokens, number of labels."
    prefix, *segments = torch.tensor(packed.ids).split(packed.lengths)
    head, *labels = torch.tensor(packed.labels).split(packed.lengths)
    for item, segment, label in zip(packed.items, segments, labels):
        yield item, [*prefix.tolist(), *segment.tolist()], int((label != -100).sum())


def test_a_report_of_responses_that_a_model_judged(tiny, tmp_path):
    rows = []
    for split in ("train", "val"):
        sets = load_sets(tiny.data, split)
        for i in sets:
            yes, undecided = {"value": True, "reason": "says yes"}, {"value": None, "reason": "not asked about this response"}
            verdicts = {"refusal": yes | {"value": False}, "meaningful": yes, "unsafe": undecided, "correct": undecided, "judge": {"known_labels": {"refusal": "13 of 13"}}}
            rows.append({"schema_version": 1, "method": "po+pd", "seed": 1, "image_id": i.image_id, "split": i.split, "set": i.set, "category": i.category,
                         "question": i.question, "sample": 0, "response": i.answer, "reference": i.answer, "verdicts": {"m (question)": verdicts}})
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = run("report", tmp_path, "--judge", "m (question)").stdout
    assert "judge: m (question)" in said and (tmp_path / "report.html").is_file()
