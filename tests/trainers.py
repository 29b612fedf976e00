"""What a Trainer's processes do: train a tiny model, and die where they are told to."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from commands import environment
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from deltackpt import targets
from deltackpt.integrations.transformers import DeltaCallback
from deltackpt.session import Session

torch.set_num_threads(1)


class Recorder(TrainerCallback):
    """Notes of each checkpoint what the Trainer wrote; must come before what may change it."""

    def __init__(self):
        self.seen = {}

    def on_save(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.seen[state.global_step] = facts(path)


def facts(root):
    """The sha256, mode and time of every file of a directory, by path."""
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mode, path.stat().st_mtime_ns
        )
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }  # fmt: skip


def arguments(out, **options):
    defaults = {
        "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "seed": 3, "learning_rate": 1e-2, "use_cpu": True,
        "dataloader_pin_memory": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(str(out), **{**defaults, **options})


def trainer_of(args, callbacks, *, peft=False):
    """A Trainer of a model with dropout, so that the random state counts."""
    set_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    rows = torch.randint(64, (24, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(out, callbacks, *, resume=None, peft=False, **options):
    """Train; the losses of all steps, those before the resume as the checkpoint has them."""
    trainer = trainer_of(arguments(out, **options), callbacks, peft=peft)
    trainer.train(resume_from_checkpoint=resume)
    return losses_of(trainer)


def resumed(out, store, **options):
    """Train on from where the store is."""
    callback = DeltaCallback(store)
    return trained(out, [callback], resume=callback.restore(arguments(out)), **options)


# -- processes


class Processes:
    """Does work of this module in processes, forks of one that has imported what they need."""

    def __enter__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return self

    def __exit__(self, *_):
        self._server.communicate()

    def run(self, n, work, *args):
        """Have n processes of one job do it; return their exit codes."""
        asked = {"n": n, "work": work.__name__, "args": list(map(str, args))}
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve():
    """Fork for each line that asks for it."""
    for line in sys.stdin:
        asked = json.loads(line)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        children = {forked(asked, rank, port): rank for rank in range(asked["n"])}
        codes = {}
        while len(codes) < len(children):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:
                for other in children.keys() - codes.keys():  # they would wait for it
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[pid] for pid in children]), flush=True)


def forked(asked, rank, port):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if asked["n"] > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(asked["n"]),
                "LOCAL_WORLD_SIZE": str(asked["n"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        globals()[asked["work"]](*asked["args"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def dies(out, store, where):
    """Train until the second save, and die there."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def at_second(real):
        calls = []

        def called(*args, **kwargs):
            calls.append(args)
            return die() if len(calls) == 2 else real(*args, **kwargs)

        return called

    if where == "before the decision":
        Session.commit = at_second(Session.commit)
    elif where == "in the Trainer's own save":
        Trainer._save_rng_state = at_second(Trainer._save_rng_state)
    elif where == "between the decision and the removal":
        targets.remove = die
    else:
        targets.discard = die
    trained(out, [DeltaCallback(store)])


def train_together(out, store, max_steps):
    """Train from where the store is, or from the start; the losses go into a file beside."""
    args = arguments(out, max_steps=int(max_steps), ddp_backend="gloo", ddp_find_unused_parameters=False)
    callback = DeltaCallback(store)
    trainer = trainer_of(args, [callback])
    trainer.train(resume_from_checkpoint=callback.restore(args))
    if args.process_index == 0:
        Path(f"{out}.json").write_text(json.dumps(losses_of(trainer)))


if __name__ == "__main__":
    serve()
