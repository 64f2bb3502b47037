"""A head's margin: the function that a configuration describes, and what it remembers from step to step.

In: the configuration of a margin. Out: the arguments `margin`, `state` and `total` of a margin softmax, and a
`state_dict` with the running means (none for margins without statistics).

The statistics are those of the labelled images of the whole optimizer step. The sums of each micro-batch are added up
over processes and over the micro-batches so far; a micro-batch uses the state that these give, and the state of all of
them is kept by `after_step`. One micro-batch is thus the paper's order (bring up to date, then use), and the state
after a step does not depend on how the step was divided.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from visard import dist
from visard.config import AdaFaceConfig, AnyMarginConfig, CurricularFaceConfig, MagFaceConfig, MarginConfig
from visard.functional import margins, margins_adaptive
from visard.functional.margins import Margin, MarginState


class HeadMargin(nn.Module):
    """A margin with its running means as buffers.

    Args:
        config: which margin.
        all_images_here: every process computes the margin of all processes' images, so sums need no others.
    """

    def __init__(self, config: AnyMarginConfig, *, all_images_here: bool = False) -> None:
        super().__init__()
        self._all_images_here = all_images_here
        self._config = config
        self.function = margin_of(config)
        for name, value in first_state(config).items():
            self.register_buffer(name, value)
        self._sums: Tensor | None = None
        self._next: MarginState = {}

    def begin_step(self) -> None:
        """An optimizer step begins: nothing of it has been seen."""
        self._sums, self._next = None, {}

    def of(self, margin_rad_B: Tensor | None) -> Margin:
        """The margin of a micro-batch: the same for all images, or each its own m2, radians (not for adaptive ones)."""
        if margin_rad_B is None:
            return self.function
        config = self._config
        if isinstance(config, MarginConfig):
            m1, m3 = config.m1, config.m3

            def own(cos_B: Tensor, norms_B: Tensor, state: MarginState, total: margins.Total) -> margins.Margined:
                return margins.Margined(margins.continued_cosine(cos_B, m1, margin_rad_B) - m3, state)

            return margins.straight_through(own) if config.gradient == "straight-through" else own
        raise AssertionError("images' own margins take the place of m2, which adaptive margins have not")

    def state(self) -> MarginState:
        """The running means of the steps before this one, for every call of the step."""
        return dict(self.named_buffers())

    def total(self, sums_K: Tensor) -> Tensor:
        """(K,) sums over a micro-batch of this process -> over all micro-batches so far, over all processes.

        Every process calls this for each micro-batch: it waits for the others. Processes are summed, never averaged.
        """
        micro_batch_K = sums_K.detach().clone()
        if not self._all_images_here:
            dist.all_reduce_sum(micro_batch_K)
        self._sums = micro_batch_K if self._sums is None else self._sums + micro_batch_K
        return self._sums

    def remember(self, state: MarginState) -> None:
        """The state that the latest micro-batch gave; `after_step` will keep it."""
        self._next = state

    def after_step(self) -> None:
        """Keeps the step's state."""
        buffers = self.state()
        with torch.no_grad():
            for name, value in self._next.items():
                buffers[name].copy_(value)
        self.begin_step()


def margin_of(config: AnyMarginConfig) -> Margin:
    """The margin function that a configuration describes."""
    margin: Margin
    match config:
        case MarginConfig():
            margin = functools.partial(margins.combined, m1=config.m1, m2=config.m2, m3=config.m3)
        case AdaFaceConfig():
            margin = functools.partial(margins_adaptive.adaface, m=config.m, h=config.h, t_alpha=config.t_alpha)
        case CurricularFaceConfig():
            margin = functools.partial(margins_adaptive.curricularface, m=config.m, momentum=config.momentum)
        case MagFaceConfig():
            margin = functools.partial(
                margins_adaptive.magface,
                l_a=config.l_a,
                u_a=config.u_a,
                l_m=config.l_m,
                u_m=config.u_m,
                lambda_g=config.lambda_g,
            )
    return margins.straight_through(margin) if config.gradient == "straight-through" else margin


def first_state(config: AnyMarginConfig) -> MarginState:
    """What the margin remembers before the first step; {} for most."""
    match config:
        case AdaFaceConfig():
            return margins_adaptive.adaface_state()
        case CurricularFaceConfig():
            return margins_adaptive.curricularface_state()
    return {}
