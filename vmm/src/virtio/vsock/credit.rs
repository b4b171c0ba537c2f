//! Flow control of one connection (virtio 1.2 §5.10.6.3): all counters run modulo 2^32.

/// Receive buffer we give each connection, in bytes: what the guest may have sent that the
/// host's socket has not taken yet. Linux's own default for a vsock socket.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// The guest sent more than the buffer it was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("more data than credit")]
pub struct Overrun;

/// Both directions' counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Received from the guest; taken by the host's socket; what the guest knows of that.
    rx_cnt: u32,
    fwd_cnt: u32,
    told_fwd_cnt: u32,
    /// Sent to the guest; the guest's last believable report.
    tx_cnt: u32,
    peer_fwd_cnt: u32,
    peer_buf_alloc: u32,
}

impl Credit {
    /// Takes the counters of a packet from the guest.
    ///
    /// A `fwd_cnt` older than the last one, or beyond what was sent, is ignored: honest guests
    /// reorder packets of two threads, and a liar gains nothing.
    pub fn peer_report(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        if self.tx_cnt.wrapping_sub(fwd_cnt) <= self.in_flight() {
            self.peer_fwd_cnt = fwd_cnt;
        }
    }

    /// Bytes the guest can take now.
    pub fn peer_free(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.in_flight())
    }

    /// `len` bytes, at most [`Credit::peer_free`], went to the guest in packets that carry our
    /// counters.
    pub fn sent(&mut self, len: u32) {
        self.tx_cnt = self.tx_cnt.wrapping_add(len);
    }

    /// `len` bytes came from the guest.
    pub fn received(&mut self, len: u32) -> Result<(), Overrun> {
        if len > BUF_ALLOC.saturating_sub(self.rx_cnt.wrapping_sub(self.fwd_cnt)) {
            return Err(Overrun);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(len);
        Ok(())
    }

    /// `len` bytes left the buffer.
    pub fn forwarded(&mut self, len: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
    }

    /// Our `fwd_cnt` goes to the guest in some packet.
    pub fn tell(&mut self) -> u32 {
        self.told_fwd_cnt = self.fwd_cnt;
        self.fwd_cnt
    }

    /// Whether a packet should be spent to tell the guest of free room. At half the buffer no
    /// sender ever waits for news that is not on its way: with no credit left it has sent a
    /// whole buffer since the last one.
    pub fn should_tell(&self) -> bool {
        self.fwd_cnt.wrapping_sub(self.told_fwd_cnt) >= BUF_ALLOC / 2
    }

    fn in_flight(&self) -> u32 {
        self.tx_cnt.wrapping_sub(self.peer_fwd_cnt)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn credit_counts_across_the_wrap() {
        let start = u32::MAX - 5;
        let mut credit = Credit {
            tx_cnt: start,
            peer_fwd_cnt: start,
            peer_buf_alloc: 100,
            ..Credit::default()
        };
        credit.sent(60);
        assert_eq!(credit.peer_free(), 40);
        credit.peer_report(100, start.wrapping_add(50));
        assert_eq!(credit.peer_free(), 90);
    }

    #[test]
    fn stale_and_impossible_counters_are_ignored() {
        let mut credit = Credit::default();
        credit.peer_report(100, 0);
        credit.sent(80);
        credit.peer_report(100, 70);
        credit.peer_report(100, 30);
        assert_eq!(credit.peer_free(), 90);
        credit.peer_report(100, 81);
        assert_eq!(credit.peer_free(), 90);
        credit.peer_report(5, 70);
        assert_eq!(
            credit.peer_free(),
            0,
            "the buffer shrank below what is in flight"
        );
    }

    #[test]
    fn more_than_the_buffer_is_an_overrun() {
        let mut credit = Credit::default();
        assert_eq!(credit.received(BUF_ALLOC), Ok(()));
        assert_eq!(credit.received(1), Err(Overrun));
        credit.forwarded(1);
        assert_eq!(credit.received(1), Ok(()));
        assert_eq!(credit.received(u32::MAX), Err(Overrun));
    }

    proptest! {
        /// Whatever a guest reports, what is in flight never exceeds the largest buffer it
        /// offered, and our own buffer never holds more than BUF_ALLOC.
        #[test]
        fn credit_stays_in_bounds(start in any::<u32>(), reports in proptest::collection::vec(
            (any::<u16>(), any::<u32>(), any::<u32>()), 1..100)) {
            let mut credit = Credit {
                tx_cnt: start, peer_fwd_cnt: start, rx_cnt: start, fwd_cnt: start,
                told_fwd_cnt: start, ..Credit::default()
            };
            let mut held: u32 = 0;
            for (buf_alloc, fwd_cnt, len) in reports {
                credit.peer_report(u32::from(buf_alloc), fwd_cnt);
                let send = len % (credit.peer_free() + 1);
                credit.sent(send);
                prop_assert!(credit.in_flight() <= u32::from(u16::MAX));
                if credit.received(len % (BUF_ALLOC * 2)).is_ok() {
                    held += len % (BUF_ALLOC * 2);
                }
                prop_assert!(held <= BUF_ALLOC);
                let forward = fwd_cnt % (held + 1);
                credit.forwarded(forward);
                held -= forward;
            }
        }
    }
}
