"""A real Keras training run, saved as it goes: python keras_train.py STORE EPOCHS PLACE...

For each place a process of its own resumes from the latest step of the store, prints one line an epoch,
``epoch loss-as-hex val_loss-as-hex``, and kills itself with SIGKILL in its first save: before it writes the
first file under that place, or after it, if the place is ``after refs/``.  Then what it died of is printed,
and the steps there are.  KERAS_BACKEND says on what it runs.
"""

import os
import sys

import keras
import numpy as np
from deaths import die_before
from keras import layers

from deltackpt import open_run
from deltackpt.integrations.keras import DeltaCheckpoint

N_BATCHES = 5


def fresh(**options):
    """A model with seeds, running statistics, two branches of the same names, and moments of weights."""
    keras.utils.set_random_seed(7)
    inner = keras.Sequential(
        [keras.Input((16,)), layers.Dense(16, name="same"), layers.Dropout(0.2)], name="in"
    )
    x = keras.Input((8,))
    y = layers.Dense(16, activation="relu", name="same")(x)
    y = layers.BatchNormalization()(y)
    y = layers.Dropout(0.3)(inner(y))
    model = keras.Model(x, layers.Dense(1)(y))
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 100)
    model.compile(keras.optimizers.AdamW(schedule, use_ema=True), "mse", metrics=["mae"], **options)
    return model


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8 * N_BATCHES, 8)).astype(np.float32)
    return x, x.sum(1, keepdims=True) ** 2


class Telling(keras.callbacks.Callback):
    """Keeps each epoch's losses, and says them."""

    def __init__(self, say=lambda *words: None):
        super().__init__()
        self.losses, self.say = {}, say

    def on_epoch_end(self, epoch, logs=None):
        self.losses[epoch] = tuple(float(logs[name]).hex() for name in ("loss", "val_loss"))
        self.say(epoch, *self.losses[epoch])


def trained(model, epochs, *callbacks, first=0, say=lambda *words: None):
    """Train with shuffling; the losses."""
    x, y = data()
    telling = Telling(say)
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        initial_epoch=first,
        validation_data=(x[:8], y[:8]),
        callbacks=[telling, *callbacks],
        verbose=0,
    )
    return telling.losses


def dies(store, epochs, place):
    """Go on training until a save, which is the end of this process."""
    model, checkpoint = fresh(), DeltaCheckpoint(store)
    first = checkpoint.restore(model)
    die_before(place)
    trained(model, epochs, checkpoint, first=first, say=lambda *words: print(*words, flush=True))


def main(store, epochs, *places):
    for place in places:
        pid = os.fork()  # of a process that has imported all there is, and done nothing with it
        if pid == 0:
            try:
                dies(store, int(epochs), place)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        print("died of", status, open_run(store).steps(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
