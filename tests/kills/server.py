"""A process that has everything imported and runs one command after another, each in a fork of its own.

Reads a line of JSON a trial: `argv`, `root` (whose files are watched), `how`, `at`; answers `code` (negative: the signal it died of),
`operations` and what was said. Started with `shim.c` preloaded. A fork costs nothing, where a fresh interpreter takes seconds.
"""
import ctypes
import json
import os
import sys
import tempfile

import peft  # noqa: F401  (what the verbs import late, once for all)
import torch  # noqa: F401
import transformers  # noqa: F401

import safeeraser.cli as cli
import safeeraser.report  # noqa: F401
import safeeraser.export  # noqa: F401
import safeeraser.judges  # noqa: F401
import safeeraser.convert  # noqa: F401
import safeeraser.page  # noqa: F401
import safeeraser.trainer  # noqa: F401
import safeeraser.tiny_llava  # noqa: F401

HOW = {"count": 1, "before": 2, "after": 3, "half": 4, "full": 5}


def trial(argv: list[str], root: str, how: str, at: int) -> dict:
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            ctypes.CDLL(None).arm(root.encode(), HOW[how], at, log.fileno())
            sys.argv = ["safeeraser", *argv]
            try: cli.main()
            except SystemExit as e: code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            else: code = 0
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0), log.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "said": said.read().decode("utf-8", "replace")[-3000:], "log": log.read().decode().splitlines()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes elsewhere
    for line in sys.stdin: print(json.dumps(trial(**json.loads(line))), file=answers, flush=True)
