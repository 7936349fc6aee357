"""Labeled sets: layouts, sizes, fixed subsets, and every way a set can be wrong."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import synq.evaluation.labeled_sources as labeled_sources
from synq.evaluation.labeled import LabeledSet, fit_images, load_labeled, selection_mask
from synq.evaluation.labeled_arrays import read_idx
from synq.evaluation.labeled_sources import digits_heldout_mask, from_arrays

COLOUR = (3, 8, 8)
MEAN3, STD3 = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)


def write_npz(path: Path, *, num: int = 6, size: int = 8, channels: int | None = 3, classes: int = 3) -> np.ndarray:
    shape = (num, size, size) if channels is None else (num, size, size, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(path, x=images, y=np.arange(num) % classes)
    return images


def load(spec: str, size: tuple[int, int, int] = COLOUR, **fields: object) -> LabeledSet:
    mean, std = ((0.0,), (1.0,)) if size[0] == 1 else (MEAN3, STD3)
    return load_labeled(spec, size, mean, std, **{"num_classes": 3, **fields})  # type: ignore[arg-type]


# --- digits ---


def test_digits_parts_are_disjoint_fixed_and_complete() -> None:
    heldout, train = load("digits", (1, 16, 16), num_classes=10), load("digits:train", (1, 16, 16), num_classes=10)
    assert (len(heldout), len(train)) == (620, 1177)
    assert torch.bincount(heldout.labels).min() >= 50
    # Fixed for ever: the first held-out numbers, computed with hashlib alone.
    assert np.flatnonzero(digits_heldout_mask(1797))[:6].tolist() == [0, 1, 2, 3, 4, 6]
    assert np.array_equal(digits_heldout_mask(50), digits_heldout_mask(1797)[:50])


def test_digits_pixels_are_sklearns() -> None:
    from sklearn.datasets import load_digits

    raw, labels = load_digits(return_X_y=True)
    mask = digits_heldout_mask(len(raw))
    data = load("digits", (1, 8, 8), num_classes=10)
    images, found = data.batch(torch.arange(len(data)))
    assert np.array_equal(found.numpy(), labels[mask])
    assert np.abs(images.numpy().reshape(-1, 64) * 16 - raw[mask]).max() <= 16 / 255 / 2 + 1e-5


# --- one image's way ---


def test_npz_values_are_scaled_normalized_and_in_place(tmp_path: Path) -> None:
    images = write_npz(tmp_path / "a.npz")
    data = load(f"npz:{tmp_path}/a.npz")
    expected = (images.astype(np.float64) / 255 - MEAN3) / STD3
    batch, labels = data.batch(torch.tensor([4, 1]))
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 8, 8)
    assert np.allclose(batch.numpy(), expected[[4, 1]].transpose(0, 3, 1, 2), atol=1e-6)
    assert labels.tolist() == [1, 1]
    single, label = data[-1]
    assert torch.equal(single, data.batch(torch.tensor([5]))[0][0]) and label == 2
    with pytest.raises(IndexError):
        data[6]


def test_gray_images_are_repeated_for_a_color_teacher(tmp_path: Path) -> None:
    images = write_npz(tmp_path / "a.npz", channels=None)
    batch, _ = load(f"npz:{tmp_path}/a.npz").batch(torch.tensor([2]))
    restored = batch[0] * torch.tensor(STD3).view(3, 1, 1) + torch.tensor(MEAN3).view(3, 1, 1)
    for channel in restored:
        assert np.allclose(channel.numpy() * 255, images[2], atol=1e-3)


def test_color_images_are_rejected_for_a_gray_teacher(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz must match a teacher of 1 channel\(s\), but have 3"):
        load(f"npz:{tmp_path}/a.npz", (1, 8, 8))
    with pytest.raises(ValueError, match="must have 1 channel"):
        fit_images(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (1, 4, 4))


def test_resizing_averages_when_shrinking() -> None:
    # Half of the columns are white: those that bilinear sampling without antialiasing reads, at 4 i + 1.5.
    columns = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).repeat(8).expand(1, 1, 32, 32)
    shrunk = fit_images(columns, (1, 8, 8))
    assert torch.allclose(shrunk, torch.full((1, 1, 8, 8), 0.5), atol=0.15)
    constant = fit_images(torch.full((1, 1, 8, 8), 51, dtype=torch.uint8), (3, 16, 16))
    assert torch.allclose(constant, torch.full((1, 3, 16, 16), 0.2))


# --- fixed subsets ---


def test_selection_mask_is_fixed_for_ever() -> None:
    # The first selected indices, from hashlib only: int(sha256(f"selection:{i}").hexdigest()[:12], 16) / 2**48 < 0.2
    assert torch.nonzero(selection_mask(40, 0.2)).flatten().tolist() == [1, 8, 33]
    assert torch.equal(selection_mask(40, 0.2), selection_mask(1000, 0.2)[:40])
    assert abs(float(selection_mask(5000, 0.2).float().mean()) - 0.2) < 0.02
    assert not selection_mask(100, 0.0).any() and selection_mask(100, 1.0).all()
    assert not (selection_mask(500, 0.2) & ~selection_mask(500, 0.5)).any()
    with pytest.raises(ValueError, match=r"`selection_fraction` must be in 0\.\.1, but got 1\.5"):
        selection_mask(3, 1.5)


def test_limited_sets_are_nested_ordered_and_keep_their_selection(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", num=200)
    full, half, few = (load(f"npz:{tmp_path}/a.npz", limit=limit) for limit in (None, 100, 30))
    assert [len(full), len(half), len(few)] == [200, 100, 30]
    assert set(few.indices.tolist()) < set(half.indices.tolist())
    assert few.indices.tolist() == sorted(few.indices.tolist())
    assert torch.equal(few.labels, full.labels[few.indices])
    assert torch.equal(few.batch(torch.tensor([7]))[0], full.batch(few.indices[7:8])[0])
    assert torch.equal(few.selection_mask(0.4), full.selection_mask(0.4)[few.indices])
    assert len(load(f"npz:{tmp_path}/a.npz", limit=1000)) == 200
    with pytest.raises(ValueError, match=r"`num_images` must be at least 1, but got 0"):
        load(f"npz:{tmp_path}/a.npz", limit=0)


def test_limit_draws_from_the_whole_of_a_sorted_set(tmp_path: Path) -> None:
    # Sets sorted by class are common: the first n images would all be of one class.
    labels = np.repeat(np.arange(4), 50)
    np.savez(tmp_path / "a.npz", x=np.zeros((200, 8, 8), np.uint8), y=labels)
    assert set(load(f"npz:{tmp_path}/a.npz", limit=40, num_classes=4).labels.tolist()) == {0, 1, 2, 3}


# --- npz errors ---


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 8, 8, 3), np.uint8)}, r"arrays `x` and `y`, but has x"),
        ({"x": np.zeros((2, 8, 8, 3), np.float32), "y": np.zeros(2, int)}, r"images of .* uint8 .* float32"),
        ({"x": np.zeros((2, 3, 8, 8), np.uint8), "y": np.zeros(2, int)}, r"images of .*but got \(2, 3, 8, 8\)"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.zeros(3, int)}, r"must be \(2,\) integers.*\(3,\)"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.zeros(2)}, r"must be \(2,\) integers.*float64"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.array([0, 3])}, r"must be in 0\.\.2 .* but got 0\.\.3"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.array([-1, 0])}, r"but got -1\.\.0"),
        ({"x": np.zeros((0, 8, 8, 3), np.uint8), "y": np.zeros(0, int)}, r"must contain images, but is empty"),
        ({"x": np.array([{}], dtype=object), "y": np.zeros(1, int)}, r"cannot be used: .*allow_pickle"),
    ],
)
def test_wrong_npz_files(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as caught:
        load(f"npz:{tmp_path}/bad.npz")
    assert "\n" not in str(caught.value) and "bad.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_damaged_npz_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.npz"
    if content is None:
        write_npz(path)
        content = path.read_bytes()[:-60]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"npz file .*bad\.npz cannot be used: "):
        load(f"npz:{path}")


def test_absent_paths_and_unknown_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"`evaluation.dataset` must name an existing path.*gone\.npz"):
        load(f"npz:{tmp_path}/gone.npz")
    for spec, hint in (("cifar-10", "did you mean cifar10"), ("digits:test", "digits:test"), ("npz", "npz:FILE")):
        with pytest.raises(ValueError, match=rf"`evaluation.dataset` must be one of digits.*{hint}"):
            load(spec)
    write_npz(tmp_path / "a.npz")
    monkeypatch.setenv("SYNQ_TEST_FOLDER", str(tmp_path))
    assert len(load("npz:$SYNQ_TEST_FOLDER/a.npz")) == 6


# --- folders ---


def write_folder(root: Path, names: tuple[str, ...], size: tuple[int, int] = (20, 10), mode: str = "RGB") -> None:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        color = (20 * number,) * 3 if mode == "RGB" else 20 * number
        Image.new(mode, size, color).save(root / name / "image.png")


def test_folder_labels_follow_the_sorted_names(tmp_path: Path) -> None:
    write_folder(tmp_path, ("b", "a", "c"))
    data = load(f"imagefolder:{tmp_path}")
    assert data.labels.tolist() == [0, 1, 2]
    images, _ = data.batch(torch.arange(3))
    assert images.shape == (3, 3, 8, 8)
    restored = images * torch.tensor(STD3).view(3, 1, 1) + torch.tensor(MEAN3).view(3, 1, 1)
    assert torch.allclose(restored.mean((1, 2, 3)) * 255, torch.tensor([20.0, 0.0, 40.0]), atol=0.01)


def test_folder_numbers_are_labels_by_value(tmp_path: Path) -> None:
    write_folder(tmp_path, ("2", "10"))
    data = load(f"imagefolder:{tmp_path}", num_classes=11)
    assert sorted(data.labels.tolist()) == [2, 10]
    row = data.labels.tolist().index(10)
    restored = data[row][0] * torch.tensor(STD3).view(3, 1, 1) + torch.tensor(MEAN3).view(3, 1, 1)
    assert torch.allclose(restored * 255, torch.full((3, 8, 8), 20.0), atol=0.01)
    with pytest.raises(ValueError, match=r"must be in 0\.\.2 .*but got 2\.\.10"):
        load(f"imagefolder:{tmp_path}")


def test_part_of_the_classes_by_name_is_rejected(tmp_path: Path) -> None:
    write_folder(tmp_path, ("cat", "dog"))
    with pytest.raises(ValueError, match=r"one folder per class of the teacher \(3\), but has 2; .*class index"):
        load(f"imagefolder:{tmp_path}")


def test_folder_images_are_scaled_and_cut_in_the_center(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    pixels = np.zeros((448, 896, 3), np.uint8)
    pixels[:, 448 - 196 : 448 + 196] = 255  # shorter side 448 -> 256, so the center 392 of 448 columns are the 224 kept
    pixels[:28], pixels[-28:] = 0, 0
    Image.fromarray(pixels).save(tmp_path / "0" / "a.png")
    data = load_labeled(f"imagefolder:{tmp_path}", (3, 224, 224), (0.0,) * 3, (1.0,) * 3, num_classes=3)
    image = data[0][0]
    assert image.shape == (3, 224, 224)
    assert torch.allclose(image[:, 2:-2, 2:-2], torch.ones(3, 220, 220))


def test_folder_gray_and_damaged_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "gray", ("0", "1"), mode="L")
    assert load(f"imagefolder:{tmp_path}/gray", (1, 8, 8))[1][0].shape == (1, 8, 8)
    assert load(f"imagefolder:{tmp_path}/gray")[1][0].shape == (3, 8, 8)
    write_folder(tmp_path / "color", ("0",))
    with pytest.raises(
        ValueError, match=r"must be grayscale for a teacher of 1 channel, but .*image\.png has mode RGB"
    ):
        load(f"imagefolder:{tmp_path}/color", (1, 8, 8))[0]
    (tmp_path / "color" / "0" / "image.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ValueError, match=r"image .*image\.png must be readable"):
        load(f"imagefolder:{tmp_path}/color")[0]
    (tmp_path / "empty" / "0").mkdir(parents=True)
    with pytest.raises(ValueError, match="must contain images, but is empty"):
        load(f"imagefolder:{tmp_path}/empty")


# --- IDX and sets by name ---


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_fashion(folder: Path, compress: bool, num: int = 5) -> np.ndarray:
    folder.mkdir(parents=True)
    images = np.random.default_rng(1).integers(0, 256, (num, 28, 28), dtype=np.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", np.arange(num, dtype=np.uint8))):
        content = idx_bytes(values)
        name = f"t10k-{name}-ubyte" + (".gz" if compress else "")
        (folder / name).write_bytes(gzip.compress(content) if compress else content)
    return images


@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_from_the_data_folder(tmp_path: Path, folder: str, compress: bool) -> None:
    images = write_fashion(tmp_path / folder, compress)
    data = load("fashion-mnist", (1, 28, 28), num_classes=10, data_dir=str(tmp_path))
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert np.allclose(data.batch(torch.arange(5))[0][:, 0].numpy() * 255, images, atol=1e-3)


def test_data_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path / "fashion-mnist", False)
    monkeypatch.setenv("SYNQ_DATA_DIR", str(tmp_path))
    assert len(load("fashion-mnist", (1, 28, 28), num_classes=10)) == 5


def test_damaged_idx_files(tmp_path: Path) -> None:
    values = np.zeros((2, 3), np.uint8)
    for name, content, message in (
        ("a", idx_bytes(values)[:-1], r"must contain \(2, 3\) bytes"),
        ("b", b"\0\0\x09\x01", "must be an IDX file"),
        ("c", b"", "must be an IDX file"),
        ("d", idx_bytes(values)[:6], "is damaged"),
        ("e.gz", b"no gzip", "must be a readable gzip file"),
        ("f.gz", gzip.compress(idx_bytes(values))[:-9], "must be a readable gzip file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(tmp_path / name)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_sets_by_name_without_a_network(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def offline(*_: object, **fields: object) -> None:
        raise RuntimeError("Dataset not found" if not fields["download"] else "no network")

    for kind in ("CIFAR10", "CIFAR100", "FashionMNIST"):
        monkeypatch.setattr(datasets, kind, offline)
    monkeypatch.setattr(labeled_sources, "FASHION_MNIST_FOLDERS", ())
    with pytest.raises(
        ConnectionError, match=f"data set {name} must be in .*no network; download it on another machine"
    ):
        load(name, (3, 32, 32), num_classes=100, data_dir=str(tmp_path / "new"))


def test_cifar_is_read_from_the_official_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    images = np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

    class Official:
        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            assert (root, train, download) == (tmp_path, False, False)
            self.data, self.targets = images, [3, 1, 2, 0]

    monkeypatch.setattr(datasets, "CIFAR10", Official)
    data = load_labeled("cifar10", (3, 32, 32), (0.0,) * 3, (1.0,) * 3, num_classes=10, data_dir=str(tmp_path))
    assert data.labels.tolist() == [3, 1, 2, 0]
    assert np.allclose(data[2][0].numpy() * 255, images[2].transpose(2, 0, 1), atol=1e-3)


def test_arrays_may_be_read_only() -> None:
    images = np.frombuffer(bytes(range(64)), np.uint8).reshape(1, 8, 8)
    source = from_arrays(images, np.zeros(1, np.int64), "here")
    assert source.read(torch.tensor([0]), (1, 8, 8)).shape == (1, 1, 8, 8)


@pytest.mark.real
def test_real_cifar10_layout(data_dir: Path) -> None:
    data = load(f"npz:{data_dir}/cifar10_test_a.npz", (3, 32, 32), num_classes=10)
    assert len(data) == 4990
    assert torch.bincount(data.labels).min() > 450
