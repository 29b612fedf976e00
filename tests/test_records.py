"""Names and small records that come back, and any others refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltackpt.energy import Energy
from deltackpt.errors import CorruptError, FormatError, InvalidInputError, UnsupportedVersionError
from deltackpt.format import seal, unseal
from deltackpt.groups import Coded, GroupCost
from deltackpt.pack import PackName
from deltackpt.records import (
    GC_RUN,
    STEP_MAX,
    Commit,
    Fence,
    Figures,
    GcRecord,
    Origin,
    Pin,
    SessionName,
    Slot,
    check_run,
    check_step,
    decision_from_bytes,
    index_key,
    manifest_key,
    parse_gc_key,
    sid_of,
    tombstone,
)

SID = bytes(range(16))
SLOT = Slot("main", 7, 2)
RUNS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}[A-Za-z0-9]", fullmatch=True)
SLOTS = st.builds(Slot, RUNS | st.just(GC_RUN), st.integers(0, STEP_MAX), st.integers(1, 10**9 - 1))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
COMMIT = Commit(
    SLOT,
    SID,
    bytes(32),
    6,
    1.5,
    {"loss": 0.25},
    {"note": "\u2603", "n": [1]},
    Figures(10, 5, 6, 1, 2, 1, {"x": 0.5}),
)
GC = GcRecord("condemn", 3, frozenset({PackName(SID, 0, 0), PackName(SID, 1, 2)}), 10, 4)


def body_of(record: Commit | Fence | GcRecord) -> dict[str, object]:
    return unseal(record.to_bytes(), "here")


@settings(deadline=None)
@given(SLOTS)
def test_a_slots_name_comes_back(slot: Slot):
    assert Slot.from_key(slot.key) == slot


@settings(deadline=None)
@given(SLOTS, st.binary(min_size=16, max_size=16), st.integers(0, 10**9 - 1))
def test_a_sessions_name_says_who_when_and_where(slot: Slot, sid: bytes, epoch: int):
    name = SessionName(sid, epoch, slot)
    assert SessionName.from_key(name.key) == name


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_name_that_comes_back_or_none(text: str):
    for key in (text, f"refs/{text}", f"sessions/{text}", f"sessions/{'0' * 32}.{text}"):
        for kind in (Slot, SessionName):
            name = kind.from_key(key)
            assert name is None or name.key == key


@pytest.mark.parametrize(
    "key",
    [
        "refs/main/7",
        "refs/main/7.0",
        "refs/main/07.1",
        "refs/main/7.1.gone",
        f"refs/main/{STEP_MAX + 1}.1",
        "refs/../7.1",
        "refs/~other/7.1",
        "refs/a/b/7.1",
        f"sessions/{'0' * 32}.1.1.7",
        f"sessions/{'0' * 31}.1.1.7.main",
        f"sessions/{'0' * 32}.01.1.7.main",
        f"sessions/{'0' * 32}.\u0661.1.7.main",
        f"sessions/{'0' * 32}.1.1.7.../x",
    ],
)
def test_other_names_are_none_of_ours(key: str):
    assert Slot.from_key(key) is None
    assert SessionName.from_key(key) is None


def test_whose_a_file_is_stands_in_its_name():
    assert [sid_of(key(SID)) for key in (manifest_key, index_key)] == [SID.hex()] * 2
    for key in ("manifests/notes.txt", "index/.idx", f"packs/{SID.hex()}.man"):
        assert sid_of(key) is None


def test_the_longest_names_fit_every_backend():
    slot = Slot("r" * 128, STEP_MAX, 10**9 - 1)
    for key in (slot.key, tombstone(slot)[0], SessionName(SID, 10**9 - 1, slot).key):
        assert max(map(len, key.split("/"))) <= 240


@pytest.mark.parametrize(
    "run", ["", ".a", "-a", "a.", "a.gone", "a/b", "a b", "~gc", "\u00e9", "r" * 129, 3, None]
)
def test_a_run_needs_a_plain_name(run: object):
    with pytest.raises(InvalidInputError, match="run: found"):
        check_run(run)


@pytest.mark.parametrize("step", [-1, STEP_MAX + 1, 1.0, "1", True, None])
def test_a_step_is_an_integer_that_fits(step: object):
    with pytest.raises(InvalidInputError, match="step: found"):
        check_step(step)


def test_numpys_integers_are_steps():
    np = pytest.importorskip("numpy")
    assert check_step(np.int32(7)) == 7


@settings(deadline=None)
@given(
    SLOTS,
    st.none() | st.integers(0, STEP_MAX),
    st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    st.dictionaries(st.text(), JSON),
    st.builds(Figures, seconds=st.dictionaries(st.text(), st.floats(0, 1e9)), logical_size=st.integers(0)),
)
def test_a_decision_comes_back(slot: Slot, parent, metrics, metadata, figures):
    if "Infinity" in json.dumps(metadata):
        return
    made = Commit(slot, SID, b"m" * 32, parent, 12.5, metrics, metadata, figures)
    assert decision_from_bytes(made.to_bytes(), slot) == made
    fence = Fence(slot, SID)
    assert decision_from_bytes(fence.to_bytes(), slot) == fence


@settings(deadline=None)
@given(
    st.sets(st.builds(PackName, st.binary(min_size=16, max_size=16), st.integers(0, 9), st.integers(0, 9)))
)
def test_a_gc_record_comes_back(packs):
    made = GcRecord("sweep", 12, frozenset(packs), 3, 4)
    assert GcRecord.from_bytes(made.to_bytes(), made.key) == made
    assert parse_gc_key(made.key) == ("sweep", 12)


@pytest.mark.parametrize("data", [COMMIT.to_bytes(), Fence(SLOT, SID).to_bytes()])
def test_every_changed_or_missing_byte_of_a_decision_is_found(data: bytes):
    for at in range(len(data)):
        for bad in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data + b"\n"):
            with pytest.raises(CorruptError):
                decision_from_bytes(bad, SLOT)


def test_a_decision_copied_to_another_slot_is_refused():
    for slot in (Slot("main", 7, 1), Slot("main", 8, 2), Slot("other", 7, 2)):
        with pytest.raises(CorruptError, match="is the decision of run 'main' step 7"):
            decision_from_bytes(COMMIT.to_bytes(), slot)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_format_error(junk: bytes):
    line, _, _ = seal({}).partition(b"\n")
    for data in (junk, line + b"\n" + junk):
        with pytest.raises(FormatError):
            decision_from_bytes(data, SLOT)
        with pytest.raises(FormatError):
            GcRecord.from_bytes(data, GC.key)


_ODD = JSON | st.sampled_from([10**400, float("inf"), -1, True, "ab" * 16, "ab" * 32, [[]], {"x": []}])


def seal_odd(body: dict[str, object]) -> bytes:
    """Seal also what `seal` refuses: an infinity spelled as a number that is too large."""
    import xxhash

    line = json.dumps(body).replace("-Infinity", "-1e999").replace("Infinity", "1e999").encode()
    return line + b"\n" + xxhash.xxh3_128_hexdigest(line).encode() + b"\n"


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted({*body_of(COMMIT), "kind"} - {"features"})), _ODD, max_size=3))
def test_any_fields_with_a_good_checksum_are_a_decision_or_a_format_error(changes):
    try:
        decision = decision_from_bytes(seal_odd(body_of(COMMIT) | changes), SLOT)
    except FormatError:
        return
    if isinstance(decision, Commit):
        assert type(decision.created_s) is float
        assert len(decision.manifest) == 32


def test_figures_keep_the_groups_and_those_of_before_have_none():
    cost = GroupCost("weights", "bfloat16", 64, 2, 32, {"delta-sparse": Coded(1, 32, 9)})
    body = body_of(replace(COMMIT, figures=Figures(logical_size=64, groups=[cost])))
    assert decision_from_bytes(seal(body), SLOT).figures.groups == [cost]
    del body["figures"]["groups"]
    assert decision_from_bytes(seal(body), SLOT).figures == Figures(logical_size=64)


@pytest.mark.parametrize("groups", [None, {}, [3], [{"group": "weights"}], ["weights"]])
def test_groups_of_another_form_are_a_format_error(groups):
    body = body_of(COMMIT) | {"figures": {"groups": groups}}
    with pytest.raises(CorruptError, match="not a decision"):
        decision_from_bytes(seal(body), SLOT)


def test_figures_keep_the_energy_and_those_of_before_have_none():
    took = Energy.of({"rapl package": 2.5, "bytes written": 0.5})
    body = body_of(replace(COMMIT, figures=Figures(logical_size=64, energy=took)))
    assert decision_from_bytes(seal(body), SLOT).figures.energy == took
    del body["figures"]["energy"]
    assert decision_from_bytes(seal(body), SLOT).figures == Figures(logical_size=64)


@pytest.mark.parametrize(
    "energy",
    [
        3,
        [],
        {},
        {"joules": -1, "method": "", "parts": {}},
        {"joules": True, "method": "", "parts": {}},
        {"joules": 1, "method": 1, "parts": {}},
        {"joules": 1, "method": "", "parts": {"nvml": "1"}},
        {"joules": 1, "method": "", "parts": {str(n): 1 for n in range(33)}},
    ],
)
def test_energy_of_another_form_is_a_format_error(energy):
    body = body_of(COMMIT) | {"figures": {"energy": energy}}
    with pytest.raises(CorruptError, match="not a decision"):
        decision_from_bytes(seal(body), SLOT)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(asdict(Figures()))) | st.text(max_size=3), _ODD, max_size=3))
def test_any_figures_are_numbers_or_a_format_error(changes):
    try:
        decision = decision_from_bytes(seal_odd(body_of(COMMIT) | {"figures": changes}), SLOT)
    except FormatError:
        return
    assert isinstance(decision, Commit)
    assert all(type(v) in (int, float) for v in decision.figures.seconds.values())
    assert type(decision.figures.new_size) in (int, float)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted({*body_of(GC)} - {"features"})), _ODD, max_size=3))
def test_any_fields_with_a_good_checksum_are_a_gc_record_or_a_format_error(changes):
    try:
        record = GcRecord.from_bytes(seal_odd(body_of(GC) | changes), GC.key)
    except FormatError:
        return
    assert record.key == GC.key
    assert type(record.cycle) is int


def test_an_unknown_feature_needs_an_upgrade():
    for record in (COMMIT, Fence(SLOT, SID)):
        with pytest.raises(UnsupportedVersionError, match=r"needs features \['x'\]"):
            decision_from_bytes(seal(body_of(record) | {"features": ["x"]}), SLOT)
    with pytest.raises(UnsupportedVersionError, match=r"needs features \['x'\]"):
        GcRecord.from_bytes(seal(body_of(GC) | {"features": ["x"]}), GC.key)


@pytest.mark.parametrize("features", [None, {}, "x", 0])
def test_features_that_are_no_list_are_refused(features):
    with pytest.raises(CorruptError, match="expected a list"):
        decision_from_bytes(seal(body_of(COMMIT) | {"features": features}), SLOT)


def test_features_of_any_json_are_refused():
    for feature in ([], {}, None, 0):
        with pytest.raises(FormatError):
            decision_from_bytes(seal(body_of(COMMIT) | {"features": [feature]}), SLOT)


@pytest.mark.parametrize("n", [1, 2, 999_999_999])
def test_a_pin_comes_back_from_its_name_and_says_whether_it_pins(n: int):
    pin = Pin("exp.1", 2**63 - 1, n)
    assert Pin.from_key(pin.key) == pin
    assert pin.pins == (n % 2 == 1)
    body = unseal(pin.to_bytes(), "here")
    assert body == {"kind": "pin" if pin.pins else "unpin", "run": "exp.1", "step": 2**63 - 1, "n": n}


@pytest.mark.parametrize(
    "name",
    ["1.pin-0", "1.pin-01", "1.pin-", "01.pin-1", "1.1.pin-1", "1.pin-1.gone", "9223372036854775808.pin-1"],
)
def test_what_is_no_pin_is_not_taken_for_one(name: str):
    assert Pin.from_key(f"refs/main/{name}") is None


def test_an_origin_comes_back_and_one_of_the_wrong_type_is_refused():
    commit = replace(COMMIT, origin=Origin("main", 7))
    assert decision_from_bytes(commit.to_bytes(), commit.slot) == commit
    assert "origin" not in unseal(COMMIT.to_bytes(), "here")
    for origin in (7, {"run": "main"}, {"run": 1, "step": 1}, {"run": "main", "step": True}):
        data = seal(unseal(commit.to_bytes(), "here") | {"origin": origin})
        with pytest.raises(CorruptError, match="not a decision"):
            decision_from_bytes(data, commit.slot)


def test_a_tombstone_names_its_slot():
    key, data = tombstone(SLOT)
    assert key == "refs/main/7.2.gone"
    assert unseal(data, key) == {"kind": "gone", "run": "main", "step": 7, "attempt": 2}
