"""The C++ kernels for CPUs: compiled once at first use, kept in the user's cache folder.

The library has a plain C interface, without torch's headers, so that it compiles in seconds with
any GCC or Clang and serves any version of torch. It runs on the threads of torch's own OpenMP: a
second pool beside it would fight it for the cores.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = ("neighborhood.cpp", "fused.cpp", "philox.cpp")
HEADERS = ("simd.h",)
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=fast", "-w")
VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),  # what every processor of the platform has
}
"""Compiler's options by torch's name of what the CPU can do."""


class NativeError(RuntimeError):
    """Why there is no compiled library."""


def cpu_capability() -> str:
    """The capability that is compiled for: a key of VECTORS."""
    found = torch.backends.cpu.get_cpu_capability()
    return found if found in VECTORS else "DEFAULT"


def compiler() -> str:
    """Path of the C++ compiler: $CXX, or the first that is found.  Raises NativeError."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    if wanted:
        raise NativeError(f"CXX is {wanted!r}, and there is no such program; unset or correct it")
    raise NativeError(
        "no C++ compiler found (c++, g++ or clang++); install one (Debian: apt install g++), "
        "or name it in CXX"
    )


def cache_folder() -> Path:
    """hdit's folder in the user's cache."""
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home, "hdit")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hdit"
    return Path.home() / ".cache" / "hdit"


def build(capability: str) -> Path:
    """The library for a CPU with this capability, compiled if it is not in the cache yet.

    Its name holds a hash of the sources, the options and the compiler's version.
    Raises NativeError where it cannot be compiled or kept.
    """
    if sys.platform == "win32":
        raise NativeError("Windows has neither of the compilers that it is written for")
    source = Path(__file__).parent
    program = compiler()
    options = (*FLAGS, *VECTORS[capability])
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise NativeError(f"cannot run {program}: {error}") from error
    digest = hashlib.sha256("\0".join([platform.machine(), version, *options]).encode())
    for name in (*HEADERS, *SOURCES):
        digest.update((source / name).read_bytes())
    folder = cache_folder()
    library = folder / f"kernels-{capability.lower()}-{digest.hexdigest()[:16]}.so"
    try:
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "compiling").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
            if not library.exists():
                _compile(program, options, source, library)
    except OSError as error:
        raise NativeError(
            f"cannot keep the compiled kernels in {folder}: {error}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return library


def _compile(program: str, options: tuple[str, ...], source: Path, library: Path) -> None:
    """Compiles the sources side by side, then links them; `library` appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compile_only = [option for option in options if option != "-shared"]
        jobs = []
        for name in SOURCES:
            made = Path(scratch, name).with_suffix(".o")
            command = [program, *compile_only, "-c", "-o", str(made), str(source / name)]
            jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        ended = [(job, job.communicate()[1]) for job in jobs]
        for job, errors in ended:
            _check(program, job.returncode, errors)
        objects = [str(path) for path in Path(scratch).glob("*.o")]
        command = [program, *options, "-o", str(Path(scratch, library.name)), *objects]
        linked = subprocess.run(command, capture_output=True, text=True)
        _check(program, linked.returncode, linked.stderr)
        os.replace(Path(scratch, library.name), library)


def _check(program: str, status: int, errors: str) -> None:
    if status:
        first = next((line for line in errors.splitlines() if "error" in line), errors[-300:])
        raise NativeError(f"{program} failed ({status}): {first.strip()}")


class Library:
    """The functions of a compiled library, called with tensors, numbers and lists of integers."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"cannot load {path}: {error}; delete it") from error
        try:  # of the OpenMP that torch has loaded
            self._parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
        except AttributeError:
            log.warning("torch has loaded no OpenMP that is known here: one thread for C++ kernels")
            self._parallel = ctypes.c_void_p(None)

    def __call__(self, name: str, *arguments: Any) -> None:
        """Calls a function with torch's threads and then these arguments."""
        values = [_to_c(value) for value in arguments]
        threads = ctypes.c_int(torch.get_num_threads())
        getattr(self._library, name)(self._parallel, threads, *values)


def _to_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, int):
        return ctypes.c_long(value)
    if value is None:
        return ctypes.c_void_p(None)
    return (ctypes.c_long * len(value))(*value)


@lru_cache(maxsize=1)
def library() -> Library | NativeError:
    """The library for this machine, or why there is none: found out once a process."""
    try:
        return Library(build(cpu_capability()))
    except NativeError as error:
        return error


def vector_bytes() -> int:
    """Width of the registers that the library for this machine computes with."""
    return 64 if cpu_capability() == "AVX512" else 32


def unavailable() -> str | None:
    """Why there is no library for this machine, or None; compiles it if need be."""
    found = library()
    return str(found) if isinstance(found, NativeError) else None


# To torch.compile a constant, which it does not look into: what assume_constant_result of
# torch.compiler sets, without the second that it takes to import the compiler.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(name: str, *arguments: Any) -> None:
    """Calls a function of this machine's library."""
    found = library()
    if isinstance(found, NativeError):
        raise found
    found(name, *arguments)
