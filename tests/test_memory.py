"""Memory that is at its end is told as such, with what was asked for, on a CPU too."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cnnlab.machine.memory import available, is_out_of_memory, out_of_memory

HUNGRY = """
import resource, sys
from cnnlab.cli import main
import cnnlab.building.builder, cnnlab.train, cnnlab.verbs.train
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 300 * 2**20,) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_training_that_does_not_fit_a_cpus_memory_says_what_it_asked_for(tmp_path):
    overrides = ["data=shapes", "data.size=64", "data.train=64", "data.val=8", "data.test=8", "model=resnet",
                 "model.width=64", "trainer.batch_size=64", "trainer.device=cpu", "trainer.precision=fp32",
                 "stats=off", "trainer.threads=1", f"hydra.run.dir={tmp_path}/run", "data.limit=null"]  # fmt: skip
    answer = subprocess.run(
        [sys.executable, "-c", HUNGRY, "train", *overrides], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert answer.returncode == 1
    assert "this process has not enough memory (" in answer.stderr
    assert "MiB were asked for, about" in answer.stderr
    assert "trainer.accumulate=2" in answer.stderr
    assert "fault of cnnlab" not in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2097152 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("not enough memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one
    if "tried to allocate" in str(error):
        assert "2.0 MiB were asked for" in out_of_memory(error)
        assert (available() or 0) >= 0


SPARED = """
import resource
from cnnlab.machine.memory import available, spared
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 100 * 2**20,) * 2)
before = available()
with spared(64 << 20):
    print(before - available() >= 64 << 20)
print(before - available() < 1 << 20)
with spared(1 << 62):
    print("whatever cannot be had")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits are told by /proc")
def test_what_is_spared_counts_against_the_limit_and_is_given_back():
    answer = subprocess.run([sys.executable, "-c", SPARED], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == ["True", "True", "whatever cannot be had"]
