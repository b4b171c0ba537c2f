"""The kernel of the emulated host: a Debian package that is unpacked into a cache and never installed.

Layout of one cache entry, `host-kernel/<package>_<version>/`:
    vmlinuz                    the kernel QEMU starts
    lib/modules/<release>/     its modules, decompressed and indexed, as `modprobe` wants them
"""

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "rootfs"))
import newc  # noqa: E402

# 6.12 and nothing older: 6.1 restores snapshots five times slower in the same test.
PACKAGE_PATTERN = r"^linux-image-6\.12\.[0-9].*-cloud-amd64-unsigned$"

# Loaded before the file tree is there. Everything else is loaded on demand by the kernel itself.
EARLY_MODULES = ("overlay", "kvm-amd", "tun")


class HostError(Exception):
    """A failure of the emulated host, not of the command in it; the text ends with what to do."""


@dataclass(frozen=True)
class HostKernel:
    directory: Path

    @property
    def vmlinuz(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        return next((self.directory / "lib/modules").iterdir())


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "belljar"


def ensure_kernel() -> HostKernel:
    """Returns the newest cached host kernel; fetches one if the cache has none."""
    root = cache_root() / "host-kernel"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = [entry for entry in root.iterdir() if (entry / "vmlinuz").is_file()]
        if ready:
            return HostKernel(max(ready, key=lambda entry: natural_order(entry.name)))
        for leftover in root.glob(".partial*"):
            shutil.rmtree(leftover)
        partial = root / ".partial"
        partial.mkdir()
        try:
            name = fetch_kernel(partial)
            (partial / "unpacked").rename(root / name)
            return HostKernel(root / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def natural_order(name: str) -> list:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def fetch_kernel(partial: Path) -> str:
    """Downloads the newest package the mirror gives and leaves `unpacked/`; returns the entry's name."""
    listed = subprocess.run(["apt-cache", "--names-only", "search", PACKAGE_PATTERN], capture_output=True, text=True)
    names = sorted((line.split(" ")[0] for line in listed.stdout.splitlines()), key=natural_order, reverse=True)
    complaint = "apt knows no package linux-image-6.12.*-cloud-amd64-unsigned"
    for name in names:
        print(f"belljar host: fetching {name} (once, about 34 MB)", file=sys.stderr)
        # apt's own unprivileged user cannot write into a private cache directory.
        command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name]
        got = subprocess.run(command, cwd=partial, capture_output=True, text=True)
        packages = list(partial.glob("*.deb"))
        if got.returncode == 0 and packages:
            unpack(packages[0], partial)
            return packages[0].stem.replace("%3a", ":")
        complaint = f"apt-get download {name}: {got.stderr.strip()}"
    raise HostError(f"no kernel for the emulated host: {complaint}\n"
                    "  remedy: scripts/setup (it runs apt-get update as root)")


def unpack(package: Path, partial: Path) -> None:
    raw, unpacked = partial / "raw", partial / "unpacked"
    subprocess.run(["dpkg", "-x", package, raw], check=True)
    modules = next(path for top in ("lib", "usr/lib") for path in (raw / top / "modules").glob("*"))
    for packed in modules.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    target = unpacked / "lib/modules" / modules.name
    target.parent.mkdir(parents=True)
    modules.rename(target)
    subprocess.run(["busybox", "depmod", "-b", unpacked, modules.name], check=True, stdout=subprocess.DEVNULL)
    shutil.copyfile(next((raw / "boot").glob("vmlinuz-*")), unpacked / "vmlinuz")


def early_modules(kernel: HostKernel) -> list[Path]:
    """Files of EARLY_MODULES and all they depend on, in loading order."""
    dependencies = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, needs = line.partition(":")
        dependencies[path] = needs.split()
    by_name = {Path(path).stem.replace("_", "-"): path for path in dependencies}
    order: list[str] = []

    def visit(path: str) -> None:
        if path not in order:
            for need in dependencies[path]:
                visit(need)
            order.append(path)

    for name in EARLY_MODULES:
        visit(by_name[name])
    return [kernel.modules / path for path in order]


def initramfs(kernel: HostKernel, job: dict[str, bytes]) -> bytes:
    """The first file system of the emulated host: busybox, early modules, and the job's files under /job."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise HostError("busybox is missing\n  remedy: apt-get install busybox-static")
    own = Path(__file__).resolve().parent.parent
    entries = [newc.directory(name) for name in ("bin", "dev", "proc", "sys", "modules", "job", "lower", "upper", "tree")]
    entries.append(newc.file("bin/busybox", Path(busybox).read_bytes(), 0o755))
    entries += [newc.file(name, (own / name).read_bytes(), 0o755) for name in ("init", "serve", "hold")]
    for position, module in enumerate(early_modules(kernel)):
        entries.append(newc.file(f"modules/{position:02}-{module.name}", module.read_bytes()))
    entries += [newc.file(f"job/{name}", content) for name, content in job.items()]
    return newc.archive(entries)
