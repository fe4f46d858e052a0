"""SHA-256 of every file of a saved state: made where the file was written, checked before it is read."""

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


def write_checksums(state: Path) -> None:
    """Gather what the ranks have left in `state`, sum the rest, and write it all to one file."""
    sums: dict[str, str] = {}
    for part in sorted(state.glob(f"*/{CHECKSUMS}.*")):
        of_rank = json.loads(part.read_text(encoding="utf-8"))
        sums |= {f"{part.parent.name}/{name}": value for name, value in of_rank.items()}
        part.unlink()
    for path in sorted(state.rglob("*")):
        name = path.relative_to(state).as_posix()
        if path.is_file() and name not in sums:
            sums[name] = checksum(path)
    (state / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def check_checksums(state: Path, mesh: Mesh) -> None:
    """Compare every file of `state` with its sum; each rank reads its share of them.

    Ranks:    collective over the mesh.
    Raises:   CheckpointError, on every rank, naming the first file that is missing or was changed.
    """
    try:
        sums: dict[str, str] = json.loads((state / CHECKSUMS).read_text(encoding="utf-8"))
        names = sorted(sums)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{state / CHECKSUMS} cannot be read ({error}); {_remedy(state)}") from None
    mine = range(mesh.rank, len(names), mesh.size("world"))
    bad = next((index for index in mine if not _is_whole(state / names[index], sums[names[index]])), len(names))
    first = int(all_reduce(torch.tensor(bad, device=mesh.device), mesh, "world", op="min"))
    if first < len(names):
        path = state / names[first]
        what = "was changed after it was saved" if path.is_file() else "is missing"
        raise CheckpointError(f"{path} {what}; {_remedy(state)}")


def _is_whole(path: Path, expected: str) -> bool:
    return path.is_file() and checksum(path) == expected


def _remedy(state: Path) -> str:
    return f"write the name of another state to {state.parent / 'latest'}, or remove that file to start afresh."
