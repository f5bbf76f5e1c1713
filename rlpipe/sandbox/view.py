"""What of the host a confined program can see: Python's library, three devices, and a scratch folder in memory."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlpipe.sandbox import kernel

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SCRATCH = "/tmp"
PACKAGES = "/packages"
BUILT_AT = "/proc"  # a folder that every Linux has and that no library is in; only this mount namespace sees it covered
HIDDEN = ("site-packages", "dist-packages")  # below the library: other people's packages


@dataclass(frozen=True)
class View:
    """library, packages: absolute folders, never writable; packages of a built root are seen below PACKAGES, all else under its
    own name. devices: files that may be read and written."""

    library: tuple[str, ...]
    packages: tuple[str, ...]
    devices: tuple[str, ...]

    def search(self, built_root: bool) -> list[str]:
        """Where Python looks for modules."""
        extensions = [path for path in (os.path.join(folder, "lib-dynload") for folder in self.library) if os.path.isdir(path)]
        around = [PACKAGES] if built_root else sorted({os.path.dirname(path) for path in self.packages})
        return [*self.library, *extensions, *(around if self.packages else [])]


def view_of_python(packages: Iterable[str] = ()) -> View:
    """The running Python's own library, and the installed packages of these names, each with its folder of shared libraries."""
    library = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    found: list[str] = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
            found += [str(path) for path in (folder, folder.with_name(f"{name}.libs")) if path.is_dir()]
    devices = tuple(path for path in DEVICES if os.path.exists(path))
    return View(tuple(sorted(path for path in library if os.path.isdir(path))), tuple(found), devices)


def become_root(view: View) -> None:
    """The view becomes the whole file system of this mount namespace, the scratch folder apart. Raises OSError."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    mountpoint = BUILT_AT
    kernel.mount("root", mountpoint, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=256k,nr_inodes=1k,mode=755")
    for path in view.packages:
        _bind(path, f"{mountpoint}{PACKAGES}/{os.path.basename(path)}")
    for path in view.library:
        inside = mountpoint + path
        _bind(path, inside)
        for name in HIDDEN:
            if os.path.isdir(os.path.join(inside, name)):
                flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_RDONLY
                kernel.mount("hidden", os.path.join(inside, name), "tmpfs", flags, "size=4k,nr_inodes=2,mode=755")
    os.makedirs(mountpoint + "/dev", exist_ok=True)
    for path in view.devices:
        os.close(os.open(mountpoint + path, os.O_CREAT | os.O_WRONLY, 0o644))
        kernel.mount(path, mountpoint + path, "", kernel.MS_BIND)
    os.makedirs(mountpoint + SCRATCH, exist_ok=True)
    os.chdir(mountpoint)
    kernel.pivot_here()
    kernel.mount("root", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)


def _bind(path: str, inside: str) -> None:
    os.makedirs(inside, exist_ok=True)
    kernel.mount(path, inside, "", kernel.MS_BIND | kernel.MS_REC)
    kernel.seal_mount(inside)


def mount_scratch(megabytes: int, files: int, uid: int) -> None:
    """An empty folder in memory, bounded in bytes and in files; the working directory."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    options = f"size={megabytes}m,nr_inodes={files + 1},mode=700,uid={uid},gid={uid}"
    kernel.mount("scratch", SCRATCH, "tmpfs", flags, options)
    os.chdir(SCRATCH)
