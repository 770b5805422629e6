"""What every host does in the same order: apply once, check when training starts, guard the frozen, carry lineage.

Hosts say *when*; nothing here knows a host.
"""

from warmstart.lifecycle.holding import OnFreezeChange
from warmstart.lifecycle.lifecycle import Lifecycle
from warmstart.lifecycle.schedule import UnfreezeUnit
from warmstart.lifecycle.settings import Settings

__all__ = ["Lifecycle", "OnFreezeChange", "Settings", "UnfreezeUnit"]
