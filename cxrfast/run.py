"""A RUN folder read back: what was trained, on what, and the network with its weights (DESIGN: Run).

Promises: a network comes out only when the weights match the architecture of config.json key for key, shape for shape
and dtype for dtype, are whole, and are of that very run. Left out: writing a run (train.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cxrfast.checkpoint import load_tensors
from cxrfast.data import Normalisation
from cxrfast.errors import InputError
from cxrfast.models import ChestNet, load_weights
from cxrfast.nih import CLASSES
from cxrfast.train import BEST, CONFIG, LAST, read_config

Weights = Literal["best", "last"]


@dataclass(frozen=True)
class Run:
    """What config.json says of a run.

    Attributes:
        path: the run's folder.
        model, head, size: the architecture, and S, the side of its films in pixels.
        pixel_rule: how its films were prepared.
        store, store_digest: the store it was trained on, as it was given, and its content's hash.
        split, split_name, split_digest: the text that chose the split, its name and its hash.
        normalisation: of the training split's pixels, grey levels 0 to 255.
        age: mean and standard deviation of age in the training split, years.
        selected_by: what on the test split made the best epoch the best, "auc" or "loss".
    """

    path: Path
    model: Any
    head: Any
    size: int
    pixel_rule: str
    store: Path
    store_digest: str
    split: str
    split_name: str
    split_digest: str
    normalisation: Normalisation
    age: tuple[float, float]
    selected_by: str


def load_run(path: Path) -> Run:
    """Read a run's config.json.

    Raises:
        InputError: not a run, something is missing in it, or its class order is not ours.
    """
    content = read_config(path)
    try:
        options, store, split = content["options"], content["store"], content["split"]
        run = Run(
            path=path,
            model=options["model"],
            head=options["head"],
            size=int(store["size"]),
            pixel_rule=str(store["pixel_rule"]),
            store=Path(options["store"]),
            store_digest=str(store["digest"]),
            split=str(options["split"]),
            split_name=str(split["name"]),
            split_digest=str(split["digest"]),
            normalisation=Normalisation(
                float(content["normalisation"]["mean"]), float(content["normalisation"]["std"])
            ),
            age=(float(content["age"]["mean"]), float(content["age"]["std"])),
            selected_by=str(options["best_by"]),
        )
        classes = content["classes"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / CONFIG} is not a whole configuration of a run ({error!r}); train it anew") from error
    if classes != list(CLASSES):
        raise InputError(f"{path} has another class order than this cxrfast; its scores would go to wrong findings")
    return run


def load_model(run: Run, weights: Weights = "best") -> tuple[ChestNet, int]:
    """The run's network on the CPU, in evaluation mode, and the epoch that its weights are of.

    Raises:
        InputError: no such weights, truncated or changed, of another run, or not of the run's architecture.
    """
    path = run.path / (BEST if weights == "best" else LAST)
    if not path.is_file():
        raise InputError(
            f"{run.path} has no {path.name}: no epoch of it was finished; go on with cxrfast-train --resume"
        )
    tensors, about = load_tensors(path)
    model = ChestNet(run.size, run.model, run.head)
    load_weights(model, tensors, str(path))
    split = str(about.get("split", ""))
    if about.get("store") != run.store_digest or not split.endswith(run.split_digest):
        raise InputError(f"{path} was trained on another store or split than {run.path / CONFIG} says")
    return model.eval(), int(about.get("epoch", 0))
