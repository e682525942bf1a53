"""Our trainer against a plain loop: DataLoader with two workers, torchvision transforms per image, float32."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2

from gcnet import networks
from gcnet.data import Dataset
from gcnet.training import Normalize, Recipe, train

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


class PerImage(TorchDataset):
    """What most training scripts do: one image at a time through the transforms."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.transform = v2.Compose(
            [
                v2.ToPILImage(),
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.data.images[index]), int(self.data.labels[index])


def plain_epoch(model: nn.Module, data: Dataset) -> None:
    device = next(model.parameters()).device
    loader = DataLoader(PerImage(data), 128, shuffle=True, num_workers=2, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()


def our_epoch(model: nn.Module, data: Dataset) -> None:
    train(nn.Sequential(Normalize(MEAN, STD), model), data, Recipe(epochs=1), seed=0)


def run(quick: bool = False) -> list[dict[str, Any]]:
    count = 1280 if quick else 6400
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = Dataset("random", pixels, torch.arange(count) % 10, tuple(map(str, range(10))))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spent: dict[str, list[float]] = {"ours": [], "plain": []}
    for repeat in range(2 if quick else 4):
        for name, epoch in (("ours", our_epoch), ("plain", plain_epoch)):
            model = networks.build("vgg16_bn", 10, width=0.25, seed=0).to(device)
            started = time.perf_counter()
            epoch(model, data)
            if repeat:
                spent[name].append(time.perf_counter() - started)
    ours, plain = statistics.median(spent["ours"]), statistics.median(spent["plain"])
    return [
        {
            "case": f"vgg16_bn quarter width, {count} images, {torch.get_num_threads()} threads, {device}",
            "ours_s": ours,
            "peer": "DataLoader (2 workers), torchvision transforms, float32",
            "peer_s": plain,
            "ratio": plain / ours,
            "target": "at least 2.5",
        }
    ]
