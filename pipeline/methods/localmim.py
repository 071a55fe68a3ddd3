"""LocalMIM: masked image modeling where lower blocks, too, have a target of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.recipes import localmim_views
from data.views import ViewSpec
from pipeline.compression import Compression, TokenDropout
from pipeline.methods.base import Batch, Forward, Method, StepOutput
from pipeline.methods.indicators import spread
from pipeline.models.decoders import PatchDecoder
from pipeline.models.flops import attention_flops
from pipeline.models.hog import COLORS, hog_targets
from pipeline.models.initialization import initialize_as_localmim
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan

# Each reports its loss under a name of its own.
MAX_TAPS = 6


class DecoderRates(Enum):
    """Whose learning rate a decoder has while layers freeze."""

    # That of the block it is attached to, as in the published code of ViTFreeze.
    tapped = "tapped"
    # The global one, as its paper says.
    shared = "shared"


@dataclass
class LocalMIMConfig:
    """LocalMIM with HOG targets (Wang et al., 2023); defaults are those of its ViT-B."""

    mask: float = 0.75
    # After which blocks, counted from 1, a decoder is attached ...
    taps: list[int] = field(default_factory=lambda: [2, 4, 10, 12])
    # ... and what it predicts: 2^doublings cells along the side of a patch.
    doublings: list[int] = field(default_factory=lambda: [2, 1, 0, -1])
    bins: int = 9
    decoder_dim: int = 256
    decoder_heads: int = 8
    decoder_rates: DecoderRates = DecoderRates.tapped
    crop_min: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.mask < 1:
            raise ValueError(f"method.mask must be a share of the patches in (0, 1), got {self.mask:g}; 0.75 is usual.")
        if not 1 <= len(self.taps) <= MAX_TAPS or len(self.taps) != len(self.doublings):
            raise ValueError(
                f"method.taps and method.doublings must be of one length of at most {MAX_TAPS}, "
                f"got {self.taps} and {self.doublings}."
            )
        if self.taps != sorted(set(self.taps)) or self.taps[0] < 1:
            raise ValueError(f"method.taps must be rising numbers of blocks from 1 on, got {self.taps}.")
        if self.doublings != sorted(set(self.doublings), reverse=True):
            raise ValueError(f"method.doublings must fall: higher blocks predict coarser cells; got {self.doublings}.")
        if not 2 <= self.bins <= 36:
            raise ValueError(f"method.bins must be between 2 and 36, got {self.bins}; 9 is usual.")
        sizes = (4, self.decoder_heads, 2 ** max(0, *self.doublings))
        if self.decoder_heads < 1 or self.decoder_dim < 1 or any(self.decoder_dim % size for size in sizes):
            raise ValueError(
                f"method.decoder_dim must be a multiple of 4, of method.decoder_heads={self.decoder_heads} and of 2 to "
                f"the largest of method.doublings={self.doublings}, got {self.decoder_dim}; 256 is usual."
            )
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"method.crop_min must be a share of the image in (0, 1], got {self.crop_min:g}.")


class Tap(nn.Module):
    """A norm and a decoder behind a block, and the size in pixels of the cells that it predicts."""

    def __init__(self, number: int, block: int, norm: nn.Module, decoder: PatchDecoder, cell: int) -> None:
        super().__init__()
        self.name = f"loss_tap{number}"
        self.block, self.cell = block, cell
        self.norm, self.decoder = norm, decoder


class LocalMIM(Method):
    """Predict histograms of gradients of masked patches from several depths of the encoder, each at its own scale.

    A tap whose block is frozen is left out with its norm, decoder, target and term of the loss.
    """

    incompressible = (
        "method=localmim takes no compression: its mask already is a token dropout, and its decoders predict cells of "
        "the model's own patches; change method.mask, or take another method."
    )

    def __init__(self, config: LocalMIMConfig, encoder: ViT) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        _check(config, encoder)
        if not encoder.config.weights:
            initialize_as_localmim(encoder)
        places = zip(config.taps, config.doublings, strict=True)
        self.taps = nn.ModuleList(self._tap(i, *place) for i, place in enumerate(places, start=1))
        # Asked for at every step, and always the same.
        self._decoder_costs = {tap.block: self._decoder_cost(tap) for tap in self._all_taps()}
        self._decoder_flops = {tap.block: self._flops_of_decoder(tap) for tap in self._all_taps()}

    def views(self) -> Sequence[ViewSpec]:
        """Return one view: crop and flip."""
        return localmim_views(self.encoder.config.image_size, self.config.crop_min)

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        """Return the sum of the taps' losses, which are also reported one by one: it loses terms as taps go."""
        (images,) = batch.views
        vit, masking = self.encoder.config, self._masking()
        taps = self.active(plan)
        tokens = self.encoder.tapped(
            images, masking, batch.index, [tap.block for tap in taps], frozen_layers=plan.frozen_layers, stochastic=True
        )
        visible = self.encoder.chosen(batch.index, masking, images.shape[-1])
        assert visible is not None
        masked = _mask(visible, vit.grid**2)
        losses = {}
        for tap, target in zip(taps, self.targets(images, [tap.cell for tap in taps]), strict=True):
            predicted = tap.decoder(tap.norm(tokens[tap.block]), visible, vit.grid)
            losses[tap.name] = masked_error(predicted, target, masked, vit.grid)
        metrics = {name: loss.detach() for name, loss in losses.items()}
        return StepOutput(torch.stack([*losses.values()]).sum(), metrics | spread(tokens[taps[-1].block][:, 0]))

    @torch.no_grad()
    def targets(self, images: Tensor, cells: Sequence[int]) -> list[Tensor]:
        """Return the targets [B, cells of the image, 3 bins] for each cell size in pixels."""
        return hog_targets(images, cells, self.config.bins)

    def active(self, plan: StepPlan) -> list[Tap]:
        """Return the taps whose blocks still learn."""
        return [tap for tap in self._all_taps() if tap.block >= plan.frozen_layers]

    def forwards(self, plan: StepPlan) -> Sequence[Forward]:
        """Return the one pass of the visible patches.

        Raises:
            ValueError: the plan compresses.
        """
        vit = self.encoder.config
        whole = vit.grid**2
        if any(c.patch_size(vit.patch_size) != vit.patch_size or c.keep(whole) < whole for c in (plan.query, plan.key)):
            raise ValueError(self.incompressible)
        return [Forward(vit.image_size, self._masking(), True)]

    def head_flops(self, plan: StepPlan) -> int:
        """Return those of the decoders that are left."""
        return 3 * sum(self._decoder_flops[tap.block] for tap in self.active(plan))

    def lengths(self, plan: StepPlan) -> tuple[int, int]:
        """Return the class token and the visible patches; there are no keys."""
        return self.tokens(plan), 0

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the encoder's layers, each with the norm and decoder behind it if they share its rate."""
        layers = self.encoder.layers()
        if self.config.decoder_rates is DecoderRates.tapped:
            for block, members in self._behind_blocks().items():
                layers[block] += members
        return layers

    def attached(self) -> dict[int, list[nn.Parameter]]:
        """Return the norms and decoders by block if they learn at the global rate."""
        return self._behind_blocks() if self.config.decoder_rates is DecoderRates.shared else {}

    def _behind_blocks(self) -> dict[int, list[nn.Parameter]]:
        return {tap.block: list(tap.parameters()) for tap in self._all_taps()}

    def _all_taps(self) -> list[Tap]:
        return [tap for tap in self.taps if isinstance(tap, Tap)]

    def sample_cost(self, plan: StepPlan) -> float:
        """Return the encoder's cost and that of the decoders, whose weights are held against the encoder's."""
        return super().sample_cost(plan) + 3 * sum(self._decoder_costs[tap.block] for tap in self.active(plan))

    def nominal_sample_cost(self, plan: StepPlan) -> float:
        """Return the same with the encoder's by the formula of Lin et al., 2024, and nothing frozen."""
        return super().nominal_sample_cost(plan) + 3 * sum(self._decoder_costs.values())

    def _decoder_cost(self, tap: Tap) -> float:
        """Return a forward of a tap's decoder, in forwards of the reference sequence through the encoder."""
        vit = self.encoder.config
        visible = self._masking().keep(vit.grid**2)
        per_token = sum(p.numel() for block in self.encoder.blocks for p in block.parameters() if p.dim() == 2)
        return float(tap.decoder.weights_per_image(visible, vit.grid) / (vit.reference_length * per_token))

    def _flops_of_decoder(self, tap: Tap) -> int:
        grid = self.encoder.config.grid
        weights = tap.decoder.weights_per_image(self._masking().keep(grid**2), grid)
        return 2 * weights + attention_flops(tap.decoder.block, grid**2 + 1)

    def _masking(self) -> Compression:
        # A masked patch is a dropped token: never projected, chosen by the sample's own number.
        return Compression((TokenDropout(self.config.mask),))

    def _tap(self, number: int, block: int, doublings: int) -> Tap:
        config, vit = self.config, self.encoder
        # The encoder's last norm, which evaluation uses, is the one behind the last block.
        norm = vit.norm if block == len(vit.blocks) else nn.LayerNorm(vit.embed_dim, eps=1e-6)
        decoder = PatchDecoder(vit.embed_dim, config.decoder_dim, config.decoder_heads, doublings, COLORS * config.bins)
        return Tap(number, block, norm, decoder, _cell(vit.config.patch_size, doublings))


def masked_error(predicted: Tensor, target: Tensor, masked: Tensor, grid: int) -> Tensor:
    """Return the mean squared error [] of predictions [B, cells, C] over the masked part of the image.

    `masked` [B, grid^2] is 1 for a masked patch. A cell of several patches counts by its masked share. Every image
    has as many masked patches, so means over processes are means over the global batch.
    """
    error = (predicted.to(target.dtype) - target).square().mean(2)
    side = round(error.shape[1] ** 0.5)
    patches = torch.unflatten(masked.to(target.dtype), 1, (1, grid, grid))
    # Repeated for smaller cells, averaged for larger ones.
    weight = F.interpolate(patches, (side, side), mode="nearest" if side > grid else "area").flatten(1)
    return (error * weight).sum() / weight.sum()


def _mask(visible: Tensor, count: int) -> Tensor:
    """Return [B, count]: 0 for the visible patches [B, V], 1 for all others."""
    return torch.ones(len(visible), count, device=visible.device).scatter(1, visible, 0.0)


def _cell(patch_size: int, doublings: int) -> int:
    return patch_size >> doublings if doublings >= 0 else patch_size << -doublings


def _check(config: LocalMIMConfig, encoder: ViT) -> None:
    vit, depth = encoder.config, len(encoder.blocks)
    if config.taps[-1] != depth:
        raise ValueError(
            f"method.taps must end with the last of {depth} blocks, which evaluation reads, got {config.taps}; "
            f"say for instance method.taps=[{depth}] method.doublings=[0]."
        )
    if vit.grid < 2:
        raise ValueError(
            f"model.image_size must be several patches of {vit.patch_size} for a mask, got {vit.image_size}."
        )
    finest, coarsest = config.doublings[0], config.doublings[-1]
    if finest > 0 and vit.patch_size % 2**finest:
        raise ValueError(
            f"model.patch_size must be a multiple of {2**finest}, for method.doublings={config.doublings} cut a patch "
            f"into so many cells a side, got {vit.patch_size}; take another size or fewer doublings."
        )
    if coarsest < 0 and vit.grid % 2**-coarsest:
        raise ValueError(
            f"model.image_size must be a multiple of {2**-coarsest} patches, for method.doublings={config.doublings} "
            f"make a cell of so many a side, got {vit.grid} patches; take another size or leave the coarsest out."
        )
