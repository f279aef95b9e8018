"""A run's directory copied elsewhere, for nodes that do not outlive the run: a folder, S3, GCS, whatever fsspec knows.

A copy is what its manifest, ``mirror.json``, says: which files, of which size, under which name. It is written last. A
file that has changed is written beside the one that the manifest names, never over it. What no manifest names any more, or
what uploads that failed left there, is removed afterwards. So an upload that is killed at any byte leaves the copy as it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from uuid import uuid4

import fsspec
from fsspec.core import split_protocol
from fsspec.registry import known_implementations

from grpo_flex import checkpoint
from grpo_flex.config import ConfigError

MANIFEST = "mirror.json"
RECORD = ".mirror.json"
"""In the run's own directory: which run it is, where its copy is, and of which step."""
FOLDERS = (None, "file", "local")
BLOCK = 2**24


class MirrorError(ValueError):
    """A copy that cannot be read, or does not belong to the run; nothing was changed."""


def problem(url: str) -> Iterator[str]:
    """What is wrong with a place for copies, as far as can be told without reaching for it."""
    protocol, path = split_protocol(url)
    protocol = protocol or "file"
    if protocol in FOLDERS and not path.startswith("/"):
        yield f"is {url!r}; it needs to be a URL such as s3://bucket/runs, or an absolute path"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0]
        way_out = f"pip install {package}" if package != fsspec.__name__ else str(error)
        yield f"is {url!r}, and what {protocol}:// needs is not installed: {way_out}"
    except ValueError:
        yield f"is {url!r}, but fsspec knows no file system called {protocol!r}; use s3://, gs:// or file:///"
    if not path.strip("/"):
        yield f"is {url!r}, which names no folder or bucket; it needs to be like s3://bucket/runs"


def check_writable(url: str) -> None:
    """Write a file to the mirror and remove it again.

    Raises:
        ConfigError: that failed.
    """
    place = Copy.at(url)
    probe = place.path(f".probe-{uuid4().hex}")
    try:
        place.fs.pipe_file(probe, b"grpo_flex")
        place.fs.rm_file(probe)
    except Exception as error:  # each back-end has errors of its own
        raise ConfigError(
            f"checkpoint.mirror '{url}' cannot be written to ({reason(error)}); a run writes and removes files there: mend "
            "that, give another place, or checkpoint.mirror= for none"
        ) from error


def is_copy(where: str) -> bool:
    """Whether ``--resume`` names a copy and no run's own directory."""
    return "://" in where or (Path(where) / MANIFEST).is_file()


def record(run_dir: Path) -> dict[str, Any]:
    """{"run", "url", "step", "number"} of the last complete copy; number is 0 before it, all is empty without a mirror."""
    try:
        return dict(json.loads((run_dir / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A file of the run, as it lies in the copy."""

    at: str
    """Its name there, which differs from the run's own if the file changed since an earlier copy."""
    size: int
    mtime_ns: int
    """Of the run's own file when it was copied."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What belongs to a copy."""

    run: str
    """Tells runs of the same name apart."""
    step: int = 0
    """Of its newest checkpoint."""
    number: int = 0
    """Of the copy: each has another one than those before it."""
    files: dict[str, Stored] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Raises ValueError, TypeError or KeyError for everything that is no manifest."""
        read = json.loads(text)
        files = {name: Stored(**stored) for name, stored in dict(read["files"]).items()}
        for name in (n for own, stored in files.items() for n in (own, stored.at)):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} lies outside of the run")
        return cls(run=str(read["run"]), step=int(read["step"]), number=int(read["number"]), files=files)


@dataclass(frozen=True)
class Copy:
    """A run's copy, or the folder below which copies lie."""

    url: str
    fs: Any
    root: str

    @classmethod
    def at(cls, url: str) -> Copy:
        """Raises MirrorError for a place that cannot be reached; ``url`` is one that ``problem`` has nothing against."""
        url = url.rstrip("/")
        # An object store has no folders to make, and asked to it may make a bucket.
        options = {"auto_mkdir": True} if split_protocol(url)[0] in FOLDERS else {}
        try:
            return cls(url, *fsspec.url_to_fs(url, **options))
        except Exception as error:  # each back-end has errors of its own
            raise MirrorError(f"{url} cannot be reached ({reason(error)})") from error

    @property
    def local(self) -> bool:
        return split_protocol(self.url)[0] in FOLDERS

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def manifest(self) -> Manifest | None:
        """None where there is no copy. Raises MirrorError for one that cannot be read, or is none."""
        try:
            return Manifest.parse(self.fs.cat_file(self.path(MANIFEST)))
        except FileNotFoundError:
            return None
        except Exception as error:  # the back-end's, or ``parse``'s
            raise MirrorError(f"{self.url}/{MANIFEST} cannot be read ({reason(error)})") from error

    def described(self) -> Manifest:
        """Raises MirrorError where there is no copy."""
        if (manifest := self.manifest()) is None or "config.json" not in manifest.files:
            raise MirrorError(
                f"there is no copy of a run at {self.url} (no {MANIFEST}); give one like s3://bucket/runs/NAME"
            )
        return manifest

    def config(self) -> str:
        """The run's config.json."""
        with tempfile.TemporaryDirectory() as folder:
            self._fetch(self.described().files["config.json"], file := Path(folder, "config.json"))
            return file.read_text()

    def is_here(self, run_dir: Path) -> bool:
        """Whether ``run_dir`` is the run that this is a copy of, as new as the copy or newer; False: it does not exist.

        Raises:
            MirrorError: it is another run, or an older state of this one.
        """
        if not run_dir.exists():
            return False
        manifest = self.described()
        if record(run_dir).get("run") != manifest.run:
            raise MirrorError(
                f"{run_dir} is there, and {self.url} is no copy of it but of another run; move that folder away, or give "
                "another place with runs_dir=… or checkpoint.mirror=…"
            )
        if (step := newest_step(run_dir)) < manifest.step:
            raise MirrorError(
                f"{run_dir} is there, at step {step}, and its copy {self.url} is newer, of step {manifest.step}; move that "
                f"folder away, then python -m grpo_flex train --resume {self.url} brings the newer one back"
            )
        return True

    def bring_back(self, run_dir: Path) -> None:
        """Make ``run_dir`` from the copy; it appears when all of it is there. At once where it is there already.

        Raises:
            MirrorError: a file is missing or has another size, or another process is at it; nothing was changed here.
        """
        manifest = self.described()
        aside = run_dir.with_name(f".{run_dir.name}.partial")
        aside.mkdir(parents=True, exist_ok=True)
        handle = os.open(aside, os.O_RDONLY)
        try:
            alone = locked(handle)
            if run_dir.exists():  # another process has brought it back in the meantime
                with suppress(OSError):
                    aside.rmdir()
                return
            if not (alone and _is_still(aside, handle)):
                raise MirrorError(
                    f"another process is bringing {run_dir} back; stop it first, or wait until it has ended"
                )
            self._fill(aside, run_dir, manifest)
        finally:
            os.close(handle)

    def _fill(self, aside: Path, run_dir: Path, manifest: Manifest) -> None:
        """Bring all files into a folder that this process has locked, and give it its name."""
        try:
            for left in aside.iterdir():  # by a process that was killed; not the folder itself, which is the lock
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            for name, stored in manifest.files.items():
                self._fetch(stored, aside / name)
            write_record(aside, manifest, self.url)
            aside.rename(run_dir)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def write(self, at: str, source: BinaryIO, size: int) -> int:
        """Write the first ``size`` bytes of a file, which may be growing; returns how many there were."""
        done = 0
        with self.fs.open(self.path(at), "wb") as sink:
            while block := source.read(min(BLOCK, size - done)):
                done += len(block)
                sink.write(block)
        return done

    def describe(self, manifest: Manifest) -> None:
        """Replace the manifest, as a whole: object stores do no other, a folder needs a rename."""
        path = self.path(MANIFEST)
        half = f"{path}.part" if self.local else path
        self.fs.pipe_file(half, json.dumps(asdict(manifest), indent=1).encode())
        if self.local:
            os.replace(half, path)

    def names(self) -> list[str]:
        """Of all files that lie there, whether they belong to the copy or not."""
        self.fs.invalidate_cache()  # a listing from before what was written since
        return [path.removeprefix(f"{self.root}/") for path in self.fs.find(self.root)]

    def remove(self, at: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(at))
        if self.local:
            with suppress(OSError):  # other files are in it
                Path(self.path(at)).parent.rmdir()

    def _fetch(self, stored: Stored, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.fs.get_file(self.path(stored.at), str(target))
        except Exception as error:
            raise MirrorError(f"{self.url}/{stored.at} cannot be read ({reason(error)}); {_ANEW}") from error
        if (size := target.stat().st_size) != stored.size:
            raise MirrorError(f"{self.url}/{stored.at} has {size} bytes, but {MANIFEST} says {stored.size}; {_ANEW}")
        os.utime(target, ns=(stored.mtime_ns, stored.mtime_ns))  # so that it counts as copied


_ANEW = "nothing was changed here: mend the copy, or start the run anew"


def locked(handle: int) -> bool:
    """Whether this process has the lock of an open folder now; also where the file system knows none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _is_still(folder: Path, handle: int) -> bool:
    """Whether an open folder has its name yet."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    there = checkpoint.complete(run_dir)
    return int(there[-1].name.removeprefix("step_")) if there else 0


def write_record(run_dir: Path, manifest: Manifest, url: str) -> None:
    half = run_dir / f"{RECORD}.part"
    half.write_text(json.dumps({"run": manifest.run, "url": url, "step": manifest.step, "number": manifest.number}))
    half.replace(run_dir / RECORD)


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
