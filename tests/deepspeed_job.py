"""What the ranks of a DeepSpeed job do: real engines, ZeRO and all, on CPUs over gloo."""

import json
import logging
import os
import signal
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

from deltackpt import last
from deltackpt.backends.local import LocalBackend
from deltackpt.errors import DeltackptError
from deltackpt.integrations.deepspeed import DeltaCheckpointEngine

# It would be compiled here, which takes a minute, to make reductions faster.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

STEPS, AT = 6, 4


def engine_of(rank, stage, store, seed=0, **options):
    """A DeepSpeed engine on a tiny model in bf16."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.checkpoint_engine = DeltaCheckpointEngine(store, **options)
    return engine


def trained(engine, steps):
    losses = []
    for step in steps:
        torch.manual_seed(100 * step + engine.global_rank)
        loss = engine(torch.randn(4, 8).to(torch.bfloat16)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def goes_on(rank, n, base, stages):
    """For each stage, the losses of a job that was never stopped, and of one made anew in the middle.

    They are written to a file: at the end rank 1 dies in a save of one more tag of the last stage.
    """
    found = []
    for stage in stages:
        store, tags = f"{base}/{stage}/store", f"{base}/{stage}/tags"
        engine = engine_of(rank, stage, store, keep=last(2))
        whole = []
        for step in range(STEPS):
            whole += trained(engine, [step])
            if step + 1 <= AT:
                engine.save_checkpoint(tags, client_state={"epoch": step})
        again = engine_of(rank, stage, store, seed=9)
        where, client = again.load_checkpoint(tags)
        found.append((whole[AT:], trained(again, range(AT, STEPS)), Path(where).parent.name, client["epoch"]))
    Path(f"{base}/{rank}.json").write_text(json.dumps(found))
    create_once = LocalBackend.create_once

    def dying(self, name, data, **kwargs):
        if name.startswith("manifests/") and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return create_once(self, name, data, **kwargs)

    LocalBackend.create_once = dying
    try:
        again.save_checkpoint(tags)
    except RuntimeError:  # gloo's: nobody is there to meet
        os._exit(0)
    os._exit(1)


def resumes(rank, n, base, stage):
    """Go on from the latest tag; save one that a rank cannot; what is told, and the losses."""
    store, tags = f"{base}/{stage}/store", f"{base}/{stage}/tags"
    engine = engine_of(rank, stage, store)
    engine.load_checkpoint(tags)
    told = []
    try:
        engine.save_checkpoint(tags, tag="refused", client_state={"seen": {1}})
    except DeltackptError as error:
        told.append(f"{type(error).__name__}: {error}")
    losses = trained(engine, range(AT, STEPS))
    engine.save_checkpoint(tags)
    engine.save_checkpoint(tags)  # the same tag once more
    engine.save_16bit_model(tags, "model.bin")  # for others
    again = engine_of(rank, stage, store, seed=4)
    again.load_checkpoint(tags)
    return losses, told, trained(again, [STEPS]) == trained(engine, [STEPS])


def thins(rank, n, base, stage):
    """Save a tag twice; go on from it by its weights alone; the markers of each tag, and which tags load."""
    store, tags = f"{base}/thinned/store", f"{base}/thinned/tags"
    engine = engine_of(rank, stage, store, keep=last(1))
    for step in range(3):
        trained(engine, [step])
        engine.save_checkpoint(tags)
    engine.save_checkpoint(tags)
    for _ in range(2):
        engine = engine_of(rank, stage, store, keep=last(1))
        engine.load_checkpoint(tags, load_optimizer_states=False, load_lr_scheduler_states=False)
        trained(engine, [3])
        engine.save_checkpoint(tags)
    found = sorted(Path(tags).glob("global_step*"))
    names = [sorted(file.name for file in tag.iterdir()) for tag in found]
    return names, [engine.load_checkpoint(tags, tag.name)[0] for tag in found if any(tag.iterdir())]
