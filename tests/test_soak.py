"""Runs samples of the long tests in benchmarks/: hostile texts, and bugs that tests must catch."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "texts.py"


@cache
def benchmark(name: str) -> ModuleType:
    """Imports a script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_hostile_file_is_read_counted_or_refused():
    """Runs a tenth of the soak: no file is lost uncounted, and none ends in a traceback."""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, SCRIPT, "--files", "100", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["files"] == 100
    assert result["lost"] == 0, result["reasons"]
    assert set(result["kinds"]["good text"]) == {"read"}
    assert "read" not in result["kinds"]["random bytes"]
    assert done.returncode == 0


def test_every_mutation_fits_the_code_and_names_tests_that_are_there():
    mutations = benchmark("mutations")
    result = mutations.read_mutations(mutations.DATA)
    assert len(result) >= 30
    for mutation in result:
        mutations.mutated(mutation, ROOT)
        for test in mutation.tests:
            file, *names = test.partition("[")[0].split("::")
            assert f"def {names[-1]}(" in (ROOT / file).read_text(encoding="utf-8"), test


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # Behind 2,048 tokens the same lines of the same script run as behind 512.
    [name for name in benchmark("baseline").BARS if not name.endswith("_2048")],
)
def test_every_figure_that_has_a_bar_can_be_measured(name: str):
    result = benchmark("baseline").measured(name, ROOT, smallest=True)
    assert isinstance(result, float), result
    assert result > 0


@pytest.mark.slow
def test_a_server_lives_through_hostile_clients_and_answers_as_before():
    """Runs a part of the soak; its output says what of it went wrong."""
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    sizes = ["--seconds", "8", "--bodies", "300", "--hang-ups", "24", "--times", "4", "--json"]
    command = [sys.executable, ROOT / "benchmarks" / "soak.py", *sizes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr[-2000:]
    assert json.loads(done.stdout)["wrong"] == [], done.stdout


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    """With ties; and among tokens of one stratum alone."""
    knowledge = benchmark("knowledge")
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, 40) / 2
    labels = generator.random(40) < 0.4
    pairs = [
        (one > other) + (one == other) / 2 for one in scores[labels] for other in scores[~labels]
    ]
    assert knowledge.area(scores[labels], scores[~labels]) == pytest.approx(np.mean(pairs))
    strata = generator.integers(0, 3, 40)
    inside = [
        (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
        for i in range(40)
        for j in range(40)
        if labels[i] and not labels[j] and strata[i] == strata[j]
    ]
    assert knowledge.stratified_area(scores, labels, strata) == pytest.approx(np.mean(inside))


def test_the_longest_entity_is_marked_at_its_end():
    entities = {"white shark", "great white shark", "Pacific Ocean", "shark fin"}
    text = "a great white shark fin of the Pacific Ocean"
    marked = benchmark("knowledge").marked(text, entities)
    assert marked.entity_ends == {text.index("shark") + 5, len(text)}
    assert len(marked.word_ends) == 9


def test_ngrams_are_counted_within_documents():
    ngrams = benchmark("ngrams")
    training = [[1, 2, 1, 2], [1, 2], [3]]
    assert ngrams.count(training, [[1, 2, 1], [2, 3]], 2, 3) == (2, 1, pytest.approx(1 / 3))
    assert ngrams.count(training, [[1, 2, 1]], 3, 1) == (2, 2, 1.0)
