"""What a result says of the machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch

from budgeted.machine import device_name, versions

ROOT = Path(__file__).resolve().parent.parent

PEAK = """
import torch
from budgeted.machine import forget_peak_memory, peak_memory
cpu = torch.device("cpu")
block = torch.ones(2**28, dtype=torch.uint8)  # 256 MiB
before = peak_memory(cpu)
del block
forget_peak_memory(cpu)
print(before - peak_memory(cpu))
"""


def test_the_peak_of_memory_is_forgotten_between_runs():
    """In a process of its own: one that has run many tests may keep freed memory."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) > 2**27


def test_a_cpu_is_named_with_its_cores():
    assert device_name(torch.device("cpu")).startswith("cpu: ") and device_name(torch.device("cpu")).endswith(" cores")


def test_versions_are_of_what_is_installed():
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["python"] == platform.python_version() and None not in found.values()
