"""Tests the transformers wrapper: equal logits, its cache, generation, saving and loading."""

import copy
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from rorqual.checkpoint import save_model
from rorqual.data.tokenizer import train
from rorqual.hub.auto import RorqualCache, RorqualConfig, RorqualForCausalLM, fast_tokenizer
from rorqual.hub.padding import Packing
from rorqual.layers.attention import MLAConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.presets import preset
from rorqual.serve.decoding import decode
from rorqual.serve.generate import load

SMALL = {"vocab_size": 290, "dim": 32, "layers": 2, "init_std": 0.2}
CONFIGS = {
    "all": ModelConfig(
        **SMALL,
        moe=MoEConfig(routed=6, active=2, width=16, first_dense=1),
        engram=EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8),
        hyper=HyperConfig(streams=2, iterations=2),
        mtp=MTPConfig(),
    ),
    "tied": ModelConfig(**SMALL, dense_width=48, tied=True),
    "v3.2": ModelConfig(
        **SMALL,
        mla=MLAConfig(q_lora_rank=12),
        dsa=DSAConfig(heads=3, dim=16, top_k=4, shared=(1,), ties="topk"),
        moe=MoEConfig(routed=6, active=2, width=16, first_dense=1),
        mtp=MTPConfig(),
    ),
    **{
        name: replace(preset(name), vocab_size=290, dim=32, init_std=0.2)
        for name in ("v4-tiny", "v4.1-tiny", "qwen4-tiny")
    },
}
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [200, 3, 3]]


@pytest.fixture(scope="module")
def tokenizer():
    return train(["A whale lives in the SEA; a Whale in the sea. é è"] * 4, 280)


# V4.1 stands for these two in the fast tests.
SLOW = {"v4-tiny", "qwen4-tiny"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONFIGS
    ],
)
def model(request, tokenizer):
    canonical = torch.from_numpy(tokenizer.canonical_map())
    return LanguageModel(CONFIGS[request.param], canonical, seed=2).eval()


@pytest.fixture
def face(model, tokenizer):
    return RorqualForCausalLM.of(model, tokenizer)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in PROMPTS])
    return ids, torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that two results of the same weights agree in float32.

    Some CPUs add a product's terms in another order when it has another number of rows, or when the
    weights begin at another address, as loaded ones do.
    """
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def greedy(model, prompts, count=7) -> list[list[int]]:
    return torch.tensor(
        list(decode(model, prompts, max_new_tokens=count, vocab_size=280))
    ).T.tolist()


OPTIONS = {"max_new_tokens": 7, "eos_token_id": None, "suppress_tokens": list(range(280, 290))}


def test_the_face_holds_the_model_and_computes_what_it_does(face, model):
    assert face.model is model
    ids = torch.tensor([PROMPTS[0]])
    out = face(ids)
    assert torch.equal(out.logits, model(ids))
    assert isinstance(out.past_key_values, RorqualCache)
    assert out.past_key_values.get_seq_length() == 5
    close(face(ids, logits_to_keep=2).logits, model(ids)[:, -2:])
    assert face(ids, use_cache=False).past_key_values is None


def test_greedy_with_padding_is_our_own(face, model):
    ids, mask = padded()
    out = face.generate(ids, attention_mask=mask, do_sample=False, **OPTIONS)
    assert out[:, 5:].tolist() == greedy(model, PROMPTS)


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]
)
def test_a_cache_changes_nothing(face, how):
    ids, mask = padded()
    out = face.generate(ids, attention_mask=mask, **OPTIONS, **how)
    assert torch.equal(
        out, face.generate(ids, attention_mask=mask, use_cache=False, **OPTIONS, **how)
    )


def test_sampling_repeats_by_seed(face):
    ids, mask = padded()
    rows = []
    for _ in range(2):
        torch.manual_seed(7)
        rows.append(
            face.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.5, top_k=20, **OPTIONS
            )
        )
    assert torch.equal(*rows)


@torch.no_grad()
def test_the_cache_knows_transformers_verbs(face, model):
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    cache = face(ids).past_key_values
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0]))
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (3, 2, model.config.layers)
    more = torch.tensor([[50, 51], [52, 53]])
    whole = torch.cat([ids[[1, 0], :3], more], 1)
    got = face(more, past_key_values=cache).logits
    torch.testing.assert_close(got, model(whole)[:, 3:], atol=1e-5, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="crop: got 2"):
        cache.crop(2)


@torch.no_grad()
def test_a_refused_crop_and_another_batch_leave_the_cache_right(face, model):
    ids = torch.arange(1, 91)[None].expand(2, -1) % 250
    cache = face(ids).past_key_values
    if model.config.engram is not None:
        with pytest.raises(ValueError, match="crop: got 70 tokens to remove"):
            cache.crop(-70)
        assert cache.get_seq_length() == cache.cache.length == 90
    cache.reset()
    result = face(ids[:1, :9], past_key_values=cache)
    assert (cache.batch_size, cache.get_seq_length()) == (1, 9)
    cache.crop(-1)
    torch.testing.assert_close(
        face(ids[:1, 8:9], past_key_values=cache).logits[:, -1],
        result.logits[:, -1],
        atol=1e-5,
        rtol=1e-4,
    )


def test_loss_is_the_models(face, model):
    ids, mask = padded()
    labels = ids.masked_fill(mask == 0, -100)
    following = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    packed = Packing(mask.bool())
    # A loss counts no token after padding.
    following = packed.pack(following.masked_fill(mask == 0, -100))
    ours = model.loss(packed.pack(ids), following, lengths=packed.lengths)
    torch.testing.assert_close(face(ids, attention_mask=mask, labels=labels).loss, ours.next_token)
    face.train()
    trained = face(ids, attention_mask=mask, labels=labels).loss
    ours = model.loss(packed.pack(ids), following, lengths=packed.lengths)
    face.eval()
    torch.testing.assert_close(trained, ours.total)
    trained.backward()
    assert model.embed.weight.grad is not None
    model.zero_grad()


def test_saved_and_loaded_whole(face, model, tokenizer, tmp_path):
    face.save_pretrained(tmp_path)
    fast_tokenizer(tokenizer).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RorqualConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, RorqualForCausalLM)
    assert loaded.config.model == model.config
    ids = torch.tensor([PROMPTS[0]])
    close(loaded(ids).logits, model(ids))
    saved = model.state_dict()
    assert loaded.model.state_dict().keys() == saved.keys()
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == saved[name].dtype
        assert torch.equal(value, saved[name]), name
    loaded.to(torch.float32)
    close(loaded(ids).logits, model(ids))
    run = load(tmp_path, device="cpu")
    close(run.model(ids), model(ids))
    assert run.generate("A whale", max_new_tokens=3, temperature=0.0) == load(tmp_path).generate(
        "A whale", max_new_tokens=3, temperature=0.0
    )


def test_pickled_weights_are_not_opened(face, tmp_path):
    face.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(face.state_dict(), tmp_path / "pytorch_model.bin")
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match="safetensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_half_precision_keeps_router_biases_whole(face, tmp_path):
    face.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.embed.weight.dtype == torch.bfloat16
    for name, buffer in loaded.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert buffer.dtype == torch.float32
    assert torch.isfinite(loaded(torch.tensor([PROMPTS[0]])).logits).all()


def test_half_precision_keeps_the_bias_of_image_tokens_whole(tmp_path):
    moe = MoEConfig(routed=4, active=2, width=16, router=RouterConfig(image_ids=(5,)))
    model = LanguageModel(ModelConfig(**SMALL, moe=moe))
    expected = model.blocks[1].ffn.router.image_bias.normal_()
    RorqualForCausalLM.of(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.blocks[1].ffn.router.image_bias, expected)


def test_pipeline(face, model, tokenizer):
    fast = fast_tokenizer(tokenizer)
    assert fast("A whale").input_ids == [tokenizer.begin_id, *tokenizer.encode("A whale")]
    writer = pipeline("text-generation", model=face, tokenizer=fast)
    text = writer("A whale", do_sample=False, return_full_text=False, **OPTIONS)[0][
        "generated_text"
    ]
    ours = greedy(model, [[tokenizer.begin_id, *tokenizer.encode("A whale")]])[0]
    assert text == tokenizer.decode(ours)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_another_process_needs_the_import_and_no_code(face, tmp_path):
    face.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    script = (
        "import sys, rorqual.hub.auto; from transformers import AutoModelForCausalLM;"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "RorqualForCausalLM", done.stderr
    script = (
        "import sys, rorqual as rq; run = rq.load(sys.argv[1]); "
        "from transformers import AutoModelForCausalLM;"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__, run.config.layers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "RorqualForCausalLM 2", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "import rorqual; assert 'transformers' not in sys.modules; import transformers; "
        "assert 'rorqual.hub.auto' not in sys.modules",
        "import importlib.util as util, rorqual; util.find_spec('transformers.models.auto')",
        "import transformers; import rorqual",
        "import rorqual; from transformers.models.auto import configuration_auto",
        "import rorqual; import transformers.integrations.finegrained_fp8",
        "import rorqual; from transformers.models.deepseek_v3 import modeling_deepseek_v3",
        "import rorqual.hub.auto",
    ],
)
def test_rorqual_registers_itself_whichever_comes_first(script):
    script = f"import sys; {script}; from transformers import AutoConfig as auto; "
    script += "print(type(auto.for_model('rorqual')).__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split()[0] == "RorqualConfig", done.stderr[-2000:]


def test_what_it_cannot_take_is_refused(face):
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="got inputs_embeds, expected input_ids"):
        face(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match="got DynamicCache, expected a RorqualCache"):
        face(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        face(ids, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="resizing the vocabulary"):
        face.resize_token_embeddings(300)


def test_tokenizer_files_of_a_run_load_in_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert fast("A whale", add_special_tokens=False).input_ids == tokenizer.encode("A whale")


def arguments(folder, **changes) -> TrainingArguments:
    selected = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    selected |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    return TrainingArguments(output_dir=str(folder), **selected | changes)


def examples(count: int = 8) -> list[dict]:
    ids = torch.randint(280, (count, 12), generator=torch.Generator().manual_seed(3)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def test_trainer_of_transformers_trains_memory_too(tokenizer, tmp_path):
    """Trains with its default AdamW, then saves with the trainer and loads again."""
    model = LanguageModel(CONFIGS["all"], torch.from_numpy(tokenizer.canonical_map()), seed=2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    face = RorqualForCausalLM.of(model, tokenizer)
    trainer = Trainer(model=face, args=arguments(tmp_path), train_dataset=examples())
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.3
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not still
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_trainer_sums_micro_batches_as_one_batch(tokenizer, tmp_path):
    trained = []
    for rows, parts in ((4, 1), (2, 2)):
        model = LanguageModel(CONFIGS["tied"], seed=2)
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        args = arguments(
            tmp_path, max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **sizes
        )
        Trainer(model=RorqualForCausalLM.of(model), args=args, train_dataset=examples(4)).train()
        trained.append(model.embed.weight)
    torch.testing.assert_close(*trained, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_training_with_rows_elsewhere_is_refused(placement, small_run, tmp_path):
    model = load(small_run, device="cpu", placement=placement).model
    face = RorqualForCausalLM.of(model)
    trainer = Trainer(model=face, args=arguments(tmp_path), train_dataset=examples())
    with pytest.raises(
        ValueError, match=rf"got rows on {placement}, .* expected them on the device"
    ):
        trainer.train()
    ids = torch.tensor([PROMPTS[0]])
    assert face.eval()(ids, labels=ids).loss.isfinite()  # scoring is allowed
    face.train().requires_grad_(False)
    assert face(ids, labels=ids).loss.isfinite()


def test_a_run_folder_opens_in_transformers(small_run, tmp_path):
    """Opens the model, the tokenizer and a pipeline with the run's output by its config.json."""
    run = load(small_run, device="cpu")
    ids = torch.tensor([PROMPTS[0]])
    config = AutoConfig.from_pretrained(small_run)
    assert isinstance(config, RorqualConfig) and config.model == run.config
    assert (config.eos_token_id, config.architectures) == (
        run.tokenizer.end_id,
        ["RorqualForCausalLM"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(small_run)
    assert isinstance(theirs, RorqualForCausalLM)
    torch.testing.assert_close(theirs(ids).logits, run.model(ids), atol=1e-5, rtol=1e-5)
    assert all(
        map(torch.equal, theirs.model.state_dict().values(), run.model.state_dict().values())
    )
    writer = pipeline("text-generation", str(small_run))
    text = writer("A whale", do_sample=False, max_new_tokens=8, return_full_text=False)[0][
        "generated_text"
    ]
    assert text == run.generate("A whale", max_new_tokens=8, temperature=0.0)
    theirs.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu").model.state_dict().values()
    assert all(map(torch.equal, again, run.model.state_dict().values()))


def test_a_tied_run_opens_in_transformers(tokenizer, tmp_path):
    model = LanguageModel(CONFIGS["tied"], seed=2).eval()
    save_model(tmp_path, model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([PROMPTS[0]])
    assert (
        theirs.config.tie_word_embeddings and theirs.model.head.weight is theirs.model.embed.weight
    )
    torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


def test_weights_that_are_missing_are_named(small_run, tmp_path):
    """They are missing where Engram's rows were trained on a disk and have their own files."""
    shutil.copytree(small_run, tmp_path / "run")
    state = load_file(tmp_path / "run" / "model.safetensors")
    state.pop("tables.0.weight")
    save_file(state, tmp_path / "run" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"run: got no 'tables.0.weight' \(1 missing\), expected all weights"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_peft_trains_saves_loads_and_merges(face, tmp_path):
    ids = torch.tensor([PROMPTS[0]])
    before = {name: tensor.clone() for name, tensor in face.state_dict().items()}
    plain = face(ids).logits
    lora = LoraConfig(
        target_modules=r".*attention\.(kv_b_proj|o_proj|wq_b|wo_b|out_proj)",
        r=2,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    adapted = get_peft_model(face, lora).train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    first = adapted(input_ids=ids, labels=ids).loss
    first.backward()
    torch.optim.SGD(trained.values(), lr=0.02).step()
    assert adapted(input_ids=ids, labels=ids).loss < first
    adapted.eval()
    expected = adapted(ids).logits.detach()
    text = adapted.generate(input_ids=ids, do_sample=False, **OPTIONS)
    adapted.save_pretrained(tmp_path)
    adapted.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in face.state_dict().items())
    torch.testing.assert_close(face(ids).logits, plain)
    again = PeftModel.from_pretrained(copy.deepcopy(face), tmp_path)
    torch.testing.assert_close(again(ids).logits, expected)
    merged = again.merge_and_unload()
    assert isinstance(merged, RorqualForCausalLM) and merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged.generate(ids, do_sample=False, **OPTIONS), text)
