//! What a connection has to write: encoded into a buffer of the thread, kept by the connection only where the peer is
//! slower than we are.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

/// Payloads of this size and above are not copied but written from where they are.
pub(super) const LEAVE_OUT_FROM: usize = 8 * 1024;

/// How many pieces are handed to the system in one write.
const MAX_SLICES: usize = 32;

/// A buffer larger than this after a burst is given back.
const KEPT_BYTES: usize = 256 * 1024;

/// Encoded packets, with large payloads left where they are.
#[derive(Default)]
pub(super) struct Output {
    pub bytes: Vec<u8>,
    /// Payloads, each with the length of `bytes` before it.
    payloads: Vec<(usize, Bytes)>,
    payload_bytes: usize,
}

impl Output {
    pub fn len(&self) -> usize {
        self.bytes.len() + self.payload_bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Puts `payload` behind what has been encoded so far.
    pub fn attach(&mut self, payload: Bytes) {
        self.payload_bytes += payload.len();
        self.payloads.push((self.bytes.len(), payload));
    }

    /// Empties the buffer, which stays allocated.
    fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_BYTES);
        self.payloads.clear();
        self.payload_bytes = 0;
    }
}

/// What could not be written yet.
#[derive(Default)]
pub(super) struct Unwritten {
    chunks: VecDeque<Bytes>,
    bytes: usize,
    /// The stream holds bytes of its own that have to be flushed.
    needs_flush: bool,
}

impl Unwritten {
    /// Whether everything is on its way.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty() && !self.needs_flush
    }

    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Writes `output` as far as the stream takes it, keeps the rest, and empties `output`.
    pub fn send<S: AsyncWrite + Unpin>(
        &mut self,
        output: &mut Output,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> io::Result<()> {
        let mut written = 0;
        if self.is_empty() && output.payloads.is_empty() {
            while written < output.bytes.len() {
                match Pin::new(&mut *stream).poll_write(cx, &output.bytes[written..]) {
                    Poll::Ready(count) => written += more_than_none(count?)?,
                    Poll::Pending => break,
                }
            }
            self.needs_flush = true;
        }
        self.keep(output, written);
        let _ = self.poll(stream, cx)?;
        Ok(())
    }

    /// Takes over what of `output` is not among the first `written` bytes, which hold no payload.
    pub fn keep(&mut self, output: &mut Output, mut written: usize) {
        for (before, payload) in output.payloads.drain(..) {
            if before > written {
                self.push(Bytes::copy_from_slice(&output.bytes[written..before]));
                written = before;
            }
            self.push(payload);
        }
        if output.bytes.len() > written {
            self.push(Bytes::copy_from_slice(&output.bytes[written..]));
        }
        output.clear();
    }

    fn push(&mut self, chunk: Bytes) {
        self.bytes += chunk.len();
        self.chunks.push_back(chunk);
    }

    /// Writes what is left; ready when that is nothing.
    pub fn poll<S: AsyncWrite + Unpin>(&mut self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.chunks.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = self.chunks.len().min(MAX_SLICES);
            for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
                *slice = IoSlice::new(chunk);
            }
            match Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..count]) {
                Poll::Ready(written) => self.advance(more_than_none(written?)?),
                Poll::Pending => return Poll::Pending,
            }
            self.needs_flush = true;
        }
        if self.chunks.capacity() > 0 {
            self.chunks = VecDeque::new();
        }
        if self.needs_flush {
            match Pin::new(stream).poll_flush(cx) {
                Poll::Ready(flushed) => flushed?,
                Poll::Pending => return Poll::Pending,
            }
            self.needs_flush = false;
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(chunk) = self.chunks.front_mut() {
            if chunk.len() > written {
                chunk.advance(written);
                return;
            }
            written -= chunk.len();
            self.chunks.pop_front();
        }
    }
}

/// A stream that takes nothing will never take anything.
fn more_than_none(count: usize) -> io::Result<usize> {
    if count == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(count) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn what_a_slow_peer_does_not_take_is_kept_in_order() {
        let (mut near, mut far) = tokio::io::duplex(10);
        let mut output = Output::default();
        let mut unwritten = Unwritten::default();
        let mut expected = Vec::new();
        for round in 0..20_u8 {
            output.bytes.extend([round; 7]);
            expected.extend([round; 7]);
            if round % 3 == 0 {
                output.attach(Bytes::from(vec![round + 100; 5]));
                expected.extend([round + 100; 5]);
                output.bytes.extend([round; 2]);
                expected.extend([round; 2]);
            }
            poll_fn(|cx| Poll::Ready(unwritten.send(&mut output, &mut near, cx))).await.unwrap();
            assert_eq!(output.len(), 0);
        }
        assert_eq!(unwritten.len(), expected.len() - 10);
        let mut got = vec![0; expected.len()];
        let read = far.read_exact(&mut got);
        let write = poll_fn(|cx| unwritten.poll(&mut near, cx));
        let (read, write) = tokio::join!(read, write);
        read.unwrap();
        write.unwrap();
        assert_eq!(got, expected);
        assert_eq!(unwritten.len(), 0);
    }
}
