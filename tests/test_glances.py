"""A tensor is trusted while torch counts no write to it; what it does not count, a sample or audit finds."""

from __future__ import annotations

import gc
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltackpt import open_run, staging
from deltackpt.backends.memory import MemoryBackend
from deltackpt.errors import InvalidInputError
from deltackpt.glances import NOTHING, Glance, Stamp, is_same

torch = pytest.importorskip("torch")

N = 100_000  # 400 kB


def normal(n: int = N, seed: int = 0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(n).astype(np.float32).copy())


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the tensors of which fingerprints are taken to compare them."""
    sizes: list[int] = []
    fingerprint = staging.fingerprint
    monkeypatch.setattr(
        staging, "fingerprint", lambda data, ends: sizes.append(data.size) or fingerprint(data, ends)
    )
    return sizes


def proven(run, state) -> int:
    """Save until what does not change is trusted; return the next step."""
    for step in range(2):
        run.save(state, step=step)
    return 2


def equal(run, step: int, state) -> bool:
    found = run.load(step)
    return all(torch.equal(found[name], state[name].detach()) for name in state)


@pytest.mark.parametrize("how", ["here", "thread", "process"])
def test_what_is_frozen_is_hashed_in_an_audit_only(hashed: list[int], how: str, tmp_path):
    state = {"frozen": normal(), "other": normal(seed=1), "trained": normal(N, 2)}
    size = 4 * N
    found = []
    with open_run(tmp_path / "store" if how == "process" else MemoryBackend(), audit_every=4) as run:
        for step in range(12):
            state["trained"].add_(1)
            hashed.clear()
            if how == "here":
                run.save(state, step=step)
            else:
                run.save_async(state, step=step).wait()
            found.append(sum(hashed) // size)
            assert equal(run, step, state)
    # New: nothing to compare with.  Then proven; trusted but for the one that is trained; audited.
    assert found == [0, 3, 1, 3, 1, 1, 1, 3, 1, 1, 1, 3]


def test_by_default_everything_is_hashed_in_every_save(hashed: list[int]):
    state = {"frozen": normal()}
    with open_run(MemoryBackend()) as run:
        for step in range(4):
            run.save(state, step=step)
    assert len(hashed) == 3
    assert run.audit_every == 1


def optimizers():
    for kind, more in ("AdamW", {"lr": 1e-3}), ("SGD", {"lr": 1e-3, "momentum": 0.9}):
        for how in ("foreach", "fused", None):
            options = {"foreach": False} if how is None else {how: True}
            yield pytest.param(kind, {**more, **options}, id=f"{kind}-{how or 'for'}")


@pytest.mark.parametrize(("kind", "options"), list(optimizers()))
def test_what_an_optimizer_trains_is_saved_as_it_is(kind: str, options: dict, caplog):
    """Fused optimizers write without counting: neither weights nor moments are ever proven."""
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300))
    model[0].requires_grad_(False)
    optimizer = getattr(torch.optim, kind)(model[1].parameters(), **options)
    with open_run(MemoryBackend(), audit_every=100) as run:
        for step in range(6):
            model(torch.ones(2, 300) * (step + 1)).sum().backward()
            optimizer.step()
            run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step=step)
            found = run.load(step)
            assert equal_trees(found["model"], model.state_dict())
            assert equal_trees(found["optimizer"]["state"], optimizer.state_dict()["state"])
        trusted = {name for name, glance in run._turns.saver.memory.glances.by_name.items() if glance.passed}
    assert trusted == {"model.0.weight"}
    assert not caplog.records


def equal_trees(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_trees(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_what_a_fused_optimizer_writes_to_in_few_places_is_never_trusted(caplog):
    """The sample does not tell, and a pause in training must not make it proven."""
    table = torch.nn.Embedding(1000, 100)
    optimizer = torch.optim.AdamW(table.parameters(), lr=1e-3, weight_decay=0, fused=True)
    at = torch.tensor([7])  # no part of the sample
    with open_run(MemoryBackend(), audit_every=100) as run:
        for step, is_training in enumerate([True, True, True, False, False, True, True]):
            if is_training:
                table(at).sum().backward()
                optimizer.step()
            state = {"model": table.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(state, step=step)
            assert equal_trees(run.load(step)["model"], state["model"])
            assert equal_trees(run.load(step)["optimizer"]["state"], state["optimizer"]["state"])
    assert not caplog.records


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_what_is_trained_from_now_on_is_seen_at_once(how: str, caplog):
    """Trusted while it was frozen; a fused optimizer does not count, but the sample tells."""
    model = torch.nn.Linear(300, 300).requires_grad_(False)
    with open_run(MemoryBackend(), audit_every=100) as run:
        for step in range(4):
            run.save(model.state_dict(), step=step)
        model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **{how: True})
        for step in range(4, 8):
            model(torch.ones(2, 300)).sum().backward()
            optimizer.step()
            run.save(model.state_dict(), step=step)
            assert equal(run, step, model.state_dict())


def unseen(x):
    """Ways to write to the middle of a tensor that torch does not count."""
    at = N // 2 + 100

    def by_set(y):
        y[at] += 1

    return {
        "data": lambda: by_set(x.data),
        "numpy": lambda: by_set(x.detach().numpy()),
        "dlpack": lambda: by_set(torch.from_dlpack(x.detach())),
        "storage": lambda: by_set(torch.empty(0).set_(x.untyped_storage(), 0, (N,))),
    }


@pytest.mark.parametrize("way", ["data", "numpy", "dlpack", "storage"])
def test_an_audit_tells_of_a_write_that_was_not_counted_and_saves_it(way: str, caplog, hashed: list[int]):
    state = {"w": normal(), "frozen": normal(seed=1)}
    with open_run(MemoryBackend(), audit_every=5) as run:
        step = proven(run, state)
        before = state["w"].clone()
        run.save(state, step=step)
        unseen(state["w"])[way]()
        run.save(state, step=step + 1)
        assert torch.equal(run.load(step + 1)["w"], before)  # this is what the option risks
        assert not caplog.records
        run.save(state, step=step + 2)
        assert equal(run, step + 2, state)
        [record] = caplog.records
        assert record.levelno == logging.ERROR
        assert record.getMessage().startswith(
            "w was written to in a way that torch does not count, after step 1:"
        )
        assert "steps 2, 3 may hold it as it was" in record.getMessage()
        # Nothing is trusted any more.
        for step in range(5, 9):
            hashed.clear()
            unseen(state["w"])[way]()
            run.save(state, step=step)
            assert len(hashed) == 2
            assert equal(run, step, state)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.detach()[5:6].fill_(3),
        lambda x: torch._foreach_add_([x], 1),
        lambda x: x.view(torch.int32)[7:].bitwise_xor_(1),
        lambda x: x.set_(normal(seed=5)),
        lambda x: setattr(x, "data", normal(seed=5)),
        lambda x: torch.nn.init.normal_(x),
        lambda x: x.untyped_storage().copy_(
            normal(seed=5).untyped_storage()
        ),  # not counted: the sample tells
        lambda x: x.data.mul_(2),
    ],
)
def test_writes_that_torch_counts_or_the_sample_finds_are_seen_at_once(write):
    state = {"w": normal()}
    with open_run(MemoryBackend(), audit_every=100) as run:
        proven(run, state)
        for step in range(2, 6):
            write(state["w"])
            run.save(state, step=step)
            assert equal(run, step, state)


def test_a_new_tensor_at_the_address_of_an_old_one_is_not_taken_for_it(caplog):
    addresses, steps = [], range(2, 12)
    model = torch.nn.Linear(300, 300)
    with open_run(MemoryBackend(), audit_every=100) as run:
        proven(run, model.state_dict())
        stamps = []
        for step in steps:
            content = torch.zeros(300, 300)
            content[6, 200] = step  # no part of the sample
            address, version = model.weight.data_ptr(), model.weight._version
            del model
            gc.collect()
            model = torch.nn.Linear(300, 300)
            model.weight.data.copy_(content)
            addresses.append((address, version) == (model.weight.data_ptr(), model.weight._version))
            stamps.append(run._turns.saver.memory.glances.by_name["weight"].stamp)
            run.save(model.state_dict(), step=step)
            assert equal(run, step, model.state_dict())
    assert any(addresses)  # it was at the same address, with the same version
    assert stamps[0].storage.expired()


def test_what_needs_a_gradient_or_torch_does_not_count_is_never_trusted(hashed: list[int]):
    with torch.inference_mode():
        inferred = normal() + 1
    state = {
        "trainable": torch.nn.Parameter(normal()),
        "inferred": inferred,
        "numpy": normal().numpy(),
        "small": normal(1000),
        "conj": torch.complex(normal(), normal()).conj(),
    }
    with open_run(MemoryBackend(), audit_every=100) as run:
        for step in range(5):
            hashed.clear()
            run.save(state, step=step)
        assert len(hashed) == 5
        assert run._turns.saver.memory.glances.by_name == {}


def test_arrays_that_share_memory_are_trusted_together(hashed: list[int]):
    flat = normal(3 * N)
    other = flat.data  # the same memory, counted apart
    state = {"a": flat[: 2 * N], "b": other[N:], "a too": flat[: 2 * N], "rows": normal(2 * N)[::2]}
    with open_run(MemoryBackend(), audit_every=100) as run:
        step = proven(run, state)
        found = []
        for write in (None, lambda: flat[5].add_(1), lambda: other[-5].add_(1), None, None):
            if write is not None:
                write()
            hashed.clear()
            run.save(state, step=step)
            found.append(len(hashed))
            assert equal(run, step, state)
            step += 1
        assert found == [0, 1, 1, 1, 0]  # one tensor of all but the rows, proven again


def test_a_save_that_failed_leaves_no_trust_in_what_it_did_not_save(monkeypatch):
    state = {"w": normal(), "frozen": normal(seed=1)}
    backend = MemoryBackend()
    with open_run(backend, audit_every=100) as run:
        step = proven(run, state)
        state["w"].add_(1)
        for failed in (step, step + 1):
            with monkeypatch.context() as patch:
                patch.setattr(backend, "create", lambda name: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    run.save(state, step=failed)
        for step in (4, 5):
            run.save(state, step=step)
            assert equal(run, step, state)


@pytest.mark.parametrize("how", ["here", "thread", "process"])
def test_trust_holds_no_memory(how: str, tmp_path):
    w = normal()
    with open_run(tmp_path / "store" if how == "process" else MemoryBackend(), audit_every=100) as run:
        proven(run, {"w": w})
        if how != "here":
            run.save_async({"w": w}, step=2).wait()
        reference = torch.multiprocessing.reductions.StorageWeakRef(w.untyped_storage())
        del w
        gc.collect()
        assert reference.expired()


def test_trust_goes_on_where_another_process_takes_over(hashed: list[int], tmp_path):
    state = {"w": normal()}
    with open_run(tmp_path / "store", audit_every=100) as run:
        proven(run, state)
        for step in (2, 3, 4):
            hashed.clear()
            run.save_async(state, step=step).wait()
            assert not hashed
            assert equal(run, step, state)
        state["w"][5] += 1
        run.save(state, step=step + 1)
        assert equal(run, step + 1, state)


@pytest.mark.parametrize("found", [0, -1, True, 1.5, None])
def test_every_how_many_saves_is_a_number(found):
    with pytest.raises(
        InvalidInputError, match=r"audit_every: found .*, expected a number of saves, 1 or more"
    ):
        open_run(MemoryBackend(), audit_every=found)


imprint_of = st.none() | st.sampled_from([b"a", b"b"])
stamp_of = st.none() | st.sampled_from([Stamp(1, ()), Stamp(2, ())])
glance_of = st.builds(Glance, imprint_of, stamp_of, st.sampled_from([b"x", b"y"]), st.booleans())


@given(glance_of, glance_of, st.booleans())
def test_only_what_is_equal_in_all_that_is_known_is_trusted(old: Glance, now: Glance, is_audit: bool):
    if not is_same(old, now, is_audit=is_audit):
        return
    if now.imprint is not None:
        assert now.imprint == old.imprint
    else:
        assert not is_audit
        assert old.is_proven
        assert now.stamp is not None
        assert (now.stamp, now.sample) == (old.stamp, old.sample)
    assert not is_same(NOTHING, now, is_audit=is_audit)
    assert not is_same(old, NOTHING, is_audit=is_audit)
