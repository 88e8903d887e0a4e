# %% [markdown] lang="en"
# # 4. MLA's cache, absorbed and expanded
#
# While a model writes, attention reads the keys and values of every earlier token, for every new one. Multi-head latent attention
# (MLA) stores one small latent in their place. It has two forms: *expanded*, which makes keys and values out of the
# latents again, and *absorbed*, which never does. You check that both give the same output, write the absorbed form, and
# see when each is cheaper.
#
# Level: look inside. Takes 20 minutes. Papers: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C; DeepSeek-V3 (2412.19437),
# section 2.1.1.
# %% [markdown] lang="zh"
# # 4. MLA 的缓存：吸收与展开
#
# 模型写作时，每写一个新词元，注意力都要读前面所有词元的键与值。多头潜在注意力（MLA）只存一个小的潜在向量来代替它们。它有两种形式：
# *展开*，由潜在向量重新生成键与值；*吸收*，永远不生成。这里验证二者输出相同，亲手写出吸收形式，并看看各自何时更便宜。
#
# 层次：深入内部。用时 20 分钟。论文：DeepSeek-V2（arXiv 2405.04434）2.1 节与附录 C；DeepSeek-V3（2412.19437）2.1.1 节。
# %%
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

import rorqual as rq
from rorqual.layers.attention import MLA, GQAConfig, MLAConfig
from rorqual.layers.cache import Past
from rorqual.layers.context import context
from rorqual.model_config import RopeConfig


# %% [markdown] lang="en"
# ## What is stored
#
# For a token with hidden state $x$ MLA stores a latent $c$ and one rotary key $r$ that all heads share:
#
# $$c = \mathrm{norm}(W_{dkv}\, x), \qquad r = \mathrm{rope}(W_{kr}\, x)$$
#
# Keys and values of head $h$ are linear in $c$: $\;k_h = [W_{uk,h}\, c \mid r]$, $\;v_h = W_{uv,h}\, c$.
#
# **Exercise 1.** How many numbers a token and layer does each attention keep? Write it for plain or grouped heads, and for MLA.
# %% [markdown] lang="zh"
# ## 存了什么
#
# 对隐藏状态为 $x$ 的词元，MLA 存一个潜在向量 $c$，以及所有头共用的一个旋转键 $r$：
#
# $$c = \mathrm{norm}(W_{dkv}\, x), \qquad r = \mathrm{rope}(W_{kr}\, x)$$
#
# 头 $h$ 的键与值对 $c$ 是线性的：$\;k_h = [W_{uk,h}\, c \mid r]$，$\;v_h = W_{uv,h}\, c$。
#
# **练习 1.** 每种注意力每词元每层要存多少个数？分别写出普通（或分组）头与 MLA 的情形。
# %% tags=["exercise"]
def stored_by_heads(config: GQAConfig) -> int:
    """Returns the numbers that grouped-query attention stores for a token in a layer."""
    ### BEGIN SOLUTION
    return 2 * config.kv_heads * config.head_dim
    ### END SOLUTION


def stored_by_mla(config: MLAConfig) -> int:
    """Returns the numbers that MLA stores for a token in a layer."""
    ### BEGIN SOLUTION
    return config.kv_lora_rank + config.rope_dim
    ### END SOLUTION


# %% tags=["wrong"]
def stored_by_heads(config: GQAConfig) -> int:
    return 2 * config.heads * config.head_dim


def stored_by_mla(config: MLAConfig) -> int:
    return config.kv_lora_rank + config.heads * config.rope_dim


# %% tags=["gate"]
v3 = rq.preset("deepseek-v3")
assert stored_by_mla(v3.mla) == 576
assert stored_by_heads(GQAConfig(heads=128, kv_heads=128, head_dim=128)) == 32768
assert stored_by_heads(GQAConfig(heads=32, kv_heads=8, head_dim=128)) == 2048
cost = rq.costs.costs(v3)
assert cost.cache_bytes_per_token == 2 * v3.layers * stored_by_mla(v3.mla), "bfloat16: 2 bytes"

# %% [markdown] lang="en"
# DeepSeek-V3 with plain heads would store 64 KB a token and layer, not 1. Over all 61 layers and a long text that decides how many readers
# a machine can serve at once.
# %% [markdown] lang="zh"
# DeepSeek-V3 若用普通的头，每词元每层要存 64 KB，而不是 1 KB。乘上 61 层和一篇长文，就决定了一台机器能同时服务多少位读者。
# %%
heads = {
    "128 heads of keys and values": GQAConfig(heads=128, kv_heads=128, head_dim=128),
    "8 heads of keys, 128 of queries": GQAConfig(heads=128, kv_heads=8, head_dim=128),
    "1 head of keys (multi-query)": GQAConfig(heads=128, kv_heads=1, head_dim=128),
}
variants = {name: replace(v3, mla=None, gqa=gqa) for name, gqa in heads.items()}
variants["MLA: a latent of 512 and a key of 64"] = v3
lengths = [2**n for n in range(10, 18)]
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, config in variants.items():
    gigabytes = [rq.costs.costs(config, length).cache_bytes / 1e9 for length in lengths]
    axes.loglog(lengths, gigabytes, "o-", ms=3, label=name, base=2)
axes.set_yscale("log", base=10)
axes.set(xlabel="tokens in the cache", ylabel="GB of one sequence, 61 layers, bfloat16")
axes.legend(frameon=False, fontsize=8)
axes.grid(alpha=0.2)
plt.show()

# %% tags=["exact"]
for name, config in variants.items():
    cost = rq.costs.costs(config)
    print(f"{cost.cache_bytes_per_token / config.layers:8,.0f} bytes a token and layer: {name}")

# %% [markdown] lang="en"
# ## Expanded
#
# The expanded form multiplies every latent with $W_{uk}$ and $W_{uv}$ and is plain attention from there on. It suits training and
# reading a prompt: each key is expanded once and read by many queries.
# %% [markdown] lang="zh"
# ## 展开
#
# 展开形式把每个潜在向量乘以 $W_{uk}$ 与 $W_{uv}$，此后就是普通注意力。它适合训练与读提示：每个键展开一次，被许多查询读取。
# %% tags=["exact"]
torch.manual_seed(0)
sizes = MLAConfig(heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
rotary = RopeConfig()
layer = MLA(sizes, dim=64, rope=rotary).double()
x = torch.randn(2, 12, 64, dtype=torch.float64)
ctx = context(2, 12, "cpu", rope=(rotary, sizes.rope_dim))
with torch.no_grad():
    latent = layer.latents(x, ctx)
    nope, rope = layer.queries(layer.query_latent(x), ctx)
    expanded = layer.expanded(nope, rope, latent, ctx.visible(), False)
print("stored  ", list(latent.shape), "= [B, L, kv_lora_rank + rope_dim]")
print("queries ", list(nope.shape), "without position,", list(rope.shape), "rotated")
print("output  ", list(expanded.shape), "= [B, T, H, value_dim]")


# %% [markdown] lang="en"
# ## Absorbed
#
# Both matrices can move to the other side of their products:
#
# $$\langle n_h, W_{uk,h}\, c \rangle = \langle W_{uk,h}^\top n_h,\; c \rangle, \qquad
# \sum_s p_s\, W_{uv,h}\, c_s = W_{uv,h} \sum_s p_s\, c_s$$
#
# Queries become as wide as latents, all heads attend to the same stored vectors $[c \mid r]$, which are keys and values at once, and
# only the sum is mapped to values. Nothing is ever made for each key: that is why the cache can stay small *while it is read*.
#
# **Exercise 2.** Write it. The scale is that of the expanded form, `layer.scale`.
# %% [markdown] lang="zh"
# ## 吸收
#
# 两个矩阵都可以移到乘积的另一侧：
#
# $$\langle n_h, W_{uk,h}\, c \rangle = \langle W_{uk,h}^\top n_h,\; c \rangle, \qquad
# \sum_s p_s\, W_{uv,h}\, c_s = W_{uv,h} \sum_s p_s\, c_s$$
#
# 查询变得与潜在向量同宽，所有头读同一批存下的向量 $[c \mid r]$，它们既是键又是值；最后只把求和的结果映射为值。从头到尾不为任何一个键
# 生成什么：缓存在*被读取时*也能保持很小，原因就在这里。
#
# **练习 2.** 写出它。缩放系数与展开形式相同，即 `layer.scale`。
# %% tags=["exercise"]
def absorbed(layer: MLA, nope, rope, latent, visible):
    """Returns the heads' outputs [B, T, H, value_dim] without forming keys or values.

    nope [B, T, H, N], rope [B, T, H, P], latent [B, L, R + P], visible [B, 1, T, L] bool.
    """
    c = layer.config
    up = layer.kv_b_proj.weight.unflatten(0, (c.heads, -1))
    key_up, value_up = up.split([c.nope_dim, c.value_dim], dim=1)  # [H, N, R], [H, Q, R]
    ### BEGIN SOLUTION
    query = torch.cat([torch.einsum("bthn,hnr->bthr", nope, key_up), rope], dim=-1)
    scores = layer.scale * torch.einsum("bthr,blr->bhtl", query, latent)
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    summed = torch.einsum("bhtl,blr->bthr", probabilities, latent[..., : c.kv_lora_rank])
    return torch.einsum("bthr,hvr->bthv", summed, value_up)
    ### END SOLUTION


# %% tags=["wrong"]
def absorbed(layer: MLA, nope, rope, latent, visible):
    """Scales by the width of the latent."""
    c = layer.config
    up = layer.kv_b_proj.weight.unflatten(0, (c.heads, -1))
    key_up, value_up = up.split([c.nope_dim, c.value_dim], dim=1)
    query = torch.cat([torch.einsum("bthn,hnr->bthr", nope, key_up), rope], dim=-1)
    scores = torch.einsum("bthr,blr->bhtl", query, latent) * query.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    summed = torch.einsum("bhtl,blr->bthr", probabilities, latent[..., : c.kv_lora_rank])
    return torch.einsum("bthr,hvr->bthv", summed, value_up)


# %% tags=["wrong"]
def absorbed(layer: MLA, nope, rope, latent, visible):
    """Forgets the rotary part of the score."""
    c = layer.config
    up = layer.kv_b_proj.weight.unflatten(0, (c.heads, -1))
    key_up, value_up = up.split([c.nope_dim, c.value_dim], dim=1)
    query = torch.einsum("bthn,hnr->bthr", nope, key_up)
    latent = latent[..., : c.kv_lora_rank]
    scores = layer.scale * torch.einsum("bthr,blr->bhtl", query, latent)
    probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    summed = torch.einsum("bhtl,blr->bthr", probabilities, latent)
    return torch.einsum("bthr,hvr->bthv", summed, value_up)


# %% tags=["gate"]
with torch.no_grad():
    mine = absorbed(layer, nope, rope, latent, ctx.visible())
    theirs = layer.absorbed(nope, rope, latent, ctx.visible())
assert mine.shape == expanded.shape
assert torch.allclose(mine, expanded, atol=1e-12), "differs from the expanded form"
assert torch.allclose(mine, theirs, atol=1e-12)

# %% [markdown] lang="en"
# ## When each is cheaper
#
# For $T$ new tokens, products of numbers for each cached key and head, with the names of the config:
#
# $$\text{absorbed} = T\,(2 R + P), \qquad \text{expanded} = R\,(N + Q) + T\,(N + P + Q)$$
#
# $R$ is the latent's width, $P$ the rotary key's, $N$ and $Q$ those of a head's key and value. The absorbed form multiplies wider
# vectors, the expanded form first pays for every key once.
# %% [markdown] lang="zh"
# ## 各自何时更便宜
#
# 对 $T$ 个新词元，每个已缓存的键、每个头需要的乘法次数（沿用配置的字母）：
#
# $$\text{absorbed} = T\,(2 R + P), \qquad \text{expanded} = R\,(N + Q) + T\,(N + P + Q)$$
#
# $R$ 是潜在向量的宽度，$P$ 是旋转键的宽度，$N$ 与 $Q$ 是一个头的键宽与值宽。吸收形式乘的向量更宽，展开形式要先为每个键做一次展开。
# %% tags=["exact"]
c = v3.mla
R, P, N, Q = c.kv_lora_rank, c.rope_dim, c.nope_dim, c.value_dim
costs_of = {
    "absorbed": [T * (2 * R + P) for T in range(1, 401)],
    "expanded": [R * (N + Q) + T * (N + P + Q) for T in range(1, 401)],
}
pairs = zip(costs_of["absorbed"], costs_of["expanded"], strict=True)
last = max(T for T, (a, b) in enumerate(pairs, 1) if a <= b)
print(f"DeepSeek-V3: the absorbed form is cheaper up to {last} new tokens")
with torch.device("meta"):
    big = MLA(c, v3.dim, v3.rope)
for T in (1, last, last + 1):
    past = Past(1)
    past.append([1000])
    print(f"{T:4d} new tokens after 1,000: absorbs {big.absorbs(context(1, T, 'cpu', past=past))}")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, values in costs_of.items():
    axes.plot(range(1, 401), [value / 1000 for value in values], label=name)
axes.axvline(last, color="gray", ls=":")
axes.set(xlabel="new tokens T", ylabel="thousand products a key and head")
axes.legend(frameon=False)
plt.show()


# %% [markdown] lang="en"
# Counting is one thing; here are times of one decoding step of a layer, measured where this notebook ran. Both read the same cache.
# %% [markdown] lang="zh"
# 计数是一回事；下面是一层单步解码的用时，在运行本笔记本的机器上测得。两种形式读的是同一份缓存。
# %%
def seconds(form, *arguments) -> float:
    """Returns the shortest of several times."""
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        form(*arguments)
        times.append(time.perf_counter() - begun)
    return min(times)


torch.manual_seed(0)
sizes = MLAConfig(heads=16, kv_lora_rank=128, nope_dim=32, rope_dim=16, value_dim=32)
layer = MLA(sizes, dim=512, rope=rotary)
cached = [256, 512, 1024, 2048, 4096]
measured = {"absorbed": [], "expanded": []}
with torch.no_grad():
    nope, rope = torch.randn(1, 1, 16, 32), torch.randn(1, 1, 16, 16)
    for length in cached:
        latent = torch.randn(1, length, 144)
        measured["absorbed"].append(seconds(layer.absorbed, nope, rope, latent, None))
        measured["expanded"].append(seconds(layer.expanded, nope, rope, latent, None, False))
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, values in measured.items():
    axes.loglog(cached, [1000 * value for value in values], "o-", label=name, base=2)
axes.set_yscale("log", base=10)
axes.set(xlabel="tokens in the cache", ylabel="ms a step and layer, one thread")
axes.legend(frameon=False)
axes.grid(alpha=0.2)
plt.show()

# %% [markdown] lang="en"
# ## A whole model
#
# With a cache a model reads each token once and says the same as without. The prompt is read in the expanded form, the following
# tokens one by one in the absorbed form.
# %% [markdown] lang="zh"
# ## 放到整个模型里
#
# 有了缓存，模型每个词元只读一次，输出与没有缓存时相同。提示用展开形式读入，后面的词元用吸收形式逐个读入。
# %% tags=["exact"]
model = rq.LanguageModel(rq.preset("tiny"), seed=0).double()
ids = torch.randint(4096, (1, 24), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    whole = model(ids)
    cache = model.new_cache(batch=1)
    pieces = [model(ids[:, :16], cache=cache)]
    pieces += [model(ids[:, t : t + 1], cache=cache) for t in range(16, 24)]
difference = (torch.cat(pieces, dim=1) - whole).abs().max().item()
stored = cache.layers[0].attention.latent.stored[:, : cache.length]
print(f"differs by less than 1e-4: {difference < 1e-4}")
print("stored in a layer:", list(stored.shape))

# %% [markdown] lang="en"
# **Key finding.** Low rank alone would not make decoding cheap: a latent that had to be expanded for every step would save memory and cost
# time. It is the absorbed form that turns a small cache into fast attention, and the separate rotary key is what keeps it possible: a
# rotation between $W_{uk}$ and the latent would depend on the positions and could not be absorbed.
#
# The code: `rorqual/layers/attention.py`, `MLA`. The page: docs/attention.md.
# %% [markdown] lang="zh"
# **关键结论。** 只有低秩并不能让解码变便宜：若每一步都要展开潜在向量，就是省了内存、赔了时间。是吸收形式把小缓存变成快注意力；而单独的
# 旋转键使吸收成为可能：若在 $W_{uk}$ 与潜在向量之间夹一个旋转，它随位置变化，就无法被吸收。
#
# 代码：`rorqual/layers/attention.py` 的 `MLA`。页面：docs/zh/attention.md。
