"""What torch's own tests run with: deltackpt's writer and reader under the names of torch's.

Python imports a module of this name when it starts, so the ranks that a test starts have it too.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.testing._internal import common_distributed

from deltackpt.integrations.torch_dcp import DeltaStorageReader, DeltaStorageWriter


def place(path):
    """The store that stands for a directory; the tests put files of their own beside it."""
    return Path(path) / "deltackpt"


class Writer(DeltaStorageWriter):
    def __init__(self, path, *_, overwrite=True, **__):
        super().__init__(place(path), step=0, overwrite=overwrite)

    def reset(self, checkpoint_id=None):
        if checkpoint_id is not None:
            self.store = str(place(checkpoint_id))
        super().reset()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return "://" not in str(checkpoint_id)


class Reader(DeltaStorageReader):
    def __init__(self, path, *_, **__):
        super().__init__(place(path), step=0)

    def reset(self, checkpoint_id=None):
        if checkpoint_id is not None:
            self.store = str(place(checkpoint_id))
        super().reset()

    validate_checkpoint_id = Writer.validate_checkpoint_id


for module in (dcp, filesystem):
    module.FileSystemWriter, module.FileSystemReader = Writer, Reader
# Without a GPU most run on gloo, if this decorator and `.cuda()` let them.
common_distributed.skip_if_lt_x_gpu = lambda *_, **__: lambda test: test
for moved in (torch.Tensor, torch.nn.Module):
    moved.cuda = lambda self, *_, **__: self
