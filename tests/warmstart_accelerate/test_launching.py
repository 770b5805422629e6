"""A launcher that started more processes than accelerate sees."""

from __future__ import annotations

import loops
import pytest
from accelerate import Accelerator

from warmstart_accelerate import warm_start


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_each_process_alone_is_a_warning_that_names_the_argument(source, monkeypatch, name):
    accelerator = Accelerator()  # started as torchrun does, without a GPU and without cpu=True
    monkeypatch.setenv(name, "2")
    with pytest.warns(UserWarning, match=r"started 2 processes and accelerate sees 1(.|\n)*Accelerator\(cpu=True\)"):
        warm_start(accelerator, loops.Net(), source, into="encoder")


def test_one_process_is_none(source, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    warm_start(Accelerator(cpu=True), loops.Net(), source, into="encoder")
