"""Pickles: what is written is read back, by us and by torch, and none of them runs anything."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.checkpoint.contents import Digest
from shardwright.checkpoint.pickles import (
    Named,
    Ordered,
    Size,
    Span,
    StandIn,
    Storage,
    Tensor,
    TorchFile,
    decode,
    dumps,
    encode,
    fields_of,
    hole,
    lay_out,
    loads,
    named,
    open_torch,
    read_torch,
    same,
    small,
    stand_in,
)
from shardwright.checkpoint.pickles.zip_directory import CHECKED_BYTES
from shardwright.ir import CorruptCheckpoint, InvalidInput

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "U16": torch.uint16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200),
    st.floats(), st.text(), st.binary(max_size=20), st.complex_numbers(allow_nan=False),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=6), st.integers(), st.tuples(st.integers(), st.text(max_size=3)))
WORDS = st.from_regex(r"[a-z_][a-z_.]{0,8}[a-z]", fullmatch=True)


def _foreign(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(name: str, args: list[Any], state: Any, called: bool, has_state: bool) -> StandIn:
        found = stand_in("megatron.some", "C" + name.replace(".", "_"), *args, called=called)
        if has_state:
            found.state = state
        return found

    return st.builds(
        made, WORDS, st.lists(children, max_size=2), children, st.booleans(), st.booleans()
    )


VALUES = st.recursive(
    PLAIN | st.builds(named, WORDS, WORDS),
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(KEYS, children, max_size=4),
        st.dictionaries(KEYS, children, max_size=4).map(Ordered),
        st.lists(st.integers(0, 2**40), max_size=4).map(Size),
        st.sets(st.integers(), max_size=4),
        st.frozensets(st.text(max_size=3), max_size=3),
        st.binary(max_size=5).map(bytearray),
        st.lists(st.integers(-9, 9), max_size=5).map(lambda values: small("I16", values)),
        _foreign(children),
    ),
    max_leaves=12,
)


def _whole(value: Any, nbytes: Any, path: Path) -> Any:
    """A value written as a torch.save file (holes filled with `nbytes(n)`)."""
    layout = lay_out(path.name, value)
    data = bytearray(layout.nbytes)
    digests = []
    for given_bytes in layout.literals:
        data[given_bytes.offset : given_bytes.offset + len(given_bytes.data)] = given_bytes.data
    for storage, record in layout.records.items():
        assert record.offset % 64 == 0
        content = nbytes(storage.nbytes)
        data[record.offset : record.offset + record.nbytes] = content
        digests.append(Digest("crc32", f"{zlib.crc32(content):08x}"))
    for given_bytes in layout.ending(digests):
        data[given_bytes.offset : given_bytes.offset + len(given_bytes.data)] = given_bytes.data
    assert len(data) == layout.nbytes
    path.write_bytes(data)


@given(VALUES)
def test_what_is_dumped_is_loaded(value: Any) -> None:
    data, storages = dumps(value)
    again = loads(data, "memory", lambda key, *_: storages[int(key)])
    assert same(again, value)
    assert dumps(again)[0] == data


@pytest.mark.parametrize(
    "name",
    ["posix.system", "builtins.eval", "__builtin__.exec", "numpy.testing.rundocs",
     "subprocess.Popen", "torch.hub.load", "runpy.run_path"],
)  # fmt: skip
def test_calls_of_a_source_are_not_written_on(name: str) -> None:
    value = stand_in(*name.rsplit(".", 1), "touch x", called=True)
    with pytest.raises(InvalidInput, match=f"a call of {name}, which would run"):
        dumps({"client_state": [value]})
    with pytest.raises(InvalidInput, match=name):
        dumps(decode(json.loads(json.dumps(encode(value)))))


@given(VALUES)
def test_values_survive_json(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert same(decode(json.loads(text)), value)


def test_shared_and_recursive_values_keep_their_shape() -> None:
    inner = [1]
    value: dict[str, Any] = {"a": inner, "b": inner}
    value["self"] = value
    again = loads(dumps(value)[0], "memory")
    assert again["a"] is again["b"] and again["self"] is again
    with pytest.raises(InvalidInput, match="holds itself"):
        encode(value)


@st.composite
def viewed(draw: Any) -> tuple[list[torch.Tensor], list[str]]:
    """Tensors that view a few storages in all ways."""
    tensors, dtypes = [], []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 4))
        raw = draw(st.binary(min_size=400, max_size=400))
        width = DTYPES[dtype].itemsize
        count = rows * columns * width
        data = bytes(b & 1 for b in raw[:count]) if dtype == "BOOL" else raw[:count]
        flat = torch.frombuffer(bytearray(data or b"\0" * width), dtype=DTYPES[dtype])
        base = flat[: rows * columns].view(rows, columns)
        views = [base, base.t(), base[:, :1], base[1:], base[0, 0] if rows else base]
        for view in draw(st.lists(st.sampled_from(views), min_size=1, max_size=3)):
            tensors.append(view)
            dtypes.append(dtype)
    return tensors, dtypes


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return tuple(plain.shape), str(plain.dtype), raw


@settings(max_examples=40, deadline=None)
@given(viewed())
def test_torch_save_to_us_and_back(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[list[torch.Tensor], list[str]]
) -> None:
    tensors, dtypes = made
    folder = tmp_path_factory.mktemp("there")
    torch.save({"all": tensors, "first": torch.nn.Parameter(tensors[0], requires_grad=False)},
               folder / "torch.pt")  # fmt: skip
    value = read_torch(folder / "torch.pt")
    for tensor, found, dtype in zip(tensors, value["all"], dtypes, strict=True):
        assert found.dtype == dtype
        assert (found.shape, found.stride) == (tuple(tensor.shape), tensor.stride())
        assert (*_bits(tensor)[:1], _bits(tensor)[2]) == (found.shape, found.array().tobytes())
    assert value["first"].parameter
    _whole(value, None, folder / "ours.pt")
    for weights_only in (True, False):
        again = torch.load(folder / "ours.pt", weights_only=weights_only)
        assert [_bits(t) for t in again["all"]] == [_bits(t) for t in tensors]
        places = [t.untyped_storage().data_ptr() for t in again["all"]]
        expected = [t.untyped_storage().data_ptr() for t in tensors]
        for k, tensor in enumerate(tensors):  # what was shared is
            for j in range(k):
                if tensor.numel() and tensors[j].numel():
                    assert (places[j] == places[k]) == (expected[j] == expected[k])


def test_torch_loads_what_we_lay_out(tmp_path: Path) -> None:
    value = {
        "hole": hole("BF16", (3, 5), parameter=True),
        "namespace": stand_in("argparse", "Namespace", state={"lr": 0.1, "betas": (0.9, 0.99)}),
        "dtype": named("torch", "bfloat16"),
        "size": Size((2, 3)),
        "bytes": b"\0\xff",
        "step": small("F32", 7.0),
    }
    content = np.arange(15, dtype=np.float32).view(np.uint16)[1::2].tobytes()
    _whole(value, lambda n: content[:n], tmp_path / "ours.pt")
    assert zipfile.ZipFile(tmp_path / "ours.pt").testzip() is None
    for mmap in (False, True):
        found = torch.load(tmp_path / "ours.pt", weights_only=False, mmap=mmap)
        assert found["hole"].requires_grad and found["hole"].flatten().tolist() == list(range(15))
        assert found["namespace"] == argparse.Namespace(lr=0.1, betas=(0.9, 0.99))
        assert (found["dtype"], found["size"]) == (torch.bfloat16, torch.Size([2, 3]))
        assert (found["bytes"], found["step"].item()) == (b"\0\xff", 7.0)


def test_what_training_keeps_survives_us(tmp_path: Path) -> None:
    """RNG states (numpy's too), Namespaces, paths, enums, tensors with attributes."""
    odd = torch.ones(3)
    odd.tag = "hung on it"  # type: ignore[attr-defined]
    state = OrderedDict(weight=torch.ones(2))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    value = {
        "args": argparse.Namespace(hidden=64, path=Path("/x")),
        "numpy": np.random.RandomState(3).get_state(),
        "torch": torch.get_rng_state(),
        "number": np.float64(1.5),
        "device": torch.device("cpu"),
        "odd": odd,
        "state": state,
    }
    torch.save(value, tmp_path / "a.pt")
    read = read_torch(tmp_path / "a.pt")
    assert fields_of(read["args"])["hidden"] == 64
    kept = decode(json.loads(json.dumps(encode(read))))
    _whole(kept, None, tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=False)
    assert found["args"] == value["args"] and found["device"] == value["device"]
    assert found["numpy"][0] == "MT19937" and np.array_equal(found["numpy"][1], value["numpy"][1])
    assert torch.equal(found["torch"], value["torch"]) and found["number"] == 1.5
    assert found["odd"].tag == "hung on it"
    assert found["state"]._metadata == {"": {"version": 1}}


# ------------------------------------------------------------------ malice


class Evil:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attacks(mark: Path) -> dict[str, bytes]:
    """Pickles that would make a file, if anything of them ran."""
    touch = f"touch {mark}"
    code = f"open({str(mark)!r}, 'w')"
    call = _text(touch) + b"\x85R"
    run = _text(code) + b"\x85R"
    made = {
        f"protocol {protocol} {function.__name__}": pickle.dumps(Evil(function, argument), protocol)
        for protocol in range(6)
        for function, argument in ((os.system, touch), (eval, code), (exec, code))
    }
    names = [
        ("posix", "system"), ("os", "system"), ("subprocess", "getoutput"), ("nt", "system"),
        ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "exec"), ("pydoc", "locate"),
        ("torch", "load"), ("torch.hub", "load"), ("runpy", "run_path"), ("pickle", "loads"),
    ]  # fmt: skip
    for module, name in names:
        argument = call if name in ("system", "getoutput") else run
        made[f"global {module}.{name}"] = b"\x80\x02" + _global(module, name) + argument + b"."
    dotted = b"\x80\x04" + _text("os") + _text("path.os.system") + b"\x93" + call + b"."
    chain = (
        b"\x80\x02" + _global("builtins", "getattr")
        + _global("builtins", "__import__") + _text("os") + b"\x85R" + _text("system") + b"\x86R"
        + call + b"."
    )  # fmt: skip
    state = b"\x80\x02" + _global("x", "Y") + b")\x81}" + _text("__reduce__")
    state += _global("os", "system") + b"sb" + call + b"."
    on_class = b"\x80\x02" + _global("x", "Y") + b"N}" + _text("__setstate__")
    on_class += _global("os", "system") + b"s\x86b."
    hooks = (
        b"\x80\x02" + _global("torch._utils", "_rebuild_tensor_v2") + b"(N" + b"K\x00))\x89"
        + _global("os", "system") + call + b"tR."
    )  # fmt: skip
    from_type = (
        b"\x80\x02" + _global("torch._tensor", "_rebuild_from_type_v2") + b"("
        + _global("os", "system") + _global("torch", "Tensor") + _text(touch) + b"\x85}tR."
    )  # fmt: skip
    items = b"\x80\x02" + _global("os", "system") + b"(" + _text(touch) + b"e."
    extension = b"\x80\x02\x82\x01" + call + b"."
    numpy_object = pickle.dumps(np.array([Evil(os.system, touch)], dtype=object), 2)
    return made | {
        "dotted name": dotted, "getattr chain": chain, "state": state, "state of a class": on_class,
        "hooks": hooks, "rebuilt from a type": from_type, "items of a function": items,
        "extension": extension, "numpy objects": numpy_object,
    }  # fmt: skip


def test_nothing_that_a_pickle_says_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    fired: list[str] = []
    watched = {"os.system", "subprocess.Popen", "exec", "import", "open", "compile"}
    active = False

    def audit(event: str, args: Any) -> None:
        if active and event in watched:
            fired.append(event)

    sys.addaudithook(audit)
    count = 0
    for name, data in attacks(mark).items():
        active = True
        try:
            value = loads(data, "evil.pt")
        except CorruptCheckpoint:
            value = None
        active = False
        assert not mark.exists(), name
        assert not fired, (name, fired)
        count += isinstance(value, StandIn)
    assert count > 20  # most are read, as inert stand-ins


def test_stand_ins_do_nothing() -> None:
    value = loads(pickle.dumps(Evil(os.system, "false"), 2), "evil.pt")
    assert isinstance(type(value), Named) and value.args == ("false",) and value.called
    with pytest.raises(TypeError):
        pickle.dumps(value)
    with pytest.raises(TypeError):
        type(value).module = "other"
    assert pickle.loads(dumps([named("builtins", "dict")])[0]) == [dict]


@pytest.mark.parametrize(
    "pid",
    [
        b"N", b"K\x01", _text("storage"), b"(tN\x86", b"(K\x01K\x02K\x03K\x04K\x05t",
        b"(" + _text("storage") + _global("os", "system") + _text("0") + _text("cpu") + b"K\x01t",
        b"(" + _text("storage") + _global("torch", "FloatStorage") + _text("0") + _text("cpu")
        + b"J\xff\xff\xff\xfft",
        b"(" + _text("storage") + _global("torch", "FloatStorage") + b"K\x00" + _text("cpu")
        + b"K\x01t",
    ],
)  # fmt: skip
def test_odd_persistent_ids_are_refused(pid: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"bad\.pt"):
        loads(b"\x80\x02" + pid + b"Q.", "bad.pt", lambda *_: pytest.fail("looked up"))


def test_views_outside_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(4), tmp_path / "a.pt")
    with open_torch(tmp_path / "a.pt") as file:
        t = file.value
    for shape, stride, offset in [
        ((5,), (1,), 0),
        ((4,), (2,), 0),
        ((1,), (1,), 4),
        ((2, 4), (1, 1), 0),
    ]:
        bad = Tensor(t.storage, t.dtype, shape, stride, offset)
        data, storages = dumps(bad)
        with pytest.raises(CorruptCheckpoint, match="beyond its storage"):
            loads(data, "a.pt", lambda *_, held=storages: held[0])


# ------------------------------------------------------------------ damage


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.arange(1000.0), "b": [torch.ones(7)], "c": "text"}, path)
    return path


def test_every_truncation_is_named(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (0, 1, 30, 100, 1000, len(whole) // 2, len(whole) - 23, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint, match=r"model\.pt"):
            read_torch(saved)


def _open_bytes(raw: bytes) -> TorchFile:
    return TorchFile(Span(io.BytesIO(raw), "model.pt"))


def _damage_goes_through(raw: bytes, at: int, bit: int) -> bool:
    """Whether a file with a flipped bit is taken, every storage of it checked."""
    changed = bytearray(raw)
    changed[at] ^= 1 << bit
    try:
        file = _open_bytes(bytes(changed))
        for place in file.unread:
            file.data(Storage("torch.storage.UntypedStorage", place.nbytes, place))
    except (CorruptCheckpoint, InvalidInput) as error:
        assert "model.pt" in str(error)
        return False
    return True


def test_every_flipped_bit_of_a_file_is_found(tmp_path: Path) -> None:
    """All of them, in torch's file and in ours, on opening (storages are small)."""
    value = {"a": torch.arange(10.0), "b": [torch.zeros(0)], "c": "text"}
    torch.save(value, tmp_path / "torch.pt")
    _whole(read_torch(tmp_path / "torch.pt"), None, tmp_path / "ours.pt")
    for name in ("torch.pt", "ours.pt"):
        raw = (tmp_path / name).read_bytes()
        assert not _open_bytes(raw).unread
        missed = [
            (at, bit) for at in range(len(raw)) for bit in range(8)
            if _damage_goes_through(raw, at, bit)
        ]  # fmt: skip
        assert not missed, name


@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.integers(0, 6000), min_size=1, max_size=4), st.text(max_size=9))
def test_a_flipped_bit_of_any_file_is_found(data: Any, sizes: list[int], text: str) -> None:
    """Of any value, with storages that are checked on opening and larger ones."""
    held = io.BytesIO()
    torch.save({"tensors": [torch.arange(n, dtype=torch.int16) for n in sizes], "t": text}, held)
    raw = held.getvalue()
    assert len(_open_bytes(raw).unread) == sum(2 * n > CHECKED_BYTES for n in sizes)
    at = data.draw(st.integers(0, len(raw) - 1))
    assert not _damage_goes_through(raw, at, data.draw(st.integers(0, 7)))


def test_opening_reads_headers_and_little_else(tmp_path: Path) -> None:
    """Large storages stay unread: a read per entry, of its header and some KiB."""

    class Counting(io.FileIO):
        calls = nbytes = 0

        def read(self, size: int = -1) -> bytes:  # type: ignore[override]
            self.calls, self.nbytes = self.calls + 1, self.nbytes + size
            return super().read(size)

    torch.save([torch.zeros(1 << 18) for _ in range(50)], tmp_path / "a.pt")
    with Counting(tmp_path / "a.pt") as file:
        assert len(TorchFile(Span(file, "a.pt")).unread) == 50  # type: ignore[arg-type]
        assert file.calls < 2 * 60 and file.nbytes < 60 * 2 * CHECKED_BYTES


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidInput, match=r"x\.pt.*before 1\.6.*save it again"):
        read_torch(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02N." * 100)
    with pytest.raises(CorruptCheckpoint, match=r"x\.pt.*packed"):
        read_torch(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CorruptCheckpoint, match=r"x\.pt.*packed|TorchScript"):
        read_torch(path)
    with pytest.raises(CorruptCheckpoint, match=r"y\.pt: cannot be read"):
        read_torch(tmp_path / "y.pt")


def test_zips_beyond_four_gigabytes(tmp_path: Path) -> None:
    """A sparse file: the sizes need 64 bits, in the headers and in the directory."""
    elements = (1 << 30) + 64
    layout = lay_out("big.pt", {"big": hole("F32", (elements,)), "after": small("I64", [5])})
    path = tmp_path / "big.pt"
    zeros = 0
    block = bytes(1 << 24)
    left = elements * 4
    while left:
        zeros = zlib.crc32(block[: min(left, len(block))], zeros)
        left -= min(left, len(block))
    with path.open("wb") as file:
        file.truncate(layout.nbytes)
        for one in (*layout.literals, *layout.ending([Digest("crc32", f"{zeros:08x}")])):
            file.seek(one.offset)
            file.write(one.data)
    with open_torch(path) as opened:
        value = opened.loaded(opened.value)
    assert value["big"].numel == elements and value["after"].array().tolist() == [5]
    found = torch.load(path, mmap=True)
    assert found["big"].shape == (elements,) and found["after"].item() == 5
    with zipfile.ZipFile(path) as plain:
        assert plain.getinfo("archive/data/0").file_size == elements * 4
