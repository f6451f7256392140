"""Class folders of small images as arrays, read and not decoded: what mode=prepare prepare.pack=true writes.

    <root>-packed/{train,val}_images.npy    uint8 (n, height, width, 3), mapped into memory
    <root>-packed/{train,val}_labels.npy    int64 (n,)
    <root>-packed/classes.txt               a class a line

The order is that of the class folders, so that a run on either is the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.folder import SPLITS, Data, digest_of, tally, wrong

if TYPE_CHECKING:
    import numpy as np

AGAIN = "write it again: mode=prepare prepare.pack=true with the class folders as data.root"


def is_packed(root: Path) -> bool:
    """Does `root` hold what prepare.pack=true writes?"""
    return (root / "classes.txt").is_file() and (root / "train_images.npy").is_file()


def summary(name: str, root: Path) -> Data:
    """Counts and classes. Raises UserError where the arrays do not fit each other."""
    classes = tuple((root / "classes.txt").read_text(encoding="utf-8").splitlines())
    counts, tallies = [], []
    for split in SPLITS:
        images, labels = arrays(root, split)
        fits = (
            images.ndim == 4 and images.shape[3] == 3 and images.dtype == "uint8" and labels.shape == images.shape[:1]
        )
        if not fits or not len(labels):
            raise wrong(root, f"{split}_images.npy is {images.dtype} {images.shape}, its labels {labels.shape}", AGAIN)
        if labels.min() < 0 or labels.max() >= len(classes):
            raise wrong(root, f"{split}_labels.npy goes to {labels.max()}, classes.txt has {len(classes)}", AGAIN)
        counts.append(len(labels))
        tallies.append(tally(classes, labels.tolist()))
    return Data(name, root, counts[0], counts[1], classes, digest=digest_of(classes, *tallies))


def arrays(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width, 3) and labels (n,) of a split. Raises UserError."""
    import numpy as np

    found = []
    for part, mode in (("images", "c"), ("labels", None)):  # copy on write: torch warns of arrays that are read-only
        path = root / f"{split}_{part}.npy"
        try:
            found.append(np.load(path, mmap_mode=mode, allow_pickle=False))  # type: ignore[arg-type]
        except (OSError, ValueError, EOFError) as error:
            raise wrong(root, f"{path.name} cannot be read ({' '.join(str(error).split())[:100]})", AGAIN) from None
    return found[0], found[1]
