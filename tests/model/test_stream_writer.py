"""Files written one tensor at a time: what other readers make of them, and what stays when that fails."""

import errno
import json
import multiprocessing
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_disk import disk_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from happyhorse.model import file_lock, stream_writer
from happyhorse.model.stream_writer import (
    DTYPE_NAMES,
    Entry,
    GgufStreamWriter,
    SafetensorsWriter,
    check_target,
)

STATE = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "scale": torch.tensor(0.5),
    "weight": torch.arange(15.0).reshape(5, 3).to(torch.float8_e4m3fn),
    "norm": torch.randn(7, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(5.0).to(torch.bfloat16),
    "nothing": torch.zeros(0, 4),
}


def entries(state: dict[str, Tensor]) -> list[Entry]:
    return [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.items()]


def write_all(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with SafetensorsWriter(path, entries(state), metadata) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)


def test_the_library_reads_what_was_streamed_and_finds_it_aligned(tmp_path: Path) -> None:
    path, metadata = tmp_path / "a.safetensors", {"note": 'two "words", ä', "config": json.dumps({"a": 1})}
    write_all(path, STATE, metadata)
    read = load_file(path)
    assert read.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape, name
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    assert length % 8 == 0
    for name, tensor in STATE.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0, name
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_pieces_make_the_same_file_as_whole_tensors(tmp_path: Path) -> None:
    weight = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    write_all(tmp_path / "whole", {"weight": weight, "norm": STATE["norm"]})
    with SafetensorsWriter(tmp_path / "pieces", entries({"weight": weight, "norm": STATE["norm"]})) as writer:
        writer.write("weight", (weight[start : start + 4] for start in range(0, 10, 4)))
        writer.write("norm", STATE["norm"])
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_transposed_tensor_is_written_row_by_row(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3).T
    write_all(tmp_path / "a", {"weight": weight})
    assert torch.equal(load_file(tmp_path / "a")["weight"], weight)


def test_a_value_known_only_at_the_end_takes_its_place_in_the_metadata(tmp_path: Path) -> None:
    for kind in (SafetensorsWriter, GgufStreamWriter):
        path = tmp_path / kind.__name__
        with kind(path, [("norm", "F32", (7,))], {"hash": "#" * 8, "note": "n"}) as writer:
            writer.write("norm", STATE["norm"])
            writer.fill_in("#" * 8, "01234567")
            for wrong in (("#" * 8, "0123"), ("absent", "000000")):
                with pytest.raises(ValueError, match="is not once in the metadata, or longer or shorter"):
                    writer.fill_in(*wrong)
        content = path.read_bytes()
        assert b"01234567" in content and b"#" not in content
    with safe_open(tmp_path / "SafetensorsWriter", "pt") as file:
        assert file.metadata() == {"hash": "01234567", "note": "n"}
        assert torch.equal(file.get_tensor("norm"), STATE["norm"])


def test_the_gguf_library_reads_what_was_streamed(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(2)
    whole, broken, short = (torch.randn(shape, generator=generator) for shape in ((4, 64), (64, 20), (8, 20)))
    norm = torch.randn(5, generator=generator)

    def blocks(weight: Tensor) -> Tensor:
        quantised = gguf.quants.quantize(weight.reshape(-1, 32).numpy(), gguf.GGMLQuantizationType.Q8_0)
        return torch.from_numpy(quantised)

    path = tmp_path / "a.gguf"
    listed = [("whole", "Q8_0", (4, 64)), ("norm", "F32", (5,)), ("broken", "Q8_0", (64, 20)),
              ("half", "BF16", (3, 2)), ("short", "Q8_0", (8, 20))]  # fmt: skip
    half = torch.tensor([[1.5, -2.0], [3.0, 0.25], [8.0, 9.0]], dtype=torch.bfloat16)
    data = [blocks(whole), norm, blocks(broken), half, blocks(short)]
    with GgufStreamWriter(path, listed, {"family": "happyhorse", "note": "ä"}) as writer:
        for (name, _, _), tensor in zip(listed, data, strict=True):
            writer.write(name, tensor)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = {name: tensor.shape.tolist()[::-1] for name, tensor in tensors.items()}
    assert stored == {"whole": [4, 64], "norm": [5], "broken": [5, 256], "half": [3, 2], "short": [5, 32]}
    for name, tensor in zip(("whole", "broken", "short"), (whole, broken, short), strict=True):
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert abs(values.reshape(tensor.shape) - tensor.numpy()).max() < 0.02, name
    assert tensors["norm"].data.tolist() == norm.tolist()
    assert torch.equal(torch.from_numpy(tensors["half"].data.copy()).view(torch.bfloat16), half)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "happyhorse"
    assert fields["happyhorse.family"] == "happyhorse" and fields["happyhorse.note"] == "ä"
    assert {name: value for name, value in fields.items() if "orig_shape" in name} == {
        "comfy.gguf.orig_shape.broken": [64, 20],
        "comfy.gguf.orig_shape.short": [8, 20],
    }
    # the reader of ComfyUI-GGUF refuses other kinds of arrays
    field = reader.get_field("comfy.gguf.orig_shape.broken")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]


def test_values_that_fill_no_blocks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[3, 5\] values are no whole number of blocks of 32"):
        GgufStreamWriter(tmp_path / "a.gguf", [("weight", "Q4_0", (3, 5))], {})
    assert not list(tmp_path.iterdir())


WRONG = {
    "order": ([("b", STATE["norm"])], "b is written out of turn; .* takes a now"),
    "dtype": (
        [("a", STATE["norm"].double())],
        r"a of .* was to be torch.float32 and 28 .* got torch.float64",
    ),
    "too short": ([("a", STATE["norm"][:3])], "a of .* was to be .* 28 bytes, got torch.float32 and 12"),
    "too long": ([("a", torch.zeros(9))], "a of .* was to be .* 28 bytes, got torch.float32 and 36"),
    "twice": ([("a", STATE["norm"]), ("a", STATE["norm"])], "a is written out of turn; .* takes b now"),
    "one missing": ([("a", STATE["norm"])], "is not whole: 1 of its tensors were not written"),
    "one too many": (
        [("a", STATE["norm"]), ("b", STATE["norm"]), ("c", STATE["norm"])],
        "c is written out of turn; .* takes nothing more now",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_another_tensor_than_was_told_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    writes, message = WRONG[case]
    with (
        pytest.raises(ValueError, match=message),
        SafetensorsWriter(tmp_path / "x", [("a", "F32", (7,)), ("b", "F32", (7,))]) as writer,
    ):
        for name, tensor in writes:
            writer.write(name, tensor)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_whatever_ends_the_work_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(error), SafetensorsWriter(path, [("a", "F32", (7,)), ("b", "F32", (7,))]) as writer:
        writer.write("a", STATE["norm"])
        assert len(list(tmp_path.iterdir())) == 2, "the unfinished file must be there"
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"
    write_all(path, {"a": STATE["norm"]})
    assert torch.equal(load_file(path)["a"], STATE["norm"])


@pytest.mark.parametrize("num_bytes", [0, 100, 300_000, 3_000_000])
def test_a_disk_that_fills_up_is_told_with_the_target_and_leaves_nothing(
    tmp_path: Path, num_bytes: int
) -> None:
    state = {name: torch.zeros(500_000) for name in ("a", "b")}
    message = r"the file could not be written: file too large \(it needs 0.004 GB, .* GB are free\)"
    with disk_of(num_bytes), pytest.raises(OSError, match=message) as caught:
        write_all(tmp_path / "x.safetensors", state)
    assert caught.value.filename == str(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    message = r"no space left on device \(it needs 0.004 GB, 0.003 GB are free\); free some space or"
    with pytest.raises(OSError, match=message):
        write_all(tmp_path / "x", {"a": torch.zeros(1_000_000)})
    assert not list(tmp_path.iterdir())


def _begin(path: Path, begun: "multiprocessing.synchronize.Event") -> None:
    with SafetensorsWriter(path, [("a", "F32", (7,)), ("b", "F32", (7,))]) as writer:
        writer.write("a", STATE["norm"])
        begun.set()
        signal.pause()


@pytest.mark.skipif(not hasattr(signal, "pause"), reason="needs POSIX signals")
def test_what_a_killed_run_leaves_is_removed_and_a_live_run_is_not_disturbed(tmp_path: Path) -> None:
    path, context = tmp_path / "a[1].safetensors", multiprocessing.get_context("spawn")
    other = tmp_path / ".a[1].safetensors.of-someone-else"
    other.touch()
    runs = []
    for _ in range(2):
        begun = context.Event()
        runs.append(context.Process(target=_begin, args=(path, begun)))
        runs[-1].start()
        assert begun.wait(60)
    killed, live = runs
    try:
        assert len(list(tmp_path.glob("*.unfinished"))) == 2
        killed.kill()
        killed.join()
        assert not path.exists()
        write_all(path, {"a": STATE["norm"]})
        assert len(list(tmp_path.glob("*.unfinished"))) == 1 and live.is_alive() and other.exists()
    finally:
        live.kill()
        live.join()
    write_all(path, {"a": STATE["norm"]})
    assert sorted(file.name for file in tmp_path.iterdir()) == [other.name, path.name]


def failing_lock(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    if file_lock.fcntl is None:
        pytest.skip("there are no such locks here")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(file_lock.fcntl, "flock", fail)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_to_and_a_live_run_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    failing_lock(monkeypatch, OSError(number, "no locks"))
    path = tmp_path / "a"
    with SafetensorsWriter(path, [("a", "F32", (7,))]) as live:
        write_all(path, {"a": STATE["norm"] + 1})
        live.write("a", STATE["norm"])
    assert torch.equal(load_file(path)["a"], STATE["norm"]) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_lock_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    failing_lock(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        write_all(tmp_path / "a", {"a": STATE["norm"]})
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert "the file could not be written: broken" in str(caught.value)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of shards, the second of them a link to a file elsewhere, and one file beside it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in (folder / "1.safetensors", tmp_path / "blob", tmp_path / "single.safetensors"):
        file.touch()
    (folder / "2.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "link").symlink_to(folder)
    return folder


TARGETS = {
    "shards/1.safetensors": "lies in the source folder .*shards, .*; choose another folder",
    "shards/2.safetensors": "lies in the source folder .*; choose another folder",
    "shards/new.gguf": "lies in the source folder .*; choose another folder",
    "shards/deep/new.gguf": "lies in the source folder .*; choose another folder",
    "link/new.gguf": "lies in the source folder .*; choose another folder",
    "shards/../shards/new.gguf": "lies in the source folder .*; choose another folder",
    "blob": "blob is a file of the source .*shards; choose another folder",
    "single.safetensors": "is the source itself; give another name",
    "link/../single.safetensors": "is the source itself; give another name",
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", list(TARGETS))
def test_a_target_that_would_harm_its_sources_is_refused(
    tmp_path: Path, shards: Path, target: str, overwrite: bool
) -> None:
    with pytest.raises(ValueError, match=TARGETS[target]):
        check_target(tmp_path / target, [tmp_path / "single.safetensors", shards], overwrite)


def test_a_target_beside_its_sources_is_accepted_and_replaced_only_when_asked(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [Path("single.safetensors"), Path("shards"), Path("absent")]
    for new in ("new.gguf", "shards2.gguf"):
        check_target(Path(new), sources, overwrite=False)
    Path("old.gguf").touch()
    with pytest.raises(
        ValueError, match=r"old\.gguf exists; give another name, or --overwrite to replace it"
    ):
        check_target(Path("old.gguf"), sources, overwrite=False)
    check_target(Path("old.gguf"), sources, overwrite=True)
    with pytest.raises(ValueError, match="lies in the source folder shards"):
        check_target(shards / "new.gguf", sources, overwrite=True)
