"""Tests the compiled decoding step against the model, for every architecture that it supports.

All others must be left to the model itself.
"""

import fcntl
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rorqual.kernels import step as kernel
from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.cache import Cache
from rorqual.layers.csa import CSAConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.rope import RopeConfig, YarnConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.model_config import ROUTER_SCORES
from rorqual.serve import step as serve_step
from rorqual.serve.decoding import decode
from rorqual.serve.engine import Engine
from rorqual.serve.step import Decoder, fits

pytestmark = pytest.mark.skipif(
    serve_step.STEP.kind(torch.device("cpu")) == "reference",
    reason="numba is not installed",
)
BASE = ModelConfig(
    vocab_size=67,
    dim=20,
    layers=3,
    dense_width=23,
    mla=MLAConfig(heads=5, q_lora_rank=7, kv_lora_rank=9, nope_dim=6, rope_dim=4, value_dim=3),
    moe=MoEConfig(
        routed=12, active=3, shared=1, width=11, first_dense=1, router=RouterConfig(scale=2.5)
    ),
    init_std=0.4,
)
ENGRAM = EngramConfig(layers=(1,), rows_per_head=(40, 50), heads=2, head_dim=4)
SIZES = {
    "v3": BASE,
    "no query latent": replace(BASE, mla=replace(BASE.mla, q_lora_rank=None, heads=1, value_dim=8)),
    "dense": replace(BASE, moe=None),
    "no shared expert": replace(BASE, moe=replace(BASE.moe, shared=0)),
    "two shared": replace(BASE, moe=replace(BASE.moe, shared=2, first_dense=0), tied=True),
    "v2": replace(
        BASE,
        moe=replace(BASE.moe, router=RouterConfig(score="softmax", renormalise=False, bias=False)),
    ),
    # "v3" scores by sigmoid, "v2" by softmax.
    **{
        f"score {score}": replace(BASE, moe=replace(BASE.moe, router=RouterConfig(score=score)))
        for score in ROUTER_SCORES
        if score not in ("sigmoid", "softmax")
    },
    "groups": replace(BASE, moe=replace(BASE.moe, router=RouterConfig(groups=4, groups_kept=2))),
    "groups by max": replace(
        BASE, moe=replace(BASE.moe, router=RouterConfig(groups=6, groups_kept=3, group_score="max"))
    ),
    "yarn": replace(
        BASE, rope=RopeConfig(base=40.0, yarn=YarnConfig(factor=4.0, original_length=16))
    ),
    "half-split pairs": replace(BASE, rope=RopeConfig(interleaved=False), eps=1e-3),
    "even sizes": replace(
        BASE, mla=replace(BASE.mla, heads=8, kv_lora_rank=16, nope_dim=8, value_dim=8)
    ),
    "streams": replace(BASE, hyper=HyperConfig(streams=3, scale=0.5)),
    "two streams of the paper": replace(BASE, hyper=HyperConfig(streams=2, eps=0.0, scale=0.5)),
    "single pass": replace(
        BASE, hyper=HyperConfig(kind="single_pass", iterations=4, norm_eps=1e-3, scale=0.5)
    ),
    "memory": replace(BASE, engram=ENGRAM),
    "memory in the first block": replace(
        BASE, engram=replace(ENGRAM, layers=(0, 2), gating="shared"), moe=None
    ),
    "all of it": replace(BASE, engram=ENGRAM, hyper=HyperConfig(scale=0.5)),
    "clipped, experts by token id": replace(
        BASE, moe=replace(BASE.moe, swiglu_limit=0.7, router=RouterConfig(token_id_layers=2))
    ),
}
# They differ from "v3" inside of one thread's part alone.
ALIKE = {
    "two shared",
    "v2",
    "score sqrtsoftplus",
    "groups",
    "groups by max",
    "yarn",
    "half-split pairs",
}
# Their attention is a module between compiled parts.
MODULES = {
    "gqa": replace(BASE, mla=None, gqa=GQAConfig(heads=2, kv_heads=1, head_dim=4)),
    "bias": replace(BASE, mla=replace(BASE.mla, bias=True)),
    "dsa, memory": replace(BASE, dsa=DSAConfig(heads=2, dim=8, top_k=6), engram=ENGRAM),
    "dsa, shared and tied": replace(
        BASE, dsa=DSAConfig(heads=2, dim=8, top_k=6, shared=(1,), ties="topk")
    ),
    "v4": replace(
        BASE,
        layers=4,
        mla=None,
        csa=CSAConfig(
            heads=4, head_dim=8, rope_dim=4, q_lora_rank=6, groups=2, o_lora_rank=5, window=5,
            ratio=3, heavy_ratio=4, index_heads=3, index_dim=6, top_k=2,
            kinds=("window", "csa", "hca", "csa"),
        ),
        moe=replace(
            BASE.moe,
            first_dense=0,
            swiglu_limit=0.7,
            router=RouterConfig(score="sqrtsoftplus", token_id_layers=1),
        ),
        hyper=HyperConfig(scale=0.5),
    ),
    "single pass, memory": replace(
        BASE,
        mla=None,
        gqa=GQAConfig(heads=2, kv_heads=1, head_dim=4),
        engram=replace(ENGRAM, layers=(0, 2)),
        hyper=HyperConfig(kind="single_pass", scale=0.5),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def ready():
    kernel.Step.build()


def run_on(threads: int, monkeypatch) -> None:
    """Lets the step run on so many threads, and leaves torch the number it has."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def build(config: ModelConfig) -> LanguageModel:
    """Builds a model with router biases of both signs.

    They affect the selection of experts and not their weights.
    """
    model = LanguageModel(config, torch.arange(config.vocab_size), seed=1).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(
                torch.randn(buffer.shape, generator=torch.Generator().manual_seed(3)) - 0.5
            )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    return model


def ids_of(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 67, (batch, length), generator=torch.Generator().manual_seed(length))


def decoder(model: LanguageModel, cache: Cache) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a step over one cache."""
    step = Decoder(model)
    return lambda ids: step(ids, cache)


@torch.inference_mode()
def steps(model, ids, prompt_length, capacity=4):
    """Returns the logits of the ids after the first `prompt_length`, id by id, and the resulting
    cache.
    """
    cache = model.new_cache(1, capacity)
    model.hidden(ids[:, :prompt_length], cache=cache)
    step = decoder(model, cache)
    return torch.stack(
        [step(ids[:, t : t + 1]) for t in range(prompt_length, ids.shape[1])], 1
    ), cache


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", SIZES)
def test_every_step_equals_the_model(name, threads, poisoned, monkeypatch):
    run_on(threads, monkeypatch)
    model = build(SIZES[name])
    ids = ids_of(30)
    assert fits(model)
    result, cache = steps(model, ids, 5)
    with torch.no_grad():
        expected = model(ids)[:, 5:]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    whole = model.new_cache(1)
    with torch.no_grad():
        model.hidden(ids, cache=whole)
    for ours, theirs in zip(cache.layers, whole.layers, strict=True):
        ours, theirs = (piece.attention.latent.buffer[:, :30] for piece in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert cache.length == 30


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_modules_attend_between_compiled_parts(name, threads, poisoned, monkeypatch):
    """Logits are the model's, of sequences alone and of a batch of different lengths."""
    run_on(threads, monkeypatch)
    model = build(MODULES[name])
    ids = ids_of(30, 3)
    for lengths in ([5], [5, 17, 9]):
        cache = model.new_cache(len(lengths))
        longest = max(lengths)
        model.hidden(ids[: len(lengths), :longest], lengths=lengths, cache=cache)
        step = Decoder(model)
        for turn in range(13):
            new = [one[length + turn] for one, length in zip(ids, lengths, strict=False)]
            result = step(torch.stack(new)[:, None], cache)
            for slot, length in enumerate(lengths):
                expected = model(ids[slot : slot + 1, : length + turn + 1])[0, -1]
                bound = 1e-5 * expected.abs().max().item()
                torch.testing.assert_close(result[slot], expected, rtol=0, atol=bound)
        assert step.compiled is not None


# More threads than cores wait for each other, which is slow.
ON_THREADS = [
    pytest.param(name, threads, marks=pytest.mark.slow if threads == 3 and name in ALIKE else [])
    for name in SIZES
    for threads in (1, 3)
]


@torch.inference_mode()
@pytest.mark.parametrize(("name", "threads"), ON_THREADS)
def test_sequences_of_different_lengths_get_what_each_gets_alone(
    name, threads, poisoned, monkeypatch
):
    """They get the same bits, but with Engram, whose products are torch's."""
    run_on(threads, monkeypatch)
    model = build(SIZES[name])
    ids = ids_of(75, 6)
    lengths = [61, 3, 60, 1, 64, 13]
    prompts = [one[:length] for one, length in zip(ids, lengths, strict=True)]
    caches = []
    for prompt in prompts:
        caches.append(model.new_cache(1))
        model.hidden(prompt[None], cache=caches[-1])
    alone = [decoder(model, cache) for cache in caches]
    expected = [
        [step(one[None, t : t + 1]) for t in range(64, 75)]
        for one, step in zip(ids, alone, strict=True)
    ]
    together = model.new_cache(1)
    model.hidden(prompts[0][None], cache=together)
    for prompt in prompts[1:]:
        other = model.new_cache(1)
        model.hidden(prompt[None], cache=other)
        together.join(other)
    step = decoder(model, together)
    for t in range(64, 75):
        result = step(ids[:, t : t + 1])
        wanted = torch.cat([steps[t - 64] for steps in expected])
        within = 0 if model.config.engram is None else 1e-5 * wanted.abs().max().item()
        torch.testing.assert_close(result, wanted, rtol=0, atol=within)
    assert together.lengths == tuple(length + 11 for length in lengths)


@torch.inference_mode()
def test_the_engine_gives_every_request_what_it_gets_alone():
    model = build(SIZES["all of it"])
    prompts = ids_of(20, 5).tolist()
    prompts = [prompt[: 4 + 3 * number] for number, prompt in enumerate(prompts)]
    engine = Engine(model, max_batch_size=3)
    generated = engine.run(prompts, max_new_tokens=25)
    for prompt, ids in zip(prompts, generated, strict=True):
        assert ids == [token for (token,) in decode(model, [prompt], max_new_tokens=25)]


@torch.inference_mode()
def test_a_long_context_crosses_every_tile():
    model = build(SIZES["even sizes"])
    ids = ids_of(331)
    result, _ = steps(model, ids, 250, capacity=400)
    expected = model(ids)[:, 250:]
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@torch.inference_mode()
def test_the_model_goes_on_where_the_step_stopped_and_back():
    model = build(BASE)
    ids = ids_of(24)
    _, cache = steps(model, ids[:, :12], 6)
    cache.crop(2)
    middle = model(ids[:, 10:18], cache=cache)
    step = decoder(model, cache)
    last = torch.stack([step(ids[:, t : t + 1]) for t in range(18, 24)], 1)
    expected = model(ids)[:, 10:]
    scale = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(torch.cat([middle, last], 1), expected, rtol=0, atol=scale)


@torch.inference_mode()
def test_weights_changed_in_place_are_seen():
    model = build(BASE)
    ids = ids_of(8)
    cache = model.new_cache(1)
    model.hidden(ids[:, :7], cache=cache)
    step = decoder(model, cache)
    model.head.weight.mul_(2)
    expected = model(ids)[:, -1]
    torch.testing.assert_close(
        step(ids[:, 7:]), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


@torch.inference_mode()
def test_three_hundred_steps_while_the_cache_grows_and_drops():
    model = build(SIZES["even sizes"])
    ids = ids_of(320)
    cache = model.new_cache(1, 2)
    model.hidden(ids[:, :20], cache=cache)
    step = decoder(model, cache)
    result = []
    for t in range(20, 320):
        if t % 50 == 0:  # drafts that were rejected
            for wrong in range(3):
                step(ids[:, wrong : wrong + 1])
            cache.crop(3)
            cache.select(torch.tensor([0]))
        result.append(step(ids[:, t : t + 1]))
    expected = model(ids)[:, 20:]
    torch.testing.assert_close(
        torch.stack(result, 1), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_generations_in_several_threads_do_not_meet(monkeypatch):
    run_on(2, monkeypatch)
    models = [build(BASE), build(SIZES["even sizes"]), build(SIZES["dense"])]

    def generated(model):
        return [token for (token,) in decode(model, [[3, 5, 7]], max_new_tokens=40)]

    alone = [generated(model) for model in models]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(generated, models)) == alone


@torch.inference_mode()
@pytest.mark.parametrize("asked", [1, 2])
def test_an_interrupt_leaves_nobody_waiting(asked, monkeypatch):
    run_on(3, monkeypatch)
    model = build(BASE)
    ids = ids_of(9)
    cache = model.new_cache(1)
    model.hidden(ids[:, :7], cache=cache)
    decode_step = Decoder(model)
    step = lambda ids: decode_step(ids, cache)  # noqa: E731
    step(ids[:, 7:8])
    pool = decode_step.compiled.step.pool
    submit = pool.submit
    calls = []

    def interrupted(*prompt_length):
        calls.append(prompt_length)
        if len(calls) == asked:
            raise KeyboardInterrupt
        return submit(*prompt_length)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(ids[:, 8:])
    cache.crop(1)
    expected = model(ids)[:, -1]
    torch.testing.assert_close(
        step(ids[:, 8:]), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


@torch.inference_mode()
def test_weights_that_are_replaced_go_on_to_the_end_of_the_generation():
    model = build(BASE)
    ids = ids_of(9)
    expected = model(ids)[:, 7:]
    cache = model.new_cache(1)
    model.hidden(ids[:, :7], cache=cache)
    step = decoder(model, cache)
    results = [step(ids[:, 7:8])]
    model.load_state_dict(
        {name: torch.zeros_like(value) for name, value in model.state_dict().items()}, assign=True
    )
    model.double()
    # These tensors reuse the memory that was freed.
    rubbish = [torch.full_like(value, 7.0) for value in model.parameters()]
    results.append(step(ids[:, 8:]))
    assert len(rubbish)
    torch.testing.assert_close(
        torch.stack(results, 1), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_every_model_runs_the_same_machine_code():
    for config in SIZES.values():
        steps(build(config), ids_of(6), 3)
    assert len(kernel.CODE.signatures) == 1


@pytest.fixture
def no_build():
    """A process that has not started to compile, before the test and after it."""
    serve_step.start_build.cache_clear()
    yield
    serve_step.start_build.cache_clear()


@pytest.mark.slow
def test_the_first_generation_has_the_step_compiled_for_the_next(monkeypatch, no_build, capsys):
    started = []
    monkeypatch.setattr(kernel.Step, "is_cached", staticmethod(lambda: False))
    monkeypatch.setattr(
        serve_step.subprocess, "Popen", lambda command, **_: started.append(command)
    )
    model = build(BASE)
    text = [[token for (token,) in decode(model, [[3, 5, 7]], max_new_tokens=9)] for _ in range(2)]
    assert len(started) == 1
    assert capsys.readouterr().err.count("compiling the decoding step") == 1
    monkeypatch.undo()
    assert text == [[token for (token,) in decode(model, [[3, 5, 7]], max_new_tokens=9)]] * 2
    code = started[0][-1].replace("step.keep()", "print(step.__name__)")
    assert (
        subprocess.run([started[0][0], "-c", code], capture_output=True, text=True).stdout
        == "Step\n"
    )


@pytest.mark.parametrize("code", [0, 1])
def test_a_server_waits_for_the_step(monkeypatch, no_build, capsys, code):
    """It is built by its own process, or by another's while its own ends at once."""
    asked = []

    class Process:
        def __init__(self, *arguments, **options):
            pass

        def wait(self, timeout):
            asked.append("wait")

        def poll(self):
            return code

    def is_cached():
        asked.append("is cached")
        return code == 0 and asked.count("is cached") > 3

    monkeypatch.setattr(kernel.Step, "is_cached", staticmethod(is_cached))
    monkeypatch.setattr(serve_step.subprocess, "Popen", Process)
    serve_step.Decoder(build(BASE)).wait_until_built()
    assert asked[:2] == ["is cached", "wait"]
    lines = capsys.readouterr().err
    assert lines.count("waiting for the decoding step to be compiled") == 1
    assert ("was not compiled" in lines) == (code == 1)


def test_without_a_place_to_keep_it_nothing_is_compiled(monkeypatch, no_build, capsys):
    monkeypatch.setattr(kernel.Step, "keepable", staticmethod(lambda: False))
    monkeypatch.setattr(serve_step.subprocess, "Popen", None)
    assert serve_step.start_build(kernel.Step) is None
    assert "NUMBA_CACHE_DIR" in capsys.readouterr().err


def test_one_process_compiles_at_a_time(monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(kernel.Step, "build", staticmethod(lambda: built.append(1)))
    monkeypatch.setattr(
        kernel, "CODE", type("", (), {"stats": type("", (), {"cache_path": str(tmp_path / "new")})})
    )
    kernel.Step.keep()
    assert built == [1]
    with (Path(tmp_path) / "new" / "step.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel.Step.keep()
    assert built == [1]


class Adapted(nn.Linear):
    pass


class Adapter(nn.Module):
    """Contains plain layers and no weights of its own, as LoRA does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.more(x)


def adapt(model: LanguageModel) -> None:
    model.blocks[1].attention.q_b_proj.__class__ = Adapted


def wrap(model: LanguageModel) -> None:
    model.blocks[1].attention.q_b_proj = Adapter(model.blocks[1].attention.q_b_proj)


def patch(model: LanguageModel) -> None:
    layer = model.blocks[1].attention.o_proj
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)


def exchange(model: LanguageModel) -> None:
    model.blocks[1].ffn.exchange = lambda rows, counts, experts: lambda: experts(rows, counts)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.train(),
        lambda model: model.blocks[2].register_forward_hook(lambda *_: None),
        adapt,
        wrap,
        patch,
        exchange,
    ],
)
def test_what_it_does_not_know_it_leaves_alone(change):
    model = build(BASE)
    change(model)
    assert not fits(model)


@pytest.mark.parametrize(
    "config",
    [
        replace(BASE, hyper=HyperConfig(kind="hc")),
        replace(BASE, hyper=HyperConfig(mix="identity")),
        replace(BASE, moe=replace(BASE.moe, router=RouterConfig(adaptive_mass=0.9))),
    ],
)
def test_other_architectures_are_the_models_own(config):
    model = build(config)
    assert not fits(model)
    assert len([token for (token,) in decode(model, [[3, 5, 7]], max_new_tokens=3)]) == 3


@torch.inference_mode()
def test_padding_and_documents_are_the_models_own():
    model = build(BASE)
    ids = ids_of(6)
    for reference in (
        {"lengths": [5]},
        {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 1]])},
    ):
        cache = model.new_cache(1)
        model.hidden(ids, cache=cache, **reference)
        both = model.new_cache(1)
        model.hidden(ids, cache=both, **reference)
        expected = model(ids[:, :1], cache=both)[:, 0]
        torch.testing.assert_close(decoder(model, cache)(ids[:, :1]), expected)


def test_the_environment_chooses_the_reference(monkeypatch):
    model = build(BASE)
    fast = [token for (token,) in decode(model, [[3, 5, 7]], max_new_tokens=9)]
    monkeypatch.setenv("RORQUAL_KERNELS", "decode_step=reference")
    assert [token for (token,) in decode(model, [[3, 5, 7]], max_new_tokens=9)] == fast
