"""The views of the published methods, as data.

Sources: MoCo-v3 (Chen et al., 2021, and its code), SimCLR for ViT (the TPU code of MoCo-v3's authors), DINO (Caron
et al., 2021), LocalMIM (Wang et al., 2023), fine-tuning (Touvron et al., 2021: DeiT).
"""

from dataclasses import replace

from data.views import ViewSpec

Views = tuple[ViewSpec, ...]


def moco_views(size: int, crop_min: float = 0.08) -> Views:
    """Return MoCo-v3's two asymmetric views: the first always blurred, the second rarely, but solarized at times."""
    scale = (crop_min, 1.0)
    return ViewSpec(size, scale=scale, blur=1.0), ViewSpec(size, scale=scale, blur=0.1, solarize=0.2)


def simclr_views(size: int, crop_min: float = 0.08) -> Views:
    """Return SimCLR's two views of one distribution, with the saturation of the ViT recipe."""
    view = ViewSpec(size, scale=(crop_min, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5)
    return view, view


def dino_views(
    size: int,
    small_size: int = 96,
    small_crops: int = 8,
    scale: tuple[float, float] = (0.4, 1.0),
    small_scale: tuple[float, float] = (0.05, 0.4),
) -> Views:
    """Return DINO's two large and then its small crops, all bicubic."""
    first = ViewSpec(size, scale=scale, blur=1.0, interpolation="bicubic")
    second = ViewSpec(size, scale=scale, blur=0.1, solarize=0.2, interpolation="bicubic")
    small = ViewSpec(small_size, scale=small_scale, blur=0.5, interpolation="bicubic")
    return first, second, *(small,) * small_crops


def localmim_views(size: int, crop_min: float = 0.2) -> Views:
    """Return LocalMIM's one view: bicubic crop and flip, colors as they are."""
    return (ViewSpec(size, scale=(crop_min, 1.0), jitter_probability=0.0, grayscale=0.0, interpolation="bicubic"),)


def finetune_views(size: int, crop_min: float = 0.08, randaugment: float = 9.0) -> Views:
    """Return the one view of supervised fine-tuning: bicubic crop, RandAugment, flip."""
    (view,) = localmim_views(size, crop_min)
    return (replace(view, randaugment=randaugment),)
