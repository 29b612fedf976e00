"""What a chunk becomes, and why; the shadow's bound; whose neighbours; which tensor is another one's cast."""

import numpy as np
import pytest
from plain import weights

from deltackpt.casts import Casts
from deltackpt.chains import Copy
from deltackpt.codecs import CASTS
from deltackpt.manifest import TensorRow
from deltackpt.memory import Known, Memory, Sized
from deltackpt.planner import COST_MAX, Candidate, plan
from deltackpt.shadow import Fresh, Shadow
from deltackpt.types import Deferred, Tensor


def copy(depth=0, chain=50, raw=100, root=b"r"):
    return Copy(frozenset(), depth, chain, raw, chain, root)


def test_what_the_store_has_is_not_put_again():
    assert plan(True, [Candidate("previous", b"p", copy())], 8).action == "same"


def test_the_first_candidate_that_fits_is_the_base():
    a, b = Candidate("cast", b"a", copy(), cast=1), Candidate("previous", b"b", copy())
    assert plan(False, [a, b], 8).base is a
    assert plan(False, [a._replace(copy=None), b], 8).base is b


@pytest.mark.parametrize("depth_max", [1, 2, 8])
def test_the_last_level_is_left_to_casts(depth_max):
    for depth in range(depth_max + 2):
        plain = Candidate("previous", b"p", copy(depth))
        assert (plan(False, [plain], depth_max).action == "delta") == (depth < depth_max - 1)
        cast = Candidate("cast", b"p", copy(depth), cast=1)
        assert (plan(False, [cast], depth_max).action == "delta") == (depth < depth_max)


def test_a_full_chain_leads_to_its_root_and_a_full_root_to_a_keyframe():
    full = Candidate("previous", b"p", copy(2, int(100 * COST_MAX) - 29))
    root = Candidate("root", b"r", copy(0, 83))
    assert plan(False, [full, root], 8).base is root
    refused = plan(False, [full], 8)
    assert (refused.action, refused.base, refused.parent) == ("whole", None, None)
    assert "chain" in refused.why
    assert plan(False, [full._replace(copy=copy(2, int(100 * COST_MAX) - 30))], 8).action == "delta"


def test_a_plan_tells_the_session_what_it_needs():
    data = np.zeros(7, np.uint8)
    parent = plan(False, [Candidate("cast", b"a", copy(3), offset=4, cast=2, data=data)], 8).parent
    assert (parent.id, parent.depth, parent.raw_size, parent.offset, parent.cast) == (b"a", 3, 7, 4, 2)
    assert parent.data is data


# -- the shadow


def test_the_shadow_keeps_what_was_given_last_up_to_its_bound():
    shadow = Shadow(100)
    a, b, c = (np.full(n, n, np.uint8) for n in (60, 50, 40))
    shadow.replace([Fresh("a", b"1", a, False), Fresh("b", b"2", b, False), Fresh("c", b"3", c, True)])
    assert shadow.size == 100
    assert shadow.get("b", b"2") is None
    assert shadow.get("a", b"another content") is None
    assert shadow.get("c", b"3") is c  # nobody else has it: not copied
    kept = shadow.get("a", b"1")
    a[:] = 0
    assert (kept == 60).all()
    shadow.replace([Fresh("a", b"4", np.full(60, 9, np.uint8), False)])
    assert shadow.get("a", b"4") is kept, "memory of the same size is used again"
    assert (kept == 9).all()
    assert shadow.get("c", b"3") is None
    shadow.clear()
    assert shadow.size == 0


def test_a_shadow_of_nothing_keeps_nothing():
    shadow = Shadow(0)
    shadow.replace([Fresh("a", b"1", np.ones(1, np.uint8), False)])
    assert shadow.get("a", b"1") is None


# -- neighbours


def test_neighbours_are_those_of_one_tensor():
    def known(name, first, sizes):
        ids = np.arange(first, first + len(sizes), dtype=np.uint8)[:, None].repeat(32, 1)
        row = TensorRow(name, "uint8", (sum(sizes),), "numpy", sum(sizes), 0, b"", name.encode())
        return Known(row, np.cumsum(sizes), ids, None, None)

    memory = Memory([known("a", 0, [5, 6, 7]), known("b", 3, [8])])
    one, last = bytes([1] * 32), bytes([2] * 32)
    assert memory.after(one) == Sized(last, 7)
    assert memory.before(one) == Sized(bytes(32), 5)
    assert memory.after(last) is None
    assert memory.before(bytes([3] * 32)) is None
    assert memory.after(b"unknown") is None


# -- casts


def tensor(name, array, dtype):
    array = np.ascontiguousarray(array)
    return Tensor(name, dtype, array.shape, "numpy", array.reshape(-1).view(np.uint8))


def test_a_cast_is_found_whatever_the_order_and_among_others_of_its_shape():
    import ml_dtypes

    masters = [weights(4000, i) for i in range(5)]
    narrow = [m.astype(ml_dtypes.bfloat16) for m in masters]
    tensors = [tensor(f"n{i}", a, "bfloat16") for i, a in enumerate(narrow)]
    tensors += [tensor(f"m{i}", a, "float32") for i, a in enumerate(masters)]
    casts = Casts(tensors)
    order = casts.order(tensors)
    assert order == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    found = []
    for at in order:
        found.append(casts.find(tensors[at]))
        casts.add(at, tensors[at])
    assert found[:5] == [None] * 5
    assert [(f.at, f.cast) for f in found[5:]] == [(5 + i, CASTS["float32", "bfloat16"]) for i in range(5)]


def test_what_is_no_cast_small_or_zero_is_left_alone():
    a, b = weights(4000), weights(4000, 1)
    others = [
        tensor("other", b.astype(np.float16), "float16"),
        tensor("zeros", np.zeros(4000, np.float16), "float16"),
        tensor("small", a[:1000].astype(np.float16), "float16"),
        tensor("longer", np.zeros(4001, np.float16), "float16"),
    ]
    sources = [tensor("a", a, "float32"), tensor("0", np.zeros(4000, "f4"), "float32")]
    sources += [tensor("a small", a[:1000], "float32")]
    casts = Casts([*others, *sources])
    for at, t in enumerate(sources):
        casts.add(at, t)
    assert [casts.find(t) for t in others] == [None] * 4


def test_a_state_without_pairs_keeps_its_order():
    tensors = [
        Deferred("d", "float32", (2000,), "torch", lambda: 1 / 0),
        tensor("a", weights(2000), "float32"),
    ]
    assert Casts(tensors).order(tensors) == [0, 1]
