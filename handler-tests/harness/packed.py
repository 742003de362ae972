"""The demo model as a quantized Safetensors checkpoint: compressed-tensors' `int-quantized`, 8 bits with a scale for each row."""
from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

from .gguf import DEMO, matrices

CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}},
    "ignore": ["lm_head"],
}


def rounded(row: list[float]) -> tuple[float, bytes]:
    # In f16, which is what a scale is stored as here.
    scale = struct.unpack("<e", struct.pack("<e", max(map(abs, row)) / 127))[0]
    return scale, struct.pack(f"<{len(row)}b", *(max(-127, min(127, round(number / scale))) for number in row))


def tensors():
    """Name, type, shape and bytes."""
    for name, rows in matrices():
        name = f"model.{name}.weight"
        if not name.endswith("_proj.weight"):
            shape = [len(rows), len(rows[0])] if "embed" in name else [len(rows[0])]
            yield name, "BF16", shape, b"".join(struct.pack(f"<{len(row)}H", *row) for row in rows)
            continue
        numbers = [struct.unpack(f"<{len(row)}f", struct.pack(f"<{len(row)}I", *(word << 16 for word in row))) for row in rows]
        scales, codes = zip(*map(rounded, numbers))
        yield name, "I8", [len(rows), len(rows[0])], b"".join(codes)
        yield name + "_scale", "F16", [len(rows), 1], struct.pack(f"<{len(scales)}e", *scales)


def write(folder: Path, without: str = "") -> Path:
    """The model's folder; `without`: a tensor that is left out."""
    for file in DEMO.iterdir():
        if file.name.endswith((".json", ".model", ".jinja")) and "golden" not in file.name:
            shutil.copy(file, folder)
    config = json.loads((DEMO / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    header, data = {}, b""
    for name, dtype, shape, numbers in tensors():
        if name != without:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(numbers)]}
            data += numbers
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    return folder
