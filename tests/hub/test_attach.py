"""Engram on models of transformers: identity at first, trained alone, right at decode, saved alone, taken off again."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from rorqual.data.tokenizer import train
from rorqual.hub.attach import attach, find_blocks, load_memory

TEXT = ["Alexander the Great and the great white whale.", "the sea, the SEA; a whale is not a fish é è"] * 3
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
    if kind == "qwen3":
        return Qwen3Config(**SIZES, **names, head_dim=8)
    if kind == "gpt2":
        return GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **names)
    latent = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = SIZES | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    return DeepseekV3Config(**sizes, **names, **latent, **experts)


@pytest.fixture(params=["llama", "gpt2", "qwen3", "deepseek_v3"])
def host(request):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of(request.param)).eval()


@pytest.fixture
def llama():
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of("llama")).eval()


def wake(memory) -> None:
    """Values and convolution as training would leave them: nothing is an identity any more."""
    for engram in memory.engrams:
        torch.nn.init.normal_(engram.value_proj.weight, std=0.5)
        torch.nn.init.normal_(engram.conv, std=0.5)
    for table in memory.tables:
        torch.nn.init.normal_(table.weight, std=1.0)


def prompt(rows: int = 2, time: int = 9) -> torch.Tensor:
    return torch.randint(1, 300, (rows, time), generator=torch.Generator().manual_seed(5))


def test_identity_at_first_then_detached_bit_for_bit(host, tokenizer):
    ids, weights = prompt(), copy.deepcopy(host.state_dict())
    trained = {name: p.requires_grad for name, p in host.named_parameters()}
    before = host(ids).logits
    memory = attach(host, tokenizer, (0, 2), **SMALL)
    assert torch.equal(host(ids).logits, before)
    wake(memory)
    assert not torch.allclose(host(ids).logits, before, atol=1e-3)
    assert memory.detach() is host
    assert torch.equal(host(ids).logits, before)
    assert {name: p.requires_grad for name, p in host.named_parameters()} == trained
    assert host.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in host.state_dict().items())


def test_only_memory_learns(llama, tokenizer):
    memory = attach(llama, tokenizer, (1,), **SMALL)
    own = {id(p) for p in memory.parameters()}
    assert own == {id(p) for p in llama.parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in llama.named_parameters() if id(p) not in own}
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad], lr=3e-2)
    ids, losses = prompt(4, 12), []
    llama.train()
    for _ in range(30):
        loss = llama(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(before[name], p) for name, p in llama.named_parameters() if name in before)


def test_gradients_are_the_same_with_and_without_a_cache(llama, tokenizer):
    memory, ids = attach(llama, tokenizer, (1,), **SMALL), prompt()
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
    ids, cache, parts = prompt(2, 13), DynamicCache(config=host.config), []
    for chunk in ids.split([5, 1, 1, 4, 2], dim=1):
        parts.append(host(chunk, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), host(ids, use_cache=False).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_crop_repeat_select_and_copy_take_the_memory_along(host, tokenizer):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    ids, rest = prompt(2, 11), prompt(4, 3)
    cache = host(ids, use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
    cache.batch_select_indices(torch.tensor([0, 1, 3, 2]))
    rows = [1, 0, 0, 0]
    got = host(rest, past_key_values=cache).logits
    whole = torch.cat([ids[rows, :7], rest], 1)
    torch.testing.assert_close(got, host(whole, use_cache=False).logits[:, 7:], atol=1e-5, rtol=1e-4)
    again = host(rest[:2], past_key_values=kept).logits
    whole = torch.cat([ids, rest[:2]], 1)
    torch.testing.assert_close(again, host(whole, use_cache=False).logits[:, 11:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generate_is_the_same_with_and_without_a_cache(host, tokenizer, how):
    wake(attach(host, tokenizer, (0, 2), **SMALL))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    ids = prompt(2, 6)
    mask = torch.ones_like(ids)
    with_cache = host.generate(ids, attention_mask=mask, **options)
    assert torch.equal(with_cache, host.generate(ids, attention_mask=mask, use_cache=False, **options))


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
    memory, ids = attach(llama, tokenizer, (1,), **SMALL), prompt()
    wake(memory)
    expected = llama(ids).logits
    memory.save(tmp_path / "memory.safetensors")
    memory.detach()
    load_memory(llama, tokenizer, tmp_path / "memory.safetensors")
    assert torch.equal(llama(ids).logits, expected)


def test_a_memory_of_another_tokenizer_or_model_is_refused(llama, tokenizer, tmp_path):
    path = tmp_path / "memory.safetensors"
    memory = attach(llama, tokenizer, (1,), **SMALL)
    memory.save(path)
    memory.detach()
    with pytest.raises(ValueError, match="canonical map"):
        load_memory(llama, train(["zebra Zebra ZEBRA quagga"] * 4, 290), path)
    assert not hasattr(llama, "rorqual_memory")
    wider = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"hidden_size": 64}, vocab_size=300))
    with pytest.raises(ValueError, match="width 32, got one of width 64"):
        load_memory(wider, tokenizer, path)
    path.write_bytes(b"not this")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_memory(llama, tokenizer, path)


def test_what_cannot_be_is_refused_in_one_line(llama, tokenizer):
    with pytest.raises(ValueError, match=r"layers: got \[3\], expected indices of the model's blocks, 0..2"):
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
    with pytest.raises(ValueError, match="tokenizer: got 300 ids, expected at most the model's 200"):
        attach(small, tokenizer, (1,), **SMALL)
    with pytest.raises(ValueError, match="found no list of None blocks in Linear"):
        find_blocks(torch.nn.Linear(2, 2))


def test_a_cache_from_before_is_refused(llama, tokenizer):
    cache = llama(prompt()).past_key_values
    attach(llama, tokenizer, (1,), **SMALL)
    with pytest.raises(ValueError, match="before the memory was attached"):
        llama(prompt(), past_key_values=cache)
