"""CIFAR-10 as torchvision unpacks it (cifar-10-batches-py) or as the cifar10.npz of four arrays."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.folder import Data, digest_of, some, tally, wrong

if TYPE_CHECKING:
    import numpy as np

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
TRAIN, TEST = 50000, 10000
HELD_OUT = 5000  # of the training images (PAPER.md section 3.1)


def is_cifar10(root: Path) -> bool:
    """Does `root` hold CIFAR-10, as torchvision unpacks it or as an .npz?"""
    return (root / "cifar10.npz").is_file() or _batches(root).is_dir()


def summary(name: str, root: Path) -> Data:
    """Counts and classes, from the files' names, the arrays' headers and the labels. Raises UserError."""
    archive = root / "cifar10.npz"
    if archive.is_file():
        shapes = _npz_shapes(root, archive)
        want = {"train_x": (TRAIN, 32, 32, 3), "train_y": (TRAIN,), "test_x": (TEST, 32, 32, 3), "test_y": (TEST,)}
        off = [f"{k} is {shapes.get(k, 'absent')} instead of {v}" for k, v in want.items() if shapes.get(k) != v]
        if off:
            raise wrong(root, f"cifar10.npz: {off[0]}", "build it again with get_cifar10.py")
    else:
        lost = [f for f in BATCHES if not (_batches(root) / f).is_file()]
        if lost:
            raise wrong(root, f"cifar-10-batches-py lacks {some(lost)}", "unpack cifar-10-python.tar.gz again")
    labels = _train_labels(root)
    tallies = [tally(CLASSES, labels[rows].tolist()) for rows in _split(len(labels))]
    return Data(name, root, TRAIN - HELD_OUT, HELD_OUT, CLASSES, digest=digest_of(CLASSES, *tallies))


def _train_labels(root: Path) -> np.ndarray:
    """The labels of the images for training, those held out among them, in the files' order."""
    import numpy as np

    if not (root / "cifar10.npz").is_file():
        return np.concatenate([_batch(root, file)[1] for file in BATCHES[:5]])
    try:
        with np.load(root / "cifar10.npz", allow_pickle=False) as file:
            return file["train_y"]
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
        raise wrong(root, f"cifar10.npz cannot be read ({error})", "build it again with get_cifar10.py") from None


def _split(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the images for training stay for it, and which one fixed permutation holds out."""
    import numpy as np

    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[HELD_OUT:]), np.sort(order[:HELD_OUT])


def _batches(root: Path) -> Path:
    return root if root.name == "cifar-10-batches-py" else root / "cifar-10-batches-py"


def _npz_shapes(root: Path, path: Path) -> dict[str, tuple[int, ...]]:
    from numpy.lib import format as npy

    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {}
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    npy.read_magic(file)
                    shapes[entry.removesuffix(".npy")] = npy.read_array_header_1_0(file)[0]
            return shapes
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise wrong(root, f"cifar10.npz cannot be read ({error})", "build it again with get_cifar10.py") from None


class ArraysOnly(pickle.Unpickler):
    """Reads CIFAR-10's pickled batches and refuses to call anything but what builds a numpy array."""

    allowed = {"numpy.core.multiarray": "_reconstruct", "numpy._core.multiarray": "_reconstruct", "_codecs": "encode"}

    def find_class(self, module: str, name: str) -> Any:
        if (module == "numpy" and name in ("ndarray", "dtype")) or self.allowed.get(module) == name:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def cifar10(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "val", "test"} -> images (n, 32, 32, 3) uint8 and labels (n,) int64. val: 5,000 images that one fixed
    permutation holds out of the 50,000 for training. Pickles are read by an unpickler that builds arrays only."""
    import numpy as np

    if (root / "cifar10.npz").is_file():
        with np.load(root / "cifar10.npz", allow_pickle=False) as file:
            x, y, test_x, test_y = (file[k] for k in ("train_x", "train_y", "test_x", "test_y"))
    else:
        parts = [_batch(root, f) for f in BATCHES]
        x, y = (np.concatenate(column) for column in zip(*parts[:5], strict=True))
        test_x, test_y = parts[5]
    train, val = _split(len(x))
    y, test_y = y.astype(np.int64), test_y.astype(np.int64)
    return {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": (test_x, test_y)}


def _batch(root: Path, file: str) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    try:
        with (_batches(root) / file).open("rb") as stream:
            batch = ArraysOnly(stream, encoding="latin1").load()
        x, y = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch["labels"])
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise wrong(root, f"{file} is not a CIFAR-10 batch ({error})", "unpack cifar-10-python.tar.gz again") from None
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)), y
