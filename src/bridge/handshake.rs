//! From CONNECT to CONNACK, on a stream that is open.

use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use super::dial::Transport;
use crate::proto::mqtt::client::{Client, Event, Options};
use crate::proto::mqtt::{ProtocolError, ReasonCode};

/// The upstream has taken the CONNECT.
pub(super) struct Greeted<R> {
    pub client: Client<R>,
    pub session_present: bool,
    /// What came right behind the CONNACK.
    pub input: BytesMut,
}

/// Why it has not.
#[derive(Debug)]
pub(super) enum Unwelcome {
    Refused {
        reason: ReasonCode,
        detail: Option<String>,
    },
    /// Closed without an answer, as brokers do that do not know the version of MQTT.
    Closed(Option<io::Error>),
    /// What came is not MQTT, or not this version of it.
    Garbled(ProtocolError),
    Silent,
}

impl Unwelcome {
    /// What the system or TLS said when the connection ended.
    pub fn cause(&self) -> Option<&io::Error> {
        match self {
            Self::Closed(cause) => cause.as_ref(),
            _ => None,
        }
    }
}

/// Sends the CONNECT of `options` and waits for the answer, `patience` long.
///
/// # Cancel safety
/// Close the stream if this is dropped.
pub(super) async fn greet<R>(
    stream: &mut Box<dyn Transport>,
    options: Options,
    patience: Duration,
) -> Result<Greeted<R>, Unwelcome> {
    match timeout(patience, exchange(stream, options)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Unwelcome::Silent),
    }
}

async fn exchange<R>(stream: &mut Box<dyn Transport>, options: Options) -> Result<Greeted<R>, Unwelcome> {
    let closed = |error| Unwelcome::Closed(Some(error));
    let now = || Instant::now().into_std();
    let mut client = Client::new(options, now());
    let mut output = Vec::new();
    client.connect(now(), &mut output).map_err(|_| {
        Unwelcome::Garbled(ProtocolError {
            reason: ReasonCode::PacketTooLarge,
            what: "a setting is longer than MQTT allows",
        })
    })?;
    stream.write_all(&output).await.map_err(closed)?;
    stream.flush().await.map_err(closed)?;
    let mut input = BytesMut::with_capacity(1024);
    loop {
        if stream.read_buf(&mut input).await.map_err(closed)? == 0 {
            return Err(Unwelcome::Closed(None));
        }
        let Some((packet, used)) = client.decode(&input).map_err(Unwelcome::Garbled)? else { continue };
        let session_present = match client.handle(packet, now()).map_err(Unwelcome::Garbled)? {
            Event::Connected { session_present } => session_present,
            Event::Refused { reason, detail } => {
                return Err(Unwelcome::Refused { reason, detail: detail.map(Into::into) });
            }
            _ => continue,
        };
        input.advance(used);
        return Ok(Greeted { client, session_present, input });
    }
}
