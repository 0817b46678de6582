"""What tests of resumable state share: comparing, damaging, dying at a chosen moment."""

import multiprocessing
import os
import signal
import sys

import torch

# children are forks of one process that has the slow imports behind it
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["pytest", "dinov3.state", "torch.distributed.fsdp", "torch.optim", "torch._dynamo"]
)


def blank(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


_TOUCHES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}
_OF_A_STATE = ("step_", "rank_", "state.json")


def die_at(number):
    """Kills this process as it is about to touch a state's files for the n-th time."""
    left = number

    def count(event, arguments):
        nonlocal left
        if event in _TOUCHES and any(name in str(arguments[0]) for name in _OF_A_STATE):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
