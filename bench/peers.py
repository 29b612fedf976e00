"""Tools that keep checkpoints, each called as its own documents say, behind one small interface.

Owns   how every tool is called, and that its bytes are durable when a save ends, where it does not see to it.
Never  measures time, and hides nothing: what a tool needs is in its class.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from cache import SavedState, Tensors
from meter import run_tool
from safetensors.torch import load_file, save_file

from deltackpt import delta


@dataclass(frozen=True, slots=True)
class Given:
    """A state to save, in the form the tool takes: in memory, or as a file (then the others are empty)."""

    run: str
    step: int
    state: dict[str, Any]
    tensors: Tensors
    path: Path

    @property
    def name(self) -> str:
        """A file name of its own."""
        return f"{self.run}-{self.step}"


class Tool(ABC):
    """A library or a program that may be there.

    Attributes
    ----------
    name, install : str
        What it is called, and the command that installs it.
    module, program : str
        What must be there for it to run.
    """

    name: ClassVar[str]
    install: ClassVar[str]
    module: ClassVar[str] = ""
    program: ClassVar[str] = ""

    @classmethod
    def is_installed(cls) -> bool:
        if cls.program:
            return shutil.which(cls.program) is not None
        return importlib.util.find_spec(cls.module) is not None

    @classmethod
    def version(cls) -> str:
        if not cls.program:
            return importlib.metadata.version(cls.module)
        done = subprocess.run([cls.program, *cls.version_arguments()], capture_output=True, text=True)
        found = re.search(r"(?:^|[\s/v])(\d+(?:\.\d+)*)(?=[\s,]|$)", done.stdout)
        return found[1] if found else done.stdout.strip()

    @classmethod
    def version_arguments(cls) -> list[str]:
        return ["--version"]

    @classmethod
    def about(cls) -> dict[str, Any]:
        """Whether it is installed, what installs it, and which version is there."""
        installed = cls.is_installed()
        return {
            "installed": installed,
            "install": cls.install,
            "version": cls.version() if installed else None,
        }


class Peer(Tool):
    """A tool that keeps checkpoints, with a store of its own under `at`.

    Attributes
    ----------
    takes_files : bool
        Whether it is given a safetensors file rather than tensors in memory.
    """

    takes_files: ClassVar[bool] = False

    def __init__(self, at: Path):
        self.at, self.store = at, at / "store"
        self.tool_peak_size = 0

    def prepare(self) -> None:
        """Make an empty store; not timed."""
        self.store.mkdir(parents=True)

    @abstractmethod
    def save(self, given: Given) -> None:
        """Store one state; durable on return."""

    @abstractmethod
    def restore(self, saves: list[SavedState]) -> Any:
        """Bring the last of the saves back into memory: flat tensors, or the nested state."""

    def tool(self, *arguments: str | Path, cwd: Path | None = None) -> None:
        """Run the program, and keep in mind the most memory it has had."""
        peak_size = run_tool([self.program, *map(str, arguments)], cwd or self.at, self.environment())
        self.tool_peak_size = max(self.tool_peak_size, peak_size)

    def environment(self) -> dict[str, str]:
        return {}


def fsync(path: Path) -> None:
    """Make a new file and its name durable."""
    for what in (path, path.parent):
        fd = os.open(what, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def in_memory(path: Path) -> Tensors:
    """The tensors of a safetensors file, read and not only mapped."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def name_of(saved: SavedState) -> str:
    return f"{saved.run}-{saved.step}"


class Deltackpt(Peer):
    name, install, module = "deltackpt", "pip install .", "deltackpt"

    def prepare(self) -> None:
        """Nothing: the first save makes the store, and its time counts."""

    def save(self, given: Given) -> None:
        delta.save(given.state, self.store, step=given.step, run=given.run, optimize="bytes")

    def restore(self, saves: list[SavedState]) -> Any:
        return delta.load(self.store, step=saves[-1].step, run=saves[-1].run)


class InTime(Deltackpt):
    """As by default: what changed is not always stored as small as it can be."""

    name = "deltackpt (time)"

    @classmethod
    def about(cls) -> dict[str, Any]:
        return {**super().about(), "is_part": True}

    def save(self, given: Given) -> None:
        delta.save(given.state, self.store, step=given.step, run=given.run)


class TorchSave(Peer):
    name, install, module = "torch.save", "pip install torch", "torch"

    def save(self, given: Given) -> None:
        torch.save(given.state, self.store / f"{given.name}.pt")
        fsync(self.store / f"{given.name}.pt")

    def restore(self, saves: list[SavedState]) -> Any:
        return torch.load(self.store / f"{name_of(saves[-1])}.pt", weights_only=True)


class Safetensors(Peer):
    name, install, module = "safetensors", "pip install safetensors", "safetensors"

    def save(self, given: Given) -> None:
        save_file(given.tensors, self.store / f"{given.name}.safetensors")
        fsync(self.store / f"{given.name}.safetensors")

    def restore(self, saves: list[SavedState]) -> Any:
        return in_memory(self.store / f"{name_of(saves[-1])}.safetensors")


class Dcp(Peer):
    """``torch.distributed.checkpoint`` of one process, a directory a step; it flushes its files itself."""

    name, install, module = "DCP", "pip install torch", "torch"

    def save(self, given: Given) -> None:
        dcp.save(given.tensors, checkpoint_id=self.store / given.name, no_dist=True)

    def restore(self, saves: list[SavedState]) -> Any:
        reader = dcp.FileSystemReader(self.store / name_of(saves[-1]))
        found = {
            name: torch.empty(of.size, dtype=of.properties.dtype)
            for name, of in reader.read_metadata().state_dict_metadata.items()
        }
        dcp.load(found, storage_reader=reader, no_dist=True)
        return found


class Orbax(Peer):
    """A directory a step, of zarr arrays in OCDBT, compressed by zstd, all by default; tensors as NumPy's."""

    name, install, module = "Orbax", "pip install orbax-checkpoint", "orbax.checkpoint"

    def __init__(self, at: Path):
        super().__init__(at)
        self.ocp = importlib.import_module("orbax.checkpoint")  # seconds, of JAX

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec("orbax") is not None

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version("orbax-checkpoint")

    def save(self, given: Given) -> None:
        with self.ocp.StandardCheckpointer() as saver:
            saver.save(self.store / given.name, {name: as_array(t) for name, t in given.tensors.items()})
        subprocess.run(["sync", "-f", self.store], check=True)

    def restore(self, saves: list[SavedState]) -> Any:
        path = self.store / name_of(saves[-1])
        with self.ocp.PyTreeCheckpointer() as loader:
            kinds = loader.metadata(path).item_metadata.tree
            wanted = {name: self.ocp.RestoreArgs(restore_type=np.ndarray) for name in kinds}
            found = loader.restore(path, restore_args=wanted)
        return {name: as_tensor(array) for name, array in found.items()}


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as NumPy's array; bfloat16 as that of ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


class Zstd(Peer):
    """What ``zstd -3 -T0`` does to a file, by the Python binding of the same library."""

    name, install, module, takes_files = "zstd -3", "pip install zstandard", "zstandard", True

    def save(self, given: Given) -> None:
        import zstandard

        out = self.store / f"{given.name}.zst"
        with given.path.open("rb") as source, out.open("wb") as target:
            compressor = zstandard.ZstdCompressor(level=3, threads=-1)
            compressor.copy_stream(source, target, size=given.path.stat().st_size)
        fsync(out)

    def restore(self, saves: list[SavedState]) -> Any:
        import zstandard

        out = self.at / "restored.safetensors"
        with (self.store / f"{name_of(saves[-1])}.zst").open("rb") as source, out.open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target)
        return in_memory(out)


class Zipnn(Peer):
    """A tensor at a time in a safetensors file, as zipnn's own script for such files does."""

    name, install, module = "zipnn", "pip install zipnn", "zipnn"

    def save(self, given: Given) -> None:
        from zipnn import ZipNN

        packer, stored, packed = ZipNN(input_format="torch"), {}, []
        for name, tensor in given.tensors.items():
            if tensor.is_floating_point():
                # A copy, because compress() turns the bits of the tensor it is given, and training goes on.
                blob = packer.compress(tensor.clone())
                stored[name] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
                packed.append(name)
            else:
                stored[name] = tensor
        out = self.store / f"{given.name}.safetensors"
        save_file(stored, out, {"packed": json.dumps(packed)})
        fsync(out)

    def restore(self, saves: list[SavedState]) -> Any:
        from safetensors import safe_open
        from zipnn import ZipNN

        packer = ZipNN(input_format="torch")
        with safe_open(self.store / f"{name_of(saves[-1])}.safetensors", "pt") as file:
            packed = set(json.loads(file.metadata()["packed"]))
            return {
                name: packer.decompress(file.get_tensor(name).numpy().tobytes())
                if name in packed
                else file.get_tensor(name).clone()
                for name in file.keys()  # noqa: SIM118 - not a dict
            }


class Z4ai(Peer):
    """Each file as a delta against the one before of its run, or against the first of all.

    The file before is taken to be at hand uncompressed, as z4ai's documents do; it is not counted as stored.
    """

    name, install, module, takes_files = "z4ai", "pip install z4ai", "z4ai", True

    def __init__(self, at: Path):
        super().__init__(at)
        self.bases: dict[str, Path] = {}

    def save(self, given: Given) -> None:
        from z4ai import model_delta
        from z4ai.safetensors import compress_file

        out = self.store / f"{given.name}.z4ai"
        base = self.bases.get(given.run) or next(iter(self.bases.values()), None)
        if base is None:
            compress_file(str(given.path), str(out))
        else:
            model_delta.compress_file(str(given.path), str(base), str(out))
        fsync(out)
        self.bases[given.run] = given.path

    def restore(self, saves: list[SavedState]) -> Any:
        from z4ai import model_delta
        from z4ai.safetensors import decompress_file

        chain = [s for s in saves if s.run == saves[-1].run]
        if chain[0] is not saves[0]:
            chain.insert(0, saves[0])
        out = self.at / f"{name_of(chain[0])}.safetensors"
        decompress_file(str(self.store / f"{name_of(chain[0])}.z4ai"), str(out))
        for saved in chain[1:]:
            base, out = out, self.at / f"{name_of(saved)}.safetensors"
            model_delta.decompress_file(str(self.store / f"{name_of(saved)}.z4ai"), str(base), str(out))
        return in_memory(out)


class BackupTool(Peer):
    """A program that is given a directory, one backup a step; the file in it has the same name each time."""

    takes_files = True

    def folder(self, given: Given) -> Path:
        """The directory to back up: a link, so that nothing is copied."""
        tree = self.at / "tree"
        tree.mkdir(exist_ok=True)
        (tree / "state.safetensors").unlink(missing_ok=True)
        try:
            os.link(given.path, tree / "state.safetensors")
        except OSError:  # another file system
            shutil.copyfile(given.path, tree / "state.safetensors")
        return tree

    def restored(self) -> Path:
        out = self.at / "restored"
        out.mkdir()
        return out


class Restic(BackupTool):
    name, install, program = "restic", "apt-get install restic", "restic"

    @classmethod
    def version_arguments(cls) -> list[str]:
        return ["version"]

    def environment(self) -> dict[str, str]:
        return {
            "RESTIC_PASSWORD": "none",
            "RESTIC_REPOSITORY": str(self.store),
            "RESTIC_CACHE_DIR": str(self.at / "cache"),
        }

    def prepare(self) -> None:
        self.tool("init", "--quiet")

    def save(self, given: Given) -> None:
        self.tool("backup", "--quiet", "--compression", "auto", "--host", "bench", self.folder(given))

    def restore(self, saves: list[SavedState]) -> Any:
        out = self.restored()
        self.tool("restore", "--quiet", "latest", "--target", out)
        return in_memory(next(out.rglob("state.safetensors")))


class Borg(BackupTool):
    name, install, program = "borg", "apt-get install borgbackup", "borg"

    def environment(self) -> dict[str, str]:
        return {
            "BORG_REPO": str(self.store),
            "BORG_BASE_DIR": str(self.at / "base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }

    def prepare(self) -> None:
        self.tool("init", "--encryption", "none")

    def save(self, given: Given) -> None:
        tree = self.folder(given)
        self.tool("create", "--compression", "zstd,3", f"::{given.name}", tree.name)

    def restore(self, saves: list[SavedState]) -> Any:
        out = self.restored()
        self.tool("extract", f"::{name_of(saves[-1])}", cwd=out)
        return in_memory(next(out.rglob("state.safetensors")))


class Casync(BackupTool):
    """Flushes nothing, so its file system is flushed after it (``sync -f``), in its time."""

    name, install, program = "casync", "apt-get install casync", "casync"

    def save(self, given: Given) -> None:
        path = self.folder(given) / "state.safetensors"
        self.tool("make", "--compression=zstd", *self.where(given.name), path)
        subprocess.run(["sync", "-f", self.store], check=True)

    def restore(self, saves: list[SavedState]) -> Any:
        out = self.restored() / "state.safetensors"
        self.tool("extract", *self.where(name_of(saves[-1])), out)
        return in_memory(out)

    def where(self, name: str) -> list[str]:
        return [f"--store={self.store / 'chunks.castr'}", str(self.store / f"{name}.caibx")]


class GitLfs(BackupTool):
    """A repository with each step as the next version of one file; what counts as stored is ``.git``."""

    name, install, program = "git-lfs", "apt-get install git-lfs", "git-lfs"

    def environment(self) -> dict[str, str]:
        return {"GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(self.at)}

    def git(self, *arguments: str | Path) -> None:
        who = ["-c", "user.name=bench", "-c", "user.email=bench@example.org"]
        command = [
            "git",
            *who,
            f"--git-dir={self.store}",
            f"--work-tree={self.at / 'tree'}",
            *map(str, arguments),
        ]
        peak_size = run_tool(command, self.at / "tree", self.environment())
        self.tool_peak_size = max(self.tool_peak_size, peak_size)

    def prepare(self) -> None:
        super().prepare()
        (self.at / "tree").mkdir()
        self.git("init", "--quiet")
        self.git("lfs", "install", "--local")
        self.git("lfs", "track", "*.safetensors")

    def save(self, given: Given) -> None:
        self.folder(given)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", given.name)
        self.git("tag", given.name)
        subprocess.run(["sync", "-f", self.store], check=True)

    def restore(self, saves: list[SavedState]) -> Any:
        path = self.at / "tree" / "state.safetensors"
        path.unlink()
        self.git("checkout", "--quiet", "--force", name_of(saves[-1]))
        return in_memory(path)


PEERS: dict[str, type[Peer]] = {
    kind.name: kind
    for kind in (
        Deltackpt,
        InTime,
        TorchSave,
        Safetensors,
        Dcp,
        Orbax,
        Zstd,
        Zipnn,
        Z4ai,
        Restic,
        Borg,
        Casync,
        GitLfs,
    )
}
