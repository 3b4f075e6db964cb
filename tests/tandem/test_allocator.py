"""Freed memory is used again, and what is there for good is left alone, in processes that ask for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
from tandem.allocator import keep_pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(48 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {asked}:
    keep_pages()
faults()
print(faults())
"""


def faults_of_the_second_chunk(asked: bool, **environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNT_FAULTS.format(asked=asked)]
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_kept_unless_the_environment_says_otherwise() -> None:
    assert faults_of_the_second_chunk(False) > 20 * (faults_of_the_second_chunk(True) + 1)
    assert faults_of_the_second_chunk(True, MALLOC_ARENA_MAX="2") > 20


def test_the_collector_passes_over_what_was_loaded() -> None:
    code = """
import gc
import deploy.local
from tandem.allocator import keep_objects

keep_objects()
later = [[]]
print(len(gc.get_objects()), gc.get_freeze_count())
later[0].append(later)
del later
print(gc.collect())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, kept, collected = map(int, done.stdout.split())
    assert left < kept / 100
    assert collected >= 1, "what comes later is still looked at"
