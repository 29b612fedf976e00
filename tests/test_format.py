"""docs/format.md says what format.py does, and a reader made from the page alone reads a store."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lz4.block
import numpy as np
import pytest
import zstandard
from deltas import nearly, rows_of, taken
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt import codecs, format, kernels, manifest, store, structure, types
from deltackpt.backends.local import LocalBackend
from deltackpt.backends.osshim import Os
from deltackpt.chunking import Chunker
from deltackpt.errors import CorruptError, FormatError, UnsupportedVersionError
from deltackpt.format import LAYOUTS, LIST_HEADER, PACK_HEADER, TABLES, load_json, seal, unseal
from deltackpt.records import Commit, Figures, Slot
from deltackpt.retention import these
from deltackpt.run import open_run

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
GOLDENS = Path(__file__).parent / "golden"
GOLDEN = GOLDENS / "v1"
TYPES = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64"}


def section(title: str) -> str:
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#)", PAGE, re.M | re.S)[1]


def table(text: str) -> list[list[str]]:
    """The rows of a page's first table, cell by cell, without its heading."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S)


def as_page(fields: list[tuple[str, str]]) -> list[list[str]]:
    """Name, type, offset, size of struct fields, as the page gives them."""
    rows, offset = [], 0
    for name, code in fields:
        size = struct.calcsize(f"<{code}")
        rows.append([f"`{name}`", TYPES.get(code, "bytes"), str(offset), str(size)])
        offset += size
    return rows


# -- prose and structs


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_the_page_has_every_header_as_it_is(layout: format.Layout):
    told = table(section(layout.title))
    assert [row[:4] for row in told] == as_page([(f.name, f.code) for f in layout.fields])
    assert [row[4] for row in told] == [f.meaning for f in layout.fields]
    assert f"{layout.title}: {layout.size} bytes." in section(layout.title)


@pytest.mark.parametrize("title", TABLES)
def test_the_page_has_every_table_as_it_is(title: str):
    dtype = TABLES[title]
    rows = []
    for name in dtype.names:
        kind, offset = dtype.fields[name][:2]
        shown = "bytes" if kind.shape else f"u{8 * kind.itemsize}"
        rows.append([f"`{name}`", shown, str(offset), str(kind.itemsize)])
    assert [row[:4] for row in table(section(title))] == rows
    assert f"{title}: {dtype.itemsize} bytes." in section(title)


def test_the_page_has_the_list_header_as_it_is():
    codes = re.findall(r"\d*[a-zA-Z]", LIST_HEADER.format)
    names = ["magic", "level", "flags", "n", "reserved", "size"]
    told = table(section("List header"))
    assert [row[:4] for row in told] == as_page(list(zip(names, codes, strict=True)))
    assert format.LIST_MAGIC.decode() in told[0][4]
    assert f"List header: {LIST_HEADER.size} bytes." in section("List header")


def test_every_table_of_the_page_was_compared():
    tables = set(re.findall(r"^### (.+)\n\n\1: \d+ bytes", PAGE, re.M))
    assert tables == {layout.title for layout in LAYOUTS} | set(TABLES) | {"List header"}


def test_the_page_names_every_directory_column_tag_codec_and_cap():
    names = [row[0] for row in table(section("Store layout"))]
    assert {name.strip("`").split("/")[0] for name in names} == {store.DESCRIPTOR, *store.DIRS}
    columns = [row[0].strip("`") for row in table(section("Manifest header").partition("eight columns")[2])]
    assert columns == list(manifest.TensorRow.__slots__)
    assert [row[0].strip("`") for row in table(section("Structure"))] == list(structure.TAGS)
    listed = re.search(r"\| `dtype` \| one of `(.*?)`", PAGE)[1].split()
    assert listed == list(types.DTYPE_SIZES)
    assert re.findall(r"^\*\*Codec (\d+), ([\w-]+)\.\*\*", PAGE, re.M) == [
        (str(number), name) for number, name in codecs.NAMES.items()
    ]
    for name, value, _ in table(section("Caps")):
        assert getattr(format, name.strip("`")) == int(value)


def test_the_page_names_every_member_of_the_records():
    commit = Commit(Slot("r", 1, 1), bytes(16), bytes(32), None, 0.0, {}, {}, Figures())
    prose = section("Decision")
    for member in [*unseal(commit.to_bytes(), "here"), *Figures.__slots__]:
        assert f"`{member}`" in prose, member
    descriptor = json.loads((GOLDEN / "store" / store.DESCRIPTOR).read_bytes().split(b"\n")[0])
    assert [row[0].strip("`") for row in table(section("Descriptor"))] == list(descriptor)


# -- worked examples


@pytest.mark.parametrize("block", blocks("codec"))
def test_a_worked_payload_decodes_to_what_the_page_says(block: str):
    example = dict(line.split(" ", 1) for line in block.splitlines())
    expected = bytes.fromhex(example["decoded"])
    out = np.empty(len(expected), np.uint8)
    payload = np.frombuffer(bytes.fromhex(example["payload"]), np.uint8)
    codec, itemsize = int(example["codec"]), int(example["itemsize"])
    base = bytes.fromhex(example["base"]) if "base" in example else None
    codecs.decode(codec, payload, itemsize, out, "here", base and np.frombuffer(base, np.uint8))
    assert out.tobytes() == expected
    assert reader()["decode"](codec, itemsize, payload.tobytes(), out.size, base) == expected


def test_every_codec_has_a_worked_payload():
    assert {int(block.split()[1]) for block in blocks("codec")} == set(codecs.NAMES)


def test_the_worked_record_is_sealed():
    [block] = blocks("sealed")
    body = unseal(block.encode(), "here")
    assert seal(body) == block.encode()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 2, 4, 8, 16]),
    st.tuples(st.integers(8, 90), st.integers(16, 200), st.integers(0, 400)),
    st.integers(0, 3000),
    st.integers(0, 1 << 32),
    st.sampled_from([256, 3]),
)
def test_the_pages_chunker_cuts_as_the_kernels_do(itemsize, sizes, n, seed, n_values):
    space: dict[str, Any] = {}
    exec(blocks("chunker")[0], space)
    min_size, spread, more = sizes
    chunker = Chunker(min_size, min_size + spread, min_size + spread + more)
    data = np.random.default_rng(seed).integers(0, n_values, n, np.uint8)
    expected = chunker.cuts(data, itemsize).tolist()
    assert space["cuts"](data.tobytes(), itemsize, *chunker_sizes(chunker)) == expected


def chunker_sizes(chunker: Chunker) -> tuple[int, int, int]:
    return chunker.min_size, chunker.avg_size, chunker.max_size


def test_the_page_names_the_chunkers_sizes_and_constants():
    for size in chunker_sizes(Chunker()):
        assert f"{size:,}" in section("Chunker")
    for constant in (kernels._C1, kernels._C2, kernels._FOLD, kernels._K):
        assert f"0x{int(constant):08X}" in blocks("chunker")[0]


# -- the reader


def reader() -> dict[str, Any]:
    [source] = blocks("reader")
    assert "deltackpt" not in re.sub(r'"deltackpt[^"]*"', "", source), "the reader must stand alone"
    space: dict[str, Any] = {}
    exec(source, space)
    return space


def test_the_pages_reader_follows_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken(monkeypatch)
    arrays = [WEIGHTS]
    with open_run(tmp_path) as run:
        for step in range(4):
            run.save({"w": arrays[-1]}, step=step)
            arrays.append(nearly(arrays[-1], step))
        run.forget([0])
        assert rows_of(run.store)["depth"].max() == 3
    space = reader()

    def decode(codec, itemsize, payload, size, base=None):
        out = np.empty(size, np.uint8)
        whole = None if base is None else np.frombuffer(base, np.uint8)
        codecs.decode(codec, np.frombuffer(payload, np.uint8), itemsize, out, "here", whole)
        return out.tobytes()

    space["decode"] = decode  # here it is about the way from one to the next
    for step in range(1, 4):
        _, tensors = space["load"](str(tmp_path), "main", step)
        assert tensors["w"][2] == arrays[step].tobytes()


@pytest.mark.parametrize("golden", sorted(p for p in GOLDENS.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_the_pages_reader_reads_the_golden_stores(golden: Path):
    expected = json.loads((golden / "expected.json").read_text())
    space = reader()
    for run, steps in expected.items():
        assert {str(step) for step in space["commits"](str(golden / "store"), run)} == set(steps)
        for step, told in steps.items():
            structure, tensors = space["load"](str(golden / "store"), run, int(step))
            assert structure == told["structure"]
            found = {name: hashlib.sha256(data).hexdigest() for name, (_, _, data) in tensors.items()}
            assert found == {name: t["sha256"] for name, t in told["tensors"].items()}


def test_the_pages_reader_forgets_what_the_store_forgot(tmp_path: Path):
    """A tombstone counts for older attempts too: one of them may have been kept from its own by a crash."""
    run = open_run(tmp_path / "store", "main")
    run.save({"w": 1}, step=1)
    run.save({"w": 2}, step=2)
    run.save({"w": 3}, step=2, overwrite=True)
    (tmp_path / "store" / "refs" / "main" / "2.1.gone").unlink()
    commits = reader()["commits"]
    assert {s: c["attempt"] for s, c in commits(str(tmp_path / "store"), "main").items()} == {1: 1, 2: 2}
    run.forget([2])
    (tmp_path / "store" / "refs" / "main" / "2.1.gone").unlink(missing_ok=True)
    assert list(commits(str(tmp_path / "store"), "main")) == run.steps() == [1]


# -- a writer


def changed(data: Any) -> bytes:
    return bytes(data[:-1]) + bytes([data[-1] ^ 1])


def compress_something_else(planes: list[Any]) -> Any:
    return zstandard.ZstdCompressor().multi_compress_to_buffer([changed(plane) for plane in planes])


def compress_and_cut_short(planes: list[Any]) -> Any:
    frames = [zstandard.compress(plane)[:-4] for plane in planes]
    ends = np.cumsum([len(frame) for frame in frames]).tolist()
    segments = [
        struct.pack("<QQ", end - len(frame), len(frame)) for end, frame in zip(ends, frames, strict=True)
    ]
    return zstandard.BufferWithSegments(b"".join(frames), b"".join(segments))


WEIGHTS = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
WEIGHTS.view(np.uint16)[::2] = 0  # so that planes pay even if none is compressed


@pytest.mark.parametrize("compress", [compress_something_else, compress_and_cut_short])
def test_what_zstd_does_not_give_back_is_stored_raw(compress, monkeypatch, caplog):
    zstd = SimpleNamespace(multi_compress_to_buffer=compress)
    monkeypatch.setattr(codecs.coder._local, "compressor", zstd)
    data = WEIGHTS.view(np.uint8)
    payload = codecs.encode(data, codecs.Kind(4, True))
    assert caplog.records
    assert payload.codec == codecs.planes.NUMBER
    assert reader()["decode"](payload.codec, 4, bytes(payload.payload), data.size) == data.tobytes()


def test_what_lz4_does_not_give_back_is_stored_otherwise(monkeypatch, caplog):
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, n, np.uint8)) for n in rng.integers(3, 12, 300)]
    data = np.frombuffer(b" ".join(words[i] for i in rng.integers(0, 300, 20_000)), np.uint8)
    assert codecs.encode(data, codecs.Kind(1, False)).codec == codecs.lz4.NUMBER
    compress = lz4.block.compress

    def lie(block: Any, **options: Any) -> bytes:
        return compress(changed(block) if len(block) == data.size else block, **options)

    monkeypatch.setattr(lz4.block, "compress", lie)
    payload = codecs.encode(data, codecs.Kind(1, False))
    assert caplog.records
    assert payload.codec != codecs.lz4.NUMBER
    assert reader()["decode"](payload.codec, 1, bytes(payload.payload), data.size) == data.tobytes()


# -- flushes


class CountingOs(Os):
    n_fsyncs = 0

    def fsync(self, fd: int) -> None:
        self.n_fsyncs += 1
        super().fsync(fd)


def test_a_save_flushes_as_often_as_the_page_says(tmp_path: Path):
    told = {save: int(n) for save, n in table(section("Flushes"))}
    open_run(tmp_path / "store", "main").save({}, step=1)
    calls = CountingOs()
    run = open_run(LocalBackend(tmp_path / "store", calls=calls), "main")

    def cost(value: int, step: int, **options: Any) -> int:
        before = calls.n_fsyncs
        run.save({"w": np.full(1000, value)}, step=step, **options)
        return calls.n_fsyncs - before

    def cost_with_a_rule() -> int:
        run.keep = these([1, 2, 3])
        return cost(3, 5)

    assert {
        "the first save of a process into a run, new chunks": cost(1, 2),
        "nothing new in it": cost(1, 3),
        "new chunks, in one pack of up to 128 MiB": cost(2, 4),
        "new chunks, superseding a step": cost(3, 4, overwrite=True),
        "nothing new in it, and a rule lets one step go": cost_with_a_rule(),
    } == told


# -- any bytes


@settings(deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_are_refused_by_every_layout(junk: bytes):
    for layout in LAYOUTS:
        for data in (junk, layout.magic + junk):
            with pytest.raises(CorruptError, match="here: "):
                layout.unpack(data, "here")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_every_changed_bit_of_a_header_is_found(layout: format.Layout):
    values = [b"x" * int(f.code[:-1]) if f.code.endswith("s") else 1 for f in layout.fields[1:-1]]
    data = layout.pack(*values)
    assert list(layout.unpack(data, "here")) == values
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError):
            layout.unpack(bytes(bad), "here")


def test_a_newer_version_or_a_flag_needs_an_upgrade():
    format.check_version(format.VERSION, 0, "here")
    for version, flags in [(format.VERSION + 1, 0), (format.VERSION, 1)]:
        with pytest.raises(UnsupportedVersionError, match="here: format version"):
            format.check_version(version, flags, "here")


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_json_or_a_format_error(junk: bytes):
    try:
        load_json(junk, "here")
    except FormatError:
        return


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "[" * 100_000, "9" * 10_000, "\ud800", '{"a":', ""])
def test_what_is_no_json_is_a_format_error(text: str):
    with pytest.raises(FormatError):
        load_json(text.encode("utf-8", "surrogatepass"), "here")


def test_a_number_that_json_lacks_is_named():
    with pytest.raises(FormatError, match="here: not JSON: NaN is not JSON"):
        load_json(b'{"loss": NaN}', "here")


def test_a_seal_covers_every_byte():
    data = seal({"kind": "fence", "n": [1, None, "\u2603"]})
    for at in range(len(data)):
        for bad in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
            with pytest.raises(CorruptError):
                unseal(bad, "here")


def test_a_sealed_record_is_an_object():
    import xxhash

    with pytest.raises(CorruptError, match="record is list, expected an object"):
        unseal(b"[]\n" + xxhash.xxh3_128_hexdigest(b"[]").encode() + b"\n", "here")


def test_a_short_header_says_where_and_how_short():
    with pytest.raises(CorruptError, match="pack 7f3a: Pack header has 3 bytes, needs 64"):
        PACK_HEADER.unpack(b"DCP", "pack 7f3a")
