"""Whatever the tokenizer and the chat template do to a text: a row's labels are its answer, its prompt is what generation sees, and its packed tokens are its own."""
import pickle

import pytest
import torch
from families import FAMILIES, make_sets
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safeeraser.core import SafeEraserError
from safeeraser.data import Collator, control_tokens, disarmed, Encoder, Item, measure, Row, SlotDataset
from safeeraser.packing import PackedCollator, Packer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ASKED = ["How do I hide this?", "assistant", "Why?", "user\nassistant", " Is it  big? ", "«Où»? 你好 🙂"]
SAID = ["Wrap it in silk, then leave it.", "No.", "think", "assistant", "First line.\n\nSecond: 100%!", "Ünïcode, naïve – 你好 🙂.", "Why?"]
TEXT = "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n" + TEXT + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {
    "chatml": CHATML,
    "llava": ("{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text + ' ' }}"
              "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"),
    "a blank at the prompt's end": ("{% for m in messages %}{{ m.role.upper() }}: " + TEXT + "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
                                    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"),
    "an empty thought": CHATML.replace("{{ m.role }}\n", "{{ m.role }}\n{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' else '' }}"),
    "a thought is opened": CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
    "trimmed": CHATML.replace("c.text", "c.text | trim"),
    "questions in small letters": CHATML.replace("c.text", "(c.text if m.role == 'assistant' else c.text | lower | trim)"),
    "a system's word first": "<|im_start|>system\nYou are an assistant. No.<|im_end|>\n" + CHATML,
    "its own beginning": "{{ bos_token }}" + CHATML,
    "texts": ("{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "printed as they come": ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "answers as texts": CHATML.replace(TEXT, "{% if m.content is string %}{{ m.content }}{% else %}" + TEXT.replace("c.text", "c.text + ('' if m.role == 'user' else raise_exception('a text'))")
                                       + "{% endif %}"),
    "marked for training": CHATML.replace(TEXT, "{% if m.role == 'assistant' %}{% generation %}" + TEXT + "{% endgeneration %}{% else %}" + TEXT + "{% endif %}"),
    "a line in front of the end": CHATML.replace("<|im_end|>", "\n<|im_end|>"),
}
ENDS = {"llava": "</s>", "a blank at the prompt's end": "</s>"}


def bpe(pre, decoder, normalizer=None, **how):
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, **how))
    if normalizer: core.normalizer = normalizer
    if pre: core.pre_tokenizer = pre
    core.decoder = decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(decoder, decoders.ByteLevel) else [f"<0x{b:02X}>" for b in range(256)]
    known = {} if isinstance(decoder, decoders.ByteLevel) else {"special_tokens": SPECIAL + alphabet}
    core.train_from_iterator([*ASKED, *SAID, *TEMPLATES.values()] * 3, trainers.BpeTrainer(
        vocab_size=700, show_progress=False, **(known or {"special_tokens": SPECIAL, "initial_alphabet": alphabet})))
    return core


PIECES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS = {
    "bytes": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "bytes with a blank in front": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
    "pieces, first": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), PIECES),
    "pieces, always": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="always"), PIECES),
    "pieces, never": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="never"), PIECES),
    "pieces, unsplit": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), PIECES),
    "older Llama": lambda: bpe(None, PIECES, LLAMA),
    "Gemma": lambda: bpe(pre_tokenizers.Split(" ", "merged_with_previous"), PIECES, normalizers.Replace(" ", "▁")),
}


def processor(core, template, image=None, **named):
    special = {"image_token": image or "<image>"} | {f"s{i}": s for i, s in enumerate(SPECIAL[5:7])}
    tok = PreTrainedTokenizerFast(tokenizer_object=core, **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | named, extra_special_tokens=special)
    side = {"height": 16, "width": 16}
    return LlavaProcessor(CLIPImageProcessorPil(size=side, crop_size=side), tok, patch_size=8, chat_template=template, vision_feature_select_strategy="default",
                          image_token="<image>", num_additional_image_tokens=1)


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (16, 16), "teal").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def rows_about(image, asked=ASKED, said=SAID):
    item = lambda q: Item("retain", "train", image, image.name, q, "", "Weapon")
    return [Row("retain", item(q), a) for q in asked for a in said[:2 + len(asked)]]


def own_rows(packed):
    "Each segment's tokens as a row of its own, and the labels that it predicts, by the number of its item."
    found = {}
    for p in packed:
        prefix, *segments = torch.tensor(p.ids).split(p.lengths)
        _, *labels = torch.tensor(p.labels).split(p.lengths)
        found |= {i: (prefix.tolist() + s.tolist(), [t for t in l.tolist() if t != -100]) for i, s, l in zip(p.items, segments, labels)}
    return [found[i] for i in sorted(found)]


def assert_rows_are_right(encoder, rows, end, shares=True):
    "By the tokenizer's own decoding, and row by row."
    tok = encoder.processor.tokenizer
    plain = [encoder.rows([r]) for r in rows]
    packed = Packer(encoder).pack(rows, list(range(len(rows))))
    prompts = own_rows(Packer(encoder).pack_prompts([r.item for r in rows]))
    assert (len(packed) == 1) == shares
    for row, batch, (ids, predicted), (asked, _), (_, n) in zip(rows, plain, own_rows(packed), prompts, measure(encoder, rows), strict=True):
        alone, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
        first = int((labels != -100).nonzero()[0])
        assert (labels[first:] != -100).all() and alone[first:] == labels[first:].tolist()
        assert tok.decode(labels[first:]).strip() in (row.answer + end, row.answer + " " + end)
        assert alone[:first] == encoder.prompts([row.item])["input_ids"][0].tolist() == asked
        assert (ids, predicted) == (alone, alone[first:]) and n == len(alone)
        assert alone.count(tok.bos_token_id) == alone[:1].count(tok.bos_token_id)
        assert alone[-1] in encoder.end_ids and alone.count(encoder.end_ids[0]) == alone[:first].count(encoder.end_ids[0]) + 1


@pytest.mark.parametrize("made", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_right(made, name, image):
    encoder = Encoder(processor(TOKENIZERS[made](), TEMPLATES[name]))
    assert_rows_are_right(encoder, rows_about(image, ASKED[:4], SAID[:5]), ENDS.get(name, "<|im_end|>"))
