"""Arrays that another model has left in a file: .npy, or .safetensors."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".npy", ".safetensors")
MAX_BYTES = 1 << 30  # of a file: 4,000 tokens of 64,000 numbers
MAX_HEADER_BYTES = 64 << 10  # of .safetensors, where one tensor takes some 100


def read_embedding(path: Path) -> NDArray[np.float32]:
    """The one array of a file; ValueError as in `read_embeddings`, and for a file of several."""
    arrays = read_embeddings(path)
    if len(arrays) != 1:
        raise ValueError(f"holds {len(arrays)} tensors; expected one")
    return next(iter(arrays.values()))


def read_embeddings(path: Path) -> dict[str, NDArray[np.float32]]:
    """All arrays of a file by their names, float32; that of a .npy file has none and is called "".

    Raises ValueError for another kind of file, and for what is no array of floats. Nothing of a file is run: no pickled
    objects. Its sizes are checked before anything of those sizes is made.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"is no {' or '.join(SUFFIXES)} file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    arrays = {"": _read_npy(path)} if path.suffix == ".npy" else _read_safetensors(path)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _read_npy(path: Path) -> NDArray[np.floating]:
    with path.open("rb") as start:
        magic = start.read(6)
    if magic and not magic.startswith((b"\x93NUMPY", b"PK")):  # NumPy would take it for a pickle, and advise to read it
        raise ValueError("is no .npy file")
    try:
        array = np.load(path, allow_pickle=False)
    except EOFError:
        raise ValueError("is empty") from None
    except MemoryError as error:  # of the size that its header claims
        raise ValueError(f"is no array: {error}") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"is no array: {error}") from None
    if not isinstance(array, np.ndarray):  # NumPy opens archives of arrays whatever they are called
        array.close()
        raise ValueError("is an archive of arrays; expected one array")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"holds {array.dtype}; expected floating-point numbers")
    return array


def _read_safetensors(path: Path) -> dict[str, NDArray[np.floating]]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as start:
        length = start.read(8)
    if len(length) == 8 and (header := int.from_bytes(length, "little")) > MAX_HEADER_BYTES:
        raise ValueError(f"has a header of {header} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        with safe_open(path, "pt") as file:  # by torch: NumPy has no bfloat16
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    except SafetensorError as error:
        raise ValueError(f"is no whole safetensors file: {error}") from None
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        raise ValueError(f"holds {tensors[odd[0]].dtype}; expected floating-point numbers")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}
