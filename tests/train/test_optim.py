"""Tests optim.py against torch's optimizers, closed forms, and a dense Adam with touched rows."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rorqual import kernels
from rorqual.layers.experts import Experts
from rorqual.tables import Table
from rorqual.train.config import OptimConfig
from rorqual.train.optim import (
    Optimizer,
    coalesce,
    orthogonalise,
    roles,
    row_adam,
    schedule,
    sum_rows,
)

pytestmark = pytest.mark.engram


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(6, bias=False)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.experts = Experts(3, 6, 5)
        nn.init.normal_(self.experts.gate_up)
        nn.init.normal_(self.experts.down)


class Double(nn.Module):
    """Has every kind of parameter of a language model."""

    def __init__(self, rows: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block()])
        self.tables = nn.ModuleList([Table(rows, 6)])
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        block = self.blocks[0]
        hidden = block.norm(self.embed(ids) + self.tables[0].prefetch(rows).wait())
        experts = (
            hidden
            @ block.experts.gate_up[0]
            @ block.experts.gate_up[1].mT
            @ block.experts.down[2].mT
        )
        return (
            (self.head(hidden) ** 2).mean()
            + block.proj(hidden).sin().sum()
            + block.mix.cos().sum()
            + experts.mean()
        )


def gradients(model: nn.Module, seed: int) -> None:
    """Sets random gradients: dense ones, and sparse ones with duplicates for the tables."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, Table):
                index = torch.randint(0, len(parameter), (1, 25), generator=generator)
                values = torch.randn(25, parameter.shape[1], generator=generator)
                parameter.grad = torch.sparse_coo_tensor(
                    index, values, parameter.shape, check_invariants=False
                )
            else:
                parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_roles():
    assert roles(Double()) == {
        "embed.weight": "decayed",
        "blocks.0.mix": "plain",
        "blocks.0.proj.weight": "matrix",
        "blocks.0.proj.bias": "plain",
        "blocks.0.norm.weight": "plain",
        "blocks.0.experts.gate_up": "matrix",
        "blocks.0.experts.down": "matrix",
        "tables.0.weight": "rows",
        "head.weight": "decayed",
    }


def test_tables_give_sparse_gradients_to_this_optimizer_and_dense_ones_to_others():
    model = Double()
    table = model.tables[0]
    optimizer = Optimizer(model, OptimConfig())

    def sparse() -> bool:
        table.weight.grad = None
        table.prefetch(torch.tensor([3, 3])).wait().sum().backward()
        return table.weight.grad.is_sparse

    assert not sparse()
    for end in (optimizer.step, optimizer.zero_grad):
        optimizer.begin_step()
        assert sparse()
        end()
        assert not sparse()


def test_a_dense_gradient_of_rows_gives_the_step_of_a_sparse_one():
    results = []
    for dense in (False, True):
        torch.manual_seed(1)
        model = Double()
        optimizer = Optimizer(model, OptimConfig(clip=0.5))
        table = model.tables[0].weight
        for step in range(3):
            gradients(model, step)
            if dense:
                table.grad = table.grad.to_dense()
            optimizer.clip()
            optimizer.step()
        results.append((table.detach().clone(), optimizer.state["tables.0.weight.updates"]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_a_tied_head_is_one_parameter():
    model = Double()
    model.head.weight = model.embed.weight
    result = roles(model)
    assert "head.weight" not in result
    assert result["embed.weight"] == "decayed"


def test_dense_parameters_follow_torch_adamw_and_only_matrices_decay():
    model = Double()
    config = OptimConfig(lr=0.01, weight_decay=0.3, clip=1e9)
    optimizer = Optimizer(model, config)
    names = [name for name, role in roles(model).items() if role != "rows"]
    copies = {name: nn.Parameter(model.get_parameter(name).detach().clone()) for name in names}
    decayed = [copies[name] for name in names if roles(model)[name] != "plain"]
    plain = [copies[name] for name in names if roles(model)[name] == "plain"]
    expected = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}],
        lr=0.005,
        betas=(0.9, 0.95),
    )
    for step in range(4):
        gradients(model, step)
        for name in names:
            copies[name].grad = model.get_parameter(name).grad.clone()
        optimizer.clip()
        optimizer.step(0.5)
        expected.step()
    for name in names:
        torch.testing.assert_close(model.get_parameter(name), copies[name], rtol=1e-5, atol=1e-7)


def choose_kernel(kind: str, monkeypatch) -> None:
    expected = kernels.available()["row_adam"]
    if kind not in ("reference", *expected) or expected.get(kind, True) is not True:
        pytest.skip(f"no {kind} kernel of row_adam here")
    monkeypatch.setenv(kernels.VARIABLE, f"row_adam={kind}")


def dense_rows(table, gradient, state, lr, betas, eps):
    """Computes Adam for each row separately, in float64."""
    for row in gradient.nonzero()[:, 0].unique().tolist():
        state["n"][row] += 1
        n = state["n"][row]
        g = gradient[row]
        state["m"][row] = betas[0] * state["m"][row] + (1 - betas[0]) * g
        state["v"][row] = betas[1] * state["v"][row] + (1 - betas[1]) * g * g
        m = state["m"][row] / (1 - betas[0] ** n)
        v = state["v"][row] / (1 - betas[1] ** n)
        table[row] -= lr * m / (v.sqrt() + eps)


@pytest.mark.parametrize("kind", ["reference", "numba"])
@pytest.mark.parametrize("rows", [40, 1, 1300])
def test_rows_follow_adam_with_each_rows_own_count(rows, kind, monkeypatch):
    choose_kernel(kind, monkeypatch)
    model = Double(rows)
    config = OptimConfig(lr=0.01, clip=1e9, weight_decay=0.5)
    optimizer = Optimizer(model, config)
    table = model.tables[0].weight
    expected = table.detach().double().clone()
    state = {"m": torch.zeros_like(expected), "v": torch.zeros_like(expected), "n": [0] * rows}
    for step in range(6):
        gradients(model, step)
        dense_rows(expected, table.grad.to_dense().double(), state, 0.05, config.betas, config.eps)
        optimizer.clip()
        optimizer.step()
    torch.testing.assert_close(table.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.state["tables.0.weight.updates"].tolist() == state["n"]


def test_untouched_rows_and_their_state_stay_bit_for_bit():
    model = Double(4000)
    optimizer = Optimizer(model, OptimConfig())
    table = model.tables[0].weight
    before = table.detach().clone()
    for step in range(3):
        gradients(model, step)
        optimizer.clip()
        optimizer.step()
    touched = optimizer.state["tables.0.weight.updates"] > 0
    assert 60 < int(touched.sum()) < 76
    assert torch.equal(table[~touched], before[~touched])
    assert (table[touched] != before[touched]).all()
    assert not optimizer.state["tables.0.weight.exp_avg"][~touched].any()


@pytest.mark.parametrize(("touched", "width"), [(0, 4), (1, 1), (777, 5), (5000, 3)])
def test_row_adam_touches_nothing_else(touched, width):
    """Rows that are not touched contain NaN before and after.

    The numbers of an updated row agree to float32 rounding.
    """
    index = torch.randperm(6000)[:touched]
    tensors = [torch.full((6000, width), torch.nan) for _ in range(3)]
    counts = torch.randint(0, 5, (6000,), dtype=torch.int32)
    for tensor in tensors:
        tensor[index] = torch.rand(touched, width)
    copies = [tensor.double() for tensor in tensors]
    before = counts.clone()
    gradient = torch.randn(touched, width)
    count = counts[index].double()[:, None] + 1
    row_adam.reference(*tensors, counts, index, gradient, 0.1, (0.9, 0.95), 1e-8)
    m = 0.9 * copies[1][index] + 0.1 * gradient
    v = 0.95 * copies[2][index] + 0.05 * gradient**2
    moved = 0.1 * (m / (1 - 0.9**count)) / ((v / (1 - 0.95**count)).sqrt() + 1e-8)
    for tensor, expected in zip(tensors, (copies[0][index] - moved, m, v), strict=True):
        torch.testing.assert_close(tensor[index].double(), expected, rtol=1e-5, atol=1e-6)
        assert int(tensor.isnan().any(1).sum()) == 6000 - touched
    before[index] += 1
    assert torch.equal(counts, before)


def test_a_row_seen_late_moves_as_far_as_one_seen_first():
    """Adam's first step is lr * sign(g), whenever it comes.

    A count for the whole table would give a late row a step 3 times smaller.
    """
    table = torch.zeros(2, 3)
    first = torch.zeros(2, 3)
    second = torch.zeros(2, 3)
    counts = torch.zeros(2, dtype=torch.int32)
    arguments = (table, first, second, counts)
    for _ in range(20):
        row_adam(*arguments, torch.tensor([0]), torch.ones(1, 3), 0.1, (0.9, 0.999), 1e-8)
    row_adam(*arguments, torch.tensor([1]), torch.full((1, 3), 1e-3), 0.1, (0.9, 0.999), 1e-8)
    torch.testing.assert_close(table[1], torch.full((3,), -0.1), rtol=1e-4, atol=0)
    assert counts.tolist() == [20, 1]


@given(st.lists(st.integers(0, 5), max_size=30))
@settings(max_examples=40, deadline=None)
def test_coalesce_adds_duplicates(index):
    values = torch.arange(len(index) * 2, dtype=torch.float32).view(-1, 2)
    position = torch.tensor(index, dtype=torch.long)[None]
    gradient = torch.sparse_coo_tensor(position, values, (6, 2), check_invariants=False)
    result = coalesce(gradient)
    assert result.is_coalesced()
    assert result._indices()[0].tolist() == sorted(set(index))
    assert torch.equal(result.to_dense(), gradient.to_dense())


def test_an_empty_gradient_changes_nothing():
    model = Double()
    optimizer = Optimizer(model, OptimConfig())
    before = model.tables[0].weight.detach().clone()
    model.tables[0].prefetch(torch.zeros(0, dtype=torch.long)).wait().sum().backward()
    optimizer.clip()
    optimizer.step()
    assert torch.equal(model.tables[0].weight, before)


def test_the_norm_is_of_everything_at_once_and_the_rows_are_clipped_with_it():
    model = Double()
    optimizer = Optimizer(model, OptimConfig(clip=0.25))
    gradients(model, 0)
    dense = [p.grad.to_dense().clone() for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in dense]).norm()
    torch.testing.assert_close(optimizer.clip(), expected)
    for parameter, gradient in zip(model.parameters(), dense, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), gradient * 0.25 / expected)
    again = [p.grad.to_dense().clone() for p in model.parameters()]
    optimizer.config = OptimConfig(clip=1.0)
    torch.testing.assert_close(optimizer.clip(), torch.tensor(0.25))
    assert all(
        torch.equal(p.grad.to_dense(), g) for p, g in zip(model.parameters(), again, strict=True)
    )


def test_gradients_really_flow_and_accumulate_over_micro_batches():
    model = Double()
    optimizer = Optimizer(model, OptimConfig(lr=0.02))
    ids = torch.tensor([1, 2, 3, 1])
    rows = torch.tensor([7, 7, 0, 39])
    before = float(model(ids, rows).detach())
    for _ in range(20):
        optimizer.zero_grad()
        for chunk in (slice(0, 2), slice(2, 4)):
            (model(ids[chunk], rows[chunk]) / 2).backward()
        optimizer.clip()
        optimizer.step()
    assert float(model(ids, rows).detach()) < before - 1
    updates = optimizer.state["tables.0.weight.updates"]
    assert updates[[7, 0, 39]].tolist() == [20] * 3
    assert int(updates.sum()) == 60


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7), (3, 6, 9), (2, 3, 9, 4)])
def test_orthogonalise(shape):
    matrix = torch.randn(shape)
    turned = orthogonalise(matrix)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    result = torch.linalg.svdvals(turned)
    assert result.max() < 1.3
    assert result.median() > 0.6
    inner = u.mT @ turned @ v.mT  # diagonal, since the singular vectors do not change
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3
    assert values.shape == result.shape


def test_orthogonalise_of_nothing_is_nothing():
    assert not orthogonalise(torch.zeros(3, 4, 5)).any()


def test_muon_follows_torch_muon_on_matrices():
    """The tolerance is that of torch.optim.Muon, which computes in bfloat16.

    It supports two dimensions only.
    """
    model = Double()
    config = OptimConfig(kind="muon", lr=0.01, weight_decay=0.1, clip=1e9)
    optimizer = Optimizer(model, config)
    ours = model.blocks[0].proj.weight
    copy = nn.Parameter(ours.detach().clone())
    start = copy.detach().clone()
    theirs = torch.optim.Muon(
        [copy], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        gradients(model, step)
        copy.grad = ours.grad.clone()
        optimizer.clip()
        optimizer.step()
        theirs.step()
    assert (ours - copy).norm() < 0.02 * (copy - start).norm()


def test_muon_turns_every_expert_and_both_of_its_input_matrices_by_themselves():
    model = Double()
    lr = 0.01
    experts = model.blocks[0].experts
    optimizer = Optimizer(model, OptimConfig(kind="muon", lr=lr, weight_decay=0.0))
    gate_up = experts.gate_up.detach().clone()
    down = experts.down.detach().clone()
    gradients(model, 0)
    g_in = experts.gate_up.grad.clone()
    g_out = experts.down.grad.clone()
    optimizer.step()
    for expert in range(3):
        for half in (slice(0, 5), slice(5, 10)):
            moved = (experts.gate_up[expert, :, half] - gate_up[expert, :, half]) / (
                -lr * 0.2 * math.sqrt(6)
            )
            torch.testing.assert_close(
                moved, orthogonalise(g_in[expert, :, half].clone()), rtol=0, atol=1e-3
            )
        moved = (experts.down[expert] - down[expert]) / (-lr * 0.2 * math.sqrt(6))
        torch.testing.assert_close(moved, orthogonalise(g_out[expert].clone()), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_out_and_in_and_training_goes_on_to_the_bit(kind):
    models = [Double(), Double()]
    models[1].load_state_dict(models[0].state_dict())
    config = OptimConfig(kind=kind)
    straight, stopped = (Optimizer(model, config) for model in models)
    for step in range(3):
        for model, optimizer in zip(models, (straight, stopped), strict=True):
            gradients(model, step)
            optimizer.clip()
            optimizer.step()
    saved = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
    resumed = Optimizer(models[1], config)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        for model, optimizer in zip(models, (straight, resumed), strict=True):
            gradients(model, step)
            optimizer.clip()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_state_of_another_kind_is_refused():
    model = Double()
    with pytest.raises(ValueError, match="other names"):
        Optimizer(model, OptimConfig(kind="muon")).load_state_dict(
            Optimizer(model, OptimConfig()).state_dict()
        )


def test_schedule():
    config = OptimConfig(warmup=10, schedule="cosine", decay_share=0.5)
    item = [schedule(step, 110, config) for step in range(111)]
    assert item[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert item[10:60] == [1.0] * 50
    assert item[85] == pytest.approx(0.5)
    assert item[110] == pytest.approx(0.0)
    assert all(a >= b for a, b in zip(item[10:], item[11:], strict=False))
    linear = OptimConfig(warmup=0, schedule="linear")
    assert [schedule(step, 4, linear) for step in range(5)] == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0]
    )
    constant = OptimConfig(warmup=0, schedule="constant")
    assert schedule(3, 4, constant) == 1.0
    assert schedule(0, 4, OptimConfig(warmup=0, decay_share=0.0)) == 1.0
    wsd = OptimConfig(warmup=10, schedule="wsd")
    item = [schedule(step, 110, wsd) for step in range(111)]
    assert item[:90] == [*((i + 1) / 10 for i in range(10)), *[1.0] * 80]
    assert item[90:] == pytest.approx([(110 - step) / 20 for step in range(90, 111)])
    half = [schedule(step, 110, replace(wsd, decay_share=0.5)) for step in range(111)]
    assert half == [schedule(step, 110, replace(config, schedule="linear")) for step in range(111)]


@given(
    st.integers(1, 300),
    st.integers(0, 300),
    st.floats(0, 1),
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
)
@settings(max_examples=60, deadline=None)
def test_schedule_stays_within_0_and_1(total, warmup, share, kind):
    config = OptimConfig(warmup=warmup, decay_share=share, schedule=kind)
    assert all(0 < schedule(step, total, config) <= 1 + 1e-9 for step in range(total))


@pytest.mark.parametrize(("count", "width"), [(0, 3), (1, 1), (50, 17), (9000, 5)])
def test_sum_rows_names_each_row_once(count, width):
    index = torch.randint(0, max(1, count // 2), (count,)) * 10**9
    values = torch.randn(count, width)
    before = values.clone()
    distinct, sums = sum_rows(index, values)
    assert distinct.tolist() == sorted(set(index.tolist()))
    expected = (
        torch.stack([values[index == row].double().sum(0) for row in distinct])
        if count
        else sums.double()
    )
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    assert sums.shape == (len(distinct), width)
    sums.zero_()
    assert torch.equal(values, before)


def test_the_order_of_duplicates_does_not_matter():
    index = torch.randint(0, 30, (500,))
    values = torch.randn(500, 6)
    results = []
    for order in (torch.arange(500), torch.randperm(500)):
        torch.manual_seed(1)
        model = Double()
        optimizer = Optimizer(model, OptimConfig(clip=0.5))
        table = model.tables[0].weight
        table.grad = torch.sparse_coo_tensor(
            index[order][None], values[order], table.shape, check_invariants=False
        )
        optimizer.clip()
        optimizer.step()
        results.append(table.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_rows_touched_every_step_follow_torch_adam(dtype, atol):
    """The averages are float32 for bfloat16 rows too.

    After 60 steps they are as close as the rows' own rounding.
    """
    table = Table(20, 7, dtype=dtype)
    model = nn.ModuleDict({"table": table})
    config = OptimConfig(lr=0.002, betas=(0.9, 0.999), clip=1e9)
    copy = nn.Parameter(table.weight.detach().float())
    optimizer = Optimizer(model, config)
    dense = torch.optim.Adam([copy], lr=0.01, betas=(0.9, 0.999))
    for _ in range(60):
        gradient = (torch.randn(20, 7) + 1.0).to(dtype)
        table.weight.grad = torch.sparse_coo_tensor(
            torch.arange(20)[None], gradient, table.weight.shape, check_invariants=False
        )
        copy.grad = gradient.float()
        optimizer.clip()
        optimizer.step()
        dense.step()
    torch.testing.assert_close(table.weight.detach().float(), copy.detach(), rtol=0, atol=atol)
    assert optimizer.state["table.weight.exp_avg_sq"].dtype == torch.float32
