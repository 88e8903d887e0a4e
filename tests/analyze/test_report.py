"""Tests that the page shows the runs' data, loads nothing, and refuses folders that are no runs."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from rorqual.analyze import report
from rorqual.analyze.measures import without_memory
from rorqual.analyze.report import read_run, table, write_report
from rorqual.checkpoint import load_model, save_model
from rorqual.costs import costs
from rorqual.data.corpus import trained
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.layers.engram import EngramConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset

TEXTS = ["the whale swims in the <sea> & sings", "a river runs to the sea"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = train_tokenizer(TEXTS * 20, 300)
    base = replace(preset("tiny"), vocab_size=tokenizer.vocab_size)
    for name, engram in (("moe", None), ("engram", EngramConfig(rows_per_head=(50, 60)))):
        model = LanguageModel(
            replace(base, engram=engram), tokenizer.canonical_map() if engram else None
        )
        save_model(folder / name, model, tokenizer)
        records = [
            {"step": s, "tokens": 100 * s, "loss": 5.0 / s, "max_violation": 0.5, "seconds": s}
            for s in range(1, 9)
        ]
        records.append({"step": 8, "validation_loss": 4.25, "bits_per_byte": 1.5})
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return [folder / "moe", folder / "engram"]


@pytest.fixture(scope="module")
def production(tmp_path_factory):
    """Runs of the presets of production models."""
    folder = tmp_path_factory.mktemp("production")
    tokenizer = train_tokenizer(TEXTS * 20, 300)
    for name in ("v4-tiny", "v4.1-tiny", "qwen4-tiny"):
        config = replace(preset(name), vocab_size=tokenizer.vocab_size)
        mapped = config.engram is not None and config.engram.canonical
        model = LanguageModel(config, tokenizer.canonical_map() if mapped else None)
        save_model(folder / name, model, tokenizer)
        records = [{"step": s, "tokens": 100 * s, "loss": 5.0 / s} for s in range(1, 9)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return [folder / name for name in ("v4-tiny", "v4.1-tiny", "qwen4-tiny")]


@pytest.mark.slow
def test_the_page_of_production_models(production, tmp_path):
    page = write_report(
        production, tmp_path / "report.html", texts=TEXTS, sentence="the whale sings"
    )
    text = page.read_text(encoding="utf-8")
    for name in ("v4-tiny", "v4.1-tiny", "qwen4-tiny"):
        assert name in text
    assert "v4.1-tiny, block 1" in text and "qwen4-tiny, block 1" in text
    for folder in production:
        reading = read_run(folder, texts=TEXTS)
        config = reading.config
        assert reading.load.counts.sum(-1).gt(0).all()
        assert (reading.gates is None) == (config.engram is None)
        assert (reading.memory_kept is None) == (config.engram is None)
        assert reading.costs.total > reading.costs.activated > 0


class Balanced(HTMLParser):
    """Checks that every tag that must be closed is."""

    OPEN = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.stack = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page(runs, tmp_path):
    page = write_report(
        runs,
        tmp_path / "page" / "report.html",
        texts=TEXTS,
        sentence="the whale <sings>",
        note="a & b",
    )
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text.replace("{{}}", "") and "4.2500" in text and "a &amp; b" in text
    assert "engram, block 1" in text and "&lt;" in text and text.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#|data:)', text), "nothing is loaded from elsewhere"
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []


def test_a_reading_knows_its_run(runs):
    reading = read_run(runs[1], texts=TEXTS)
    assert reading.last("validation_loss") == 4.25 and reading.last("nothing") is None
    assert reading.load.counts.sum() > 0 and reading.gates is not None and reading.costs.memory > 0
    assert read_run(runs[0], texts=TEXTS).gates is None


def test_what_the_memory_is_worth_is_the_loss_of_every_token_both_ways(runs):
    model = load_model(runs[1]).eval()
    tokenizer = Tokenizer.load(runs[1])
    reading = read_run(runs[1], texts=TEXTS)
    sums = [0.0, 0.0]
    for ids in map(tokenizer.encode, TEXTS):
        expected = torch.tensor([[tokenizer.begin_id, *ids]])
        following = torch.tensor([*ids, tokenizer.end_id])
        with torch.no_grad():
            sums[0] += torch.nn.functional.cross_entropy(
                model(expected)[0], following, reduction="sum"
            ).item()
            with without_memory(model):
                sums[1] += torch.nn.functional.cross_entropy(
                    model(expected)[0], following, reduction="sum"
                ).item()
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    assert tuple(reading.memory_kept) == pytest.approx(
        (sums[0] / tokens, sums[1] / tokens), rel=1e-5
    )
    assert (
        reading.memory_kept.whole != reading.memory_kept.without
        and read_run(runs[0], texts=TEXTS).memory_kept is None
    )


def test_costs_and_load_are_those_of_the_training(runs, tmp_path, monkeypatch):
    notes = tmp_path / "notes.jsonl"
    notes.write_text(
        "".join(json.dumps({"body": f"the whale {n} swims in the sea"}) + "\n" for n in range(3))
    )
    folders = []
    for folder in runs:
        folders.append(tmp_path / folder.name)
        shutil.copytree(folder, folders[-1])
        text = {"data": {"source": str(notes), "column": "body", "limit": None}, "seq_len": 64}
        (folders[-1] / "train.json").write_text(json.dumps(text))
    opened = []
    plain = report.open_corpus
    monkeypatch.setattr(
        report,
        "open_corpus",
        lambda source, **options: opened.append((source, options)) or plain(source, **options),
    )
    write_report(folders, tmp_path / "report.html", sentence="the whale")
    assert opened == [(str(notes), {"column": "body", "limit": None})], "once for both runs"
    assert len(report.sample(trained(folders[0]))) == 1
    assert read_run(folders[0], texts=TEXTS).costs == costs(
        read_run(folders[0], texts=TEXTS).config, 64
    )
    expected = report.sample(trained(folders[0]))
    wordnet = notes.rename(tmp_path / "wordnet.jsonl")
    monkeypatch.setattr(
        report,
        "open_corpus",
        lambda source, **_: plain(
            str(wordnet) if source == "wordnet" else source, column="body", limit=None
        ),
    )
    assert report.sample(trained(folders[0])) == expected


def test_where_rows_are_is_given_run_by_run(runs, tmp_path):
    names = []
    for run in runs:
        shutil.copytree(run, tmp_path / f"{run.name} & its rows")
        names.append(f"{run.name} & its rows")
    page = write_report([tmp_path / name for name in names], tmp_path / "none.html", texts=TEXTS)
    assert "Speed by placement of the rows" not in page.read_text(encoding="utf-8")
    for name, other in zip(names, (41.0, 39.0), strict=True):
        (tmp_path / name / "placements.json").write_text(
            json.dumps({"resident": 82.0, "disk warm": other})
        )
    page = write_report([tmp_path / name for name in names], tmp_path / "both.html", texts=TEXTS)
    piece = (
        page.read_text(encoding="utf-8")
        .split("Speed by placement of the rows</h2>")[1]
        .split("</section>")[0]
    )
    result = re.findall(r"<h3>(.*?)</h3>", piece)
    assert result == [name.replace("&", "&amp;") for name in names] and piece.count("<svg") == 2
    assert piece.index("50%") < piece.index("48%")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="expected at least one run"):
        write_report([], tmp_path / "report.html")


def test_cells_are_escaped():
    assert "&lt;b&gt;" in table(["x"], [["<b>"]])


def test_expert_load_begins_each_text_as_a_document(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    plain = Tokenizer.load(run)
    begin_token = plain.backend.id_to_token(plain.end_id + 5)
    Tokenizer(plain.backend, plain.settings | {"bos_token": begin_token}).save(run)
    taken = read_run(run, texts=["", ""]).load.by_token.sum((0, 1))
    assert taken.nonzero().flatten().tolist() == [plain.end_id + 5]


def test_a_document_is_read_as_far_as_a_training_would(runs, tmp_path):
    """A text of 64 KB is one document, whose attention would not fit into memory."""
    long = "the whale swims in the sea " * 50
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    (run / "train.json").write_text(
        json.dumps({"data": {"source": "wordnet", "column": "text", "limit": None}, "seq_len": 9})
    )
    model = load_model(run)
    tokenizer = Tokenizer.load(run)
    reading = read_run(run, texts=[long, "the"])
    ids = tokenizer.encode(long)
    assert reading.load.counts.sum(-1).tolist() == [(9 + 1 + len(tokenizer.encode("the"))) * 2] * 3
    expected = torch.tensor([[tokenizer.begin_id, *ids][:9]])
    following = torch.tensor(ids[:9])
    short = torch.tensor([[tokenizer.begin_id, *tokenizer.encode("the")]])
    ends = torch.tensor([*tokenizer.encode("the"), tokenizer.end_id])
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(x)[0], y, reduction="sum").item()
            for x, y in ((expected, following), (short, ends))
        ]
    assert reading.memory_kept.whole == pytest.approx(sum(losses) / (9 + len(ends)), rel=1e-5)


def test_runs_of_one_name_are_given_apart_and_read_once(runs, tmp_path, monkeypatch):
    folders = [tmp_path / position for position in ("a/last/engram", "b/last/engram", "moe")]
    for folder in folders:
        shutil.copytree(runs[0], folder)
    text = write_report([*folders, folders[0]], tmp_path / "report.html", texts=TEXTS).read_text(
        encoding="utf-8"
    )
    cells = re.findall(r"<tr><td>(.*?)</td>", text.split("Costs</h2>")[1])
    assert cells == ["a/last/engram", "b/last/engram", "moe"]
    monkeypatch.chdir(folders[2])
    assert read_run(".", texts=TEXTS).name == "moe", (
        "a folder is called by its name wherever one stands"
    )


def test_a_run_of_needles_has_no_text_to_read(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "needle")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "needle" / name).unlink()
    lines = [{"step": 1, "tokens": 9, "loss": 3.0}, {"step": 1, "accuracy": 0.625}]
    (tmp_path / "needle" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    text = write_report([tmp_path / "needle"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "answers found" in text and "0.625" in text and "bits a byte" not in text
    assert "Load of the experts" not in text and "uses its memory" not in text


def test_a_run_that_diverged_or_has_no_metrics_is_shown(runs, tmp_path):
    for name in ("nan", "new"):
        shutil.copytree(runs[0], tmp_path / name)
    (tmp_path / "nan" / "metrics.jsonl").write_text(
        '{"step": 1, "tokens": 5, "loss": NaN}\n{"step": 1, "validation_loss": NaN}\n'
    )
    (tmp_path / "new" / "metrics.jsonl").unlink()
    page = write_report([tmp_path / "nan", tmp_path / "new"], tmp_path / "report.html", texts=TEXTS)
    assert "<td>nan</td>" in page.read_text(encoding="utf-8")


HOSTILE = "$\\frac{_<img src=x onerror=alert(1)>&amp;{{body}}"


def test_names_and_words_of_any_kind_stay_words(runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / HOSTILE)
    (tmp_path / HOSTILE / "placements.json").write_text(json.dumps({HOSTILE: 2.0, "disk": 1.0}))
    page = write_report(
        [tmp_path / HOSTILE, runs[0]],
        tmp_path / "out.html",
        texts=TEXTS,
        sentence=HOSTILE,
        title=HOSTILE,
        note=HOSTILE,
    )
    text = page.read_text(encoding="utf-8")
    assert "<img" not in text and text.count("<h2>Result</h2>") == 1
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []


def test_a_figure_is_shown_no_wider_than_it_was_drawn(runs, tmp_path):
    from rorqual.analyze import figures
    from rorqual.analyze.report import svg

    drawing = svg(figures.curves([]), 'a "curve"')
    assert 'role="img" aria-label="a &quot;curve&quot;"' in drawing
    assert 'style="--own: 540pt"' in drawing and 'height="' not in drawing.split(">")[1], (
        "7.5 inches of 72 points"
    )
    page = write_report(runs[:1], tmp_path / "report.html", texts=TEXTS).read_text(encoding="utf-8")
    assert "max-width: min(60rem, var(--own" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]


@pytest.fixture(scope="module")
def page_of(runs, tmp_path_factory):
    """Opens the report in a browser, at a given width and colour scheme.

    The page must not request anything, and the browser must not report an error.
    """
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is missing: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt install chromium")
    out = tmp_path_factory.mktemp("page") / "report.html"
    page = write_report(
        runs,
        out,
        texts=TEXTS,
        sentence="the whale swims in the <sea> & sings " * 4,
        title="w" * 200,
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)

        @contextmanager
        def visit(width=1200, scheme="light"):
            text = []
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
            shown = context.new_page()
            shown.on("console", lambda message: text.append(message.text))
            shown.on("pageerror", lambda error: text.append(str(error)))
            shown.on(
                "request",
                lambda asked: text.append(asked.url) if asked.url != page.as_uri() else None,
            )
            shown.goto(page.as_uri())
            yield shown
            context.close()
            assert text == []

        yield visit
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_reads_in_light_and_dark(page_of, width, scheme):
    with page_of(width, scheme) as page:
        for fold in page.locator("summary").all():
            fold.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            "nothing sticks out of the page"
        )
        colours = "[getComputedStyle(node).color, getComputedStyle(document.body).backgroundColor]"
        for piece in ("h1", "td", "th button", "summary", "figure svg", ".gates span", "pre"):
            ink, paper = page.locator(piece).first.evaluate(f"node => {colours}")
            assert contrast(ink, paper) >= 4.5, piece
        assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
        labels = page.locator("figure svg g[id^=text] :is(text, g)").first.evaluate(
            "node => getComputedStyle(node).fill"
        )
        assert contrast(labels, paper) >= 4.5, "the figures' words take the page's colour"
        assert len(page.screenshot(full_page=True)) > 20_000


def brightness(colour):
    """Computes the relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    shares = [int(piece) / 255 for piece in re.findall(r"\d+", colour)[:3]]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((brightness(one), brightness(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.slow
def test_a_click_sorts_a_table(page_of):
    with page_of() as page:
        costs = page.locator("table", has_text="total parameters")

        def column(n):
            return [
                row.locator("td").nth(n).text_content() for row in costs.locator("tbody tr").all()
            ]

        for n, key in ((0, str), (1, lambda text: int(text.replace(",", "")))):
            costs.locator("th button").nth(n).click()
            assert costs.locator("th").nth(n).get_attribute("aria-sort") == "ascending"
            assert column(n) == sorted(column(n), key=key)
            costs.locator("th button").nth(n).focus()
            page.keyboard.press("Enter")
            assert costs.locator("th").nth(n).get_attribute("aria-sort") == "descending"
            assert (
                column(n) == sorted(column(n), key=key, reverse=True) != sorted(column(n), key=key)
            )
        assert costs.locator("th[aria-sort]").count() == 1


@pytest.mark.slow
def test_it_prints_with_everything_unfolded_in_black_on_white(page_of):
    with page_of(scheme="dark") as page:
        folds = page.locator("details").count()
        page.evaluate(
            "addEventListener('beforeprint', () => { window.printed = ["
            "document.querySelectorAll('details[open]').length, "
            "getComputedStyle(document.body).color] })"
        )
        printed = page.pdf(format="A4")
        assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2
        assert page.evaluate("window.printed[0]") == folds > 0
        assert page.locator("details[open]").count() == 0, "folded again"
        page.emulate_media(media="print", color_scheme="dark")
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, "
            "getComputedStyle(document.body).backgroundColor]"
        )
        assert (ink, paper) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")
        assert (
            all(head.is_visible() for head in page.locator("h2").all())
            and page.locator("h2").count() == 6
        )
