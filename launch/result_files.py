"""The networks and labeled images of the result tables: which rows need them, whether they are there, and right.

    python launch/result_files.py FOLDER [--from FILE ...]

FOLDER is what SYNQ_DATA_DIR names. Each FILE is one that was published with the networks or the images, or one of
FOLDER's, under any name: its content decides what it is, and any other is rejected. Then all that FOLDER holds is
checked: digests, shapes, number of classes and the teacher's top-1. Nothing is downloaded.
"""

import hashlib
import io
import pickle
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # runs from a checkout that is not installed
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import click
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from synq.common.exit_codes import RUN_FAILED, leave
from synq.common.files import check_paths, write_bytes_atomic
from synq.common.text_tables import to_text
from synq.config.command_line import Command
from synq.config.command_options import argument, option
from synq.config.parsing import config_from_dict, load_config
from synq.config.run import EvaluationConfig, RuntimeConfig, TeacherConfig
from synq.evaluation.labeled_arrays import read_npz
from synq.evaluation.measure import evaluate, open_labeled
from synq.runtime import make_accelerator
from synq.teacher.teacher import load_teacher
from synq.teacher.weight_files import read_weights

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "sweeps" / "specs" / "recipes"
SELECTION = HERE / "cifar_images.npz"
"""First four bytes of the SHA-256 of each image of the tables, (N, 4) uint8 for each set, in the order of its file."""
TOLERANCE = 0.05
"""Percentage points by which float top-1 may differ between machines: two of 5,000 images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network of the tables with its labeled images: what their files must be.

    Attributes:
        name: Start of the names of its recipes, its factory and its weight file.
        images: Start of the name of its file of images.
        classes: Number of classes.
        weights: Digest of the weights, see `tensor_digest`.
        pixels: Digest of the images with their labels, see `array_digest`.
        top1: Top-1 of the float network on the images, in percent.
        published_weights: Name and SHA-256 of the weight file as it was published.
        published_images: Name and MD5 of the test set as it was published, outside and inside of its archive.
        labels: Key of the labels inside.
    """

    name: str
    images: str
    classes: int
    weights: str
    pixels: str
    top1: float
    published_weights: tuple[str, str]
    published_images: tuple[tuple[str, str], tuple[str, str]]
    labels: str

    @property
    def files(self) -> tuple[str, str]:
        """Names of its two files in FOLDER."""
        return f"{self.name}.safetensors", f"{self.images}_test_a.npz"


NETWORKS = (
    Network(
        name="cifar10_resnet20",
        images="cifar10",
        classes=10,
        weights="de6272aa23b73b6a398e854340a878d9f3af343dae25f62e30afe5eeb71325ba",
        pixels="4e6d5b99fd1b13ff00665d5a676209f54a56372b62cda7af27260a5c419bc001",
        top1=91.48,
        published_weights=(
            "resnet20-12fca82f.th",
            "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
        ),
        published_images=(
            ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
            ("test_batch", "40351d587109b95175f43aff81a1287e"),
        ),
        labels="labels",
    ),
    Network(
        name="cifar100_resnet20",
        images="cifar100",
        classes=100,
        weights="31992986b7e634038082d019f67764228703b22b9eb9be807147fb71400c2a78",
        pixels="a3b6b5b5a30552b45d5e9c0cb0b66b005b4ea1a3f1d1af43e19fa25fb99c06e4",
        top1=69.56,
        published_weights=(
            "resnet20_cifar100.pth",
            "9dd75a40f65691d4dbb4c5be9e467ddf710a4d6f176bfc9a7e1eb434c2364717",
        ),
        published_images=(
            ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
            ("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        ),
        labels="fine_labels",
    ),
)


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name: name, dtype, shape and bytes, in the order of the names.

    The batch counters of BatchNorm are left out: inference does not read them, and files may lack them.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith("num_batches_tracked"):
            tensor = tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def array_digest(images: np.ndarray, labels: np.ndarray) -> str:
    """Return the SHA-256 of images and labels: the shape and the bytes of both, the labels as int64."""
    digest = hashlib.sha256()
    for part in (images, labels.astype(np.int64)):
        digest.update(str(part.shape).encode() + part.tobytes())
    return digest.hexdigest()


def file_digest(path: Path, kind: str) -> str:
    """Return the digest of a file's bytes, of the kind ``sha256`` or ``md5``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def chosen_images(content: bytes, network: Network, selection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of the tables from the published test set.

    Args:
        content: A pickled dict of "data", (N, 3072) uint8, channels first, and labels. It is unpickled, so its digest
            must have been compared.
        network: Which set.
        selection: (n, 4) uint8, as SELECTION.

    Returns:
        Images (n, 32, 32, 3) uint8 and labels (n,) int64, in the order of the selection.
    """
    found = pickle.loads(content, encoding="latin1")
    images = np.ascontiguousarray(found["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    rows = {hashlib.sha256(image.tobytes()).digest()[:4]: row for row, image in enumerate(images)}
    missing = [start for start in map(bytes, selection) if start not in rows]
    if missing:
        raise ValueError(f"{network.images} must hold all {len(selection)} images of the table, lacks {len(missing)}")
    order = np.array([rows[bytes(start)] for start in selection])
    return images[order], np.array(found[network.labels], dtype=np.int64)[order]


def take(path: Path, folder: Path) -> str:
    """Put one given file into the folder, as the file of the tables that it holds; return that file's name.

    Raises:
        ValueError: It is none of the files; one line that names it, the digest that it must have, and its own.
        OSError: It cannot be read.
    """
    sha256, md5 = (file_digest(path, kind) for kind in ("sha256", "md5"))
    for network in NETWORKS:
        weights, images = network.files
        archive, inside = network.published_images
        if md5 in (archive[1], inside[1]):
            content = path.read_bytes() if md5 == inside[1] else _member(path, inside)
            with np.load(SELECTION) as selections:
                x, y = chosen_images(content, network, selections[network.images])
            found = io.BytesIO()
            np.savez(found, x=x, y=y)
            write_bytes_atomic(folder / images, found.getvalue())
            return images
        if sha256 == network.published_weights[1] or path.suffix == ".safetensors":
            tensors = {name.removeprefix("module."): tensor.contiguous() for name, tensor in read_weights(path).items()}
            if tensor_digest(tensors) == network.weights:
                write_bytes_atomic(folder / weights, save(tensors))
                return weights
        if path.suffix == ".npz" and array_digest(*read_npz(path)) == network.pixels:
            write_bytes_atomic(folder / images, path.read_bytes())
            return images
    raise ValueError(_foreign(path, sha256, md5))


def _member(path: Path, inside: tuple[str, str]) -> bytes:
    """Return the test set out of its archive, whose digest is that of the published one."""
    with tarfile.open(path) as archive:
        for member in archive:
            if Path(member.name).name == inside[0] and (file := archive.extractfile(member)) is not None:
                content = file.read()
                if hashlib.md5(content).hexdigest() == inside[1]:
                    return content
    raise ValueError(f"{path} must hold {inside[0]} with the MD5 {inside[1]}, but does not")


def _foreign(path: Path, sha256: str, md5: str) -> str:
    """Return the message about a file that is none of the tables'."""
    known = {network.published_weights[0]: f"the SHA-256 {network.published_weights[1]}" for network in NETWORKS}
    for network in NETWORKS:
        known |= {name: f"the MD5 {digest}" for name, digest in network.published_images}
        known |= {network.files[0]: f"the weights {network.weights}", network.files[1]: f"the images {network.pixels}"}
    if path.name not in known:
        return f"{path} must be one of {', '.join(known)} by its content, but is none: its SHA-256 is {sha256}"
    found = f"the MD5 {md5}" if "MD5" in known[path.name] else f"the SHA-256 {sha256}"
    if path.suffix == ".safetensors":
        found = f"the weights {tensor_digest(read_weights(path))}"
    if path.suffix == ".npz":
        found = f"the images {array_digest(*read_npz(path))}"
    return f"{path} must have {known[path.name]}, but has {found}: it is damaged or another file"


def check(network: Network, folder: Path) -> str:
    """Return what the two files of a network hold, checked; "" if one is missing.

    Raises:
        ValueError: Digest, shapes, number of classes or top-1 differ from the tables'; one line that names the file.
        OSError: A file cannot be read.
    """
    weights, images = (folder / name for name in network.files)
    for path, expected in ((weights, network.weights), (images, network.pixels)):
        if not path.is_file():
            continue
        found = tensor_digest(read_weights(path)) if path == weights else array_digest(*read_npz(path))
        if found != expected:
            raise ValueError(_foreign(path, "", ""))
    if not (weights.is_file() and images.is_file()):
        return ""
    settings = load_config(recipes(network)[0])["teacher"]
    settings |= {"spec": f"{folder / 'teachers.py'}:{network.name}", "weights": str(weights)}
    teacher = load_teacher(config_from_dict(TeacherConfig, settings))
    if teacher.num_classes != network.classes:
        raise ValueError(f"{weights} must have {network.classes} classes, but has {teacher.num_classes}")
    labeled = open_labeled(replace(EvaluationConfig(), dataset=f"npz:{images}"), teacher)
    assert labeled is not None  # the settings name it
    accelerator = make_accelerator(RuntimeConfig(device="cpu", progress=False))
    top1 = evaluate(
        teacher.graph, labeled.batch, torch.arange(len(labeled)), batch_size=256, accelerator=accelerator
    ).top1
    if abs(top1 - network.top1) > TOLERANCE:
        raise ValueError(f"{weights} must reach a top-1 of {network.top1} on {images.name}, but has {top1:.2f}")
    size = " x ".join(map(str, teacher.input_size))
    return f"{network.name}: {network.classes} classes, {len(labeled)} images of {size}, top-1 {top1:.2f}"


def recipes(network: Network) -> list[Path]:
    """Return the recipes of a network's rows of the main table."""
    return sorted(RECIPES.glob(f"{network.name}_*.toml"))


def table(folder: Path) -> str:
    """Return the files that the rows of the main table need, and whether they are there."""
    rows = []
    for network in NETWORKS:
        published = (network.published_weights[0], network.published_images[0][0])
        for name, source in zip(network.files, published, strict=True):
            row = {"rows": f"{len(recipes(network))} recipes {network.name}_*", "file": name}
            rows.append({**row, "is there": "yes" if (folder / name).is_file() else "no", "made from": source})
    return to_text(rows, tuple(rows[0]))


@click.command("result_files", cls=Command, exit_codes="0 all are there and right, 1 some are missing, 2 one is wrong")
@argument("folder", metavar="FOLDER", help="folder of the files, the one that SYNQ_DATA_DIR names; made if missing")
@option("--from", "given", several=True, metavar="FILE", help="files as they were published, or of another such folder")
def command(folder: str, given: tuple[str, ...]) -> int:
    """Check the networks and labeled images of the result tables, and make their files from published ones."""
    check_paths(given, "from")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    for name in given:
        print(f"{name}: {take(Path(name), root)}", flush=True)
    teachers = root / "teachers.py"
    if not teachers.exists():
        write_bytes_atomic(teachers, (HERE / "cifar_teachers.py").read_bytes())
    found = [check(network, root) for network in NETWORKS]
    print(table(root), end="")
    for line in filter(None, found):
        print(line)
    return 0 if all(found) else RUN_FAILED


if __name__ == "__main__":
    leave(command.run(program="python launch/result_files.py"))
