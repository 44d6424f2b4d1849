"""Datasets and training states in a store: copied there and back, read and written where they lie, by a real S3 server
on this machine."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from noise_clips import codec, made  # noqa: F401  (fixtures)
from test_train_loop import Dot, run_loop

from minwm.core.config import ConfigError, UserError, from_dict
from minwm.core.metrics import read_metrics
from minwm.data import remote
from minwm.data.dataset import Loader, ShardDataset, check_shards
from minwm.data.remote import StoreError, copy, data_folder
from minwm.train.build import train
from minwm.train.config import Run
from minwm.train.state import States
from minwm.train.state_places import StateStore

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of an empty bucket."""
    import boto3

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        boto3.client("s3").create_bucket(Bucket="clips")
        yield "s3://clips"
    server.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINWM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one: Any, two: Any) -> bool:
    return one.id == two.id and torch.equal(one.latents, two.latents) and one.record.to_json() == two.record.to_json()


def test_shards_are_read_where_they_lie(made: Path, bucket: str, cache: Path, tmp_path: Path) -> None:  # noqa: F811
    address = f"{bucket}/latents"
    assert run("data", "copy", made / "shards", address) == 0
    folder = data_folder(address)
    assert cache in folder.parents and not list(folder.rglob("*.tar")), "only manifest and indices are here"
    local, there = ShardDataset(made / "shards", "train"), ShardDataset(folder, "train", cache_bytes=0)
    assert len(there) == len(local) > 5 and all(same(local[i], there[i]) for i in range(len(local)))
    assert there.fingerprint == local.fingerprint and check_shards(folder) == []
    assert run("data", "copy", address, tmp_path / "back") == 0
    for file in (made / "shards").iterdir():
        if not file.name.startswith("."):
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert data_folder(str(made)) == made


def test_raw_clips_go_there_and_back(made: Path, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    assert copy(str(made / "raw"), f"{bucket}/raw") > 12
    assert copy(str(made / "raw"), f"{bucket}/raw") == 0, "what is there is kept"
    copy(f"{bucket}/raw", str(tmp_path / "raw"))
    assert run("data", "check", tmp_path / "raw") == run("data", "check", made / "raw")


def test_an_interrupted_copy_is_no_dataset_and_goes_on(
    made: Path,  # noqa: F811
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, calls = f"{bucket}/again", list[int]()

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the line is cut")
        real(*arguments)

    real = shutil.copyfileobj
    monkeypatch.setattr(remote.shutil, "copyfileobj", failing)
    with pytest.raises(StoreError, match="the line is cut"):
        copy(str(made / "shards"), address)
    with pytest.raises(StoreError, match=r"holds no dataset \(no manifest.json\)"):
        data_folder(address)
    total = len([file for file in (made / "shards").iterdir() if file.name[0] != "."])
    assert copy(str(made / "shards"), address) == total - 1 - 2
    assert check_shards(data_folder(address)) == []


def test_what_is_not_there_is_named(made: Path, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    for place in ("s3://none/x", f"{bucket}/none", str(tmp_path / "none")):
        with pytest.raises(StoreError, match=place):
            copy(place, str(tmp_path / "out"))
    with pytest.raises(StoreError, match="Protocol not known: ftpx"):
        data_folder("ftpx://host/x")
    address = f"{bucket}/cut"
    copy(str(made / "shards"), address)
    folder = data_folder(address)
    dataset = ShardDataset(folder, "train", cache_bytes=0)
    fs, root = remote._filesystem(address)
    fs.rm(f"{root}/{dataset.entries[0][0].name}")
    with pytest.raises(StoreError, match="FileNotFoundError"):
        dataset[0]
    assert "missing though its index is there" in check_shards(data_folder(address))[0]
    fs.rm(f"{root}/{dataset.entries[0][0].name}.idx.json")
    assert check_shards(data_folder(address)) == [], "an index that is gone there is gone here"


# ---------------------------------------------------------------------------------------------
# Training states


def trained(address: str, out: Path, steps: int, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return run_loop(Dot(), out, steps=steps, save_every=2, keep=2, states=address, **changes)


def test_training_goes_on_from_states_in_a_store(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine, too, whose folder is empty; bit for bit. What is written there is not read back."""
    address = f"{bucket}/run"
    torch.manual_seed(0)
    whole = run_loop(Dot(), tmp_path / "local", steps=8).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "open", None)
        trained(address, tmp_path / "one", 6)
    states = States(tmp_path / "none", address=address)
    assert states.steps() == [4, 6] and not list(tmp_path.glob("one/state/*"))
    resumed = trained(address, tmp_path / "two", 8).state_dict()
    assert [line["step"] for line in read_metrics(tmp_path / "two")] == [6, 7]
    assert states.steps() == [6, 8] and all(torch.equal(resumed[name], x) for name, x in whole.items())


def test_a_half_written_state_in_a_store_is_none(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{bucket}/half"
    trained(address, tmp_path, 2)
    states = States(tmp_path, address=address)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed before the last file, and unable to tidy up
        patch.setattr(StateStore, "finish", killed)
        patch.setattr(StateStore, "clear", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            trained(address, tmp_path, 4)
    assert states.steps() == [2]
    fs, root = remote._filesystem(address)
    assert fs.exists(f"{root}/000004/.metadata"), "all but its record is there"
    trained(address, tmp_path, 4)
    assert states.steps() == [2, 4] and [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]
    part = f"{root}/000004/__0_0.distcp"
    fs.pipe_file(part, fs.cat_file(part)[:-9])
    with pytest.raises(UserError, match=r"s3://clips/half/000004 is damaged; delete it.* \(__0_0.distcp: another\)"):
        trained(address, tmp_path, 6)


def test_states_of_another_run_are_refused(bucket: str, tmp_path: Path) -> None:
    address = f"{bucket}/other"
    trained(address, tmp_path, 2)
    run = from_dict(Run, States(tmp_path, address=address).extra(2)["run"])
    with pytest.raises(ConfigError, match="s3://clips/other holds a run with another seed; give another --states"):
        train(replace(run, seed=1), tmp_path / "new")
    with pytest.raises(ConfigError, match="states=runs/x: give the address of a store"):
        replace(run, states="runs/x")


# ---------------------------------------------------------------------------------------------
# Reading ahead


class Slow:
    """Records whose batches take a while to read."""

    fingerprint = 1

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 10

    def batch(self, indices: Sequence[int]) -> tuple[int, ...]:
        time.sleep(self.seconds * (1 + indices[0] % 3))
        return tuple(indices)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_read_ahead_are_the_same_and_resume_at_any_point(world: int) -> None:
    plain = [Loader(Slow(0), 3, rank=rank, world=world) for rank in range(world)]
    ahead = [Loader(Slow(0.001), 3, rank=rank, world=world, ahead=4) for rank in range(world)]
    for step in range(9):
        expected = [next(loader) for loader in plain]
        assert [next(loader) for loader in ahead] == expected
        assert ahead[0].state() == plain[0].state()
        if step == 4:  # in the middle of an epoch, another process goes on
            ahead = [Loader(Slow(0.001), 3, rank=rank, world=world, ahead=2) for rank in range(world)]
            for loader in ahead:
                loader.load(plain[0].state())


def test_reading_ahead_takes_the_pauses_away() -> None:
    def waiting(ahead: int) -> float:
        loader, total = Loader(Slow(0.01), 1, ahead=ahead), 0.0
        next(loader)
        for _ in range(12):
            time.sleep(0.02)  # the step
            start = time.monotonic()
            next(loader)
            total += time.monotonic() - start
        return total

    assert waiting(4) < 0.25 * waiting(0)


def test_an_error_of_a_batch_read_ahead_comes_with_its_batch() -> None:
    class Broken(Slow):
        def batch(self, indices: Sequence[int]) -> tuple[int, ...]:
            if 7 in indices:
                raise StoreError("7 is gone")
            return super().batch(indices)

    order = [next(loader) for loader in [Loader(Slow(0), 1)] for _ in range(10)]
    loader = Loader(Broken(0), 1, ahead=4)
    assert [next(loader) for _ in range(order.index((7,)))] == order[: order.index((7,))]
    with pytest.raises(StoreError, match="7 is gone"):
        next(loader)
