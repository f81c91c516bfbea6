"""A CUDA graph for the CPU: the operators of a step, recorded once and run again on its tensors.

As on a GPU, Python does not run again, sizes and addresses are those of the recording, and what the
step read from outside must still be there. Beyond that, memory of the graph's own is made NaN (-1
in integers) before each replay, so that nobody can live on what an earlier one left.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

POISON = 0xFF


class Outside:
    """A tensor that a recording reads or writes, and that somebody else must keep."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.address = weakref.ref(tensor), tensor.data_ptr()

    def get(self) -> torch.Tensor:
        """Return the tensor; AssertionError if a GPU would now read freed or moved memory."""
        tensor = self.tensor()
        assert tensor is not None, "the recording reads a tensor that is gone"
        assert tensor.data_ptr() == self.address, "the recording reads a tensor that has moved"
        return tensor


class Recording(TorchDispatchMode):
    """Records what runs in its ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.made: dict[int, torch.UntypedStorage] = {}
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = tree_map_only(torch.Tensor, self._kept, (args, kwargs or {}))
        read = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for output in tree_leaves(result):
            if isinstance(output, torch.Tensor) and storage_of(output) not in read:
                self.made[storage_of(output)] = output.untyped_storage()
        self.calls.append((func, given, result))
        return result

    def _kept(self, tensor: torch.Tensor):
        own = storage_of(tensor) in self.made or tensor.numel() == 0
        return tensor if own else Outside(tensor)

    def replay(self) -> None:
        """Run all of it again."""
        self.replays += 1
        for storage in self.made.values():
            storage.fill_(POISON)
        for func, given, before in self.calls:
            aliases = [r.alias_info for r in func._schema.returns]
            is_view = any(a is not None and not a.is_write for a in aliases)
            if is_view or "empty" in func._schema.name:
                continue
            args, kwargs = tree_map_only(Outside, Outside.get, given)
            after = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def storage_of(tensor: torch.Tensor) -> int:
    """Return the address of the memory that a tensor is a part of."""
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """Stands in for ``ssm.utils.decoding_graph.record_cuda``; ``recordings`` are those made."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def __call__(self, step, device):
        """Run the step once to warm up, and once more to record it."""
        assert not torch.is_autocast_cache_enabled(), "the copy of a weight would not last"
        step()
        recording = Recording()
        with recording:
            result = step()
        self.recordings.append(recording)
        return recording.replay, result

    @property
    def replays(self) -> list[int]:
        """Return how often each recording was replayed."""
        return [recording.replays for recording in self.recordings]
