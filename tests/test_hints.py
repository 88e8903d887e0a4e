"""Tests suggestions for misspelt names, and for packages that are not installed."""

from pathlib import Path

import pytest

from rorqual import hints


def test_choose_names_the_nearest() -> None:
    assert hints.choose("preset", "tiny", ["tiny"]) == "tiny"
    with pytest.raises(
        ValueError, match=r"got preset 'tin', expected one of tiny, small; did you mean 'tiny'\?"
    ):
        hints.choose("preset", "tin", ["tiny", "small"])
    versions = ["deepseek-v3", "deepseek-v4-flash", "deepseek-v4-pro"]
    with pytest.raises(
        ValueError, match=r"did you mean 'deepseek-v4-flash' or 'deepseek-v4-pro'\?$"
    ):
        hints.choose("preset", "deepseek-v4", versions)
    with pytest.raises(ValueError, match=r"did you mean 'deepseek-v3'\?$"):
        hints.choose("preset", "deepsek-v3", versions)
    with pytest.raises(ValueError, match=r"expected one of a, b$"):
        hints.choose("letter", "", ["a", "b"])
    with pytest.raises(ValueError, match=r"expected one of a, b$"):
        hints.choose("letter", "zzzzzz", ["a", "b"])


def test_an_extra_is_installed_from_the_checkout_or_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The name rorqual is on no package index.

    So a checkout is installed by its path, and a wheel's extras follow from its own metadata.
    """
    root = Path(hints.__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    assert hints.install("serve") == f"pip install -e '{root}[serve]'"
    monkeypatch.chdir(root)
    assert hints.install("serve") == "pip install -e '.[serve]'"
    monkeypatch.setattr(hints, "__file__", str(tmp_path / "site-packages" / "rorqual" / "hints.py"))
    assert hints.install("serve") == "pip install 'rorqual[serve]'"
