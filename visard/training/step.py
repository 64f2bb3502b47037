"""One optimizer step: a batch in, moved parameters out, and numbers that stay on the device.

In: `Parts`, a batch, a learning rate. Out: `StepNumbers`. Nothing here waits for the device.

Micro-batches (`run.micro_batches`) divide a process's images of one step: gradients add up over them, those of the
backbone are summed over processes in the last one alone, and the optimizer moves once. The loss of each is already its
share of the mean over the step. Batch norm normalises by the micro-batch (ghost batch norm, arXiv:1705.08741), and its
running statistics move once for each.
The ranges named by `record_function` are what `--profile` measures.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from visard import dist
from visard.records import Batch
from visard.training.batch_norm import average_statistics
from visard.training.build import AUTOCAST, Parts
from visard.training.parallel import sum_head_gradients, unsummed
from visard.training.state import seed_step


@dataclass(frozen=True)
class StepNumbers:
    """What a step found, on the device.

    Args:
        failed: () above 0 if the gradient or loss was not finite, so that nothing was moved and the run must stop.
        stop: () above 0 if any process was asked to stop.
        logs: name -> () to be averaged over steps; "loss" and "gradient_norm" are over all processes already.
        skipped: () 1 if nothing was moved (an fp16 overflow that the loss scaler cures, or `failed`).
    """

    failed: Tensor
    stop: Tensor
    logs: dict[str, Tensor]
    skipped: Tensor


def train_step(parts: Parts, batch: Batch, lr: float, *, stop: bool = False) -> StepNumbers:
    """Makes one optimizer step.

    Args:
        parts: of the run; `parts.state` is moved, but for its step count.
        batch: this process's share of the step, on any device.
        lr: learning rate.
        stop: this process was asked to stop; told to all of them through the step's collective.
    """
    state, recipe, device = parts.state, parts.recipe, parts.device
    seed_step(recipe.run.seed, state.step, dist.rank())
    batch = parts.teach(batch.to(device, non_blocking=True))
    count = recipe.run.micro_batches
    state.head.begin_step(parts.images_global, batch.labels, parts.images_most, count)
    batch = state.head.prepare(batch)
    loss = torch.zeros((), device=device)
    # What an augmentation wants to be logged: a number for each image, named log_...
    told = {name: values.float().mean() for name, values in batch.extras.items() if name.startswith("log_")}
    logs: dict[str, Tensor] = {name.removeprefix("log_"): value for name, value in told.items()}
    for number, micro in enumerate(batch.split(count), 1):
        with unsummed(parts.model) if number < count else nullcontext():
            micro_loss, micro_logs = _forward(parts, micro)
            with record_function("visard/backward"):
                state.optimizer.backward(micro_loss)
        loss = loss + micro_loss.detach()
        for name, value in micro_logs.items():
            share = value if count == 1 else value * (len(micro) / len(batch))
            logs[name] = logs[name] + share if name in logs else share
    with record_function("visard/backward"):
        sum_head_gradients(state.head)
        average_statistics(state.backbone)
    with record_function("visard/optimizer"):
        rows = {f"head.{name}": grad for name, grad in state.head.row_gradients().items()}
        squares = state.optimizer.squares(rows).to(device)
        shared = torch.cat([loss.float().view(1), torch.full((1,), float(stop), device=device), squares])
        # Summed: the shares of the loss make the mean over the global batch; any process's wish to stop is above 0;
        # each process's rows are its own, so their squares add up too.
        dist.all_reduce_sum(shared)
        report = state.optimizer.step(lr, shared[0], rows, shared[2:])
        state.head.after_step()
    return StepNumbers(
        failed=report.failed,
        stop=shared[1],
        logs={**logs, "loss": shared[0], "gradient_norm": report.norm},
        skipped=report.skipped,
    )


def _forward(parts: Parts, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's share of the step's loss that the images of a micro-batch make, and their logs."""
    with record_function("visard/forward"):
        return parts.state.head(embeddings_of(parts, micro), micro)


def embeddings_of(parts: Parts, micro: Batch) -> Tensor:
    """(B, D) what the network makes of a micro-batch on the device, as training computes it."""
    dtype = AUTOCAST[parts.recipe.run.precision]
    pixels = parts.spec.normalise(micro.images)
    if not parts.recipe.run.channels_last:
        pixels = pixels.contiguous()
    with torch.autocast(parts.device.type, dtype=dtype, enabled=dtype is not None):
        embeddings: Tensor = parts.model(pixels)
    return embeddings
