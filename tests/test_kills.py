"""Kill -9 at random moments; see ``kills.py``.

``T3C_KILLS`` sets how many of each of train, tune, lower and certify; without it one each of train and lower, whose
other tests do not kill. ``T3C_FUZZ_SEED`` says at which moments (drawn and printed when not given).
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = os.environ.get("T3C_KILLS")
SEED = int(os.environ.get("T3C_FUZZ_SEED", str(random.SystemRandom().randrange(2**32))))


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ("train", "tune", "lower", "certify") if KILLS else ("train", "lower")
    command = [
        sys.executable,
        str(Path(__file__).with_name("kills.py")),
        str(tmp_path),
        str(SEED),
        KILLS or "1",
        *steps,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    with capsys.disabled():
        print(f"\nkills, T3C_FUZZ_SEED={SEED}\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in done.stdout.splitlines()] == list(steps)
