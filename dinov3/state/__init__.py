"""Resumable state: a folder per step, written in the background, whole or not there at all.

    step_000000123/rank_00000.safetensors …   shards, as torch.distributed.checkpoint lays them out
    step_000000123/state.json                 facts, sha256 and size of every file; written last

A folder appears by rename, so a kill or a full disk at any moment leaves whole states only. Any
number of ranks reads what any other number wrote; nothing is pickled. All ranks must see the
folder on one file system.
"""

from dinov3.state.folder import latest_state, read_facts, state_path
from dinov3.state.reader import load_state, read_tensors
from dinov3.state.writer import StateWriter

__all__ = [
    "StateWriter",
    "latest_state",
    "load_state",
    "read_facts",
    "read_tensors",
    "state_path",
]
