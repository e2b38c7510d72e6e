"""Files inside zip and tar archives and folders, which are read in place."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import os
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from topformer_jax.data.sources import list_files
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

MOST_HELD = 1 << 24  # bytes of a file in a compressed tar file that is kept in memory
MOST_ZEROS = 1 << 20  # bytes at the end of a tar file: it is filled up to whole records
_SYSTEM_FILES = ("Icon\r", "Thumbs.db", "desktop.ini")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A file inside an archive or a folder."""

    archive: str  # or the folder; "" for bytes that are known already
    name: str
    size: int  # bytes
    load: Callable[[], bytes] = dataclasses.field(repr=False)
    path: str = ""  # of a file in a folder
    start: int = 0  # of the content in a tar file

    @property
    def where(self) -> str:
        """The file's name in an error."""
        return self.path or (f"{self.archive}:{self.name}" if self.archive else self.name)

    def read(self) -> bytes:
        """The file's bytes; raises UserError if the archive is damaged or cut off here."""
        if self.size > files.MOST_BYTES:  # a few kB of zeros may claim as much
            raise UserError(f"{self.where} has {self.size:,} bytes: at most {files.MOST_BYTES:,} are read")
        if not self.archive:
            return self.load()
        with _report_damage(self.path or self.archive, "" if self.path else self.name):
            data = self.load()
            if len(data) != self.size:
                raise EOFError("its end is missing")
            return data


def hold(where: str, data: bytes = b"", archive: str = "") -> Member:
    """Makes a member of bytes that are known already, which stay compressed; `where` names them in errors."""
    return Member(archive, where, len(data), functools.partial(zlib.decompress, zlib.compress(data, 1)))


def _read_part(path: str, start: int, size: int) -> bytes:
    with files.open_regular(path) as file:
        file.seek(start)
        return file.read(size)


@dataclasses.dataclass(frozen=True)
class Archive:
    """The files of an archive or a folder by their names, in the archive's order."""

    path: pathlib.Path
    members: dict[str, Member]

    def __getitem__(self, name: str) -> Member:
        if name not in self.members:
            raise UserError(f"{self.path} holds no {name}: fetch it again")
        return self.members[name]

    def lines(self, name: str, *, by_place: bool = False) -> list[str]:
        """The lines of a text file that are not blank: see files.number_lines, files.number_names."""
        number = files.number_names if by_place else files.number_lines
        return list(number(self[name].where, self[name].read()).values())

    def names(self, folder: str, suffix: str) -> list[str]:
        """The sorted names of the files below a folder ("images/") that have a suffix, without both."""
        names = (name for name in self.members if name.startswith(folder) and name.endswith(suffix))
        return sorted(name[len(folder) : len(name) - len(suffix)] for name in names)


def open_archive(path: pathlib.Path, holds: str = "") -> Archive:
    """Lists a zip file, a tar file (plain or compressed by gzip), a folder or a JSON file.

    Names start below the folder that `holds` this file or folder ("images/training/").

    Raises UserError if it is cut off, damaged, or another archive.
    """
    with _report_damage(path):
        if path.is_dir():
            members = list(_list_folder(path))
        elif path.suffix == ".json":
            members = [_list_file(path.parent, path.name)]
        else:
            with files.open_regular(path) as file:  # which refuses a pipe
                is_compressed = file.read(2) == b"\x1f\x8b"
            if path.suffix.lower() == ".zip":
                members = _list_zip(path)
            else:
                members = _list_gzip(path) if is_compressed else _list_tar(str(path), 0, path.stat().st_size)
    members = [member for member in members if not _is_hidden(member.name)]
    starts = ((member.name, f"/{member.name}".find(f"/{holds}")) for member in members)
    root = next((name[:length] for name, length in starts if length >= 0), None if holds else "")
    if root is None:
        raise UserError(f"{path} holds no {holds}: it is another archive than the one of that name")
    return Archive(path, {m.name[len(root) :]: m for m in members if m.name.startswith(root)})


def open_nested(member: Member) -> list[Member]:
    """Lists a tar file that is a member of a tar file."""
    with _report_damage(member.archive, member.name):
        return _list_tar(member.archive, member.start, member.start + member.size)


def fingerprint(path: pathlib.Path, *, of_content: bool = False) -> list[int | str]:
    """What tells an archive from another of its name: its size, and with `of_content` its SHA-256.

    For a folder, whose files may be edited: size, number of files, and a SHA-256 of their names, sizes and texts.
    """
    if not path.is_dir():
        size: list[int | str] = [path.stat().st_size]
        if not of_content:
            return size
        with files.report_errors("read", path), files.open_regular(path) as file:
            return [*size, hashlib.file_digest(file, "sha256").hexdigest()]
    total, count, digest = 0, 0, hashlib.sha256()
    for member in _list_folder(path):
        total, count = total + member.size, count + 1
        digest.update(os.fsencode(f"{member.name}\n{member.size}\n"))
        if member.size and member.name.lower().endswith((".json", ".txt", ".csv", ".yaml", ".yml")):
            digest.update(hashlib.sha256(member.read()).digest())
    return [total, count, digest.hexdigest()]


def _list_zip(path: pathlib.Path) -> list[Member]:
    archive = zipfile.ZipFile(path)
    infos = (info for info in archive.infolist() if not info.is_dir())
    return [Member(str(path), info.filename, info.file_size, functools.partial(archive.read, info)) for info in infos]


def _list_tar(path: str, start: int, end: int) -> list[Member]:
    """Lists the tar file in these bytes of a file."""
    with files.open_regular(path) as file:
        file.seek(start)
        with tarfile.TarFile(fileobj=file) as tar:
            members = []
            for info in _list_files(tar, end):
                load = functools.partial(_read_part, path, info.offset_data, info.size)
                name = info.name.removeprefix("./")
                members.append(Member(path, name, info.size, load, start=info.offset_data))
            # A tar file ends with some zeros. tarfile's list ends without an error at a damaged header, at the end of
            # a file that is cut off, and at zeros in the middle (a download with holes).
            file.seek(tar.offset)
            rest = file.read(max(0, min(end - tar.offset, MOST_ZEROS + 1)))
            if not rest:
                raise tarfile.ReadError("its end is missing")
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"there is no header at byte {tar.offset:,}")
            if not members or len(rest) > MOST_ZEROS:
                raise tarfile.ReadError(f"there is nothing behind byte {tar.offset:,}")
    return members


def _list_gzip(path: pathlib.Path) -> list[Member]:
    """Lists the .mat and .txt files of a compressed tar file, and holds their content: it has no index."""
    members = []
    with gzip.open(path) as file:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for info in _list_files(tar, files.MOST_BYTES):
                if info.name.endswith((".mat", ".txt")) and info.size <= MOST_HELD:
                    content: Any = tar.extractfile(info)
                    members.append(hold(info.name.removeprefix("./"), content.read(), str(path)))
        while file.read(1 << 20):  # which checks the length and the checksum
            pass
    return members


def _list_files(tar: tarfile.TarFile, most: int) -> Iterator[tarfile.TarInfo]:
    """Yields the files; tarfile would go back for a size below 0, and read for hours for one that is too large."""
    for info in tar:
        if not 0 <= info.size <= most or info.issparse():
            raise tarfile.ReadError(f"{files.shorten(info.name)} has {info.size:,} bytes, or holes")
        if info.isfile():
            yield info


def _list_folder(folder: pathlib.Path) -> Iterator[Member]:
    for name in sorted(list_files(folder)):
        yield _list_file(folder, name)


def _list_file(folder: pathlib.Path, name: str) -> Member:
    path = folder / name
    size = path.stat().st_size if path.exists() else 0  # a link that leads nowhere is named when it is read
    return Member(str(folder), name, size, functools.partial(_read_part, str(path), 0, size), str(path))


def _is_hidden(name: str) -> bool:
    """Whether a system has left the file in the archive."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith((".", "__MACOSX")) for part in parts) or parts[-1] in _SYSTEM_FILES


@contextlib.contextmanager
def _report_damage(path: str | os.PathLike[str], name: str = "") -> Iterator[None]:
    """Turns any error of a damaged archive into a UserError that names the archive and its member."""
    with files.report_errors("read", path):
        try:
            yield
        except Exception as error:  # of many types
            if isinstance(error, UserError | OSError) and not isinstance(error, gzip.BadGzipFile):
                raise
            why = files.shorten(f"at {name}: {error}" if name else error, 120)
            raise UserError(
                f"{os.fspath(path)} ({os.path.getsize(path):,} bytes) is cut off, damaged or no such archive "
                f"({why}): replace it"
            ) from None
