"""Addresses of folders in object stores (s3://bucket/path), and where a machine keeps its copy of one. Knows neither Ray nor torch."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

ARROW_SCHEMES = ("file", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Schemes, besides s3, that pyarrow opens; all others are left to fsspec."""


def is_address(text: str) -> bool:
    """Whether a text is an address (scheme://...) and not a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def cache_root() -> Path:
    """Return this machine's folder for copies: $SYNQ_CACHE_DIR, else $XDG_CACHE_HOME/synq, else ~/.cache/synq."""
    own = os.environ.get("SYNQ_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "synq"


def local_copy(address: str) -> Path:
    """Return this machine's folder for an address: named by its last part and by a digest, which tells two addresses apart."""
    parts = split_address(address)
    path = unquote(parts.path).rstrip("/")
    last = re.sub(r"[^A-Za-z0-9._-]+", "_", path.rpartition("/")[2] or parts.netloc).strip("._") or "sweep"
    whole = f"{parts.scheme}://{parts.netloc}{path}" + (f"?{parts.query}" if parts.query else "")
    return cache_root() / "sweeps" / f"{last[:80]}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"


def split_address(address: str) -> SplitResult:
    """Return the parts of an address.

    Raises:
        ValueError: It is none.
    """
    if not is_address(address):
        raise ValueError(f"`output_dir` must be an address (scheme://...), but got {address!r}")
    try:
        return urlsplit(address, allow_fragments=False)
    except ValueError as error:
        raise ValueError(
            f"`output_dir` must be an address (scheme://...), but got one that cannot be read: {error}"
        ) from None


def shown(parts: SplitResult) -> str:
    """The address without its options, and without user:password@."""
    user, _, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{host if ':' in user else parts.netloc}{parts.path}"


def connect(parts: SplitResult) -> tuple[Any, str]:
    """Return the file system of an address, as pyarrow has it, and the folder in it.

    Raises:
        ValueError: The scheme is unknown or takes no such options.
        ImportError: What the scheme needs is not installed.
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
    """As `connect`. By hand, since Arrow does not read AWS_ENDPOINT_URL here, and asks Amazon where another server's bucket lies."""
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    options = dict(parse_qsl(parts.query))
    unknown = sorted(set(options) - {"endpoint_override", "scheme", "region"})
    bucket = parts.netloc.rpartition("@")[2]
    if unknown or not bucket:
        raise ValueError(f"it takes no option {unknown[0]!r}" if unknown else "it names no bucket")
    own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = options.get("endpoint_override", own).rpartition("://")
    region = options.get("region")
    if not region and not host:
        with suppress(OSError):  # a closed network; the next call says what is wrong, if anything is
            region = resolve_s3_region(bucket)
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    where = {"endpoint_override": host.rstrip("/") or None, "scheme": options.get("scheme") or scheme or "https"}
    return S3FileSystem(region=region, **where), bucket + unquote(parts.path).rstrip("/")
