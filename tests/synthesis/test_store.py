"""The store: what a key covers, atomic writes, damage reported by name."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synq.config.run import RunConfig, SynthesisConfig, config_digest, with_overrides
from synq.config.synthesis import ADDED_LATER, STRUCTURE_WEIGHTS
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.store import SetStore, set_identity

ROOT = Path(__file__).resolve().parents[2]
SIZE = (3, 4, 4)
TEACHER = "ab" * 32
CONFIG = SynthesisConfig(num_images=5, shard_size=3)


def _key(store: SetStore, **changes: object) -> str:
    given = {"teacher_digest": TEACHER, "config": CONFIG, "seed": 0, "input_size": SIZE, "purpose": "train", **changes}
    return store.key(given.pop("teacher_digest"), given.pop("config"), given.pop("seed"), **given)


def _parts(store: SetStore, key: str) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    files = []
    for index, count in enumerate((2, 3)):
        file = store.partial(key) / f"shard-{index:05d}.safetensors"
        images = torch.randn((count, *SIZE), generator=generator)
        store.write_part(file, {"images": images, "labels": torch.arange(count)}, {"terms": {"total": 1.5}})
        files.append(file)
    return files


def _made(root: Path) -> tuple[SetStore, str, SyntheticSet]:
    store = SetStore(root)
    key = _key(store)
    store.assemble(
        key, _parts(store, key), lambda entries: {"num_images": sum(e["stop"] - e["start"] for e in entries)}
    )
    loaded = store.load(key)
    assert loaded is not None
    return store, key, loaded


OTHER_VALUES = {
    "method": "gdfq",
    "bns_form": "var_mean",
    "augment": "flip_shift",
    "calib_centers": False,
    "schedule": "plateau",
    "swing_conv": False,
    "start": "white",
    "shift_color": True,
    **dict.fromkeys((*STRUCTURE_WEIGHTS, "prior_weight"), 0.5),
}


def test_key_covers_every_setting_of_synthesis(tmp_path: Path) -> None:
    """Of the method that has them all; what does not count for another is in test_synthesis_methods.py."""
    store = SetStore(tmp_path)
    base = dataclasses.replace(CONFIG, method="genie", calib_centers=True)
    keys = {_key(store, config=base)}
    fields = [field for field in dataclasses.fields(SynthesisConfig) if field.name not in ("source", "low_first")]
    for field in fields:
        value = getattr(base, field.name)
        if field.name in OTHER_VALUES:
            other: object = OTHER_VALUES[field.name]
        else:
            other = value + 1 if isinstance(value, int) else 0.75 * value + 0.1
        keys.add(_key(store, config=dataclasses.replace(base, **{field.name: other})))
    assert len(keys) == len(fields) + 1
    assert _key(store, config=CONFIG) != _key(store, config=dataclasses.replace(CONFIG, low_first=True))
    own = dataclasses.replace(CONFIG, method="own_images", source="folder:/here/photos")
    moved, other = (dataclasses.replace(own, source=f"folder:/there/{name}") for name in ("photos", "others"))
    assert _key(store, config=own) == _key(store, config=moved) != _key(store, config=other)


@pytest.mark.parametrize("name", [*STRUCTURE_WEIGHTS, "prior_weight"])
def test_a_weight_of_zero_is_another_set_than_one_that_the_structure_chooses(name: str, tmp_path: Path) -> None:
    """It was taken for "not given" once, so that images of an ablation were those of the full method."""
    off, on = dataclasses.replace(CONFIG, **{name: 0.0}), dataclasses.replace(CONFIG, **{name: 0.05})
    assert len({_key(SetStore(tmp_path), config=config) for config in (CONFIG, off, on)}) == 3
    configs = [with_overrides(RunConfig(), {f"synthesis.{name}": value}) for value in (None, 0.0, 0.05)]
    assert len({config_digest(config) for config in configs}) == 3


def test_key_covers_teacher_seed_purpose_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SetStore(tmp_path)
    keys = [
        _key(store),
        _key(store, teacher_digest="cd" * 32),
        _key(store, seed=1),
        _key(store, purpose="heldout"),
        _key(store, input_size=(3, 8, 8)),
    ]
    monkeypatch.setattr("synq.synthesis.store.FORMAT_VERSION", 99)
    keys.append(_key(store))
    assert len(set(keys)) == len(keys)
    assert _key(SetStore(tmp_path / "elsewhere")) == keys[-1]


def test_key_covers_nothing_else() -> None:
    identity = set_identity(TEACHER, SIZE, CONFIG, 0, "train")
    assert set(identity) == {"format_version", "teacher_digest", "input_size", "synthesis", "seed", "purpose"}
    fields = {field.name for field in dataclasses.fields(SynthesisConfig)}
    unused = {
        "generator_lr",
        "latent_dim",
        "center_iterations",
        "center_weight",
        "center_depth",
        "source",
        *ADDED_LATER,
    }
    assert fields - set(identity["synthesis"]) == unused


def test_round_trip(tmp_path: Path) -> None:
    store, key, made = _made(tmp_path)
    assert made.path == tmp_path / key and len(made) == 5
    expected = torch.randn((5, *SIZE), generator=torch.Generator().manual_seed(0))
    assert made.images.shape == (5, *SIZE) and made.images.dtype == torch.float32
    assert made.labels.tolist() == [0, 1, 0, 1, 2] and made.labels.dtype == torch.int64
    generator = torch.Generator().manual_seed(0)
    expected = torch.cat([torch.randn((2, *SIZE), generator=generator), torch.randn((3, *SIZE), generator=generator)])
    assert torch.equal(made.images, expected)
    plain = load_file(made.path / "images.safetensors")  # the file is ordinary safetensors
    assert torch.equal(plain["images"], expected) and torch.equal(plain["labels"], made.labels)
    assert made.manifest["num_images"] == 5 and made.manifest["key"] == key
    assert [(s["start"], s["stop"], s["terms"]) for s in made.manifest["shards"]] == [
        (0, 2, {"total": 1.5}),
        (2, 5, {"total": 1.5}),
    ]
    assert made.manifest["digest"] == made.digest and len(made.digest) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == [key]
    assert store.load("0" * 32) is None


def test_writing_into_the_images_does_not_reach_the_file(tmp_path: Path) -> None:
    store, key, made = _made(tmp_path)
    before = (made.path / "images.safetensors").read_bytes()
    made.images.zero_()
    assert (made.path / "images.safetensors").read_bytes() == before
    again = store.load(key)
    assert again is not None and again.images.abs().sum() > 0


def test_loading_shares_memory_with_the_file(tmp_path: Path) -> None:
    _, _, made = _made(tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc to see memory maps")
    assert str(made.path / "images.safetensors") in maps.read_text()


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("position", "shard"), [(-4 * 48 * 4 - 5 * 8, "shard 0, images 0 to 1"), (-1, "shard 1, images 2 to 4")]
)
def test_a_flipped_bit_is_reported_by_name(tmp_path: Path, position: int, shard: str) -> None:
    store, key, made = _made(tmp_path)
    _flip(made.path / "images.safetensors", position)
    with pytest.raises(ValueError, match=shard) as caught:
        store.load(key)
    assert str(made.path) in str(caught.value) and "remove it and run the same command again" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "images.safetensors").unlink(),
        lambda folder: (folder / "images.safetensors").write_bytes((folder / "images.safetensors").read_bytes()[:-9]),
        lambda folder: (folder / "images.safetensors").write_bytes(b""),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"format_version": 2}'),
        lambda folder: _edit(folder, "shards", []),
        lambda folder: _edit(folder, "digest", "0" * 64),
        lambda folder: _edit(folder, "key", "0" * 32),
        lambda folder: _edit(folder, "format_version", 99),
    ],
)
def test_any_damage_is_reported_by_name(tmp_path: Path, damage) -> None:
    store, key, made = _made(tmp_path)
    damage(made.path)
    with pytest.raises(ValueError, match=f"`{made.path}.*remove it"):
        store.load(key)


def _edit(folder: Path, field: str, value: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, field: value}))


def test_a_damaged_part_is_reported_by_name(tmp_path: Path) -> None:
    store = SetStore(tmp_path)
    key = _key(store)
    files = _parts(store, key)
    _flip(files[1], -1)
    with pytest.raises(ValueError, match=f"`{files[1]}` must be intact.*remove it"):
        store.assemble(key, files, lambda entries: {})
    assert not store.is_complete(key) and files[0].exists()


def test_an_unwritable_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SetStore(tmp_path / "file" / "store")
    key = _key(store)
    with pytest.raises(OSError, match=str(store.root)):
        store.lock(key, "set")
    with pytest.raises(OSError, match=str(store.root)):
        _parts(store, key)


FULL_DISK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from synq.synthesis.store import SetStore
store, key = SetStore({store!r}), "k" * 32
def part(index, count):
    path = store.partial(key) / f"shard-{{index}}.safetensors"
    images, labels = torch.zeros(count, 3, 32, 32), torch.zeros(count, dtype=torch.int64)
    store.write_part(path, {{"images": images, "labels": labels}}, {{}})
    return path
shards = [part(index, 4) for index in range(3)]
resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))  # maximum file size; one shard has 49 kB, the set 147 kB
for attempt in (lambda: store.assemble(key, shards, lambda entries: {{}}), lambda: part(3, 8)):
    try:
        attempt()
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_broken(tmp_path: Path) -> None:
    code = FULL_DISK.format(root=str(ROOT), store=str(tmp_path / "store"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    key = "k" * 32
    assert str(tmp_path / "store" / key) in first and "shard-3" in second
    partial = tmp_path / "store" / f"{key}.partial"
    assert [path.name for path in (tmp_path / "store").iterdir()] == [partial.name]
    assert sorted(path.name for path in partial.iterdir()) == [f"shard-{index}.safetensors" for index in range(3)]
