//! `/proc/net/tcp` and `/proc/net/tcp6` (Linux Documentation/networking/proc_net_tcp.rst).

use std::io::{self, BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Longest line; the kernel's are about 150 bytes.
const MAX_LINE: u64 = 512;

/// Listening sockets collected.
const MAX_SOCKETS: usize = 65_536;

/// State of a listening socket, `TCP_LISTEN`.
const LISTEN: u8 = 0x0a;

/// A listening socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Socket {
    pub(super) address: IpAddr,
    pub(in super::super) port: u16,
    pub(super) inode: u64,
}

/// Adds the listening sockets of a table. Lines that are none are left out: the first one is a heading.
/// The kernel tells listening sockets before all others, so reading ends with them.
pub(super) fn listening(table: impl Read, into: &mut Vec<Socket>) -> io::Result<()> {
    let mut table = BufReader::with_capacity(4096, table);
    let mut line = Vec::new();
    loop {
        line.clear();
        if table.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        match parse(&line) {
            Some((socket, LISTEN)) => into.push(socket),
            Some(_) => return Ok(()),
            None => {}
        }
        if into.len() >= MAX_SOCKETS {
            return Ok(());
        }
    }
}

/// `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …`
fn parse(line: &[u8]) -> Option<(Socket, u8)> {
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let local = fields.nth(1)?;
    let state = u8::from_str_radix(fields.nth(1)?, 16).ok()?;
    let inode = fields.nth(5)?.parse().ok()?;
    let (address, port) = local.split_once(':')?;
    let socket = Socket {
        address: parse_address(address)?,
        port: u16::from_str_radix(port, 16).ok()?,
        inode,
    };
    Some((socket, state))
}

/// Words of 32 bits in this machine's byte order, each of which holds bytes in the network's.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let start = index.checked_mul(8)?;
        let digits = text.get(start..start.checked_add(8)?)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (index, place) in bytes.chunks_exact_mut(4).enumerate() {
                place.copy_from_slice(&word(index)?);
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    fn parsed(table: &str) -> Vec<Socket> {
        let mut sockets = Vec::new();
        listening(table.as_bytes(), &mut sockets).unwrap();
        sockets
    }

    #[test]
    fn listening_sockets_are_found_and_others_left_out() {
        let table = format!(
            "{HEAD}   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1234 1 0 100 0 0 10 0\n   \
             1: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 99 1 0 20 4 30 10 -1\n"
        );
        let socket = Socket {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 8080,
            inode: 1234,
        };
        assert_eq!(parsed(&table), [socket]);
        let six = format!(
            "{HEAD}   0: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 7 1\n"
        );
        let socket = Socket {
            address: Ipv6Addr::LOCALHOST.into(),
            port: 22,
            inode: 7,
        };
        assert_eq!(parsed(&six), [socket]);
    }

    proptest! {
        #[test]
        fn what_the_kernel_writes_is_read_back(address: [u8; 4], port: u16, inode: u64) {
            let word = u32::from_ne_bytes(address);
            let line = format!("{HEAD}1: {word:08X}:{port:04X} 00000000:0000 0A 0:0 0:0 0 0 0 {inode} 1\n");
            let socket = Socket { address: Ipv4Addr::from(address).into(), port, inode };
            prop_assert_eq!(parsed(&line), vec![socket]);
        }

        #[test]
        fn no_bytes_make_it_panic(table: Vec<u8>) {
            let mut sockets = Vec::new();
            let _ = listening(table.as_slice(), &mut sockets);
        }

        #[test]
        fn nothing_close_to_a_line_makes_it_panic(line in "[0-9a-fA-F]{1,3}: [0-9A-Fa-fé:]{0,40} [0-9:]{0,9} 0A( [0-9:]{0,3}){0,9}\n") {
            parsed(&line);
        }
    }
}
