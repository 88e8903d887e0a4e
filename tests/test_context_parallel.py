"""Tests context_parallel.py with a group of one rank; test_distributed.py has those of four."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from rorqual.context_parallel import split_sequences
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.model_config import GQAConfig, MLAConfig

CONFIG = ModelConfig(
    vocab_size=50,
    dim=16,
    layers=2,
    dense_width=24,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoEConfig(routed=4, active=2, width=8, first_dense=1, balance=BalanceConfig(sequence=0.01)),
    engram=EngramConfig(layers=(1,), rows_per_head=(61, 61), heads=2, head_dim=4),
    mtp=MTPConfig(depth=2),
    init_std=0.1,
)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_one_rank_computes_the_same_as_without_a_group(group, attention) -> None:
    config = CONFIG
    if attention == "gqa":
        config = replace(CONFIG, mla=None, gqa=GQAConfig(heads=2, kv_heads=1, head_dim=8))
    ids = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    results = []
    for split in (False, True):
        model = LanguageModel(config, seed=1)
        torch.nn.init.normal_(model.blocks[1].engram.conv, generator=torch.Generator())
        if split:
            split_sequences(model, group)
        loss = model.loss(ids[:, :-1], ids[:, 1:], document_ids=documents)
        loss.total.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (expected, gradients), (loss, ours) = results
    torch.testing.assert_close(loss.total, expected.total)
    torch.testing.assert_close(loss.mtp, expected.mtp)
    assert torch.equal(loss.counts, expected.counts)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_sequences_that_cannot_be_split_are_refused(group) -> None:
    model = LanguageModel(CONFIG)
    split_sequences(model, group)
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"got sequences of 5 tokens for 1 ranks, .*at least 9"):
        model.loss(ids, ids)
    ids = torch.zeros(1, 12, dtype=torch.long)
    with pytest.raises(ValueError, match="got padded sequences"):
        model.loss(ids, ids, lengths=torch.tensor([4]))
