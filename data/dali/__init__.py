"""The DALI door: encoded images and parameter rows in, normalized views out, on the GPU or the CPU.

DALI decodes each image once and makes all its views. It holds no random state: every number that shapes a pixel comes
in a row of `data.views.draw`. How far the views are from torchvision's (v2, on uint8 tensors, with the same rows; gray
levels, mean over 128 photographs, views of 224 pixels):

                                   exact                                 fused
decode, flip, normalize, solarize  0                                     0
crop and resize                    0.16 (we do not round between axes)   0.18 (outermost pixels see their neighbors)
blur                               0.1 to 0.2 (we round between axes)    the same
brightness                         0.01                                  0.01
contrast                           0.02                                  0.1 to 0.2 (mean of the unrounded luma)
saturation                         0.1                                   0.3 to 0.6 (not truncated unless after others)
hue of up to 36 degrees            0.07                                  3 to 9 (YIQ, which keeps the luma; not HSV)
grayscale                          0.0004                                0.5 (rounded as in PIL, not truncated)
whole views, order as drawn        0.18 to 0.25, worst image 0.6         4, median image 2.5 (the saturation goes
                                                                         with the hue, wherever it was drawn)

Statistics of fused views (luma, contrast, chroma, highlights, shadows, gradients, tint) are those of torchvision's.
"""

from data.dali.hardware import probe_hardware_share
from data.dali.pipeline import COLORS, Decoding, Encoded, ViewPipeline, build_graph
from data.dali.view import MEAN, STD

__all__ = [
    "COLORS",
    "MEAN",
    "STD",
    "Decoding",
    "Encoded",
    "ViewPipeline",
    "build_graph",
    "probe_hardware_share",
]
