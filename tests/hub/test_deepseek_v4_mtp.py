"""Tests multi-token prediction of DeepSeek-V4: folders, drafts, loss, gradients, decoding.

transformers ignores `mtp.*`. Its layers compute the blocks here; what is around them is written
from the equations in layers/mtp.py.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from rorqual.cli.main import main
from rorqual.costs import costs
from rorqual.hub import checkpoints, deepseek_v4
from rorqual.hub.formats import ROWS, decode, encode_e2m1, encode_e4m3
from rorqual.layers.csa import CSA, HCA, SharedKV
from rorqual.model import LanguageModel
from rorqual.model_config import HyperConfig, ModelConfig, MTPConfig
from rorqual.presets import preset
from rorqual.serve import decoding
from rorqual.serve.drafts import AcceptanceStats

sys.path.insert(0, str(Path(__file__).parent))
from doubles import Doubles, gradients
from random_deepseek_v4 import KINDS, MODEL, oracle_config

# Seed of the configuration, and the kind of block of each depth.
CASES = [(0, KINDS[:1]), (3, KINDS[:1]), (4, (KINDS[0], KINDS[1])), (8, (KINDS[2],))]
MTP_NAMES = ("enorm", "hnorm", "e_proj", "h_proj", "norm", "hc_head_")


class Oracle:
    """transformers' model, whose last layers are the blocks of MTP, and MTP's other tensors."""

    def __init__(self, seed: int, kinds: tuple[str, ...]) -> None:
        torch.manual_seed(seed)
        # transformers keeps the row of a padding id fixed.
        fields = oracle_config(seed).to_dict() | {"pad_token_id": None}
        self.layers, self.depth = fields["num_hidden_layers"], len(kinds)
        fields["num_hidden_layers"] += self.depth
        fields["layer_types"] = [*fields["layer_types"], *kinds]
        fields["mlp_layer_types"] = [*fields["mlp_layer_types"], *["moe"] * self.depth]
        if set(kinds) != {KINDS[0]}:
            # The kinds of MTP's blocks are published as sizes of entries.
            fields["compress_rates"] = {KINDS[1]: 4, KINDS[2]: 128}
        self.model = MODEL(MODEL.config_class(**fields)).eval()
        dim = self.model.config.hidden_size
        streams = self.model.config.hc_mult
        shapes = {
            "enorm.weight": (dim,),
            "hnorm.weight": (dim,),
            "norm.weight": (dim,),
            "e_proj.weight": (dim, dim),
            "h_proj.weight": (dim, dim),
            "hc_head_fn": (streams, streams * dim),
            "hc_head_base": (streams,),
            "hc_head_scale": (1,),
        }
        self.mtp = {
            f"mtp.{depth}.{name}": torch.zeros(shape, requires_grad=True)
            for depth in range(self.depth)
            for name, shape in shapes.items()
        }
        named = [*self.model.named_parameters(), *self.mtp.items()]
        for name, parameter in named:
            drawn = torch.randn_like(parameter)
            parameter.data = 1 + 0.2 * drawn if "norm" in name else 0.3 * drawn
        for name, buffer in self.model.named_buffers():
            if name.endswith("tid2eid"):
                order = torch.rand(len(buffer), self.model.config.n_routed_experts).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))

    def save(self, folder: Path) -> None:
        """Writes the published names: the last layers' are `mtp.D`."""
        self.model.save_pretrained(folder)
        tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            name = deepseek_v4.canonical(name)
            first, _, rest = name.partition(".")
            number, _, rest = rest.partition(".")
            if first == "layers" and int(number) >= self.layers:
                name = f"mtp.{int(number) - self.layers}.{rest}"
            tensors[name] = tensor
        tensors |= {name: tensor.detach() for name, tensor in self.mtp.items()}
        save_file(tensors, folder / "model.safetensors")
        path = folder / "config.json"
        fields = json.loads(path.read_text())
        fields["num_hidden_layers"] = self.layers
        fields["num_nextn_predict_layers"] = self.depth
        ratios = {KINDS[0]: 0, KINDS[1]: 4, KINDS[2]: 128}
        fields["compress_ratios"] = [ratios[kind] for kind in fields["layer_types"]]
        for name in ("layer_types", "mlp_layer_types"):
            fields[name] = fields[name][: self.layers]
        path.write_text(json.dumps(fields))

    def logits(self, text: Tensor) -> list[Tensor]:
        """Returns the logits of the next token, and of each depth's, at all positions but the last.

        Depth k has none at k positions before it, whose target is behind the text.
        """
        caught = {}

        def catch(module, inputs, kwargs):
            caught["streams"], caught["kwargs"] = inputs[0], kwargs

        model = self.model.model
        eps = self.model.config.rms_norm_eps
        handle = model.layers[self.layers].register_forward_pre_hook(catch, with_kwargs=True)
        model(text[:, :-1], use_cache=False)
        handle.remove()
        x = caught["streams"]
        result = []
        result.append(self.model.lm_head(model.norm(model.hc_head(x))))
        for depth in range(self.depth):
            w = {name: self.mtp[f"mtp.{depth}.{name}"] for name in self.names()}
            following = beyond(text, depth)
            embedded = normed(model.embed_tokens(following), eps) * w["enorm.weight"]
            x = normed(x, eps) * w["hnorm.weight"]
            x = (embedded @ w["e_proj.weight"].T)[:, :, None] + x @ w["h_proj.weight"].T
            block = model.layers[self.layers + depth]
            x = block(x, **caught["kwargs"] | {"input_ids": following})
            mixes = normed(x.flatten(2), eps) @ w["hc_head_fn"].T
            mixes = torch.sigmoid(mixes * w["hc_head_scale"] + w["hc_head_base"])
            one = ((mixes + self.model.config.hc_eps)[..., None] * x).sum(2)
            drafted = self.model.lm_head(normed(one, eps) * w["norm.weight"])
            result.append(drafted[:, : -depth - 1])
        return result

    def names(self) -> list[str]:
        return [name.removeprefix("mtp.0.") for name in self.mtp if name.startswith("mtp.0.")]

    def loss(self, text: Tensor) -> Tensor:
        """Computes the next token's loss and 0.3 times the mean of the depths'."""
        nats = [
            F.cross_entropy(logits.flatten(0, 1), text[:, depth + 1 :].flatten())
            for depth, logits in enumerate(self.logits(text))
        ]
        return nats[0] + 0.3 * sum(nats[1:]) / self.depth

    def double(self) -> None:
        """Makes every parameter float64."""
        self.model.double()
        self.model.set_experts_implementation("eager")
        for tensor in self.mtp.values():
            tensor.data = tensor.data.double()

    def gradients(self) -> dict[str, Tensor]:
        """Returns all gradients, by transformers' names or those of `mtp`."""
        named = [*self.model.named_parameters(), *self.mtp.items()]
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def beyond(text: Tensor, depth: int) -> Tensor:
    """Returns the ids that MTP's `depth` reads, at all positions but the last.

    What stands in place of ids behind the text is read by no position that counts.
    """
    return F.pad(text[:, depth + 1 :], (0, depth))


def normed(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    largest = expected.abs().max().clamp_min(1e-6).item()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * largest)


def places_of(oracle: Oracle, config: ModelConfig) -> dict:
    """Maps the names of `Oracle.gradients` to places in our state dict."""
    table = dict(deepseek_v4.aliases(config))
    for name, tensor_place in deepseek_v4.places(config).items():
        if name.startswith("mtp."):
            _, number, rest = name.split(".", 2)
            layer = f"layers.{oracle.layers + int(number)}.{rest}"
            table[name if rest.startswith(MTP_NAMES) else deepseek_v4.transformers_name(layer)] = (
                tensor_place
            )
    for depth in range(oracle.depth):
        for theirs, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            layer = f"model.layers.{oracle.layers + depth}.mlp.experts.{theirs}"
            experts = f"mtp.{depth}.block.ffn.experts.{ours}"
            table[layer] = deepseek_v4.StateSlice(experts, (), transposed=True)
    return table


@pytest.mark.parametrize(("seed", "kinds"), CASES)
def test_drafts_loss_and_gradients_are_those_of_the_equations(
    seed: int, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    oracle = Oracle(seed, kinds)
    oracle.save(tmp_path)
    ours = checkpoints.load(tmp_path, dtype=torch.float32)
    assert ours.config.mtp == MTPConfig(depth=len(kinds), streams=True)
    text = torch.randint(ours.config.vocab_size, (2, 40))
    expected = oracle.logits(text)
    hidden = ours.hidden(text[:, :-1], for_mtp=True)[0]
    close(ours.logits(hidden), expected[0])
    for depth, logits in enumerate(expected[1:]):
        hidden = ours.draft(hidden, beyond(text, depth), depth=depth)[0]
        result = ours.head(ours.mtp[depth].head_input(hidden))
        close(result[:, : -depth - 1], logits)

    def ours_loss() -> Tensor:
        loss = ours.loss(text[:, :-1], text[:, 1:])
        return loss.next_token + 0.3 * loss.mtp

    close(ours_loss(), oracle.loss(text))
    # Gradients of scales are small differences of large sums, of which float32 keeps few digits.
    ours.double()
    oracle.double()
    with Doubles():
        result = gradients(ours, ours_loss)
        oracle.loss(text).backward()
    table = places_of(oracle, ours.config)
    for name, grad in oracle.gradients().items():
        close(table[name].of(result), grad)


@pytest.mark.parametrize(("seed", "kinds"), CASES[1:])
def test_folders_go_in_and_out(seed: int, kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Config and every tensor come back, under published names; transformers loads the folder."""
    oracle = Oracle(seed, kinds)
    oracle.save(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs", dtype=torch.float32)
    attentions = [type(module.block.attention) for module in ours.mtp]
    assert attentions == [
        {KINDS[0]: SharedKV, KINDS[1]: CSA, KINDS[2]: HCA}[kind] for kind in kinds
    ]
    checkpoints.export(ours, tmp_path / "ours")
    stored = load_file(tmp_path / "ours/model.safetensors")
    given = load_file(tmp_path / "theirs/model.safetensors")
    draft = {name: tensor for name, tensor in given.items() if name.startswith("mtp.")}
    assert draft.keys() == {name for name in stored if name.startswith("mtp.")}
    assert all(torch.equal(stored[name], tensor) for name, tensor in draft.items())
    again = checkpoints.load(tmp_path / "ours")
    assert again.config == ours.config
    fields = json.loads((tmp_path / "ours/config.json").read_text())
    assert fields["num_nextn_predict_layers"] == len(kinds)
    back = MODEL.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    ids = torch.randint(ours.config.vocab_size, (2, 30))
    with torch.no_grad():
        close(back(ids, use_cache=False).logits, ours(ids))


def test_quantised_tensors_are_decoded(tmp_path: Path) -> None:
    """The projections are float8 in blocks, the experts mxfp4, as released."""
    model = LanguageModel(replace(preset("v4-tiny"), mtp=MTPConfig(streams=True))).eval()
    checkpoints.export(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.startswith("mtp.0.")]:
        scale = f"{name.removesuffix('.weight')}.scale"
        if ".experts." in name:
            tensors[name], tensors[scale] = encode_e2m1(tensors[name])
        elif re.search(r"\.(e_proj|h_proj|wq_a|wo_b)\.weight", name):
            tensors[name], tensors[scale] = encode_e4m3(
                tensors[name], (128, 128), power_of_two=True
            )
        else:
            continue
        block = ROWS if ".experts." in name else (128, 128)
        expected[name] = decode(tensors[name], tensors[scale], block)
    save_file(tensors, tmp_path / "model.safetensors")
    state = checkpoints.load(tmp_path, dtype=torch.float32).state_dict()
    places = deepseek_v4.places(model.config)
    assert len(expected) == 4 + 3 * model.config.moe.routed
    for name, values in expected.items():
        assert torch.equal(places[name].of(state), values), name


def test_the_released_module_has_as_many_tensors() -> None:
    """DeepSeek-V4-Flash has 1575 tensors `mtp.0.*`, of which 778 are scales."""
    names = [n for n in deepseek_v4.places(preset("deepseek-v4-flash")) if n.startswith("mtp.0.")]
    quantised = r"\.(e_proj|h_proj|wq_a|wq_b|wkv|wo_a|wo_b|w1|w2|w3)\.weight"
    scaled = [name for name in names if re.search(quantised, name)]
    assert (len(names), len(scaled)) == (1575 - 778, 778)


def test_half_a_module_is_refused(tmp_path: Path) -> None:
    model = LanguageModel(replace(preset("v4-tiny"), mtp=MTPConfig(depth=2, streams=True)))
    checkpoints.export(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["mtp.1.e_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: mtp\.1\.e_proj\.weight"):
        checkpoints.load(tmp_path)


def test_dspark_is_read_past_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its layers have the same names as MTP's, and other parts beside the blocks."""
    model = LanguageModel(replace(preset("v4-tiny"), mtp=None)).eval()
    checkpoints.export(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"mtp.{n}.attn_norm.weight": torch.ones(64) for n in range(3)}
    tensors |= {
        "mtp.0.main_proj.weight": torch.zeros(64, 192).to(torch.float8_e4m3fn),
        "mtp.0.main_proj.scale": torch.zeros(1, 2, dtype=torch.uint8),
        "mtp.0.ffn.experts.0.w1.weight": torch.zeros(32, 32, dtype=torch.int8),
        "mtp.0.ffn.experts.0.w1.scale": torch.zeros(32, 2, dtype=torch.uint8),
        "mtp.2.markov_head.markov_w1.weight": torch.zeros(100, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = checkpoints.load(tmp_path)
    assert loaded.config.mtp is None
    (line,) = capsys.readouterr().err.strip().splitlines()
    size = 3 * 64 + 64 * 192 + 32 * 64 + 800
    assert line.endswith(f"skipped: DSpark draft, 3 layers, {size:,} parameters")
    ids = torch.randint(4096, (1, 30))
    torch.testing.assert_close(loaded(ids), model(ids))
    assert main(["params", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)[str(tmp_path)]["total"] == costs(model.config).total
    assert captured.err.strip() == line


def test_entries_of_compress_ratios_behind_the_layers_are_mtps() -> None:
    fields = {"model_type": "deepseek_v4", "num_hidden_layers": 3, "compress_ratios": [0, 4, 128]}
    names = ["mtp.0.enorm.weight", "mtp.1.enorm.weight"]

    def kinds(more: list[int]) -> tuple[str, ...]:
        fields["compress_ratios"] = [0, 4, 128, *more]
        return deepseek_v4.config_of(fields, names).csa.kinds[3:]

    assert kinds([]) == kinds([0]) == kinds([0, 0, 4]) == ()
    assert kinds([0, 4]) == ("window", "csa")
    assert kinds([128, 0]) == ("hca",)
    with pytest.raises(ValueError, match="compress_ratios: got 7"):
        kinds([0, 7])


@pytest.mark.parametrize(
    "hyper", [None, HyperConfig(kind="single_pass"), HyperConfig(kind="gated")], ids=str
)
def test_modules_on_streams_need_streams_of_their_kind(hyper: HyperConfig | None) -> None:
    kind = "none" if hyper is None else hyper.kind
    with pytest.raises(ValueError, match=f"mtp.streams: got hyper.kind {kind}, expected mhc"):
        ModelConfig(hyper=hyper, mtp=MTPConfig(streams=True))


def test_formats_for_other_modules_are_refused(tmp_path: Path) -> None:
    model = LanguageModel(replace(preset("v4-tiny"), mtp=MTPConfig()))
    with pytest.raises(ValueError, match="cannot hold MTP on one stream"):
        checkpoints.export(model, tmp_path)


def drafting_config(kinds: tuple[str, ...], depth: int) -> ModelConfig:
    tiny = preset("v4-tiny")
    csa = replace(tiny.csa, kinds=kinds, window=4, ratio=2, heavy_ratio=4, top_k=2, ties="topk")
    return replace(
        tiny,
        vocab_size=16,
        dim=32,
        layers=2,
        csa=csa,
        moe=replace(tiny.moe, routed=4, active=2, width=16),
        mtp=MTPConfig(depth=depth, streams=True),
    )


def trained(config: ModelConfig, steps: int) -> LanguageModel:
    """Trains a model on a cycle with errors, so that some drafts are accepted and some are not."""
    model = LanguageModel(config, seed=3).train()
    ids = (torch.arange(25)[None] * 5 + torch.arange(4)[:, None]) % 12
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = 13
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    ("kinds", "depth"), [(("csa", "window"), 1), (("csa", "hca", "window", "csa"), 2)], ids=str
)
def test_drafts_change_nothing(kinds: tuple[str, ...], depth: int) -> None:
    """Greedy decoding with drafts gives the same ids, for a batch of different lengths."""
    model = trained(drafting_config(kinds, depth), 2)
    stats = AcceptanceStats()
    prompts = [[0, 5, 10], [3, 8, 1, 6, 11, 4, 9, 2, 7], [13]]
    expected = list(decoding.decode(model, prompts, max_new_tokens=14))
    assert (
        list(decoding.speculate(model, prompts, max_new_tokens=14, acceptance_stats=stats))
        == expected
    )
    assert 0 < stats.accepted < stats.drafted
    assert stats.rounds < 13


def test_drafts_with_a_cache_are_those_without() -> None:
    model = LanguageModel(drafting_config(("csa", "hca", "csa"), 1), seed=1).eval()
    text = torch.randint(16, (2, 21))
    with torch.no_grad():
        hidden = model.hidden(text[:, :-1], for_mtp=True)[0]
        expected = model.draft(hidden, text[:, 1:])[0]
        cache = model.new_cache(2)
        start = 0
        results = []
        for count in (7, 1, 1, 4, 7):
            run = slice(start, start + count)
            piece = model.draft(hidden[:, run], text[:, 1:][:, run], cache=cache)[0]
            results.append(piece)
            start += count
    close(torch.cat(results, dim=1), expected)


def test_loss_of_packed_documents_is_that_of_each_alone() -> None:
    model = LanguageModel(drafting_config(("csa", "hca"), 2), seed=1).eval()
    lengths = [9, 4, 12]
    ids = torch.randint(16, (1, sum(lengths)))
    document_ids = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    labels = torch.randint(16, ids.shape)
    result = model.loss(ids, labels, document_ids=document_ids).mtp
    alone = torch.zeros(2)
    counts = torch.zeros(2)
    for document, targets in zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True):
        hidden = model.hidden(document, for_mtp=True)[0]
        for depth in range(2):
            following = F.pad(document[:, depth + 1 :], (0, depth + 1))
            following[:, -depth - 1] = targets[:, -1] if depth == 0 else 0
            hidden = model.draft(hidden, following, depth=depth)[0]
            logits = model.head(model.mtp[depth].head_input(hidden))[0, : -depth - 1]
            alone[depth] += F.cross_entropy(logits, targets[0, depth + 1 :], reduction="sum")
            counts[depth] += len(logits)
    close(result, (alone / counts).mean())
