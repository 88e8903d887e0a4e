"""Tests Engram on models of transformers: identity at first, training, decoding, files, removal."""

import copy
import functools
import gc
import json
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV32Config,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parent))
import random_qwen4_exp  # noqa: F401 (it chooses the functions that run on a CPU)

from rorqual.data.tokenizer import train
from rorqual.hub.attach import Everything, attach, find_blocks, load_memory
from rorqual.layers.context import Context, Span
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer

pytestmark = pytest.mark.engram

TEXT = [
    "Alexander the Great and the great white whale.",
    "the sea, the SEA; a whale is not a fish é è",
] * 3
SMALL = {"rows_per_head": (97, 97), "heads": 2, "head_dim": 4}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXT, 300)


def config_of(kind: str):
    names = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "llama":
        return LlamaConfig(**SIZES, **names)
    if kind in ("deepseek_v4", "qwen4_exp_text"):
        return config_of_streams(kind)
    if kind == "qwen3":
        return Qwen3Config(**SIZES, **names, head_dim=8)
    if kind == "gpt2":
        return GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **names)
    latent = {
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = SIZES | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    if kind == "deepseek_v32":
        # So many index heads that no key scores 0, between which topk would choose.
        indexer = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 5, "q_lora_rank": 12}
        return DeepseekV32Config(**sizes, **names, **latent | indexer, **experts)
    return DeepseekV3Config(**sizes, **names, **latent, **experts)


def config_of_streams(kind: str):
    """Returns a config of a model with several residual streams."""
    names = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    fields = {
        "deepseek_v4": {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "q_lora_rank": 8,
            "o_groups": 2,
            "o_lora_rank": 8,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": [
                "sliding_attention",
                "compressed_sparse_attention",
                "heavily_compressed_attention",
            ],
            "compress_rates": {
                "compressed_sparse_attention": 2,
                "heavily_compressed_attention": 3,
            },
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "index_n_heads": 16,
            "index_head_dim": 8,
            "index_topk": 3,
            "hc_mult": 2,
        },
        "qwen4_exp_text": {
            "head_dim": 8,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "hc_count": 3,
            "hc_lowrank": 4,
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 6,
            "indexer_compress_ratio": 2,
        },
    }
    return AutoConfig.for_model(kind, **SIZES | names | fields[kind])


@pytest.fixture(
    params=[
        "llama",
        "gpt2",
        "qwen3",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        pytest.param("qwen4_exp_text", marks=pytest.mark.slow),
    ]
)
def host(request):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of(request.param)).eval()


# What transformers does not do with these models. DeepSeek-V4 compresses padding like tokens.
CANNOT = {
    "deepseek_v4": {"crop", "padding", "cache_implementation", "prompt_lookup_num_tokens"},
    "qwen4_exp_text": {"crop", "prompt_lookup_num_tokens"},
}


def can(host, how) -> bool:
    return CANNOT.get(host.config.model_type, set()).isdisjoint(how)


@pytest.fixture
def llama():
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of("llama")).eval()


def wake(memory) -> None:
    """Sets values and convolution as after training, so that nothing is an identity any more."""
    for engram in memory.engrams:
        torch.nn.init.normal_(engram.value_proj.weight, std=0.5)
        torch.nn.init.normal_(engram.conv, std=0.5)
    for table in memory.tables:
        torch.nn.init.normal_(table.weight, std=1.0)


def prompt(rows: int = 2, time: int = 9) -> torch.Tensor:
    return torch.randint(1, 300, (rows, time), generator=torch.Generator().manual_seed(5))


def test_identity_at_first_then_detached_bit_for_bit(host, tokenizer):
    next(host.parameters()).requires_grad_(False)  # as before the memory was attached
    ids = prompt()
    weights = copy.deepcopy(host.state_dict())
    trained = {name: p.requires_grad for name, p in host.named_parameters()}
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in host.modules()]
    before = host(ids).logits
    memory = attach(host, tokenizer, (0, 2), **SMALL)
    assert torch.equal(host(ids).logits, before)
    assert torch.equal(
        host(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits, before
    )
    wake(memory)
    assert not torch.allclose(host(ids).logits, before, atol=1e-3)
    assert memory.detach() is host
    assert torch.equal(host(ids).logits, before)
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in host.modules()] == hooks
    assert {name: p.requires_grad for name, p in host.named_parameters()} == trained
    assert host.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in host.state_dict().items())


def test_only_memory_learns(llama, tokenizer):
    memory = attach(llama, tokenizer, (1,), **SMALL)
    ours = {id(p) for p in memory.parameters()}
    assert ours == {id(p) for p in llama.parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in llama.named_parameters() if id(p) not in ours}
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad], lr=3e-2)
    ids = prompt(4, 12)
    losses = []
    llama.train()
    for _ in range(30):
        loss = llama(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(
        torch.equal(before[name], p) for name, p in llama.named_parameters() if name in before
    )


def test_gradients_are_the_same_with_and_without_a_cache(llama, tokenizer):
    memory = attach(llama, tokenizer, (1,), **SMALL)
    ids = prompt()
    wake(memory)
    grads = []
    for cached in (True, False):
        memory.zero_grad()
        llama(ids, labels=ids, use_cache=cached).loss.backward()
        grads.append([p.grad.clone() for p in memory.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_chunks_say_what_one_call_says(host, tokenizer):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    ids = prompt(2, 13)
    cache = DynamicCache(config=host.config)
    parts = []
    for chunk in ids.split([5, 1, 1, 4, 2], dim=1):
        parts.append(host(chunk, past_key_values=cache).logits)
    torch.testing.assert_close(
        torch.cat(parts, 1), host(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_crop_repeat_select_and_copy_take_the_memory_along(host, tokenizer):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    ids = prompt(2, 11)
    rest = prompt(4, 3)
    cache = host(ids, use_cache=True).past_key_values
    cached = copy.deepcopy(cache)
    length = 11
    rows = [1, 0]
    if can(host, ["crop"]):
        cache.crop(-4)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
        cache.batch_select_indices(torch.tensor([0, 1, 3, 2]))
        length = 7
        rows = [1, 0, 0, 0]
    else:
        cache.reorder_cache(torch.tensor(rows))
    got = host(rest[: len(rows)], past_key_values=cache).logits
    whole = torch.cat([ids[rows, :length], rest[: len(rows)]], 1)
    torch.testing.assert_close(
        got, host(whole, use_cache=False).logits[:, length:], atol=1e-5, rtol=1e-4
    )
    again = host(rest[:2], past_key_values=cached).logits
    whole = torch.cat([ids, rest[:2]], 1)
    torch.testing.assert_close(
        again, host(whole, use_cache=False).logits[:, 11:], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generate_is_the_same_with_and_without_a_cache(host, tokenizer, how):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | how
    ids = prompt(2, 6)
    mask = torch.ones_like(ids)
    with_cache = host.generate(ids, attention_mask=mask, **options)
    assert torch.equal(
        with_cache, host.generate(ids, attention_mask=mask, use_cache=False, **options)
    )


@torch.no_grad()
def test_left_padding_is_not_seen(llama, tokenizer):
    wake(attach(llama, tokenizer, (0, 1), **SMALL))
    ids = prompt(1, 7)
    padded = torch.cat([torch.full((1, 4), 17), ids], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 7:]
    assert torch.equal(llama.generate(padded, attention_mask=mask, **options)[:, 11:], alone)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(llama, tokenizer):
    memory = attach(llama, tokenizer, (0,), **SMALL)
    wake(memory)
    ids = prompt(1, 10)
    seen = []
    hook = memory.engrams[0].register_forward_hook(lambda module, args, out: seen.append(out))
    llama(ids, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]), use_cache=False)
    llama(ids[:, 5:], use_cache=False)
    hook.remove()
    torch.testing.assert_close(seen[0][:, 5:], seen[1])


def test_memory_alone_is_saved_and_loaded(llama, tokenizer, tmp_path):
    memory = attach(llama, tokenizer, (1,), **SMALL)
    ids = prompt()
    wake(memory)
    expected = llama(ids).logits
    memory.save(tmp_path / "memory.safetensors")
    memory.detach()
    load_memory(llama, tokenizer, tmp_path / "memory.safetensors")
    assert torch.equal(llama(ids).logits, expected)


@pytest.mark.parametrize("kind", ["deepseek_v4", "qwen4_exp_text"])
def test_a_memory_of_several_streams_is_trained_saved_and_loaded(kind, tokenizer, llama, tmp_path):
    torch.manual_seed(1)
    host = AutoModelForCausalLM.from_config(config_of(kind)).eval()
    memory = attach(host, tokenizer, (1,), **SMALL)
    ids = prompt()
    wake(memory)
    assert memory.engrams[0].gate.key_norm.shape[0] == memory.streams > 1
    host(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in memory.parameters())
    expected = host(ids).logits
    memory.save(tmp_path / "memory.safetensors")
    memory.detach()
    load_memory(host, tokenizer, tmp_path / "memory.safetensors")
    assert torch.equal(host(ids).logits, expected)
    with pytest.raises(ValueError, match="size mismatch"):
        load_memory(llama, tokenizer, tmp_path / "memory.safetensors")
    assert not hasattr(llama, "rorqual_memory")


def test_a_memory_of_another_tokenizer_or_model_is_refused(llama, tokenizer, tmp_path):
    path = tmp_path / "memory.safetensors"
    memory = attach(llama, tokenizer, (1,), **SMALL)
    memory.save(path)
    memory.detach()
    with pytest.raises(ValueError, match="canonical map"):
        load_memory(llama, train(["zebra Zebra ZEBRA quagga"] * 4, 290), path)
    assert not hasattr(llama, "rorqual_memory")
    wider = AutoModelForCausalLM.from_config(
        LlamaConfig(**SIZES | {"hidden_size": 64}, vocab_size=300)
    )
    with pytest.raises(ValueError, match="width 32, got one of width 64"):
        load_memory(wider, tokenizer, path)
    path.write_bytes(b"not this")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_memory(llama, tokenizer, path)


def test_what_cannot_be_is_refused_in_one_line(llama, tokenizer):
    with pytest.raises(
        ValueError, match=r"layers: got \[3\], expected indices of the model's blocks, 0..2"
    ):
        attach(llama, tokenizer, (3,), **SMALL)
    with pytest.raises(ValueError, match="rows_per_haed, expected fields of EngramConfig"):
        attach(llama, tokenizer, (1,), rows_per_haed=(5, 5))
    memory = attach(llama, tokenizer, (1,), **SMALL)
    with pytest.raises(ValueError, match="already carries a memory"):
        attach(llama, tokenizer, (1,), **SMALL)
    with pytest.raises(ValueError, match="got inputs_embeds, expected input_ids"):
        llama(inputs_embeds=torch.zeros(1, 2, 32))
    memory.detach()
    with pytest.raises(ValueError, match="not attached"):
        memory.detach()
    small = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=200))
    with pytest.raises(
        ValueError, match="tokenizer: got 300 ids, expected at most the model's 200"
    ):
        attach(small, tokenizer, (1,), **SMALL)
    with pytest.raises(ValueError, match="found no list of None blocks in Linear"):
        find_blocks(torch.nn.Linear(2, 2))


def test_a_cache_from_before_is_refused(llama, tokenizer):
    cache = llama(prompt()).past_key_values
    attach(llama, tokenizer, (1,), **SMALL)
    with pytest.raises(ValueError, match="before the memory was attached"):
        llama(prompt(), past_key_values=cache)


def test_rows_of_zero_leave_all_other_text_as_it_was(llama, tokenizer):
    with torch.no_grad():
        before = llama(prompt(4, 12)).logits
    memory = attach(llama, tokenizer, (1,), **SMALL | {"rows_per_head": (9973, 9973)}, zero="rows")
    memory.tables[0].sparse = True
    assert torch.equal(llama(prompt(4, 12)).logits, before)
    ids = torch.tensor([[7, 8, 9, 10]])
    llama(ids, labels=ids).loss.backward()
    # From the first step on.
    assert memory.tables[0].weight.grad.coalesce().values().abs().max() > 0
    with torch.no_grad():
        for row in memory.tables[0].weight.grad.coalesce().indices()[0]:
            memory.tables[0].weight[row] += 1.0
        assert not torch.equal(llama(ids).logits, llama(ids.flip(1)).logits.flip(1))
        assert torch.equal(llama(prompt(4, 12)).logits, before)
    with pytest.raises(ValueError, match="zero: got 'all', expected values or rows"):
        attach(llama, tokenizer, (1,), **SMALL, zero="all")


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda how: "+".join(how),
)
def test_every_way_to_generate_says_what_full_forwards_say(host, tokenizer, how):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    rows = 1 if "prompt_lookup_num_tokens" in how else 2
    ids = prompt(rows, 9)
    ids[:, 6:] = ids[:, :3]  # repeated text for the prompt lookup
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 10,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    caching = {"prefill_chunk_size", "cache_implementation", "prompt_lookup_num_tokens"}
    plain = {name: value for name, value in how.items() if name not in caching}
    if not can(host, how):
        with pytest.raises((KeyError, ValueError), match=r"compressed_sparse|not supported"):
            host.generate(ids, **options, do_sample=False, **how)
        return
    torch.manual_seed(3)
    got = host.generate(ids, **options, **{"do_sample": False} | how)
    torch.manual_seed(3)
    assert torch.equal(
        got, host.generate(ids, **options, use_cache=False, **{"do_sample": False} | plain)
    )


@pytest.mark.parametrize("whose", ["host", "assistant", "both"])
def test_assisted_generation_says_what_greedy_says(whose, tokenizer):
    torch.manual_seed(2)
    host, assistant = (
        AutoModelForCausalLM.from_config(config_of("llama")).eval() for _ in range(2)
    )
    for model in [host] * (whose != "assistant") + [assistant] * (whose != "host"):
        wake(attach(model, tokenizer, (0, 2), **SMALL))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = prompt(1, 6)
    options["attention_mask"] = torch.ones_like(ids)
    got = host.generate(ids, assistant_model=assistant, **options)
    assert torch.equal(got, host.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_a_conversation_goes_on_with_the_cache_of_its_last_turn(host, tokenizer):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = host.generate(prompt(2, 5), **options, return_dict_in_generate=True)
    text = torch.cat([first.sequences, prompt(2, 3)], 1)
    options["attention_mask"] = torch.ones_like(text)
    again = host.generate(text, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, host.generate(text, use_cache=False, **options))


@torch.no_grad()
def test_any_number_of_tokens_can_be_taken_back(llama, tokenizer):
    wake(attach(llama, tokenizer, (0, 2), **SMALL))
    ids = prompt(2, 150)
    rest = prompt(2, 5)
    cache = llama(ids, use_cache=True).past_key_values
    for cached in (149, 30, 1):
        cache.crop(cached - cache.get_seq_length())
        got = llama(rest, past_key_values=cache).logits
        whole = torch.cat([ids[:, :cached], rest], 1)
        torch.testing.assert_close(
            got, llama(whole, use_cache=False).logits[:, cached:], atol=1e-5, rtol=1e-4
        )
        cache.crop(-5)
    cache.reset()
    torch.testing.assert_close(
        llama(rest, past_key_values=cache).logits, llama(rest, use_cache=False).logits
    )


@torch.no_grad()
def test_a_batch_loses_finished_sequences_by_index_or_by_mask(llama, tokenizer):
    wake(attach(llama, tokenizer, (0,), **SMALL))
    ids = prompt(3, 6)
    rest = prompt(2, 3)
    for cached in (torch.tensor([0, 2]), torch.tensor([True, False, True])):
        cache = llama(ids, use_cache=True).past_key_values
        cache.batch_select_indices(cached)
        got = llama(rest, past_key_values=cache).logits
        whole = torch.cat([ids[cached], rest], 1)
        torch.testing.assert_close(
            got, llama(whole, use_cache=False).logits[:, 6:], atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_sequences_of_different_lengths_generate_what_each_says_alone(host, tokenizer):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = prompt(3, 8)
    lengths = (8, 3, 5) if can(host, ["padding"]) else (8, 8, 8)
    mask = torch.stack([(torch.arange(8) >= 8 - length).long() for length in lengths])
    for beams, ways in (
        (1, ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3})),
        (2, ({},)),
    ):
        options["num_beams"], alone = beams, []
        for row, length in enumerate(lengths):
            whole = ids[row : row + 1, 8 - length :]
            alone.append(
                host.generate(whole, attention_mask=torch.ones_like(whole), **options)[0, length:]
            )
        for how in filter(functools.partial(can, host), ways):
            got = host.generate(ids, attention_mask=mask, **options | how)
            assert torch.equal(got[:, 8:], torch.stack(alone))


@torch.no_grad()
def test_a_mask_of_four_axes_tells_presence_by_its_diagonal(llama, tokenizer):
    memory = attach(llama, tokenizer, (0,), **SMALL)
    wake(memory)
    ids = prompt(2, 6)
    flat = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    square = flat[:, None, None].bool() & torch.ones(6, 6, dtype=torch.bool).tril()
    added = torch.zeros(square.shape).masked_fill(~square, torch.finfo(torch.float32).min)
    seen = []
    hook = memory.engrams[0].register_forward_hook(lambda module, args, out: seen.append(out))
    for mask in (flat, square, added):
        llama(ids, attention_mask=mask, use_cache=False)
    hook.remove()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    for wrong in (torch.ones(2, 3), torch.ones(2, 1, 6, 3)):
        with pytest.raises(ValueError, match="memory: got attention_mask Tensor"):
            llama(ids, attention_mask=wrong)


def test_a_sliding_window_is_followed_by_a_growing_cache_and_refused_by_a_static_one(tokenizer):
    config = MistralConfig(**SIZES, vocab_size=300, sliding_window=5, pad_token_id=0)
    torch.manual_seed(1)
    host = AutoModelForCausalLM.from_config(config).eval()
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    ids = prompt(2, 9)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
    }
    expected = host.generate(ids, use_cache=False, pad_token_id=0, **options)
    assert torch.equal(host.generate(ids, pad_token_id=0, **options), expected)
    with pytest.raises(ValueError, match="memory: got attention_mask"):
        host.generate(ids, pad_token_id=0, cache_implementation="static", **options)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_before_one_backward_under_gradient_checkpointing(llama, tokenizer, reentrant):
    memory = attach(llama, tokenizer, (0, 2), **SMALL)
    wake(memory)
    llama.train()
    grads = []
    for saving in (False, True):
        if saving:
            llama.activation_checkpointing_enable({"use_reentrant": reentrant})
        memory.zero_grad()
        one = prompt(2, 9)
        other = prompt(3, 5).flip(1)
        (llama(one, labels=one).loss + llama(other, labels=other).loss).backward()
        grads.append([p.grad.clone() for p in memory.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_new_tokens_behind_a_cache_have_their_whole_gradient(llama, tokenizer):
    memory = attach(llama.double(), tokenizer, (1,), **SMALL)
    ids = prompt(1, 12)
    wake(memory)
    with torch.no_grad():
        cache = llama(ids[:, :2], use_cache=True).past_key_values

    def loss() -> torch.Tensor:
        return llama(ids[:, 2:], past_key_values=copy.deepcopy(cache)).logits.square().mean()

    loss().backward()
    for weight in (memory.engrams[0].conv, memory.engrams[0].value_proj.weight):
        flat = weight.detach().view(-1)
        slope = weight.grad.view(-1)
        offset = int(slope.abs().argmax())
        step = 1e-3
        with torch.no_grad():
            flat[offset] += step
            above = loss()
            flat[offset] -= 2 * step
            torch.testing.assert_close(
                (above - loss()) / (2 * step), slope[offset], rtol=1e-2, atol=0
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_dtype_follows_the_host_or_stays_float32(host, tokenizer, dtype):
    host = host.to(dtype)
    ids = prompt()
    before = host(ids).logits
    memory = attach(host, tokenizer, (0, 2), **SMALL)
    assert {p.dtype for p in memory.parameters()} == {dtype}
    assert torch.equal(host(ids).logits, before)
    memory.float()
    assert torch.equal(host(ids).logits, before)
    wake(memory)
    after = host(ids).logits
    assert after.dtype == dtype and not torch.equal(after, before)
    mask = torch.ones_like(ids)
    assert host.generate(
        ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None, pad_token_id=0
    ).shape == (2, 12)
    host.float()
    assert {p.dtype for p in memory.parameters()} == {torch.float32}


def test_device_follows_the_host(llama, tokenizer):
    memory = attach(llama, tokenizer, (1,), **SMALL)
    llama.to("meta")
    assert {t.device.type for t in [*memory.parameters(), *memory.buffers()]} == {"meta"}


@torch.no_grad()
def test_a_copy_of_the_host_has_a_memory_of_its_own(llama, tokenizer):
    memory = attach(llama, tokenizer, (0, 2), **SMALL)
    ids = prompt()
    wake(memory)
    expected = llama(ids).logits
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        memory.tables[0].weight.add_(1.0)
        assert torch.equal(other(ids).logits, expected)
        assert not torch.equal(llama(ids).logits, expected)
        memory.tables[0].weight.sub_(1.0)
        other.rorqual_memory.detach()
        assert not torch.equal(other(ids).logits, expected)
        assert llama.rorqual_memory is memory and memory.attached


@torch.no_grad()
def test_caches_are_given_back_as_they_were(llama, tokenizer):
    memory = attach(llama, tokenizer, (0,), **SMALL)
    wake(memory)
    caches = [DynamicCache(config=llama.config), StaticCache(config=llama.config, max_cache_len=40)]
    for cache in caches:
        llama(prompt(), past_key_values=cache)
        assert isinstance(cache, type(cache).__mro__[2]) and type(cache).__name__.startswith(
            "Engram"
        )
    names = set(vars(DynamicCache(config=llama.config)))
    memory.detach()
    assert [type(cache) for cache in caches] == [DynamicCache, StaticCache]
    assert set(vars(caches[0])) == names
    assert llama(prompt(2, 1), past_key_values=caches[0]).past_key_values is caches[0]
    caches[0].crop(-9)
    attach(llama, tokenizer, (0,), **SMALL)
    with pytest.raises(ValueError, match="a cache of 1 tokens, 0 of which it has seen"):
        llama(prompt(2, 1), past_key_values=caches[0])


@torch.no_grad()
def test_memory_keeps_nothing_of_a_call_alive(llama, tokenizer):
    def contexts() -> int:
        gc.collect()
        # isinstance would ask what a weak proxy stands for, which may be gone.
        return sum(type(each) is Context for each in gc.get_objects())

    attach(llama, tokenizer, (0,), **SMALL)
    before = contexts()
    cache = weakref.ref(llama(prompt()).past_key_values)
    assert contexts() == before
    assert cache() is None
    llama.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llama(prompt())
    assert contexts() == before


@torch.no_grad()
def test_a_cache_of_another_memory_or_of_no_kind_is_refused(llama, tokenizer):
    memory = attach(llama, tokenizer, (0,), **SMALL)
    cache = llama(prompt()).past_key_values
    cached = copy.deepcopy(cache)
    memory.detach()
    attach(llama, tokenizer, (0, 1), **SMALL)
    with pytest.raises(ValueError, match="a cache of 9 tokens, 0 of which it has seen"):
        llama(prompt(2, 1), past_key_values=cached)
    with pytest.raises(ValueError, match="got past_key_values as tuple, expected a Cache"):
        llama(prompt(2, 1), past_key_values=((), ()))
    with pytest.raises(ValueError, match="got a paged cache"):
        llama(prompt(2, 1), cache=object())
    cache = llama(prompt()).past_key_values
    cache.layers[0].crop(-2)  # the memory is not cropped with it
    with pytest.raises(ValueError, match="a cache of 7 tokens, 9 of which"):
        llama(prompt(2, 1), past_key_values=cache)


def test_models_that_memory_cannot_follow_are_refused(tokenizer):
    names = {"vocab_size": 300, "pad_token_id": 0}
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, **names)
    )
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=4, **names)
    )
    minimax = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("minimax", **SIZES | names, head_dim=8, num_local_experts=4)
    )
    for model, text in (
        (t5, "an encoder and a decoder"),
        (mamba, "takes no past_key_values"),
        (minimax, "its own kind"),
    ):
        keys = model.state_dict().keys()
        with pytest.raises(ValueError, match=text):
            attach(model, tokenizer, (0,), **SMALL)
        assert model.state_dict().keys() == keys and all(
            p.requires_grad for p in model.parameters()
        )


def test_a_model_of_other_streams_is_refused_at_once(tokenizer):
    ours = {
        "head_dim": 8,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    }
    config = AutoConfig.for_model(
        "gemma3n_text", **SIZES | {"vocab_size": 300, "pad_token_id": 0} | ours
    )
    host = AutoModelForCausalLM.from_config(config)
    keys = host.state_dict().keys()
    hooks = [len(m._forward_pre_hooks) for m in host.modules()]
    with pytest.raises(
        ValueError, match=r"hidden states \[.*\] for one token, expected \[1, 1, 32\]: other"
    ):
        attach(host, tokenizer, (0,), **SMALL)
    assert host.state_dict().keys() == keys and all(p.requires_grad for p in host.parameters())
    assert [len(m._forward_pre_hooks) for m in host.modules()] == hooks


def step(model) -> dict[str, bool]:
    """Returns which parameters a step of an ordinary loop changes, by their owner."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # LoRA's A has no gradient while B is 0
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name: not torch.equal(before[name], p) for name, p in model.named_parameters()}
    kinds = {"memory": "rorqual_memory", "lora": "lora_"}
    item = {
        kind: [c for name, c in changed.items() if word in name] for kind, word in kinds.items()
    }
    item["host"] = [
        c for name, c in changed.items() if not any(word in name for word in kinds.values())
    ]
    assert all(item.values())
    return {kind: all(changes) if any(changes) else False for kind, changes in item.items()}


@pytest.mark.parametrize(
    "first", ["memory", "lora", "lora, by the host itself", "memory, then lora by the host itself"]
)
def test_memory_and_lora_train_beside_each_other(first, llama, tokenizer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = llama
    if first == "memory":
        memory = attach(llama, tokenizer, (1,), **SMALL)
        model = get_peft_model(llama, lora)
    elif first == "lora":
        model = get_peft_model(llama, lora)
        memory = attach(model, tokenizer, (1,), **SMALL)
    elif first == "lora, by the host itself":
        llama.add_adapter(lora)
        memory = attach(llama, tokenizer, (1,), **SMALL)
    else:
        memory = attach(llama, tokenizer, (1,), **SMALL)
        llama.add_adapter(lora)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len([name for name in trained if "lora_" in name]) == 6
    assert (
        len([name for name in trained if "rorqual_memory" in name])
        == len(list(memory.parameters()))
        > 0
    )
    wake(memory)
    assert step(model.train()) == {"memory": True, "lora": True, "host": False}
    memory.detach()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)


def test_what_was_frozen_on_purpose_stays_so_beside_lora(llama, tokenizer):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    memory = attach(llama, tokenizer, (1,), **SMALL)
    memory.tables.requires_grad_(False)
    model = get_peft_model(llama, lora)
    assert {p.requires_grad for p in memory.tables.parameters()} == {False}
    assert {p.requires_grad for p in memory.engrams.parameters()} == {True}
    for parameter in model.parameters():  # the usual loop
        parameter.requires_grad = False
    assert not any(p.requires_grad for p in model.parameters())
    memory.detach()
    memory = attach(llama, tokenizer, (1,), **SMALL).requires_grad_(False)
    model.add_adapter("second", lora)
    assert not any(p.requires_grad for p in memory.parameters())


def test_the_trainer_of_transformers_trains_memory_alone(llama, tokenizer, tmp_path):
    memory = attach(llama, tokenizer, (1,), **SMALL)
    rows = prompt(8, 12)
    wake(memory)
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    options = {
        "learning_rate": 1e-2,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
    }
    Trainer(
        llama,
        TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **options
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    ).train()
    changed = {name for name, p in llama.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {name for name in before if "rorqual_memory" in name}
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(
        torch.equal(saved[name], p) for name, p in llama.named_parameters() if name in changed
    )


@pytest.mark.parametrize("last", ["step", "zero_grad", "nothing"])
def test_the_trainer_of_transformers_goes_on_after_our_optimizer(llama, tokenizer, tmp_path, last):
    """Sparse gradients of rows end with the step, while our optimizer is still there."""
    memory = attach(llama, tokenizer, (1,), **SMALL)
    rows = prompt(8, 12)
    wake(memory)

    optimizer = Optimizer(llama, OptimConfig())
    if last != "nothing":
        optimizer.begin_step()
        llama(rows, labels=rows).loss.backward()
        assert memory.tables[0].weight.grad.is_sparse
        optimizer.clip()
        optimizer.step()
    if last == "zero_grad":
        optimizer.zero_grad()
    before = memory.tables[0].weight.detach().clone()
    Trainer(
        llama,
        TrainingArguments(
            str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    ).train()
    assert not torch.equal(memory.tables[0].weight, before)


@torch.no_grad()
def test_a_fast_tokenizer_of_transformers_does_as_well(llama, tokenizer):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend), eos_token="<|end|>"
    )
    logits = []
    for each in (tokenizer, fast):
        memory = attach(llama, each, (1,), **SMALL)
        torch.manual_seed(0)
        wake(memory)
        logits.append(llama(prompt()).logits)
        memory.detach()
    assert torch.equal(*logits)


def test_width_is_that_of_the_hidden_states(tokenizer):
    config = AutoConfig.for_model(
        "opt", vocab_size=300, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    host = AutoModelForCausalLM.from_config(config).eval()
    before = host(prompt()).logits
    memory = attach(host, tokenizer, (0,), **SMALL)
    assert memory.width == 32
    assert torch.equal(host(prompt()).logits, before)


def test_the_body_of_an_attached_model_is_refused_too(llama, tokenizer):
    attach(llama, tokenizer, (1,), **SMALL)
    with pytest.raises(ValueError, match="already carries a memory"):
        attach(llama, tokenizer, (0,), **SMALL)
    body = llama.model
    llama.rorqual_memory.detach()
    ids = prompt()
    before = body(ids).last_hidden_state
    memory = attach(body, tokenizer, (1,), **SMALL)
    assert torch.equal(body(ids).last_hidden_state, before)
    with pytest.raises(ValueError, match="already carries a memory"):
        attach(llama, tokenizer, (0,), **SMALL)
    assert memory.detach() is body


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no_format", "got format None, expected 'rorqual-memory-1'"),
        ("no_config", "no memory that Memory.save wrote: .*config"),
        ("no_json", "no memory that Memory.save wrote: JSONDecodeError"),
        ("fewer_rows", "fewer than the 388 rows"),
        ("no_table", "tables.0.weight"),
        ("integers", "no memory that Memory.save wrote"),
        ("other_shape", "loading state_dict"),
        ("odd_field", "got surprise, expected fields of EngramConfig"),
        ("huge", "fewer than the 4000000000000000 rows"),
    ],
)
def test_a_damaged_memory_file_is_refused_and_leaves_the_model_alone(
    llama, tokenizer, tmp_path, how, reason
):
    path = tmp_path / "memory.safetensors"
    ids = prompt()
    with torch.no_grad():
        before = llama(ids).logits
    memory = attach(llama, tokenizer, (1,), **SMALL)
    memory.save(path)
    memory.detach()
    about = {
        "config": dict(json.loads(_header(path)["memory"])["config"]),
        "width": 32,
        "vocab_size": 300,
    }
    tensors = load_file(path)
    header = {"format": "rorqual-memory-1"}
    if how == "no_format":
        header = {}
    elif how == "no_config":
        about = {}
    elif how == "fewer_rows":
        tensors["tables.0.weight"] = tensors["tables.0.weight"][:100].clone()
    elif how == "no_table":
        del tensors["tables.0.weight"]
    elif how == "integers":
        tensors["engrams.0.value_proj.weight"] = torch.zeros(3, dtype=torch.int32)
    elif how == "other_shape":
        tensors["engrams.0.value_proj.weight"] = torch.zeros(3, 3)
    elif how == "odd_field":
        about["config"]["surprise"] = 1
    elif how == "huge":
        about["config"]["rows_per_head"] = [10**15, 10**15]
    header["memory"] = "{" if how == "no_json" else json.dumps(about)
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=reason):
        load_memory(llama, tokenizer, path)
    assert not hasattr(llama, "rorqual_memory") and all(p.requires_grad for p in llama.parameters())
    assert torch.equal(llama(ids).logits, before)


def _header(path) -> dict[str, str]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


@torch.no_grad()
def test_a_saved_memory_keeps_its_dtype_in_a_host_of_another(llama, tokenizer, tmp_path):
    memory = attach(llama.to(torch.bfloat16), tokenizer, (1,), **SMALL).float()
    ids = prompt()
    wake(memory)
    expected = llama(ids).logits
    memory.save(tmp_path / "memory.safetensors")
    memory.detach()
    again = load_memory(llama, tokenizer, tmp_path / "memory.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(llama(ids).logits, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]


@torch.no_grad()
def test_everything_is_held_in_pieces_of_any_size():
    stored = Everything(2)
    text = torch.arange(60).view(2, 30)
    offset = 0
    for time in (1, 3, 1, 20, 5, 1):
        if offset == 30:
            offset = 9  # the host's cache was cropped
        window = stored.extend(text[:, offset : offset + time], Span(offset, None))
        before = torch.nn.functional.pad(text, (2, 0))[:, offset : offset + 2]
        assert torch.equal(window, torch.cat([before, text[:, offset : offset + time]], 1))
        offset += time
