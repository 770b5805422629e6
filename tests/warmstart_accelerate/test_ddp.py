"""Two real processes under DistributedDataParallel, as the launchers start them."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import loops
import pytest
import torch

FOLDER = Path(__file__).parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]

pytestmark = pytest.mark.slow


def launch(command: list[str], *args: object, timeout: int = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """A server of a folder's files, and how many bytes it has sent of them for each request."""
    sent: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (folder / self.path.strip("/")).read_bytes()
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), int(asked[2] or len(content) - 1)) if asked else (0, len(content) - 1)
            part = content[first : last + 1]
            sent.append(len(part))
            self.send_response(206 if asked else 200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in each case; one launch for all, since a launch costs seconds."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.save(loops.trained_encoder(loops.Smooth), folder / "encoder.pt")
    shutil.copy(folder / "encoder.pt", folder / "only-0.pt")
    shutil.copy(folder / "encoder.pt", folder / "other-0.pt")
    torch.save({"x": torch.ones(1)}, folder / "other-1.pt")
    (folder / "served").mkdir()
    shutil.copy(folder / "encoder.pt", folder / "served")
    with serving(folder / "served") as (url, asked), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FETCHED", f"{url}/encoder.pt")
        patch.setenv("WARMSTART_CACHE", str(folder / "cache"))
        patch.setenv("no_proxy", "127.0.0.1")
        done = launch([*ACCELERATE, "--main_process_port", "0"], FOLDER / "ddp_script.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "asked.json").write_text(json.dumps(asked))
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    return folder, seen


@pytest.fixture(scope="module")
def alone(ranks):
    """The same loop on one process with all of the batch, and with a load by hand."""
    folder, _ = ranks
    loops.fresh()
    ours = loops.train(folder / "encoder.pt", kind=loops.Smooth, freeze="encoder.0")
    loops.fresh()
    return ours


def test_all_ranks_start_from_the_values_of_the_file_and_agree_on_the_report(ranks):
    folder, (zero, one) = ranks
    assert zero["loaded"]["wrapped"] == one["loaded"]["wrapped"] == "DistributedDataParallel"
    assert zero["loaded"]["start"] == one["loaded"]["start"]
    for name, value in torch.load(folder / "encoder.pt").items():
        assert zero["loaded"]["start"][f"encoder.{name}"] == value.tolist()
    assert zero["loaded"]["digest"] == one["loaded"]["digest"]
    assert zero["loaded"]["status"] == one["loaded"]["status"] == "applied"


def test_one_process_two_processes_and_a_load_by_hand_train_alike(ranks, alone):
    _, (zero, one) = ranks
    assert zero["loaded"]["start"] == {k: v.tolist() for k, v in alone.start.items()}
    assert alone.report.plan.digest() == zero["loaded"]["digest"]
    mean = [(a + b) / 2 for a, b in zip(zero["loaded"]["losses"], one["loaded"]["losses"], strict=True)]
    assert mean == pytest.approx(alone.losses, abs=1e-5)
    assert zero["loaded"]["end"] == one["loaded"]["end"]
    for name, value in loops.weights(alone.model).items():
        assert torch.tensor(zero["loaded"]["end"][name]).allclose(value, atol=1e-5), name


def test_a_run_that_is_resumed_keeps_its_own_on_all_ranks_also_without_the_file(ranks):
    _, seen = ranks
    for each in seen:
        for case in ("resumed", "file is gone"):
            assert each[case]["start"] == seen[0]["loaded"]["end"]
            assert each[case]["status"] == "superseded-by-resume"
            assert "encoder.0.weight" not in each[case]["trainable"]


def test_the_report_is_written_once(ranks):
    folder, _ = ranks
    assert json.loads((folder / "run" / "warmstart.json").read_text())["status"] == "applied"


def test_field_note_34_what_is_released_later_trains_alike_on_all_ranks(ranks):
    folder, (zero, one) = ranks
    assert zero["staged"]["end"] == one["staged"]["end"]
    source = torch.load(folder / "encoder.pt")
    assert zero["staged"]["end"]["encoder.0.weight"] != source["0.weight"].tolist()
    assert zero["staged"]["end"]["encoder.2.weight"] == source["2.weight"].tolist()


def test_the_wrapper_must_bear_what_is_released_later(ranks):
    for seen in ranks[1]:
        assert seen["cannot bear unused"]["error"] == "TimingError"
        assert "DistributedDataParallelKwargs(find_unused_parameters=True)" in seen["cannot bear unused"]["message"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("load after prepare", "is wrapped in DistributedDataParallel already"),
        ("freeze after prepare", "whose reducer would wait for the frozen parameters"),
        ("release after prepare", "each rank would train its own"),
    ],
)
def test_wrong_order_is_an_error_at_that_line(ranks, case, words):
    for seen in ranks[1]:
        assert seen[case]["error"] == "TimingError"
        assert words in seen[case]["message"]


def test_field_note_38_what_one_rank_alone_overwrites_is_named_on_all(ranks):
    for seen in ranks[1]:
        assert seen["overwritten on rank 1"]["error"] == "VerificationError"
        assert seen["overwritten on rank 1"]["tensors"] == ["encoder.0.bias"]
        assert "rank 1" in seen["overwritten on rank 1"]["message"]


def test_a_file_that_one_rank_has_is_enough_if_it_reads_for_the_others(ranks):
    _, seen = ranks
    for each in seen:
        case = each["rank 0 reads for rank 1"]
        assert case["status"] == "applied"
        assert case["start"] == seen[0]["loaded"]["start"]
        assert case["end"] == seen[0]["loaded"]["end"]
        assert case["trainable"] == seen[0]["loaded"]["trainable"]
        assert each["nobody has a file"]["error"] == "CheckpointError"
        assert "nowhere.pt" in each["nobody has a file"]["message"]


def test_what_has_to_be_fetched_is_fetched_once_for_the_processes_of_a_node(ranks):
    folder, (zero, one) = ranks
    assert zero["fetched"]["status"] == one["fetched"]["status"] == "applied"
    assert zero["fetched"]["start"] == one["fetched"]["start"]
    assert zero["fetched"]["start"]["encoder.0.weight"] == zero["loaded"]["start"]["encoder.0.weight"]
    first, rest, second = json.loads((folder / "asked.json").read_text())  # of the other process only what it is
    assert first + rest == (folder / "encoder.pt").stat().st_size
    assert second == first < rest


@pytest.mark.parametrize("case", ["rank 1 has no file", "rank 1 has no file, frozen by name"])
def test_field_note_39_a_file_that_one_rank_lacks_is_the_same_error_on_all(ranks, case):
    zero, one = ranks[1]
    assert zero[case]["error"] == one[case]["error"] == "CheckpointError"
    assert zero[case]["message"] == one[case]["message"]
    assert "only-1.pt" in zero[case]["message"]
    assert 'read="broadcast"' in zero[case]["message"]


@pytest.mark.parametrize("case", ["rank 1 has another file", "rank 1 has another model"])
def test_field_note_24_ranks_that_differ_get_the_same_error(ranks, case):
    zero, one = ranks[1]
    assert zero[case]["error"] == one[case]["error"] == "MappingError"
    assert zero[case]["message"] == one[case]["message"]
    assert "rank 1" in zero[case]["message"]
