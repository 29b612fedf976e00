"""What the ranks of a distributed job do: processes of their own, over gloo, on a store they share."""

import multiprocessing
import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from deltackpt.integrations.torch_dcp import DeltaStorageReader, DeltaStorageWriter

WIDTH = 96


def run_ranks(n, work, *args):
    """Have `work(rank, n, *args)` done by n processes; return what each gave back; a dead one gives None."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Torch is imported once, by a server without threads; every rank is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, n, port, queue, work, args)) for r in range(n)]
    for rank in ranks:
        rank.start()
    results, n_live = [None] * n, n
    while n_live:
        if queue.empty():
            n_live = sum(rank.is_alive() for rank in ranks)
            ranks[0].join(0.02)
            continue
        r, is_error, value = queue.get()
        if is_error:
            for rank in ranks:
                rank.kill()
            raise AssertionError(f"rank {r} of {n}: {value}")
        results[r] = value
    return results


def _rank(rank, n, port, queue, work, args):
    try:
        torch.set_num_threads(1)
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("cpu:gloo", init_method=address, rank=rank, world_size=n)
        queue.put((rank, False, work(rank, n, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, True, traceback.format_exc()))


# -- training


def model_of(n):
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5 * n), nn.ReLU(), nn.Linear(5 * n, 7)
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (layers[0], layers[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(layers, mesh=mesh)
    return layers, torch.optim.AdamW(layers.parameters(), lr=1e-2)


def trained(model, optimizer, steps):
    """Train; the losses of all ranks' batches together, step by step."""
    losses = []
    for step in steps:
        torch.manual_seed(1000 + step)
        inputs = torch.randn(12, WIDTH).chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(loss.item())
    return losses


def state_of(model, optimizer, step):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optim": optimizer_state, "step": step}


def loaded(model, optimizer, store, step="latest"):
    state = state_of(model, optimizer, -1)
    dcp.load(state, storage_reader=DeltaStorageReader(store, step=step))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return state["step"]


def whole(state):
    """Every tensor as all ranks together have it, by name."""
    found = {}

    def walk(x, name):
        if isinstance(x, dict):
            for k, v in x.items():
                walk(v, f"{name}.{k}")
        elif isinstance(x, DTensor):
            found[name] = x.full_tensor().detach().clone()
        elif isinstance(x, torch.Tensor):
            found[name] = x.detach().clone()

    walk(state, "")
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(found.items())}


def trains(rank, n, store, n_steps, save_at, planner=None):
    """Train from nothing, saving some steps; losses, what the last save said, all there was at the end."""
    model, optimizer = model_of(4)
    losses, report, writer = [], None, DeltaStorageWriter(store)
    for step in range(n_steps):
        losses += trained(model, optimizer, [step])
        if step in save_at:
            planner = DefaultSavePlanner(enable_plan_caching=True)
            dcp.save(
                state_of(model, optimizer, step),
                checkpoint_id=str(step),
                storage_writer=writer,
                planner=planner,
            )
            report = writer.report
    return losses, report, whole(state_of(model, optimizer, n_steps - 1))


def resumes(rank, n, store, n_steps):
    """Go on from the latest step; what was loaded, and the losses from there."""
    model, optimizer = model_of(4)
    trained(model, optimizer, [77])  # so that there are moments to be loaded over
    step = loaded(model, optimizer, store)
    found = whole(state_of(model, optimizer, step))
    return step, found, trained(model, optimizer, range(step + 1, n_steps))


def dies(rank, n, store, victim, step):
    """One rank dies in its part of a save."""
    model, optimizer = model_of(4)

    class Dying(DefaultSavePlanner):
        def resolve_data(self, item):
            if rank == victim:
                os._exit(1)
            return super().resolve_data(item)

    trained(model, optimizer, [5])
    writer = DeltaStorageWriter(store, step=step)
    try:
        dcp.save(state_of(model, optimizer, step), storage_writer=writer, planner=Dying())
    except BaseException as error:
        os._exit(2 if "deltackpt" in repr(error) else 0)


# -- placements


def grid(n=24):
    return torch.arange(float(n * n)).reshape(n, n)


def saves_placed(rank, n, store, step, dim):
    mesh = init_device_mesh("cpu", (n,))
    placement = [Replicate()] if dim is None else [Shard(dim)]
    state = {"w": distribute_tensor(grid(), mesh, placement), "r": torch.full((3,), 7.0), "who": "all"}
    writer = DeltaStorageWriter(store, step=step)
    dcp.save(state, storage_writer=writer)
    return writer.report


def loads_placed(rank, n, store, dim):
    mesh = init_device_mesh("cpu", (n,))
    state = {
        "w": distribute_tensor(torch.zeros(24, 24), mesh, [Shard(dim)]),
        "r": torch.zeros(3),
        "who": "",
    }
    dcp.load(state, storage_reader=DeltaStorageReader(store))
    return torch.equal(state["w"].full_tensor(), grid()), state["r"].tolist(), state["who"]


def layers(moved=0.0):
    """Matrices of one and of several chunks, a long vector and a short one, as after some training."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (1024, 768), "narrow": (770, 97), "flat": (600_001,), "bias": (768,)}
    found = {}
    for name, shape in shapes.items():
        values, steps = (torch.randn(shape, generator=generator) for _ in range(2))
        found[name] = values * (1 + moved * steps)
    return found


def saves_rows(rank, n, store, step, moved):
    """Save by rows as FSDP2 does; what it cost."""
    mesh = init_device_mesh("cpu", (n,))
    state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in layers(moved).items()}
    writer = DeltaStorageWriter(store, step=step)
    dcp.save(state, storage_writer=writer)
    return writer.report


def loads_rows(rank, n, store, step, moved):
    """Load by columns, into another number of ranks; whether all is there."""
    mesh = init_device_mesh("cpu", (n,))
    expected = layers(moved)
    state = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(tensor.ndim - 1)])
        for name, tensor in expected.items()
    }
    dcp.load(state, storage_reader=DeltaStorageReader(store, step=step))
    return all(torch.equal(state[name].full_tensor(), tensor) for name, tensor in expected.items())


def saves_async(rank, n, store, kind):
    mesh = init_device_mesh("cpu", (n,))
    w = distribute_tensor(grid(), mesh, [Shard(0)])
    for step in (1, 2):
        writer = DeltaStorageWriter(store, step=step)
        pending = dcp.async_save({"w": w, "step": step}, storage_writer=writer, async_checkpointer_type=kind)
        done = getattr(pending, "upload_completion", pending)
        done.result()
        w.to_local().add_(1)
