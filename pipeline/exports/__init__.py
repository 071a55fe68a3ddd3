"""An encoder as files that others load: one table of formats."""

from __future__ import annotations

from pipeline.exports import onnx_graph, own_names, state_dict, timm_folder
from pipeline.exports.format import Format

# A new format is one line here.
FORMATS: dict[str, Format] = {
    "timm": timm_folder.FORMAT,
    "safetensors": own_names.FORMAT,
    "torch": state_dict.FORMAT,
    "onnx": onnx_graph.FORMAT,
}
