//! The transport below tokio-modbus: lets through the answer that is awaited and nothing else.
//!
//! A late answer to a request that was given up must not be taken for the answer to the next one. Over TCP the
//! transaction identifier tells them apart (Modbus Messaging on TCP/IP V1.0b §4.2). RTU has none: what arrived before a
//! request is thrown away when it is sent, and afterwards only a frame of the awaited unit, function, length and CRC
//! counts (Modbus over Serial Line V1.02 §2.5.1). Bytes of the peer never panic, and at most [`MAX_HELD_BYTES`] are held.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Above the largest frame of either framing, 260 bytes, with room for noise before it.
const MAX_HELD_BYTES: usize = 1024;
/// How much of a babbling line is thrown away before a request is sent anyway.
const MAX_DISCARDED_BEFORE_REQUEST: usize = 8 * 1024;
/// Transaction identifier, protocol identifier and length.
const MBAP_HEADER_BYTES: usize = 6;
/// Unit id and PDU of at most 253 bytes.
const MAX_MBAP_LENGTH: usize = 254;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Tcp,
    Rtu,
}

/// What the owner of a connection may look at while tokio-modbus holds the transport.
#[derive(Debug, Default)]
pub(super) struct WireState {
    /// Bytes that belonged to no awaited answer.
    discarded: AtomicU64,
    /// Whether anything arrived since the last request was sent.
    heard: AtomicBool,
    /// Whether a request is written in part.
    sending: AtomicBool,
}

impl WireState {
    pub fn take_discarded(&self) -> u64 {
        self.discarded.swap(0, Ordering::Relaxed)
    }

    pub fn has_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    pub fn is_sending(&self) -> bool {
        self.sending.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
pub(super) struct Wire<T> {
    io: T,
    framing: Framing,
    state: Arc<WireState>,
    /// The request being sent, or sent last.
    request: Vec<u8>,
    /// Received and not yet looked through.
    received: Vec<u8>,
    /// Of the awaited answer, not yet read.
    answer: Vec<u8>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Wire<T> {
    pub fn new(io: T, framing: Framing) -> (Self, Arc<WireState>) {
        let state = Arc::new(WireState::default());
        let wire =
            Self { io, framing, state: state.clone(), request: Vec::new(), received: Vec::new(), answer: Vec::new() };
        (wire, state)
    }

    /// Takes in what arrived before a request, so that nothing of it is taken for its answer.
    ///
    /// # Errors
    /// `NotConnected` when the peer is gone already: nothing of the request was sent.
    fn clear_line(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let mut cleared = 0;
        while cleared < MAX_DISCARDED_BEFORE_REQUEST {
            match self.poll_fill(cx) {
                Poll::Pending => break,
                Poll::Ready(Ok(0)) => return Err(io::Error::new(io::ErrorKind::NotConnected, "the peer had hung up")),
                Poll::Ready(Ok(count)) => cleared += count,
                Poll::Ready(Err(error)) => return Err(io::Error::new(io::ErrorKind::NotConnected, error)),
            }
            // Whole frames only: the rest of one that is still arriving must be recognized as its rest.
            match self.framing {
                Framing::Tcp => self.look_through()?,
                Framing::Rtu => self.discard(self.received.len()),
            }
        }
        self.state.discarded.fetch_add(self.answer.len() as u64, Ordering::Relaxed);
        self.answer.clear();
        if self.framing == Framing::Rtu {
            self.discard(self.received.len());
        }
        Ok(())
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut bytes = [0; 512];
        let mut buffer = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
        self.received.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Moves the awaited answer from what was received to `answer`, and throws away what cannot be part of it.
    fn look_through(&mut self) -> io::Result<()> {
        match self.framing {
            Framing::Tcp => self.look_for_transaction(),
            Framing::Rtu => {
                self.look_for_frame();
                Ok(())
            }
        }
    }

    fn look_for_transaction(&mut self) -> io::Result<()> {
        while let Some(header) = self.received.first_chunk::<MBAP_HEADER_BYTES>() {
            let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
            if header[2..4] != [0, 0] || !(2..=MAX_MBAP_LENGTH).contains(&length) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak Modbus TCP"));
            }
            let is_awaited = self.answer.is_empty() && self.request.starts_with(&header[..2]);
            let frame = MBAP_HEADER_BYTES + length;
            if self.received.len() < frame {
                return Ok(());
            }
            if is_awaited {
                self.answer.extend(self.received.drain(..frame));
            } else {
                self.discard(frame);
            }
        }
        Ok(())
    }

    fn look_for_frame(&mut self) {
        let Some(awaited) = AwaitedRtu::of(&self.request) else {
            self.discard(self.received.len());
            return;
        };
        let mut skipped = 0;
        while skipped < self.received.len() {
            match awaited.find(&self.received[skipped..]) {
                Found::Frame(length) => {
                    self.discard(skipped);
                    self.answer.extend(self.received.drain(..length));
                    // One answer to one request: what follows is no part of it.
                    self.discard(self.received.len());
                    return;
                }
                Found::Beginning => break,
                Found::Nothing => skipped += 1,
            }
        }
        self.discard(skipped);
    }

    fn discard(&mut self, count: usize) {
        self.state.discarded.fetch_add(count as u64, Ordering::Relaxed);
        self.received.drain(..count.min(self.received.len()));
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if !this.state.is_sending() {
            this.clear_line(cx)?;
            this.request.clear();
            this.state.heard.store(false, Ordering::Relaxed);
        }
        let count = ready!(Pin::new(&mut this.io).poll_write(cx, bytes))?;
        this.state.sending.store(true, Ordering::Relaxed);
        this.request.extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    /// tokio-modbus flushes once a request is written whole.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.state.sending.store(false, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for Wire<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.answer.is_empty() {
                let count = this.answer.len().min(buffer.remaining());
                buffer.put_slice(&this.answer[..count]);
                this.answer.drain(..count);
                return Poll::Ready(Ok(()));
            }
            if ready!(this.poll_fill(cx))? == 0 {
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer hung up")));
            }
            this.state.heard.store(true, Ordering::Relaxed);
            this.look_through()?;
            debug_assert!(this.received.len() <= MAX_HELD_BYTES);
        }
    }
}

/// The answer that a request on a serial line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct AwaitedRtu {
    unit: u8,
    function: u8,
    /// Of the whole frame, with unit id and CRC.
    length: usize,
}

enum Found {
    /// A whole frame of that many bytes.
    Frame(usize),
    /// The bytes may become one.
    Beginning,
    Nothing,
}

impl AwaitedRtu {
    /// `None` for a request that this gateway does not send.
    fn of(request: &[u8]) -> Option<Self> {
        let [unit, function, _, _, high, low, ..] = *request else {
            return None;
        };
        let quantity = usize::from(u16::from_be_bytes([high, low]));
        let length = match function {
            1 | 2 => 5 + quantity.div_ceil(8),
            3 | 4 => 5 + quantity * 2,
            5 | 6 | 15 | 16 => 8,
            _ => return None,
        };
        Some(Self { unit, function, length })
    }

    fn find(self, bytes: &[u8]) -> Found {
        let length = match *bytes {
            [unit, ..] if unit != self.unit => return Found::Nothing,
            [_] => return Found::Beginning,
            [_, function, ..] if function == self.function | 0x80 => 5,
            [_, function, ..] if function != self.function => return Found::Nothing,
            [_, 1..=4, count, ..] if usize::from(count) + 5 != self.length => return Found::Nothing,
            _ => self.length,
        };
        match bytes.get(..length) {
            None => Found::Beginning,
            // The CRC of a frame that ends with its own CRC is 0.
            Some(frame) if crc(frame) == 0 => Found::Frame(length),
            Some(_) => Found::Nothing,
        }
    }
}

/// CRC-16/MODBUS (Modbus over Serial Line V1.02 §2.5.1.2).
fn crc(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0xffff, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xa001 } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    /// Unit 1, read 2 holding registers from 0x082b on.
    const RTU_REQUEST: &[u8] = &[0x01, 0x03, 0x08, 0x2b, 0x00, 0x02, 0xb6, 0x63];
    const RTU_ANSWER: &[u8] = &[0x01, 0x03, 0x04, 0x00, 0x20, 0x00, 0x00, 0xfb, 0xf9];
    const RTU_EXCEPTION: &[u8] = &[0x01, 0x83, 0x02, 0xc0, 0xf1];
    /// The same from unit 2.
    const RTU_OTHER_UNIT: &[u8] = &[0x02, 0x03, 0x04, 0x00, 0x20, 0x00, 0x00, 0xc8, 0xf9];

    fn with_crc(frame: &[u8]) -> Vec<u8> {
        [frame, &crc(frame).to_le_bytes()].concat()
    }

    fn tcp_frame(transaction: u8, pdu: &[u8]) -> Vec<u8> {
        [&[0, transaction, 0, 0, 0, pdu.len() as u8 + 1, 1], pdu].concat()
    }

    async fn send(wire: &mut Wire<DuplexStream>, request: &[u8]) {
        wire.write_all(request).await.unwrap();
        wire.flush().await.unwrap();
    }

    /// What the wire lets through of `chunks` that arrive after `request` was sent; the peer then hangs up.
    async fn let_through(framing: Framing, request: &[u8], chunks: &[&[u8]]) -> (Vec<u8>, u64) {
        let (near, mut far) = duplex(4096);
        let (mut wire, state) = Wire::new(near, framing);
        send(&mut wire, request).await;
        for chunk in chunks {
            far.write_all(chunk).await.unwrap();
        }
        drop(far);
        let mut passed = Vec::new();
        let _ = wire.read_to_end(&mut passed).await;
        (passed, state.take_discarded())
    }

    #[test]
    fn the_vectors_have_valid_crcs() {
        assert_eq!(crc(&RTU_REQUEST[..6]), 0x63b6);
        for frame in [RTU_REQUEST, RTU_ANSWER, RTU_EXCEPTION, RTU_OTHER_UNIT] {
            assert_eq!(with_crc(&frame[..frame.len() - 2]), frame);
        }
    }

    #[tokio::test]
    async fn on_a_serial_line_only_the_awaited_frame_passes() {
        let check = async |chunks: &[&[u8]], expected: &[u8], discarded: u64| {
            assert_eq!(
                let_through(Framing::Rtu, RTU_REQUEST, chunks).await,
                (expected.to_vec(), discarded),
                "{chunks:x?}"
            );
        };
        check(&[RTU_ANSWER], RTU_ANSWER, 0).await;
        check(&[&RTU_ANSWER[..1], &RTU_ANSWER[1..4], &RTU_ANSWER[4..]], RTU_ANSWER, 0).await;
        check(&[RTU_EXCEPTION], RTU_EXCEPTION, 0).await;
        check(&[b"\x00\xff\x01noise", RTU_ANSWER], RTU_ANSWER, 8).await;
        check(&[b"\x01\x03", RTU_ANSWER], RTU_ANSWER, 2).await;
        check(&[RTU_OTHER_UNIT, RTU_ANSWER], RTU_ANSWER, 9).await;
        check(&[RTU_REQUEST, RTU_ANSWER], RTU_ANSWER, 8).await;
        let other_length = with_crc(&[1, 3, 2, 0, 1]);
        check(&[&other_length, RTU_ANSWER], RTU_ANSWER, 7).await;
        let mut broken = RTU_ANSWER.to_vec();
        broken[4] ^= 1;
        check(&[&broken], &[], 9).await;
        check(&[&RTU_ANSWER[..8]], &[], 0).await;
    }

    #[tokio::test]
    async fn over_tcp_only_the_awaited_transaction_passes() {
        let request = tcp_frame(7, &[3, 0, 0, 0, 1]);
        let (late, answer) = (tcp_frame(6, &[3, 2, 0, 1]), tcp_frame(7, &[3, 2, 0, 2]));
        let check = async |chunks: &[&[u8]], expected: &[u8], discarded: u64| {
            assert_eq!(
                let_through(Framing::Tcp, &request, chunks).await,
                (expected.to_vec(), discarded),
                "{chunks:x?}"
            );
        };
        check(&[&answer], &answer, 0).await;
        check(&[&late, &answer], &answer, 11).await;
        check(&[&late[..3], &late[3..], &answer[..9], &answer[9..]], &answer, 11).await;
        check(&[b"HTTP/1.1 400 Bad Request"], &[], 0).await;
        check(&[&[0, 7, 0, 0, 0, 0]], &[], 0).await;
    }

    #[tokio::test]
    async fn what_arrived_before_a_request_is_not_its_answer() {
        let (near, mut far) = duplex(4096);
        let (mut wire, state) = Wire::new(near, Framing::Rtu);
        send(&mut wire, RTU_REQUEST).await;
        assert!(!state.has_heard());
        // The answer comes after the first request was given up, and looks exactly like one to the second.
        far.write_all(RTU_ANSWER).await.unwrap();
        send(&mut wire, RTU_REQUEST).await;
        let second = with_crc(&[1, 3, 4, 0, 1, 0, 2]);
        far.write_all(&second).await.unwrap();
        let mut passed = vec![0; second.len()];
        wire.read_exact(&mut passed).await.unwrap();
        assert_eq!(passed, second);
        assert_eq!(state.take_discarded(), 9);
        assert!(state.has_heard());
    }

    #[tokio::test]
    async fn a_late_answer_that_is_cut_in_two_by_the_next_request_is_still_recognized() {
        let (near, mut far) = duplex(4096);
        let (mut wire, _) = Wire::new(near, Framing::Tcp);
        send(&mut wire, &tcp_frame(1, &[3, 0, 0, 0, 1])).await;
        let (late, answer) = (tcp_frame(1, &[3, 2, 0, 1]), tcp_frame(2, &[3, 2, 0, 2]));
        far.write_all(&late[..8]).await.unwrap();
        send(&mut wire, &tcp_frame(2, &[3, 0, 0, 0, 1])).await;
        far.write_all(&late[8..]).await.unwrap();
        far.write_all(&answer).await.unwrap();
        let mut passed = vec![0; answer.len()];
        wire.read_exact(&mut passed).await.unwrap();
        assert_eq!(passed, answer);
    }

    #[tokio::test]
    async fn a_peer_that_hung_up_is_noticed_before_a_request_is_sent() {
        let (near, far) = duplex(64);
        let (mut wire, _) = Wire::new(near, Framing::Tcp);
        drop(far);
        let error = wire.write_all(&tcp_frame(1, &[3, 0, 0, 0, 1])).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    }

    proptest! {
        #[test]
        fn noise_neither_panics_nor_piles_up(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..6), tcp in any::<bool>()) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let framing = if tcp { Framing::Tcp } else { Framing::Rtu };
            let request = if tcp { tcp_frame(0, &[3, 0, 0, 0, 1]) } else { RTU_REQUEST.to_vec() };
            runtime.block_on(async {
                let (near, mut far) = duplex(4096);
                let (mut wire, _) = Wire::new(near, framing);
                send(&mut wire, &request).await;
                for chunk in &chunks {
                    far.write_all(chunk).await.unwrap();
                }
                drop(far);
                let _ = wire.read_to_end(&mut Vec::new()).await;
                assert!(wire.received.len() <= MAX_HELD_BYTES);
            });
        }
    }
}
