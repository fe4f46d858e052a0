"""SHA-256 of every file of a training state, or of a model's weights: made when it is saved, compared before use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from megarlhf.errors import CheckpointError
from megarlhf.parallel.collectives import all_reduce
from megarlhf.parallel.mesh import Mesh

CHECKSUMS = "checksums.json"


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leave_checksums(directory: Path, rank: int) -> None:
    """Sum the files that Megatron wrote to `directory` on this rank, and leave the sums for `write_checksums`."""
    sums = {path.name: checksum(path) for path in sorted(directory.glob(f"__{rank}_*.distcp"))}
    (directory / f"{CHECKSUMS}.{rank}").write_text(json.dumps(sums), encoding="utf-8")


def write_checksums(directory: Path) -> None:
    """Gather what the ranks have left in `directory` and below, sum the rest, and write it all to one file."""
    sums: dict[str, str] = {}
    for part in sorted(directory.rglob(f"{CHECKSUMS}.*")):
        of_rank = json.loads(part.read_text(encoding="utf-8"))
        sums |= {(part.parent.relative_to(directory) / name).as_posix(): value for name, value in of_rank.items()}
        part.unlink()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and path.name != CHECKSUMS and name not in sums:
            sums[name] = checksum(path)
    (directory / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def check_checksums(directory: Path, remedy: str, mesh: Mesh | None = None) -> None:
    """Compare every file of `directory` with its sum; each rank reads its share of them.

    Ranks:    collective over the mesh; this process alone without one.
    Raises:   CheckpointError with the remedy, on every rank, naming the first file that is missing or was changed.
    """
    try:
        sums: dict[str, str] = json.loads((directory / CHECKSUMS).read_text(encoding="utf-8"))
        names = sorted(sums)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory / CHECKSUMS} cannot be read ({error}); {remedy}.") from None
    mine = range(len(names)) if mesh is None else range(mesh.rank, len(names), mesh.size("world"))
    first = next((index for index in mine if not _is_whole(directory / names[index], sums[names[index]])), len(names))
    if mesh is not None:
        first = int(all_reduce(torch.tensor(first, device=mesh.device), mesh, "world", op="min"))
    if first < len(names):
        path = directory / names[first]
        what = "was changed after it was saved" if path.is_file() else "is missing"
        raise CheckpointError(f"{path} {what}; {remedy}.")


def _is_whole(path: Path, expected: str) -> bool:
    return path.is_file() and checksum(path) == expected
