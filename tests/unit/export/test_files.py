"""The safetensors writer."""

from __future__ import annotations

import torch


def test_the_writer_makes_the_file_that_safetensors_makes(tmp_path):
    from safetensors.torch import save_file

    from hf_automodel_parallel.export.safetensors_writer import DTYPE_NAMES, SafetensorsWriter

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(sorted(DTYPE_NAMES, key=str)):
        raw = torch.randint(
            0, 2 if dtype is torch.bool else 256, (3, 5, dtype.itemsize), generator=generator, dtype=torch.uint8
        )
        tensors[f"t{number % 3}.{'é' if number == 4 else 'x'}{number}"] = raw.view(dtype).reshape(3, 5)
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 4), torch.tensor(1.5)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    writer = SafetensorsWriter(tmp_path / "ours", {k: (v.shape, v.dtype) for k, v in tensors.items()}, {"format": "pt"})
    for name, value in tensors.items():
        writer.write(name, value)
    writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
