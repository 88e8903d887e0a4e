"""Figures of docs/engram.md: conditional memory."""

from figures.svg import SMALL, Figure


def engram_layer(f: Figure) -> None:
    """From the last tokens to what is added to a residual stream."""
    f.alt = f.say(
        "The last tokens are mapped to canonical ids and hashed to rows of a table. The rows, side "
        "by side, give a key for each stream and one value. The key is compared with the stream's "
        "hidden state, which gives a gate; the gated value passes a short convolution and is added "
        "to the stream before attention.",
        "最近的词元先映射为规范 id，再哈希到表中的行。各行并排，得到每条流的键与一个共用的值。"
        "键与该流的隐藏状态比较得到门控；门控后的值经过短卷积，在注意力之前加回到流上。",
    )
    tokens = f.box(8, 6, 200, f.say("ids: the, great, white", "id：the、great、white"), size=12)
    hidden = f.box(250, 6, 122, f.say("stream h_{s}", "残差流 h_{s}"), size=12)
    canon = f.box(8, 54, 200, f.say("canonical ids", "规范 id"), size=12)
    f.connect(tokens.south(), canon.north())
    hashed = f.box(
        8, 102, 200, f.say("hash of 2-grams and 3-grams", "2-gram 与 3-gram 的哈希"), size=12
    )
    f.connect(canon.south(), hashed.north())
    table = f.box(
        8,
        150,
        200,
        f.say("rows of the table,\nside by side: e", "表中各行并排：e"),
        kind="memory",
        size=12,
    )
    f.connect(hashed.south(), table.north())
    value = f.box(8, 214, 92, f.say("value\nW_{v} e", "值\nW_{v} e"), kind="learned", size=12)
    key = f.box(116, 214, 92, f.say("key\nW_{k,s} e", "键\nW_{k,s} e"), kind="learned", size=12)
    f.connect((key.cx, table.bottom), key.north())
    f.connect((value.cx, table.bottom), value.north())
    gate = f.box(
        116,
        key.bottom + 24,
        172,
        f.say(
            "gate: σ of the signed root of ⟨key, h⟩ / √D",
            "门控：⟨键, h⟩ / √D 的带符号平方根，再取 σ",
        ),
        kind="chosen",
        size=12,
    )
    f.connect(key.south(), (key.cx, gate.y))
    # The stream's own state comes down beside the key.
    f.connect((270, hidden.bottom), (270, gate.y))
    times = f.circle(value.cx, gate.cy, "×")
    f.connect(value.south(), times.north())
    f.connect(gate.west(), times.east())
    conv = f.box(
        8,
        gate.bottom + 26,
        200,
        f.say("v + silu(conv(norm(v)))", "v + silu(conv(norm(v)))"),
        kind="learned",
        size=12,
    )
    f.connect(times.south(), (times.cx, conv.y))
    plus = f.circle(330, conv.cy, "+")
    f.connect((330, hidden.bottom), plus.north())
    f.connect(conv.east(), plus.west())
    after = f.box(250, plus.bottom + 24, 122, f.say("to attention", "到注意力"), size=12)
    f.connect(plus.south(), (plus.cx, after.y))


def engram_addresses(f: Figure) -> None:
    """One hash, by hand, with the numbers of the page's example."""
    f.alt = f.say(
        "The canonical ids 1, 4 and 2 of three tokens are multiplied by odd numbers. The exclusive "
        "or of the last two products is the mix of the 2-gram, with the third the mix of the "
        "3-gram. Each mix modulo the primes of its heads, plus an offset, are the rows.",
        "三个词元的规范 id 1、4、2 各乘一个奇数。最后两个乘积的异或是 2-gram 的 mix，"
        "再异或第三个是 3-gram 的 mix。"
        "mix 对各头的质数取余，加上偏移，就是行号。",
    )
    multipliers = (21, 13, 35)
    ids = (2, 4, 1)
    words = ("white", "great", "the")
    primes = ((11, 13), (17, 19))
    columns = (258.0, 136.0, 14.0)
    products = []
    for x, word, number, multiplier in zip(columns, words, ids, multipliers, strict=True):
        token = f.box(x, 6, 108, word)
        product = f.box(
            x, 56, 108, f"{number} × {multiplier} = {number * multiplier}", kind="learned"
        )
        f.connect(token.south(), product.north())
        products.append(product)
    mix2 = (ids[0] * multipliers[0]) ^ (ids[1] * multipliers[1])
    mix3 = mix2 ^ (ids[2] * multipliers[2])
    first = f.box(
        197, 118, 169, f"{ids[0] * multipliers[0]} xor {ids[1] * multipliers[1]} = {mix2}"
    )
    second = f.box(14, 172, 220, f"{mix2} xor {ids[2] * multipliers[2]} = {mix3}")
    f.connect(products[0].south(), (products[0].cx, first.y))
    f.connect(products[1].south(0.8), (products[1].x + 0.8 * 108, first.y))
    f.connect(products[2].south(), (products[2].cx, second.y))
    f.connect(first.south(0.1), (first.x + 17, second.y))
    offset = 0
    y = 226.0
    bottom = 0.0
    for mix, order, x in ((mix2, 0, 222.0), (mix3, 1, 14.0)):
        for prime in primes[order]:
            box = f.box(
                x,
                y,
                144,
                f"{offset} + {mix} mod {prime} = {offset + mix % prime}",
                kind="memory",
                size=SMALL,
            )
            offset += prime
            y = box.bottom + 6
        bottom = max(bottom, y)
        y = 226.0
    f.connect((first.right - 20, first.bottom), (first.right - 20, y))
    f.connect((86, second.bottom), (86, y))
    f.text(
        190,
        bottom + 24,
        f.say("row = offset + mix mod prime", "行号 = 偏移 + mix mod 质数"),
        size=SMALL,
        kind="soft",
    )
    f.text(294, bottom + 2, f.say("2-gram, two heads", "2-gram，两个头"), size=SMALL, kind="soft")
    f.text(86, bottom + 2, f.say("3-gram, two heads", "3-gram，两个头"), size=SMALL, kind="soft")
