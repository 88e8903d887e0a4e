"""Says which rank this process is, and makes ranks agree on errors.

    rank, world      of this process; 0 and 1 where it is alone
    barrier, total   waits for all ranks; sums a tensor over them
    together         raises an error of one rank on every rank
    from_first       what rank 0 sees, for every rank

A rank that raises alone ends, and those that wait for it hang, or see a closed connection instead
of the error.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

T = TypeVar("T")


def _grouped() -> bool:
    """Returns whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Returns this process's number in the group, which is all ranks if None."""
    return dist.get_rank(group) if _grouped() else 0


def world(group: dist.ProcessGroup | None = None) -> int:
    """Returns the number of ranks; 1 without a process group."""
    return dist.get_world_size(group) if _grouped() else 1


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Waits until every rank has called it."""
    if world(group) > 1:
        dist.barrier(group)


def total(
    tensor: Shaped[Tensor, "*shape"], group: dist.ProcessGroup | None = None
) -> Shaped[Tensor, "*shape"]:
    """Returns the sum of a tensor over all ranks; the tensor itself stays as it is."""
    if world(group) == 1:
        return tensor
    summed = tensor.clone()
    dist.all_reduce(summed, group=group)
    return summed


def from_first(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Returns on every rank what `work` returns on rank 0, whose error is raised on all.

    So all ranks see one state of a folder that another process changes.
    """
    result: list[Any] = [None]
    with together(group):
        if rank(group) == 0:
            result[0] = work()
    if world(group) > 1:
        dist.broadcast_object_list(result, group=group, group_src=0)
    return result[0]


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Raises an error of the block on every rank, so that none waits for one that has ended.

    Every rank runs the block. Where several fail, all raise the error of the first of them. What
    waits for other ranks within the block may fail on all of them only. An interrupted rank
    interrupts all, whatever others raise; where one exits, the others raise RuntimeError. Ranks
    wait for each other within gloo: a second ctrl-C is seen when the others have answered.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    raise_together(error, group)


def raise_together(error: BaseException | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises the error of one rank on every rank; returns where no rank has one.

    A rank that is interrupted or exits does so whatever others raise, and whether or not they are
    still there: ctrl-C reaches all ranks, and some may have ended.
    """
    if world(group) == 1:
        if error is not None:
            raise error
        return
    if error is not None and not isinstance(error, Exception):
        with suppress(RuntimeError):
            _errors_of_all(error, group)
        raise error
    errors = _errors_of_all(error, group)
    failed = [(number, each) for number, each in enumerate(errors) if each is not None]
    # An interruption comes before errors of ranks before it.
    number, first = min(failed, key=lambda one: isinstance(one[1], Exception), default=(0, None))
    if first is None:
        return
    if error is not None and number == rank(group):
        # It has its traceback, which the copy that was sent lacks.
        error.add_note(f"raised on rank {number}")
        raise error
    first.add_note(f"raised on rank {number}")
    raise first from error


def _errors_of_all(
    error: BaseException | None, group: dist.ProcessGroup | None
) -> Sequence[BaseException | None]:
    """Returns the error of each rank; none where no rank has one."""
    failed = torch.tensor(int(error is not None))
    dist.all_reduce(failed, group=group)
    if not failed:
        return ()
    errors: list[BaseException | None] = [None] * world(group)
    dist.all_gather_object(errors, _to_send(error), group=group)
    return errors


def _to_send(error: BaseException | None) -> BaseException | None:
    """Returns an error that another process can read and raise.

    That is itself, or a ValueError with its text. Only the rank that exits does so.
    """
    if isinstance(error, SystemExit):
        return RuntimeError(f"a rank has exited: SystemExit({error.code!r})")
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(*error.args)
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return ValueError(str(error))
    return error if str(copy) == str(error) else ValueError(str(error))
