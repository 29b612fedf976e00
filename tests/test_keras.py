"""Keras: real training by ``fit``, on torch and on JAX, goes on bit for bit; what does not fit is refused."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("torch")
keras = pytest.importorskip("keras")

from keras import layers  # noqa: E402
from keras_train import N_BATCHES, data, fresh, trained  # noqa: E402

import deltackpt  # noqa: E402
from deltackpt import best, gc, last, open_run  # noqa: E402
from deltackpt.backends.memory import MemoryBackend  # noqa: E402
from deltackpt.errors import (  # noqa: E402
    AlreadyExistsError,
    CorruptError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from deltackpt.integrations.keras import DeltaCheckpoint  # noqa: E402
from deltackpt.verify import verify  # noqa: E402

# Of Keras, which hands torch's tensors to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRAIN = Path(__file__).with_name("keras_train.py")
N_EPOCHS = 5


def child(*command, backend="torch"):
    """A process that works while this one does."""
    paths = [str(Path(deltackpt.__file__).parents[1]), str(TRAIN.parent)]
    env = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_NUM_CPU_DEVICES": "4",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.Popen(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


ON_JAX = """
    import sys

    import keras
    import numpy as np
    from keras_train import dies, fresh, trained

    from deltackpt.integrations.keras import DeltaCheckpoint

    store, dies_in = sys.argv[1:]
    layout = keras.distribution.LayoutMap(keras.distribution.DeviceMesh((2, 2), ["batch", "model"]))
    layout["same/kernel"] = (None, "model")
    distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    straight = trained(fresh(), 4)
    begun = trained(fresh(), 2, DeltaCheckpoint(store))
    np.random.seed(0)
    model, checkpoint = fresh(), DeltaCheckpoint(store, background=True)
    first = checkpoint.restore(model)
    rest = trained(model, 4, checkpoint, first=first)
    assert first == 2, first
    assert tuple(model.variables[0].value.sharding.spec) == (None, "model")
    assert begun | rest == straight, (begun, rest, straight)
    print(checkpoint.run.steps(), flush=True)
    model, several = fresh(steps_per_execution=2), DeltaCheckpoint(store, "several", save_freq=3)
    trained(model, 2, several)
    print(several.run.steps(), flush=True)
    dies(store, 6, dies_in)
"""


@pytest.fixture(scope="module")
def on_jax(tmp_path_factory):
    """A child that trains on JAX, with nothing to wait for it until it is asked."""
    store = tmp_path_factory.mktemp("jax") / "store"
    process = child("-c", textwrap.dedent(ON_JAX), store, "refs/", backend="jax")
    yield store, process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def straight(on_jax):
    """The losses of training that nothing has interrupted, and its model at the end."""
    model = fresh()
    return trained(model, N_EPOCHS), model


def values(of):
    return [np.asarray(v.numpy()).tobytes() for v in of.variables]


def assert_same(model, other):
    assert values(model) == values(other)
    assert values(model.optimizer) == values(other.optimizer)


def small(optimizer="sgd", width=3, **options):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(width), layers.Dense(1)])
    model.compile(optimizer, "mse", **options)
    return model


def fitted(model, *callbacks, epochs=1, **options):
    x, y = data()
    return model.fit(x, y, 8, epochs, verbose=0, callbacks=list(callbacks), **options)


# -- training


def test_a_resumed_training_has_the_losses_and_the_end_of_an_uninterrupted_one(tmp_path, straight):
    losses, end = straight
    begun = trained(fresh(), 3, DeltaCheckpoint(tmp_path))
    model, checkpoint = fresh(), DeltaCheckpoint(tmp_path)
    keras.utils.set_random_seed(99)  # another process has drawn other numbers
    first = checkpoint.restore(model)
    assert first == 3
    rest = trained(model, N_EPOCHS, checkpoint, first=first)
    assert begun | rest == losses
    assert_same(model, end)
    assert checkpoint.run.steps() == [N_BATCHES * n for n in range(1, N_EPOCHS + 1)]
    assert checkpoint.run.commit().metrics["val_loss"].hex() == losses[N_EPOCHS - 1][1]


def test_killed_in_saves_at_several_points_it_goes_on_as_if_nothing_had_happened(tmp_path, straight):
    losses, end = straight
    store = tmp_path / "store"
    trained(fresh(), 1, DeltaCheckpoint(store))
    process = child(TRAIN, store, str(N_EPOCHS), "packs/", "manifests/", "refs/", "after refs/", "packs/")
    out, errors = process.communicate(timeout=120)
    before, after = ("1", *losses[1]), ("2", *losses[2])  # what the first epoch told, before it was saved
    killed = ("died", "of", str(int(signal.SIGKILL)))
    assert [tuple(line.split()) for line in out.splitlines()] == [
        *(before, (*killed, "[5]")) * 3,
        *(before, (*killed, "[5,", "10]")),
        *(after, (*killed, "[5,", "10]")),
    ], errors
    model, checkpoint = fresh(), DeltaCheckpoint(store)
    rest = trained(model, N_EPOCHS, checkpoint, first=checkpoint.restore(model))
    assert rest == {epoch: loss for epoch, loss in losses.items() if epoch >= 2}
    assert_same(model, end)
    assert not gc.collect(store).waiting_for
    assert verify(store, level="decode").clean


def test_on_four_devices_of_jax_it_goes_on_too_in_the_background_and_after_a_kill(on_jax):
    store, process = on_jax
    out, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert out.splitlines()[:2] == ["[5, 10, 15, 20]", "[4, 8, 12]"]
    assert open_run(store).steps() == [5, 10, 15, 20]
    assert verify(store, level="decode").clean
    model = fresh()
    with pytest.raises(InvalidInputError, match=r"seed_generator_state: found uint32 \(2,\), expected int32"):
        DeltaCheckpoint(store).restore(model)
    assert values(model) == values(fresh())


# -- which steps there are


def test_rules_keep_the_best_and_the_last(tmp_path):
    checkpoint = DeltaCheckpoint(tmp_path, keep=best("loss", 1, highest=True) | last(2))
    found = fitted(small("adam"), checkpoint, epochs=6).history["loss"]
    assert found.index(max(found)) == 0
    assert checkpoint.run.steps() == [5, 25, 30]


def test_a_loss_that_is_no_number_ends_no_training(tmp_path):
    checkpoint = DeltaCheckpoint(tmp_path)
    assert math.isnan(fitted(small(keras.optimizers.SGD(1e9)), checkpoint, epochs=3).history["loss"][-1])
    assert checkpoint.run.commit(15).metrics == {}


def test_steps_by_batches_go_on_with_their_epoch_from_its_beginning(tmp_path):
    checkpoint = DeltaCheckpoint(tmp_path, save_freq=3)
    fitted(small(), checkpoint, epochs=2)
    assert checkpoint.run.steps() == [3, 6, 9]
    again = DeltaCheckpoint(tmp_path, save_freq=3)
    assert (again.restore(small(), step=3), again.n_batches) == (0, 3)
    assert (again.restore(small()), again.n_batches) == (1, 9)


def test_training_anew_into_a_run_that_has_steps_is_refused(tmp_path):
    fitted(small(), DeltaCheckpoint(tmp_path))
    with pytest.raises(AlreadyExistsError, match="step 5"):
        fitted(small(), DeltaCheckpoint(tmp_path))
    fitted(small(), DeltaCheckpoint(tmp_path, "other"))
    model, checkpoint = small(), DeltaCheckpoint(tmp_path)
    checkpoint.restore(model)
    fitted(model, checkpoint)  # goes on counting batches, whatever the epoch
    fitted(model, checkpoint)
    assert checkpoint.run.steps() == [5, 10, 15]


def test_older_steps_are_gone_on_with_once_those_after_are_forgotten(tmp_path, straight):
    losses, _ = straight
    trained(fresh(), 3, DeltaCheckpoint(tmp_path))
    model, checkpoint = fresh(), DeltaCheckpoint(tmp_path)
    first, begun = checkpoint.restore(model, step=5), []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    with pytest.raises(AlreadyExistsError, match=r"has step 15 already.*from 5 batches"):
        trained(model, 3, note, checkpoint, first=first)
    with pytest.raises(AlreadyExistsError, match=r"from 0 batches"):  # though 4 is free
        small().fit(*data(), batch_size=10, verbose=0, callbacks=[note, DeltaCheckpoint(tmp_path)])
    assert (begun, checkpoint.run.steps()) == ([], [5, 10, 15])  # no epoch was trained in vain
    checkpoint.run.forget([10, 15])
    rest = trained(model, 2, checkpoint, first=first)
    assert rest == {1: losses[1]}
    assert checkpoint.run.steps() == [5, 10]


def test_what_is_frozen_costs_nothing(tmp_path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(2000, trainable=False), layers.Dense(1)])
    model.compile("sgd", "mse")
    checkpoint = DeltaCheckpoint(tmp_path)
    fitted(model, checkpoint, epochs=2)
    first, second = (commit.figures.new_size for commit in checkpoint.run.commits())
    assert first > 2000 * 9 * 4
    assert second < first / 4


class Broken(MemoryBackend):
    """Fails every write once it is told to."""

    is_broken = False

    def create(self, name):
        if self.is_broken:
            raise StorageError("the disk is gone", errno=5)
        return super().create(name)


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_ends_the_training_with_its_error(background):
    store = Broken()
    checkpoint = DeltaCheckpoint(store, background=background)

    class Breaks(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                checkpoint.run.close()  # waits for the save under way
                store.is_broken = True

    with pytest.raises(StorageError, match="the disk is gone"):
        fitted(small(), Breaks(), checkpoint, epochs=4)
    store.is_broken = False
    assert open_run(store).steps() == [5]


def test_the_save_under_way_of_interrupted_training_is_what_is_restored(monkeypatch):
    class Slow(MemoryBackend):
        has_asked = threading.Event()

        def create_once(self, name, data, **options):
            if name.startswith("refs/"):
                self.has_asked.wait(30)
            return super().create_once(name, data, **options)

    checkpoint = DeltaCheckpoint(Slow(), background=True)
    interrupt = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: 1 // (1 - epoch))
    with pytest.raises(ZeroDivisionError):
        fitted(small(), checkpoint, interrupt, epochs=2)
    close = checkpoint.run.close
    monkeypatch.setattr(checkpoint.run, "close", lambda: (Slow.has_asked.set(), close()))
    model = small()
    assert checkpoint.restore(model) == 1
    fitted(model, checkpoint, epochs=2, initial_epoch=1)
    assert checkpoint.run.steps() == [5, 10]


# -- what is restored


def test_a_run_without_steps_is_a_start_and_a_missing_step_an_error(tmp_path):
    model, checkpoint = small(), DeltaCheckpoint(tmp_path)
    before = values(model)
    assert checkpoint.restore(model) == 0
    assert values(model) == before
    with pytest.raises(NotFoundError):
        checkpoint.restore(model, step=5)
    with pytest.raises(NotFoundError):
        checkpoint.restore(model, step="latest-good")


def test_every_optimizer_of_a_model_is_kept(tmp_path):
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(4), layers.Dense(1)
            self.second = keras.optimizers.Adam(1e-2)

        def call(self, x):
            return self.b(self.a(x))

        def train_step(self, batch):
            x, y = batch
            for optimizer, layer in ((self.optimizer, self.a), (self.second, self.b)):
                self.zero_grad()
                loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                loss.backward()
                optimizer.apply([v.value.grad for v in layer.trainable_weights], layer.trainable_weights)
            return {"loss": loss}

    def made():
        model = Two()
        model.compile(keras.optimizers.Adam(1e-3), "mse")
        model(data()[0])
        model.optimizer.build(model.a.trainable_variables)
        return model

    model = made()
    fitted(model, DeltaCheckpoint(tmp_path))
    other = made()
    with pytest.raises(InvalidInputError, match=r"'adam(_\d+)?' is not built"):
        DeltaCheckpoint(tmp_path).restore(other)
    other.second.build(other.b.trainable_variables)
    DeltaCheckpoint(tmp_path).restore(other)
    assert_same(model, other)
    assert values(model.second) == values(other.second)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_other_precisions_come_back_bit_for_bit(tmp_path, policy):
    def made():
        keras.config.set_dtype_policy(policy)
        try:
            return small("adam")
        finally:
            keras.config.set_dtype_policy("float32")

    model, other = made(), made()
    fitted(model, DeltaCheckpoint(tmp_path))
    DeltaCheckpoint(tmp_path).restore(other)
    assert_same(model, other)
    dtypes = {row.dtype for row in open_run(tmp_path).manifest().tensors}
    assert ("bfloat16" in dtypes) == (policy == "bfloat16")


def test_a_model_that_is_not_compiled_is_given_its_weights(tmp_path):
    model = small()
    fitted(model, DeltaCheckpoint(tmp_path))
    other = keras.Sequential([keras.Input((8,)), layers.Dense(3), layers.Dense(1)])
    DeltaCheckpoint(tmp_path).restore(other)
    assert values(model) == values(other)


def test_names_that_are_there_twice_are_kept_apart(tmp_path):
    def made():
        x = keras.Input((8,))
        inner = keras.Model(x, layers.Dense(8, name="same")(x))
        model = keras.Model(x, layers.Dense(1)(inner(layers.Dense(8, name="same")(x))))
        model.compile("adam", "mse")
        return model

    model, other = made(), made()
    fitted(model, DeltaCheckpoint(tmp_path))
    DeltaCheckpoint(tmp_path).restore(other)
    assert_same(model, other)
    names = list(deltackpt.load(tmp_path)["model"])
    assert len(names) == 6
    assert sum(name.startswith("same/kernel") for name in names) == 2


# -- what is refused


def test_another_model_is_told_all_that_differs_and_is_not_changed(tmp_path):
    fitted(small("adam"), DeltaCheckpoint(tmp_path))
    for model, says in {
        small("adam", width=4): r"kernel: found float32 \(8, 3\), expected float32 \(8, 4\)",
        small("sgd"): r"adam.*_momentum is in the step only",
        keras.Sequential([keras.Input((8,)), layers.Dense(3)]): r"model: .* is in the step only",
    }.items():
        before = values(model)
        with pytest.raises(InvalidInputError, match=says) as caught:
            DeltaCheckpoint(tmp_path).restore(model)
        assert caught.value.message.startswith("the model does not match the step\n")
        assert values(model) == before
    with pytest.raises(InvalidInputError, match="is not built"):
        DeltaCheckpoint(tmp_path).restore(keras.Sequential([layers.Dense(3)]))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("more", 1, InvalidInputError),
        ("epoch", -1, CorruptError),
        ("epoch", "3", CorruptError),
        ("n_batches", True, CorruptError),
        ("model", [1], CorruptError),
        ("model", {"w": "text"}, CorruptError),
        ("optimizers", [1], InvalidInputError),
        ("optimizers", {"optimizer": 3}, CorruptError),
    ],
)
def test_a_step_that_says_impossible_things_is_refused(key, value, error):
    store = MemoryBackend()
    fitted(small(), DeltaCheckpoint(store))
    deltackpt.save({**deltackpt.load(store), key: value}, store, step=9)
    model = small()
    before = values(model)
    with pytest.raises(error):
        DeltaCheckpoint(store).restore(model)
    assert values(model) == before


@pytest.mark.parametrize(
    "value", [None, {}, {"python": 3}, {"python": (3, np.ones(2, np.uint32), None)}, {"python": (9, 9, 9)}]
)
def test_random_states_that_are_none_are_refused_before_training(value):
    store = MemoryBackend()
    fitted(small(), DeltaCheckpoint(store))
    deltackpt.save({**deltackpt.load(store), "random": value}, store, step=5, overwrite=True)
    model, checkpoint = small(), DeltaCheckpoint(store)
    if value is None:
        with pytest.raises(CorruptError, match="random"):
            checkpoint.restore(model)
        return
    checkpoint.restore(model)
    with pytest.raises(CorruptError, match="random states of the step"):
        fitted(model, checkpoint, epochs=2, initial_epoch=1)


@pytest.mark.parametrize(
    "options", [{"save_freq": 0}, {"save_freq": "batch"}, {"save_freq": True}, {"keep": 3}]
)
def test_options_that_mean_nothing_are_refused(tmp_path, options):
    with pytest.raises(InvalidInputError):
        DeltaCheckpoint(tmp_path, **options)
