"""What does one training step cost at 224 pixels and batch 32, against plain torch and against the paper's way?

Three ways, the same network, the same real films, the same number of threads, end to end from what each trains from:

    cxrfast  the trainer's own step, from a prepared store
    plain    fp32, NCHW, nn.Conv2d ... nn.BCEWithLogitsLoss, torch.optim.Adam, from a tensor that is ready in memory
    paper    the same, fed by a DataLoader whose workers decode and resize 1024-pixel PNGs with Pillow

On a CPU the convolutions, not the decoding, are the cost of the paper's way; on a GPU it is the other way round.
Before anything is timed, the three are seen to compute the same logits from the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cxrfast.loss import class_weights
from cxrfast.models import encode_metadata
from cxrfast.parallel import World
from cxrfast.prep import PrepConfig, prepare
from cxrfast.reference import PaperNet
from cxrfast.train import TrainConfig, Trainer

SIZE, BATCH = 224, 32
WORKERS = 2


class PngFilms(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The paper's data set: a film is decoded and resized whenever it is asked for."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.paths = [folder / name for name in trainer.store.index["file"]]
        self.normalisation = trainer.normalisation
        self.metadata = torch.from_numpy(encode_metadata(trainer.store.index, *trainer.age))
        self.targets = torch.from_numpy(trainer.store.targets)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        with Image.open(self.paths[row]) as film:
            grey = film.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(grey, np.float32))[None]
        mean, std = self.normalisation
        return (pixels - mean) / std, self.metadata[row], self.targets[row]


def plain_step(trainer: Trainer, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], object]:
    """Eager torch as the paper wrote it, on whatever the iterator gives."""
    net = PaperNet(SIZE, trainer.config.model)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    pos_weight, _ = class_weights(trainer.store.targets[trainer.split.train])
    criterion = nn.BCEWithLogitsLoss(pos_weight=pos_weight)

    def step() -> None:
        images, metadata, targets = next(batches)
        optimizer.zero_grad()
        criterion(net(images, metadata), targets).backward()
        optimizer.step()

    return step


def cxrfast_step(trainer: Trainer) -> Callable[[], object]:
    films = torch.from_numpy(trainer.split.train)
    rows = [films[torch.randperm(len(films))[:BATCH]] for _ in range(64)]
    feeds = trainer.data.feeds(rows)
    trainer.model.train()

    def step() -> None:
        trainer.start_step(BATCH)
        trainer.train_step(next(feeds))

    return step


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "store"
    csv = data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv"
    prepare(PrepConfig(data / "nih" / "images", path, csv=csv, size=SIZE))
    return path


def assert_same_logits(trainer: Trainer, films: PngFilms) -> None:
    """In fp32, evaluated, from pixels that Pillow prepared and from the store's."""
    paper = PaperNet(SIZE, trainer.config.model)
    paper.copy_to(trainer.net)
    ready = [films[row] for row in range(4)]
    batch = next(trainer.data.batches([torch.arange(4)]))
    with torch.inference_mode():
        expected = paper.eval()(torch.stack([r[0] for r in ready]), torch.stack([r[1] for r in ready]))
        found = trainer.net.eval()(batch.images, batch.metadata)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.films
@pytest.mark.parametrize("model", ["cnn", "multimodal"])
@pytest.mark.parametrize("way", ["cxrfast", "cxrfast --amp", "plain", "paper"])
def test_training_step(benchmark, way, model, store, data, tmp_path):
    amp = way.endswith("--amp")
    trainer = Trainer(
        TrainConfig(store, tmp_path / "run", model=model, batch_size=BATCH, amp=amp), World(), torch.device("cpu")
    )
    films = PngFilms(data / "nih" / "images", trainer)
    assert_same_logits(trainer, films)
    torch.manual_seed(0)
    if way == "plain":
        ready = [torch.stack(column) for column in zip(*(films[row] for row in range(BATCH)), strict=True)]
        step = plain_step(trainer, itertools.repeat(tuple(ready)))
    elif way == "paper":
        loader = DataLoader(films, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)
        step = plain_step(trainer, (batch for _ in itertools.count() for batch in loader))
    else:
        step = cxrfast_step(trainer)
    benchmark.group = f"training step, {model}, {SIZE} pixels, batch {BATCH}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {
        "way": way,
        "precision": trainer.precision.name if "cxrfast" in way else "fp32",
        "images_per_second": BATCH / benchmark.stats.stats.median,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "same_logits": True,
    }
