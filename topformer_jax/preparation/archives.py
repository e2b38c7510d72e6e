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
from collections.abc import Iterator
from typing import Any

from topformer_jax.data.sources import list_files
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

IN_ZIP, IN_FOLDER, IN_MEMORY = -1, -2, -3  # instead of a position in a tar file
MOST_HELD = 1 << 24  # bytes of a file in a compressed tar file that is kept in memory
MOST_ZEROS = 1 << 20  # bytes at the end of a tar file: it is filled up to whole records
_SYSTEM_FILES = ("Icon\r", "Thumbs.db", "desktop.ini")


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive or a folder."""

    archive: str  # "" for bytes of no file
    name: str
    size: int  # bytes
    offset: int  # of the content in a tar file
    data: bytes = dataclasses.field(default=b"", repr=False)  # in memory: the content, compressed by zlib

    @property
    def where(self) -> str:
        """The file's name in an error."""
        if self.offset == IN_FOLDER:
            return self.path
        return f"{self.archive}:{self.name}" if self.archive else self.name

    @property
    def path(self) -> str:
        """The path of a file in a folder."""
        return os.path.join(self.archive, self.name)

    def read(self) -> bytes:
        """The file's bytes; raises UserError if the archive is damaged or cut off here."""
        if self.offset == IN_MEMORY:
            return zlib.decompress(self.data)
        path, name = (self.path, "") if self.offset == IN_FOLDER else (self.archive, self.name)
        if self.size > files.MOST_BYTES:  # a few kB of zeros may claim as much
            raise UserError(f"{self.where} has {self.size:,} bytes: at most {files.MOST_BYTES:,} are read")
        with _report_damage(path, name):
            if self.offset == IN_ZIP:
                return _open_zip(self.archive).read(self.name)
            with files.open_regular(path) as file:
                file.seek(max(self.offset, 0))
                data = file.read(self.size)
            if len(data) != self.size:
                raise EOFError("its end is missing")
            return data


def hold(where: str, data: bytes = b"") -> Member:
    """Makes a member of bytes that are known already; `where` names them in errors."""
    return Member("", where, len(data), IN_MEMORY, zlib.compress(data, 1))


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
            members = [Member(str(path.parent), path.name, path.stat().st_size, IN_FOLDER)]
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
        return _list_tar(member.archive, member.offset, member.offset + member.size)


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


@functools.lru_cache(maxsize=4)  # a worker reads many files of one archive, and its list may be long
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _list_zip(path: pathlib.Path) -> list[Member]:
    _open_zip.cache_clear()  # the file may have been another one
    infos = _open_zip(str(path)).infolist()
    return [Member(str(path), info.filename, info.file_size, IN_ZIP) for info in infos if not info.is_dir()]


def _list_tar(path: str, start: int, end: int) -> list[Member]:
    """Lists the tar file in these bytes of a file."""
    with files.open_regular(path) as file:
        file.seek(start)
        with tarfile.TarFile(fileobj=file) as tar:
            members = [
                Member(path, info.name.removeprefix("./"), info.size, info.offset_data)
                for info in _list_files(tar, end)
            ]
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
    """Lists the .mat and .txt files of a compressed tar file, and keeps their content: it has no index."""
    members = []
    with gzip.open(path) as file:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for info in _list_files(tar, files.MOST_BYTES):
                if info.name.endswith((".mat", ".txt")) and info.size <= MOST_HELD:
                    content: Any = tar.extractfile(info)
                    name, data = info.name.removeprefix("./"), zlib.compress(content.read(), 1)
                    members.append(Member(str(path), name, info.size, IN_MEMORY, data))
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


def _list_folder(path: pathlib.Path) -> Iterator[Member]:
    for name in sorted(list_files(path)):
        file = path / name
        # A link that leads nowhere is listed, and named when it is read.
        yield Member(str(path), name, file.stat().st_size if file.exists() else 0, IN_FOLDER)


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
