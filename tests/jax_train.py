"""A real JAX training run on four devices, saved as it goes: python jax_train.py STORE N_STEPS [STEP PLACE].

Prints one line a step, ``step loss-as-hex``.  Resumes from the latest step of the store.  With STEP and PLACE
the process kills itself with SIGKILL in that step's save: before it writes the first file under that place,
or after it, if the place is ``after refs/``.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from deaths import die_before
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deltackpt import NotFoundError
from deltackpt.integrations.jax import restore, save

WIDTH = 64


class State(TrainState):
    """With the random key of dropout, and running statistics in another dtype."""

    key: jax.Array
    mean: jax.Array


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(4 * WIDTH, param_dtype=jnp.bfloat16)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(WIDTH)(x)


# Once: they are part of what a state is like, and a step is compiled anew for others.
MODEL = Model()
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 100)))


def mesh_of(n=4):
    return jax.make_mesh((n,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def fresh(mesh=None):
    """A train state before the first step; on a mesh kernels are cut, the wide one by columns."""
    params = MODEL.init(jax.random.key(0), jnp.ones((1, WIDTH)), train=False)["params"]
    mean = jnp.zeros(WIDTH, jnp.bfloat16)
    state = State.create(apply_fn=MODEL.apply, params=params, tx=TX, key=jax.random.key(1), mean=mean)
    if mesh is None:
        return state
    cuts = {(WIDTH, 4 * WIDTH): P(None, "d"), (4 * WIDTH, WIDTH): P("d", None)}
    placed = [
        jax.device_put(x, NamedSharding(mesh, cuts.get(np.shape(x), P()))) if isinstance(x, jax.Array) else x
        for x in jax.tree_util.tree_leaves(state)
    ]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(state), placed)


def _one_step(state, x):
    key, dropout = jax.random.split(state.key)

    def loss_of(params):
        found = state.apply_fn({"params": params}, x, train=True, rngs={"dropout": dropout})
        return jnp.square(found - jnp.sin(x)).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    mean = (0.9 * state.mean + x.mean(0)).astype(jnp.bfloat16)
    return state.apply_gradients(grads=grads, key=key, mean=mean), loss


one_step = jax.jit(_one_step, donate_argnums=0)


def batch(step):
    return jax.random.normal(jax.random.key(1000 + step), (16, WIDTH))


def trained(state, steps, after=lambda step, state, loss: None):
    """Train; the state and the losses."""
    losses = {}
    for step in steps:
        state, loss = one_step(state, batch(step))
        losses[step] = float(loss).hex()
        after(step, state, losses[step])
    return state, losses


def main(store, n_steps, die_step=None, place=None):
    state, first = fresh(mesh_of()), 0
    try:
        state = restore(store, state)
        first = int(state.step)
    except NotFoundError:
        pass

    def after(step, state, loss):
        print(step, loss, flush=True)
        if step % 2:
            if str(step) == die_step:
                die_before(place)
            save(state, store, step=step)

    trained(state, range(first, int(n_steps)), after)


if __name__ == "__main__":
    main(*sys.argv[1:])
