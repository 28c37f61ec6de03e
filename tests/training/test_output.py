"""Output that nobody reads any more."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging, sys
from tqdm import tqdm
from d2_mgd.training import lasting_output
with lasting_output():
    logging.basicConfig(stream=sys.stdout)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in tqdm(range(3), mininterval=0):
        print("to nobody", flush=number == 0)
        logging.error("to nobody")
    print("and what is left in the buffer")
sys.exit(130)
"""


def test_a_program_whose_reader_is_gone_ends_with_its_own_status() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 130
