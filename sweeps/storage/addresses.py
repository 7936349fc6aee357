"""Addresses of folders in object stores (s3://bucket/path), and the local folder for the copy of one.

Imports neither Ray nor torch.
"""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

ARROW_SCHEMES = ("file", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Schemes besides s3 that pyarrow opens; fsspec opens all others."""


def is_address(text: str) -> bool:
    """Return whether a text is an address (scheme://...) rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def cache_root() -> Path:
    """Return the cache folder for copies: $SYNQ_CACHE_DIR, else $XDG_CACHE_HOME/synq, else ~/.cache/synq."""
    folder = os.environ.get("SYNQ_CACHE_DIR")
    if folder:
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "synq"


def local_copy(address: str) -> Path:
    """Return the local folder for the copy of an address, named by the last part of the address and a digest of it.

    Raises:
        ValueError: The text is not an address.
    """
    parts = split_address(address)
    path = unquote(parts.path).rstrip("/")
    last = re.sub(r"[^A-Za-z0-9._-]+", "_", path.rpartition("/")[2] or parts.netloc).strip("._") or "sweep"
    whole = f"{parts.scheme}://{parts.netloc}{path}" + (f"?{parts.query}" if parts.query else "")
    return cache_root() / "sweeps" / f"{last[:80]}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def split_address(address: str) -> SplitResult:
    """Split an address into its parts.

    Raises:
        ValueError: The text is not an address, or has a part . or ..
    """
    if not is_address(address):
        raise ValueError(f"`output_dir` must be an address (scheme://...), but got {address!r}")
    try:
        parts = urlsplit(address, allow_fragments=False)
        if {".", ".."} & set(unquote(parts.path).split("/")):
            raise ValueError("it has a part . or .., which stores take for a name when they write, not when they list")
        return parts
    except ValueError as error:
        raise ValueError(
            f"`output_dir` must be an address (scheme://...), but got one that cannot be read: {error}"
        ) from None


def shown(parts: SplitResult) -> str:
    """Return an address for messages: without options, and without user:password@."""
    user, _, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{host if ':' in user else parts.netloc}{parts.path}"


def connect(parts: SplitResult) -> tuple[Any, str]:
    """Open the file system of an address.

    Returns:
        The `pyarrow.fs.FileSystem`, and the path of the folder in it.

    Raises:
        ValueError: The scheme is unknown or does not take the options of the address.
        ImportError: A package that the scheme requires is not installed.
    """
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    if parts.scheme == "s3":
        return _connect_s3(parts)
    if parts.query and (parts.scheme == "file" or parts.scheme not in ARROW_SCHEMES):
        raise ValueError(f"it takes no options after ?, but got {parts.query!r}")
    if parts.scheme in ARROW_SCHEMES:
        query = dict(parse_qsl(parts.query))
        if parts.scheme in ("gs", "gcs"):
            query.setdefault("retry_limit_seconds", "10")  # instead of a quarter of an hour for each call
        path = quote(parts.path, safe="/%:@!$&'()*+,;=")
        return FileSystem.from_uri(parts._replace(path=path, query=urlencode(query)).geturl())
    from fsspec.core import url_to_fs

    files, root = url_to_fs(parts.geturl())
    return PyFileSystem(FSSpecHandler(files)), root


def _connect_s3(parts: SplitResult) -> tuple[Any, str]:
    """Open an S3 file system as `connect` does, with AWS_ENDPOINT_URL and the region resolved here.

    Arrow's own parser of addresses ignores AWS_ENDPOINT_URL, and queries Amazon for the region of any bucket.
    """
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    options = dict(parse_qsl(parts.query))
    unknown = sorted(set(options) - {"endpoint_override", "scheme", "region"})
    bucket = parts.netloc.rpartition("@")[2]
    if unknown or not bucket:
        raise ValueError(f"it takes no option {unknown[0]!r}" if unknown else "it names no bucket")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = options.get("endpoint_override", endpoint).rpartition("://")
    region = options.get("region")
    if not region and not host:
        with suppress(OSError):  # no network; if that matters, the next call raises
            region = resolve_s3_region(bucket)
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    server = {"endpoint_override": host.rstrip("/") or None, "scheme": options.get("scheme") or scheme or "https"}
    return S3FileSystem(region=region, **server), bucket + unquote(parts.path).rstrip("/")
