//! Server-sent events: one feed, any browser that listens (HTML Living Standard §9.2).
//!
//! An event is written once and shared by all listeners. Each listener has a short queue; one that does not keep up is
//! dropped and comes back by itself, as `EventSource` does. The last events are kept for a while, so that a listener
//! that comes back with `Last-Event-ID` misses nothing.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::mpsc;

use super::logins::Token;

/// Listeners at a time.
pub const MAX_LISTENERS: usize = 24;
/// Events that wait for one listener before it is dropped as too slow: some 30 seconds of a busy gateway.
const MAX_WAITING: usize = 128;
/// Events kept for listeners that come back.
const MAX_RECENT: usize = 256;
/// Bytes of events kept for listeners that come back.
const MAX_RECENT_BYTES: usize = 256 * 1024;
/// Events are made this long after the last listener left, so that it misses none when it comes back.
const LINGER: Duration = Duration::from_secs(10);

/// The events and who listens to them.
pub struct Feed {
    /// Stands before every event's number, which starts anew with the gateway.
    boot_id: Box<str>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    listeners: Vec<Listener>,
    recent: VecDeque<(u64, Bytes)>,
    recent_bytes: usize,
    /// The id of the newest event; 0 before the first.
    last: u64,
    last_left: Option<Instant>,
    closed: bool,
    dropped: u64,
}

struct Listener {
    sender: mpsc::Sender<Bytes>,
    /// The login that the listener came with; the stream ends with it.
    login: Option<Token>,
}

/// Why nobody more can listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenError {
    Full,
    Closed,
}

impl Feed {
    pub fn new(boot_id: &str) -> Self {
        Self { boot_id: boot_id.into(), inner: Mutex::default() }
    }

    /// Adds a listener whose first event is `hello`, made from whether events since `last_seen` follow.
    ///
    /// # Errors
    /// There are [`MAX_LISTENERS`] already, or the feed is closed.
    pub fn listen(
        &self,
        last_seen: Option<&str>,
        login: Option<Token>,
        hello: impl FnOnce(bool) -> Bytes,
    ) -> Result<EventBody, ListenError> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(ListenError::Closed);
        }
        inner.listeners.retain(|listener| !listener.sender.is_closed());
        if inner.listeners.len() >= MAX_LISTENERS {
            return Err(ListenError::Full);
        }
        let seen = last_seen.and_then(|id| id.strip_prefix(&*self.boot_id)?.strip_prefix('-')?.parse().ok());
        let missed = seen.and_then(|seen| inner.since(seen)).filter(|missed| missed.len() < MAX_WAITING);
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        // The queue is new and longer than what goes in here.
        for event in std::iter::once(hello(missed.is_some())).chain(missed.into_iter().flatten()) {
            let _ = sender.try_send(event);
        }
        inner.listeners.push(Listener { sender, login });
        Ok(EventBody(receiver))
    }

    /// Sends an event to all listeners; those whose queue is full are dropped.
    pub fn send(&self, name: &str, data: &impl Serialize) {
        let Ok(data) = serde_json::to_string(data) else { return };
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        inner.last += 1;
        let event = encode(Some((&self.boot_id, inner.last)), name, &data);
        let before = inner.listeners.len();
        inner.listeners.retain(|listener| match listener.sender.try_send(event.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                inner.dropped += 1;
                false
            }
        });
        if before > 0 && inner.listeners.is_empty() {
            inner.last_left = Some(Instant::now());
        }
        inner.recent_bytes += event.len();
        inner.recent.push_back((inner.last, event));
        while inner.recent.len() > MAX_RECENT || inner.recent_bytes > MAX_RECENT_BYTES {
            let Some((_, old)) = inner.recent.pop_front() else { break };
            inner.recent_bytes -= old.len();
        }
    }

    /// Whether events are worth making: somebody listens, or did a moment ago.
    pub fn is_wanted(&self) -> bool {
        let inner = self.inner.lock();
        !inner.listeners.is_empty() || inner.last_left.is_some_and(|left| left.elapsed() < LINGER)
    }

    /// Drops the listeners whose login has ended.
    pub fn keep(&self, is_live: impl Fn(&Token) -> bool) {
        self.inner.lock().listeners.retain(|listener| listener.login.as_ref().is_none_or(&is_live));
    }

    /// Ends all streams and takes no new listener.
    pub fn close(&self) {
        let mut inner = self.inner.lock();
        inner.closed = true;
        inner.listeners.clear();
    }

    /// Listeners now, and how many were ever dropped as too slow.
    pub fn counts(&self) -> (usize, u64) {
        let inner = self.inner.lock();
        (inner.listeners.iter().filter(|listener| !listener.sender.is_closed()).count(), inner.dropped)
    }
}

impl Inner {
    /// The events after `seen`, if none of them is lost.
    fn since(&self, seen: u64) -> Option<Vec<Bytes>> {
        let first = self.recent.front().map_or(self.last + 1, |(id, _)| *id);
        let complete = seen <= self.last && seen + 1 >= first;
        complete.then(|| self.recent.iter().filter(|(id, _)| *id > seen).map(|(_, event)| event.clone()).collect())
    }
}

/// One event in wire form. `data` is a single line, as compact JSON is.
pub fn encode(id: Option<(&str, u64)>, name: &str, data: &str) -> Bytes {
    let id = id.map(|(boot_id, number)| format!("id: {boot_id}-{number}\n")).unwrap_or_default();
    format!("{id}event: {name}\ndata: {data}\n\n").into()
}

/// The endless body of one listener's response.
pub struct EventBody(mpsc::Receiver<Bytes>);

impl Body for EventBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|event| event.map(|event| Ok(Frame::data(event))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(feed: &Feed, last_seen: Option<&str>) -> Vec<String> {
        let hello = |resumed: bool| encode(None, "hello", if resumed { "true" } else { "false" });
        let mut body = feed.listen(last_seen, None, hello).ok().unwrap();
        let mut events = Vec::new();
        while let Ok(event) = body.0.try_recv() {
            events.push(String::from_utf8(event.to_vec()).unwrap());
        }
        events
    }

    #[test]
    fn a_listener_that_comes_back_gets_what_it_missed() {
        let feed = Feed::new("boot");
        for number in 1..=3 {
            feed.send("n", &number);
        }
        let check = |last_seen: Option<&str>, resumed: bool, follow: &[&str]| {
            let events = listen(&feed, last_seen);
            assert_eq!(events[0], format!("event: hello\ndata: {resumed}\n\n"), "{last_seen:?}");
            assert_eq!(events[1..], *follow, "{last_seen:?}");
        };
        check(None, false, &[]);
        check(Some("boot-3"), true, &[]);
        check(Some("boot-1"), true, &["id: boot-2\nevent: n\ndata: 2\n\n", "id: boot-3\nevent: n\ndata: 3\n\n"]);
        check(Some("boot-4"), false, &[]);
        check(Some("earlier-2"), false, &[]);
        check(Some("2"), false, &[]);
        for number in 0..MAX_RECENT {
            feed.send("n", &number);
        }
        check(Some("boot-2"), false, &[]);
    }

    #[test]
    fn kept_events_have_a_limit_in_bytes() {
        let feed = Feed::new("boot");
        for _ in 0..10 {
            feed.send("n", &"x".repeat(MAX_RECENT_BYTES / 4));
        }
        let inner = feed.inner.lock();
        assert!(inner.recent_bytes <= MAX_RECENT_BYTES && inner.recent.len() == 3, "{}", inner.recent.len());
    }

    #[test]
    fn a_slow_listener_is_dropped_and_the_others_stay() {
        let feed = Feed::new("boot");
        let slow = feed.listen(None, None, |_| Bytes::new()).ok().unwrap();
        for number in 0..MAX_WAITING - 1 {
            feed.send("n", &number);
        }
        let quick = feed.listen(None, None, |_| Bytes::new()).ok().unwrap();
        assert_eq!(feed.counts(), (2, 0));
        feed.send("n", &0);
        assert_eq!(feed.counts(), (1, 1));
        drop((slow, quick));
        feed.send("n", &0);
        assert_eq!(feed.counts(), (0, 1));
        assert!(feed.is_wanted(), "for a moment longer");
    }

    #[test]
    fn listeners_are_limited_and_end_with_their_login_or_the_feed() {
        let feed = Feed::new("boot");
        let bodies: Vec<_> = (0..MAX_LISTENERS)
            .map(|number| feed.listen(None, Some(number.to_string().into()), |_| Bytes::new()).ok().unwrap())
            .collect();
        assert_eq!(feed.listen(None, None, |_| Bytes::new()).err(), Some(ListenError::Full));
        feed.keep(|login| &**login != "3");
        assert_eq!(bodies[3].0.sender_strong_count(), 0, "the stream ends");
        assert!(feed.listen(None, None, |_| Bytes::new()).is_ok());
        feed.close();
        assert_eq!(feed.listen(None, None, |_| Bytes::new()).err(), Some(ListenError::Closed));
    }
}
