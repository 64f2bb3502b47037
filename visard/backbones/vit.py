"""The vision transformer of arcface_torch, in its parameter names and shapes: every patch has its say in the embedding.

In: (B, 3, S, S) float32 normalised crops. Out: (B, D) float32 embeddings, not normalised.
No class token: all tokens, end to end, go through Linear-BN-Linear-BN. While training, some tokens of each image are
left out of the blocks and replaced by one learnt token after them, and blocks are skipped at random.

Source: An et al., Killing Two Birds with One Stone, arXiv:2203.15565 (the networks of its WebFace42M results);
Dosovitskiy et al., arXiv:2010.11929 (ViT); He et al., arXiv:2111.06377 (masking by shuffling); Huang et al.,
arXiv:1603.09382 (stochastic depth). Letters: B images, N tokens, N_kept tokens not masked, C width, H heads.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from visard.backbones.recompute import Recomputing
from visard.config import ViTConfig

FEATURE_NORM_EPS = 2e-5
INIT_STD = 0.02


class VisionTransformer(Recomputing):
    """Patches to tokens, `depth` blocks, layer norm, then a linear map of all tokens together."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        tokens = (config.input_size // config.patch) ** 2
        self.mask_ratio = config.mask_ratio
        if config.checkpointing:
            self.checkpointing = "block"
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.width))
        # Kept without masking, too, because its name belongs to the layout; DDP wants no parameter without a gradient.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width), requires_grad=config.mask_ratio > 0)
        self.patch_embed = PatchEmbedding(config.patch, config.width)
        skips = [config.drop_path * index / max(1, config.depth - 1) for index in range(config.depth)]
        self.blocks = nn.Sequential(*(Block(config.width, config.heads, config.mlp_ratio, skip) for skip in skips))
        self.norm = nn.LayerNorm(config.width)
        self.feature = nn.Sequential(
            nn.Linear(config.width * tokens, config.width, bias=False),
            nn.BatchNorm1d(config.width, eps=FEATURE_NORM_EPS),
            nn.Linear(config.width, config.embedding_dim, bias=False),
            nn.BatchNorm1d(config.embedding_dim, eps=FEATURE_NORM_EPS),
        )
        nn.init.normal_(self.mask_token, std=INIT_STD)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float32 normalised -> (B, D) float32, not normalised."""
        x_BNC = self.patch_embed(images) + self.pos_embed
        masked = self.training and self.mask_ratio > 0
        if masked:
            x_BNC, places_BN = keep_some(x_BNC, self.mask_ratio)
        x_BNC = self.through(self.blocks, x_BNC)
        with _without_autocast(x_BNC):
            x_BNC = self.norm(x_BNC.float())
            if masked:
                x_BNC = put_back(x_BNC, places_BN, self.mask_token)
            embeddings: Tensor = self.feature(x_BNC.flatten(1))
        return embeddings


def keep_some(x_BNC: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Draws for each image which of its tokens stay.

    Args:
        x_BNC: all tokens.
        mask_ratio: part that goes, 0 to below 1; int(N (1 - mask_ratio)) stay, at least one.

    Returns:
        (B, N_kept, C) the tokens that stay, shuffled; (B, N) int64, the place of token n in that order (those at
        N_kept and beyond are gone).
    """
    tokens = x_BNC.shape[1]
    kept = max(1, int(tokens * (1 - mask_ratio)))
    order_BN = torch.rand(x_BNC.shape[:2], device=x_BNC.device).argsort(1)
    taken = order_BN[:, :kept, None].expand(-1, -1, x_BNC.shape[2])
    return x_BNC.gather(1, taken), order_BN.argsort(1)


def put_back(x_BNC: Tensor, places_BN: Tensor, mask_token_11C: Tensor) -> Tensor:
    """The inverse of `keep_some`: all N tokens in their own order, `mask_token_11C` where one is gone."""
    batch, kept, width = x_BNC.shape
    gone = mask_token_11C.to(x_BNC.dtype).expand(batch, places_BN.shape[1] - kept, -1)
    return torch.cat([x_BNC, gone], 1).gather(1, places_BN[:, :, None].expand(-1, -1, width))


class PatchEmbedding(nn.Module):
    """One linear map a patch."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, C), row by row."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each addend is left out for an image with chance `skip`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, skip: float) -> None:
        super().__init__()
        self.skip = skip
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(self, x_BNC: Tensor) -> Tensor:
        x_BNC = x_BNC + self._sometimes(self.attn(self.norm1(x_BNC)))
        return x_BNC + self._sometimes(self.mlp(self.norm2(x_BNC)))

    def _sometimes(self, addend_BNC: Tensor) -> Tensor:
        if not self.training or self.skip == 0:
            return addend_BNC
        stays = 1 - self.skip
        # Divided by the chance, so that the mean is that of the evaluation.
        factor = addend_BNC.new_empty(len(addend_BNC), 1, 1).bernoulli_(stays).div_(stays)
        return addend_BNC * factor


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(C / H)) v in H heads, in float32 whatever the autocast, as in arcface_torch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        batch, tokens, width = x_BNC.shape
        qkv = self.qkv(x_BNC).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        with _without_autocast(x_BNC):
            q_BHNc, k_BHNc, v_BHNc = qkv.float().unbind(0)
            x_BHNc = F.scaled_dot_product_attention(q_BHNc, k_BHNc, v_BHNc)
        mixed: Tensor = self.proj(x_BHNc.transpose(1, 2).reshape(batch, tokens, width))
        return mixed

    def product_macs(self, batch: int, tokens: int) -> int:
        """Multiply-adds of the two products between tokens, which no layer's weights show."""
        return 2 * batch * tokens * tokens * self.qkv.in_features


class Mlp(nn.Module):
    """Linear, ReLU6 (not ViT's GELU), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.relu6(self.fc1(x)))
        return y


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    # Parameter counts are taken on the meta device, which knows no autocast.
    device = x.device.type
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )
