"""Another machine, reached with the user's own OpenSSH client: its config, agent and known hosts.

sshd gives a command to the user's login shell, whichever that is: `for_any_shell` writes it so that
each hands it on to sh as it is, and what comes before BEGIN is what the login shell's files print.

One connection is made, and shared by all commands. Our folder there lives as long as it does: a
shell there removes the folder when its stdin ends, whatever ended it: we, Ctrl-C, or the network.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO

from edgekd.records import EdgeKDError

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

OPTIONS = (
    "-T", "-a", "-x",  # no terminal, and neither our agent nor our display lent to the device
    "-o", "BatchMode=yes",  # never ask: an unknown host key or a password is an error
    "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4",
    "-o", "ClearAllForwardings=yes", "-o", "RemoteCommand=none",
    "-o", "LogLevel=ERROR",  # a banner is no reason why a login failed
)  # fmt: skip
ORPHAN_SECONDS = 60  # that a connection outlives us where we were killed
ANSWER_SECONDS = 60.0
END_SECONDS = 10.0  # that a process there is given to end when its stdin has
YEAR_2000 = 946684800  # of every file that is sent: the same files are the same bytes
HOLD = """umask 077
d=
trap 'exit 1' HUP INT PIPE TERM
trap '[ -z "$d" ] || { cd /; rm -rf "$d" || { sleep 2; rm -rf "$d"; }; }' EXIT
t=$(cd -- "${TMPDIR:-/tmp}" >/dev/null && pwd) || exit 1
d=$(mktemp -d "$t/edgekd.XXXXXXXX") || exit 1
printf '%s\\0' "$HOME" "$d"
cat >/dev/null"""
UNPACK = 'umask 077; mkdir -p -- "$1" && tar -xf - -C "$1"'
# What libraries leave in the temporary folder is removed with ours. Python finds our source first,
# PYTHONSAFEPATH or not, and takes names of files as UTF-8 in any locale.
INSIDE = (
    'cd "$1" && TMPDIR=$1 && PYTHONPATH=$1${PYTHONPATH:+:$PYTHONPATH} && PYTHONUTF8=1 && '
    'export TMPDIR PYTHONPATH PYTHONUTF8 && shift && exec "$@"'
)
BEGIN = b"\nedgekd-begins\n"  # what a login shell's files print comes before
# No character here or in the word that follows is special to any shell within single quotes: not
# `!` or a newline, as in csh, nor \\ before \\ or ', as in fish, nor ", as in PowerShell.
THROUGH = "sh -c 'set -f; IFS=; eval $(printf %b $1)' sh '{}'"
PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:,=+-")


class Device:
    """A machine at the other end of ssh, for a `with` block.

    folder: of our own there, absolute, empty at first, private, removed at the end. Commands run
    in it. home: the user's home folder there.
    """

    folder: str
    home: str

    def __init__(self, host: str) -> None:
        """`host` as ssh takes it: a name of the user's config, user@host, ssh://user@host:port."""
        if not host or host.startswith("-") or not host.isprintable() or " " in host:
            raise EdgeKDError(f'"{host}" is no host: give HOST, user@HOST or ssh://user@HOST:PORT')
        self.host = host

    def __enter__(self) -> Self:
        """Connect; EdgeKDError in one line that says what to do if that fails."""
        self._ssh = shutil.which("ssh")
        if self._ssh is None:
            raise EdgeKDError(
                "there is no ssh here: install OpenSSH's client (apt install openssh-client)"
            )
        with contextlib.ExitStack() as stack:
            private = stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekd-"))
            self._socket = str(Path(private) / "s")
            stack.callback(self._disconnect)
            self._connect()
            hold, errors = stack.enter_context(self._start(["sh", "-c", HOLD]))
            timer = threading.Timer(ANSWER_SECONDS, hold.kill)
            timer.start()
            try:
                self.home, self.folder = _told(hold.stdout)
            finally:
                timer.cancel()
            if not self.folder:
                raise self.failed("makes no temporary folder in its TMPDIR or /tmp", hold, errors)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove the folder there and hang up."""
        self._stack.close()

    def from_home(self, path: str) -> str:
        """An absolute path there of one from the home folder; EdgeKDError if there is no home."""
        if not path.startswith("/") and not (self.home.startswith("/") and self.home.isprintable()):
            raise EdgeKDError(
                f"{self.host} names {printable(self.home)!r} as your home folder, which is no "
                f"whole path of printable characters: give /DIR/{posixpath.basename(path)}"
            )
        return posixpath.join(self.home, path)

    def _connect(self) -> None:
        """Open the connection that all commands share; it goes on in the background."""
        # Stderr is a file: the connection inherits it, and a pipe would not end before it does.
        with tempfile.TemporaryFile() as errors:
            shared = ["-o", "ControlMaster=yes", "-o", f"ControlPersist={ORPHAN_SECONDS}", "-fN"]
            try:
                done = subprocess.run(
                    [*self._words(*shared), "--", self.host],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                    timeout=2 * ANSWER_SECONDS, start_new_session=True, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise EdgeKDError(f"ssh {self.host} does not answer: is the device on?") from None
            if done.returncode:
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace")
                raise EdgeKDError(_refusal(self.host, said, last_words(errors)))

    def _disconnect(self) -> None:
        """End the connection, if there is one."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*self._words("-O", "exit"), "--", self.host],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                timeout=END_SECONDS, check=False,
            )  # fmt: skip

    def _words(self, *more: str) -> list[str]:
        assert self._ssh is not None  # `__enter__` looked for it
        return [self._ssh, *OPTIONS, "-S", self._socket.replace("%", "%%"), *more]

    @contextlib.contextmanager
    def _start(self, command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
        with tempfile.TemporaryFile() as errors:
            # A session of its own: Ctrl-C reaches us alone, and we end what runs there in order.
            process = subprocess.Popen(
                [*self._words("-o", "ControlMaster=no"), "--", self.host, for_any_shell(command)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            try:
                self._begin(process, errors)
                yield process, errors
            finally:
                _end(process)

    def _begin(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        """Pass over what the login shell says before the command; EdgeKDError if none begins."""
        assert process.stdout is not None  # a pipe
        said = bytearray()
        over = threading.Event()

        def late() -> None:
            over.set()
            process.kill()

        timer = threading.Timer(ANSWER_SECONDS, late)
        timer.start()
        try:  # byte by byte: what follows is another's to read
            while not said.endswith(BEGIN) and (byte := os.read(process.stdout.fileno(), 1)):
                said += byte
        finally:
            timer.cancel()
        if said.endswith(BEGIN):
            return
        if over.is_set():
            raise EdgeKDError(
                f"{self.host} begins no command within {ANSWER_SECONDS:g} s: do the files of the "
                "login shell there (.bashrc, .cshrc, ...) wait, or start another shell?"
            )
        # nologin says why on stdout
        words = printable(said.decode("utf-8", "replace").strip().rpartition("\n")[2])
        raise self.failed("runs no sh", process, errors, words)

    @contextlib.contextmanager
    def start(self, command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
        """(process, file of its stderr) of a command in our folder there, with pipes as stdin and
        stdout. At the end its stdin is closed, and it should end then, too.
        """
        with self._start(["sh", "-c", INSIDE, "sh", self.folder, *command]) as started:
            yield started

    def run(
        self, command: Sequence[str], *, stdin: bytes = b"", timeout: float = ANSWER_SECONDS
    ) -> subprocess.CompletedProcess[bytes]:
        """What became of a command in our folder there; its exit code is the caller's to judge.

        timeout: seconds. EdgeKDError if they are over (what does not read its stdin may go on
        there), or if the connection is lost.
        """
        with self.start(command) as (process, errors):
            try:
                stdout, _ = process.communicate(stdin, timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise EdgeKDError(
                    f"{self.host}: {command[0]} took more than {timeout:g} s"
                ) from None
            if process.returncode == 255:
                raise self.failed("was lost", process, errors)
            errors.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, stdout, errors.read())

    def failed(
        self, what: str, process: subprocess.Popen[bytes], errors: IO[bytes], words: str = ""
    ) -> EdgeKDError:
        """The error that a process ended with: `what` it did not do, and its last words, `words` if
        it left none on stderr.
        """
        try:
            code = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return EdgeKDError(f"{self.host} {what}: no answer")
        words = last_words(errors) or words or f"exit code {code}, nothing was said"
        if code == 255:  # ssh's own
            words = f"the connection was lost ({words})"
        return EdgeKDError(f"{self.host} {what}: {words}")

    def put(self, local: Path, remote: str) -> None:
        """Copy a file or a folder to path `remote`, from our folder there unless absolute.

        EdgeKDError for a link or anything else that is neither: what it leads to stays here.
        """
        files: dict[str, Path | bytes] = {}
        if local.is_dir() and not local.is_symlink():
            for path in sorted(local.rglob("*")):
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise EdgeKDError(f"{path} is a link or no file: it is not sent")
                if path.is_file():
                    files[path.relative_to(local).as_posix()] = path
            self.put_files(files, remote)
        elif local.is_file() and not local.is_symlink():
            above, name = posixpath.split(remote)
            self.put_files({name: local}, above)
        else:
            raise EdgeKDError(f"{local} is missing, or a link: it is not sent")

    def put_files(self, files: Mapping[str, Path | bytes], remote: str) -> None:
        """Write these files, of relative paths, into folder `remote`, made if it is not there."""
        # Relative to the folder that the command is in: if that is removed meanwhile, it stays so.
        where = remote if remote.startswith("/") else f"./{remote}"
        with self.start(["sh", "-c", UNPACK, "sh", where]) as (process, errors):
            assert process.stdin is not None  # a pipe
            try:
                with tarfile.open(
                    fileobj=process.stdin, mode="w|", format=tarfile.GNU_FORMAT
                ) as tar:
                    for name in sorted(files):
                        _add(tar, name, files[name])
                process.stdin.close()
            except BrokenPipeError:
                raise self.failed("takes no files", process, errors) from None
            if process.wait():
                raise self.failed("takes no files", process, errors)

    def get(self, remote: str, local: Path, *, limit: int = 1 << 30) -> None:
        """Copy a file or a folder there to path `local`, which is not there yet.

        EdgeKDError for anything but plain files within it, or for more than `limit` bytes.
        """
        above, name = posixpath.split(posixpath.join(self.folder, remote))
        with self.start(["tar", "-cf", "-", "-C", above, f"./{name}"]) as (process, errors):
            try:
                _extract(process.stdout, name, local, limit, self.host)
            except (tarfile.TarError, EOFError):
                raise self.failed(f"sends no {remote}", process, errors) from None
            if process.wait():
                raise self.failed(f"sends no {remote}", process, errors)


def last_words(errors: IO[bytes]) -> str:
    """The last line of a file, printable and short: it goes to a terminal."""
    errors.seek(0)
    said = errors.read().decode("utf-8", "replace").strip().splitlines()
    return printable(said[-1]) if said else ""


def printable(text: str) -> str:
    """What another machine said, without what would move a terminal's cursor; 500 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[-500:]


def for_any_shell(command: Sequence[str]) -> str:
    """A line that any login shell hands on to sh: it prints BEGIN, and then the command runs."""
    begin = f"printf '{BEGIN.decode().encode('unicode_escape').decode()}'"
    script = f"set +f; unset IFS; {begin}; exec {shlex.join(command)}"
    word = (chr(b) if b in PLAIN else f"\\0{b:03o}" for b in os.fsencode(script))
    return THROUGH.format("".join(word))


def _told(stdout: IO[bytes] | None) -> tuple[str, str]:
    """The home folder and ours that HOLD tells of; empty if it does not."""
    assert stdout is not None  # a pipe
    told = b""
    while told.count(b"\0") < 2 and (byte := stdout.read(1)) and len(told) < 10_000:
        told += byte
    home, folder, *_ = [os.fsdecode(x) for x in told.split(b"\0")] + [""]
    return home, folder


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its stdin, give what runs there time to end by itself, then end our side."""
    assert process.stdin is not None  # pipes, both
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()  # who still writes to it ends, too
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def _refusal(host: str, said: str, words: str) -> str:
    """What to do where ssh could not log in, of all that it said and its last words."""
    if "IDENTIFICATION HAS CHANGED" in said:
        return (
            f"{host} shows another host key than the one known: if it was installed anew, remove "
            "the old key with ssh-keygen -R, else do not trust it"
        )
    if "Host key verification failed" in said:
        return f"the host key of {host} is not known: run ssh {host} once, compare, and accept it"
    if "Permission denied" in said or "Too many authentication failures" in said:
        return f"{host} lets none of your keys in: ssh-copy-id {host}, or load it with ssh-add"
    reasons = ("refused", "resolve", "timed out", "No route", "unreachable", "closed by", "reset")
    if any(r in said for r in reasons):
        return f"cannot reach {host}: {words}"
    return f"ssh {host} failed: {words or 'it said nothing'}"


def _add(tar: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    """One plain file; nothing of it but name, bytes and whether it may be run."""
    info = tarfile.TarInfo(name)
    info.mtime = YEAR_2000
    if isinstance(content, bytes):
        info.size = len(content)
        tar.addfile(info, BytesIO(content))
        return
    try:
        with content.open("rb") as f:
            status = os.fstat(f.fileno())
            info.size = status.st_size
            info.mode = 0o755 if status.st_mode & 0o100 else 0o644
            tar.addfile(info, f)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise EdgeKDError(f"cannot read {content}: {e.strerror or e}") from None


def _extract(stream: IO[bytes] | None, name: str, local: Path, limit: int, host: str) -> None:
    """Write what a tar stream holds of `name` to `local`."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            inside = path.parts[:1] == (name,) and ".." not in path.parts
            if not inside or not (member.isfile() or member.isdir()):
                raise EdgeKDError(f"{host} sends {printable(member.name)!r}, no plain file")
            limit -= member.size
            if limit < 0:
                raise EdgeKDError(f"{host} sends more of {name} than there should be")
            target = local.joinpath(*path.parts[1:])
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            content = tar.extractfile(member)
            assert content is not None  # a plain file
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as f:
                shutil.copyfileobj(content, f)
