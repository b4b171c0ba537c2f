"""A page-fault handler for `mem_backend` "Uffd" (docs/api.md), as small as one can be: for tests.

    page_handler.py SOCKET MEMORY_FILE [--poison OFFSET] [--mute OFFSET] [--fill TEMPLATE]

Says "ready" when it listens, and serves one VMM. Pages come from MEMORY_FILE, 64 KiB at a time. --poison: the
page at OFFSET is given as broken, when it is needed or at SIGUSR1; then it says "poisoned". --mute: that one never comes. --fill: they are written to TEMPLATE, which
RAM is a private view of.
"""
import argparse
import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct

UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
UFFDIO_POISON = 0xC020AA08
EVENT_PAGEFAULT, EVENT_REMOVE = 0x12, 0x15
EEXIST, EAGAIN, ENOENT = 17, 11, 2
PAGE, CHUNK = 4096, 64 << 10

parser = argparse.ArgumentParser()
parser.add_argument("socket")
parser.add_argument("memory")
parser.add_argument("--poison", type=int)
parser.add_argument("--mute", type=int)
parser.add_argument("--fill")
args = parser.parse_args()

file = open(args.memory, "rb")
memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
template = args.fill and open(args.fill, "r+b", buffering=0)

listener = socket.socket(socket.AF_UNIX)
listener.bind(args.socket)
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
message, descriptors, _, _ = socket.recv_fds(connection, 65536, 1)
if not message:
    raise SystemExit("the VMM has refused the load")
regions = json.loads(message)
(faults,) = descriptors
print(json.dumps(regions), flush=True)
removed = []


def call(number, *fields):
    """Returns whether it worked; that a page is there already counts."""
    while True:
        try:
            fcntl.ioctl(faults, number, struct.pack(f"{len(fields)}q", *fields))
            return True
        except OSError as error:
            if error.errno == EEXIST:
                return False
            if error.errno != EAGAIN:
                raise
            # A removal must be read first.
            read_events()


def give(at):
    region = next(r for r in regions if 0 <= at - r["base_host_virt_addr"] < r["size"])
    start = region["base_host_virt_addr"]
    page = at & ~(PAGE - 1)
    offset = page - start + region["offset"]
    if any(page in gone for gone in removed):
        if not call(UFFDIO_ZEROPAGE, page, PAGE, 0, 0):
            call(UFFDIO_WAKE, page, PAGE)
        return
    if offset == args.mute:
        return
    if offset == args.poison:
        call(UFFDIO_POISON, page, PAGE, 0, 0)
        return
    special = args.mute is not None or args.poison is not None or removed
    first = offset if special else offset & ~(CHUNK - 1)
    len_ = min(PAGE if special else CHUNK, region["offset"] + region["size"] - first)
    host = start + first - region["offset"]
    if template:
        os.pwrite(template.fileno(), memory[first : first + len_], first)
        call(UFFDIO_WAKE, host, len_)
    elif not call(UFFDIO_COPY, host, address + first, len_, 0, 0):
        # Some of it is there: page by page.
        for at in range(0, len_, PAGE):
            if not call(UFFDIO_COPY, host + at, address + first + at, PAGE, 0, 0):
                call(UFFDIO_WAKE, host + at, PAGE)


def poison_now(*_):
    region = next(r for r in regions if 0 <= args.poison - r["offset"] < r["size"])
    page = region["base_host_virt_addr"] + args.poison - region["offset"]
    call(UFFDIO_POISON, page, PAGE, 0, 0)
    print("poisoned", flush=True)


signal.signal(signal.SIGUSR1, poison_now)
waiting = []


def read_events():
    try:
        data = os.read(faults, 32 * 64)
    except BlockingIOError:
        return
    for at in range(0, len(data), 32):
        # struct uffd_msg: the event, then flags and address of a fault, or start and end of a removal.
        event, first, second = struct.unpack_from("<B7xQQ", data, at)
        if event == EVENT_REMOVE:
            removed.append(range(first, second))
        elif event == EVENT_PAGEFAULT:
            waiting.append(second)


while True:
    select.select([faults], [], [])
    read_events()
    while waiting:
        give(waiting.pop(0))
