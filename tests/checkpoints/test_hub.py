from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save, save_file

import warmstart
from warmstart.checkpoints.places import HubPlace, hub_place, is_gone, looks_local
from warmstart.errors import CheckpointError
from warmstart.lifecycle import Lifecycle, Settings
from warmstart.tensors import same_bits

COMMIT = "1234567890abcdef1234567890abcdef12345678"
A = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
B = {"b.weight": torch.full((3,), 2.0, dtype=torch.bfloat16)}
INDEX = {"metadata": {"total_size": 38}, "weight_map": {**dict.fromkeys(A, "model-00001-of-00002.safetensors"),
                                                       **dict.fromkeys(B, "model-00002-of-00002.safetensors")}}  # fmt: skip
SHARDED = {
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": save(A),
    "model-00002-of-00002.safetensors": save(B),
}


def blob_name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lay_out(cache: Path, repo: str, files: dict[str, bytes], *, commit: str = COMMIT, ref: str = "main") -> Path:
    """A model in a cache, as huggingface_hub lays it out; returns its snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    snapshot = root / "snapshots" / commit
    for name, data in files.items():
        (root / "blobs" / blob_name(data)).write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / "blobs" / blob_name(data), link.parent))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # The library reads its environment when it is imported, so the folder is changed where it keeps it.
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fails(source: str, *fragments: str, **fields: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        warmstart.open_checkpoint(source, **fields)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    return message


@pytest.mark.parametrize(
    "source", ["org/name", "org/name@main", f"org/name@{COMMIT}", "hf://org/name", "hf://org/name@main"]
)
def test_a_model_in_the_cache_is_read_offline(source: str, cache: Path) -> None:
    snapshot = lay_out(
        cache, "org/name", {"model.safetensors": save(A), "config.json": b"{}", "pytorch_model.bin": b"x"}
    )
    checkpoint = warmstart.open_checkpoint(source)
    assert set(checkpoint.keys()) == set(A)
    for key, tensor in A.items():
        assert same_bits(checkpoint.read(key), tensor)
    assert checkpoint.location == f"hf://org/name@{COMMIT}/model.safetensors"
    assert checkpoint.revision == COMMIT
    assert checkpoint.file_hashes == {"model.safetensors": blob_name(save(A))}
    assert checkpoint.files[0].path == snapshot / "model.safetensors"
    assert checkpoint.notes == (
        "of the model's files, model.safetensors was taken and not 'pytorch_model.bin'",
        "taken from the cache: the hub was not asked, HF_HUB_OFFLINE is set",
    )


def test_field_note_30_shards_in_the_cache_are_links_that_may_leave_the_snapshot(cache: Path) -> None:
    snapshot = lay_out(cache, "org/name", SHARDED)
    for source in ("org/name", str(snapshot), str(snapshot / "model.safetensors.index.json")):
        checkpoint = warmstart.open_checkpoint(source)
        assert checkpoint.keys() == tuple(INDEX["weight_map"])  # type: ignore[arg-type]
        for key, tensor in {**A, **B}.items():
            assert same_bits(checkpoint.read(key), tensor)
        assert checkpoint.revision == COMMIT
        assert checkpoint.file_hashes == {name: blob_name(data) for name, data in SHARDED.items()}


def test_a_link_out_of_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    snapshot = lay_out(cache, "org/name", SHARDED)
    save_file(B, tmp_path / "elsewhere.safetensors")
    link = snapshot / "model-00002-of-00002.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    fails("org/name", "is a link that leads out of the folder", "elsewhere.safetensors")


def test_lineage_knows_commit_and_hashes(cache: Path) -> None:
    lay_out(cache, "org/name", {"model.safetensors": save(B)})
    model = torch.nn.Module()
    model.b = torch.nn.Module()
    model.b.weight = torch.nn.Parameter(torch.zeros(3))
    report = warmstart.load(model, "org/name", revision="main")
    assert torch.equal(model.b.weight, torch.full((3,), 2.0))
    (source,) = report.lineage["sources"]
    assert source["revision"] == COMMIT
    assert source["file_hashes"] == {"model.safetensors": blob_name(save(B))}
    assert source["location"] == f"hf://org/name@{COMMIT}/model.safetensors"
    assert source["rules"] == {"revision": "main"}


def test_a_part_of_a_model(cache: Path) -> None:
    files = {"unet/diffusion_pytorch_model.safetensors": save(A), "vae/diffusion_pytorch_model.safetensors": save(B)}
    lay_out(cache, "org/pipe", {**files, "model_index.json": b"{}"})
    for source, subfolder in (("org/pipe", "vae"), ("hf://org/pipe/vae", None), ("hf://org/pipe@main/vae/", None)):
        assert warmstart.open_checkpoint(source, subfolder=subfolder).keys() == ("b.weight",)
    direct = warmstart.open_checkpoint("hf://org/pipe/vae/diffusion_pytorch_model.safetensors")
    assert direct.location == f"hf://org/pipe@{COMMIT}/vae/diffusion_pytorch_model.safetensors"
    assert direct.file_hashes == {"vae/diffusion_pytorch_model.safetensors": blob_name(save(B))}
    fails("org/pipe", "holds no weights: there is 'model_index.json'", 'subfolder="vae"')
    fails("hf://org/pipe/text_encoder", "has no file or folder 'text_encoder'")
    fails("org/pipe", "leads out of the model", subfolder="../vae")


def test_a_revision_by_another_name_than_main(cache: Path) -> None:
    lay_out(cache, "org/name", {"model.safetensors": save(A)})
    lay_out(cache, "org/name", {"model.safetensors": save(B)}, commit="f" * 40, ref="refs/pr/1")
    for source, fields in (
        ("org/name@refs/pr/1", {}),
        ("hf://org/name@refs/pr/1", {}),
        ("hf://org/name@refs%2Fpr%2F1/model.safetensors", {}),
        ("org/name", {"revision": "refs/pr/1"}),
        ("org/name@refs/pr/1", {"revision": "refs/pr/1"}),
    ):
        checkpoint = warmstart.open_checkpoint(source, **fields)
        assert checkpoint.revision == "f" * 40
        assert checkpoint.keys() == ("b.weight",)
    fails("org/name@main", "names revision 'main' and revision='other' another; give one of them", revision="other")


def test_field_note_39_offline_and_not_in_the_cache(cache: Path) -> None:
    message = fails(
        "org/name@v2",
        "hf://org/name@v2: the hub was not asked, HF_HUB_OFFLINE is set, and the cache",
        "does not hold it; unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download org/name --revision v2",
    )
    assert "if a path was meant: there is no 'org/name@v2' in" in message
    lay_out(cache, "org/name", {name: data for name, data in SHARDED.items() if "00002-of" not in name})
    fails("org/name", "the cache lacks 'model-00002-of-00002.safetensors' of its 2 shards", "hf download org/name")
    lay_out(cache, "org/config", {"config.json": b"{}"})
    fails("org/config", "holds no weights: there is 'config.json'", "this is what the cache holds of it")


def test_a_folder_here_comes_before_the_hub(cache: Path, tmp_path: Path) -> None:
    lay_out(cache, "org/name", {"model.safetensors": save(A)})
    (tmp_path / "org" / "name").mkdir(parents=True)
    save_file(B, tmp_path / "org" / "name" / "model.safetensors")
    checkpoint = warmstart.open_checkpoint("org/name")
    assert checkpoint.keys() == ("b.weight",)
    assert checkpoint.revision is None
    assert checkpoint.file_hashes == {}
    assert set(warmstart.open_checkpoint("hf://org/name").keys()) == set(A)


LOCAL = [
    "/data/bert", "./org/name", "../org/name", "~/models/bert", "org/name.safetensors", "org/name.bin", "org/name.PT",
    "weights", "a/b/c", "C:\\models\\bert", "C:/models/bert", "org\\name", "org/name/", "org/na me", "org/../x", " s3://b/x.pt",
    "org/..", "org/.hidden", "", "org/name.ckpt@v1.ckpt",
]  # fmt: skip


@pytest.mark.parametrize("source", LOCAL)
def test_x_29_what_looks_like_a_path_is_never_looked_up_on_the_hub(source: str, cache: Path) -> None:
    assert looks_local(source)
    assert hub_place(source) is None
    if source:
        assert is_gone(source)
        message = fails(source)
        assert "hub" not in message.replace(str(cache.parent), "")
        assert "there is no such file" in message


def test_what_is_no_path_is_never_called_gone(cache: Path, tmp_path: Path) -> None:
    for source in ("org/name", "org/name@v1", "hf://org/name", "https://host/x.pt", "s3://bucket/x.pt", {"a": 1}, None):
        assert not is_gone(source)
    assert is_gone(Path("org/name"))
    assert is_gone("weights.pt")
    assert not is_gone(tmp_path)


def test_a_hub_model_that_cannot_be_had_is_an_error_at_once_and_a_missing_file_is_not(cache: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="hf://org/name: the hub was not asked"):
        Lifecycle(Settings([warmstart.Pretrained("org/name")])).apply(model)
    # a file that is not there may belong to a run that is about to be resumed
    life = Lifecycle(Settings([warmstart.Pretrained("gone/org/name.pt")]))
    life.apply(model)
    assert life.waiting is not None


def test_how_places_are_spelled() -> None:
    place = hub_place("hf://org/name@refs%2Fpr%2F3/a/b.bin")
    assert place == HubPlace(repo="org/name", revision="refs/pr/3", path="a/b.bin")
    assert place.spelled() == "hf://org/name@refs%2Fpr%2F3/a/b.bin"
    assert hub_place(place.spelled()) == place
    for source in ("hf://", "hf://name", "hf://datasets/org/name", "hf://spaces/org/name/x", "hf:///x"):
        with pytest.raises(CheckpointError, match="names no model of the hub; write hf://org/name"):
            hub_place(source)


def test_revision_and_subfolder_are_for_the_hub_and_folders(tmp_path: Path) -> None:
    save_file(A, tmp_path / "w.safetensors")
    fails(str(tmp_path / "w.safetensors"), "revision='v1' is for a model of the hub", revision="v1")
    fails(str(tmp_path / "w.safetensors"), "is a file, which has no subfolder='unet'", subfolder="unet")
    with pytest.raises(
        CheckpointError, match="a source in memory: subfolder='x' is for a folder or a model of the hub"
    ):
        warmstart.open_checkpoint(A, subfolder="x")


def test_without_huggingface_hub_the_error_says_what_to_install(tmp_path: Path) -> None:
    script = """
        import sys
        sys.modules["huggingface_hub"] = None
        import warmstart
        try:
            warmstart.open_checkpoint("org/name")
        except warmstart.CheckpointError as error:
            print(error)
    """
    out = run(script, tmp_path)
    assert "hf://org/name: models of the hub are fetched with huggingface_hub, which is not installed" in out
    assert "pip install 'warmstart[hub]'" in out


# A server that speaks as much of the hub's HTTP API as fetching takes.


class Hub(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    answer: ClassVar[tuple[int, str] | None] = None
    fail_downloads: ClassVar[tuple[int, str] | None] = None

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        if self.answer is not None:
            return self._error(*self.answer)
        if path.startswith("/api/models/org/name"):
            return self._api(path.removeprefix("/api/models/org/name"))
        if path.startswith("/org/name/resolve/"):
            revision, _, name = path.removeprefix("/org/name/resolve/").partition("/")
            if revision not in {"main", "v1", COMMIT}:
                return self._error(404, "RevisionNotFound")
            if self.fail_downloads is not None:
                return self._error(*self.fail_downloads)
            if name not in self.files:
                return self._error(404, "EntryNotFound")
            return self._file(self.files[name], body)
        return self._error(404, "RepoNotFound")

    def _api(self, rest: str) -> None:
        revision = rest.split("/")[2] if rest.count("/") > 1 else "main"
        if revision not in {"main", "v1", COMMIT}:
            return self._error(404, "RevisionNotFound")
        if rest.startswith("/tree/"):
            return self._json([
                {"type": "file", "path": name, "size": len(data), "oid": blob_name(data)[:40]}
                for name, data in self.files.items()
            ])  # fmt: skip
        siblings = [{"rfilename": name} for name in self.files]
        return self._json({"_id": "1", "id": "org/name", "modelId": "org/name", "sha": COMMIT, "private": False,
                           "tags": [], "downloads": 0, "siblings": siblings})  # fmt: skip

    def _json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{blob_name(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], str]]:
    class Fresh(Hub):
        files: ClassVar[dict[str, bytes]] = {}
        asked: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Fresh, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def run(script: str, home: Path, endpoint: str | None = None, **environment: str) -> str:
    """What a script prints in a process of its own, whose hub is at `endpoint`."""
    env = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if endpoint is not None:
        env |= {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    for name in ("HF_TOKEN", "HF_HUB_CACHE"):
        env.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**env, **environment}, cwd=home, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
    import json, sys, warmstart
    try:
        c = warmstart.open_checkpoint({source!r})
        values = {{key: c.read(key).double().flatten().tolist() for key in c.keys()}}
        print(json.dumps([values, c.revision, c.file_hashes, c.location, list(c.notes)]))
    except warmstart.CheckpointError as error:
        print(json.dumps(str(error)))
"""


def opened(source: str, home: Path, endpoint: str | None, **environment: str) -> Any:
    return json.loads(run(OPEN.format(source=source), home, endpoint, **environment))


def downloads(hub: type[Hub]) -> list[str]:
    return [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /org/")]


def as_lists(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {key: tensor.double().flatten().tolist() for key, tensor in tensors.items()}


def test_only_the_index_and_its_shards_are_downloaded_and_only_once(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    server, endpoint = hub
    server.files |= SHARDED | {
        "config.json": b"{}",
        "pytorch_model.bin": b"x" * 1000,
        "model-00003-of-00002.safetensors": b"not in the index",
        "onnx/model.onnx": b"x",
        "tf_model.h5": b"x",
    }
    values, revision, hashes, location, notes = opened("org/name", tmp_path, endpoint)
    assert values == as_lists({**A, **B})
    assert revision == COMMIT
    assert hashes == {name: blob_name(data) for name, data in SHARDED.items()}
    assert location == f"hf://org/name@{COMMIT}/model.safetensors.index.json"
    (note,) = notes
    assert note.startswith("of the model's files, model.safetensors.index.json was taken and not 'pytorch_model.bin', ")
    assert note.endswith("'model-00003-of-00002.safetensors', 'tf_model.h5'")
    assert downloads(server)[0] == "model.safetensors.index.json"
    assert sorted(downloads(server)) == sorted(SHARDED)

    # again: nothing is downloaded; offline: nothing is asked; the name of the revision is known there too
    server.asked.clear()
    assert opened("org/name", tmp_path, endpoint)[0] == values
    assert downloads(server) == []
    server.asked.clear()
    for source in ("org/name", f"org/name@{COMMIT}"):
        offline = opened(source, tmp_path, endpoint, HF_HUB_OFFLINE="1")
        assert offline[:4] == [values, revision, hashes, location]
        assert offline[4][-1] == "taken from the cache: the hub was not asked, HF_HUB_OFFLINE is set"
    assert server.asked == []

    # a hub that does not answer, or only with errors of its own, is no reason to stop
    server.answer = (500, "")
    down = opened("org/name", tmp_path, endpoint)
    assert down[:4] == [values, revision, hashes, location]
    assert down[4][-1] == "taken from the cache: the hub cannot be reached (HTTP 500)"


def test_a_single_file_and_a_tag(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    server, endpoint = hub
    server.files |= {"model.safetensors": save(A), "pytorch_model.bin": b"x", "README.md": b"x"}
    assert opened("org/name@v1", tmp_path, endpoint)[:2] == [as_lists(A), COMMIT]
    assert downloads(server) == ["model.safetensors"]
    assert opened("org/name@v1", tmp_path, None, HF_HUB_OFFLINE="1")[0] == as_lists(A)
    missing = opened("org/name", tmp_path, None, HF_HUB_OFFLINE="1")
    assert "the cache" in missing
    assert "does not hold it" in missing


def test_errors_of_the_hub_are_words(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    server, endpoint = hub
    server.files |= {"model.safetensors": save(A)}
    assert opened("org/nmae", tmp_path, endpoint).startswith(
        "hf://org/nmae: the hub has no model 'org/nmae', or it is private; check the name, or log in: hf auth login; "
        "if a path was meant: there is no 'org/nmae' in "
    )
    assert opened("org/name@v9", tmp_path, endpoint) == (
        "hf://org/name@v9: the model org/name has no revision 'v9'; give a branch, tag or commit of it, or leave it out"
    )
    assert opened("hf://org/name/other.bin", tmp_path, endpoint) == (
        "hf://org/name/other.bin: the model org/name has no file or folder 'other.bin'; it has 'model.safetensors'"
    )
    server.fail_downloads = (403, "GatedRepo")
    assert opened("org/name", tmp_path, endpoint) == (
        f"hf://org/name/model.safetensors: is a gated model, whose terms are to be accepted first: open {endpoint}/org/name, "
        "accept them, and log in here: hf auth login"
    )
    server.fail_downloads = (404, "EntryNotFound")
    assert "it was changed just now: start again" in opened("org/name", tmp_path, endpoint)
    server.answer = (401, "")
    assert "the hub has no model 'org/name', or it is private" in opened("org/name", tmp_path, endpoint)


def test_a_hub_that_is_not_there_is_a_word_too(tmp_path: Path) -> None:
    message = opened("org/name", tmp_path, "http://127.0.0.1:9")
    assert message.startswith("hf://org/name: the hub cannot be reached (")
    assert (
        "check the network (a proxy, HF_ENDPOINT), or fetch it where there is a network: hf download org/name"
        in message
    )


def test_a_model_without_weights_lists_what_it_has(hub: tuple[type[Hub], str], tmp_path: Path) -> None:
    server, endpoint = hub
    server.files |= {"config.json": b"{}", "name-Q4.gguf": b"GGUF"}
    assert "only 'name-Q4.gguf', GGUF files, whose tensors are quantized blocks" in opened(
        "org/name", tmp_path, endpoint
    )
    server.files |= {"a.pth": b"x", "b.pth": b"y"}
    message = opened("org/name", tmp_path, endpoint)
    assert "holds 2 files of weights" in message
    assert "'hf://org/name/a.pth'" in message
    assert downloads(server) == []
