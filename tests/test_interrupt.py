"""Ctrl-C is not lost, whatever Python is doing when it comes."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import signal, sys, time
import typer
import proper_ds.cli as cli

class Busy:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # as if Ctrl-C came now: what is raised here, Python ignores

def run(standalone_mode):
    busy = Busy()
    del busy
    time.sleep(20)
    sys.exit("the interrupt was lost")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
cli.app = run
cli.main()
"""


def test_an_interrupt_during_a_finalizer_ends_the_command():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert "lost" not in done.stderr
