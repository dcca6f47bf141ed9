"""Workers that meet in a repository: in one process, against a Hub over HTTP that fails, lies and holds anything."""

import json
import runpy
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load, save

from conftest import BLOCKS, MODEL, ROOT, arguments
from hub_server import PORTAL, TOKEN, Fault, hub_server
from noprop_hf import hub, meeting_place, pretraining, training
from noprop_hf.hub import files_left_out, files_of_phase_1, files_to_push, push_model
from noprop_hf.meeting_place import MeetingPlace
from noprop_hf.status import remote_status
from noprop_hf.training import train_blocks


NAME = "user/tiny"


@pytest.fixture(autouse=True)
def server(monkeypatch):
    """A Hub, in a process that has no other; pauses are short."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join([server.url, *template[1:]]))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
        yield server


@pytest.fixture
def repository(server, phase1):
    """One that holds phase 1."""
    MeetingPlace(NAME, phase1, patience=9).publish_table()
    return server.repositories[NAME]


def worker(directory: Path, **options) -> MeetingPlace:
    return MeetingPlace(NAME, directory, **{"patience": 20, "timeout": 1, **options})


def leave(repository, **files: bytes) -> None:
    """Commit files, `__` in their names for `/`, past all workers."""
    named = {name.replace("__", "/").replace("DOT", "."): content for name, content in files.items()}
    repository.commit({**repository.files("main"), **named}, "left by somebody")


def block(trained: Path, index: int) -> bytes:
    return (trained / f"block-{index:02d}.safetensors").read_bytes()


def messages(repository, index: int) -> list[str]:
    return [message for message in repository.messages if message.startswith(f"Block {index} ")]


# --- what is taken from a repository ----------------------------------------------------------------------------------


def test_a_worker_fetches_the_files_of_phase_1_alone(repository, phase1, tmp_path):
    planted = ["checkpoints/worker", "checkpoints/block-00/checkpoint-3/optimizer.pt", "checkpoints/block-00.lock"]
    planted += ["pytorch_model.bin", "pretraining/pytorch_model.bin", "evil.py", "../../escape", "tokenizer/x.json"]
    leave(repository, **dict.fromkeys(planted, b"planted"), modeling_nopropDOTpy=b"raise SystemExit('run')")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "worker").write_text("mine")
    before = worker(tmp_path).worker
    worker(tmp_path).fetch_table()
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(files_of_phase_1(phase1)) | {"checkpoints/worker"}
    assert worker(tmp_path).worker == before
    for name in found - {"corpus.yaml", "checkpoints/worker"}:
        assert (tmp_path / name).read_bytes() == (phase1 / name).read_bytes()


def test_a_copy_of_a_directory_is_another_worker(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    name = worker(one).worker
    assert worker(one).worker == name
    assert worker(Path(shutil.copytree(one, tmp_path / "two"))).worker != name


@pytest.mark.parametrize("content", [PORTAL, {}, []])
def test_what_arrives_wrong_is_fetched_again(server, repository, phase1, tmp_path, content):
    table = "resolve/.*/embeddings.safetensors"
    server.faults += [Fault("GET", "/api/models", 200, content=content), Fault("HEAD", table, 200, content=content)]
    server.faults += [Fault("GET", table, 200, content=b"x" * (phase1 / "embeddings.safetensors").stat().st_size)]
    worker(tmp_path).fetch_table()
    assert not any(fault.times for fault in server.faults)
    assert (tmp_path / "embeddings.safetensors").read_bytes() == (phase1 / "embeddings.safetensors").read_bytes()


def test_a_damaged_table_is_named_and_not_kept(repository, tmp_path):
    content = repository.files("main")["embeddings.safetensors"]
    leave(repository, **{"embeddings.safetensors": content[:-9]})
    with pytest.raises(ValueError, match=r"embeddings.safetensors in user/tiny is damaged"):
        worker(tmp_path).fetch_table()
    assert not (tmp_path / "embeddings.safetensors").exists()


CLAIMS = [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 10**5, b'{"worker": "a", "step": 0, "time": NaN}', b"9" * 10**6]
CLAIMS += [json.dumps({"worker": w, "step": s, "time": t}).encode() for w, s, t in (
    ("\x1b[31m", 0, 0), ("a", "0", 0), ("a", 0, "now"), ("a", 0, 10**400), ("a", 0, time.time() + 10**6), (1, 2, 3),
)]  # fmt: skip


@pytest.mark.parametrize("content", CLAIMS, ids=range(len(CLAIMS)))
def test_a_file_that_is_no_claim_keeps_no_block(repository, tmp_path, content):
    leave(repository, **{"workers/block-00.json": content, "workers/block-01.json": content})
    place = worker(tmp_path)
    assert place.claims() == {}
    assert place.claim_block(0) is None
    claims = place.claims()
    assert list(claims) == [0] and claims[0].worker == place.worker


def test_files_of_any_name_and_content_are_passed_over(repository, trained, tmp_path):
    names = ["workers/block-xx.json", "workers/block-1.json", "workers/block-01.json.bak", "workers/x/block-01.json"]
    names += ["block-foo.txt", "block-01.safetensors.bak", "block-x.safetensors", "block-99999999999.safetensors"]
    names += ["workers/block-٠١.json", "block-٠١.safetensors", "block-99.safetensors", "block-\n.safetensors"]
    leave(repository, **dict.fromkeys(names, b"junk"), **{"block-01.safetensors": b"junk"})
    leave(repository, **{"block-02.safetensors": block(trained, 2)})
    place = worker(tmp_path)
    blocks = place.blocks()
    assert set(blocks) == {"block-01.safetensors", "block-02.safetensors", "block-99.safetensors"}
    assert blocks["block-01.safetensors"] is None and blocks["block-02.safetensors"].metadata["steps"] == "6"
    assert place.claims() == {} and place.claim_block(0) is None
    assert [block.state for block in remote_status(NAME)] == ["training", "damaged", "done", "missing"]


def without_a_tensor(tensors: dict, metadata: dict) -> None:
    tensors.pop(next(iter(tensors)))


def with_a_tensor_of_another_block(tensors: dict, metadata: dict) -> None:
    name = next(iter(tensors))
    tensors[name.replace("blocks.1.", "blocks.0.")] = tensors[name].clone()


def of_another_size(tensors: dict, metadata: dict) -> None:
    tensors["model.blocks.1.head.bias"] = torch.zeros(3)


def of_another_type(tensors: dict, metadata: dict) -> None:
    tensors["model.blocks.1.head.bias"] = tensors["model.blocks.1.head.bias"].half()


def noted(**notes: str | None) -> Callable[[dict, dict], None]:
    def change(tensors: dict, metadata: dict) -> None:
        metadata |= notes
        for note in [note for note, value in notes.items() if value is None]:
            del metadata[note]

    return change


CHANGES = {
    "lacks model.blocks.1": without_a_tensor,
    "do not belong there": with_a_tensor_of_another_block,
    "is of size": of_another_size,
    "of type F16": of_another_type,
    "trained as block 0": noted(block="0"),
    "another table": noted(fingerprint="0" * 64),
    "other data": noted(data="0" * 64),
    "lack data, fingerprint": noted(fingerprint=None, data=None),
    "lack content_sha256": noted(content_sha256=None),
    "for 0 steps": noted(steps="0"),
    "diverged": noted(bound_nats="nan"),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_published_block_is_checked_by_its_header(repository, trained, fault):
    with safe_open(trained / "block-01.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load(block(trained, 1))
    CHANGES[fault](tensors, metadata)
    leave(repository, **{"block-01.safetensors": save(tensors, metadata), "block-02.safetensors": block(trained, 2)})
    states = remote_status(NAME)
    assert [block.state for block in states] == ["missing", "unusable", "done", "missing"]
    assert fault.removeprefix("lacks model.") in states[1].details


# --- who trains what --------------------------------------------------------------------------------------------------


def test_free_blocks_come_first_and_claims_are_read_last(server, repository, trained, tmp_path, monkeypatch):
    """Block 1 is published; 2 is claimed, with a checkpoint here; 0 is claimed; 3 is free, and then claimed, too."""
    leave(repository, **{"block-01.safetensors": block(trained, 1)})
    places = [worker(tmp_path / name) for name in ("one", "two") if not (tmp_path / name).mkdir()]
    assert places[1].claim_block(0) is None and places[1].claim_block(2) is None
    (tmp_path / "one" / "checkpoints" / "block-02").mkdir()
    server.requests.clear()
    assert places[0].open_blocks(range(4)) == [2, 3, 0]
    assert len(server.requests) == 1
    assert places[1].claim_block(3) is None
    assert places[0].open_blocks([3, 0]) == []
    assert sorted(places[0].open_blocks([3, 0], take_over=True)) == [0, 3]
    assert sorted(places[1].open_blocks([3, 0])) == [0, 3]  # its own
    server.clock_ahead += 7 * 3600
    assert sorted(places[0].open_blocks([3, 0])) == [0, 3]  # stale


def test_a_worker_that_another_was_faster_than_looks_elsewhere(repository, tmp_path, monkeypatch):
    monkeypatch.setattr(meeting_place.random, "shuffle", lambda blocks: blocks.reverse())
    places = [worker(tmp_path / name) for name in ("one", "two") if not (tmp_path / name).mkdir()]
    assert places[0].open_blocks(range(4)) == [0, 1, 2, 3]
    assert places[1].claim_block(0) is None and places[0].claim_block(0) is not None
    assert places[0].open_blocks([1, 2, 3]) == [3, 2, 1]
    assert places[1].open_blocks([1, 2, 3]) == [1, 2, 3]


def shard_without_hash(trained: Path) -> bytes:
    return save(load(block(trained, 1)), {"format": "pt"})


def shard_of_another_table(trained: Path) -> bytes:
    return save(load(block(trained, 1)), {"format": "pt", "content_sha256": "0", "fingerprint": "0"})


@pytest.mark.parametrize("published", [shard_without_hash, shard_of_another_table, lambda trained: b"junk"])
def test_blocks_are_trained_unless_somebody_has_or_left_a_bad_file(
    repository, trained, data, directory, caplog, monkeypatch, published
):
    """Block 0 is to be trained; 1 is bad; 2 is published while block 0 is trained; another worker is at 3."""
    bad = published(trained)
    leave(repository, **{"block-01.safetensors": bad})
    other = worker(Path(shutil.copytree(trained, directory.parent / "other")))
    assert other.claim_block(3) is None
    monkeypatch.setattr(MeetingPlace, "report", lambda place, index, step: other.publish_block(2))
    with pytest.raises(ValueError, match="block-01.safetensors in user/tiny"):
        train_blocks(data, replace(BLOCKS, blocks="all"), arguments(directory), MODEL, worker(directory))
    assert messages(repository, 0) == ["Block 0 is claimed", "Block 0 is trained"]
    assert messages(repository, 1) == [] and messages(repository, 3) == ["Block 3 is claimed"]
    assert messages(repository, 2) == ["Block 2 is trained"]
    ours, theirs = load(repository.files("main")["block-00.safetensors"]), load(block(trained, 0))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert repository.files("main")["block-01.safetensors"] == bad


def test_a_worker_that_fails_gives_its_claim_back(repository, data, directory, monkeypatch):
    def fail(*args):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(training, "train_block", fail)
    with pytest.raises(FloatingPointError):
        train_blocks(data, replace(BLOCKS, blocks="2"), arguments(directory), MODEL, worker(directory))
    assert messages(repository, 2) == ["Block 2 is claimed", "Block 2 is released"]
    assert worker(directory).claims() == {}


def test_a_backup_leaves_the_claim_and_ends_when_the_block_is_published(repository, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(meeting_place, "CHECK_EVERY", -1)
    slow = worker(Path(shutil.copytree(trained, tmp_path / "slow")))
    idle, another = (worker(tmp_path / name) for name in ("idle", "another") if not (tmp_path / name).mkdir())
    assert slow.claim_block(1) is None
    assert idle.open_blocks([1]) == [] and idle.claim_block(1) is not None
    assert idle.open_blocks([1], back_up=True) == [1] and idle.claim_block(1, back_up=True) is None
    idle.report(1, 5)
    assert slow.claims()[1].worker == slow.worker and messages(repository, 1) == ["Block 1 is claimed"]
    assert another.claim_block(2, back_up=True) is None  # free, so that it is claimed
    another.report(2, 5)
    slow.publish_block(1)
    idle.release(1)
    with pytest.raises(meeting_place.BlockPublished, match="has published block 1"):
        idle.report(1, 10)
    assert messages(repository, 1) == ["Block 1 is claimed", "Block 1 is trained"]
    assert messages(repository, 2) == ["Block 2 is claimed"]


def test_a_slow_worker_does_not_claim_a_published_block_again(repository, trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(meeting_place, "REPORT_EVERY", -1)
    slow, fast = (worker(Path(shutil.copytree(trained, tmp_path / name))) for name in ("slow", "fast"))
    assert slow.claim_block(1) is None and fast.claim_block(1, back_up=True) is None
    fast.publish_block(1)
    slow.report(1, 5)
    assert "training, at step 5, is not needed" in caplog.text
    slow.publish_block(1)  # the same bits
    assert messages(repository, 1) == ["Block 1 is claimed", "Block 1 is trained"]
    assert slow.claims() == {} and "differs" not in caplog.text


def test_an_idle_worker_trains_what_others_have_claimed(repository, trained, data, directory, monkeypatch):
    """Blocks 0 and 3 are published, 1 and 2 are claimed by workers of which one publishes its block meanwhile."""
    monkeypatch.setattr(meeting_place, "CHECK_EVERY", -1)
    monkeypatch.setattr(meeting_place.random, "shuffle", lambda blocks: None)
    leave(repository, **{f"block-0{index}.safetensors": block(trained, index) for index in (0, 3)})
    slow, gone = (worker(Path(shutil.copytree(trained, directory.parent / name))) for name in ("slow", "gone"))
    assert slow.claim_block(1) is None and gone.claim_block(2) is None
    reported, report = [], MeetingPlace.report

    def publish_and_report(place, index, step):
        reported.append((index, step))
        if index == 1:
            slow.publish_block(1)
        report(place, index, step)

    monkeypatch.setattr(MeetingPlace, "report", publish_and_report)
    train_blocks(data, replace(BLOCKS, back_up=True), arguments(directory), MODEL, worker(directory))
    assert reported == [(1, 3), (2, 3), (2, 6)]
    assert messages(repository, 1) == ["Block 1 is claimed", "Block 1 is trained"]
    assert messages(repository, 2) == ["Block 2 is claimed", "Block 2 is trained"]
    assert not (directory / "block-01.safetensors").exists()
    ours, theirs = load(repository.files("main")["block-02.safetensors"]), load(block(trained, 2))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    gone.publish_block(2)  # it comes later, with the same bits
    assert messages(repository, 2) == ["Block 2 is claimed", "Block 2 is trained"]


def test_ages_are_of_one_clock(server, repository, tmp_path, monkeypatch):
    """That of the Hub: workers do not know the time."""
    now = time.time
    places = [worker(tmp_path / name) for name in ("one", "two", "three") if not (tmp_path / name).mkdir()]
    wrong = iter([lambda: now() - 10**8, lambda: now() + 10**8, lambda: 0.0, lambda: now() + 10**5])
    monkeypatch.setattr(time, "time", next(wrong))
    assert places[0].claim_block(0) is None
    server.clock_ahead += 5 * 3600
    monkeypatch.setattr(time, "time", next(wrong))
    assert "300 minutes ago" in places[1].claim_block(0)
    server.clock_ahead += 2 * 3600
    monkeypatch.setattr(time, "time", next(wrong))
    assert places[1].claim_block(0) is None
    monkeypatch.setattr(time, "time", next(wrong))
    assert "0 minutes ago" in places[2].claim_block(0)


# --- the network ------------------------------------------------------------------------------------------------------


LASTING = [
    Fault("PUT", "/lfs/", None, 9),
    Fault("PUT", "/lfs/", 500, 9),
    Fault("PUT", "/lfs/", 200, 2, content=PORTAL),
    Fault("POST", "/objects/batch", 200, 2, content=PORTAL),
    Fault("POST", "/preupload/", 200, 2, content=[]),
    Fault("POST", "/commit/", 200, 2, content=PORTAL),
    Fault("POST", "/commit/", 200, 2, content={}),
    Fault("GET", "/api/models", 200, 2, content=[]),
    Fault("GET", "/api/models", 200, 2, content={}),
    Fault("GET", "/api/models", 429, 2, headers={"Retry-After": "100000000"}),
    Fault("POST", "/objects/batch", 429, 2, headers={"Retry-After": "9" * 5000}),
    Fault("POST", "/objects/batch", 429, 2, headers={"RateLimit": '"api";r=0;t=100000000'}),
    Fault("GET", "/api/models", None, 2, silence=1.5),
    Fault("POST", "/commit/", None, 2, silence=1.5),
]


@pytest.mark.parametrize("fault", LASTING, ids=lambda fault: f"{fault.path} {fault.status} {fault.content}"[:40])
def test_a_block_arrives_once_whatever_fails(server, repository, trained, tmp_path, fault):
    place = worker(Path(shutil.copytree(trained, tmp_path / "model")), timeout=0.5)
    assert place.claim_block(1) is None
    server.faults.append(replace(fault))
    place.publish_block(1)
    assert server.faults[0].times == 0
    assert messages(repository, 1) == ["Block 1 is claimed", "Block 1 is trained"]
    assert repository.files("main")["block-01.safetensors"] == block(trained, 1)
    assert not any(name.startswith("workers/") for name in repository.files("main"))


@pytest.mark.parametrize("fault", [fault for fault in LASTING if "api/models" in fault.path], ids=str)
def test_patience_ends(server, trained, tmp_path, fault):
    server.faults.append(replace(fault, times=10**6))
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        MeetingPlace(NAME, tmp_path, patience=1, timeout=0.5).claims()
    assert time.monotonic() - begin < 5


def test_a_report_never_ends_training(server, repository, tmp_path, monkeypatch):
    monkeypatch.setattr(meeting_place, "REPORT_EVERY", -1)
    monkeypatch.setattr(meeting_place, "BRIEF_PATIENCE", 0.3)
    place = worker(tmp_path, timeout=0.3)
    for fault in [*LASTING, Fault("POST", "/preupload/", 403), Fault("POST", "/commit/", 401), Fault("POST", "", 404)]:
        server.faults[:] = [replace(fault, times=10**6)]
        begin = time.monotonic()
        place.report(0, 7)
        assert time.monotonic() - begin < 5
    server.faults.clear()
    place.report(0, 7)
    assert repository.messages[-1] == "Block 0 is at step 7"


# --- before the work --------------------------------------------------------------------------------------------------


def test_what_cannot_be_published_is_told_before_the_work(server, repository, phase1, directory, tmp_path):
    worker(directory).prepare()  # the same table
    with pytest.raises(FileExistsError, match="the table of another run"):
        worker(tmp_path / "empty").prepare()
    table = load(files_of_phase_1(phase1)["embeddings.safetensors"].read_bytes())
    leave(repository, **{"embeddings.safetensors": save(table, {"format": "pt", "fingerprint": "another"})})
    with pytest.raises(FileExistsError, match="the table of another run"):
        worker(directory).prepare()
    server.repositories["user/llama"] = type(repository)()
    server.repositories["user/llama"].commit({"config.json": b"{}"}, "another model")
    with pytest.raises(FileExistsError, match="another model"):
        MeetingPlace("user/llama", directory).prepare()


@pytest.mark.parametrize("method", ["prepare", "check_table"])
def test_a_token_that_may_not_write_is_told_before_the_work(repository, directory, method):
    with pytest.raises(PermissionError, match="does not allow you to write"):
        getattr(MeetingPlace(NAME, directory, token="hf_wrong"), method)()


@pytest.mark.parametrize("script", ["train", "pretrain_embeddings", "train_blocks"])
def test_scripts_ask_before_they_train(server, corpus_file, tmp_path, monkeypatch, script):
    monkeypatch.setattr(pretraining, "pretrain_language_model", lambda *args: pytest.fail("work was begun"))
    options = {"train_file": corpus_file, "output_dir": tmp_path / "new", "push_to_hub": True, "hub_model_id": NAME}
    words = [
        word for name, value in (options | {"hub_token": "hf_wrong"}).items() for word in (f"--{name}", str(value))
    ]
    monkeypatch.setattr("sys.argv", [script, *words, "--use_cpu", "true"])
    with pytest.raises(SystemExit, match="does not allow you to write|does not exist"):
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert not server.repositories


# --- what becomes public ----------------------------------------------------------------------------------------------


def test_only_the_model_becomes_public(server, trained, corpus_file, tmp_path):
    directory = Path(shutil.copytree(trained, tmp_path / "model"))
    private = ["passwords.txt", "credentials.json", "helper.py", "other.safetensors", ".env", "block-99.safetensors"]
    private += ["pretraining/notes.json", "corpus.txt", "config.json.bak", "block-01.safetensors.orig"]
    for name in private:
        (directory / name).write_text("secret")
    (directory / "block-99.safetensors").write_bytes(block(trained, 1))
    (directory / "other.safetensors").write_bytes(block(trained, 1))
    push_model(directory, NAME, token=TOKEN)
    MeetingPlace("user/table", directory).publish_table()
    for name in (NAME, "user/table"):
        files = server.repositories[name].files("main")
        assert not set(files) & set(private) and {"config.json", "tokenizer.json", "modeling_noprop.py"} <= set(files)
        public = b"\n".join(files.values())
        for secret in (Path(corpus_file).parent, trained.parent, tmp_path, TOKEN, "secret"):
            assert str(secret).encode() not in public, secret
    left_out = files_left_out(directory, files_to_push(directory))
    assert set(left_out) == {*private, "checkpoints/"}


def test_a_claim_tells_no_host(repository, tmp_path):
    place = worker(tmp_path)
    assert place.claim_block(0) is None
    claim = json.loads(repository.files("main")["workers/block-00.json"])
    assert set(claim) == {"worker", "step", "time"} and claim["worker"] == place.worker


def test_a_path_is_local():
    local = ["/home/me/llama", "../llama", "runs/demo/x", str(ROOT), "C:\\models"]
    assert all(map(hub.is_local, local))
    assert not any(map(hub.is_local, ["meta/llama", "gpt2", "cpython-docs", None]))
