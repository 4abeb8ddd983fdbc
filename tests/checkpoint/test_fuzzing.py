"""Whatever is in a file: it is read, or refused in one line, within a bounded amount of memory."""

import contextlib
import json
import os
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnguard.checkpoint import (
    compare,
    load_state_dict,
    read_checkpoint,
    unpickling,
    write_statistics,
)
from bnguard.errors import CheckpointError
from tests.checkpoint.saving import (
    save_distributed,
    save_legacy,
    save_legacy_module,
    save_module,
    save_safetensors,
    save_sharded_bin,
    save_zip,
    used_network,
)

FUZZ = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Where in a file, as a fraction of its length, and what is put there.
POSITIONS = st.floats(0, 1, exclude_max=True)
JUNK = st.one_of(
    st.binary(min_size=1, max_size=16),
    st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 3, b"(" * 50, b"}", b"R", b"."]),
    st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n)),
)
OVERWRITE, INSERT, CUT, COPY = range(4)
MUTATIONS = st.lists(
    st.tuples(st.sampled_from([OVERWRITE, INSERT, CUT, COPY]), POSITIONS, POSITIONS, JUNK),
    min_size=1,
    max_size=5,
)


def mutated(data, mutations):
    for kind, first, second, junk in mutations:
        at, other = int(first * len(data)), int(second * len(data))
        if kind == OVERWRITE:
            data = data[:at] + junk + data[at + len(junk) :]
        elif kind == INSERT:
            data = data[:at] + junk + data[at:]
        elif kind == CUT:
            data = data[:at] + data[at + 1 + other % 64 :]
        else:
            data = data[:at] + data[other : other + 64] + data[at + 64 :]
    return data


@contextlib.contextmanager
def bounded_memory(most_bytes=2**29):
    """Refuse this process more memory than this beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + most_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def use(path, original):
    """Do all that can be done with a checkpoint; it may be refused at any point."""
    with bounded_memory(), contextlib.suppress(CheckpointError):
        checkpoint = read_checkpoint(path)
        for layer in checkpoint.layers:
            assert layer.running_mean.shape == layer.running_var.shape
        assert all("\n" not in problem for problem in checkpoint.problems)
        compare(original, checkpoint)
        if checkpoint.layers:
            layer = checkpoint.layers[0]
            new = {layer.key("running_mean"): torch.zeros(layer.channels)}
            copy = path.with_name(f"copy-{path.name}")
            assert read_checkpoint(write_statistics(path, copy, new, {}, force=True)).layers
        load_state_dict(path)


@pytest.mark.parametrize(
    "save",
    [save_zip, save_legacy, save_safetensors, save_module, save_legacy_module],
    ids=lambda save: save.__name__,
)
def test_mutated_files(save, tmp_path):
    path = save(used_network(), tmp_path)
    original, data = read_checkpoint(path), path.read_bytes()
    broken = tmp_path / "broken.pt"

    @FUZZ
    @given(MUTATIONS)
    def fuzz(mutations):
        broken.write_bytes(mutated(data, mutations))
        use(broken, original)

    fuzz()


@pytest.mark.parametrize(
    ("save", "end"), [(save_zip, b"PK\x07\x08"), (save_legacy, b"\x80\x02]")], ids=["zip", "legacy"]
)
def test_mutated_pickles(save, end, tmp_path):
    """Mutations of the pickle, which is a small part of a file."""
    path = save(used_network(), tmp_path)
    original, data = read_checkpoint(path), path.read_bytes()
    start = data.index(b"\x80\x02c")
    stop = data.index(end, start)
    broken = tmp_path / "broken.pt"

    @FUZZ
    @given(MUTATIONS)
    def fuzz(mutations):
        part = mutated(data[start:stop], mutations)[: stop - start].ljust(stop - start, b"0")
        broken.write_bytes(data[:start] + part + data[stop:])
        use(broken, original)

    fuzz()


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_distributed, ".metadata"),
        (save_distributed, "__0_0.distcp"),
        (save_sharded_bin, "pytorch_model.bin.index.json"),
        (save_sharded_bin, "pytorch_model-00001-of-00002.bin"),
    ],
)
def test_mutated_folders(save, name, tmp_path):
    path = save(used_network(), tmp_path)
    original = read_checkpoint(path)
    broken = tmp_path / "broken"

    @FUZZ
    @given(MUTATIONS)
    def fuzz(mutations):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(path, broken)
        part = broken / name
        part.write_bytes(mutated(part.read_bytes(), mutations))
        use(broken, original)

    fuzz()


@FUZZ
@given(data=st.binary(max_size=400))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "any"
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_checkpoint(path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "bn.running_mean"]),
            inner,
        ),
    ),
)


@FUZZ
@given(header=JSON)
def test_any_header_of_safetensors(tmp_path, header):
    text = json.dumps({"a": header}).encode()
    path = tmp_path / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with contextlib.suppress(CheckpointError):
        read_checkpoint(path)


class Rebuilt:
    """A tensor that is described as larger than what is stored of it."""

    def __init__(self, stored, shape, stride):
        storage = torch.storage.TypedStorage(
            wrap_storage=stored.untyped_storage(), dtype=stored.dtype, _internal=True
        )
        self.arguments = (storage, 0, shape, stride, False, {})

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(("shape", "stride"), [((5,), (1,)), ((2**40,), (1,)), ((2**40,), (2,))])
def test_a_tensor_larger_than_its_storage(tmp_path, shape, stride):
    mean, path = torch.zeros(4), tmp_path / "large.pt"
    state = {"bn.running_mean": mean, "bn.running_var": torch.ones(4)}
    torch.save(state | {"other": Rebuilt(mean, shape, stride)}, path)
    assert len(read_checkpoint(path).layers) == 1
    with bounded_memory():
        for do in (
            lambda: load_state_dict(path),
            lambda: write_statistics(path, tmp_path / "copy", {"bn.running_mean": mean}, {}),
        ):
            with pytest.raises(CheckpointError, match="truncated or damaged"):
                do()


def test_a_zip_bomb_is_refused_before_it_goes_off(tmp_path):
    """Zeros that take a thousandth of their size."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/version", "3")
        archive.writestr("bomb/data.pkl", bytes(10**8))
    assert path.stat().st_size < 10**6
    with bounded_memory(), pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("opcode", [b"}", b"N\x94"], ids=["containers", "memo"])
def test_a_pickle_bomb_is_refused(tmp_path, opcode, monkeypatch):
    """A tenth of what a pickle of ten megabytes can ask for, in a tenth of the memory."""
    monkeypatch.setattr(unpickling, "_MOST_OPCODES", unpickling._MOST_OPCODES // 10)
    path = save_legacy(used_network(), tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\x80\x02c")] + opcode * 1_100_000)
    with (
        bounded_memory(2**31 // 10),
        pytest.raises(CheckpointError, match="more than 1,000,000 opcodes"),
    ):
        read_checkpoint(path)
