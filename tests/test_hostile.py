"""What somebody else made, to harm: no path leads out, no size is believed, no code runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from blake3 import blake3
from faults import memory_of
from fuzz.targets import MEMORY_MAX, bounded, golden, manifest_of, sealed

from deltackpt import delta, gc, process
from deltackpt.backends.local import LocalBackend
from deltackpt.errors import (
    CorruptError,
    DeltackptError,
    FormatError,
    InvalidInputError,
    MissingDependencyError,
    NotFoundError,
)
from deltackpt.export import export
from deltackpt.files import TensorSpec, create_file, read_state
from deltackpt.format import MANIFEST_HEADER
from deltackpt.manifest import Manifest
from deltackpt.run import Run, open_run
from deltackpt.store import DIRS, Store, open_store
from deltackpt.verify import verify

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
OUTSIDE = ["../evil", "/evil", "a/../../evil", "..", "a\\..\\..\\evil", "c:/../evil"]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path, how: Any = os.system) -> None:
        self.args = (f"touch {path}",) if how is os.system else (str(path), "w")
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how, self.args


def hostile(change: Any) -> dict[str, bytes]:
    """A golden store whose step 1 has another manifest, under a commit that says so."""
    objects = dict(golden("v1-runs"))
    ref = "refs/main/1.1"
    commit = json.loads(objects[ref].partition(b"\n")[0])
    key = f"manifests/{commit['sid']}.man"
    body = json.loads(zstandard.decompress(objects[key][40:]))
    change(body)
    objects[key] = manifest_of(json.dumps(body).encode())
    commit["manifest"] = blake3(objects[key]).hexdigest()
    objects[ref] = sealed(json.dumps(commit).encode())
    return objects


def step_1(objects: dict[str, bytes]) -> Run:
    return Run(Store(memory_of(objects)), "main")


# -- paths


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_tensors_name_is_a_key_and_no_path(tmp_path: Path, name: str):
    (tmp_path / "in").mkdir()
    run = step_1(hostile(lambda body: body["tensors"]["name"].__setitem__(0, name)))
    before = sorted(tmp_path.rglob("*"))
    run.load(1)
    export(run, 1, tmp_path / "in" / "x.safetensors")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "in" / "x.safetensors"])


@pytest.mark.parametrize("name", OUTSIDE[:5])
def test_no_npz_is_written_that_would_be_taken_out_to_another_place(tmp_path: Path, name: str):
    with (
        pytest.raises(InvalidInputError, match="cannot hold this name"),
        create_file(tmp_path / "x.npz", [TensorSpec(name, "uint8", (1,))]),
    ):
        pass
    assert not list(tmp_path.iterdir())
    with create_file(tmp_path / "x.npz", [TensorSpec("a..b/c", "uint8", ())]) as out:
        out.buffer("a..b/c")[:] = 7
        out.done("a..b/c")
    assert read_state(tmp_path / "x.npz")["a..b/c"] == 7


@pytest.mark.parametrize("name", [*OUTSIDE, ".hidden", "a/b", "a\0b", "a\nb", "~gc", "", "x" * 129, "a.gone"])
def test_a_run_of_a_name_that_is_a_path_is_refused_before_anything_is_written(tmp_path: Path, name: str):
    store = tmp_path / "deep" / "store"
    delta.save({"w": np.zeros(3)}, store, step=1)
    before = sorted(tmp_path.rglob("*"))
    for use in (
        lambda: delta.save({"w": np.zeros(3)}, store, step=1, run=name),
        lambda: delta.load(store, run=name),
        lambda: open_run(store, name),
        lambda: open_run(store, "main").fork(name),
    ):
        with pytest.raises((InvalidInputError, TypeError)):
            use()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("step", ["../1", "1/../../x", -1, 1 << 63, 1.5, "1\n"])
def test_a_step_that_is_a_path_is_refused(tmp_path: Path, step: Any):
    with pytest.raises(DeltackptError):
        delta.save({"w": np.zeros(3)}, tmp_path / "store", step=step)
    delta.save({"w": np.zeros(3)}, tmp_path / "store", step=1)
    before = sorted(tmp_path.rglob("*"))
    for use in (delta.load, lambda store, step: open_run(store).forget([step])):
        with pytest.raises(DeltackptError):
            use(tmp_path / "store", step=step)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_gc_deletes_nothing_that_a_record_names_outside_of_packs(tmp_path: Path, name: str):
    packs = [f"packs/{name}", f"packs/{name}.pack", name]
    victim = tmp_path / "evil"
    victim.write_bytes(b"")
    store = tmp_path / "a" / "store"
    delta.save({"w": np.zeros(3)}, store, step=1)
    for kind in ("condemn", "sweep"):
        body = {"kind": kind, "features": [], "cycle": 0, "packs": packs, "n_refs": 1, "n_packs": 1}
        (store / f"gc/{kind}-0").write_bytes(sealed(json.dumps(body).encode()))
    with pytest.raises(CorruptError, match="names what is not a pack"):
        gc.collect(open_store(store))
    assert victim.exists()
    assert delta.load(store)["w"].size == 3


# -- sizes


def test_a_manifest_that_claims_what_no_memory_holds_is_refused_before_it_is_taken():
    def claim(body: dict[str, Any]) -> None:
        tensors = body["tensors"]
        at = tensors["dtype"].index("uint8")
        tensors["shape"][at], tensors["size"][at], tensors["level"][at] = [1 << 45], 1 << 45, 2

    with bounded(), pytest.raises((CorruptError, MemoryError)):
        step_1(hostile(claim)).load(1)


@pytest.mark.parametrize("size", [(1 << 30) + 1, 1 << 62])
def test_a_manifest_whose_frame_says_it_becomes_too_much_is_refused(size: int):
    # A zstd frame of one segment, whose header says its size in eight bytes.
    frame = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x01\0\0"
    data = MANIFEST_HEADER.pack(1, 0, size, len(frame), xxhash.xxh3_64_intdigest(frame)) + frame
    with bounded(), pytest.raises(CorruptError, match="at most 1073741824"):
        Manifest.from_bytes(data, "here")


def test_a_manifest_that_becomes_more_than_its_frame_says_is_refused():
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 30))
    assert len(bomb) < 1 << 17
    for told in (100, 1 << 30):
        data = MANIFEST_HEADER.pack(1, 0, told, len(bomb), xxhash.xxh3_64_intdigest(bomb)) + bomb
        with bounded(), pytest.raises(CorruptError, match="frame of"):
            Manifest.from_bytes(data, "here")


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
        warnings.simplefilter("ignore")  # two of one name
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def npy(shape: Any, data: bytes, descr: Any = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def with_field(data: bytes, magic: bytes, at: int, code: str, value: int, *, which: int = 0) -> bytes:
    """Change a field of the `which`-th header of a kind in a zip."""
    start = -1
    for _ in range(which + 1):
        start = data.index(magic, start + 1)
    out = bytearray(data)
    struct.pack_into(code, out, start + at, value)
    return bytes(out)


ONE = zipped([("a.npy", npy((3,), b"abc"))])
TWO = zipped([("a.npy", npy((3,), b"abc")), ("b.npy", npy((3,), b"abc"))])
BOMB = zipped([("a.npy", npy((1 << 28,), bytes(1 << 28)))], zipfile.ZIP_DEFLATED)
CENTRAL = b"PK\x01\x02"
NPZ = {
    "a pickle instead of an array": zipped([("a.npy", pickle.dumps(Payload(Path("evil"))))]),
    "a size that is not there": with_field(ONE, CENTRAL, 24, "<I", 0xFFFFFFF0),
    "stored bytes that are not there": with_field(
        with_field(ONE, CENTRAL, 20, "<I", 0x7FFFFFF0), CENTRAL, 24, "<I", 0x7FFFFFF0
    ),
    "members that share their bytes": with_field(TWO, CENTRAL, 42, "<I", 0, which=1),
    "two members of one name": zipped([("a.npy", npy((1,), b"a"))] * 2),
    "an offset outside": with_field(ONE, CENTRAL, 42, "<I", 0xFFFFFFF0),
    "a shape of NaN": zipped([("a.npy", npy((3,), b"abc").replace(b"(3,)", b"nan "))]),
    "a shape below zero": zipped([("a.npy", npy((-3,), b"abc"))]),
    "a shape of another size": zipped([("a.npy", npy((1 << 50,), b"abc"))]),
    "a header that is a call": zipped([("a.npy", npy((3,), b"abc").replace(b"(3,), ", b"f(), "))]),
    "a deep header": zipped([("a.npy", b"\x93NUMPY\x01\0\xff\xff" + b"(" * 0xFFFF)]),
    "an archive in an archive": zipped([("a.npy", ONE)]),
}


@pytest.mark.parametrize("what", NPZ)
def test_a_hostile_npz_is_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.npz").write_bytes(NPZ[what])
    with bounded(), pytest.raises((FormatError, InvalidInputError), match=r"x\.npz"):
        read_state(tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_an_npz_of_members_with_paths_gives_names_and_writes_nothing(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.npz").write_bytes(zipped([(f"{name}.npy", npy((1,), b"a")) for name in OUTSIDE[:3]]))
    assert list(read_state(tmp_path / "in/x.npz")) == OUTSIDE[:3]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_npz_that_grows_a_thousandfold_takes_no_more_than_it_says(tmp_path: Path):
    assert len(BOMB) < 1 << 19
    (tmp_path / "x.npz").write_bytes(BOMB)
    with bounded():  # it is true of itself: 256 MiB of zeros
        assert read_state(tmp_path / "x.npz")["a"].size == 1 << 28
    grown = with_field(BOMB, CENTRAL, 24, "<I", 0xFFFFFFF0)  # 4 GiB out of 256 kB
    (tmp_path / "x.npz").write_bytes(grown)
    with bounded(), pytest.raises(FormatError, match="cannot make 4294967280"):
        read_state(tmp_path / "x.npz")


def tensors(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape: Any, offsets: Any, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "a header that is not there": (1 << 62).to_bytes(8, "little") + b"{}",
    "a header at the cap": (100_000_000).to_bytes(8, "little") + b"{}",
    "a shape of NaN": tensors(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,3]}}', b"abc"),
    "a shape of infinity": tensors(b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,3]}}', b"abc"),
    "a shape below zero": tensors({"a": entry([-1, -3], [0, 3])}, b"abc"),
    "a shape of a size that wraps": tensors({"a": entry([1 << 32, 1 << 32], [0, 0])}),
    "an offset below zero": tensors({"a": entry([3], [-3, 0])}, b"abc"),
    "an offset outside": tensors({"a": entry([3], [1 << 40, (1 << 40) + 3])}, b"abc"),
    "tensors that share their bytes": tensors({"a": entry([3], [0, 3]), "b": entry([3], [0, 3])}, b"abc"),
    "a name twice": tensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry([3], [0, 3])).encode(),) * 2), b"abc"),
    "a million levels": tensors(b"[" * 1_000_000),
    "a number of a million digits": tensors(b'{"a":' + b"9" * 1_000_000 + b"}"),
}


@pytest.mark.parametrize("what", SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused(tmp_path: Path, what: str):
    (tmp_path / "x.safetensors").write_bytes(SAFETENSORS[what])
    with bounded(), pytest.raises(FormatError, match=r"x\.safetensors"):
        read_state(tmp_path / "x.safetensors")


# -- code


def pt_of(pickled: bytes, **more: bytes) -> bytes:
    members = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", ".data/serialization_id": b"0"}
    return zipped([(f"x/{name}", data) for name, data in (members | more).items()])


def opcodes(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls what it names with a string."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(V" + argument.encode() + b"\ntR."


CALLS = {
    "os.system": ("os", "system", "touch evil"),
    "posix.system": ("posix", "system", "touch evil"),
    "eval": ("builtins", "eval", "open('evil', 'w')"),
    "exec": ("builtins", "exec", "open('evil', 'w')"),
    "open": ("io", "open", "evil"),
    "runpy": ("runpy", "run_path", "evil.py"),
    "numpy": ("numpy", "fromfile", "x.pt"),
    "torch.load": ("torch.serialization", "load", "x.pt"),
    "getattr": ("builtins", "__import__", "antigravity"),
    "ours": ("deltackpt.pickles", "from_bytes", "evil"),
}


@needs_torch
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("what", CALLS)
def test_a_torch_file_that_calls_something_is_refused_and_it_is_not_called(
    tmp_path: Path, what: str, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('evil', 'w')")
    for data in (pt_of(opcodes(*CALLS[what])), opcodes(*CALLS[what])):
        Path(f"x{suffix}").write_bytes(data)
        with pytest.raises((InvalidInputError, FormatError)):
            read_state(Path(f"x{suffix}"))
        with pytest.raises((InvalidInputError, FormatError)):
            delta.save(read_state(Path(f"x{suffix}")), tmp_path / "store", step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["evil.py", f"x{suffix}"])


@needs_torch
@pytest.mark.parametrize("how", [os.system, open])
def test_a_torch_file_with_an_object_that_torch_itself_saved_is_refused(tmp_path: Path, how: Any):
    torch.save({"w": torch.zeros(3), "bad": Payload(tmp_path / "evil", how)}, tmp_path / "x.pt")
    with pytest.raises(InvalidInputError, match="without running code"):
        read_state(tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)  # it is no dud
    assert (tmp_path / "evil").exists()


def _bomb(path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    path.write_bytes(zipped(members, zipfile.ZIP_DEFLATED))


@needs_torch
def test_a_torch_file_that_is_compressed_is_refused_before_room_is_made_for_it(tmp_path: Path):
    _bomb(tmp_path / "x.pt")
    with bounded(), pytest.raises(FormatError, match="is compressed"):
        read_state(tmp_path / "x.pt")


@needs_torch
def test_a_torch_file_of_members_that_are_not_in_it_is_refused(tmp_path: Path):
    torch.save({"w": torch.zeros(100)}, tmp_path / "x.pt")
    good = (tmp_path / "x.pt").read_bytes()
    n = good.count(CENTRAL)
    for which in range(n):
        lie = good
        for at in (20, 24):
            lie = with_field(lie, CENTRAL, at, "<I", 0x7FFFFFF0, which=which)
        (tmp_path / "x.pt").write_bytes(lie)
        with bounded(), pytest.raises(FormatError):
            read_state(tmp_path / "x.pt")


def test_a_pickle_in_a_store_is_not_read_unless_that_is_asked_for(tmp_path: Path):
    delta.save({"bad": Payload(tmp_path / "evil")}, tmp_path / "store", step=1, allow_pickle=True)
    for use in (
        lambda: delta.load(tmp_path / "store"),
        lambda: delta.load(tmp_path / "store", lazy=True),
        lambda: export(open_run(tmp_path / "store"), 1, tmp_path / "x.pt"),
    ):
        with pytest.raises((InvalidInputError, MissingDependencyError)):
            use()
    verify(tmp_path / "store", level="decode")
    export(open_run(tmp_path / "store"), 1, tmp_path / "x.safetensors")
    open_run(tmp_path / "store").diff(1, 1)
    assert not (tmp_path / "evil").exists()
    delta.load(tmp_path / "store", allow_pickle=True)  # it is no dud
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "node",
    [
        {"dataclass": ["os:system", {}]},
        {"dataclass": ["antigravity:x", {}]},
        {"namedtuple": ["subprocess:Popen", {"args": "touch evil"}]},
        {"dataclass": ["test_hostile:Payload", {"how": 1, "args": []}]},
        {"dtype": "__builtins__"},
        {"dtype": "load"},
        {"device": "cpu; import os"},
        {"scalar": ["O", "00" * 8]},
        {"scalar": ["|O8", "00" * 8]},
        {"attributed": [[], {"__class__": 1}]},
    ],
)
def test_a_structure_neither_imports_nor_calls_what_it_names(node: Any, monkeypatch: pytest.MonkeyPatch):
    def put(body: dict[str, Any]) -> None:
        body["structure"] = {"map": {"x": node}}

    modules = set(sys.modules)
    run = step_1(hostile(put))
    try:
        found = run.load(1)
    except DeltackptError:
        pass
    else:  # text, where there is no torch; or attributes, which are not what has their name
        assert type(found["x"]).__name__ in ("str", "OrderedDict")
    assert "antigravity" not in set(sys.modules) - modules


def test_a_process_that_is_called_what_is_no_text_is_known_all_the_same():
    comm = Path("/proc/self/comm")
    if not comm.exists():
        pytest.skip("processes have no names here")
    before = comm.read_bytes()
    try:
        comm.write_bytes(b"\xff) \xfe")
        who = process.identity()
        assert type(who["start"]) is int
        assert not process.is_dead(who)
    finally:
        comm.write_bytes(before)


# -- what is no plain file inside a store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    made, path = tmp_path / "made", tmp_path / "in" / "store"
    delta.save({"w": np.arange(5000)}, made, step=1)
    delta.save({"w": np.arange(5000) * 3}, made, step=2)
    path.parent.mkdir()
    return made.rename(path)  # where nobody has looked yet


def everything(path: Path) -> list[Any]:
    """All that reads or writes a store."""
    return [
        lambda: delta.load(path),
        lambda: delta.save({"w": np.arange(5000) * 7}, path, step=9),
        lambda: open_run(path).steps(),
        lambda: open_run(path).forget([1]),
        lambda: gc.collect(open_store(path)),
        lambda: verify(path, level="decode"),
    ]


def errors_of(uses: list[Any]) -> str:
    """What the errors of some calls say; anything but a `DeltackptError` goes through."""
    told = []
    for use in uses:
        try:
            use()
        except DeltackptError as error:
            told.append(str(error))
    return "\n".join(told)


def moved_behind_a_link(store: Path, directory: str) -> Path:
    outside = store.parents[1] / "outside"
    (store / directory).rename(outside)
    (store / directory).symlink_to(outside)
    return outside


@pytest.mark.parametrize("directory", [*DIRS, "refs/main"])
def test_a_directory_that_is_a_link_is_not_followed_out_of_the_store(store: Path, directory: str):
    outside = moved_behind_a_link(store, directory)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    assert "is a symbolic link, expected a directory" in errors_of(everything(store))
    assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == before


def test_a_store_may_itself_lie_behind_links(store: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(store.parent)
    (tmp_path / "again").symlink_to(tmp_path / "link" / "store")
    for use in everything(tmp_path / "again"):
        use()


@pytest.mark.parametrize("made", ["link", "pipe", "socket", "directory", "loop"])
def test_what_is_no_file_in_the_place_of_one_is_an_error_and_not_waited_for(
    store: Path, made: str, tmp_path: Path
):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    backend = LocalBackend(store)
    for directory in ("packs", "index", "manifests", "refs/main"):
        victim = sorted((store / directory).iterdir())[0]
        good = victim.read_bytes()
        victim.unlink()
        put(made, victim, secret)
        try:
            with bounded():
                with pytest.raises(NotFoundError):
                    backend.read(victim.relative_to(store).as_posix())
                told = errors_of([*everything(store)[:2], *everything(store)[4:]])
                assert b"secret" not in told.encode(), directory
        finally:
            victim.rmdir() if made == "directory" else victim.unlink()
            victim.write_bytes(good)
    assert secret.read_bytes() == b"secret"


def put(made: str, at: Path, secret: Path) -> None:
    if made == "link":
        at.symlink_to(secret)
    elif made == "loop":
        at.symlink_to(at.name)
    elif made == "pipe":
        os.mkfifo(at)
    elif made == "directory":
        at.mkdir()
    else:
        # Their names are short: made where we are, and moved.
        with socket.socket(socket.AF_UNIX) as made_socket:
            name = f"{os.getpid()}.socket"
            here = os.open(".", os.O_RDONLY)
            try:
                os.chdir(at.parent)
                made_socket.bind(name)
                Path(name).rename(at)
            finally:
                os.fchdir(here)
                os.close(here)


@pytest.mark.parametrize("name", ["deltackpt.json", "packs", "refs/main"])
def test_a_hard_link_to_another_file_is_bytes_like_any_and_is_never_written_to(
    store: Path, name: str, tmp_path: Path
):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 100)
    victim = store / name if name.endswith("json") else sorted((store / name).iterdir())[0]
    victim.unlink()
    os.link(secret, victim)
    assert "secretsecret" not in errors_of(everything(store))
    assert secret.read_bytes() == b"secret" * 100


def test_what_is_bounded_here_is_bounded():
    with bounded(), pytest.raises(MemoryError):
        np.empty(2 * MEMORY_MAX, np.uint8)
