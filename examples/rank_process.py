"""Begin and end a process that torchrun has started, as the examples of docs/pytorch.md and docs/huggingface.md do.

torch's DTensors keep threads of a gloo group after destroy_process_group, also torch's own parallel styles alone, and
one that outlives the interpreter may abort the process: "terminate called without an active exception".
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def start() -> torch.device:
    """Join the process group, over NCCL with a GPU of this rank's own or over gloo; return the device to use."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    return device


def end(status: int = 0) -> None:
    """Destroy the process group and leave with this exit status, without waiting for threads."""
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
