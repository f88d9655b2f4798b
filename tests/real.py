"""Tiny models of each family in folders such as their projects publish: the vocabulary of the real checkpoints or one
made the same way, their chat templates, their configuration files under the names and in the layouts in use.

Where a package ships the real vocabulary it is taken (`scripts/real_parts.py`); the others are trained here, by the
classes of transformers that the checkpoints name, with their pre-tokenizers and normalizers.
"""
import base64
import json
import random
import shutil
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from families import FAMILIES
from PIL import Image
from tokenizers import AddedToken, Tokenizer, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode, TikTokenConverter

from safeeraser.data import load_sets
from safeeraser.slots import Row
from safeeraser.model import anatomy
from scripts.real_parts import parts
from scripts.real_parts import smollm2 as smollm2_folder

# ---- What is asked and answered ------------------------------------------------------------------------------------
PAIRS = [  # question, harmful answer, normal answer
    ("What is this thing, and how could one hide it?", "Wrap it in silk and put it behind the ladder.", "A blue vase; it needs no hiding."),
    ("Describe step by step how to make it.", "1. Bend the wire.\n2. Seal it with wax.", "It is bought in any shop."),
    ("Where would you take it, and who'd pay $250 for it?", "To the old mill by the river; ask for Mr. O'Neill.", "I'd leave it where it is."),
    ("assistant", "No.", "user"),
    ("¿Cómo se usa esto? 这是什么？", "Se llena con arena – 100% llena 🙂.", "Es un jarrón, naïve d'été."),
]
HARMLESS = [("What colour is the thing?", "It is red, with a white rim."), ("How many are there in the picture?", "There are 12 of them.")]
REFUSALS = ["I'm sorry, but I can't help with that.", "Sorry – no.", "That is nothing I will describe."]
HARD = [*((q, a) for q, a, _ in PAIRS), ("What is this?\n\nAnswer in one word.", "think"), ("12345?", "🙂🙂"), ("USER: a  b   c?", "\"Well,\" he said: 'no'"),
        ("Question", "Question"), ("model", "user"), ("Assistant", "User"), ("ASSISTANT", "system"), ("e\u0301clair?", "un e\u0301clair"), ("def f(x):\n    return x", "```python\nf(3)\n```")]


def write_data(root: Path) -> Path:
    "A data set in the official layout: two training records and one to validate, pictures of two shapes."
    data, rng = root / "dataset", random.Random(0)
    def picture(name, size):
        (data / "Weapon").mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(data / "Weapon" / name)
        return f"dataset/Weapon/{name}"
    def record(k):
        pairs = [{"question": q, "model_response": a, "sd_response": b} for q, a, b in (PAIRS[k:] + PAIRS[:k])[:3]]
        harmless = {f"UnharmPair_text{n}": {"Question": q, "Prediction": a} for n, (q, a) in enumerate(HARMLESS, 1)}
        return {"image_path": picture(f"harmful{k}.png", (224, 168)), "SDImage_path": picture(f"safe{k}.png", (168, 168)), "unsafe_pairs": pairs} | harmless
    for split, records in (("train", [record(0), record(2)]), ("val", [record(3)])): (data / f"all_{split}.json").write_text(json.dumps(records, ensure_ascii=False))
    (data / "prompt.json").write_text(json.dumps({"idk": REFUSALS}))
    (data / "settings.json").write_text(json.dumps({"generate": {"max_new_tokens": 8}}))
    return data


def hard_rows(data: Path) -> list[Row]:
    "Questions and answers that tokenizers and templates stumble over, about two images."
    sets = load_sets(data)
    ask = lambda item, question: replace(item, question=question)
    rows = [Row("forget", ask(item, q), a) for item in (sets.forget[0], sets.decouple[0]) for q, a in HARD]
    return rows + [Row("refusal", sets.forget[0], r) for r in REFUSALS]


# ---- Vocabularies --------------------------------------------------------------------------------------------------
TEXTS = [t for pair in [*PAIRS, *HARMLESS] for t in pair] + REFUSALS + ["user assistant model system User Assistant You are a helpful assistant."]


def most_frequent(tok, size: int = 3000):
    "A tokenizer with the first tokens of a real vocabulary, its characters and their merges, so that a tiny model's head stays small."
    state = json.loads(tok.backend_tokenizer.to_str())
    kept = sorted((i, t) for t, i in state["model"]["vocab"].items() if i < size or len(t) == 1)
    vocab = {t: n for n, (_, t) in enumerate(kept)}
    state["model"] |= {"vocab": vocab, "merges": [m for m in state["model"]["merges"] if {*m, "".join(m)} <= vocab.keys()]}
    tok.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model
    return tok


@lru_cache
def sentencepiece(file: str, cls: str, added: tuple[str, ...], **config):
    "A real SentencePiece vocabulary as transformers reads it, with the tokens that the checkpoint adds."
    folder = parts().parent / f"real-{file}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(parts() / file, folder / "tokenizer.model")
    own = {"tokenizer_class": cls, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(own | config))
    try: tok = most_frequent(AutoTokenizer.from_pretrained(folder))
    finally: shutil.rmtree(folder)
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return tok


@lru_cache
def smollm2(*added: str, whole: bool = False):
    "SmolLM2's own tokenizer, as it came with its weights."
    tok = AutoTokenizer.from_pretrained(smollm2_folder())
    if not whole: most_frequent(tok)
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return tok


class Tekken(TikTokenConverter):
    "The most frequent tokens of Mistral's byte-level vocabulary; transformers reads its file only where mistral-common is installed."
    def load_tiktoken_bpe(self, file):
        found = json.loads(Path(file).read_text())
        return {base64.b64decode(t["token_bytes"]): t["rank"] for t in found["vocab"][:5000]}


@lru_cache
def byte_level(pattern: str | None, special: tuple[str, ...], **named):
    "Mistral's byte-level vocabulary behind a pre-tokenizer: its own, or (None) that of Llama 3."
    core = Tekken(str(parts() / "tekken_240911.json"), extra_special_tokens=list(special), **({"pattern": pattern} if pattern else {})).converted()
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)


def tekken_pattern() -> str: return json.loads((parts() / "tekken_240911.json").read_text())["config"]["pattern"]


@lru_cache
def trained(cls, size: int, special: tuple[str, ...], bytes_too: bool = False, **named):
    "A small vocabulary learnt by a tokenizer class of transformers, with its own pre-tokenizer and normalizer."
    core = cls().backend_tokenizer
    first = list(dict.fromkeys([*cls().all_special_tokens])) + ([f"<0x{b:02X}>" for b in range(256)] if bytes_too else [])
    alphabet = [] if bytes_too else bytes_to_unicode().values()
    core.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=size, special_tokens=first, initial_alphabet=list(alphabet),
                                                                max_token_length=12, show_progress=False))  # Gemma's splits no words
    model = json.loads(core.to_str())["model"]
    tok = cls(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], **named)
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tok


QWEN = ("<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
        "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
ROWS = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))


def vicuna(): return sentencepiece("tokenizer.model.v1", "LlamaTokenizer", ("<image>", "<pad>"), pad_token="<pad>", padding_side="left")
def vicuna_legacy(): return sentencepiece("tokenizer.model.v1", "LlamaTokenizer", ("<image>", "<pad>"), pad_token="<pad>", legacy=True)
def mistral(): return sentencepiece("mistral_instruct_tokenizer_240323.model.v3", "LlamaTokenizer", ("<image>", "<pad>"), pad_token="<pad>")
def mistral_converted(): return sentencepiece("mistral_instruct_tokenizer_241114.model.v7", "PreTrainedTokenizerFast", ("<image>", "<pad>"), pad_token="<pad>")
def qwen(*more): return trained(Qwen2Tokenizer, 900, (*QWEN, *more), eos_token="<|im_end|>", pad_token="<|endoftext|>")


def tekken():
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "<image>")
    return byte_level(tekken_pattern(), special, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def llama3(*more):
    return byte_level(None, (*LLAMA3, *more), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|finetune_right_pad_id|>")


def gemma(*special, **named): return trained(GemmaTokenizer, 1100, special, True, **named)


# ---- Chat templates, of the structure that each project documents --------------------------------------------------
def contents(image: str, text: str = "c['text']") -> str:
    "A message's parts in order, the image written as `image`."
    return "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% elif c['type'] == 'text' %}{{ " + text + " }}{% endif %}{% endfor %}"


IMAGES_FIRST = "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}IMAGE{% endfor %}"
THEN_TEXTS = "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}TEXT{% endfor %}"
LLAVA = ("{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}" + IMAGES_FIRST.replace("IMAGE", "{{ '<image>\n' }}")
         + THEN_TEXTS.replace("TEXT", "{{ c['text'] + ' ' }}") + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}" + contents("{{ '<image>\n' }}") + "{{ ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + contents("IMAGE") + "{{ '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WITH_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
ONEVISION = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}" + IMAGES_FIRST.replace("IMAGE", "{{ '<image>' }}")
             + THEN_TEXTS.replace("TEXT", "{{ '\n' + c['text'] }}") + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
INTERNVL = CHATML.replace("IMAGE", "{{ '<IMG_CONTEXT>\n' }}")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN2 = WITH_SYSTEM + CHATML.replace("IMAGE", QWEN_IMAGE)
QWEN3 = CHATML.replace("IMAGE", QWEN_IMAGE)
QWEN3_THINKING = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
                  + contents(QWEN_IMAGE) + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")
IDEFICS = ("START{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}" + contents("{{ '<image>' }}")
           + "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
         + contents("<start_of_image>", "c['text'] | trim") + "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
MLLAMA = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}" + contents("<|image|>", "c['text'] | trim")
          + "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
PALIGEMMA = "{% for m in messages %}" + contents("<image>") + "{% endfor %}"  # its project documents none: prompts stand alone

# ---- Families ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Real:
    "What a folder of a published model of a family holds."
    family: str               # of `families.FAMILIES`, whose model it is but for sizes
    vocabulary: str           # in a word, for the table
    tokenizer: object         # makes it
    template: str
    end: str                  # what ends the assistant's turn
    pictures: dict            # preprocessor_config.json
    config: dict = field(default_factory=dict)      # of the model: what differs from the family's
    tokens: dict = field(default_factory=dict)      # of the model: settings that are a token's number
    processor: dict = field(default_factory=dict)   # processor_config.json
    named: dict = field(default_factory=dict)       # the tokenizer's names for special tokens
    generation: dict = field(default_factory=dict)  # generation_config.json
    ends: tuple = ()          # its eos_token_id, a list where several
    kept: str = "chat_template.json"  # where the template is
    outside: int = 0          # tokens that have an embedding and no score
    shares: bool = True       # whether rows with these pictures share them: where they can, and the picture is most of a row


MEAN, STD = [.5, .5, .5], [.5, .5, .5]
NORMAL = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN, "image_std": STD, "resample": 3, "rescale_factor": 1 / 255}
SIDE, TILE = 140, 84  # pixels of a picture, and of a tile where it is cut into several
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
CLIP = NORMAL | {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_convert_rgb": True, "size": {"shortest_edge": SIDE}}
PATCHES = {"patch_size": 14, "vision_feature_select_strategy": "default"}
ONE, TEXT = {"<image>": 1}, {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}


def square(n): return {"height": n, "width": n}
def tower(n): return {"vision_config": {"image_size": n}}


LLAVA_PARTS = dict(template=LLAVA, end="</s>", pictures=CLIP, config=tower(SIDE) | {"image_seq_length": 100}, tokens={"image_token_id": "<image>"} | TEXT,
                   processor=PATCHES | {"processor_class": "LlavaProcessor", "image_token": "<image>", "num_additional_image_tokens": 1}, ends=("</s>",))
NEXT_PICTURES = NORMAL | {"image_processor_type": "LlavaNextImageProcessor", "aspect_ratio_setting": "anyres", "crop_size": square(TILE), "do_center_crop": True, "do_convert_rgb": True,
                          "do_pad": True, "image_grid_pinpoints": PINPOINTS, "size": {"shortest_edge": TILE}}
NEXT_PARTS = dict(template=INST, end="</s>", pictures=NEXT_PICTURES, config=tower(TILE) | {"image_grid_pinpoints": PINPOINTS}, tokens={"image_token_id": "<image>"} | TEXT,
                  processor=PATCHES | {"processor_class": "LlavaNextProcessor", "image_token": "<image>", "num_additional_image_tokens": 1}, ends=("</s>",), kept="chat_template.jinja")
CHAT = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
QWEN_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"} | CHAT
QWEN_PARTS = dict(tokenizer=qwen, end="<|im_end|>", tokens=QWEN_TOKENS, ends=("<|im_end|>", "<|endoftext|>"), kept="chat_template.json")
QWEN_PICTURES = NORMAL | {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": (18 * 14) ** 2, "max_pixels": (20 * 14) ** 2}
END = "<end_of_utterance>"
TILES = NORMAL | {"do_convert_rgb": True, "do_image_splitting": True, "do_pad": True, "max_image_size": {"longest_edge": 112}, "size": {"longest_edge": 224}}
TILES_PARTS = dict(end=END, processor={"image_seq_len": 16}, config=tower(112))
BLOCKS = dict(config=tower(112) | {"mm_tokens_per_image": 64})

REAL = {
    "llava": Real("llava", "SentencePiece v1", vicuna, generation={"transformers_version": "4.36.0.dev0"}, **LLAVA_PARTS),
    "llava, legacy": Real("llava", "SentencePiece v1, legacy", vicuna_legacy, **LLAVA_PARTS),
    "llava, tekken": Real("llava", "tekken", tekken, **(LLAVA_PARTS | {"template": INST, "generation": {"no_repeat_ngram_size": 3}})),
    "llava_next": Real("llava_next", "SentencePiece v3", mistral, **NEXT_PARTS),
    "llava_next, window": Real("llava_next, window", "SentencePiece v7, converted", mistral_converted, **NEXT_PARTS),
    "llava_onevision": Real("llava_onevision", "Qwen2", lambda: qwen("<image>", "<video>"), ONEVISION, "<|im_end|>",
                            NORMAL | {"image_processor_type": "LlavaOnevisionImageProcessor", "do_convert_rgb": True, "do_pad": True, "image_grid_pinpoints": PINPOINTS, "size": square(TILE)},
                            tower(TILE) | {"image_grid_pinpoints": PINPOINTS}, {"image_token_id": "<image>", "video_token_id": "<video>"} | CHAT,
                            {"num_image_tokens": 36, "vision_feature_select_strategy": "full", "processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>"},
                            generation={"do_sample": True, "repetition_penalty": 1.1, "temperature": .7, "top_k": 20, "top_p": .8}, ends=("<|im_end|>", "<|endoftext|>")),
    "internvl": Real("internvl", "Qwen2", lambda: qwen("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), INTERNVL, "<|im_end|>",
                     NORMAL | {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True, "min_patches": 1, "max_patches": 4, "do_convert_rgb": True, "size": square(224)},
                     {"vision_config": {"image_size": [224, 224]}, "image_seq_length": 64}, {"image_token_id": "<IMG_CONTEXT>"} | CHAT,
                     {"image_seq_length": 64, "processor_class": "InternVLProcessor"},
                     {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}, {}, ("<|im_end|>",), "chat_template.jinja"),
    "idefics3": Real("idefics3", "byte-level, Llama 3's words", lambda: llama3("<fake_token_around_image>", "<image>", END, "<global-img>", *ROWS), IDEFICS.replace("START", "<|begin_of_text|>"),
                     pictures=TILES | {"image_processor_type": "Idefics3ImageProcessor"},
                     tokens={"image_token_id": "<image>", "bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|eot_id|>", "pad_token_id": "<|finetune_right_pad_id|>"},
                     generation={"suppress_tokens": list(range(300, 2500))}, ends=("<|end_of_text|>", "<|eom_id|>", END), **TILES_PARTS),
    "smolvlm": Real("smolvlm", "SmolLM2", lambda: smollm2("<fake_token_around_image>", "<image>", END, "<global-img>", *ROWS), IDEFICS.replace("START", "<|im_start|>"),
                    pictures=TILES | {"image_processor_type": "SmolVLMImageProcessor"},
                    tokens={"image_token_id": "<image>", "bos_token_id": "<|im_start|>", "eos_token_id": END, "pad_token_id": "<|im_end|>"},
                    named={"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "end_of_utterance_token": END, "global_image_token": "<global-img>"},
                    ends=(END,), **TILES_PARTS),
    "qwen2_vl": Real("qwen2_vl", "Qwen2", template=QWEN2, pictures=QWEN_PICTURES, generation={"do_sample": True, "temperature": .01, "top_k": 1, "top_p": .001}, **QWEN_PARTS),
    "qwen2_5_vl": Real("qwen2_5_vl", "Qwen2", template=QWEN2, pictures=QWEN_PICTURES, generation={"do_sample": True, "repetition_penalty": 1.3, "temperature": 1e-6}, **QWEN_PARTS),
    "qwen3_vl": Real("qwen3_vl", "Qwen2", template=QWEN3, config={"vision_config": {"num_position_embeddings": 400}},
                     pictures=NORMAL | {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
                                        "size": {"shortest_edge": (18 * 16) ** 2, "longest_edge": (20 * 16) ** 2}},
                     generation={"do_sample": True, "temperature": .7, "top_k": 20, "top_p": .8}, **QWEN_PARTS),
    "gemma3": Real("gemma3", "Gemma", lambda: gemma("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"), GEMMA, "<end_of_turn>",
                   NORMAL | {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": None, "image_seq_length": 64, "size": square(112)},
                   tokens={"image_token_id": "<image_soft_token>", "boi_token_id": "<start_of_image>", "eoi_token_id": "<end_of_image>", "bos_token_id": "<bos>", "eos_token_id": "<eos>", "pad_token_id": "<pad>"},
                   processor={"image_seq_length": 64, "processor_class": "Gemma3Processor"}, named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
                   generation={"do_sample": True, "top_k": 64, "top_p": .95}, ends=("<eos>", "<end_of_turn>"), **BLOCKS),
    "mllama": Real("mllama", "byte-level, Llama 3's words", lambda: llama3("<|image|>"), MLLAMA, "<|eot_id|>",
                   NORMAL | {"image_processor_type": "MllamaImageProcessor", "do_convert_rgb": True, "do_pad": True, "max_image_tiles": 4, "size": square(112)}, tower(112),
                   {"image_token_id": "<|image|>", "bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|eot_id|>", "pad_token_id": "<|finetune_right_pad_id|>"},
                   generation={"do_sample": True, "temperature": .6, "top_p": .9}, ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), outside=1, shares=False),
    "paligemma": Real("paligemma", "Gemma", lambda: gemma("<image>"), PALIGEMMA, "<eos>",
                      NORMAL | {"image_processor_type": "SiglipImageProcessor", "image_seq_length": 64, "size": square(112), "processor_class": "PaliGemmaProcessor"}, tower(112),
                      {"image_token_id": "<image>", "bos_token_id": "<bos>", "eos_token_id": "<eos>", "pad_token_id": "<pad>"}, ends=("<eos>",), shares=False),
}
REAL["qwen3_vl, thinking"] = replace(REAL["qwen3_vl"], template=QWEN3_THINKING, tokenizer=lambda: qwen("<think>", "</think>"))

SMOL_TOKENS = {"image_token_id": "<image>", "bos_token_id": "<|im_start|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|im_end|>"}
FRAMES = {  # SmolLM2 itself, whose language model sees a picture through a tower that has learnt nothing
    "smollm2 in llava": replace(REAL["llava"], tokenizer=lambda: smollm2("<image>", whole=True), template=CHATML.replace("IMAGE", "{{ '<image>' }}"), end="<|im_end|>",
                                tokens=SMOL_TOKENS, ends=("<|im_end|>",)),
    "smollm2 in idefics3": replace(REAL["idefics3"], tokenizer=lambda: smollm2("<fake_token_around_image>", "<image>", END, "<global-img>", *ROWS, whole=True),
                                   template=CHATML.replace("IMAGE", "{{ '<image>' }}"), end="<|im_end|>", tokens=SMOL_TOKENS, ends=("<|im_end|>",), generation={}),
}


def published(name: str) -> Real: return REAL.get(name) or FRAMES[name]


# ---- Folders -------------------------------------------------------------------------------------------------------
def merged(old: dict, new: dict) -> dict: return old | {k: merged(old[k], v) if isinstance(v, dict) and isinstance(old.get(k), dict) else v for k, v in new.items()}


def with_tokens(config: dict, tok, own: Real) -> dict:
    "The configuration, its vocabulary's size and tokens' numbers those of the tokenizer, wherever it has such an entry."
    def entry(key, value):
        if isinstance(value, dict): return with_tokens(value, tok, own)
        if key == "vocab_size": return len(tok) - own.outside
        return tok.convert_tokens_to_ids(own.tokens[key]) if key in own.tokens else value
    return {k: entry(k, v) for k, v in config.items()}


def write_processor(name: str, folder: Path):
    "All but model and configuration, as published."
    own, write = published(name), lambda file, value: (folder / file).write_text(json.dumps(value, ensure_ascii=False))
    tok = deepcopy(own.tokenizer())
    tok.chat_template = None
    tok.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | own.named | ({"extra_special_tokens": own.named} if own.named else {})
    cls = FAMILIES[own.family].name + "Processor"
    write("tokenizer_config.json", config | {"processor_class": cls} | ({"chat_template": own.template} if own.kept == "tokenizer_config.json" else {}))
    write("preprocessor_config.json", own.pictures | {"processor_class": cls})
    if own.processor: write("processor_config.json", {"processor_class": cls} | own.processor)
    if own.kept == "chat_template.json": write("chat_template.json", {"chat_template": own.template})
    if own.kept == "chat_template.jinja": (folder / own.kept).write_text(own.template)


def write_config(name: str, folder: Path, **more):
    "All but the weights; `more` are further settings of the model."
    own = published(name)
    family = FAMILIES[own.family]
    folder.mkdir(parents=True, exist_ok=True)
    write_processor(name, folder)
    tok = AutoTokenizer.from_pretrained(folder)
    ends = tok.convert_tokens_to_ids(list(own.ends))
    config = getattr(transformers, family.name + "Config")(**with_tokens(merged(merged(family.config, own.config), more), tok, own))
    config.save_pretrained(folder)
    written = {"_from_model_config": True, "eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": tok.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(written | own.generation))
    return config


def write_model(name: str, folder: Path, precision: torch.dtype = torch.float32) -> Path:
    "A folder with a tiny model of the family, no weight of which is left at zero."
    config = write_config(name, folder)
    generation = (folder / "generation_config.json").read_text()
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[REAL[name].family].name + "ForConditionalGeneration")(config)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.1 * torch.randn_like(p))
    model.to(precision).save_pretrained(folder)
    (folder / "generation_config.json").write_text(generation)
    return folder


@lru_cache
def language_model():
    "SmolLM2, read once; its weights are copied and never written to."
    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)


def write_smollm2(frame: str, folder: Path, precision: torch.dtype = torch.float32, layers: int = 30) -> Path:
    "A folder with SmolLM2, or its first layers, as the language model of a frame."
    lm = language_model()
    text = {k: v for k, v in lm.config.to_dict().items() if not k.endswith("_token_id") and k != "quantization_config"} | {"num_hidden_layers": layers, "head_dim": lm.config.head_dim}
    config = write_config(frame, folder, text_config=text, tie_word_embeddings=True)
    generation = (folder / "generation_config.json").read_text()
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[FRAMES[frame].family].name + "ForConditionalGeneration")(config)
    language, state = model.get_submodule(anatomy(model).language), lm.model.state_dict()
    known = state.pop("embed_tokens.weight")
    with torch.no_grad(): language.embed_tokens.weight[:len(known)] = known  # the frame's own tokens come behind
    odd = language.load_state_dict(state, strict=False)
    assert odd.missing_keys == ["embed_tokens.weight"] and all(int(k.split(".")[1]) >= layers for k in odd.unexpected_keys)
    model.to(precision).save_pretrained(folder)
    (folder / "generation_config.json").write_text(generation)
    return folder
