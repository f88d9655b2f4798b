"""What is measured on: a LLaVA of random weights, a processor of its own, and records of known lengths.

Weights are random because speed and memory do not depend on them; geometry is LLaVA-1.5's (336 px, 576 image tokens).
"""
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from safeeraser.data import Item
from safeeraser.slots import Row
from safeeraser.templates import word_processor
from safeeraser.loss import Objective

QUESTION, REFUSAL = 20, 12   # words
RETAIN = .7                  # a retain answer's mean length, in forget answers'
QUESTIONS = 4                # of each set, a record
WORDS = "<pad> <s> </s> <unk> <image> USER: ASSISTANT:".split()
PREAMBLE = 21                # words in front of the image, as many tokens as LLaVA-1.5's system prompt takes


@dataclass(frozen=True)
class Shape:
    "Sizes of vision tower and language model."
    vision: dict
    text: dict
    words: int          # size of the vocabulary
    pixels: int = 336
    patch: int = 14


_CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=768)
SHAPES = {
    # Llama 512 x 8 with 4,096 words: a head as small a part of the whole as it is in a 7B
    "cpu": Shape(dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, projection_dim=64),
                 dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8), 4096),
    "7b": Shape(_CLIP_L, dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32), 32064),
    "tiny": Shape(dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=16),
                  dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4), 512, 56),
}


def build_model(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    "A randomly initialised LLaVA, in evaluation mode."
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    torch.manual_seed(0)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(vision_config=dict(model_type="clip_vision_model", image_size=shape.pixels, patch_size=shape.patch) | shape.vision,
                         text_config=dict(model_type="llama", vocab_size=shape.words, max_position_embeddings=4096) | special | shape.text,
                         image_token_index=WORDS.index("<image>"), tie_word_embeddings=False)
    config._attn_implementation, before = "sdpa", torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device): model = LlavaForConditionalGeneration(config).eval()
    finally: torch.set_default_dtype(before)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, -1  # never ends by itself: all answers are as long
    return model


def build_processor(shape: Shape):
    "A real LLaVA processor whose words are `w7 w8 ...`, one token each."
    preamble = " ".join(f"w{k}" for k in range(10, 10 + PREAMBLE))
    template = ("{% for m in messages %}{% if m.role == 'user' %}<s> " + preamble + " USER: {% for c in m.content %}"
                "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}ASSISTANT: "
                "{% else %}{% for c in m.content %}{{ c.text }} {% endfor %}</s>{% endif %}{% endfor %}")
    return word_processor(WORDS + [f"w{k}" for k in range(len(WORDS), shape.words)], shape.pixels, shape.patch, template)


@dataclass(frozen=True)
class Record:
    "The rows of one record: four forget items with a retain item and a prompt-decouple partner each."
    forget: list[Row]
    refusal: list[Row]
    retain: list[Row]
    decouple: list[Row]

    def rows(self, objective: Objective) -> list[Row]:
        "Those that an objective reads, an item's beside each other."
        kinds = [getattr(self, k) for k in objective.kinds]
        return [row for together in zip(*kinds) for row in together]


def make_records(folder: Path,                # where images are written
                 shape: Shape,
                 mean_answer: int,            # tokens of a forget answer and of its partner's, on average
                 n: int = 1,
                 questions: int = QUESTIONS,  # of each set, a record
                 per_safe_image: int = 1,     # records that ask about the same safe image
                 seed: int = 0) -> list[Record]:
    "Records with log-normal answer lengths (sigma 0.4)."
    g = torch.Generator().manual_seed(seed)
    words = lambda k: " ".join(f"w{w}" for w in torch.randint(64, shape.words, (k,), generator=g).tolist())
    size = lambda mean: max(2, round(mean * float(torch.exp(.4 * torch.randn((), generator=g) - .08))))  # exp(mu + sigma^2 / 2) = mean
    def image(name: str) -> Path:
        file = folder/f"{name}.png"
        noise = torch.randint(256, (shape.pixels, shape.pixels, 3), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(file)
        return file
    def item(kind: str, path: Path, question: str, mean: int) -> Item: return Item(kind, "train", path, path.name, question, words(size(mean)), "shape")
    def record(k: int) -> Record:
        harmful, safe, asked = image(f"harmful-{k}"), image(f"safe-{k // per_safe_image}"), [words(QUESTION) for _ in range(questions)]
        forget = [item("forget", harmful, q, mean_answer) for q in asked]
        return Record([Row("forget", i, i.answer) for i in forget], [Row("refusal", i, words(REFUSAL)) for i in forget],
                      [Row("retain", i, i.answer) for i in (item("retain", harmful, words(QUESTION), round(RETAIN * mean_answer)) for _ in asked)],
                      [Row("decouple", i, i.answer) for i in (item("decouple", safe, q, mean_answer) for q in asked)])
    return [record(k) for k in range(n)]


def tokens_of(row: Row, encoder) -> tuple[int, int]:
    "Tokens of the image with what is before it, and of the question with its answer."
    prompt, answer, _ = encoder.texts(row.item.question, row.answer)
    prefix, behind = (prompt + answer).split("<image>")
    image = (encoder.processor.image_processor.crop_size["height"] // encoder.processor.patch_size) ** 2
    return len(encoder.processor.tokenizer(prefix).input_ids) + image, len(encoder.processor.tokenizer(behind).input_ids)


def token_counts(records: list[Record], objective: Objective, encoder) -> tuple[float, float]:
    """Tokens that one row a question encodes in a step, and those that must be encoded: an image's once, a question's and an answer's once.

    With frozen weights a training token costs twice a token of the reference pass, which therefore counts half.
    """
    def cost(kinds: tuple[str, ...]) -> tuple[int, int]:
        rows = [row for r in records for k in kinds for row in getattr(r, k)]
        sizes = [tokens_of(row, encoder) for row in rows]
        images = {row.item.image: prefix for row, (prefix, _) in zip(rows, sizes)}
        return sum(a + b for a, b in sizes), sum(images.values()) + sum(b for _, b in sizes)
    apart, shared = cost(objective.kinds)
    reference_apart, reference_shared = cost(objective.reference_kinds)
    return apart + reference_apart / 2, shared + reference_shared / 2


def token_limit(records: list[Record], objective: Objective, encoder) -> float:
    "What packing alone can at most save: the ratio of `token_counts`."
    apart, shared = token_counts(records, objective, encoder)
    return apart / shared


SAMPLES = 3  # answers to each harmful question, as the published evaluation draws


def asked(records: list[Record]) -> list[Item]:
    "What an evaluation asks about each record: harmful questions three times, and harmless ones on both images."
    return [row.item for r in records for row in [*r.forget * SAMPLES, *r.retain, *r.decouple]]


def generation_limit(items: list[Item], encoder, new_tokens: int) -> float:
    "Tokens that one answer at a time reads and writes, over those that must be."
    sizes = [tokens_of(Row("forget", i, ""), encoder) for i in items]
    images = {i.image: prefix for i, (prefix, _) in zip(items, sizes)}
    apart = sum(a + b + new_tokens for a, b in sizes)
    return apart / (sum(images.values()) + sum(b + new_tokens for _, b in sizes))
