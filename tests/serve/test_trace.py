"""Tests that a trace records what a forward pass used, and leaves nothing behind."""

import torch

from rorqual import memory
from rorqual.serve.trace import experts_of, traced


@torch.inference_mode()
def test_rows_gates_and_experts_are_those_of_the_forward_pass(run):
    ids = torch.tensor([run.prompt("A whale lives"), run.prompt("A whale lives")])
    with traced(run.model, memory=True) as trace:
        auxes = run.model.hidden(ids)[1]
    reads = memory.reads(run.model, run.tokenizer, "A whale lives")
    read = trace.memory(1, ids.shape[1])
    assert [token[1].rows for token in read] == [one.rows[1] for one in reads]
    torch.testing.assert_close(
        torch.tensor([token[1].gates for token in read]),
        torch.tensor([one.gates[1] for one in reads]),
    )
    experts = experts_of(auxes, 0, 2)
    assert [sorted(token) for token in experts] == [[1, 2], [1, 2]]
    assert experts[1][2] == auxes[2].routing.topk_indices[0, 1].tolist()


@torch.inference_mode()
def test_nothing_is_recorded_where_nothing_is_asked(run):
    ids = torch.tensor([run.prompt("A whale")])
    with traced(run.model, memory=False) as trace:
        run.model.hidden(ids)
    assert trace.memory(0, 2) == [{}, {}]
    with traced(run.model, memory=True):
        pass
    assert not any(module._forward_hooks for module in run.model.modules())
