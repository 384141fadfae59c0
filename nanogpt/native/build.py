"""Build: compile the C files of this package for this machine, with its C compiler, and load them.

Example: library = load("step.c")
That takes half a second, once: the result is kept in the user's cache folder, under a name that says what it
was made of and for which processor. On a machine without a C compiler there is none.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nanogpt.storage.files import user_folder

FOLDER = Path(__file__).parent

FLAGS = (
    "-O3", "-std=c11", "-shared", "-fPIC",
    # Sums may be added up in any order, as in PyTorch. -ffast-math would change the whole process's numbers.
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
)  # fmt: skip

THREADS = ("-fopenmp",)
"""For all threads. Apple's compiler does not know it, and is asked again without."""

MAX_SECONDS = 60.0
"""After so long a compiler is given up."""


class BuildError(Exception):
    """Why there is no library, in one line."""


def load(name: str) -> ctypes.CDLL:
    """Compile a file of this package, if that has not been done here, and load it. Raises: BuildError."""
    try:
        source = FOLDER / name
        compiler = find_compiler()
        library = user_folder("cache") / library_name(source, compiler)
        if library.is_file():
            try:
                return ctypes.CDLL(str(library))
            except OSError:  # damaged
                library.unlink(missing_ok=True)
        compile_file(compiler, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(str(error)) from error


def find_compiler() -> str:
    """The C compiler, $CC or one of the usual ones. Raises: BuildError."""
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        if found := shutil.which(name):
            return found
    raise BuildError(f"$CC, {wanted}, is no program" if wanted else "there is no C compiler (cc)")


def library_name(source: Path, compiler: str) -> str:
    """A name that changes with all that the library depends on."""
    made_of = (source.read_text("utf-8"), *FLAGS, compiler, processor())
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    return f"{source.stem}-{digest[:16]}.so"


def processor() -> str:
    """What this processor can do: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    known = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{sys.platform} {platform.machine()} {known}"


def compile_file(compiler: str, source: Path, library: Path) -> None:
    """Compile a file, whole or not at all. Raises: BuildError; OSError if the folder cannot be written."""
    tuning = "-mcpu=native" if platform.machine().lower() in {"arm64", "aarch64"} else "-march=native"
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        new, complaints = Path(folder) / library.name, list[str]()
        for threads in (THREADS, ()):
            command = [compiler, *FLAGS, tuning, *threads, str(source), "-o", str(new), "-lm"]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    encoding="utf-8",
                    errors="replace",
                    timeout=MAX_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"{compiler} takes more than {MAX_SECONDS:g} s") from error
            if done.returncode == 0:
                break
            complaints = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        else:
            errors = [line for line in complaints if "error" in line]
            raise BuildError(f"{compiler}: {(errors or complaints)[0]}")
        if not new.is_file():
            raise BuildError(f"{compiler} wrote nothing")
        ctypes.CDLL(str(new))  # before it gets its name: OSError if it is no library
        with open(new, "rb+") as file:
            os.fsync(file.fileno())  # a file cut off by a power cut would end the process that loads it
        new.replace(library)
