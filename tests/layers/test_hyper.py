from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)

from rorqual.config import from_dict
from rorqual.layers.hyper import (
    Connection,
    HyperConfig,
    Residual,
    StreamReduction,
    Streams,
    composite_gain,
    expand,
    health,
    spread,
)

KINDS = {
    "mhc": HyperConfig(),
    "mhc, 3 streams": HyperConfig(streams=3),
    "mhc, 1 stream": HyperConfig(streams=1),
    "single pass": HyperConfig(kind="single_pass"),
    "hc": HyperConfig(kind="hc"),
    "identity": HyperConfig(mix="identity"),
    "identity, single pass, 3 streams": HyperConfig(kind="single_pass", mix="identity", streams=3),
}


def stirred(module: nn.Module, std: float = 1.0) -> nn.Module:
    """Moves every parameter far from its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn_like(parameter)
                * std
                * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1)
            )
    return module


def theirs(dim: int, config: HyperConfig, cls=DeepseekV4HyperConnection) -> nn.Module:
    sizes = {"hc_mult": config.streams, "hc_sinkhorn_iters": config.iterations, "hidden_size": dim}
    return cls(SimpleNamespace(**sizes, hc_eps=config.eps, rms_norm_eps=config.norm_eps))


RELEASED = [  # the released config, and others that a config.json may contain
    HyperConfig(),
    HyperConfig(streams=3),
    HyperConfig(streams=1, iterations=2),
    HyperConfig(streams=2, iterations=1, eps=1e-3, norm_eps=1e-5),
    HyperConfig(streams=8, iterations=5, eps=1e-2, norm_eps=0.1),
]


def through(site: nn.Module, x: torch.Tensor, sublayer, pre: torch.Tensor | None = None):
    """Returns the streams after one sublayer, and the pre-mapping that is handed on."""
    u, mapping = site.read(Streams(x, pre))
    return site.write(sublayer(u), mapping)


def plain(config: HyperConfig, site: Connection, x: torch.Tensor, sublayer) -> torch.Tensor:
    """Computes the equations of the module's docstring, one token and stream at a time.

    Gradients come from autograd alone.
    """
    mixer = site.mixer
    S = config.streams
    out = torch.empty_like(x)
    for b, t in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        f = x[b, t].flatten()
        m = mixer.fn @ f / (f.square().mean() + 1e-6).sqrt()
        pre = torch.sigmoid(m[:S] * mixer.scale[0] + mixer.base[:S]) + 1e-6
        post = 2 * torch.sigmoid(m[S : 2 * S] * mixer.scale[1] + mixer.base[S : 2 * S])
        c = ((m[2 * S :] * mixer.scale[2] + mixer.base[2 * S :]).view(S, S)).softmax(1) + 1e-6
        c = c / (c.sum(0) + 1e-6)
        for _ in range(config.iterations - 1):
            c = c / (c.sum(1, keepdim=True) + 1e-6)
            c = c / (c.sum(0, keepdim=True) + 1e-6)
        result = sublayer(sum(pre[i] * x[b, t, i] for i in range(S)))
        out[b, t] = torch.stack(
            [post[k] * result + sum(c[j, k] * x[b, t, j] for j in range(S)) for k in range(S)]
        )
    return out


def close(ours, expected, tolerance=1e-6):
    torch.testing.assert_close(
        ours, expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=0
    )


class TestDeepSeekV4:
    @pytest.mark.parametrize("config", RELEASED, ids=str)
    @pytest.mark.parametrize(("dim", "time"), [(24, 7), (5, 1), (64, 33)])
    def test_coefficients_forward_and_backward(self, config, dim, time):
        streams = config.streams
        reference = stirred(theirs(dim, config))
        site = Connection(config, dim)
        site.mixer.load_state_dict(reference.state_dict())
        x = torch.randn(2, time, streams, dim, requires_grad=True)
        pulls = (
            torch.randn(2, time, streams),
            torch.randn(2, time, streams, streams),
            torch.randn(2, time, dim),
        )
        post, comb, u = reference(x)
        sum((a * b).sum() for a, b in zip((post, comb, u), pulls, strict=True)).backward()
        expected = x.grad
        x.grad = None
        got = site.coefficients(x)
        read = (got.pre.unsqueeze(-1) * x).sum(2)
        for a, b in zip((got.post, got.comb, read), (post, comb, u), strict=True):
            close(a, b)
        sum(
            (a * b).sum() for a, b in zip((got.post, got.comb, read), pulls, strict=True)
        ).backward()
        close(x.grad, expected)
        for a, b in zip(site.mixer.parameters(), reference.parameters(), strict=True):
            close(a.grad, b.grad, 3e-6)

    def test_a_whole_decoder_layer_holds_the_transpose(self):
        dim = 16
        layer = DeepseekV4DecoderLayer.__new__(DeepseekV4DecoderLayer)
        nn.Module.__init__(layer)
        mix = nn.Linear(dim, dim)
        feed = nn.Linear(dim, dim)
        layer.attn_hc, layer.ffn_hc = (stirred(theirs(dim, HyperConfig())) for _ in range(2))
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(dim), nn.RMSNorm(dim)

        class Attention(nn.Module):
            def forward(self, hidden):
                return mix(hidden).cumsum(1), None

        class Experts(nn.Module):
            def forward(self, hidden, input_ids=None):
                return feed(hidden).tanh()

        layer.self_attn, layer.mlp = Attention(), Experts()
        sites = [Connection(HyperConfig(), dim, n) for n in range(2)]
        for site, reference in zip(sites, (layer.attn_hc, layer.ffn_hc), strict=True):
            site.mixer.load_state_dict(reference.state_dict())
        x = torch.randn(2, 9, 4, dim, requires_grad=True)
        expected = DeepseekV4DecoderLayer.forward(layer, x)
        ours, _ = through(sites[0], x, lambda u: mix(layer.input_layernorm(u)).cumsum(1))
        ours, _ = through(sites[1], ours, lambda u: feed(layer.post_attention_layernorm(u)).tanh())
        close(ours, expected)
        pull = torch.randn_like(expected)
        close(*(torch.autograd.grad((y * pull).sum(), x)[0] for y in (ours, expected)), 2e-6)

    @pytest.mark.parametrize("config", RELEASED, ids=str)
    def test_exit(self, config):
        reference = stirred(theirs(24, config, DeepseekV4HyperHead))
        reduction = StreamReduction(config, 24)
        reduction.load_state_dict(
            {name.removeprefix("hc_"): value for name, value in reference.state_dict().items()}
        )
        x = torch.randn(2, 5, config.streams, 24, requires_grad=True)
        close(reduction(Streams(x)), reference(x))
        pull = torch.randn(2, 5, 24)
        parameters = [list(module.parameters()) for module in (reduction, reference)]
        outs = (reduction(Streams(x)), parameters[0]), (reference(x), parameters[1])
        grads = (torch.autograd.grad((y * pull).sum(), [x, *inputs]) for y, inputs in outs)
        for a, b in zip(*grads, strict=True):
            close(a, b, 3e-6)

    @pytest.mark.parametrize("config", RELEASED, ids=str)
    def test_bfloat16_streams_are_read_as_theirs(self, config):
        """Their coefficients are float32, too; the stream that is read is rounded once."""
        reference = stirred(theirs(24, config))
        site = Connection(config, 24)
        seen = []
        site.mixer.load_state_dict(reference.state_dict())
        x = torch.randn(2, 5, config.streams, 24).bfloat16()
        post, comb, u = reference(x)
        got = site.coefficients(x)
        through(site, x, lambda hidden: seen.append(hidden) or hidden)
        for a, b in zip((got.post, got.comb), (post, comb), strict=True):
            close(a, b)
        assert seen[0].dtype == u.dtype == torch.bfloat16
        close(seen[0].float(), u.float(), 2**-8)

    def test_parameters_are_laid_out_as_released(self):
        shapes = {
            name: tuple(p.shape)
            for name, p in Connection(HyperConfig(), 24).mixer.named_parameters()
        }
        assert shapes == {"fn": (24, 96), "base": (24,), "scale": (3,)}


class TestPaper:
    """With eps=0, tests against the equations of arXiv:2512.24880 as they are printed there."""

    @staticmethod
    def paper(x, phi_pre, phi_post, phi_res, a, b_pre, b_post, b_res, sublayer):
        """Computes one site for x [S, D] of one token.

        H_res is applied without a transpose, and columns are normalised first.
        """
        S = len(x)
        normed = x.flatten() / (x.square().mean() + 1e-6).sqrt()
        pre = torch.sigmoid(a[0] * (normed @ phi_pre) + b_pre)
        post = 2 * torch.sigmoid(a[1] * (normed @ phi_post) + b_post)
        res = torch.exp(a[2] * (normed @ phi_res).view(S, S) + b_res)
        for _ in range(20):
            res = res / res.sum(0, keepdim=True)
            res = res / res.sum(1, keepdim=True)
        return res @ x + torch.outer(post, sublayer(pre @ x))

    @pytest.mark.parametrize("streams", [1, 2, 4])
    def test_a_site_is_its_equations(self, streams):
        S = streams
        dim = 6
        site = stirred(Connection(HyperConfig(streams=S, eps=0.0), dim)).double()
        x = torch.randn(1, 5, S, dim, dtype=torch.float64, requires_grad=True)
        pre, post, comb = site.mixer.fn.split([S, S, S * S])
        base = site.mixer.base.split([S, S, S * S])
        # comb[j, k] is the paper's [k, j].
        phi_res = comb.view(S, S, -1).transpose(0, 1).flatten(0, 1).T
        rest = (
            pre.T,
            post.T,
            phi_res,
            site.mixer.scale,
            base[0],
            base[1],
            base[2].view(S, S).T,
            torch.sin,
        )
        expected = torch.stack([self.paper(token, *rest) for token in x[0]])[None]
        ours = through(site, x, torch.sin)[0]
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
        pull = torch.randn_like(expected)
        inputs = [x, *site.parameters()]
        grads = (
            torch.autograd.grad((y * pull).sum(), inputs, retain_graph=True)
            for y in (ours, expected)
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)

    def test_the_two_arithmetics_differ(self):
        x = torch.randn(1, 9, 4, 8, dtype=torch.float64)
        one = stirred(Connection(HyperConfig(eps=0.0), 8)).double()
        other = Connection(HyperConfig(), 8).double()
        other.load_state_dict(one.state_dict())
        assert (
            1e-7
            < (through(one, x, torch.sin)[0] - through(other, x, torch.sin)[0]).abs().max()
            < 1e-4
        )


class TestAlone:
    """Tests against the equations, written out."""

    @pytest.mark.parametrize("streams", [1, 2, 4, 5])
    def test_a_site_is_its_equations(self, streams):
        config = HyperConfig(streams=streams, iterations=7)
        site = stirred(Connection(config, 6)).double()
        x = torch.randn(2, 3, streams, 6, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, 6, dtype=torch.float64)
        ours, _ = through(site, x, lambda u: (u @ weight).tanh())
        expected = plain(config, site, x, lambda u: (u @ weight).tanh())
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
        pull = torch.randn_like(expected)
        inputs = [x, *site.parameters()]
        grads = (
            torch.autograd.grad((y * pull).sum(), inputs, allow_unused=True)
            for y in (ours, expected)
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)

    @pytest.mark.parametrize("name", KINDS)
    def test_gradients(self, name):
        config = KINDS[name]
        sites = [stirred(Connection(config, 5, n)).double() for n in range(2)]
        reduction = stirred(StreamReduction(config, 5)).double()

        def run(hidden, *parameters):
            streams, handed_on = expand(hidden, config)
            for site in sites:
                streams, handed_on = through(site, streams, torch.tanh, handed_on)
            return reduction(Streams(streams, handed_on))

        parameters = [p for module in (*sites, reduction) for p in module.parameters()]
        hidden = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (hidden, *parameters), fast_mode=True)

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("name", KINDS)
    def test_reads_no_memory_that_it_did_not_write(self, name):
        site = Connection(KINDS[name], 7)
        x = torch.randn(1, 5, KINDS[name].streams, 7, requires_grad=True)
        out, _ = through(site, x, torch.tanh)
        out.sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("time", [0, 1])
    def test_few_tokens(self, time):
        for config in KINDS.values():
            out, handed_on = through(
                Connection(config, 6), torch.randn(2, time, config.streams, 6), torch.tanh
            )
            assert out.shape == (2, time, config.streams, 6)
            assert StreamReduction(config, 6)(Streams(out, handed_on)).shape == (2, time, 6)


class TestTraps:
    def test_comb_is_applied_transposed(self):
        site = Connection(HyperConfig(), 1)
        with torch.no_grad():
            site.mixer.base[8:] = torch.tensor(
                [[0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9], [9, 0, 0, 0.0]]
            ).flatten()
            site.mixer.base[4:8] = -50.0  # the sublayer's output gets no weight
        x = torch.arange(4.0).view(1, 1, 4, 1)
        out, _ = through(site, x, torch.zeros_like)
        close(out.flatten(), torch.tensor([3.0, 0.0, 1.0, 2.0]), 2e-3)  # stream j goes to j + 1

    def test_zero_phi_with_equal_biases_keeps_the_streams_equal_for_ever(self):
        def trained(reset):
            torch.manual_seed(1)
            sites = [Connection(HyperConfig(identity=0.0), 8, n) for n in range(4)]
            head = nn.Linear(8, 8)
            layers = [nn.Linear(8, 8) for _ in sites]
            for site in sites:
                reset(site)
            optimiser = torch.optim.SGD(
                [p for m in (*sites, *layers, head) for p in m.parameters()], lr=0.5
            )
            for _ in range(30):
                streams = expand(torch.randn(4, 8, 8), HyperConfig()).values
                hidden = None
                hidden = streams[:, :, 0]
                for site, layer in zip(sites, layers, strict=True):
                    streams, _ = through(site, streams, lambda u, layer=layer: layer(u).tanh())
                loss = (head(streams.mean(2)) - hidden.roll(1, -1)).square().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return spread(streams)

        assert trained(lambda site: site.mixer.fn.data.zero_()) < 1e-6
        assert trained(lambda site: None) > 1e-4

    def test_a_saturated_mix_starves_its_gradient(self):
        def gradient(identity):
            site = Connection(HyperConfig(identity=identity), 16)
            x = torch.randn(4, 8, 4, 16)
            out, _ = through(site, x, torch.tanh)
            (out * torch.randn_like(out)).sum().backward()
            return site.mixer.base.grad[8:].norm().item()

        assert gradient(16.0) < 1e-3 * gradient(HyperConfig().identity)

    def test_coefficients_of_bfloat16_streams_are_float32(self):
        site = stirred(Connection(HyperConfig(), 32)).bfloat16()
        x = torch.randn(2, 9, 4, 32).bfloat16()
        got = site.coefficients(x)
        assert {value.dtype for value in got} == {torch.float32}
        assert (got.comb.sum(-2) - 1).abs().max() < 1e-5
        # In bfloat16 the sums would be this far off.
        assert (got.comb.bfloat16().float().sum(-2) - 1).abs().max() > 1e-3
        out, handed_on = through(site, x, torch.tanh)
        assert out.dtype == torch.bfloat16
        assert handed_on.dtype == torch.float32
        double = stirred(Connection(HyperConfig(), 32)).double()
        double.load_state_dict(site.state_dict())
        close(out.double(), through(double, x.double(), torch.tanh)[0], 2**-8)

    @pytest.mark.parametrize("name", KINDS)
    def test_autocast_rounds_no_coefficient(self, name):
        config = KINDS[name]
        site = stirred(Connection(config, 32))
        reduction = stirred(StreamReduction(config, 32))
        x = torch.randn(2, 9, config.streams, 32)
        weight = torch.randn(32, 32) / 6

        def run():
            out, handed_on = through(site, x, lambda u: (u @ weight).float())
            return *site.coefficients(x), reduction(Streams(out.detach(), handed_on))

        expected = run()
        with torch.autocast("cpu", torch.bfloat16):
            ours = run()
        for a, b in zip(ours[:3], expected[:3], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a, b)
        assert ours[3].dtype == torch.float32
        close(ours[3], expected[3], 2e-2)  # the sublayer's own product is rounded
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(
                through(site, x, torch.sin)[0], eager := through(site, x, torch.sin)[0]
            )
        assert torch.equal(eager, through(site, x, torch.sin)[0])

    @pytest.mark.parametrize("config", [HyperConfig(), HyperConfig(kind="hc")], ids=str)
    def test_equal_streams_make_the_plain_residual_network(self, config):
        sites = [Connection(config, 12, n) for n in range(6)]
        layers = [nn.Linear(12, 12) for _ in range(6)]
        for site in sites:
            site.mixer.scale.data.zero_()  # post = 1, pre sums to 1
        hidden = torch.randn(2, 5, 12)
        streams = expand(hidden, config).values
        single = expand(hidden, None).values
        for site, layer in zip(sites, layers, strict=True):

            def sublayer(u, layer=layer):
                return layer(nn.functional.rms_norm(u, (12,))).tanh()

            streams, _ = through(site, streams, sublayer)
            single, _ = through(Residual(), single, sublayer)
        close(streams.mean(2), StreamReduction(None, 12)(Streams(single)), 1e-5)

    def test_the_start_is_nearly_the_plain_residual_network(self):
        hidden = torch.randn(2, 5, 64)
        for config in (HyperConfig(), HyperConfig(kind="single_pass")):
            streams, handed_on = expand(hidden, config)
            for n in range(3):
                streams, handed_on = through(
                    Connection(config, 64, n), streams, torch.tanh, handed_on
                )
            expected = hidden
            for _ in range(3):
                expected = expected + torch.tanh(expected)
            close(StreamReduction(config, 64)(Streams(streams, handed_on)), expected, 0.05)


class TestKinds:
    def test_single_pass_reads_with_the_pre_of_the_site_before(self):
        config = HyperConfig(kind="single_pass")
        sites = [stirred(Connection(config, 8, n)) for n in range(2)]
        seen = []
        x = torch.randn(1, 3, 4, 8)
        first, handed_on = through(sites[0], x, lambda u: seen.append(u) or u.sin())
        last, carried_on = through(sites[1], first, lambda u: seen.append(u) or u.cos(), handed_on)
        close(seen[0], x[:, :, 0])
        pre = sites[0].coefficients(x).pre
        close(handed_on, pre)
        close(seen[1], (pre[..., None] * first).sum(2))
        reduction = StreamReduction(config, 8)
        assert not list(reduction.parameters())
        close(
            reduction(Streams(last, carried_on)),
            (sites[1].coefficients(first).pre[..., None] * last).sum(2),
        )

    def test_the_handed_on_pre_keeps_its_gradient(self):
        config = HyperConfig(kind="single_pass")
        first = Connection(config, 8, 0)
        second = Connection(config, 8, 1)
        streams, handed_on = through(first, torch.randn(1, 3, 4, 8), torch.tanh)
        assert handed_on.requires_grad
        out, _ = through(second, streams.detach(), torch.tanh, handed_on)
        out.sum().backward()
        assert first.mixer.base.grad[:4].abs().min() > 0

    def test_hc_is_its_equations(self):
        site = stirred(Connection(HyperConfig(kind="hc"), 6, 2)).double()
        m = site.mixer
        x = torch.randn(1, 1, 4, 6, dtype=torch.float64)
        H = x[0, 0]
        n = H / (H.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        B = m.scale[1] * torch.tanh(n @ m.fn[1]) + m.base_post
        A_m = m.scale[0] * torch.tanh(n @ m.fn[0]) + m.base_pre
        A_r = m.scale[0] * torch.tanh(n @ m.fn[2:].T) + m.base_comb
        expected = torch.outer(B, (A_m @ H).sin()) + A_r.T @ H
        torch.testing.assert_close(
            through(site, x, torch.sin)[0][0, 0], expected, atol=1e-12, rtol=0
        )

    def test_hc_starts_as_a_residual_network_reading_stream_site_mod_s(self):
        site = Connection(HyperConfig(kind="hc"), 6, 6)
        seen = []
        x = torch.randn(2, 3, 4, 6)
        out, _ = through(site, x, lambda u: seen.append(u) or u.sin())
        close(seen[0], x[:, :, 2])
        close(out, x + seen[0].sin()[:, :, None])

    def test_identity_leaves_the_streams_apart(self):
        site = Connection(HyperConfig(mix="identity"), 8)
        assert site.mixer.fn.shape == (8, 32)
        assert site.coefficients(torch.randn(1, 2, 4, 8)).comb is None
        x = torch.randn(1, 2, 4, 8)
        close(through(site, x, torch.zeros_like)[0], x)

    def test_exits(self):
        x = torch.randn(2, 3, 4, 8)
        handed_on = torch.rand(2, 3, 4)
        close(StreamReduction(HyperConfig(kind="hc"), 8)(Streams(x)), x.sum(2))
        single = StreamReduction(HyperConfig(kind="single_pass"), 8)
        close(single(Streams(x, handed_on)), (handed_on[..., None] * x).sum(2))
        close(single(Streams(x)), x[:, :, 0])
        learned = StreamReduction(HyperConfig(), 8)
        assert torch.equal(learned(Streams(x, handed_on)), learned(Streams(x)))
        close(StreamReduction(None, 8)(Streams(x[:, :, :1])), x[:, :, 0])

    def test_entry(self):
        hidden = torch.randn(2, 3, 8)
        for config, streams in ((HyperConfig(streams=3), 3), (None, 1)):
            entered = expand(hidden, config).values
            assert entered.shape == (2, 3, streams, 8)
            assert (entered == hidden[:, :, None]).all()

    def test_residual(self):
        x = torch.randn(2, 3, 1, 8)
        out, handed_on = through(Residual(), x, torch.tanh)
        close(out, x + x.tanh())
        assert handed_on is None

    @pytest.mark.parametrize("kind", ["mhc", "single_pass", "hc", "residual"])
    def test_the_last_position_is_written_as_among_all(self, kind):
        config = HyperConfig(kind=kind) if kind != "residual" else None
        site = stirred(Connection(config, 8)) if config else Residual()
        x = Streams(torch.randn(2, 5, 4 if config else 1, 8))
        u, mapping = site.read(x)
        whole = site.write(u.sin(), mapping)
        last = site.write(u.sin()[:, -1:], mapping.last(None))
        close(last.values, whole.values[:, -1:])
        if config:
            close(last.pre, whole.pre[:, -1:])


class Backwards(nn.ModuleList):
    """A block whose sites run in the opposite order."""

    def forward(self, x: Streams) -> tuple[Streams, None]:
        for site in reversed(self):
            u, mapping = site.read(x)
            x = site.write(u.sin(), mapping)
        return x, None


class TestHealth:
    def test_composite_gain_of_known_matrices(self):
        one = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).expand(1, 1, 2, 2)  # H_res = [[1, 0], [2, 1]]
        assert composite_gain([one]) == (3.0, 3.0)
        # H_res_2 H_res_1 = [[7, 3], [2, 1]]
        two = torch.tensor([[1.0, 0.0], [3.0, 1.0]]).expand(1, 1, 2, 2)
        assert composite_gain([one, two]) == (10.0, 9.0)

    def test_unconstrained_hc_drifts_where_mhc_stays(self):
        def gain(config):
            torch.manual_seed(3)
            streams = torch.randn(2, 16, 4, 32)
            combs = []
            for n in range(60):
                site = Connection(config, 32, n)
                with torch.no_grad():
                    for name, parameter in site.mixer.named_parameters():
                        if name != "scale":
                            parameter += 0.3 * torch.randn_like(parameter)
                        else:
                            parameter.fill_(0.3)
                    combs.append(site.coefficients(streams).comb)
                    streams, _ = through(site, streams, lambda u: nn.functional.rms_norm(u, (32,)))
            return max(composite_gain(combs))

        assert gain(HyperConfig()) < 1.7
        assert gain(HyperConfig(kind="hc")) > 100

    def test_health_is_that_of_the_sites_in_the_order_they_run(self):
        config = HyperConfig(kind="hc", streams=3)
        block = Backwards(stirred(Connection(config, 8, n)) for n in range(3))
        x = torch.randn(2, 5, 3, 8)
        combs = []
        result = health(nn.Sequential(block), lambda: block(Streams(x)))
        streams = x
        for site in reversed(block):
            combs.append(site.coefficients(streams).comb)
            streams, _ = through(site, streams, torch.sin)
        assert result[:2] == pytest.approx(composite_gain(combs))
        assert result.spread == pytest.approx(spread(streams))
        assert result[:2] != pytest.approx(composite_gain(combs[::-1]))
        assert not any(module._forward_hooks for module in block.modules())
        assert health(nn.Linear(2, 2), lambda: None) is None
        still = Backwards([Connection(HyperConfig(mix="identity"), 8)])
        result = health(still, lambda: still(expand(torch.randn(1, 2, 8), HyperConfig())))
        assert (result.row_gain, result.column_gain) == (1, 1)
        assert 0 < result.spread < 0.1

    def test_spread(self):
        assert spread(expand(torch.randn(1, 2, 8), HyperConfig()).values) == 0
        x = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
        assert spread(x) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "mch"}, "kind.*'mch'.*mhc"),
        ({"mix": "softmax"}, "mix.*'softmax'"),
        ({"streams": 0}, "streams: got 0"),
        ({"iterations": 0}, "iterations: got 0"),
        ({"eps": -1e-6}, "eps: got -1e-06"),
        ({"norm_eps": -1.0}, "norm_eps: got -1.0"),
        ({"kind": "hc", "mix": "identity"}, "kind='hc'"),
    ],
)
def test_bad_configs_say_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        from_dict(HyperConfig, wrong)


@pytest.mark.compiled
@pytest.mark.slow
def test_compiled_equals_eager():
    site = stirred(Connection(HyperConfig(iterations=3), 24))
    weight = torch.randn(24, 24) / 5

    def loss(x):
        return through(site, x, lambda u: (u @ weight).tanh())[0].square().sum()

    x = torch.randn(2, 5, 4, 24, requires_grad=True)
    grads = (
        torch.autograd.grad(f(x), [x, *site.parameters()]) for f in (loss, torch.compile(loss))
    )
    for a, b in zip(*grads, strict=True):
        close(a, b, 2e-5)
