# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""FCMAE: remove patches, encode the visible ones, reconstruct the others.

python -c "from models import create_model; print(create_model('fcmae_convnextv2_atto'))"
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, resolve
from models.convnextv2 import Block, ConvNeXtV2, set_grad_checkpointing
from models.layers import PatchConv
from models.sparse import PatchGrid

# Functions of the difference between prediction and target.
RECON_LOSSES = {"l2": torch.square, "l1": torch.abs}
RECON_LOSSES["smooth_l1"] = lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none")


def visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Number of patches that stay visible: 19 of 49 at 0.6, 10 of 100 at 0.9."""
    visible = (num_patches * (1 - mask_ratio) + 1e-6) // 1  # 100 * (1 - 0.9) is 9.999...
    if not 1 <= visible < num_patches:
        raise UserError(
            f"mask_ratio {mask_ratio} leaves {visible:.0f} of {num_patches} patches visible; "
            "expected at least 1 visible and 1 removed"
        )
    return int(visible)


def random_mask(noise: Tensor, visible: int) -> Tensor:
    """(N, L) noise -> (N, L) float mask, 0 at the `visible` lowest values of a row, else 1."""
    keep = noise.argsort(dim=1)[:, :visible]
    return torch.ones(noise.shape, device=noise.device).scatter_(1, keep, 0.0)


class FCMAE(nn.Module):
    """Fully convolutional masked autoencoder around a ConvNeXt V2 encoder.

    encoder: a ConvNeXtV2; its final norm and head are removed, since pre-training uses neither.
    patch_size: side of a mask patch in pixels, a multiple of the encoder's total stride, which is
        the default. mask_ratio: fraction of patches removed.
    decoder_depth, decoder_embed_dim: blocks of the decoder and their width.
    norm_pix_loss: normalize the target, each patch by its own mean and variance.
    recon_loss: a name of RECON_LOSSES.
    Source: arXiv 2301.00808, section 3. Parameter names are the official ones.
    """

    set_grad_checkpointing = set_grad_checkpointing

    def __init__(
        self,
        encoder: ConvNeXtV2,
        patch_size: int | None = None,
        mask_ratio: float = 0.6,
        decoder_depth: int = 1,
        decoder_embed_dim: int = 512,
        norm_pix_loss: bool = True,
        recon_loss: str = "l2",
    ) -> None:
        super().__init__()
        self.in_chans, dim, stride = self.remove_head(encoder)
        self.stride = stride  # of the encoder's last feature map
        self.patch_size = patch_size or stride
        if self.patch_size % stride:
            near = max(self.patch_size // stride, 1) * stride
            raise UserError(
                f"patch_size {patch_size}: expected a multiple of {stride}; "
                f"give --patch_size {near}"
            )
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        resolve(recon_loss, RECON_LOSSES, "reconstruction loss", importable=False)
        self.recon_loss = recon_loss

        self.encoder = encoder
        self.proj = PatchConv(dim, decoder_embed_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_embed_dim, 1, 1))
        nn.init.normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(*[Block(decoder_embed_dim) for _ in range(decoder_depth)])
        self.pred = PatchConv(decoder_embed_dim, stride**2 * self.in_chans, 1)

    @staticmethod
    def remove_head(encoder: ConvNeXtV2) -> tuple[int, int, int]:
        """Remove the final norm and the head; returns input channels, features and stride."""
        encoder.norm = nn.Identity()
        encoder.reset_classifier(0)
        return encoder.in_chans, encoder.num_features, encoder.total_stride

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w), the patches of an image of H x W pixels."""
        p = self.patch_size
        if height % p or width % p:
            raise UserError(
                f"image of {height} x {width} pixels is not a whole number of {p} x {p} "
                f"patches; try {max(height // p, 1) * p} x {max(width // p, 1) * p}"
            )
        return height // p, width // p

    def patchify(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, p*p*C): patches row by row; in each: row, column, channel."""
        n, c, height, width = images.shape
        h, w = self.grid_size(height, width)
        p = self.patch_size
        cells = images.reshape(n, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1)  # (N, h, w, p, p, C)
        return cells.reshape(n, h * w, p * p * c)

    def unpatchify(self, patches: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, L, p*p*C) -> (N, C, h*p, w*p); `size` is (h, w), by default square."""
        n, length, dim = patches.shape
        p = self.patch_size
        h, w = size or (round(length**0.5),) * 2
        cells = patches.reshape(n, h, w, p, p, dim // p**2).permute(0, 5, 1, 3, 2, 4)
        return cells.reshape(n, -1, h * p, w * p)

    def forward_encoder(self, images: Tensor, mask: Tensor, visible: int | None = None) -> Tensor:
        """Images (N, C, H, W) -> features (N, D, H/stride, W/stride), zero where removed.

        mask: (N, L), 1 = removed, 0 = visible, the same number of zeros in every image.
        visible: that number, if known; counting costs a host sync on a GPU.
        """
        grid = PatchGrid(mask, self.grid_size(*images.shape[-2:]), visible)
        packed = self.encoder.forward_stages(grid.pack(images.permute(0, 2, 3, 1)), grid)[-1]
        return grid.unpack(packed).permute(0, 3, 1, 2)

    def forward_decoder(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features (N, D, H/stride, W/stride) and mask (N, L) -> prediction (N, p*p*C, h, w)."""
        x = self.proj(features.permute(0, 2, 3, 1))  # (N, H/stride, W/stride, decoder dim)
        n, height, width, dim = x.shape
        cells = self.patch_size // self.stride  # feature cells along a patch
        h, w = height // cells, width // cells
        removed = mask.reshape(n, h, 1, w, 1, 1).expand(-1, -1, cells, -1, cells, -1)
        token = self.mask_token.to(x.dtype).reshape(1, 1, 1, dim)
        x = torch.where(removed.reshape(n, height, width, 1) > 0, token, x)
        x = self.pred(self.decoder(x))  # (N, H/stride, W/stride, s*s*C), s = stride
        # If a patch has several cells, order their pixels as `patchify` does.
        s, c = self.stride, self.in_chans
        x = x.reshape(n, h, cells, w, cells, s, s, c).permute(0, 2, 5, 4, 6, 7, 1, 3)
        return x.reshape(n, -1, h, w)  # (N, [cell row, row, cell column, column, channel], h, w)

    def pixel_errors(self, images: Tensor, pred: Tensor) -> Tensor:
        """Return the loss of each value of all patches, (N, L, p*p*C), in float32 or better."""
        target = self.patchify(images.to(torch.promote_types(images.dtype, torch.float32)))
        if self.norm_pix_loss:
            # (x - mean) / sqrt(var + 1e-6) in one pass. The official variance is the unbiased one,
            # n / (n - 1) times that of layer_norm.
            n = target.shape[-1]
            ratio = (n - 1) / n
            target = F.layer_norm(target, (n,), eps=1e-6 * ratio) * ratio**0.5
        pred = pred.flatten(2).transpose(1, 2)  # (N, L, p*p*C)
        return RECON_LOSSES[self.recon_loss](pred.to(target.dtype) - target)

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean loss of the pixels of removed patches, a scalar in float32 or better."""
        error = self.pixel_errors(images, pred).mean(-1)  # (N, L)
        return (error * mask).sum() / mask.sum()

    def forward(
        self, images: Tensor, mask: Tensor | None = None, visible: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, C, H, W) -> loss, prediction (N, p*p*C, h, w) and mask (N, L), 1 = removed.

        Without a mask, one is drawn by torch's generator for the images' device.
        """
        if mask is None:
            h, w = self.grid_size(*images.shape[-2:])
            visible = visible_patches(h * w, self.mask_ratio)
            noise = torch.rand(len(images), h * w, device=images.device)
            mask = random_mask(noise, visible)
        features = self.forward_encoder(images, mask, visible)
        pred = self.forward_decoder(features, mask)
        return self.forward_loss(images, pred, mask), pred, mask
