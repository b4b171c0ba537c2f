"""QEMU and its file servers as one thing that starts, talks and always ends.

Nothing of it has a name in a file system: sockets are pairs or abstract, memory, initramfs and logs are
anonymous. And every process asks the kernel to be killed when the runner dies. So there is nothing to
clean up, whichever way a run ends.
"""

import ctypes
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tsc
from kernel import HostError, HostKernel, initramfs

PR_SET_PDEATHSIG = 1
CONSOLE_KEPT = 64 * 1024
# Seconds between two interrupts from outside. QEMU's VMRUN and #VMEXIT change `interrupt_request` without its lock
# (target/i386/tcg/sysemu/svm_helper.c, as of 7.2), so an interrupt that arrives just then can be forgotten: its vector
# stays pending in the APIC until any other one comes. If the lost one was the one-shot timer of a processor, none may
# ever come: the emulated host stands still, or runs on in a guest that it can no longer leave. (Only the first processor
# is kicked; what needs to be certain runs with one.)
KICK = 0.05
# On the instruction-counted clock each is some 20 us of work that a measurement did not ask for, so they are rare: one is
# seen in no median, and where an interrupt was lost, that one measurement is spoilt and not all that come after it.
RARE_KICK = 5.0
# Space for translated code, after which QEMU begins anew. It translates a page of code again for every address at which
# some program has it, keeps all that, and walks through it at each store to that page when it is used for something
# else: with the usual 1 GiB everything stands still for minutes after some hundred programs were started in a guest.
TRANSLATIONS_MIB = 128
LIBC = ctypes.CDLL(None, use_errno=True)

QEMU = "qemu-system-x86_64"

# no_timer_check: on a machine under load the kernel takes late timer interrupts for a broken interrupt controller.
KERNEL_LINE = "console=ttyS0 reboot=t panic=-1 mitigations=off tsc=reliable no_timer_check quiet"
# Software processors that execute code while another one patches it may see the old bytes (`Oops: int3`). So all but
# the first stay off until the modules are loaded and `hold` holds KVM; `serve` turns them on. Without noreplace-smp
# the kernel would patch itself for one processor, and back; with lpj it need not measure the second one's speed.
KERNEL_LINE_SMP = " maxcpus=1 noreplace-smp lpj=8000000"
# Debian 12 has virtiofsd in qemu-system-common, later releases in a package of its own.
VIRTIOFSD_PLACES = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")


@dataclass(frozen=True)
class Shape:
    """What the emulated host is made of."""

    memory_mib: int = 4096
    # Code that several emulated processors patch under each other's feet (a guest's kernel does, at boot) is what the
    # emulation gets wrong now and then; and only the first one is kicked.
    cpus: int = 1
    icount: bool = False
    results: Path | None = None


class Machine:
    """A running emulated host. Use as a context manager: leaving it kills every process."""

    def __init__(self, shape: Shape, kernel: HostKernel, job: dict[str, bytes]):
        self.mark = secrets.token_bytes(32)
        self.logs = tempfile.TemporaryFile()
        self.console = bytearray()
        self.kicks = RARE_KICK if shape.icount else KICK
        self.kicked = time.monotonic()
        self.children: list[subprocess.Popen] = []
        self.inherited: list[socket.socket] = []
        try:
            self.stdout, self.stderr, self.control, self.serial = (self.channel() for _ in range(4))
            self.start(shape, kernel, job)
        except BaseException:
            self.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def channel(self) -> socket.socket:
        """A socket to QEMU; its other end goes into `inherited`."""
        ours, theirs = socket.socketpair()
        self.inherited.append(theirs)
        return ours

    def start(self, shape: Shape, kernel: HostKernel, job: dict[str, bytes]) -> None:
        if shutil.which(QEMU) is None:
            raise HostError(f"{QEMU} is missing\n  remedy: apt-get install qemu-system-x86 qemu-system-common")
        if os.geteuid() != 0:
            # overlayfs opens every file below it with O_NOATIME, which the kernel grants to a file's owner
            # and root only: in a user namespace virtiofsd can serve next to nothing of this machine's tree.
            raise HostError("the emulated host needs root, to serve this machine's files\n  remedy: sudo -E, or a machine with hardware virtualisation")
        stdout, stderr, control, serial = (end.fileno() for end in self.inherited)
        tree = self.serve_files("/")
        job = {**job, "mark": self.mark}
        image = os.memfd_create("initramfs")
        with os.fdopen(image, "wb", closefd=False) as file:
            file.write(initramfs(kernel, job))
        cpus = 1 if shape.icount else shape.cpus
        line = KERNEL_LINE + (KERNEL_LINE_SMP if cpus > 1 else "")
        if not shape.icount:
            # Measured by the emulated host, against a timer that a thread of QEMU drives, it is now and then
            # wrong by a factor on a machine under load, and so is every clock and time limit there.
            line += f" tsc_early_khz={tsc.khz()}"
        command = [
            QEMU, "-M", "q35", "-accel", f"tcg,tb-size={TRANSLATIONS_MIB}", "-cpu", "EPYC,+svm,+npt,check=off", "-smp", str(cpus),
            "-m", str(shape.memory_mib), "-nographic", "-no-reboot", "-nodefaults", "-monitor", "none",
            "-object", f"memory-backend-memfd,id=memory,size={shape.memory_mib}M,share=on",
            "-numa", "node,memdev=memory",
            "-kernel", str(kernel.vmlinuz), "-initrd", f"/proc/self/fd/{image}",
            "-append", line,
            "-chardev", f"socket,id=serial,fd={serial}", "-serial", "chardev:serial",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=stdout,fd={stdout}", "-device", "virtserialport,nr=1,chardev=stdout",
            "-chardev", f"socket,id=stderr,fd={stderr}", "-device", "virtserialport,nr=2,chardev=stderr",
            "-chardev", f"socket,id=control,fd={control}", "-device", "virtserialport,nr=3,chardev=control",
            *virtiofs_device("tree", tree),
        ]
        files = [stdout, stderr, control, serial, image, tree]
        if shape.results is not None:
            results = self.serve_files(str(shape.results))
            files.append(results)
            command += virtiofs_device("results", results)
        if shape.icount:
            # One executed instruction is one nanosecond, and idle time passes at once.
            command += ["-icount", "shift=0,sleep=off"]
        self.qemu = self.spawn(command, files)
        os.close(image)
        for end in self.inherited:
            end.close()

    def serve_files(self, directory: str) -> int:
        """Starts virtiofsd for a directory; returns the descriptor of QEMU's connection to it."""
        program = next((place for place in VIRTIOFSD_PLACES if os.access(place, os.X_OK)), None)
        if program is None:
            raise HostError("virtiofsd is missing\n  remedy: apt-get install qemu-system-common virtiofsd")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(b"\0belljar-host-" + secrets.token_hex(16).encode())
            listener.listen(1)
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(listener.getsockname())
            self.inherited.append(connection)
            if program == VIRTIOFSD_PLACES[0]:
                options = ["-o", f"source={directory}", "-o", "sandbox=chroot,cache=auto,log_level=warn"]
            else:
                options = ["--shared-dir", directory, "--sandbox", "chroot", "--cache", "auto", "--log-level", "warn"]
            self.spawn([program, f"--fd={listener.fileno()}", *options], [listener.fileno()])
        return connection.fileno()

    def spawn(self, command: list[str], files: list[int]) -> subprocess.Popen:
        runner = os.getpid()

        def die_with_the_runner():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != runner:
                os._exit(1)

        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.logs, stderr=self.logs, pass_fds=files,
            # Out of the terminal's process group: Ctrl-C is for the runner to handle.
            start_new_session=True, preexec_fn=die_with_the_runner,
        )
        self.children.append(child)
        return child

    def relay(self, stdout: int, stderr: int) -> int:
        """Copies output until the command ends, and kicks meanwhile; returns its exit status."""
        outputs = {self.stdout: Output(stdout, self.mark), self.stderr: Output(stderr, self.mark)}
        status = None
        said = b""
        with selectors.DefaultSelector() as selector:
            for source in (self.stdout, self.stderr, self.control, self.serial):
                selector.register(source, selectors.EVENT_READ)
            while status is None or not all(output.ended for output in outputs.values()):
                # QEMU may end before its last words are read, but not without having said them.
                if all(key.fileobj is self.serial for key in selector.get_map().values()):
                    raise HostError(f"the emulated host ended early\n{self.last_words()}")
                self.kick()
                for key, _ in selector.select(self.kicks):
                    try:
                        data = key.fileobj.recv(1 << 18)
                    except ConnectionResetError:
                        # QEMU ended with a kick unread.
                        data = b""
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is self.serial:
                        self.console = (self.console + data)[-CONSOLE_KEPT:]
                    elif key.fileobj is self.control:
                        said += data
                        for line in said.split(b"\n")[:-1]:
                            if line.startswith(b"exit "):
                                status = int(line.removeprefix(b"exit "))
                    else:
                        outputs[key.fileobj].feed(data)
        return status

    def kick(self) -> None:
        """Interrupts the emulated host, at most every KICK seconds; `serve` reads what comes."""
        if time.monotonic() - self.kicked >= self.kicks:
            self.kicked = time.monotonic()
            try:
                self.control.send(b"\n", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                # Not read yet, or no longer: there is nothing to wake.
                pass

    def last_words(self) -> str:
        """What QEMU, the file servers and the kernel said last, for an error message."""
        self.logs.seek(0)
        logs = self.logs.read().decode(errors="replace").splitlines()
        console = self.console.decode(errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in [*logs[-10:], *console[-20:]] if line.strip())

    def kill(self) -> None:
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()


class Output:
    """One output stream of the command, which ends with the machine's mark instead of an end of file."""

    def __init__(self, destination: int, mark: bytes):
        self.destination = destination
        self.mark = mark
        self.held = b""
        self.ended = False

    def feed(self, data: bytes) -> None:
        """Writes all but a tail that might be the beginning of the mark."""
        data = self.held + data
        if data.endswith(self.mark):
            self.ended = True
            data, self.held = data[: -len(self.mark)], b""
        else:
            longest = min(len(data), len(self.mark) - 1)
            kept = next((size for size in range(longest, 0, -1) if data.endswith(self.mark[:size])), 0)
            data, self.held = data[: len(data) - kept], data[len(data) - kept :]
        while data:
            data = data[os.write(self.destination, data) :]


def virtiofs_device(tag: str, connection: int) -> list[str]:
    return ["-chardev", f"socket,id={tag},fd={connection}",
            "-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"]
