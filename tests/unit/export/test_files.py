"""The safetensors writer and the lazy tensor graph of an export."""

from __future__ import annotations

import warnings

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


def test_a_recording_fetches_each_input_once_and_frees_it():
    from hf_automodel_parallel.export.recording import Recording

    value, fetched = torch.arange(24.0).reshape(4, 6), []
    recording = Recording()
    leaf, other = recording.leaf("a", (4, 6), torch.float32), recording.leaf("b", (6,), torch.float32)
    with recording:
        parts = [part.t().contiguous() for part in leaf.chunk(2, dim=1)] + [other + 1]
    recording.expect(parts)

    def fetch(name: str) -> torch.Tensor:
        fetched.append(name)
        return value if name == "a" else value[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [recording.compute(part, fetch) for part in parts]
    assert all(torch.equal(r, e) for r, e in zip(results, [*(p.t() for p in value.chunk(2, dim=1)), value[0] + 1]))
    assert fetched == ["a", "b"] and not recording._values
    assert recording.leaves_of(parts[0]) == ["a"]
