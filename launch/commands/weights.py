"""`synthos weights export`: what a run of Wan2.1 learned to see images with, under the original release's names."""

import sys
from pathlib import Path

from synthos.models.exported import ABOUT_FILE, find_export
from synthos.models.tensors import tensor_files
from synthos.models.wan import original_name

USAGE = """usage: synthos weights export weights=FOLDER out=FILE.safetensors

Write the image projector (img_emb.proj.*) of exported weights (weights/step_N of a run) and, where they have any, the
image keys and values (blocks.*.cross_attn.k_img, v_img, norm_k_img), in the naming of the original Wan2.1 release. A
run starts from such a file by init_from=FILE.
"""


def main(arguments: list[str]) -> int:
    """Write the file; raises ValueError for what is no export, or holds nothing of the kind."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if set(given) != {"weights", "out"}:
        raise ValueError(f"synthos weights export: {' '.join(arguments) or 'no arguments'} is not allowed\n{USAGE}")
    folder, out = Path(given["weights"]), Path(given["out"])
    if out.suffix != ".safetensors":
        raise ValueError(f"out: {str(out)!r} is not allowed; expected a file like projector.safetensors")
    names = export_original(folder, out)
    print(f"{out}  {len(names)} tensors", file=sys.stderr)
    return 0


def export_original(folder: Path, out: Path) -> list[str]:
    """Write the tensors of the export `folder` that have an original name to `out`; returns these names."""
    from safetensors import safe_open

    from synthos.models.tensors import save_tensors

    export = find_export(folder, "weights")
    if export is None:
        raise ValueError(f"weights: {folder} lacks {ABOUT_FILE}; expected a folder like weights/step_00002000 of a run")
    stored = tensor_files(export.file)
    renamed = {original: name for name in stored if (original := original_name(name))}
    if not renamed:
        raise ValueError(f"weights: {folder} holds no image projector of Wan2.1")
    tensors = {}
    for original, name in renamed.items():
        with safe_open(stored[name], "pt") as file:
            tensors[original] = file.get_tensor(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, out, {"format": "pt"})
    return sorted(renamed)
