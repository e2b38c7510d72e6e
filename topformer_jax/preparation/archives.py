"""Files inside zip and tar archives and folders, read in place; what is wrong with an archive is one line."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from topformer_jax.data.sources import list_files
from topformer_jax.runtime import files
from topformer_jax.runtime.errors import UserError

FETCH, REPLACE = (
    "fetch it again",
    "replace or remove it",
)  # what to do with an official archive, and a user's file
IN_ZIP, IN_FOLDER, IN_GZIP = -1, -2, -3  # instead of a position in a tar file
_SYSTEM_FILES = ("Icon\r", "Thumbs.db", "desktop.ini")
MOST_ZEROS = 1 << 20  # bytes at the end of a tar file: it is filled up to whole records


@dataclasses.dataclass(frozen=True)
class Member:
    """A file inside an archive or a folder. Worker processes get it and read it by themselves."""

    archive: str
    name: str
    size: int  # bytes
    offset: int  # of its content in a tar file
    advice: str = FETCH  # where it is damaged

    @property
    def where(self) -> str:
        """The file, as an error names it."""
        return f"{self.archive}:{self.name}" if self.offset != IN_FOLDER else self.path

    @property
    def path(self) -> str:
        """Of a file in a folder."""
        return os.path.join(self.archive, self.name)

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            UserError: the archive is damaged or cut off here.
        """
        path, name = (self.path, "") if self.offset == IN_FOLDER else (self.archive, self.name)
        if self.size > files.MOST_BYTES:  # a few kB of zeros may claim as much
            raise UserError(
                f"{self.where} has {self.size:,} bytes, and at most {files.MOST_BYTES:,} are read"
            )
        with _report_damage(path, name, self.advice):
            if self.offset == IN_ZIP:
                return _open_zip(self.archive).read(self.name)
            if self.offset == IN_GZIP:
                return next(_stream(self.archive, {self.name}))[1]
            with files.open_regular(path) as file:
                file.seek(max(self.offset, 0))
                data = file.read(self.size)
            if len(data) != self.size:
                raise EOFError("its end is missing")
            return data


@dataclasses.dataclass(frozen=True)
class Archive:
    """What an archive or a folder holds: its files by their names below `root`, in the archive's order."""

    path: pathlib.Path
    root: str
    members: dict[str, Member]

    def __getitem__(self, name: str) -> Member:
        if name not in self.members:
            raise UserError(f"{self.path} holds no {self.root}{name}: fetch it again")
        return self.members[name]

    def lines(self, name: str, *, by_place: bool = False) -> list[str]:
        """The lines of a text file, without those that are blank: see files.number_lines, files.number_names."""
        number = files.number_names if by_place else files.number_lines
        return list(number(self[name].where, self[name].read()).values())

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """The sorted names of the files below a folder ("images/") that have a suffix, without both."""
        found = (name for name in self.members if name.startswith(folder) and name.endswith(suffix))
        return sorted(name[len(folder) : len(name) - len(suffix)] for name in found)

    def read_all(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of several files: a tar file that is compressed is read once, from its start."""
        wanted = {self[name].name: name for name in names}
        if any(self[name].offset == IN_GZIP for name in names[:1]):
            for name, data in _stream(str(self.path), set(wanted)):
                yield wanted[name], data
        else:
            yield from ((name, self[name].read()) for name in names)


def open_archive(path: pathlib.Path, holds: str = "", advice: str = FETCH) -> Archive:
    """Lists a zip file, a tar file (plain or compressed by gzip) or a folder.

    Args:
        path: of the archive.
        holds: a file or a folder ("images/training/") in it; names are taken below the folder that holds this.
        advice: what to do where it is damaged.

    Raises:
        UserError: it is cut off, damaged, or another archive.
    """
    with _report_damage(path, advice=advice):
        if path.is_dir():
            found = list(_list_folder(path))
        elif path.suffix == ".json":
            found = [Member(str(path.parent), path.name, path.stat().st_size, IN_FOLDER)]
        else:
            with files.open_regular(path) as file:
                is_compressed = file.read(2) == b"\x1f\x8b"
            is_zip = path.suffix.lower() == ".zip"
            found = _list_zip(path) if is_zip else _list_gzip(path) if is_compressed else _list_tar(path)
    found = [dataclasses.replace(member, advice=advice) for member in found if not _is_hidden(member.name)]
    if not holds:
        return Archive(path, "", {member.name: member for member in found})
    for name in (member.name for member in found):
        position = name.find(holds)
        if position == 0 or (position > 0 and name[position - 1] == "/"):
            root = name[:position]
            return Archive(path, root, {m.name[len(root) :]: m for m in found if m.name.startswith(root)})
    raise UserError(f"{path} holds no {holds}: it is another archive than the one of that name")


def open_nested(member: Member) -> list[Member]:
    """Lists a tar file that is a member of a tar file."""
    with _report_damage(member.archive, member.name), files.open_regular(member.archive) as file:
        file.seek(member.offset)
        return _list_members(file, member.archive, member.offset + member.size)


def fingerprint(path: pathlib.Path) -> list[int | str]:
    """What tells an archive from another of its name: its bytes.

    Of a folder, whose files may be edited: also how many there are, and a checksum of their names, sizes and texts.
    """
    if not path.is_dir():
        return [path.stat().st_size]
    size, count, digest = 0, 0, hashlib.sha256()
    for member in _list_folder(path):
        size, count = size + member.size, count + 1
        digest.update(os.fsencode(f"{member.name}\n{member.size}\n"))
        if member.size and member.name.lower().endswith((".json", ".txt", ".csv", ".yaml", ".yml")):
            digest.update(hashlib.sha256(member.read()).digest())
    return [size, count, digest.hexdigest()]


@functools.lru_cache(maxsize=4)  # a worker reads many files of one archive, and its list may be long
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _list_zip(path: pathlib.Path) -> list[Member]:
    _open_zip.cache_clear()  # of a file that was another one
    infos = _open_zip(str(path)).infolist()
    return [Member(str(path), info.filename, info.file_size, IN_ZIP) for info in infos if not info.is_dir()]


def _list_tar(path: pathlib.Path) -> list[Member]:
    with files.open_regular(path) as file:
        return _list_members(file, str(path), path.stat().st_size)


def _list_members(file: IO[bytes], path: str, end: int) -> list[Member]:
    """The files in a tar file that begins where `file` stands and ends at byte `end`."""
    with tarfile.TarFile(fileobj=file) as tar:
        found = [
            Member(path, info.name.removeprefix("./"), info.size, info.offset_data)
            for info in _list_files(tar, end)
        ]
        # A tar file ends with blocks of zeros: where they are missing, its end is. A damaged header, or zeros in the
        # middle (a download with holes), end tarfile's listing without a word.
        position = file.seek(tar.offset)
        if position >= end:
            raise tarfile.ReadError("its end is missing")
        while block := file.read(min(1 << 20, end - position)):
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"there is no header at byte {tar.offset:,}")
            position += len(block)
        if position < end:
            raise tarfile.ReadError("its end is missing")
        # A download has reserved this space, and written nothing into it.
        if not found or end - tar.offset > MOST_ZEROS:
            raise tarfile.ReadError(f"there is nothing behind byte {tar.offset:,}")
    return found


def _list_gzip(path: pathlib.Path) -> list[Member]:
    """Reads the whole file, and so checks its length and checksum."""
    with gzip.open(path) as file:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            found = [
                Member(str(path), info.name.removeprefix("./"), info.size, IN_GZIP)
                for info in _list_files(tar, files.MOST_BYTES)
            ]
        while file.read(1 << 20):
            pass
    return found


def _list_files(tar: tarfile.TarFile, most: int) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file; tarfile would go back for a size below 0, and for hours over one that is not there."""
    for info in tar:
        if not 0 <= info.size <= most or info.issparse():
            raise tarfile.ReadError(f"{files.shorten(info.name)} has {info.size:,} bytes, or holes")
        if info.isfile():
            yield info


def _stream(path: str, names: set[str]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of files in a tar file that is compressed by gzip, in one pass."""
    missing = set(names)
    with (
        _report_damage(path),
        gzip.open(path) as file,
        tarfile.open(fileobj=file, mode="r|") as tar,
    ):
        for info in _list_files(tar, files.MOST_BYTES):
            name = info.name.removeprefix("./")
            if name in missing:
                content: Any = tar.extractfile(info)
                missing.remove(name)
                yield name, content.read()
            if not missing:
                return


def _list_folder(path: pathlib.Path) -> Iterator[Member]:
    for name in sorted(list_files(path)):
        file = path / name
        # A link that leads nowhere is listed, and named when it is read.
        yield Member(str(path), name, file.stat().st_size if file.exists() else 0, IN_FOLDER)


def _is_hidden(name: str) -> bool:
    """Whether some system left the file in the archive beside the real ones."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith((".", "__MACOSX")) for part in parts) or parts[-1] in _SYSTEM_FILES


@contextlib.contextmanager
def _report_damage(path: str | os.PathLike[str], name: str = "", advice: str = FETCH) -> Iterator[None]:
    """Turns what reading a damaged archive raises into a UserError that names it, and its member if there is one."""
    with files.report_errors("read", path):
        try:
            yield
        except Exception as error:  # of many types
            if isinstance(error, UserError | OSError) and not isinstance(error, gzip.BadGzipFile):
                raise
            why = files.shorten(f"at {name}: {error}" if name else error, 120)
            size = os.path.getsize(path)
            raise UserError(
                f"{os.fspath(path)} ({size:,} bytes) is cut off, damaged or no such archive ({why}): {advice}"
            ) from None
