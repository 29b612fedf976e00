"""JAX: real training on four devices goes on bit for bit; pytrees come back where they are wanted."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

jax.config.update("jax_num_cpu_devices", 4)  # before anything asks for a device

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from faults import Wrapper  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from jax_train import WIDTH, fresh, mesh_of, trained  # noqa: E402

import deltackpt  # noqa: E402
from deltackpt import gc, last, open_run, open_store  # noqa: E402
from deltackpt.backends.memory import MemoryBackend  # noqa: E402
from deltackpt.errors import ConflictError, DeltackptError, InvalidInputError, NotFoundError  # noqa: E402
from deltackpt.integrations import jax as integration  # noqa: E402
from deltackpt.integrations import peers  # noqa: E402
from deltackpt.integrations.jax import as_state, restore, save  # noqa: E402
from deltackpt.store import Store  # noqa: E402
from deltackpt.verify import verify  # noqa: E402

TRAIN = Path(__file__).with_name("jax_train.py")
N_STEPS = 8


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of children, which find compiled what this process has compiled."""
    cache = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in cache.items():
        jax.config.update(name, value)
    yield {
        **os.environ,
        **{name.upper(): str(value) for name, value in cache.items()},
        "JAX_NUM_CPU_DEVICES": "4",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(deltackpt.__file__).parents[1]), str(TRAIN.parent)]),
    }
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def straight(environment):
    """The losses and the end of training that nothing has interrupted."""
    state, losses = trained(fresh(mesh_of()), range(N_STEPS))
    return losses, state


def raw(x):
    """All that is the same of an array that is the same: bits, NaN's too."""
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return str(x.dtype), x.shape, np.asarray(data).tobytes()


def assert_same(found, expected):
    """Bit for bit, and on the same devices."""
    assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(expected)
    for a, b in zip(jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(expected), strict=True):
        if isinstance(b, jax.Array):
            assert raw(a) == raw(b)
            assert a.sharding == b.sharding
            assert a.committed == b.committed
        else:
            assert type(a) is type(b)
            assert np.array_equal(a, b)


# -- training


def test_a_resumed_training_has_the_losses_and_the_end_of_an_uninterrupted_one(tmp_path, straight):
    losses, end = straight
    state, _ = trained(fresh(mesh_of()), range(4))
    save(state, tmp_path, step=4)
    found = restore(tmp_path, fresh(mesh_of()))
    assert int(found.step) == 4
    state, again = trained(found, range(4, N_STEPS))
    assert again == {step: loss for step, loss in losses.items() if step >= 4}
    assert_same(state, end)


def test_killed_at_several_points_of_a_save_it_goes_on_as_if_nothing_was(tmp_path, straight, environment):
    store, told = tmp_path / "store", []

    def train(*options):
        return subprocess.run(
            [sys.executable, TRAIN, store, str(N_STEPS), *options],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    for place, steps in {
        "packs/": [1],
        "manifests/": [1],
        "refs/": [1],
        "after refs/": [1, 3],
    }.items():
        child = train("3", place)
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert open_run(store).steps() == steps, place
        told += [line.split() for line in child.stdout.splitlines()]
    losses, end = straight
    assert {(int(step), loss) for step, loss in told} == {(s, losses[s]) for s in range(4)}
    assert len(told) == 4 + 3 * 2  # from nothing, and three times from step 1
    state, again = trained(restore(store, fresh(mesh_of())), range(4, N_STEPS))
    assert again == {step: loss for step, loss in losses.items() if step >= 4}
    assert_same(state, end)
    assert not gc.collect(store).waiting_for
    assert verify(store, level="decode").clean
    assert not open_store(store).backend.list("sessions/")


def test_in_the_background_each_step_is_what_it_was_though_its_memory_is_donated_at_once(tmp_path, straight):
    there = {}
    with open_run(tmp_path, keep=last(2)) as run:

        def after(step, state, loss):
            run.save_async(as_state(state), step=step)
            there[step] = [raw(x) for x in jax.tree_util.tree_leaves(state) if isinstance(x, jax.Array)]

        state, losses = trained(fresh(mesh_of()), range(5), after)
    assert losses == {step: loss for step, loss in straight[0].items() if step < 5}
    run = open_run(tmp_path)
    assert run.steps() == [3, 4]
    for step in run:
        found = restore(run, state, step=step)
        assert [raw(x) for x in jax.tree_util.tree_leaves(found) if isinstance(x, jax.Array)] == there[step]


def test_a_step_costs_what_changed_and_the_sharding_is_none_of_it(tmp_path):
    state = fresh(mesh_of())
    first = save(state, tmp_path, step=1)
    assert first.logical_size > first.new_size > 3 * WIDTH * 4 * WIDTH  # both moments are zeros
    assert {g.group for g in first.groups} >= {"weights", "moments"}
    again = save(restore(tmp_path, fresh(mesh_of(2))), tmp_path, step=2)
    assert again.new_size == 0
    assert save(restore(tmp_path, fresh()), tmp_path, step=3, run="other").new_size == 0


def test_what_a_save_has_looked_at_is_donated_as_before(tmp_path):
    state = {"cut": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh_of(), P("d"))), "whole": jnp.ones(64)}
    save(state, tmp_path, step=1)
    jax.jit(lambda x: jax.tree.map(jnp.negative, x), donate_argnums=0)(state)
    assert state["cut"].is_deleted()
    assert state["whole"].is_deleted()


def test_on_a_cpu_the_memory_of_an_array_is_not_copied_and_not_used_again():
    x = jnp.arange(1000.0)
    state = as_state({"x": x})
    assert state["x"].ctypes.data == x.unsafe_buffer_pointer()
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert state["x"][:3].tolist() == [0, 1, 2]


# -- where the parts of an array go


def placements():
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    return {
        "rows": NamedSharding(mesh, P("a")),
        "columns": NamedSharding(mesh, P(None, "b")),
        "grid": NamedSharding(mesh, P("b", "a")),
        "all by columns": NamedSharding(mesh, P(None, ("b", "a"))),
        "replicated": NamedSharding(mesh, P()),
        "the last": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    }


@pytest.mark.parametrize("name", placements())
def test_any_sharding_is_restored_into_any_other(name, monkeypatch):
    x = np.arange(24 * 16, dtype=np.float32).reshape(24, 16)
    store = MemoryBackend()
    save({"x": jax.device_put(x, placements()[name])}, store, step=1)
    assert deltackpt.load(store)["x"].tobytes() == x.tobytes()  # one array, as any other
    put, sizes = jax.device_put, []
    monkeypatch.setattr(jax, "device_put", lambda x, where: sizes.append(x.size) or put(x, where))
    for to in placements().values():
        sizes.clear()
        found = restore(store, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)})["x"]
        assert found.sharding == to
        assert np.asarray(found).tobytes() == x.tobytes()
        # No device is given more than its part.
        assert set(sizes) == {int(np.prod(to.shard_shape(x.shape)))}
        assert len(sizes) == len(to.device_set)


def test_each_part_is_read_once_and_rows_together(monkeypatch):
    x = np.arange(24 * 16, dtype=np.float32).reshape(24, 16)
    store = MemoryBackend()
    save({"x": x}, store, step=1)
    asked, gather = [], integration.gather
    monkeypatch.setattr(
        integration, "gather", lambda picks: asked.extend(index for _, index in picks) or gather(picks)
    )
    for name, read in {
        "rows": [(slice(0, 12), slice(0, 16)), (slice(12, 24), slice(0, 16))],
        "columns": [(slice(0, 24), slice(0, 16))],
        "grid": [(slice(0, 12), slice(0, 16)), (slice(12, 24), slice(0, 16))],
        "replicated": [(slice(0, 24), slice(0, 16))],
    }.items():
        asked.clear()
        restore(store, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placements()[name])})
        assert asked == read, name


class Counted(Wrapper):
    """Counts reads of packs."""

    n_reads = 0

    def _do(self, op, name, call, *, mutates=True):
        self.n_reads += name.startswith("packs/") and not mutates
        return call()


def test_a_thousand_arrays_are_looked_up_and_read_together(monkeypatch):
    x = np.random.default_rng(0).standard_normal((1000, 8, 8)).astype(np.float32)
    memory, n_finds, find = MemoryBackend(), [0], Store.find
    save(dict(enumerate(x)), memory, step=1)

    def counted(self, ids):
        n_finds[0] += 1
        return find(self, ids)

    monkeypatch.setattr(Store, "find", counted)
    for name, to in {**placements(), "none": None}.items():
        backend, n_finds[0] = Counted(memory), 0
        found = restore(
            backend, dict.fromkeys(range(1000), jax.ShapeDtypeStruct((8, 8), x.dtype, sharding=to))
        )
        assert b"".join(np.asarray(found[i]).tobytes() for i in range(1000)) == x.tobytes(), name
        assert n_finds[0] < 10, name
        assert backend.n_reads < 10, name


PROCESS = """
    import sys

    import jax
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather
    from jax.sharding import NamedSharding, PartitionSpec as P

    from deltackpt.backends.local import LocalBackend
    from deltackpt.errors import InvalidInputError
    from deltackpt.integrations.jax import restore, save

    store, port, who = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(who))
    mesh = jax.make_mesh((4,), ("d",), devices=jax.devices())
    size, read = [0], LocalBackend.read_into

    def counted(self, name, offset, buffers):
        size[0] += sum(memoryview(b).nbytes for b in buffers if name.startswith("packs/"))
        return read(self, name, offset, buffers)

    LocalBackend.read_into = counted
    for spec in (P("d"), P(None, "d")):
        size[0] = 0
        like = {"x": jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=NamedSharding(mesh, spec))}
        found = restore(store, like)["x"]
        shards = [(s.index, np.asarray(s.data)) for s in found.addressable_shards]
        x = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
        assert all(np.array_equal(x[index], data) for index, data in shards)
        print(len(shards), size[0])
    there = NamedSharding(jax.make_mesh((2,), ("d",), devices=jax.devices()[2:]), P("d"))
    found = restore(store, {"x": jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=there)})["x"]
    assert len(found.addressable_shards) == 2 * int(who)
    cut = restore(store, like)["x"]
    every = NamedSharding(mesh, P())
    key = jax.jit(lambda: jax.random.key(5), out_shardings=every)()
    elsewhere = jax.device_put(np.ones(2), NamedSharding(there.mesh, P()))
    state = {"x": process_allgather(cut, tiled=True), "key": key}
    if who == "0":
        for refused in cut, elsewhere:
            try:
                save({"x": refused}, store, step=2)
            except InvalidInputError as e:
                print(e.message)
        save(state, store, step=2)
"""


#: Gloo writes to file descriptor 1, in the middle of a line if need be.
ALONE = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
"""


def both(program, where, environment):
    """Have two processes of one job run a program; what each has printed, line by line, and what ended it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE + textwrap.dedent(program), where, port, who],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who in "01"
    ]
    told = []
    for child, (out, errors) in [(child, child.communicate(timeout=60)) for child in children]:
        told.append(out.splitlines() + [errors] * (child.returncode != 0))
    return told


def test_of_several_processes_each_reads_its_parts_and_one_saves_what_it_has_all_of(tmp_path, environment):
    x = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    deltackpt.save({"x": x}, tmp_path / "s", step=1)
    whole_size = sum(entry.size for entry in open_store(tmp_path / "s").backend.list("packs/"))
    refused = ["pytree['x']: other processes have parts of it"] * 2
    for who, (rows, columns, *others) in enumerate(both(PROCESS, tmp_path / "s", environment)):
        assert [rows.split()[0], columns.split()[0]] == ["2", "2"]
        assert int(rows.split()[1]) < 0.7 * whole_size
        assert others == ([] if who else refused)
    found = restore(tmp_path / "s", {"x": np.zeros_like(x), "key": jax.random.key(0)})
    assert found["x"].tobytes() == x.tobytes()
    assert raw(found["key"]) == raw(jax.random.key(5))


TOGETHER = """
    import sys, time
    from pathlib import Path

    import jax
    import numpy as np
    from jax.experimental.multihost_utils import sync_global_devices

    from deltackpt import DeltackptError, Run
    from deltackpt.integrations.jax import restore, save

    where, port, who = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, who)
    like = {"x": np.zeros(3)}

    def tell(what, call):
        try:
            print(what, call())
        except DeltackptError as e:
            print(what, type(e).__name__, e.message)

    def restored(*args, **options):
        return restore(*args, **options)["x"].tolist()

    store = where / "shared"
    tell("no store:", lambda: restored(store, like))
    sync_global_devices("a")
    if who == 0:
        save({"x": np.ones(3)}, store, step=1)
        save({"x": np.ones(3)}, where / "0", step=1)
    sync_global_devices("b")
    tell("no run:", lambda: restored(store, like, run="other"))
    if who == 0:
        find = Run.commit

        def found(*args):
            commit = find(*args)
            (where / "found").touch()
            return commit

        Run.commit = found
    else:
        while not (where / "found").exists():
            time.sleep(0.01)
        save({"x": np.zeros(3)}, store, step=2)
    tell("one saved meanwhile:", lambda: restored(store, like))
    sync_global_devices("c")
    tell("latest:", lambda: restored(store, like))
    tell("other steps:", lambda: restored(store, like, step=1 + who))
    tell("other stores:", lambda: restored(where / str(who), like))
    sync_global_devices("d")
    tell("both save:", lambda: save({"x": np.full(3, who)}, store, step=3).step)
"""


def test_several_processes_restore_the_step_that_the_first_has_found(tmp_path, environment):
    told = both(TOGETHER, tmp_path, environment)
    for lines in told:
        assert len(lines) == 7, "\n".join(lines)
        none, no_run, meanwhile, latest, steps, stores, _ = lines
        assert none.startswith("no store: NotFoundError")
        assert re.match("no run: NotFoundError .*run 'other'", no_run)
        assert meanwhile == "one saved meanwhile: [1.0, 1.0, 1.0]"
        assert latest == "latest: [0.0, 0.0, 0.0]"
        assert re.fullmatch(
            "other steps: InvalidInputError restore: process 0 asks for step 1 of run 'main', store (.*); "
            "process 1 asks for step 2 of run 'main', store \\1",
            steps,
        )
        assert re.match(
            "other stores: InvalidInputError .*; process 1 asks for step 'latest' of run 'main', "
            "and has no store: .*no deltackpt store here",
            stores,
        )
    saves = sorted((lines[-1] for lines in told), key=len)
    assert saves[0] == "both save: 3"
    assert re.match("both save: (AlreadyExistsError|ConflictError) run 'main' .*3", saves[1])
    assert open_run(tmp_path / "shared").steps() == [1, 2, 3]


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_is_not_what_the_first_process_has_found_is_a_conflict(monkeypatch, step):
    store = MemoryBackend()
    save({"x": np.ones(3)}, store, step=1)
    found = ["main", step, 7]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(peers, "_said_by_all", lambda mine: [{**mine, "slot": found}, mine])
    with pytest.raises(ConflictError, match=f"'main' step {step}: was overwritten or forgotten"):
        restore(store, {"x": np.ones(3)})


def test_whatever_goes_wrong_in_the_first_process_the_others_are_told(monkeypatch):
    store = MemoryBackend()
    save({"x": np.ones(3)}, store, step=1)
    said = []

    def said_by_all(mine):
        said.append(mine)
        return [said[0], mine]

    def fails(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(peers, "_said_by_all", said_by_all)
    monkeypatch.setattr(deltackpt.Run, "commit", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        restore(store, {"x": np.ones(3)})
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(DeltackptError, match="process 0: RuntimeError: out of luck"):
        restore(store, {"x": np.ones(3)})


def test_there_is_room_for_all_that_a_process_may_say(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(peers, "process_allgather", lambda row: row[None])
    name = "\U00010348" * 400
    with pytest.raises(InvalidInputError, match="run: found"):
        restore(MemoryBackend(), {}, step=name, run=name)


ALONE_NEVER = """
    import sys

    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P

    from deltackpt import DeltackptError, StorageError
    from deltackpt.backends.local import LocalBackend
    from deltackpt.integrations.jax import restore

    store, port, who = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(who))
    every = NamedSharding(jax.make_mesh((4,), ("d",), devices=jax.devices()), P())
    n, nan = jax.jit(lambda: (0, float("nan")), out_shardings=every)()
    like = {"n": n, "nan": nan, "x": np.zeros(3)}

    def tell(like):
        try:
            found = restore(store, like)
            assert found["n"].sharding == found["nan"].sharding == every
            print([(float(found[k]), found[k].weak_type) for k in ("n", "nan")], found["x"].tolist())
        except DeltackptError as e:
            print(type(e).__name__, e.message.partition("\\n")[0])

    tell(like)
    tell({**like, "x": np.zeros(3 + int(who))})
    read = LocalBackend.read_into

    def broken(self, name, *args):
        if name.startswith("packs/"):
            raise StorageError("out of luck")
        return read(self, name, *args)

    if who == "1":
        LocalBackend.read_into = broken
    tell(like)
"""


def test_what_fails_in_one_process_is_raised_in_all_and_none_waits_for_ever(tmp_path, environment):
    save({"n": jnp.asarray(7), "nan": jnp.asarray(np.nan), "x": np.ones(3)}, tmp_path / "s", step=1)
    first, second = both(ALONE_NEVER, tmp_path / "s", environment)
    assert first[0] == second[0] == "[(7.0, True), (nan, False)] [1.0, 1.0, 1.0]"
    assert second[1:] == ["InvalidInputError like: does not match the step", "StorageError out of luck"]
    assert first[1:] == [line.replace("Error ", "Error process 1: ", 1) for line in second[1:]]


# -- what may stand in a pytree


DTYPES = [
    *("bool", "int8", "uint8", "int16", "uint32", "float16", "bfloat16", "float32", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu"),
    *("int4", "uint4", "float4_e2m1fn"),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit_cut_or_not(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    n_bits = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "bool": 1}.get(dtype, 8)
    bits = np.random.default_rng(0).integers(0, 1 << n_bits, 64 * kind.itemsize, np.uint8)  # NaNs among them
    x = bits.view(kind).reshape(8, 8)
    cut = jax.device_put(x, NamedSharding(mesh_of(), P("d")))
    tree = {
        "whole": jnp.asarray(x),
        "cut": cut,
        "scalar": jnp.asarray(x[0, 0]),
        "none": jnp.zeros((0, 3), dtype),
    }
    store = MemoryBackend()
    save(tree, store, step=1)
    found = restore(store, tree)
    assert_same(found, tree)
    assert np.asarray(found["cut"]).tobytes() == x.tobytes()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_go_on_where_they_were(impl):
    key = jax.random.key(7, impl=impl)
    many = jax.device_put(jax.random.split(key, 8).reshape(4, 2), NamedSharding(mesh_of(), P("d")))
    tree = {"one": key, "many": many, "raw": jax.random.PRNGKey(3)}
    store = MemoryBackend()
    save(tree, store, step=1)
    assert deltackpt.load(store)["one"][impl].tolist() == jax.random.key_data(key).tolist()
    assert_same(restore(store, tree), tree)
    found = restore(store, jax.eval_shape(lambda: {"one": key}), strict=False)["one"]
    assert raw(jax.random.normal(found, 5)) == raw(jax.random.normal(key, 5))
    other = "rbg" if impl == "threefry2x32" else "threefry2x32"
    with pytest.raises(InvalidInputError, match=rf"\['one'\]\['{other}'\]: is not in the step"):
        restore(store, {**tree, "one": jax.random.key(7, impl=other)})


def test_scalars_give_way_to_other_dtypes_as_before():
    tree = {"scale": jnp.asarray(2.0**15), "count": jax.jit(lambda n: n + 1)(0), "strong": jnp.float32(3)}
    store = MemoryBackend()
    save(tree, store, step=1)
    found = restore(store, tree)
    assert [found[k].weak_type for k in tree] == [True, True, False]
    assert (found["scale"] * jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert_same(found, tree)


def test_flax_and_optax_states_come_back_as_what_they_are():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    net = Net(nnx.Rngs(0))
    tx = optax.MultiSteps(optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), every_k_schedule=2)
    net_state = nnx.state((net, nnx.Optimizer(net, tx, wrt=nnx.Param)))
    tree = {"nnx": net_state, "pure": nnx.to_pure_dict(nnx.state(net)), "optax": tx.init({"w": jnp.ones(3)})}
    store = MemoryBackend()
    save(tree, store, step=1)
    found = restore(store, tree)
    assert_same(found, tree)
    assert isinstance(found["optax"], optax.MultiStepsState)
    nnx.update(net, found["nnx"][0])
    names = {row.name for row in open_run(store).manifest().tensors}
    assert "nnx.0.layers.1.kernel.value" in names


def test_nnx_modules_are_pytrees_themselves():
    net = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    store = MemoryBackend()
    save(net, store, step=1)
    found = restore(store, nnx.Linear(3, 3, rngs=nnx.Rngs(5)))
    assert raw(found.kernel[...]) == raw(net.kernel[...])


def test_an_array_that_is_there_twice_is_stored_once():
    mesh = mesh_of()
    for x in (jnp.ones((64, 64)), jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("d")))):
        store = MemoryBackend()
        assert save({"embed": x, "head": x}, store, step=1).logical_size == 64 * 64 * 4
        assert_same(restore(store, {"embed": x, "head": x}), {"embed": x, "head": x})


def test_values_and_arrays_of_numpy_come_back_as_such():
    tree = {
        "lr": 0.5,
        "n": 3,
        "name": "x",
        "flag": True,
        "np": np.arange(3),
        "npf": np.float32(2),
        "no": None,
    }
    store = MemoryBackend()
    save(tree, store, step=1)
    found = restore(store, tree)
    assert_same(found, tree)
    assert type(found["npf"]) is np.float32
    save(jnp.arange(3), store, step=2)  # nothing but an array
    assert restore(store, jnp.zeros(3, int), step=2).tolist() == [0, 1, 2]
    save({}, store, step=3)
    assert restore(store, {"a": [], "b": None}, step=3) == {"a": [], "b": None}


def test_a_number_that_a_jitted_step_has_made_an_array_is_either():
    store = MemoryBackend()
    save({"step": 0, "x": 0.1, "y": False}, store, step=1)
    array = jax.jit(lambda t: t)({"step": 0, "x": 0.1, "y": False})
    assert_same(restore(store, array), array)
    save(array, store, step=2)
    found = restore(store, {"step": 5, "x": 7.0, "y": True}, step=2)
    assert found == {"step": 0, "x": float(np.float32(0.1)), "y": False}
    everywhere = NamedSharding(mesh_of(), P())
    for dtype in (jnp.int32, jnp.uint8):  # not weak, as a TrainState's may be that is placed on a mesh
        like = jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
        expected = jax.device_put(dtype(0), everywhere)
        assert_same(restore(store, {"step": like}, step=1, strict=False)["step"], expected)
    with pytest.raises(InvalidInputError, match=r"\['step'\]: found int32 \(\), expected a str"):
        restore(store, {**array, "step": "0"}, step=2)
    with pytest.raises(InvalidInputError, match=r"\['x'\]: found float32 \(\), expected a int"):
        restore(store, {**array, "x": 1}, step=2)
    # As NumPy's it would make the next product a float32.
    save({"step": np.int64(3), "x": np.float32(0.5), "y": np.bool_(True)}, store, step=4)
    found = restore(store, {"step": 0, "x": 0.0, "y": False}, step=4)
    assert {key: type(value) for key, value in found.items()} == {"step": int, "x": float, "y": bool}
    save({"step": 2**70}, store, step=3)
    with pytest.raises(InvalidInputError, match=r"\['step'\]: found a int, expected int32 \(\)"):
        restore(store, {"step": array["step"]}, step=3)


def test_classes_that_jax_knows_by_position_or_not_by_name():
    @jax.tree_util.register_pytree_node_class
    class Pair:
        def __init__(self, a, b):
            self.a, self.b = a, b

        def tree_flatten(self):
            return (self.a, self.b), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    class Odd(Pair):
        pass

    jax.tree_util.register_pytree_with_keys(
        Odd, lambda x: ([("same", x.a), ("same", x.b)], None), lambda _, children: Odd(*children)
    )
    store = MemoryBackend()
    save(Pair(jnp.zeros(2), jnp.ones(2)), store, step=1)
    found = restore(store, Pair(jnp.ones(2), jnp.ones(2)))
    assert (found.a.tolist(), found.b.tolist()) == ([0, 0], [1, 1])
    with pytest.raises(InvalidInputError, match="two leaves of this path"):
        save(Odd(jnp.zeros(2), jnp.ones(2)), store, step=2)
    with pytest.raises(InvalidInputError, match=r"pytree\['same'\]: is a leaf, and has leaves below"):
        save(Odd(jnp.zeros(2), [jnp.ones(2)]), store, step=2)
    assert open_run(store).steps() == [1]


# -- what is refused


@dataclass
class Unknown:
    x: object


def test_a_container_that_jax_does_not_know_is_refused_there_and_back():
    store = MemoryBackend()
    for leaf in Unknown(np.zeros(2)), Counter("ab"):
        with pytest.raises(InvalidInputError, match=rf"\['c'\]: found a {type(leaf).__name__}, a container"):
            save({"c": leaf}, store, step=1)
    deltackpt.save({"c": Unknown(np.zeros(2)), "l": [np.zeros(2)]}, store, step=1)
    with pytest.raises(InvalidInputError) as caught:
        restore(store, {"c": Unknown(0), "l": 0.5})
    assert caught.value.message.split("\n  ")[1:] == [
        "pytree['c']: found a Unknown, expected no container",
        "pytree['l']: found a list, expected no container",
    ]


def test_a_sharding_that_does_not_fit_is_told_with_all_else_before_anything_is_read(monkeypatch):
    store = MemoryBackend()
    save({"x": jnp.ones(3), "z": jnp.ones(4)}, store, step=1)
    monkeypatch.setattr(integration, "_restored", None)
    like = {
        name: jax.ShapeDtypeStruct((n,), jnp.float32, sharding=NamedSharding(mesh_of(), spec))
        for name, n, spec in (("x", 3, P("d")), ("y", 4, P()), ("z", 4, P("d")))
    }
    with pytest.raises(InvalidInputError) as caught:
        restore(store, like)
    told = caught.value.message.split("\n  ")[1:]
    assert [line.partition(": Sharding")[0] for line in told] == [
        "pytree['x']: cannot be cut so",
        "pytree['y']: is not in the step",
    ]


def test_all_that_does_not_fit_is_told_at_once_and_nothing_is_read(monkeypatch):
    store = MemoryBackend()
    save(
        {"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3), "d": {"e": 1}, "key": jnp.ones(2)},
        store,
        step=1,
    )
    monkeypatch.setattr(integration, "_restored", None)
    like = {
        "a": jnp.ones((3, 1)),
        "b": jnp.ones(3, jnp.bfloat16),
        "d": 1,
        "key": jax.random.key(0),
        "new": jnp.ones(2),
    }
    with pytest.raises(InvalidInputError, match="strict=False") as caught:
        restore(store, like)
    assert caught.value.message.split("\n  ")[1:] == [
        "pytree['a']: found float32 (3,), expected float32 (3, 1)",
        "pytree['b']: found float32 (3,), expected bfloat16 (3,)",
        "pytree['d']: is not in the step",
        "pytree['key']['threefry2x32']: is not in the step",
        "pytree['new']: is not in the step",
        "pytree['c']: is in the step only",
        "pytree['d']['e']: is in the step only",
        "pytree['key']: is in the step only",
    ]
    many = {str(i): jnp.ones(1) for i in range(99)}
    with pytest.raises(InvalidInputError, match="and 49 more"):
        restore(store, many, strict=False)


def test_a_sharding_without_devices_is_refused():
    mesh = jax.make_mesh((4,), ("d",))  # explicit axes: what is only shaped has an abstract mesh
    x = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P("d")))
    store = MemoryBackend()
    save(x, store, step=1)
    with pytest.raises(InvalidInputError, match="AbstractMesh"):
        restore(store, jax.eval_shape(jnp.negative, x))


def test_what_jax_would_cast_is_told_with_all_else_before_anything_is_read(monkeypatch):
    store = MemoryBackend()
    save({"x": np.arange(3.0), "n": np.arange(3)}, store, step=1)
    monkeypatch.setattr(integration, "_restored", None)
    with pytest.raises(InvalidInputError) as caught:
        restore(store, {k: jax.ShapeDtypeStruct((3,), dtype) for k, dtype in {"x": "f8", "n": "i8"}.items()})
    assert caught.value.message.split("\n  ")[1:] == [
        "pytree['n']: JAX makes int32 of int64 without jax_enable_x64",
        "pytree['x']: JAX makes float32 of float64 without jax_enable_x64",
    ]


def test_an_array_that_is_gone_or_not_yet_there_is_refused_by_its_path(tmp_path):
    x = jnp.ones(3)
    jax.jit(jnp.negative, donate_argnums=0)(x)
    with pytest.raises(InvalidInputError, match=r"pytree\['a'\]\[1\]: was donated or deleted"):
        save({"a": [jnp.ones(2), x]}, tmp_path / "s", step=1)
    cut = jax.device_put(jnp.ones(8), NamedSharding(mesh_of(), P("d")))
    state = as_state({"cut": cut})
    jax.jit(jnp.negative, donate_argnums=0)(cut)
    with pytest.raises(InvalidInputError, match=r"pytree\['cut'\]: was donated or deleted"):
        deltackpt.save(state, tmp_path / "s", step=1)
    with pytest.raises(InvalidInputError, match=r"pytree\['x'\]: is traced"):
        jax.jit(lambda x: save({"x": x}, tmp_path / "s", step=1))(jnp.ones(3))
    with pytest.raises(InvalidInputError, match=r"state\['f'\]: found a function"):
        save({"f": test_flax_and_optax_states_come_back_as_what_they_are}, tmp_path / "s", step=1)
    with pytest.raises(InvalidInputError, match=r"asarray.*deltackpt\.integrations\.jax"):
        deltackpt.save({"x": jnp.ones(3)}, tmp_path / "s", step=1)
    assert not (tmp_path / "s").exists() or open_run(tmp_path / "s").steps() == []
    save({"x": jnp.ones(3)}, tmp_path / "s", step=1)
    assert restore(tmp_path / "s", {"x": x})["x"].tolist() == [
        1,
        1,
        1,
    ]  # what was donated is still like itself


def test_a_step_that_goes_while_it_is_restored_is_no_reason_to_begin_anew(monkeypatch):
    store, gather = MemoryBackend(), integration.gather
    save({"x": jnp.ones(3)}, store, step=1)

    def too_late(picks):
        save({"x": jnp.zeros(3)}, store, step=2)
        open_run(store).forget([1])
        gc.collect(store)
        return gather(picks)

    monkeypatch.setattr(integration, "gather", too_late)
    with pytest.raises(ConflictError, match=r"'main' step 1: was forgotten .*restore again"):
        restore(store, {"x": jnp.ones(3)})


def test_a_step_that_jax_has_not_saved_is_restored_if_it_has_the_same_leaves():
    torch = pytest.importorskip("torch")
    store = MemoryBackend()
    deltackpt.save(
        {"w": torch.arange(4.0), "l": [torch.ones(2, dtype=torch.bfloat16)], "n": [1]}, store, step=1
    )
    w, cut = jnp.zeros(4), NamedSharding(mesh_of(), P("d"))
    for like, expected in (
        (w, jnp.arange(4.0)),
        (jax.device_put(w, cut), jax.device_put(jnp.arange(4.0), cut)),
    ):
        assert_same(restore(store, {"w": like}, strict=False)["w"], expected)
    with pytest.raises(InvalidInputError, match=r"\['l'\]\[0\]: is not in the step"):
        restore(store, {"w": w, "l": [jnp.zeros(2)]})
    save({"w": torch.ones(4), "x": w}, store, step=2)
    with pytest.raises(InvalidInputError, match=r"\['w'\]: found float32 \(4,\), expected a Tensor"):
        restore(store, {"w": torch.zeros(4)}, strict=False)
    with pytest.raises(NotFoundError, match="no step 7"):
        restore(store, {"w": w}, step=7)
