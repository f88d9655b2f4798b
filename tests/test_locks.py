"""One writer at a time, however closely many follow each other."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safeeraser.core import only_here, SafeEraserError

WRITER = """
import os, sys, time
from pathlib import Path
from safeeraser.core import only_here, SafeEraserError
place, end, held = Path(sys.argv[1]), time.time() + 4, 0
while time.time() < end:
    try:
        with only_here(place):
            os.close(os.open(place.with_name("inside"), os.O_CREAT | os.O_EXCL))  # fails where another is inside
            time.sleep(.0002)
            os.unlink(place.with_name("inside"))
            held += 1
    except SafeEraserError: pass
print(held)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a lock's file stays there")
def test_no_two_processes_are_inside(tmp_path):
    "Each removes the lock's file as it leaves, while others are about to lock it."
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent) for _ in range(4)]
    for writer in writers:
        said, wrong = writer.communicate(timeout=120)
        assert writer.returncode == 0, wrong[-500:]
        assert int(said) > 20
    assert not list(tmp_path.iterdir())


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    (tmp_path / ".x.lock").touch()
    with only_here(tmp_path / "x"), pytest.raises(SafeEraserError, match="another process is writing there"), only_here(tmp_path / "x"): pass
    assert not os.listdir(tmp_path)
