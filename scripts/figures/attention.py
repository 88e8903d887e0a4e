"""Figures of docs/attention.md: MLA and its relatives, and how far rotary positions reach."""

import math

from figures.svg import SMALL, Box, Figure


def attention_kinds(f: Figure) -> None:
    """Which keys and values the heads of a token have in MHA, GQA, MQA and MLA."""
    f.alt = f.say(
        "Eight query heads in four versions. Multi-head attention caches a key and a value for "
        "each "
        "head, grouped queries one for every four heads, multi-query one for all, and MLA one "
        "latent from which each head forms its own.",
        "八个查询头的四种做法：多头注意力为每个头缓存键与值，分组查询每四个头共用一组，"
        "多查询全部共用一组，"
        "MLA 缓存一个潜在向量，由它生成每个头自己的键与值。",
    )
    heads = 8
    step = 44.0
    left = 14.0
    y = 6.0
    kinds = (
        ("MHA", 8, f.say("16 vectors a token", "每词元 16 个向量")),
        ("GQA", 2, f.say("4 vectors a token", "每词元 4 个向量")),
        ("MQA", 1, f.say("2 vectors a token", "每词元 2 个向量")),
        ("MLA", 0, f.say("1 latent, 1 rotated key", "1 个潜在向量，1 个旋转键")),
    )
    for name, groups, cost in kinds:
        f.text(left, y, name, anchor="start", kind="strong")
        f.text(left + 48, y + 1, cost, anchor="start", size=SMALL, kind="soft")
        top = y + 22
        queries = [
            f.box(left + i * step, top, 34, "q", height=22, size=SMALL) for i in range(heads)
        ]
        if groups:
            each = heads // groups
            for g in range(groups):
                first = queries[g * each]
                last = queries[(g + 1) * each - 1]
                label = "k v" if each < heads else f.say("k, v of all heads", "所有头共用的 k、v")
                box = f.box(
                    first.x, top + 40, last.right - first.x, label, height=24, kind="state",
                    size=SMALL,
                )  # fmt: skip
                for query in queries[g * each : (g + 1) * each]:
                    f.line(query.south(), (query.cx, box.y))
            y = top + 80
            continue
        of_heads = [
            f.box(query.x, top + 40, 34, "k v", height=22, kind="learned", size=SMALL)
            for query in queries
        ]
        latent = f.box(
            queries[0].x,
            top + 92,
            queries[-1].right - queries[0].x,
            f.say("latent c and rotated key r", "潜在向量 c 与旋转键 r"),
            height=24,
            kind="state",
            size=SMALL,
        )
        for query, box in zip(queries, of_heads, strict=True):
            f.line(query.south(), box.north())
            f.connect((box.cx, latent.y), box.south())
        f.text(
            190,
            latent.bottom + 4,
            f.say(
                "every head: k = [W_{uk} c, r], v = W_{uv} c",
                "每个头：k = [W_{uk} c, r]，v = W_{uv} c",
            ),
            size=SMALL,
            kind="soft",
        )


def mla_layer(f: Figure) -> None:
    """From a token's hidden state to queries, latent and output, with the sizes of DeepSeek-V3."""
    f.alt = f.say(
        "A hidden state of 7,168 values is projected down twice: to a query latent of 1,536 and, "
        "for keys and values, to a latent of 512 beside a rotated key of 64, which are cached. "
        "Queries and cache meet in attention of 128 heads, and W_o leads back to 7,168.",
        "7,168 维的隐藏状态向下投影两次：得到 1,536 维的查询潜在向量，以及 512 "
        "维的键值潜在向量和 64 维的旋转键，"
        "后两者进入缓存。查询与缓存在 128 个头的注意力中相遇，再由 W_o 回到 7,168 维。",
    )
    columns = ((8.0, 128.0), (150.0, 112.0), (276.0, 96.0))
    x = f.box(columns[1][0], 6, columns[1][1], f.say("x: 7,168", "x：7,168"))
    down = []
    down_words = (
        f.say("W_{dq}, norm\n1,536", "W_{dq}、归一化\n1,536"),
        f.say("W_{dkv}, norm\nc: 512", "W_{dkv}、归一化\nc：512"),
        f.say("W_{kr}, rope\nr: 64", "W_{kr}、旋转\nr：64"),
    )
    for (left, width), words in zip(columns, down_words, strict=True):
        down.append(f.box(left, 62, width, words, kind="learned", size=12))
    f.connect(x.west(), (down[0].cx, x.cy), down[0].north())
    f.connect(x.south(), down[1].north())
    f.connect(x.east(), (down[2].cx, x.cy), down[2].north())
    up = f.box(
        8,
        down[0].bottom + 24,
        128,
        f.say("W_{q}: 128 heads\nof 128 + 64", "W_{q}：128 个头\n各 128 + 64"),
        kind="learned",
        size=12,
    )
    f.connect(down[0].south(), up.north())
    cache = f.box(
        150,
        up.y,
        222,
        f.say(
            "cache of all tokens\n[c, r]: 576 values each", "全部词元的缓存\n[c, r]：各 576 个数"
        ),
        kind="state",
        size=12,
    )
    for box in down[1:]:
        f.connect(box.south(), (box.cx, cache.y))
    turned = f.box(
        8,
        up.bottom + 24,
        128,
        f.say("rope on the 64\nof every head", "每个头的 64 维\n旋转"),
        size=12,
    )
    f.connect(up.south(), turned.north())
    formed = f.box(
        150,
        turned.y,
        222,
        f.say(
            "each head: k = [W_{uk} c, r]\nv = W_{uv} c", "每个头：k = [W_{uk} c, r]\nv = W_{uv} c"
        ),
        kind="learned",
        size=12,
    )
    f.connect(cache.south(), formed.north())
    attention = f.box(
        8,
        turned.bottom + 24,
        364,
        f.say("softmax(scale · q·k) v for 128 heads", "128 个头的 softmax(scale · q·k) v"),
    )
    f.connect(turned.south(), (turned.cx, attention.y))
    f.connect(formed.south(), (formed.cx, attention.y))
    out = f.box(
        90, attention.bottom + 24, 200, f.say("W_{o}: 16,384 to 7,168", "W_{o}：16,384 到 7,168"),
        kind="learned",
    )  # fmt: skip
    f.connect(attention.south(), out.north())


def mla_forms(f: Figure) -> None:
    """The two orders in which one product can be taken."""
    f.alt = f.say(
        "Two columns. Expanded: W_uk and W_uv form keys and values of every head from each latent, "
        "then the query attends to them. Absorbed: the query passes through W_uk transposed, "
        "attends to the latents themselves, and W_uv maps the sum of latents to the value.",
        "两列。展开：W_uk 与 W_uv 由每个潜在向量生成每个头的键与值，查询再去注意它们。"
        "吸收：查询先乘 W_uk 的转置，直接注意潜在向量，最后由 W_uv 把潜在向量之和变成值。",
    )
    columns = (8.0, 198.0)
    width = 174.0
    f.text(columns[0] + width / 2, 4, f.say("expanded", "展开"), kind="strong")
    f.text(columns[1] + width / 2, 4, f.say("absorbed", "吸收"), kind="strong")
    steps = (
        (
            (f.say("L latents c", "L 个潜在向量 c"), "state"),
            (
                f.say(
                    "k = W_{uk} c, v = W_{uv} c:\nL of each for every head",
                    "k = W_{uk} c，v = W_{uv} c：\n每个头各 L 个",
                ),
                "learned",
            ),
            (f.say("scores q·k, 192 wide", "分数 q·k，宽 192"), "plain"),
            (f.say("Σ p v, 128 wide", "Σ p v，宽 128"), "plain"),
        ),
        (
            (f.say("one query q", "一个查询 q"), "plain"),
            (
                f.say("q' = W_{uk}^{T} q:\none for every head", "q' = W_{uk}^{T} q：\n每个头一个"),
                "learned",
            ),
            (f.say("scores q'·c, 576 wide", "分数 q'·c，宽 576"), "state"),
            (f.say("Σ p c, then W_{uv}", "Σ p c，再乘 W_{uv}"), "learned"),
        ),
    )
    heights = (28.0, 62.0, 28.0, 28.0)
    for x, column in zip(columns, steps, strict=True):
        y = 28.0
        before: Box | None = None
        for (words, kind), height in zip(column, heights, strict=True):
            box = f.box(x, y, width, words, height=height, kind=kind, size=12)
            if before is not None:
                f.connect(before.south(), box.north())
            before = box
            y = box.bottom + 22
    f.text(
        columns[0] + width / 2,
        y - 14,
        f.say("pays for many queries", "查询多时合算"),
        size=SMALL,
        kind="soft",
    )
    f.text(
        columns[1] + width / 2,
        y - 14,
        f.say("pays for one query", "查询少时合算"),
        size=SMALL,
        kind="soft",
    )


def rope_half_turn(f: Figure) -> None:
    """The cosine of the slowest pair over the distance, and where it becomes ambiguous."""
    f.alt = f.say(
        "The cosine of the slowest rotary pair over the distance: it falls from 1 to -1 at half a "
        "turn, pi times the base, and comes back to 1 at a whole turn. A distance a little short "
        "of "
        "a whole turn has the same cosine as a short distance.",
        "最慢的一对旋转的余弦随距离变化：半圈（π 乘以底数）处由 1 降到 -1，整圈处回到 1。"
        "接近整圈的距离与很短的距离有相同的余弦。",
    )
    left, right = 44.0, 364.0
    top, bottom = 30.0, 150.0
    middle = (top + bottom) / 2

    def at_turn(share: float) -> tuple[float, float]:
        return left + share * (right - left), middle - 60 * math.cos(2 * math.pi * share)

    f.line((left, top - 10), (left, bottom + 8), (right + 6, bottom + 8))
    f.line(*[at_turn(i / 60) for i in range(61)], kind="learned")
    f.text(left - 8, top - 8, "1", anchor="end", size=SMALL, kind="soft")
    f.text(left - 8, bottom - 8, "-1", anchor="end", size=SMALL, kind="soft")
    f.text(
        left + 8,
        2,
        f.say("cos of the slowest pair", "最慢一对的 cos"),
        anchor="start",
        size=SMALL,
        kind="soft",
    )
    for share, label in ((0.5, "π · base"), (1.0, "2π · base")):
        x, _ = at_turn(share)
        f.line((x, bottom + 4), (x, bottom + 12))
        anchor = "middle" if share < 1 else "end"
        f.text(x + (6 if share == 1 else 0), bottom + 14, label, anchor=anchor, size=SMALL)
    x, y = at_turn(0.15)
    x2, _ = at_turn(0.85)
    f.line((x, y), (x2, y), dashed=True)
    f.text(x + 10, y - 19, "a")
    f.text(x2 - 10, y - 19, "b")
    f.text(
        (x + x2) / 2,
        y - 18,
        f.say("one cosine, two distances", "两个距离，同一个余弦"),
        size=SMALL,
        kind="soft",
    )
    f.text(
        left + (right - left) / 4,
        bottom + 32,
        f.say("distinct", "可区分"),
        size=SMALL,
    )
    f.text(left + 3 * (right - left) / 4, bottom + 32, f.say("mirrored", "镜像"), size=SMALL)
    for start, end in ((0.0, 0.5), (0.5, 1.0)):
        a = left + start * (right - left) + 3
        b = left + end * (right - left) - 3
        f.line((a, bottom + 52), (a, bottom + 56), (b, bottom + 56), (b, bottom + 52))
