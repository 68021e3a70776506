//! From a CONNECT to an attached session: who it is, and whether it may come in (MQTT 5.0 §3.1.4).

use std::fmt::Write;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use super::Shared;
use crate::hub::access::{AuthError, Identity};
use crate::hub::{Attach, AttachError, Face, Link, SessionExpiry, Will};
use crate::proto::mqtt::ReasonCode;
use crate::proto::mqtt::server::{ConnectRequest, Expiry};

/// What a CONNECT led to.
pub(super) struct LoggedIn {
    pub link: Link,
    /// A client id that we made up.
    pub assigned: bool,
    /// The session's expiry, where it is not what the client asked for.
    pub expiry: Option<Expiry>,
}

/// Why a CONNECT is refused: what the client is told.
pub(super) struct Refused {
    pub reason: ReasonCode,
    pub what: &'static str,
}

/// Checks the credentials of `request` and attaches its session. `peer` is for people; `address` is where it
/// is, `None` for a Unix socket; `certificate_user` counts where the listener goes by certificates.
pub(super) async fn log_in(
    shared: &Shared,
    request: ConnectRequest,
    peer: &str,
    address: Option<IpAddr>,
    certificate_user: Option<Arc<str>>,
) -> Result<LoggedIn, Refused> {
    let ConnectRequest { client_id, clean_start, expiry, receive_maximum, will, user_name, password, .. } = request;
    let ConnectRequest { version, is_bridge, gateway, .. } = request;
    let identity = if shared.certificate_user.is_some() {
        let what = "the client's certificate has no name that could be the user name here";
        certificate_user.map(Identity::certified).ok_or(Refused { reason: ReasonCode::BadUserNameOrPassword, what })
    } else {
        authenticate(shared, user_name, password, address).await
    };
    let identity = identity.inspect_err(|refused| {
        shared.counters.failed_logins.fetch_add(1, Ordering::Relaxed);
        info!(listener = shared.name, peer, client = &*client_id, "login refused: {}", refused.what);
    })?;
    let assigned = client_id.is_empty();
    let client_id = if assigned { assigned_client_id()? } else { client_id.into() };
    let hub = &shared.hub;
    let attach = Attach {
        face: Face::Mqtt,
        client_id,
        identity,
        clean_start,
        expiry: session_expiry(expiry),
        will: will.map(|will| Will { delay: will.delay, message: will.into_message(hub.clock().now()) }),
        receive_maximum,
        peer: Some(peer.into()),
        version: Some(version.name()),
        queue: None,
    };
    let mut link = hub.attach(attach).map_err(|error| match error {
        AttachError::TooManySessions => {
            info!(listener = shared.name, peer, "login refused: {error}");
            Refused { reason: ReasonCode::QuotaExceeded, what: "the gateway keeps as many sessions as it may" }
        }
        AttachError::StoreUnavailable => {
            info!(listener = shared.name, peer, "login refused: {error}");
            Refused { reason: ReasonCode::ServerUnavailable, what: "the gateway's store cannot be used yet" }
        }
    })?;
    link.keep_in_line();
    // A bridge with 3.1.1 says later which gateway it is, and is likely the one it was.
    if version.is_5() || !is_bridge {
        link.set_peer_gateway(gateway);
    }
    debug!(listener = shared.name, peer, client = &**link.client_id(), version = version.name(), "client connected");
    let most = hub.limits().max_session_expiry.map(|most| most.max(Duration::from_secs(1)));
    let expiry = match (expiry, most) {
        (Expiry::Never, Some(most)) => Some(Expiry::After(most)),
        (Expiry::After(asked), Some(most)) if asked > most => Some(Expiry::After(most)),
        _ => None,
    };
    Ok(LoggedIn { link, assigned, expiry })
}

async fn authenticate(
    shared: &Shared,
    user_name: Option<Box<str>>,
    password: Option<Box<[u8]>>,
    address: Option<IpAddr>,
) -> Result<Identity, Refused> {
    let access = shared.hub.access();
    let from_loopback = address.is_none_or(|address| address.is_loopback());
    let result = if user_name.is_none() {
        shared.anonymous.unwrap_or(access.settings().anonymous).admit(from_loopback)
    } else {
        may_guess(shared, address)?;
        let unavailable = Refused { reason: ReasonCode::ServerUnavailable, what: "the gateway is stopping" };
        let Ok(permit) = shared.logins.clone().acquire_owned().await else { return Err(unavailable) };
        // Others of the same address may have guessed wrong while this one waited for its turn.
        may_guess(shared, address)?;
        let check = tokio::task::spawn_blocking(move || {
            let result = access.authenticate(user_name.as_deref(), password.as_deref(), from_loopback);
            drop(permit);
            result
        });
        let Ok(result) = check.await else { return Err(unavailable) };
        match result {
            Ok(_) => shared.hub.admission().guesses().succeeded(address),
            Err(_) => note_wrong_password(shared, address),
        }
        result
    };
    result.map_err(|error| match error {
        AuthError::AnonymousRefused => {
            Refused { reason: ReasonCode::NotAuthorized, what: "a user name and password are required" }
        }
        AuthError::BadCredentials => {
            Refused { reason: ReasonCode::BadUserNameOrPassword, what: "unknown user name or wrong password" }
        }
    })
}

/// Refuses, without a look at the password, while the address has to wait.
fn may_guess(shared: &Shared, address: Option<IpAddr>) -> Result<(), Refused> {
    if shared.hub.admission().guesses().delay(address, Instant::now()).is_none() {
        return Ok(());
    }
    shared.counters.delayed_logins.fetch_add(1, Ordering::Relaxed);
    let what = "too many wrong passwords came from this address; it has to wait";
    Err(Refused { reason: ReasonCode::ConnectionRateExceeded, what })
}

fn note_wrong_password(shared: &Shared, address: Option<IpAddr>) {
    let delay = shared.hub.admission().guesses().failed(address, Instant::now());
    if let Some(address) = address.filter(|_| !delay.is_zero()) {
        let seconds = delay.as_secs();
        warn!(listener = shared.name, %address, seconds, "too many wrong passwords: logins from the address have to wait");
    }
}

pub(super) fn session_expiry(expiry: Expiry) -> SessionExpiry {
    match expiry {
        Expiry::AtOnce => SessionExpiry::OnDetach,
        Expiry::After(after) => SessionExpiry::After(after),
        Expiry::Never => SessionExpiry::Never,
    }
}

/// A client id nobody else has or can guess.
fn assigned_client_id() -> Result<std::sync::Arc<str>, Refused> {
    let mut random = [0; 12];
    getrandom::fill(&mut random).map_err(|failure| {
        error!(%failure, "the system gives no random bytes");
        Refused { reason: ReasonCode::ServerUnavailable, what: "the gateway cannot make up a client identifier" }
    })?;
    let mut id = String::from("auto-");
    for byte in random {
        let _ = write!(id, "{byte:02x}");
    }
    Ok(id.into())
}
