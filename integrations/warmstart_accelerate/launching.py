"""Whether accelerate sees the processes that the launcher started."""

from __future__ import annotations

import os
import warnings

from accelerate import Accelerator

_ASKED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun's, and those of MPI


def warn_if_alone(accelerator: Accelerator) -> None:
    """Warn where the launcher started more processes than accelerate found: each of them would train by itself."""
    asked = max((int(value) for name in _ASKED if (value := os.environ.get(name, "")).isdecimal()), default=1)
    if asked > accelerator.num_processes:
        warnings.warn(
            f"warmstart: the launcher started {asked} processes and accelerate sees {accelerator.num_processes}, so that each "
            "trains alone, on all of the data, and writes over the files of the others\n"
            "  -> on CPUs: Accelerator(cpu=True)",
            UserWarning,
            stacklevel=3,
        )
