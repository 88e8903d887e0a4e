"""Holds every kernel against its reference: odd sizes, poisoned memory, gradients, both dtypes.

A kernel is tested as soon as it is registered, with the arguments that CASES has for its reference;
one without a case fails. Numba's kernels run on the CPU, Triton's on a GPU or interpreted.
"""

import importlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rorqual import kernels
from rorqual.layers.addresses import EngramConfig, draw_multipliers, head_primes
from rorqual.model_config import NSAConfig
from rorqual.tables.fp8 import quantise

Arguments = Iterator[tuple[Any, ...]]


class Case(NamedTuple):
    """The arguments with which kernels are called, and how far their numbers may be off.

    `numba` and `triton` for results and gradients in float32, and `bfloat16`, are relative to the
    largest number of each; 0 means bit for bit.
    """

    arguments: Callable[[torch.dtype], Arguments]
    numba: float = 0.0
    triton: float = 0.0
    bfloat16: float = 0.0
    # Calls that are divided among threads, or too many for Triton's interpreter.
    large: Callable[[], Arguments] | None = None


def inside(x: Tensor) -> Tensor:
    """Returns `x` as a view of a longer buffer, as a cache's is, whose other columns are NaN."""
    buffer = torch.full((len(x), x.shape[1] + 3, *x.shape[2:]), torch.nan, dtype=x.dtype)
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


def hashing(config: EngramConfig, vocab_size: int, top: int) -> tuple[Tensor, ...]:
    """Returns the map, multipliers, primes and offsets of ids whose largest canonical id is top."""
    canonical = torch.arange(vocab_size, dtype=torch.int32)
    canonical[-1] = top
    primes = np.array(head_primes(config))
    flat = primes.reshape(len(primes), -1)
    exact = draw_multipliers(config, top + 1), primes, flat.cumsum(1) - flat
    return canonical, *(torch.from_numpy(x) for x in exact)


def windows(dtype: torch.dtype) -> Arguments:
    """Primes are small and large, heads fill no tile, and ids are the largest possible."""
    for layers, sizes, heads, batch, time, vocab_size in (
        ((0,), (2,), 1, 1, 1, 2),
        ((1, 14), (646_400, 97, 16_000_000), 5, 7, 10, 98_627),
        ((3,), (16_000_000, 2**31 - 1), 3, 1, 67, 90),
        ((1, 5), (9001, 77, 70_001), 5, 3, 7, 50),
        ((0, 2), (31, 67), 2, 3, 0, 9),
    ):
        config = EngramConfig(layers=layers, rows_per_head=sizes, heads=heads)
        top = 2**31 - 2
        exact = hashing(config, vocab_size, top)
        ids = torch.randint(vocab_size, (batch, time + len(sizes)))
        ids[..., -1] = vocab_size - 1
        reach = torch.randint(len(sizes) + 1, (batch, time))
        out = torch.full((len(layers), batch, time, len(sizes) * heads), -1)
        yield ids, None, *exact, top
        yield ids.int(), reach, *exact, top
        yield ids.repeat_interleave(2, 1)[:, ::2], None, *exact, top, out


def long_windows() -> Arguments:
    config = EngramConfig(layers=(1, 5), rows_per_head=(9001, 77, 70_001), heads=5)
    yield torch.randint(50, (7, 304)), None, *hashing(config, 50, 49), 3


def histories(dtype: torch.dtype) -> Arguments:
    config = EngramConfig(layers=(1, 5), rows_per_head=(9001, 77), heads=5)
    exact = hashing(config, 50, 49)
    for batch, time in (1, 1), (3, 5), (64, 1), (65, 1), (2, 70), (1, 0), (0, 1):
        ids = torch.randint(50, (batch, time))
        stored = torch.randint(50, (batch, 90))
        yield ids, stored, 4, *exact, 7
        yield ids, None, 0, *exact, 7


def long_histories() -> Arguments:
    config = EngramConfig(layers=(1, 5), rows_per_head=(9001, 77), heads=5)
    yield torch.randint(50, (7, 600)), torch.randint(50, (7, 700)), 4, *hashing(config, 50, 49), 7


def gates(dtype: torch.dtype) -> Arguments:
    """Scores are far from 0, where a rounded one has another slope."""
    for shape, conv, masked, sign in (
        ((1, 1, 1, 1), True, False, "sign"),
        # Two slices of tokens, in one of which a sequence ends.
        ((2, 7, 4, 3), True, True, "copysign"),
        ((1, 7, 1, 130), True, False, "sign"),
        ((1, 5, 3, 80), False, True, "sign"),
        ((0, 3, 2, 5), True, True, "sign"),
        ((2, 0, 2, 5), True, True, "sign"),
    ):
        hidden = torch.randn(shape)
        key = hidden * (0.5 + torch.rand(shape)) * torch.randn(shape[:3]).sign()[..., None]
        value = torch.randn(*shape[:2], shape[3])
        query_norm, key_norm, conv_norm = (1 + 0.2 * torch.randn(3, *shape[2:])).to(dtype)
        lookup_mask = torch.rand(shape[:2]) < 0.7 if masked else None
        floats = [x.to(dtype) for x in (hidden, key, value)]
        norms = query_norm, key_norm, conv_norm if conv else None
        yield *floats, *norms, lookup_mask, sign, 1.1920929e-7, 1e-5


STREAMS = (37, 4, 70), (1, 1, 1), (5, 3, 129), (0, 2, 8), (17, 5, 33)  # tokens, streams, width


def collapsing(dtype: torch.dtype) -> Arguments:
    for case, (tokens, count, dim) in enumerate(STREAMS):
        rows = 2 * count + count**2
        streams = torch.randn(tokens, count, dim).to(dtype)
        m = 2 * torch.randn(rows, tokens)
        scale = torch.rand(3) + 0.5
        base = torch.randn(rows)
        handed_on = torch.rand(count, tokens)
        yield streams, m, scale, base, handed_on, 20 if case == 0 else 3, 1e-6
        yield streams, m, scale, base, None, 1, 0.0


def mixing(dtype: torch.dtype) -> Arguments:
    for tokens, count, _ in STREAMS:
        yield 2 * torch.randn(count, count, tokens).to(dtype), 20, 1e-6
        yield 9 * torch.randn(count, count, tokens).to(dtype), 1, 0.0


def writing(dtype: torch.dtype) -> Arguments:
    for tokens, count, dim in STREAMS:
        streams = torch.randn(tokens, count, dim).to(dtype)
        out = torch.randn(tokens, dim).to(dtype)
        post = torch.rand(count, tokens)
        yield streams, out, post, torch.rand(count, count, tokens)
        yield streams, out, post, None


def records(dtype: torch.dtype) -> Arguments:
    for width, shape in (32, ()), (96, (0,)), (96, (1,)), (64, (3, 5, 7)):
        values = torch.randn(11, width) * 2.0 ** torch.randint(-40, 40, (11, 1))
        yield quantise(values), torch.randint(11, shape), width


def last_tokens(batch: int, time: int, length: int) -> Tensor:
    """Returns the positions of the last tokens of sequences of up to `length`, one of which is."""
    lengths = torch.randint(time, length + 1, (batch,))
    lengths[:1] = length
    return lengths[:, None] - time + torch.arange(time)


def some_blocks(positions: Tensor, choices: int, blocks: int, top_k: int, size: int) -> Tensor:
    """Returns distinct blocks up to each query's own, fewer for some and none for the first."""
    index = torch.rand(*positions.shape, choices, blocks).argsort(-1)[..., :top_k]
    seen = index * size <= positions[..., None, None]
    index = index.where((torch.rand(index.shape) < 0.85) & seen, -1)
    index[:1, :1] = -1
    return index


def selections(
    dtype: torch.dtype, batch, time, heads, groups, choices, width, depth, length, top_k, size
) -> tuple[Any, ...]:
    query = torch.randn(batch, time, heads, width).to(dtype)
    key = inside(torch.randn(batch, length, groups, width).to(dtype))
    value = inside(torch.randn(batch, length, groups, depth).to(dtype))
    positions = last_tokens(batch, time, length)
    index = some_blocks(positions, choices, -(-length // size), top_k, size)
    return query, key, value, index, positions, size, width**-0.5


def selecting(dtype: torch.dtype) -> Arguments:
    for shape in (
        # batch, queries, heads, groups, selections, width, depth, keys, blocks, keys a block
        (2, 9, 4, 2, 2, 5, 3, 9, 2, 4),
        (1, 7, 6, 2, 6, 8, 8, 23, 3, 5),
        (1, 3, 3, 1, 1, 17, 20, 70, 2, 33),
        (1, 2, 2, 2, 2, 16, 16, 200, 2, 130),
        (1, 33, 20, 1, 1, 6, 7, 33, 9, 8),
        (1, 0, 4, 2, 2, 8, 8, 11, 2, 4),
        (0, 2, 4, 2, 2, 8, 8, 11, 2, 4),
    ):
        yield selections(dtype, *shape)
    # The last axis of the keys is not contiguous, and the query has another dtype.
    query, _, _, *rest = selections(dtype, 1, 6, 4, 2, 2, 8, 8, 11, 3, 4)
    strided = torch.randn(1, 2, 8, 11).permute(0, 3, 1, 2)
    yield query, strided.to(dtype), strided.to(dtype), *rest
    yield query.bfloat16(), strided, strided, *rest


def many_selections() -> Arguments:
    for shape in (
        (2, 30, 4, 2, 2, 64, 64, 400, 12, 32),
        (1, 1, 16, 4, 4, 8, 8, 100, 5, 16),
        (3, 2, 3, 3, 3, 33, 17, 5, 2, 3),
        (2, 7, 1, 1, 1, 1, 1, 9, 1, 64),
    ):
        yield selections(torch.float32, *shape)
    draw = np.random.default_rng(0).integers
    for _ in range(40):
        heads = [(1, 1, 1), (4, 2, 2), (6, 2, 6), (5, 1, 5), (9, 3, 3)][draw(5)]
        width, depth, length, time = (int(draw(1, top)) for top in (20, 20, 70, 5))
        sizes = int(draw(1, 7)), int(draw(1, 18))
        shape = int(draw(1, 4)), time, *heads, width, depth, length + time, *sizes
        yield selections(torch.float32, *shape)


def branches(config: NSAConfig, batch, time, heads, groups, widths, length, top_k=None):
    """Builds the last tokens of sequences of up to `length` for NSA's three branches."""
    positions = last_tokens(batch, time, length)
    blocks = max(0, (length - config.block) // config.stride + 1)
    counts = length, blocks, length
    pairs = [inside(torch.randn(batch, n, groups, width)) for n in counts for width in widths]
    index = None
    if top_k is not None:
        count = -(-length // config.select_block)
        index = some_blocks(positions, groups, count, top_k, config.select_block)
    query = torch.randn(batch, time, heads, widths[0])
    return query, *pairs, index, positions, config, 0.4


def few_tokens(dtype: torch.dtype) -> Arguments:
    for config in (
        NSAConfig(block=4, stride=2, select_block=4, top_k=3, window=5),
        NSAConfig(block=6, stride=3, select_block=3, top_k=4, window=2),
        NSAConfig(block=4, stride=4, select_block=4, top_k=3, window=1),
        NSAConfig(block=2, stride=2, select_block=8, top_k=3, window=7),
        NSAConfig(block=8, stride=1, select_block=2, top_k=5, window=3),
    ):
        for top_k in None, 4:
            yield branches(config, 3, 1, 6, 2, (6, 5), 40, top_k)
            yield branches(config, 3, 3, 5, 1, (7, 7), 29, top_k)
            yield branches(config, 2, 2, 4, 4, (16, 33), 15, top_k)
            yield branches(config, 1, 1, 16, 2, (3, 1), 200, top_k)
    for batch in 0, 1:
        yield branches(NSAConfig(), batch, 2, 4, 2, (6, 5), 300)


def more_tokens() -> Arguments:
    yield branches(NSAConfig(), 2, 3, 16, 4, (64, 64), 900)


def indexed(batch, time, heads, width, length, ours, narrow, limit, ties=False) -> tuple[Any, ...]:
    """Builds the last `time` of `length` tokens; with `ties`, keys of equal scores."""
    latent = torch.randn(batch, length, width)
    key = torch.randn(batch, length, narrow)
    looking = torch.randn(batch, time, ours, narrow).round()
    weights = torch.randn(batch, time, ours).round()
    query = torch.randn(batch, time, heads, width)
    key = key.round() if ties else key
    return query, inside(latent), looking, inside(key), weights, limit, 0.4


def best_latents(dtype: torch.dtype) -> Arguments:
    for shape in (
        # batch, tokens, heads, width, keys, indexer heads, indexer width, selected keys
        (1, 1, 16, 40, 500, 4, 8, 64),
        (2, 3, 3, 7, 50, 3, 5, 11),
        (1, 2, 1, 1, 20, 1, 1, 18),
        (3, 4, 5, 33, 9, 2, 3, 1),
    ):
        for ties in False, True:
            arguments = indexed(*shape, ties=ties)
            yield arguments
            yield *arguments, last_tokens(shape[0], shape[1], shape[4]) + 1


def more_latents() -> Arguments:
    yield indexed(3, 2, 4, 20, 90, 4, 8, 30)


def adam(rows: int, touched: int, width: int, betas: tuple[float, float]) -> tuple[Any, ...]:
    """Builds a table whose other rows are NaN; some rows were updated a thousand times."""
    index = torch.randperm(rows)[:touched]
    tensors = [torch.full((rows, width), torch.nan) for _ in range(3)]
    for tensor in tensors:
        tensor[index] = torch.rand(touched, width)
    counts = torch.tensor([0, 1, 4, 1021, 1022, 1023, 5000], dtype=torch.int32)
    updates = counts[torch.randint(len(counts), (rows,))]
    return *tensors, updates, index, torch.randn(width, touched).T, 0.1, betas, 1e-8


def rows_of_adam(dtype: torch.dtype) -> Arguments:
    for touched, width in (0, 4), (1, 1), (77, 5), (600, 17):
        yield adam(600, touched, width, (0.9, 0.95))
        yield adam(600, touched, width, (0.9, 0.9999))


def many_rows_of_adam() -> Arguments:
    yield adam(12_000, 9000, 3, (0.9, 0.95))


def files(dtype: torch.dtype) -> Arguments:
    """Rows of two files, of which the second was cut in the middle of a row."""
    for size in 1, 7, 70:
        with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:
            first.write(np.arange(11 * size + 3, dtype=np.uint8).tobytes())
            second.write(np.arange(5 * size - 1, dtype=np.uint8).tobytes())
            first.flush()
            second.flush()
            numbers = np.array([first.fileno(), second.fileno()])
            for ids in [], [4], [15, 0, 1, 2, 2, 10, 11, 12, 3], [9, 10, 11, 12, 13, 14, 15, 8]:
                for wait in True, False:
                    into = np.full((len(ids), size), 0xA5, np.uint8)
                    rows = np.array(ids, np.int64)
                    yield numbers, np.array([3, 0]), np.array([0, 11, 16]), rows, into, wait


CASES = {
    "hash_rows": Case(windows, large=long_windows),
    "follow_rows": Case(histories, large=long_histories),
    "lookup": Case(records),
    "read_rows": Case(files),
    "fuse": Case(gates, triton=2e-5, bfloat16=3e-2),
    "sinkhorn": Case(mixing, 1e-6),
    "pre_mapping": Case(collapsing, 2e-6, triton=3e-6, bfloat16=2**-6),
    "post_mapping": Case(writing, 1e-6, triton=3e-6, bfloat16=2**-6),
    "selected_attention": Case(selecting, 6e-7, 3e-6, 2**-5, many_selections),
    "attend_small_batch": Case(few_tokens, 1.5e-6, large=more_tokens),
    "attend_best": Case(best_latents, 1e-6, large=more_latents),
    "row_adam": Case(rows_of_adam, 3e-7, large=many_rows_of_adam),
}
# Kernels of what no function is the reference of, and the tests that hold them.
ELSEWHERE = {"decode_step": "tests/serve/test_step.py"}

EVERY = [
    (name, kernel)
    for name, choice in kernels.registered().items()
    if name not in ELSEWHERE
    for kernel in choice.kernels
]


def every(kind: str) -> pytest.MarkDecorator:
    names = [name for name, kernel in EVERY if kernel.kind == kind]
    return pytest.mark.parametrize("name", names)


def test_every_kernel_has_a_case() -> None:
    assert {name for name, _ in EVERY} == CASES.keys()
    for name in ELSEWHERE:
        assert kernels.registered()[name].reference is None


@every("numba")
def test_a_compiled_kernel_gives_the_numbers_of_its_reference(
    name: str, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    threads = torch.get_num_threads()
    check_equal(name, "numba", case.arguments, torch.device("cpu"), monkeypatch)
    large = case.large
    if large is None:
        return
    try:
        torch.set_num_threads(3)
        check_equal(name, "numba", lambda dtype: large(), torch.device("cpu"), monkeypatch)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.interpreted
@every("triton")
def test_a_triton_kernel_gives_the_numbers_of_its_reference(
    name: str, tiled: torch.device, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal(name, "triton", CASES[name].arguments, tiled, monkeypatch)


def test_a_kernel_has_the_signature_of_its_reference() -> None:
    for name, kernel in EVERY:
        reference = kernels.registered()[name].reference
        assert reference is not None
        if kernel.missing:
            continue
        theirs, ours = (inspect.signature(f) for f in (reference, kernel.function))
        assert str(ours.return_annotation) == str(theirs.return_annotation), name
        assert list(ours.parameters) == list(theirs.parameters), name
        pairs = zip(ours.parameters.values(), theirs.parameters.values(), strict=True)
        for one, other in pairs:
            assert (one.default, one.kind) == (other.default, other.kind), f"{name}: {one}"


def check_equal(
    name: str,
    kind: str,
    arguments: Callable[[torch.dtype], Arguments],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compares a kernel with its reference, called by its name with the kernel selected."""
    choice = kernels.registered()[name]
    case = CASES[name]
    operation = getattr(importlib.import_module(choice.module), name)
    (kernel,) = (kernel for kernel in choice.kernels if kernel.kind == kind)
    if kernel.missing:
        pytest.skip(kernel.missing)
    monkeypatch.setenv(kernels.VARIABLE, f"{name}={kind}")
    stored = 0
    for dtype in torch.float32, torch.bfloat16:
        for inputs in arguments(dtype):
            args = [x.to(device) if isinstance(x, Tensor) else x for x in inputs]
            tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
            # What has no floats is the same for both.
            another = dtype == torch.float32 or dtype in [args[i].dtype for i in tensors]
            if not another or kernel.refuses(args, tensors, (), True):
                continue
            # Numba compiles before numpy's memory is poisoned.
            if kind == "numba":
                operation(*map(copied, args))
            with monkeypatch.context() as patch:
                patch.setattr(np, "empty", poisoned_empty)
                ours = outcome(operation, args, kernel)
            plain = outcome(choice.reference, args, kernel)
            exact = plain
            if dtype == torch.bfloat16:
                exact = outcome(choice.reference, list(map(widened, args)), kernel)
            for one, same, expected in zip(ours, plain, exact, strict=True):
                assert (one is None) == (same is None), name
                if one is not None:
                    assert (one.dtype, one.shape) == (same.dtype, same.shape), name
                    rounded = one.dtype == torch.bfloat16
                    close(one, expected, getattr(case, "bfloat16" if rounded else kind))
            stored += dtype == torch.float32
    assert stored, f"{name}: the {kind} kernel takes none of the arguments of its case"


def outcome(function: Callable, args: list[Any], kernel: kernels.Kernel) -> list[Tensor | None]:
    """Calls on copies; returns results, gradients, and what is then in the arguments' memory.

    Gradients are those of the weighted sum of the results, where the kernel has them.
    """
    args = list(map(copied, args))
    floats = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    alone = torch.ones(1, device=floats[0].device, requires_grad=True) if floats else None
    differentiable = alone is not None and not kernel.refuses([alone], [0], (), True)
    for x in floats:
        x.requires_grad_(differentiable)
    result = function(*args)
    results = list(result) if isinstance(result, tuple) else [result]
    results = [torch.tensor(x) if isinstance(x, int) else x for x in results]
    made = [x for x in results if x is not None]
    if differentiable and made:
        weights = torch.Generator().manual_seed(1)
        # Weights that bfloat16 can hold: the backward of a result in bfloat16 rounds them.
        pulls = [torch.randn(x.shape, generator=weights).bfloat16().to(x.device) for x in made]
        total = sum((x.float() * pull.float()).sum() for x, pull in zip(made, pulls, strict=True))
        results += torch.autograd.grad(total, floats)
    memory = [whole(x.detach()) for x in args if isinstance(x, Tensor)]
    memory += [torch.from_numpy(x) for x in args if isinstance(x, np.ndarray)]
    return [x if x is None else x.detach() for x in results] + memory


def copied(x: Any) -> Any:
    """Copies an array, or a tensor with all of the memory that it is a view of."""
    if not isinstance(x, Tensor):
        return x.copy() if isinstance(x, np.ndarray) else x
    storage = x.untyped_storage().clone()
    same = torch.empty(0, dtype=x.dtype, device=x.device)
    return same.set_(storage, x.storage_offset(), x.shape, x.stride())


def whole(x: Tensor) -> Tensor:
    """Returns the memory that a tensor is a view of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def widened(x: Any) -> Any:
    """Converts bfloat16 to float32, with all of the memory that the tensor is a view of."""
    if not isinstance(x, Tensor) or x.dtype != torch.bfloat16:
        return x
    return whole(x).float().as_strided(x.shape, x.stride(), x.storage_offset())


EMPTY = np.empty


def poisoned_empty(*arguments: Any, **named: Any) -> np.ndarray:
    """np.empty, filled with NaN or -1."""
    array = EMPTY(*arguments, **named)
    array.fill(np.nan if array.dtype.kind == "f" else -1)
    return array


def close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compares within `tolerance` of the largest number; bit for bit if it is 0."""
    if not tolerance or not expected.is_floating_point():
        torch.testing.assert_close(ours, expected, atol=0, rtol=0, equal_nan=True)
        return
    largest = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        ours.float(), expected.float(), atol=tolerance * max(1e-3, largest), rtol=0, equal_nan=True
    )
