//! Tests of one connection, with a clock that is only counted up.
use proptest::prelude::*;

use super::*;

const GET: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn fresh(now: Instant) -> Connection {
    Connection::new(now, http::MAX_BODY)
}

fn take(c: &mut Connection, bytes: &[u8], call: CallId, now: Instant) -> bool {
    c.received(bytes, Vec::new(), false, now);
    c.next_call(call, now).is_ok_and(|call| call.is_some())
}

fn text(c: &Connection) -> String {
    String::from_utf8_lossy(c.unsent()).into_owned()
}

fn send_all(c: &mut Connection, now: Instant) {
    c.sent(c.unsent().len(), now);
}

#[test]
fn half_a_request_has_ten_seconds() {
    let start = Instant::now();
    let mut c = fresh(start);
    assert!(!take(&mut c, &GET[..5], 1, start));
    assert_eq!(c.deadline(), Some(start + HALF_REQUEST));
    // More bytes do not win time.
    assert!(!take(&mut c, &GET[5..6], 1, start + secs(9)));
    c.tick(start + secs(9));
    assert!(c.unsent().is_empty());
    c.tick(start + secs(10));
    assert!(text(&c).contains("400") && text(&c).contains("not complete"));
    send_all(&mut c, start + secs(10));
    assert!(!c.is_over(start + secs(10)));
    assert!(c.is_over(start + secs(11)));
}

#[test]
fn an_idle_connection_stays() {
    let start = Instant::now();
    let mut c = fresh(start);
    c.tick(start + secs(100_000));
    assert!(!c.is_over(start + secs(100_000)));
    assert_eq!(c.deadline(), None);
}

#[test]
fn an_answer_that_is_not_taken_ends_the_connection() {
    let start = Instant::now();
    let mut c = fresh(start);
    assert!(take(&mut c, GET, 1, start));
    assert!(c.answer(1, &Ok(Body::Empty), start));
    assert_eq!(c.room(), 0, "nothing is read while an answer waits");
    c.sent(3, start + secs(1));
    c.tick(start + secs(9));
    assert!(!c.is_over(start + secs(9)));
    c.tick(start + secs(10));
    assert!(c.is_over(start + secs(10)));
}

#[test]
fn only_the_right_answer_is_taken() {
    let start = Instant::now();
    let mut c = fresh(start);
    assert!(!c.answer(1, &Ok(Body::Empty), start));
    assert!(take(&mut c, GET, 7, start));
    assert_eq!(c.room(), 0);
    assert_eq!(c.idle_since(), None);
    assert!(!c.answer(6, &Ok(Body::Empty), start));
    assert!(c.answer(7, &Ok(Body::Empty), start));
    assert!(!c.answer(7, &Ok(Body::Empty), start));
    send_all(&mut c, start);
    assert!(take(&mut c, GET, 8, start));
}

#[test]
fn the_next_request_waits_for_the_answer_to_the_last() {
    let start = Instant::now();
    let mut c = fresh(start);
    assert!(take(&mut c, &[GET, GET].concat(), 1, start));
    assert!(matches!(c.next_call(2, start), Ok(None)));
    c.answer(1, &Ok(Body::Empty), start);
    assert!(matches!(c.next_call(2, start), Ok(None)));
    send_all(&mut c, start);
    assert!(matches!(c.next_call(2, start), Ok(Some(_))));
}

#[test]
fn connection_close_is_heeded() {
    let start = Instant::now();
    let mut c = fresh(start);
    assert!(take(
        &mut c,
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        1,
        start
    ));
    c.answer(1, &Ok(Body::Json("{}".into())), start);
    assert!(text(&c).contains("Connection: close"));
    assert!(!c.is_over(start));
    send_all(&mut c, start);
    c.end_of_input(start);
    assert!(c.is_over(start));
}

#[test]
fn a_client_that_says_goodbye_is_let_go() {
    let start = Instant::now();
    for bytes in [&b""[..], &GET[..7]] {
        let mut c = fresh(start);
        assert!(!take(&mut c, bytes, 1, start));
        c.end_of_input(start);
        assert!(c.is_over(start));
    }
    // With half a request behind a whole one, too.
    let mut c = fresh(start);
    assert!(take(&mut c, &[GET, &GET[..7]].concat(), 1, start));
    c.end_of_input(start);
    c.answer(1, &Ok(Body::Empty), start);
    assert!(!c.is_over(start));
    send_all(&mut c, start);
    assert!(matches!(c.next_call(2, start), Ok(None)));
    assert!(c.is_over(start));
}

proptest! {
    /// Any bytes in any pieces, with answers or without: memory stays bounded, and the
    /// connection either wants input, has output, waits for an answer, or is over.
    #[test]
    fn never_stuck_and_never_growing(
        pieces in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..64),
                Just(GET.to_vec()),
                Just(b"PUT /vsock HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}".to_vec()),
                Just(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n".to_vec()),
            ],
            0..40,
        ),
        answers in any::<bool>(),
    ) {
        let start = Instant::now();
        let mut c = Connection::new(start, 64);
        let mut call = 0;
        for piece in pieces {
            let piece = &piece[..piece.len().min(c.room())];
            c.received(piece, Vec::new(), false, start);
            loop {
                call += 1;
                let got = c.next_call(call, start);
                if answers && matches!(got, Ok(Some(_))) {
                    prop_assert!(c.answer(call, &Ok(Body::Empty), start));
                }
                if c.unsent().is_empty() {
                    break;
                }
                send_all(&mut c, start);
            }
            prop_assert!(c.input.len() <= MAX_HEAD + 64);
            prop_assert!(c.room() > 0 || c.waits());
        }
        c.end_of_input(start);
        prop_assert!(c.is_over(start) || c.waits());
    }
}

impl Connection {
    fn waits(&self) -> bool {
        matches!(self.state, State::Waiting { .. })
    }
}
