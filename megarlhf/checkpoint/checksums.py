"""SHA-256 of every file of a training state or model: made when it is saved, compared before use."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from megarlhf.errors import CheckpointError
from megarlhf.observe.files import link_out, read_object
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
    """Gather what the ranks have left in `directory` and below, sum the rest, and write it all to one file.

    Of a directory below that has checksums of its own, their file alone is summed: it stands for the others.
    """
    sums: dict[str, str] = {}
    for part in sorted(directory.rglob(f"{CHECKSUMS}.*")):
        of_rank = json.loads(part.read_text(encoding="utf-8"))
        sums |= {(part.parent.relative_to(directory) / name).as_posix(): value for name, value in of_rank.items()}
        part.unlink()
    sums |= {name: checksum(directory / name) for name in _summed(directory) if name not in sums}
    (directory / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def check_checksums(
    directory: Path, remedy: str, mesh: Mesh | None = None, *, within: tuple[str, ...] | None = None, but: str = ""
) -> None:
    """Compare every file of `directory` with its sum; each rank reads its share of them.

    within: the files and folders in it that must be listed; all of them by default, with () none.
    but: leave out files whose names end so; what they hold is checked later.
    Ranks:    collective over the mesh; this process alone without one.
    Raises:   CheckpointError with the remedy, on every rank, naming the first file that is missing, was changed, leads
              elsewhere or is not listed.
    """
    sums = _read(directory, remedy)
    away = link_out(directory)
    if away is not None:
        raise CheckpointError(f"{away} is a link out of {directory}; put the file itself there, or {remedy}.")
    for name in _summed(directory):
        if name not in sums and (within is None or name.partition("/")[0] in within):
            raise CheckpointError(f"{directory / CHECKSUMS} does not list {name!r}; {remedy}.")
    names = sorted(name for name in sums if not (but and name.endswith(but)))
    mine = range(len(names)) if mesh is None else range(mesh.rank, len(names), mesh.size("world"))
    first = next((index for index in mine if not _is_whole(directory / names[index], sums[names[index]])), len(names))
    if mesh is not None:
        first = int(all_reduce(torch.tensor(first, device=mesh.device), mesh, "world", op="min"))
    if first < len(names):
        path = directory / names[first]
        what = "was changed after it was saved" if path.is_file() else "is missing"
        raise CheckpointError(f"{path} {what}; {remedy}.")


def check_hugging_face(directory: Path, mesh: Mesh | None = None) -> None:
    """Compare the weights of a Hugging Face directory with the sums that a conversion left there; others have none.

    Ranks:    as `check_checksums`.
    Raises:   CheckpointError naming the first file that is missing or was changed, and the remedies.
    """
    if (directory / CHECKSUMS).is_file():
        remedy = f"convert the model again or, if the change was meant, remove {directory / CHECKSUMS}"
        check_checksums(directory, remedy, mesh, within=())


def _read(directory: Path, remedy: str) -> dict[str, str]:
    path = directory / CHECKSUMS
    try:
        sums = read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {remedy}.") from None
    for name, value in sums.items():
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not isinstance(value, str):
            raise CheckpointError(f"{path} cannot be read ({name!r} is no file in it with a sum); {remedy}.")
    return sums


def _summed(directory: Path) -> list[str]:
    """The files that the checksums of `directory` list."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    nested = {path.parent for path in files if path.name == CHECKSUMS} - {directory}
    return [
        path.relative_to(directory).as_posix()
        for path in files
        if (path.name == CHECKSUMS) == (not nested.isdisjoint(path.parents))
    ]


def _is_whole(path: Path, expected: str) -> bool:
    return path.is_file() and checksum(path) == expected
