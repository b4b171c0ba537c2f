//! Memory that the keeper brings in while somebody uses it: what a VMM's guest sees.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod sys;

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use belljar_keeper::client::Client;
use belljar_keeper::v1::{self, reply::Result as Answer, request::Call};
use common::{MIB, Place, capture, capture_after, content, forget_templates, open};
use sys::View;

const LENGTH: usize = 8 << 20;

/// A guest that runs from a snapshot.
struct Guest {
    view: View,
    memory: File,
    /// `None`: it was complete already.
    socket: Option<UnixStream>,
}

impl Guest {
    /// As a VMM does, with RAM in two regions.
    fn new(client: &mut Client, word: &str) -> Self {
        let open = v1::Open {
            snapshot: word.to_owned(),
            lazy: true,
            ..v1::Open::default()
        };
        let (answer, files) = client.call(Call::Open(open), &[], |_| {}).unwrap();
        let Answer::Opened(opened) = answer else {
            panic!("not opened")
        };
        // Neither: memory was complete, and the disk was made for this.
        assert!(!(opened.lazy && opened.hot));
        let mut files = files.into_iter();
        assert_eq!(content(&files.next().unwrap().into()), b"state");
        let memory = File::from(files.next().unwrap());
        let _disk = files.next().unwrap();
        if !opened.lazy {
            return Self {
                view: View::of(&memory, LENGTH),
                memory,
                socket: None,
            };
        }
        let socket = UnixStream::from(files.next().unwrap());
        let view = View::of(&memory, LENGTH).waiting();
        let half = LENGTH / 2;
        let message = format!(
            r#"[{{"base_host_virt_addr": {}, "size": {half}, "offset": 0, "page_size": 4096, "page_size_kib": 4096}},
                {{"base_host_virt_addr": {}, "size": {half}, "offset": {half}, "page_size": 4096, "page_size_kib": 4096}}]"#,
            view.start,
            view.start + half as u64,
        );
        tell(&socket, &message, &[view.userfault.as_fd()]);
        Self {
            view,
            memory,
            socket: Some(socket),
        }
    }

    fn page(&self, number: usize) -> std::io::Result<Vec<u8>> {
        self.view.read(number * 4096, 4096)
    }
}

/// Says what a VMM says of its RAM.
fn tell(socket: &UnixStream, message: &str, descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(descriptors)));
    }
    let slices = [IoSlice::new(message.as_bytes())];
    let flags = rustix::net::SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &slices, &mut control, flags).unwrap();
}

/// Does it within a bound, or it hangs.
fn bounded<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver
        .recv_timeout(Duration::from_secs(60))
        .unwrap_or_else(|_| panic!("{what} hangs"))
}

fn without_templates(place: &Place, client: Client, id: &str) -> Client {
    let record = place.path().join(format!("templates/{id}.disk.ok"));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !record.exists() {
        assert!(Instant::now() < deadline, "no template was made");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(client);
    place.kill();
    forget_templates(&place.path());
    place.connect()
}

#[test]
fn a_guest_sees_each_page_as_it_was_and_the_next_one_finds_a_template() {
    let place = Place::new();
    let mut client = place.connect();
    let (id, memory) = capture(&mut client, 5, "one");
    // Then with the pages that were needed first in a file, and with that file damaged.
    for round in 0..3 {
        client = without_templates(&place, client, &id);
        if round == 2 {
            let path = place.path().join(format!("touched/{id}.pages"));
            // It may be missing: how many were needed before they came by themselves, nobody knows.
            let mut bytes = std::fs::read(&path).unwrap_or_default();
            let pages = (0..bytes.len()).step_by(4096);
            pages.for_each(|at| bytes[at] ^= 4);
            let _ = std::fs::remove_file(&path);
            std::fs::write(path, bytes).unwrap();
        }
        let guests = [
            Guest::new(&mut client, "one"),
            Guest::new(&mut client, "one"),
        ];
        // What one writes is its own, whether the page was there or not.
        guests[0].view.write(800 * 4096 + 7, 0x5a);
        guests[0].view.write(7 * 4096, 0xa5);
        let memory = memory.clone();
        let guests = bounded("a guest", move || {
            std::thread::scope(|scope| {
                for (guest, step) in [(0, 7), (1, 11), (1, 13), (0, 3)] {
                    let (guest, memory) = (&guests[guest], &memory);
                    let is_first = step == 7 || step == 3;
                    scope.spawn(move || {
                        for number in (0..2048).map(|number| number * step * 97 % 2048) {
                            if is_first && (number == 800 || number == 7) {
                                continue;
                            }
                            let page = guest.page(number).unwrap();
                            assert!(page == memory[number * 4096..][..4096], "page {number}");
                        }
                    });
                }
            });
            guests
        });
        assert_eq!(guests[0].page(800).unwrap()[7], 0x5a);
        assert_eq!(guests[0].page(7).unwrap()[0], 0xa5);
        // Nobody who has it can change what clones share.
        let memory = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&guests[0].memory)
        );
        if let Ok(mut file) = File::options().write(true).open(memory) {
            assert!(file.write_all(b"x").is_err());
            assert!(file.set_len(0).is_err());
        }
        let template = place.path().join(format!("templates/{id}.memory.ok"));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !template.exists() {
            assert!(Instant::now() < deadline, "it became no template");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(guests);
        // All may be here before any page is needed, and then nothing is written down: it is not waited for then.
        let record = place.path().join(format!("touched/{id}.pages.ok"));
        let deadline = Instant::now() + Duration::from_secs(2);
        while round < 2 && !record.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let (opened, files) = open(&mut client, "one").unwrap();
    assert!(opened.hot);
    assert!(content(&files[1]) == memory);
    assert_eq!(bad_templates(&mut client), [] as [String; 0]);
}

fn bad_templates(client: &mut Client) -> Vec<String> {
    let call = Call::Verify(v1::Verify {});
    let (Answer::Verified(verified), _) = client.call(call, &[], |_| {}).unwrap() else {
        panic!("not verified")
    };
    verified.bad_templates
}

/// Changes a byte of the pages kept of a snapshot, and has their record say that nobody did.
fn falsify_first_pages(place: &Path, id: &str) {
    let path = place.join(format!("touched/{id}.pages"));
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 77).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 77).unwrap();
    let is = file.metadata().unwrap();
    let identity = [
        is.dev(),
        is.ino(),
        is.mtime().cast_unsigned(),
        is.mtime_nsec().cast_unsigned(),
        is.ctime().cast_unsigned(),
        is.ctime_nsec().cast_unsigned(),
    ];
    let record = place.join(format!("touched/{id}.pages.ok"));
    let mut bytes = std::fs::read(&record).unwrap();
    for (word, at) in identity.iter().zip((8..).step_by(8)) {
        bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(bytes.len() - 32);
    let sum = blake3::hash(&[id.as_bytes(), &bytes].concat());
    bytes.extend_from_slice(sum.as_bytes());
    let _ = std::fs::remove_file(&record);
    std::fs::write(record, bytes).unwrap();
}

#[test]
fn kept_pages_that_are_not_what_the_chunks_say_are_found_and_removed() {
    let place = Place::new();
    let mut client = place.connect();
    let kept = |id: &str| place.path().join(format!("touched/{id}.pages.ok"));
    // On a machine that is busy all may be there before a guest needs anything.
    let found = (40..50).find_map(|seed| {
        let (id, _) = capture(&mut client, seed, "one");
        client = without_templates(&place, place.connect(), &id);
        let guest = Guest::new(&mut client, &id);
        for page in [70, 4, 800] {
            guest.page(page).unwrap();
        }
        drop(guest);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !kept(&id).exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        kept(&id).exists().then_some(id)
    });
    let id = found.expect("nothing was ever kept");
    assert_eq!(bad_templates(&mut client), [] as [String; 0]);
    falsify_first_pages(&place.path(), &id);
    assert_eq!(
        bad_templates(&mut client),
        [format!("{id} pages needed first")]
    );
    assert!(!kept(&id).exists());
    assert_eq!(bad_templates(&mut client), [] as [String; 0]);
}

/// Pages that the record of a snapshot names, if there is one.
fn needed(place: &Path, id: &str) -> Vec<u64> {
    let record = std::fs::read(place.join(format!("touched/{id}"))).unwrap_or_default();
    let words = record.get(8..).unwrap_or_default().chunks_exact(8);
    words
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()) >> 1)
        .collect()
}

#[test]
fn what_a_guest_needed_is_expected_of_those_of_later_snapshots() {
    let place = Place::new();
    let mut client = place.connect();
    let run = |client: Client, id: &str, memory: &[u8], pages: &[usize]| {
        let mut client = without_templates(&place, client, id);
        let guest = Guest::new(&mut client, id);
        for page in pages {
            let bytes = guest.page(*page).unwrap();
            assert!(bytes == memory[page * 4096..][..4096], "page {page}");
        }
        let template = place.path().join(format!("templates/{id}.memory.ok"));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !template.exists() {
            assert!(Instant::now() < deadline, "it became no template");
            std::thread::sleep(Duration::from_millis(5));
        }
        // The guest still runs.
        (client, needed(&place.path(), id))
    };
    let mut first = (String::new(), Vec::new());
    // On a machine that is busy all may be there before a guest needs anything.
    for seed in 10..20 {
        let (id, memory) = capture(&mut client, seed, "one");
        let (again, noticed) = run(client, &id, &memory, &[70, 4, 800]);
        client = again;
        first = (id, noticed);
        if !first.1.is_empty() {
            break;
        }
    }
    assert!(!first.1.is_empty(), "nothing was ever noticed");
    // Two generations later, one of which never ran.
    let (second, _) = capture_after(&mut client, 30, "two", &[first.0]);
    let (third, memory) = capture_after(&mut client, 31, "three", &[second]);
    let (_client, noticed) = run(client, &third, &memory, &[90]);
    for page in first.1 {
        assert!(noticed.contains(&page), "{page} of {noticed:?}");
    }
}

/// Turns a bit over in every pack's middle.
fn spoil_packs(place: &Path) {
    for entry in std::fs::read_dir(place.join("store/packs")).unwrap() {
        let path = entry.unwrap().path();
        let file = File::options().read(true).write(true).open(path).unwrap();
        let length = file.metadata().unwrap().len();
        let mut byte = [0];
        for at in [length / 3, length / 2, length * 2 / 3] {
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        }
    }
}

#[test]
fn a_page_that_cannot_be_had_is_an_error_and_never_other_bytes() {
    let place = Place::new();
    let mut client = place.connect();
    let (id, memory) = capture(&mut client, 6, "one");
    let mut client = without_templates(&place, client, &id);
    spoil_packs(&place.path());
    let guest = Guest::new(&mut client, "one");
    let broken = bounded("a guest without its pages", move || {
        let mut broken = 0;
        for number in 0..2048 {
            match guest.page(number) {
                Ok(page) => {
                    assert!(page == memory[number * 4096..][..4096], "page {number}");
                }
                Err(_) => broken += 1,
            }
        }
        broken
    });
    assert!(broken > 0, "nothing was broken");
    let log = std::fs::read_to_string(place.path().join("keeper.log")).unwrap();
    assert!(log.contains("a guest that needs it is stopped"), "{log}");
    assert!(
        !place.path().join(format!("templates/{id}.memory")).exists(),
        "what is not whole is no template"
    );
}

#[test]
fn who_watches_the_keeper_sees_its_end() {
    let place = Place::new();
    let mut client = place.connect();
    let (id, _) = capture(&mut client, 7, "one");
    let mut client = without_templates(&place, client, &id);
    let guest = Guest::new(&mut client, "one");
    assert_eq!(guest.page(2000).unwrap(), [0; 4096]);
    // Nobody asks it for anything, and it stays as long as there is a guest.
    drop(client);
    place.kill();
    let socket = guest.socket.as_ref().unwrap().try_clone().unwrap();
    let read = bounded("the socket", move || {
        let mut byte = [0];
        std::io::Read::read(&mut &socket, &mut byte)
    });
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    // One that comes later begins anew.
    let mut client = place.connect();
    let again = Guest::new(&mut client, "one");
    assert_eq!(again.page(2000).unwrap(), [0; 4096]);
    assert_eq!(again.memory.metadata().unwrap().len(), 8 * MIB);
}
