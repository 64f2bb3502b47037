"""What the heads with a margin softmax have in common: how it is computed, and what is logged of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from visard.config import HeadConfig
from visard.functional.margins import plain
from visard.functional.soft_targets import Teacher, soft_targets
from visard.functional.softmax import SoftmaxOutput
from visard.functional.softmax_chunked import Part, Settings
from visard.functional.softmax_pieces import CHUNKED
from visard.heads.margin import HeadMargin


def settings_of(config: HeadConfig, device: torch.device | None = None) -> Settings:
    """How a configuration computes its softmax.

    Args:
        config: see `HeadConfig`.
        device: where it will run; None = not known yet.

    Raises:
        UserError: Triton is asked for and cannot be used here.
    """
    pieces = CHUNKED
    if config.kernel == "triton":
        from visard.kernels import triton_pieces

        pieces = triton_pieces(device)
    return Settings(
        products=torch.bfloat16 if config.products == "bf16" else None,
        conflict_cos=config.conflict_cos if config.conflict_cos < 1 else None,
        keep=None if pieces is CHUNKED else False,  # the kernels compute logits anew
        pieces=pieces,
    )


def means_of(output: SoftmaxOutput, embeddings: Tensor, labels_B: Tensor, images: slice) -> dict[str, Tensor]:
    """What a head logs: means over this process's images, as tensors on the device.

    Args:
        output: of the softmax, perhaps over the images of all processes.
        embeddings: (B, D) of this process.
        labels_B: (B,) of this process.
        images: where this process's images are in the output.
    """
    labelled = (labels_B >= 0).sum().clamp(min=1)
    return {
        "cos_target": output.cos[images].sum() / labelled,
        "accuracy": output.correct[images].sum() / labelled,
        "embedding_norm": embeddings.detach().float().norm(dim=1).mean(),
    }


def against_teacher(
    emb_ND: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    teacher_NE: Tensor,
    centres: Tensor,
    head_margin: HeadMargin,
    scale: float,
    temperature: float,
    *,
    margins: bool,
    denominator: int,
    settings: Settings,
    part: Part | None = None,
) -> Tensor:
    """() soft targets of a teacher with the head's own scale and, if asked for, its margin on both sides.

    The filter of conflicts is the hard loss's alone. The state of an adaptive margin is the student's own; that of the
    teacher would be of other norms, so such margins are not for this (`Recipe` refuses them).
    """
    margin = head_margin.function if margins else plain
    return soft_targets(
        emb_ND,
        weight,
        labels_N,
        margin,
        Teacher(emb=teacher_NE, weight=centres, margin=margin, scale=scale),
        scale=scale,
        temperature=temperature,
        denominator=denominator,
        state=head_margin.state() if margins else None,
        settings=replace(settings, conflict_cos=None),
        part=part,
    ).loss
