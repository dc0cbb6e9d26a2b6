"""Checkpoint directories and files in one process: pieces, safety, life of a directory, choice of the last complete
one.
"""

import json
import os
import pickle
import random
import re
import shutil
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks.checkpoint.jobs import LORA, build, limited
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.trainer_utils import rotate_checkpoints

from hf_automodel_parallel import AutoParallelismConfig, compat
from hf_automodel_parallel.checkpoint import checksums, files, manifest, random_states, reader, training, writer
from hf_automodel_parallel.checkpoint import commit as directory
from hf_automodel_parallel.checkpoint.shards import LocalShard
from hf_automodel_parallel.checkpoint.training import How, collect_model, restore_model
from hf_automodel_parallel.compat.checkpoint_metadata import METADATA_CLASSES
from hf_automodel_parallel.core.shard_layout import tp_chunks
from hf_automodel_parallel.core.sharding_spec import ParameterSpec
from hf_automodel_parallel.errors import CheckpointError, ConfigError
from hf_automodel_parallel.loading.files import resolve_files

# ---- pieces --------------------------------------------------------------------------------------------------------

PACKED = compat.strided_shard(0, 2)
PLACEMENTS = {
    "even": ((8, 6), (Shard(0), Shard(1))),
    "uneven": ((7, 5), (Shard(0), Shard(1))),
    "empty": ((3, 4), (Replicate(), Shard(0))),
    "copies": ((8, 6), (Replicate(), Replicate())),
    "packed": ((8, 6), (Shard(1), PACKED)),
    "packed_experts": ((3, 16, 6), (Shard(0), compat.strided_shard(1, 2))),
    "fsdp_in_tp": ((16, 3), (compat.strided_shard(0, 4), Shard(0))),
    "fsdp_in_tp_uneven": ((12, 3), (compat.strided_shard(0, 4), Shard(0))),
    "scalar": ((), (Replicate(), Replicate())),
}


@pytest.mark.both_ends
@pytest.mark.parametrize("case", PLACEMENTS)
def test_chunks_of_all_ranks_are_the_full_tensor(case):
    """Each rank of a 2 x 4 mesh finds its local part in the whole tensor, and nothing is left out."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shape, placements = PLACEMENTS[case]
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    found = torch.zeros_like(whole)
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            mesh = DeviceMesh("cpu", torch.arange(8).reshape(2, 4), mesh_dim_names=("dp", "tp"))
            part = LocalShard.of(distribute_tensor(whole, mesh, placements, src_data_rank=None))
            for chunk in part.chunks:
                assert torch.equal(chunk.of_local(part.local), chunk.of_full(whole))
                view = part.__get_tensor_shard__(MetadataIndex("w", torch.Size(chunk.offsets)))
                chunk.of_full(found).copy_(view)
            assert sum(torch.Size(chunk.sizes).numel() for chunk in part.chunks) == part.local.numel()
            emptied = LocalShard(part.shape, torch.zeros_like(part.local), part.chunks)
            emptied.fill_from(whole)
            assert torch.equal(emptied.local, part.local)
        finally:
            dist.destroy_process_group()
    assert torch.equal(found, whole)


# ---- files that run code -------------------------------------------------------------------------------------------


class Planted:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


STATE = {
    "model.weight": torch.arange(12.0).reshape(3, 4),
    "model.step": torch.tensor(3.0),
    "model.lr": [0.1, None, "a"],
}


def save_directory(folder: Path) -> Path:
    state = {key: LocalShard.of(v) if isinstance(v, torch.Tensor) else v for key, v in STATE.items()}
    writer.save_chunks(state, {key: tuple(key.split(".")) for key in state}, folder)
    return folder


def load_directory(folder: Path, state: dict) -> dict:
    dcp.load(
        state,
        storage_reader=reader.SafeFileSystemReader(folder),
        planner=reader.SafeLoadPlanner(),
        no_dist=True,
    )
    return state


@pytest.mark.both_ends
def test_directory_is_read_by_ours_and_by_stock_readers(tmp_path):
    folder = save_directory(tmp_path / "m")
    ours = load_directory(folder, {"model.weight": torch.zeros(3, 4), "model.lr": None})
    assert torch.equal(ours["model.weight"], STATE["model.weight"]) and ours["model.lr"] == STATE["model.lr"]
    stock = {"model": {"weight": torch.zeros(3, 4), "step": torch.zeros(()), "lr": 0}}
    dcp.load(stock, checkpoint_id=folder, no_dist=True)
    assert torch.equal(stock["model"]["weight"], STATE["model.weight"]) and stock["model"]["lr"] == STATE["model.lr"]


@pytest.mark.both_ends
def test_directory_of_stock_dcp_is_read_by_ours(tmp_path):
    stock = {"model": {"weight": STATE["model.weight"], "lr": STATE["model.lr"]}}
    dcp.save(stock, checkpoint_id=tmp_path / "m", no_dist=True)
    ours = load_directory(tmp_path / "m", {"model.weight": torch.zeros(3, 4), "model.lr": None})
    assert torch.equal(ours["model.weight"], STATE["model.weight"]) and ours["model.lr"] == STATE["model.lr"]


def test_planted_metadata_is_not_run(tmp_path):
    folder = save_directory(tmp_path / "m")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for planted in (Planted(tmp_path / "run"), {"planner_data": Planted(tmp_path / "run")}):
        metadata.planner_data = planted
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=r"metadata asks for posix.mkdir"):
            reader.read_metadata(folder)
    assert not (tmp_path / "run").exists()


def test_metadata_points_nowhere_else(tmp_path):
    folder = save_directory(tmp_path / "m")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"own directory"):
        reader.read_metadata(folder)


def test_planted_value_in_a_directory_is_not_run(tmp_path):
    """torch reads values that are no tensors without ``weights_only``."""
    dcp.save({"model": {"lr": Planted(tmp_path / "run")}}, checkpoint_id=tmp_path / "m", no_dist=True)
    with pytest.raises(BaseException, match=r"holds more than tensors and plain values"):
        load_directory(tmp_path / "m", {"model.lr": None})
    assert not (tmp_path / "run").exists()
    dcp.load({"model": {"lr": 0}}, checkpoint_id=tmp_path / "m", no_dist=True)
    assert (tmp_path / "run").exists()  # stock torch does run it: the test plants what it says


def test_planted_file_is_not_run(tmp_path):
    torch.save({"a": Planted(tmp_path / "run")}, tmp_path / "f.bin")
    with pytest.raises(CheckpointError, match=r"f.bin holds more than tensors"):
        files.load_plain(tmp_path / "f.bin")
    (tmp_path / "g.bin").write_bytes(pickle.dumps(Planted(tmp_path / "run")))
    with pytest.raises(CheckpointError, match=r"g.bin"):
        files.load_plain(tmp_path / "g.bin")
    assert not (tmp_path / "run").exists()


@pytest.mark.both_ends
@pytest.mark.parametrize("module, name", sorted(METADATA_CLASSES))
def test_names_of_metadata_exist(module, name):
    """Those of torch: a name that disappears would make old checkpoints unreadable."""
    if module.startswith("torch"):
        import importlib

        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_damaged_metadata_is_named(tmp_path, damage):
    path = save_directory(tmp_path / "m") / ".metadata"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": content[:300], "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        reader.read_metadata(path.parent)


def test_missing_keys_and_other_shapes_are_named(tmp_path):
    folder = save_directory(tmp_path / "m")
    with pytest.raises(BaseException, match=r"has no model.bias"):
        load_directory(folder, {"model.bias": torch.zeros(3)})
    with pytest.raises(BaseException, match=r"model.weight \(\(3, 4\) in the checkpoint, \(4, 3\) here\)"):
        load_directory(folder, {"model.weight": torch.zeros(4, 3)})


# ---- checksums -----------------------------------------------------------------------------------------------------


def bytes_read() -> int:
    """By this process, from files and pipes, also those that the system has in memory."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK", 1 << 12)


def trained(sharded: bool, folder: Path, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, list]:
    """A model of 1.4 MB after a step, its optimizer, and what saves them to ``folder``."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(400, 401), torch.nn.Linear(401, 500))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 400)).sum().backward()
    optimizer.step()
    how = training.How(sharded)
    collect = [
        lambda: training.collect_model(model, folder, 0, how),
        lambda: training.collect_optimizer(optimizer, model, folder, 0, how),
    ]
    return model, optimizer, collect


def save_trained(folder: Path, sharded: bool, seed: int = 0) -> torch.nn.Module:
    model, _, collect = trained(sharded, folder, seed)
    begun = directory.stage(folder)
    for task in collect:
        task()(None)
    (folder / "trainer_state.json").write_text("written by a library")
    directory.commit(begun, manifest.Manifest())
    return model


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_no_byte_is_read_back_after_a_save_or_twice_in_a_load(tmp_path, small_blocks, sharded):
    save_trained(tmp_path / "imports", sharded)
    training.load_training_state(tmp_path / "imports", *trained(sharded, tmp_path, 1)[:2])
    before = bytes_read()
    saved = save_trained(tmp_path / "m", sharded)
    read_at_save = bytes_read() - before
    size = sum(path.stat().st_size for path in (tmp_path / "m").rglob("*") if path.is_file())
    model, optimizer, _ = trained(sharded, tmp_path, 1)
    before = bytes_read()
    training.load_training_state(tmp_path / "m", model, optimizer)
    read_at_load = bytes_read() - before
    assert size > 4_000_000 and all(map(torch.equal, model.parameters(), saved.parameters()))
    assert read_at_save < size / 20
    assert size * 0.95 < read_at_load < size * 1.05


def test_a_saved_chunk_is_read_once_for_all_chunks_of_a_rank(tmp_path):
    """[gate; up] was saved in one chunk; this rank holds rows of both."""
    full = torch.arange(400_000.0).reshape(800, 500)
    writer.save_chunks({"w": LocalShard.of(full)}, {"w": ("w",)}, tmp_path)
    chunks = tp_chunks(full.shape, ParameterSpec(dim=0, blocks=2), 1, 4)
    shard = LocalShard(full.shape, torch.zeros(200, 500), chunks)
    load_directory(tmp_path, {"w": shard})
    before = bytes_read()
    load_directory(tmp_path, {"w": shard})
    assert bytes_read() - before < full.nbytes * 1.05
    assert torch.equal(shard.local, torch.cat([full[100:200], full[500:600]]))


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "full"])
def test_a_flipped_byte_is_found_while_it_is_read(tmp_path, small_blocks, sharded):
    save_trained(tmp_path / "m", sharded)
    for path in sorted((tmp_path / "m").rglob("*")):
        if path.is_dir() or path.name == manifest.MANIFEST:
            continue
        content, middle = path.read_bytes(), path.stat().st_size // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} was changed"):
            training.load_training_state(tmp_path / "m", *trained(sharded, tmp_path, 1)[:2])
        path.write_bytes(content)
    training.load_training_state(tmp_path / "m", *trained(sharded, tmp_path, 1)[:2])


def test_a_file_that_was_changed_after_it_was_written_is_read_back(tmp_path):
    begun = directory.stage(tmp_path)
    for name in ("optimizer.bin", "scheduler.bin"):
        files.save_plain({"a": 1}, tmp_path / name)
    with (tmp_path / "optimizer.bin").open("ab") as stream:
        stream.write(b"more")
    directory.commit(begun, manifest.Manifest())
    found = manifest.verify(tmp_path)
    assert set(found.files) == {"optimizer.bin", "scheduler.bin"} and set(found.blocks) == {"scheduler.bin"}


def test_a_manifest_without_blocks_is_verified_before_the_load(tmp_path):
    """Of an earlier version: every file is read first."""
    save_trained(tmp_path / "m", True)
    path = tmp_path / "m" / manifest.MANIFEST
    content = json.loads(path.read_text())
    del content["blocks"], content["block_size"]
    path.write_text(json.dumps(content))
    model, optimizer, _ = trained(True, tmp_path, 1)
    training.load_training_state(tmp_path / "m", model, optimizer)
    file = tmp_path / "m" / "optimizer_0" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-9] + b"x" + file.read_bytes()[-8:])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp was changed.*Nothing was loaded"):
        training.load_training_state(tmp_path / "m", model, optimizer)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (4096, 4096), (3, 100_001)])
def test_checksum_of_a_concatenation(lengths):
    first, second = map(os.urandom, lengths)
    joined = checksums.concatenated(zlib.crc32(first), zlib.crc32(second), len(second))
    assert joined == zlib.crc32(first + second)


# ---- the life of a directory ---------------------------------------------------------------------------------------


def save(folder: Path, content: str, stop_at: str = "end") -> None:
    """A save that stops before its end, as if the process were killed there."""
    staged = directory.stage(folder)
    if stop_at == "begin":
        return
    (folder / "optimizer.bin").write_text(content)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "b").write_text(content)
    if stop_at == "written":
        return
    directory.commit(staged, manifest.Manifest(step=1))


def content_of(folder: Path) -> str:
    texts = {(folder / "optimizer.bin").read_text(), (folder / "sub" / "b").read_text()}
    assert len(texts) == 1
    return texts.pop()


def test_complete_directory_lists_and_checks_its_files(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "mine.txt").write_text("of the user")
    os.utime(folder / "mine.txt", (1, 1))
    save(folder, "one")
    assert set(manifest.verify(folder).files) == {"optimizer.bin", "sub/b"}
    assert directory.status(folder).kind == "complete"
    assert not (folder / manifest.MARK).exists() and not (folder / manifest.PREVIOUS).exists()
    assert json.loads((folder / manifest.MANIFEST).read_text())["step"] == 1


@pytest.mark.parametrize("stop_at", ["begin", "written"])
def test_interrupted_save_leaves_the_previous_checkpoint_of_that_name(tmp_path, stop_at):
    folder = tmp_path / "checkpoint-1"
    save(folder, "one")
    save(folder, "two", stop_at)
    found = directory.status(folder)
    assert found.kind == "incomplete" and manifest.MARK in found.reason
    for path in (directory.to_load(folder), directory.last_complete_checkpoint(tmp_path)):
        assert content_of(path) == "one" and manifest.verify(path).step == 1
    save(folder, "three", stop_at)
    assert content_of(directory.to_load(folder)) == "one"
    save(folder, "four")
    assert content_of(directory.to_load(folder)) == "four" and directory.to_load(folder) == folder
    assert not (folder / manifest.PREVIOUS).exists()


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_while_setting_aside(tmp_path, monkeypatch, moves):
    """The directory is put together again, whatever had been moved."""
    folder = tmp_path / "checkpoint-1"
    save(folder, "one")
    done = []
    rename = Path.rename

    def limited(self, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", limited)
        with pytest.raises(KeyboardInterrupt):
            save(folder, "two")
    path = directory.to_load(folder)
    assert path == folder and content_of(path) == "one" and manifest.verify(path)


def test_rollback_restores_the_previous_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-1"
    save(folder, "one")
    staged = directory.stage(folder)
    (folder / "optimizer.bin").write_text("tw")
    directory.roll_back(staged)
    assert directory.status(folder).kind == "complete" and content_of(folder) == "one"
    assert manifest.verify(folder)
    other = directory.stage(tmp_path / "checkpoint-2")
    directory.roll_back(other)
    assert directory.status(tmp_path / "checkpoint-2").kind == "incomplete"


def test_checkpoint_without_manifest_is_set_aside_too(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "optimizer.bin").write_text("stock")
    assert directory.status(folder).kind == "unverified" and manifest.verify(folder) is None
    save(folder, "two", "written")
    assert (directory.to_load(folder) / "optimizer.bin").read_text() == "stock"


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_file_is_named(tmp_path, damage):
    folder = tmp_path / "checkpoint-1"
    save(folder, "one")
    path = folder / "sub" / "b"
    path.unlink()
    if damage != "missing":
        path.write_text({"truncated": "on", "flipped": "onf"}[damage])
    with pytest.raises(CheckpointError, match=r"sub/b"):
        manifest.verify(folder)
    assert directory.status(folder).kind == ("complete" if damage == "flipped" else "damaged")


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 99}', '{"format": 1, "files": {"../x": {"size": 1, "crc32": 1}}}']
)
def test_manifest_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / manifest.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=manifest.MANIFEST):
        manifest.read_manifest(tmp_path)


def test_last_complete_checkpoint_is_chosen_and_the_others_are_named(tmp_path, caplog):
    save(tmp_path / "checkpoint-2", "two")
    save(tmp_path / "checkpoint-10", "ten")
    save(tmp_path / "checkpoint-11", "eleven", "written")
    save(tmp_path / "checkpoint-12", "twelve")
    (tmp_path / "checkpoint-12" / "optimizer.bin").write_text("short")
    (tmp_path / "checkpoint-13").mkdir()
    assert directory.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    for expected in (
        "checkpoint-11 is incomplete",
        "checkpoint-12 is damaged",
        "checkpoint-13 is incomplete: it is empty",
    ):
        assert expected in caplog.text
    assert f"resuming from the last complete checkpoint, {tmp_path / 'checkpoint-10'}" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"checkpoint-11 is incomplete.*last complete one beside it is .*checkpoint-10"
    ):
        directory.to_load(tmp_path / "checkpoint-11")
    assert directory.last_complete_checkpoint(tmp_path / "checkpoint-13") is None


def test_rotation_keeps_the_last_complete_one(tmp_path):
    for number, stop in ((1, "end"), (2, "end"), (3, "written"), (4, "end"), (5, "written")):
        save(tmp_path / f"checkpoint-{number}", str(number), stop)
    deleted = directory.rotate(tmp_path, 1, {tmp_path / "checkpoint-1"})
    assert sorted(path.name for path in deleted) == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-4"]
    assert directory.rotate(tmp_path, None, set()) == []


def test_rotation_goes_by_time(tmp_path):
    """A run that begins anew beside the checkpoints of an earlier one keeps its own, as with the stock Trainer."""
    for age, number in ((40, 100), (30, 200), (20, 2), (10, 4)):
        folder = tmp_path / f"checkpoint-{number}"
        save(folder, str(number))
        os.utime(folder, (time.time() - age,) * 2)
    stock = tmp_path / "stock"
    shutil.copytree(tmp_path, stock)  # with its times
    rotate_checkpoints(str(stock), 2, use_mtime=True)
    deleted = directory.rotate(tmp_path, 2, {tmp_path / "checkpoint-4"})
    assert [path.name for path in deleted] == ["checkpoint-100", "checkpoint-200"]
    assert sorted(path.name for path in directory.numbered(tmp_path)) == sorted(os.listdir(stock))


def test_read_only_directory_is_named(tmp_path, monkeypatch):
    """Root may write everywhere, so the refusal of the system is played."""

    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(self))

    save(tmp_path / "checkpoint-1", "one")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-2.*Read-only file system"):
        directory.stage(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-1.*Read-only file system"):
        directory.stage(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    assert content_of(directory.to_load(tmp_path / "checkpoint-1")) == "one"


# ---- random states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["torch", "json"])
def test_full_disk_names_the_file_that_a_library_was_writing(write, tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "deeper").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*deeper/rng_state_0\.pth"):
        with files.naming(tmp_path), limited(here=True):
            if write == "torch":
                torch.save(torch.zeros(10_000), tmp_path / "deeper" / "rng_state_0.pth")
            else:
                (tmp_path / "deeper" / "rng_state_0.pth").write_text("0" * 10_000)


def test_origin_of_random_states():
    tp2_dp2 = {"dp_shard": 2, "tp": 2}
    same = [random_states.origin(rank, tp2_dp2, tp2_dp2, 4) for rank in range(4)]
    assert [item.rank for item in same] == [0, 1, 2, 3] and not any(item.row for item in same)
    fsdp4 = [random_states.origin(rank, {"dp_shard": 4}, tp2_dp2, 4) for rank in range(4)]
    assert [(item.rank, item.row) for item in fsdp4] == [(0, None), (2, None), (0, 2), (2, 3)]
    tp4 = [random_states.origin(rank, {"tp": 4}, tp2_dp2, 4) for rank in range(4)]
    assert [(item.rank, item.row) for item in tp4] == [(0, None)] * 4
    assert random_states.origin(0, {}, tp2_dp2, 4) == random_states.Origin(0)


def test_random_states_are_restored_and_new_rows_draw_otherwise():
    states = {
        "random_state": random.getstate(),
        "numpy_random_seed": numpy.random.get_state(),
        "torch_manual_seed": torch.get_rng_state(),
    }

    def draw() -> list[float]:
        return [random.random(), float(numpy.random.rand()), torch.rand(()).item()]

    want = draw()
    random_states.restore(states, random_states.Origin(0), True)
    assert draw() == want
    drawn = []
    for row in (2, 3, 2):
        random_states.restore(states, random_states.Origin(0, row), False)
        drawn.append(draw())
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1]) and not set(drawn[0]) & set(want)


@pytest.mark.parametrize("options", [{"async_save": "yes"}, {"async_save": True, "backend": "megatron_fsdp"}])
def test_async_save_is_checked(options):
    with pytest.raises(ConfigError, match=r"async_save="):
        AutoParallelismConfig(**options)


# ---- the seam to the Trainer ---------------------------------------------------------------------------------------


def test_trainer_is_extended_below_its_subclasses():
    from transformers import Trainer

    from hf_automodel_parallel.trainer_plugin.extend import _extended
    from hf_automodel_parallel.trainer_plugin.trainer import ParallelTrainer

    class Base(Trainer):
        pass

    class Mine(Base):
        pass

    extended = _extended(Mine)
    order = [cls for cls in extended.__mro__ if issubclass(cls, Trainer)]
    assert order[:4] == [extended, Mine, Base, ParallelTrainer] and order[-1] is Trainer
    assert extended.__name__ == "Mine" and extended.__qualname__ == Mine.__qualname__
    assert _extended(extended) is extended and _extended(Mine) is extended
    assert Mine.__mro__[2] is Trainer and _extended(Trainer).__mro__[1] is ParallelTrainer


@pytest.mark.both_ends
def test_methods_of_the_trainer_that_are_extended_exist():
    """A method that the Trainer no longer calls would leave its checkpoints without ours."""
    import inspect

    from transformers import Trainer

    from hf_automodel_parallel.trainer_plugin.trainer import ParallelTrainer

    names = [name for name, value in vars(ParallelTrainer).items() if inspect.isfunction(value)]
    own = {"_manifest_of", "_load_weights"}
    assert {name for name in names if not hasattr(Trainer, name)} == own
    source = inspect.getsource(Trainer)
    assert all(f"self.{name}(" in source for name in set(names) - own - {"train"})
    mentions = source.count("save_fsdp_model(") + source.count("load_fsdp_model(") + source.count("_fsdp_optimizer(")
    assert (
        mentions == 5
    )  # in _save_optimizer_and_scheduler, _load_from_checkpoint, _load_best_model, _load_optimizer_...


def test_what_was_trained_is_loaded_where_it_is_frozen(tmp_path):
    """A norm of the base was trained beside the adapter; whoever loads the checkpoint to evaluate has it frozen."""
    model = build("llama", LORA)
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad_(True)
    torch.nn.init.constant_(norm, 3.0)
    collect_model(model, tmp_path, 0, How(sharded=True, adapter_only=True))(None)
    other = build("llama", LORA, seed=1)
    restore_model(other, tmp_path, adapter_only=True)
    assert torch.equal(other.base_model.model.model.norm.weight, norm)


def test_a_complete_checkpoint_is_not_rolled_back(tmp_path):
    save = directory.stage(tmp_path / "checkpoint-1")
    (save.folder / "optimizer.bin").write_text("x")
    with mock.patch.object(Path, "unlink", side_effect=OSError("stale")), pytest.raises(Exception, match="stale"):
        directory.commit(save, manifest.Manifest())
    directory.roll_back(save)
    assert directory.status(save.folder).kind == "complete" and (save.folder / "optimizer.bin").exists()


def test_files_are_found_after_the_script_has_changed_its_directory(tmp_path, monkeypatch):
    build("llama", None).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (file,) = resolve_files("model", None, None, {})
    monkeypatch.chdir("/")
    file.close()
    file.check_unchanged()
    assert file.read(file.keys[0], ()).numel()


def test_files_that_other_code_loads_are_read_and_checked_before(tmp_path: Path):
    """megatron-fsdp's states are loaded by Accelerate, which verifies nothing."""
    path = tmp_path / "optimizer.bin"
    path.write_bytes(b"x" * 100)
    found = checksums.read_back(path)
    saved = manifest.Manifest(
        files={path.name: {"size": found.size, "crc32": found.crc32}}, blocks={path.name: "00000000"}
    )
    manifest.verify_for_others(tmp_path, saved, "optimizer")
    path.write_bytes(b"x" * 99 + b"y")
    manifest.verify_for_others(tmp_path, saved, "pytorch_model_fsdp")
    with pytest.raises(CheckpointError, match=r"optimizer\.bin was changed since it was saved"):
        manifest.verify_for_others(tmp_path, saved, "optimizer")
