"""The pickle machine: reads what pickle writes, runs nothing, keeps within its bounds."""

import argparse
import collections
import io
import math
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnguard.checkpoint import read_checkpoint
from bnguard.checkpoint.storage import Source
from bnguard.checkpoint.unpickling import Blob, InertObject, Reference, plain, read_pickle
from bnguard.errors import CheckpointError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(data):
    source = Source(Path("pickle"), io.BytesIO(data), 0, len(data))
    return read_pickle(source, source.stream())


def same(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


KEYS = st.one_of(st.text(max_size=20), st.integers(), st.booleans(), st.none())
ATOMS = st.one_of(KEYS, st.floats(), st.binary(max_size=300), st.text(max_size=300))
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner)
    ),
    max_leaves=30,
)


@given(VALUES, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_are_read_as_pickle_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    # Python 3 has no opcode for bytes before protocol 3: there they are a call.
    if protocol >= 3:
        assert same(read(data), pickle.loads(data))
    else:
        read(data)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_text_and_numbers_in_every_protocol(protocol):
    value = {"text": "σ\n\\ü", "n": [0, 255, 65_536, -1, 2**40, 2.5, True, None], "t": (1, (2,))}
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_become_descriptions(protocol):
    namespace = argparse.Namespace(lr=0.1, layers=[1, 2])
    described = read(pickle.dumps(namespace, protocol))
    assert isinstance(described, InertObject)
    assert described.class_name == "argparse.Namespace"
    assert plain(described) == {"lr": 0.1, "layers": [1, 2]}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dictionaries_of_other_classes_are_dictionaries(protocol):
    counts = read(pickle.dumps(collections.OrderedDict(a=1, b=2), protocol))
    assert plain(counts) == {"a": 1, "b": 2}


class Running:
    """Says what unpickling it would do."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touching(path):
    """Pickles, each of which would make a file if anything of it ran."""
    text = f"open({str(path)!r}, 'w').close()"
    for protocol in PROTOCOLS:
        yield pickle.dumps(Running(os.system, f"touch {path}"), protocol)
        yield pickle.dumps(Running(eval, text), protocol)
        yield pickle.dumps(Running(exec, text), protocol)
        yield pickle.dumps(Running(open, str(path), "w"), protocol)
        yield pickle.dumps([Running(getattr, "x", "join"), Running(exec, text)], protocol)
        inner = pickle.dumps(Running(exec, text), protocol)
        yield pickle.dumps(Running(pickle.loads, inner), protocol)
        yield pickle.dumps(Running(torch.storage._load_from_bytes, inner), protocol)
    # Old and rare ways to make an object, and state that would be set on a class.
    yield f"(S'touch {path}'\nios\nsystem\n.".encode()
    yield b"(cos\nsystem\n" + pickle.dumps(f"touch {path}", 0)[:-1] + b"o."
    yield b"cos\nsystem\n" + pickle.dumps((f"touch {path}",), 2)[2:-1] + b"\x81."
    yield b"ccollections\nOrderedDict\n}S'__setitem__'\ncos\nsystem\nsb."
    yield b"cbuiltins\ngetattr\ncos\nsystem\nS'x'\n\x86R."


def test_hostile_pickles_run_nothing(tmp_path):
    path = tmp_path / "touched"
    pickles = list(touching(path))
    subprocess.run(["touch", path], check=True)  # what the pickles would do works here
    path.unlink()
    for data in pickles:
        read(data)
        assert not path.exists()


def test_a_hostile_checkpoint_is_read_and_runs_nothing(tmp_path):
    path = tmp_path / "touched"
    state = torch.nn.BatchNorm1d(2).state_dict()
    value = {"state_dict": state, "args": Running(os.system, f"touch {path}")}
    for is_zip in (True, False):
        torch.save(value, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)
        assert len(read_checkpoint(tmp_path / "evil.pt").layers) == 1
        assert not path.exists()


def test_nothing_is_imported(tmp_path):
    """Not even a module that is there and harmless; torch neither."""
    (tmp_path / "theirs.py").write_text("class Config: pass\nprint('imported')\n")
    torch.save(torch.nn.BatchNorm1d(2).state_dict(), tmp_path / "state.pt")
    code = textwrap.dedent("""
        import sys
        from bnguard.checkpoint import read_checkpoint
        assert len(read_checkpoint("config.pt").layers) == 1
        assert not {"theirs", "torch"} & set(sys.modules), sorted(sys.modules)
    """)
    save = textwrap.dedent("""
        import torch, theirs
        value = {"config": theirs.Config(), "model": torch.load("state.pt")}
        torch.save(value, "config.pt")
    """)
    for line in (save, code):
        done = subprocess.run(
            [sys.executable, "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"N",
        b"\x80\x05",
        b"(.",
        b"]a.",
        b"h\x07.",
        b"\xff.",
        b"\x82\x01.",
        b"\x97.",
        b"K",
        b"X\xff\xff\xff\xffabc.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x8d" + b"\x00\x00\x00\x00\x00\x01\x00\x00" + b"abc.",
        b"\x8b\xff\xff\xff\x7fabc.",
        b"\x8b\xff\xff\xff\xff.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"L" + b"9" * 4000 + b"\n.",
        b"Fnan?\n.",
        b"c" + b"x" * 100_000 + b"\nx\n.",
        b"cos\n\xff\n.",
        b"NN\x93.",
        b"]]s.",
        b"K\x01N\x85u.",
        b"Nb",
        b"S'\n.",
        b"NQ.",
        b"Pid\n.",
        b"X\x02\x00\x00\x00\xc3(.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
        b"ctorch\nSize\nN\x85R.",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_damaged_pickles_are_refused(data):
    with pytest.raises(CheckpointError, match="damaged"):
        read(data)


def test_a_deeply_nested_pickle_is_read_without_recursion():
    assert read(b"(" * 50_000 + b"N" + b"t" * 50_000 + b".")


def test_an_object_made_by_an_object_and_so_on_has_no_name():
    described = read(b"cos\nsystem\n" + b")\x81" * 50_000 + b".")
    assert described.class_name == "an unnamed object"
    assert repr(described) == "<an unnamed object>"


def test_rebuilding_is_not_recursive():
    """A tensor that is rebuilt from a tensor that is rebuilt from ..."""
    name, depth = b"ctorch._tensor\n_rebuild_from_type_v2\n", 20_000
    data = name + b"(" + (name + b"N(") * depth + name + b"N)Nt" + b"Nt" * depth + b"R."
    assert isinstance(read(data), InertObject)


def test_names_of_objects_as_keys_of_hyper_parameters():
    described = read(b"}cos\nsystem\n)\x81K\x01s.")
    assert plain(described) == {"<os.system>": 1}


def test_long_texts_stay_in_the_file():
    (blob, short) = read(pickle.dumps([b"x" * 10**6, "short"], 4))
    assert isinstance(blob, Blob)
    assert blob.place.read(0, blob.place.size) == b"x" * 10**6
    assert short == "short"


def test_a_key_that_is_endless_to_hash_is_not_hashed():
    """Forty tuples, each of the last one twice: 2^40 visits to hash the outermost."""
    tower = b"K\x01" + b"2\x86" * 40
    (key,) = read(b"}" + tower + b"Ns.")
    assert isinstance(key, InertObject)


def test_a_memo_index_takes_no_memory():
    """The standard library's unpickler makes room for all indices up to the one given."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read(b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff.") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_references_are_names():
    assert read(b"cos\nsystem\n.") == Reference("os", "system")
