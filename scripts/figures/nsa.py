"""Figures of docs/nsa.md: Native Sparse Attention."""

from figures.svg import SMALL, Figure


def nsa_branches(f: Figure) -> None:
    """Three branches over the same tokens, a gate each, and their sum."""
    f.alt = f.say(
        "The keys of all earlier tokens go to three branches: compressed blocks, selected blocks "
        "and a window. The probabilities of the compressed branch select the blocks of the second. "
        "The output of each is multiplied by its gate, and the three are added.",
        "前面全部词元的键进入三个分支：压缩块、选中的块、窗口。压缩分支的概率为第二个分支选块。"
        "每个分支的输出乘以自己的门控，三者相加。",
    )
    source = f.box(
        6,
        6,
        368,
        f.say("the query q_{t}, and the tokens up to t", "查询 q_{t}，以及不晚于 t 的词元"),
    )
    columns = (6.0, 135.0, 264.0)
    width = 110.0
    top = source.bottom + 22
    words = (
        f.say("compress\nl keys, every d,\nto one", "压缩\n每隔 d 取 l 个键\n压成一个"),
        f.say("select\nthe best blocks\nof l′ keys", "选择\n最重要的若干块\n每块 l′ 个键"),
        f.say("window\nthe last w keys", "窗口\n最近 w 个键"),
    )
    kinds = ("learned", "chosen", "plain")
    firsts = [
        f.box(x, top, width, text, kind=kind, height=64, size=12)
        for x, text, kind in zip(columns, words, kinds, strict=True)
    ]
    for box in firsts:
        f.connect((box.cx, source.bottom), box.north())
    attends = [f.box(box.x, box.bottom + 44, width, f.say("attention", "注意力")) for box in firsts]
    for first, attend in zip(firsts, attends, strict=True):
        f.connect(first.south(), attend.north())
    f.connect(
        attends[0].east(),
        (attends[0].right + 9, attends[0].cy),
        (attends[0].right + 9, firsts[1].cy),
        firsts[1].west(),
        kind="chosen",
    )
    f.text(
        attends[0].right + 14,
        firsts[1].bottom + 12,
        "p_{cmp} W",
        anchor="start",
        size=SMALL,
        kind="soft",
        width=50,
    )
    signs = [f.circle(attend.cx, attend.bottom + 32, "×") for attend in attends]
    for attend, sign, name in zip(attends, signs, ("cmp", "slc", "win"), strict=True):
        f.connect(attend.south(), sign.north())
        f.text(sign.right + 5, sign.y + 1, f"g_{{{name}}}", anchor="start")
    plus = f.circle(signs[1].cx, signs[1].bottom + 32, "+")
    f.connect(signs[0].south(), (signs[0].cx, plus.cy), plus.west())
    f.connect(signs[1].south(), plus.north())
    f.connect(signs[2].south(), (signs[2].cx, plus.cy), plus.east())
    out = f.box(plus.cx - 45, plus.bottom + 20, 90, f.say("output", "输出"))
    f.connect(plus.south(), out.north())
    f.text(
        out.right + 10,
        out.y + 2,
        f.say("g = σ(MLP(x)), by head", "g = σ(MLP(x))，每头一个"),
        anchor="start",
        size=SMALL,
        kind="soft",
        width=150,
    )


def nsa_masks(f: Figure) -> None:
    """What the three branches read, as masks of eighteen queries and eighteen keys."""
    f.alt = f.say(
        "Three matrices of eighteen queries and eighteen keys. Compressed: blocks that end before "
        "the query, each read as one key. Selected: the first block, the query's own and the one "
        "before it, and one more. Window: the last four keys.",
        "三个十八乘十八的查询与键的矩阵。压缩：在查询之前结束的块，每块当作一个键来读。选择：首"
        "块、自己的块、前一块，再加一块。窗口：最近四个键。",
    )
    size = 6.2
    best = [0, 0, 0, 1, 1, 2, 2, 3, 1, 2, 4, 1, 3, 2, 5, 3, 6, 2]
    titles = (f.say("compressed", "压缩"), f.say("selected", "选择"), f.say("window", "窗口"))

    def compressed(query: int, key: int) -> str:
        return "learned" if key // 2 * 2 + 1 <= query else "plain"

    def selected(query: int, key: int) -> str:
        block = key // 2
        forced = block in (0, query // 2, query // 2 - 1)
        seen = key <= query and (forced or block == best[query])
        return "chosen" if seen else "plain"

    def window(query: int, key: int) -> str:
        return "state" if 0 <= query - key < 4 else "plain"

    for n, (title, kind) in enumerate(zip(titles, (compressed, selected, window), strict=True)):
        x = 6 + n * 128.0
        f.text(x + 56, 4, title, size=SMALL)
        f.cells(x, 22, [[None] * 18 for _ in range(18)], size=size, kind=kind)
    f.text(
        190,
        142,
        f.say("rows: queries, from above; columns: keys", "行：查询，自上而下；列：键"),
        size=SMALL,
        kind="soft",
    )
