"""The stand-in itself; needs the standard library only. Options that the true programs don't know end it, as there."""
import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DTYPES = ["auto", "half", "float16", "bfloat16", "float", "float32"]
LOCK = threading.Lock()


def options(engine):
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("--model" if engine == "vllm" else "--model-path", dest="model", required=True)
    p.add_argument("--served-model-name", required=True)
    p.add_argument("--host", default=None)
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--dtype", choices=DTYPES, default="auto")
    p.add_argument("--seed" if engine == "vllm" else "--random-seed", dest="seed", type=int, default=0)
    if engine == "vllm":
        p.add_argument("--limit-mm-per-prompt", type=json.loads, default={})
        p.add_argument("--max-model-len", type=int)
    else:
        p.add_argument("--chat-template")
        p.add_argument("--enable-multimodal", action="store_true")
        p.add_argument("--context-length", type=int)
    return p.parse_args()


def note(**what):
    if file := os.environ.get("STANDIN_DIARY"):
        with LOCK, open(file, "a") as f: f.write(json.dumps(what) + "\n")


def weights(model):
    "Digest of a model folder's weights; the name where it is none."
    files = sorted(Path(model).glob("*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8] if files else model


def main(engine):
    said, (dies, _, where) = options(engine), os.environ.get("STANDIN_DIES", "").partition("@")
    if where and where != os.environ.get("CUDA_VISIBLE_DEVICES"): dies = ""
    if os.environ.get("STANDIN_DEAF"): signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # it inherits what is ignored
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    note(what="start", pid=os.getpid(), worker=worker.pid, gpu=gpu, argv=sys.argv[1:], path=os.environ.get("PYTHONPATH"))
    print(f"loading {said.model}", flush=True)
    time.sleep(float(os.environ.get("STANDIN_SLOW", 0)) / 2)
    if dies == "start": sys.exit("ValueError: No available memory for the cache blocks")
    name, digest, calls = said.served_model_name, weights(said.model), [0]
    ready = time.monotonic() + float(os.environ.get("STANDIN_SLOW", 0)) / 2

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_): pass

        def reply(self, code, body):
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if self.path == "/health": return self.reply(200 if time.monotonic() > ready else 503, b"")
            self.reply(200, json.dumps({"object": "list", "data": [{"id": name, "object": "model", "created": 1, "owned_by": engine}]}).encode())

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with LOCK: calls[0] += 1
            if dies and dies != "start" and calls[0] > int(dies):
                print("torch.OutOfMemoryError: CUDA out of memory", flush=True)
                os._exit(1)
            if asked["model"] != name: return self.reply(404, json.dumps({"error": {"message": f"no model {asked['model']}"}}).encode())
            parts = asked["messages"][-1]["content"]
            text = next(p["text"] for p in parts if p["type"] == "text")
            note(what="call", pid=os.getpid(), gpu=gpu, text=text, image=hashlib.sha256(parts[0]["image_url"]["url"].encode()).hexdigest()[:8])
            said = f"word {hashlib.sha256(text.encode()).hexdigest()[:6]} {digest}"
            self.reply(200, json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": name,
                                        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
                                        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]}).encode())

    print("Application startup complete.", flush=True)
    ThreadingHTTPServer((said.host or "0.0.0.0", said.port), Handler).serve_forever()
