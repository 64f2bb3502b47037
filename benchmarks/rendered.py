"""Rendered faces: how fast they are made, and how hard they are.

In: nothing (or a model). Out: crops a second on one core, and for each way of comparing faces rank-1 and pair accuracy
on people never seen in training: three that need no learning (pixels, colours, hair) and a small network trained here
or given.

    python benchmarks/rendered.py                    speed and the three baselines, about two minutes
    python benchmarks/rendered.py --train 4          also trains a small network for 4 minutes on other people
    python benchmarks/rendered.py --model RUN        also scores a visard model

Speed is the median over batches, one thread; run it as `taskset -c 0` on an idle machine. The median time of an
addition of 40,000 float32 in the same minute tells how busy the machine is (6 µs on an idle Zen 4 or Zen 5 core).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from visard.data.rendered import RenderedFaces

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
# People of the test, far from any training range.
TEST_FIRST, TEST_PEOPLE, TEST_IMAGES = 1_000_000, 100, 10
PAIRS = 6000


def main() -> None:
    """Prints a table, and JSON as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=float, default=0.0, metavar="MINUTES", help="train a small network")
    parser.add_argument("--model", help="a visard run, model folder or .onnx to score as well")
    parser.add_argument("--people", type=int, default=400, help="people the small network is trained on")
    parser.add_argument("--size", type=int, default=56, help="crop size of the hardness test, pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    result: dict[str, object] = {"speed": {size: speed(size) for size in (112, 56, 224)}}
    for size, value in result["speed"].items():  # type: ignore[attr-defined]
        rates = f"{value['crops_per_s']:.0f} crops/s (of processor time: {value['crops_per_cpu_s']:.0f})"
        print(f"{size:>4} px: {rates}, addition {value['add_us']:.1f} µs")

    methods: dict[str, Embed] = {"pixels": pixels, "colour histogram": colours, "hair only": hair}
    size = arguments.size
    if arguments.train > 0:
        methods["small network"] = train_network(arguments.people, size, arguments.train)
    if arguments.model:
        import visard

        model = visard.load(arguments.model)
        methods["model"] = lambda images: np.asarray(model(images))
    test = RenderedFaces(TEST_PEOPLE, TEST_IMAGES, size=size, first_identity=TEST_FIRST)
    images = test.images(np.arange(len(test)))
    result["hardness"] = {name: hardness(embed(images), test.labels) for name, embed in methods.items()}
    print(f"{TEST_PEOPLE} unseen people, {TEST_IMAGES} images each, {size} px")
    print(f"            chance: rank-1 {1 / TEST_PEOPLE:6.1%}   pairs  50.0%")
    for name, score in result["hardness"].items():  # type: ignore[attr-defined]
        print(f"{name:>18}: rank-1 {score['rank1']:6.1%}   pairs {score['pairs']:6.1%} ± {score['pairs_std']:.1%}")
    print(json.dumps(result))


def speed(size: int, batch: int = 64, rounds: int = 7) -> dict[str, float]:
    """Crops a second, with everything that a loader gets (JPEG round trip included)."""
    data = RenderedFaces(100_000, 20, size=size)
    data.images(np.arange(batch))
    wall, processor, addition = [], [], []
    a, b = torch.randn(40_000), torch.randn(40_000)
    for k in range(rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        data.images(np.arange(batch) * 20 + k)
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_cpu)
        start = time.perf_counter()
        for _ in range(200):
            torch.add(a, b)
        addition.append((time.perf_counter() - start) / 200 * 1e6)
    return {
        "crops_per_s": batch / median(wall),
        "crops_per_cpu_s": batch / median(processor),
        "add_us": median(addition),
    }


def hardness(embedding_ND: NDArray[np.float32], label_N: NDArray[np.int64]) -> dict[str, float]:
    """Rank-1 (is the nearest other image of the same person?) and accuracy on pairs, ten folds, threshold of nine."""
    unit = embedding_ND / np.linalg.norm(embedding_ND, axis=1, keepdims=True).clip(1e-9)
    similarity = (unit @ unit.T).astype(np.float64)
    np.fill_diagonal(similarity, -np.inf)
    rank1 = float((label_N[similarity.argmax(1)] == label_N).mean())
    generator = np.random.default_rng(0)
    images = len(label_N) // len(np.unique(label_N))
    person = generator.integers(0, len(label_N) // images, PAIRS)
    first = person * images + generator.integers(0, images, PAIRS)
    same = np.arange(PAIRS) % 2 == 0
    other_image = person * images + (first % images + generator.integers(1, images, PAIRS)) % images
    stranger = (person + generator.integers(1, len(label_N) // images, PAIRS)) % (len(label_N) // images)
    second = np.where(same, other_image, stranger * images + generator.integers(0, images, PAIRS))
    score = similarity[first, second]
    fold = np.arange(PAIRS) * 10 // PAIRS
    accuracy = []
    for k in range(10):
        candidates = np.quantile(score[fold != k], np.linspace(0, 1, 401))
        right = ((score[fold != k] >= candidates[:, None]) == same[fold != k]).mean(1)
        accuracy.append(((score[fold == k] >= candidates[right.argmax()]) == same[fold == k]).mean())
    return {"rank1": rank1, "pairs": float(np.mean(accuracy)), "pairs_std": float(np.std(accuracy))}


def pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The face's pixels at 28 px, brightness and contrast taken out."""
    small = np.stack([cv2.resize(image, (28, 28), interpolation=cv2.INTER_AREA) for image in images]).astype(np.float32)
    flat = small.reshape(len(images), -1)
    return flat - flat.mean(1, keepdims=True)


def colours(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Square roots of an 8 x 8 x 8 histogram of the middle of the face, where the background is not."""
    inner = images.shape[1] // 5
    return histogram(images[:, inner:-inner, inner:-inner])


def hair(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels and colours of the uppermost quarter."""
    top = images[:, : images.shape[1] // 4]
    small = np.stack([cv2.resize(image, (28, 7), interpolation=cv2.INTER_AREA) for image in top]).astype(np.float32)
    flat = small.reshape(len(images), -1)
    flat = flat - flat.mean(1, keepdims=True)
    return np.concatenate([flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6), _unit(histogram(top))], 1)


def histogram(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Square roots of an 8 x 8 x 8 histogram."""
    flat = (images.reshape(len(images), -1, 3) // 32).astype(np.int64) @ np.array([64, 8, 1])
    return np.sqrt(np.stack([np.bincount(row, minlength=512) for row in flat])).astype(np.float32)


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-6)


def train_network(people: int, size: int, minutes: float = float("inf"), *, steps: int | None = None) -> Embed:
    """A throw-away residual network with a cosine softmax, trained on other people for some minutes or so many
    steps."""
    torch.manual_seed(0)
    data = RenderedFaces(people, 15, size=size)
    images = np.concatenate([data.images(np.arange(k, min(k + 256, len(data)))) for k in range(0, len(data), 256)])
    labels = torch.from_numpy(data.labels)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
    network = _network(size)
    centres = torch.nn.Parameter(torch.randn(people, 128) * 0.1)
    optimiser = torch.optim.SGD(
        [*network.parameters(), centres], lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    start, step = time.monotonic(), 0
    while (done := step / steps if steps else (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 0.1 * min(1, (step + 1) / 50) * (1 - done)
        chosen = torch.randint(0, len(labels), (64,))
        batch = pictures[chosen]
        batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(3), batch).float().sub(127.5).div(127.5)
        embedding = torch.nn.functional.normalize(network(batch.contiguous(memory_format=torch.channels_last)))
        cosine = embedding @ torch.nn.functional.normalize(centres).T
        margin = torch.nn.functional.one_hot(labels[chosen], people) * (0.2 * min(1, 2 * done))
        loss = torch.nn.functional.cross_entropy(24 * (cosine - margin), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        if step % 200 == 0:
            print(f"  step {step}, {done:.0%}, loss {loss.item():.2f}", flush=True)
    print(f"  {step} steps of 64 images, {people} people", flush=True)
    network.eval()

    @torch.no_grad()
    def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
        return torch.cat([network(part) + network(part.flip(3)) for part in batch.split(64)]).numpy()

    return embed


def _network(size: int) -> torch.nn.Module:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.PReLU(outside),
                nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
            )  # fmt: skip
            self.skip = nn.Sequential(
                nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + self.skip(x)

    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.PReLU(16)]
    for inside, outside in ((16, 32), (32, 64), (64, 128), (128, 192)):
        layers.append(Block(inside, outside))
    layers += [nn.Flatten(), nn.LazyLinear(128), nn.BatchNorm1d(128)]
    network = nn.Sequential(*layers)
    network(torch.zeros(2, 3, size, size))
    return network.to(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
