"""The words around a meeting; real processes meet in distributed/test_agreement.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from warmstart import MappingError
from warmstart.loading import meeting


@pytest.mark.parametrize(
    ("numbers", "spans"),
    [([0], ["0"]), ([0, 1], ["0, 1"]), ([0, 1, 2, 5], ["0-2", "5"]), ([1, 3, 4], ["1", "3, 4"]), ([], [])],
)
def test_many_ranks_are_named_in_few_words(numbers, spans):
    assert meeting._spans(numbers) == spans


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the kernel says nothing of its processes here")
def test_a_process_that_has_ended_is_known_even_before_its_parent_asks():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = meeting._born(process.pid)
    assert born
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still in the table
    assert meeting._born(process.pid) == ""
    process.wait()
    process.stdin.close()
    assert meeting._born(process.pid) != born


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv(meeting.TIMEOUT_VARIABLE, text)
    with pytest.raises(MappingError, match=rf"{meeting.TIMEOUT_VARIABLE}='{text}': a number of seconds"):
        meeting._limit()
