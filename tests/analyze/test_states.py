"""Tests that the measures treat hosts of transformers like our own models."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.analyze import measures, states
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.model import LanguageModel
from rorqual.presets import preset

transformers = pytest.importorskip("transformers")

from rorqual.hub import checkpoints  # noqa: E402
from rorqual.hub.attach import attach  # noqa: E402 (transformers first)
from rorqual.hub.auto import RorqualForCausalLM  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
import random_qwen4_exp  # noqa: E402, F401 (it chooses the functions that run on a CPU)

V = 64
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
GROUPED = SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}


def host(kind: str, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **({"n_embd": 16, "n_layer": 3, "n_head": 2,
    "vocab_size": V}
        if kind == "gpt2" else GROUPED) | {"initializer_range": 0.5} | more)  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def ids():
    return torch.randint(0, V, (2, 9))


@pytest.mark.parametrize(
    ("kind", "norm"), [("gpt2", "ln_f"), ("llama", "norm"), ("gemma2", "norm")]
)
def test_the_lens_of_a_host_is_its_own_end_after_an_early_block(kind, norm, ids):
    """Computes the lens by hand.

    It applies the host's final norm, its head and, in Gemma 2, its soft cap on the logits.
    """
    model = host(kind)
    lens = measures.logit_lens(model, ids)
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        final = out.logits.double().log_softmax(-1)
        for layer in (0, 1):
            early = model.get_output_embeddings()(
                getattr(model.base_model, norm)(out.hidden_states[layer + 1])
            )
            if kind == "gemma2":
                early = (
                    early / model.config.final_logit_softcapping
                ).tanh() * model.config.final_logit_softcapping
            kl = (final.exp() * (final - early.double().log_softmax(-1))).sum(-1).mean()
            assert float(lens[layer]) == pytest.approx(float(kl), rel=1e-4) and kl > 1e-6
    assert float(lens[-1]) == pytest.approx(0, abs=1e-6)
    assert torch.equal(model(input_ids=ids).logits, out.logits), "the host is as it was"


STREAMS = {
    "deepseek_v4": {
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 4,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "sliding_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "index_n_heads": 4,
        "index_head_dim": 8,
        "index_topk": 3,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_experts": 4,
        "hc_count": 3,
        "hc_lowrank": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 8,
        "ngram_vocab_size_base": 30,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "eos_token_id": 0,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_host_of_several_streams_is_measured_as_our_model_of_its_folder(kind, ids, tmp_path):
    """Logit lens, hidden states and loads of both are the same."""
    theirs = host(kind, **{"num_experts_per_tok": 2} | STREAMS[kind])
    theirs.save_pretrained(tmp_path)
    model = checkpoints.load(tmp_path)
    lens = measures.logit_lens(theirs, ids)
    assert torch.allclose(lens, measures.logit_lens(model, ids), rtol=1e-4, atol=1e-6)
    for our_state, state in zip(
        states.block_states(model, ids), states.block_states(theirs, ids), strict=True
    ):
        torch.testing.assert_close(our_state, state, rtol=1e-4, atol=1e-4)
    load = measures.expert_load(model, [ids])
    expected = measures.expert_load(theirs, [ids])
    assert load.layers == expected.layers == (0, 1, 2)
    assert torch.equal(load.by_token, expected.by_token)
    assert torch.allclose(
        measures.similarity(theirs, model, [ids]).diagonal(), torch.ones(3), atol=1e-4
    )


def test_states_of_a_host_are_its_hidden_states(ids):
    model = host("llama")
    left = states.block_states(model, ids)
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert (
        len(left) == 3
        and torch.allclose(left[0], expected[1].flatten(0, 1))
        and left[2].shape == (18, 16)
    )
    assert torch.allclose(
        measures.similarity(model, model, [ids]).diagonal(), torch.ones(3), atol=1e-5
    )
    assert measures.similarity(model, host("gpt2"), [ids]).shape == (3, 3)


@pytest.mark.parametrize(
    ("kind", "more", "layers"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, (0, 1, 2)),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "decoder_sparse_step": 1,
                       "mlp_only_layers": [1]}, (0, 2)),
    ],
)  # fmt: skip
def test_expert_load_of_a_host_is_what_its_router_chose(kind, more, layers, ids):
    model = host(kind, **more)
    load = measures.expert_load(model, iter([ids, ids[:1]]))
    assert load.layers == layers and load.by_token.shape == (len(layers), 4, V)
    assert load.counts.sum(-1).tolist() == [27 * 2] * len(layers)
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits[0].view(-1, 4)
    picked = logits.topk(2, -1).indices
    again = measures.expert_load(model, [ids])
    assert torch.equal(again.counts[0], picked.flatten().bincount(minlength=4))
    for expert in range(4):
        ours = ids.flatten()[(picked == expert).any(-1)].bincount(minlength=V)
        assert torch.equal(again.by_token[0, expert], ours)


def test_a_memory_attached_to_a_host_has_gates_and_can_be_silenced(ids):
    tokenizer = train_tokenizer(["the whale swims in the sea"] * 20, 300)
    model = host("llama", vocab_size=tokenizer.vocab_size)
    with pytest.raises(ValueError, match="without Engram"):
        measures.gates(model, tokenizer, "the whale")
    labels = ids.roll(-1, 1)
    plain = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits.flatten(0, 1), labels.flatten()
    ).item()
    memory = attach(model, tokenizer, (0, 2), rows_per_head=(50, 60))
    with torch.no_grad():
        for engram in memory.engrams:
            engram.value_proj.weight.normal_()
    result = measures.gates(model, tokenizer, "the whale")
    assert result.layers == (0, 2) and result.values.shape == (2, len(result.tokens), 1)
    assert ((result.values > 0) & (result.values < 1)).all()
    whole, without = measures.suppression(model, ids, labels)
    assert without == pytest.approx(plain, abs=1e-6) and abs(whole - without) > 1e-4


def test_ours_in_a_wrapper_is_ours(ids):
    model = LanguageModel(replace(preset("tiny"), vocab_size=V, engram=None), seed=1)
    wrapped = RorqualForCausalLM.of(model)
    assert states.ours(wrapped) is model and states.block_names(wrapped)[1].endswith("blocks.1")
    assert torch.allclose(
        measures.logit_lens(wrapped, ids), measures.logit_lens(model, ids), atol=1e-6
    )
    assert torch.equal(
        measures.expert_load(wrapped, [ids]).counts, measures.expert_load(model, [ids]).counts
    )


def test_what_has_no_blocks_or_experts_is_refused(ids):
    with pytest.raises(ValueError, match="without experts"):
        measures.expert_load(host("llama"), [ids])
    with pytest.raises(ValueError, match="without experts"):
        measures.expert_load(
            LanguageModel(replace(preset("tiny"), moe=None, vocab_size=V, engram=None)), [ids]
        )
    with pytest.raises(ValueError, match="expected a causal model"):
        states.block_states(torch.nn.Linear(2, 2), ids)
