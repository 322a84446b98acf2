from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from synthos.data.embedding import read_embedding

ARRAY = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def test_both_kinds_of_file_hold_the_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ARRAY.astype(np.float64))
    save_file({"tokens": torch.from_numpy(ARRAY)}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        found = read_embedding(tmp_path / name)
        assert found.dtype == np.float32 and np.array_equal(found, ARRAY)


def test_bfloat16_is_read(tmp_path: Path) -> None:
    low = torch.from_numpy(ARRAY).bfloat16()
    save_file({"tokens": low}, tmp_path / "a.safetensors")
    assert np.array_equal(read_embedding(tmp_path / "a.safetensors"), low.float().numpy())


def test_what_holds_no_array_of_floats_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", np.arange(3))
    np.save(tmp_path / "object.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("1 2 3")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.arange(2)}, tmp_path / "whole.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    (tmp_path / "weights.pt").write_bytes(b"none")
    faults = {
        "whole.npy": "holds int64; expected floating-point numbers",
        "object.npy": "Object arrays cannot be loaded",
        "broken.npy": "EOF",
        "empty.npy": "is empty",
        "text.npy": "^is no .npy file$",
        "two.safetensors": "holds 2 tensors; expected one",
        "whole.safetensors": "holds torch.int64; expected floating-point numbers",
        "broken.safetensors": "is no whole safetensors file",
        "weights.pt": "is no .npy or .safetensors file",
    }
    for name, words in faults.items():
        with pytest.raises(ValueError, match=words):
            read_embedding(tmp_path / name)


def test_an_archive_is_no_array_whatever_it_is_called(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.savez(file, tokens=np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="is an archive of arrays"):
        read_embedding(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-20])
    with pytest.raises(ValueError, match="is no array"):
        read_embedding(tmp_path / "b.npy")
