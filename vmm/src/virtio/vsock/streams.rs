//! The host's ends of connections.
use std::io;

use rustix::event::epoll::{self, EventFlags};

use super::connection::{Connection, Event};
use super::host::{Host, Token};
use super::muxer::{Id, Muxer};
use crate::backend::unix::{IoVecs, Stream};

/// The host's end of a connection.
#[derive(Debug)]
pub(super) struct Endpoint {
    generation: u32,
    pub(super) stream: Stream,
    /// In the epoll instance, and with which interest in room to write.
    polled: Option<bool>,
    /// The peer announced the end of its stream; it closed altogether.
    ending: bool,
    gone: bool,
    told_end: bool,
    told_stop: bool,
    /// What came behind the `CONNECT` line.
    pub(super) early: Vec<u8>,
    /// How many receive buffers the next read is worth.
    batch: usize,
}

impl Endpoint {
    pub(super) fn new(id: Id, stream: Stream, early: Vec<u8>) -> Self {
        Self {
            generation: id.generation,
            stream,
            polled: None,
            ending: false,
            gone: false,
            told_end: false,
            told_stop: false,
            early,
            batch: 1,
        }
    }
}

impl Host {
    /// Something happened on the socket of `id`.
    pub(super) fn stream_ready(&mut self, id: Id, flags: EventFlags, muxer: &mut Muxer) {
        let Some(endpoint) = self.endpoint(id) else {
            return;
        };
        let closed = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        endpoint.gone |= closed;
        endpoint.ending |= closed || flags.contains(EventFlags::RDHUP);
        if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            self.flush(id, muxer);
        }
        let wanted = muxer.get(id).is_some_and(Connection::takes_from_host);
        if wanted {
            muxer.set_readable(id, true);
        } else if closed {
            // Nobody will read it to its end.
            muxer.apply(id, Event::HostGone, self.now());
        }
        self.settle(id, muxer);
    }

    /// Writes the backlog as far as it goes.
    fn flush(&mut self, id: Id, muxer: &mut Muxer) {
        while let Some(connection) = muxer.get(id) {
            let (front, _) = connection.backlog().as_slices();
            if front.is_empty() {
                return;
            }
            let Some(endpoint) = self.endpoint(id) else {
                return;
            };
            match endpoint.stream.send(front) {
                Ok(sent) => muxer.backlog_forwarded(id, sent),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    muxer.apply(id, Event::HostRefused, self.now());
                    return;
                }
            }
        }
    }

    /// Writes payload to the socket of `id`.
    pub(super) fn send(&mut self, id: Id, data: &IoVecs<'_>) -> io::Result<usize> {
        match self.endpoint(id) {
            Some(endpoint) => endpoint.stream.send_vectored(data),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Reads the socket of `id`.
    pub(super) fn recv(&mut self, id: Id, data: &IoVecs<'_>) -> io::Result<usize> {
        match self.endpoint(id) {
            Some(endpoint) => endpoint.stream.recv_vectored(data),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// What came behind the `CONNECT` line, once.
    pub(super) fn take_early(&mut self, id: Id) -> Vec<u8> {
        self.endpoint(id)
            .map(|endpoint| std::mem::take(&mut endpoint.early))
            .unwrap_or_default()
    }

    /// Keeps what did not fit the guest's buffer.
    pub(super) fn keep_early(&mut self, id: Id, rest: Vec<u8>) {
        if let Some(endpoint) = self.endpoint(id) {
            endpoint.early = rest;
        }
    }

    /// Whether the end of the stream was announced.
    pub(super) fn is_ending(&mut self, id: Id) -> bool {
        self.endpoint(id).is_some_and(|endpoint| endpoint.ending)
    }

    /// What reading the end of the stream means.
    pub(super) fn end_of_stream(&mut self, id: Id) -> Event {
        match self.endpoint(id) {
            Some(endpoint) if endpoint.gone => Event::HostGone,
            _ => Event::HostEnded,
        }
    }

    pub(super) fn batch(&mut self, id: Id) -> usize {
        self.endpoint(id).map_or(1, |endpoint| endpoint.batch)
    }

    pub(super) fn set_batch(&mut self, id: Id, batch: usize) {
        if let Some(endpoint) = self.endpoint(id) {
            endpoint.batch = batch;
        }
    }

    /// Brings the socket in line with the connection: ends passed on, interest in room to write
    /// only while something waits for it, closed when all is over.
    pub(super) fn settle(&mut self, id: Id, muxer: &mut Muxer) {
        let Some(connection) = muxer.get(id) else {
            return;
        };
        if connection.is_over() {
            self.take_endpoint(id);
            muxer.remove(id);
            return;
        }
        let end = connection.host_should_see_end();
        let stop = connection.host_should_stop();
        let waiting = !connection.backlog().is_empty();
        let Some(endpoint) = self.endpoint(id) else {
            return;
        };
        if end && !endpoint.told_end {
            endpoint.told_end = true;
            endpoint.stream.finish_sending();
        }
        if stop && !endpoint.told_stop {
            endpoint.told_stop = true;
            endpoint.stream.stop_receiving();
        }
        let polled = endpoint.polled;
        if polled.is_some_and(|writing| writing != waiting) && self.poll(id, waiting).is_err() {
            muxer.apply(id, Event::HostGone, self.now());
            // Over now, or soon: nothing is left to poll for.
            if muxer.get(id).is_some_and(Connection::is_over) {
                self.take_endpoint(id);
                muxer.remove(id);
            }
        }
    }

    /// Puts the socket of `id` into the epoll instance, or changes its interest in room to write.
    pub(super) fn poll(&mut self, id: Id, writing: bool) -> io::Result<()> {
        let mut flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        flags.set(EventFlags::OUT, writing);
        let data = Token::Stream(id).pack();
        let slot = self.endpoints.get_mut(id.index as usize);
        let Some(endpoint) = slot.and_then(Option::as_mut) else {
            return Ok(());
        };
        if endpoint.polled.is_some() {
            epoll::modify(&self.epoll, &endpoint.stream, data, flags)?;
        } else {
            epoll::add(&self.epoll, &endpoint.stream, data, flags)?;
        }
        endpoint.polled = Some(writing);
        Ok(())
    }

    pub(super) fn endpoint(&mut self, id: Id) -> Option<&mut Endpoint> {
        self.endpoints
            .get_mut(id.index as usize)?
            .as_mut()
            .filter(|endpoint| endpoint.generation == id.generation)
    }

    fn take_endpoint(&mut self, id: Id) {
        if self.endpoint(id).is_some()
            && let Some(slot) = self.endpoints.get_mut(id.index as usize)
        {
            // Closing takes it out of the epoll instance.
            *slot = None;
        }
    }

    pub(super) fn place(&mut self, id: Id, endpoint: Endpoint) {
        let index = id.index as usize;
        if index >= self.endpoints.len() {
            self.endpoints.resize_with(index + 1, || None);
        }
        if let Some(slot) = self.endpoints.get_mut(index) {
            *slot = Some(endpoint);
        }
    }
}
