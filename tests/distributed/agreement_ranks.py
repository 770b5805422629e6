"""Run by test_agreement.py as `python agreement_ranks.py WHAT FOLDER`: one of several gloo processes.

`table` runs every cell that all ranks survive, and leaves what this rank saw in a file of its own; each other name is a
way in which a rank is killed.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import warmstart
from warmstart.lifecycle import Lifecycle, Settings
from warmstart.loading import agreement
from warmstart.mapping.pretrained import Pretrained

WHAT, FOLDER, RANK, WORLD = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CELLS: dict[str, Callable[[], object]] = {}


class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        torch.manual_seed(RANK)  # what is equal on all ranks was loaded
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))


def cell(run: Callable[[], object]) -> None:
    CELLS[run.__name__] = run


def mine(odd: int, name: str, other: str) -> Path:
    """A file of this rank's own, as if each rank were on a node of its own; another one on rank `odd`."""
    path = FOLDER / f"node-{RANK}" / f"{sys._getframe(1).f_code.co_name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    source = FOLDER / (other if odd == RANK else name)
    if source.exists():
        shutil.copy(source, path)
    return path


def loaded(net: nn.Module, path: Path) -> bool:
    expected = load_file(path)
    return all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


def attempt(net: nn.Module, run: Callable[[], object]) -> dict[str, object]:
    """What a call did: its error, and whether the model was left as it was."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        run()
        found: dict[str, object] = {"type": None}
    except Exception as error:
        report = getattr(error, "report", None)
        found = {
            "type": type(error).__name__,
            "message": str(error),
            "written": list(getattr(error, "written", ())),
            "status": report.status if report is not None else None,
        }
    found["untouched"] = all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return found


def failing_at(plan: warmstart.Plan, key: str, fail: Callable[[], None]) -> None:
    """Let something happen on rank 1 just before it looks where a tensor lies, to move it."""
    checkpoint = plan.parts[0].checkpoint
    place = checkpoint.place

    def failing(name):
        if name == key and RANK == 1:
            fail()
        return place(name)

    checkpoint.place = failing


@cell
def healthy():
    net, path = Net(), FOLDER / "good.safetensors"
    reports = [warmstart.load(net, path, freeze="a"), warmstart.plan(net, path).apply(verify="sample")]
    return {
        "loaded": loaded(net, path),
        "status": [r.status for r in reports],
        "frozen": not net.a.weight.requires_grad,
    }


@cell
def file_missing_on_one():
    net = Net()
    path = mine(1, "good.safetensors", "none")
    return attempt(net, lambda: warmstart.load(net, path))


@cell
def stale_copy_on_one():
    net = Net()
    path = mine(2, "good.safetensors", "stale.safetensors")
    return attempt(net, lambda: warmstart.load(net, path))


@cell
def other_header_on_one():
    net = Net()
    path = mine(3, "good.safetensors", "reordered.safetensors")
    return attempt(net, lambda: warmstart.load(net, path))


@cell
def stale_state_dict_on_one():
    net, source = Net(), load_file(FOLDER / "good.safetensors")
    if RANK == 2:
        source["b.bias"] += 1
    return attempt(net, lambda: warmstart.load(net, source))


@cell
def plan_differs():
    net = Net()
    left = ["a.bias"] if RANK == 1 else ["b.bias"]
    return attempt(net, lambda: warmstart.load(net, FOLDER / "good.safetensors", exclude=left))


@cell
def model_differs():
    net = Net()
    if RANK == 3:
        net.register_buffer("extra", torch.zeros(2))
    return attempt(net, lambda: warmstart.load(net, FOLDER / "good.safetensors", allow_missing="?extra"))


@cell
def call_differs():
    net = Net()
    return attempt(net, lambda: warmstart.load(net, FOLDER / "good.safetensors", verify="full" if RANK else "off"))


@cell
def planning_fails_on_one():
    net = Net()
    rules = {"nothing": "x"} if RANK == 2 else {"?nothing": "x"}
    return attempt(net, lambda: warmstart.load(net, FOLDER / "good.safetensors", rename=rules))


@cell
def source_cannot_be_opened_anywhere():
    net = Net()
    return attempt(net, lambda: warmstart.load(net, FOLDER / "nowhere.safetensors"))


@cell
def wrong_call_on_one():
    net = Net()
    source = 3 if RANK == 1 else FOLDER / "good.safetensors"
    return attempt(net, lambda: warmstart.load(net, source))


@cell
def wrong_call_everywhere():
    net = Net()
    return attempt(net, lambda: warmstart.load(FOLDER / "good.safetensors", net))


@cell
def file_changes_after_planning():
    net = Net()
    path = mine(-1, "good.safetensors", "")
    plan = warmstart.plan(net, path)
    if RANK == 1:
        os.utime(path, (1, 1))
    return attempt(net, plan.apply)


@cell
def rank_raises_midway():
    net = Net()
    plan = warmstart.plan(net, FOLDER / "good.safetensors")

    def fail():
        raise RuntimeError("midway")

    failing_at(plan, "b.weight", fail)
    return attempt(net, plan.apply)


@cell
def disk_error_on_one_shard():
    net = Net()
    folder = FOLDER / f"node-{RANK}" / "sharded"
    shutil.copytree(FOLDER / "sharded", folder)
    plan = warmstart.plan(net, folder)
    failing_at(plan, "c.weight", lambda: os.truncate(folder / "model-00002-of-00002.safetensors", 8))
    return attempt(net, plan.apply)


@cell
def called_on_rank_0_only():
    """Twice, then by the others alone, then by all: who did not come before is where the others are by now."""
    group, net, path = dist.new_group(), Net(), FOLDER / "good.safetensors"
    tried = []
    os.environ["WARMSTART_TIMEOUT"] = "2"
    try:
        for called in (RANK == 0, RANK == 0, RANK != 0):
            if called:
                tried.append(attempt(net, lambda: warmstart.load(net, path, group=group)))
            dist.barrier()
    finally:
        del os.environ["WARMSTART_TIMEOUT"]
    warmstart.load(net, path, group=group)
    return {"tried": tried, "loaded": loaded(net, path)}


@cell
def another_step_on_one():
    net = Net()

    def run():
        if RANK == 3:
            with agreement.raised_on_all("validation"):
                pass
        else:
            warmstart.load(net, FOLDER / "good.safetensors")

    return attempt(net, run)


def slowly(net: nn.Module, at: str) -> dict[str, object]:
    """Rank 1 plans, or writes, longer than a rank that does not come is waited for."""
    os.environ["WARMSTART_TIMEOUT"] = "2"

    def run():
        with agreement.failing_on_all("load"):
            if at == "planning" and RANK == 1:
                time.sleep(3.5)
            plan = warmstart.plan(net, FOLDER / "good.safetensors")
            if at == "writing":
                failing_at(plan, "b.weight", lambda: time.sleep(3.5))
            plan.apply()

    try:
        return attempt(net, run) | {"loaded": loaded(net, FOLDER / "good.safetensors")}
    finally:
        del os.environ["WARMSTART_TIMEOUT"]


@cell
def slow_planning_is_waited_for():
    return slowly(Net(), "planning")


@cell
def slow_writing_is_waited_for():
    return slowly(Net(), "writing")


@cell
def nonsense_timeout():
    os.environ["WARMSTART_TIMEOUT"] = "soon"
    net = Net()
    try:
        return attempt(net, lambda: warmstart.load(net, FOLDER / "good.safetensors"))
    finally:
        del os.environ["WARMSTART_TIMEOUT"]


@cell
def two_groups_side_by_side():
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stage = RANK // 2
    net, path = Net(4 + stage), FOLDER / ("wide.safetensors" if stage else "good.safetensors")
    for _ in range(1 + stage):  # not the same number of meetings either
        warmstart.load(net, path, group=groups[stage])
    foreign = attempt(net, lambda: warmstart.load(net, path, group=groups[1 - stage]))
    return {"loaded": loaded(net, path), "foreign": foreign}


@cell
def one_group_fails_alone():
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = Net()
    path = mine(3, "good.safetensors", "none")
    return attempt(net, lambda: warmstart.load(net, path, group=groups[RANK // 2]))


@cell
def host_whose_file_is_gone_on_one():
    net, life = Net(), Lifecycle(Settings([Pretrained(mine(1, "good.safetensors", "none"), freeze="a")]))
    return attempt(net, lambda: life.apply(net))


@cell
def host_whose_file_is_gone_everywhere():
    net, life = Net(), Lifecycle(Settings([Pretrained(FOLDER / "nowhere.safetensors", freeze="a")]))
    life.apply(net)  # a resume may still come
    return attempt(net, lambda: life.start(net, resumed=False))


@cell
def host_finds_corruption_on_one():
    net, life = Net(), Lifecycle(Settings([Pretrained(FOLDER / "good.safetensors")]))
    life.apply(net)
    if RANK == 1:
        with torch.no_grad():
            net.b.weight[0, 0] += 1
    return attempt(net, lambda: life.start(net, resumed=False))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_midway():
    net = Net()
    plan = warmstart.plan(net, FOLDER / "good.safetensors")
    failing_at(plan, "b.weight", die)
    plan.apply()


def killed_before_it_comes():
    warmstart.load(Net(), FOLDER / "good.safetensors")
    if RANK == 1:
        die()
    warmstart.load(Net(), FOLDER / "good.safetensors")


def killed_before_anything():
    os.environ["WARMSTART_TIMEOUT"] = "3"
    if RANK == 1:
        die()
    warmstart.load(Net(), FOLDER / "good.safetensors")


def keeper_of_the_store_killed():
    warmstart.load(Net(), FOLDER / "good.safetensors")
    if RANK == 0:
        die()
    warmstart.load(Net(), FOLDER / "good.safetensors")


def other_rank_goes_on_without():
    os.environ["WARMSTART_TIMEOUT"] = "3"
    if RANK == 0:
        warmstart.load(Net(), FOLDER / "good.safetensors")
    dist.barrier()  # what training would do next


if __name__ == "__main__":
    if WHAT == "table":
        store = dist.FileStore(str(FOLDER / "store"), WORLD)
    else:
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, WORLD, RANK == 0, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD)
    if WHAT != "table":
        globals()[WHAT]()
        os._exit(0)
    found = {}
    for name, run in CELLS.items():
        print(name, flush=True)
        found[name] = run()
        dist.barrier()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads abort an interpreter that ends by itself, about one in eight
