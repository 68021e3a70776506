//! A TLS configuration that follows its files: renewed certificates are used by the next handshake, bad ones are not.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;
use tracing::{info, warn};

use super::TlsError;
use crate::clock::{RELEASED, UnixMillis};
use crate::files::{Fingerprint, LOOK_INTERVAL, Watched};

/// How long before its end a certificate is reported.
pub const EXPIRY_NOTICE: Duration = Duration::from_secs(30 * 86_400);

/// Files from which a rustls configuration is built.
pub trait Source {
    type Config;

    /// The files whose change asks for a new build.
    fn files(&self) -> Vec<&Path>;

    /// Which of the files holds the own certificate.
    fn certificate(&self) -> Option<&Path>;

    /// Which of the files holds the authorities to trust.
    fn authorities(&self) -> Option<&Path>;

    /// Reads the files; also tells when what they hold expires.
    ///
    /// # Errors
    /// [`TlsError`] names the file, what is wrong with it and what to do.
    fn build(&self) -> Result<(Self::Config, Ends), TlsError>;
}

/// When certificates stop being valid.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// The own one; `None` for a client that shows none.
    pub certificate: Option<UnixMillis>,
    /// The authorities of a file, the first to end first. The system's are the system's care.
    pub authorities: Vec<UnixMillis>,
}

impl Ends {
    /// When the next authority ends: one that has ended beside others that have not is only a leftover.
    fn next_authority(&self, now: UnixMillis) -> Option<UnixMillis> {
        self.authorities.iter().find(|end| **end > now).or(self.authorities.last()).copied()
    }
}

/// A configuration built from files and rebuilt when they change.
pub struct Live<S: Source> {
    settings: S,
    current: RwLock<Current<S::Config>>,
}

struct Current<C> {
    config: Arc<C>,
    ends: Ends,
    seen: Vec<Option<Fingerprint>>,
}

impl<S: Source> Live<S> {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// [`TlsError`] names the file, what is wrong with it and what to do.
    pub fn open(settings: S) -> Result<Self, TlsError> {
        let seen = fingerprints(&settings);
        let (config, ends) = settings.build()?;
        let current = RwLock::new(Current { config: Arc::new(config), ends, seen });
        Ok(Self { settings, current })
    }

    /// The configuration to use for the next handshake.
    pub fn config(&self) -> Arc<S::Config> {
        self.current.read().config.clone()
    }

    pub fn settings(&self) -> &S {
        &self.settings
    }

    /// When the own certificate expires; `None` for a client that shows none.
    pub fn expires_at(&self) -> Option<UnixMillis> {
        self.current.read().ends.certificate
    }

    /// When the own certificate and the next authority of a file stop being valid, under the words for them in metrics.
    pub fn ends(&self, now: UnixMillis) -> impl Iterator<Item = (&'static str, UnixMillis)> + use<S> {
        let ends = self.current.read().ends.clone();
        let authority = ends.next_authority(now).map(|end| ("authority", end));
        ends.certificate.map(|end| ("own", end)).into_iter().chain(authority)
    }

    /// What to tell a person when a certificate has expired at `now` or will within [`EXPIRY_NOTICE`].
    pub fn expiry_notice(&self, now: UnixMillis) -> Option<String> {
        // A clock that was never set says nothing about certificates.
        if now < RELEASED {
            return None;
        }
        let (settings, current) = (&self.settings, self.current.read());
        let own = current
            .ends
            .certificate
            .zip(settings.certificate())
            .map(|(end, path)| (end, format!("the certificate {}", path.display()), "replace it"));
        let authority =
            current.ends.next_authority(now).zip(settings.authorities()).map(|(end, path)| {
                (end, format!("an authority in {}", path.display()), "add its successor to the file")
            });
        let due = |end: &UnixMillis| end.since(now) <= EXPIRY_NOTICE;
        let (end, what, remedy) = [own, authority].into_iter().flatten().find(|(end, ..)| due(end))?;
        let verb = if end <= now { "expired" } else { "expires" };
        Some(format!("{what} {verb} on {end}; {remedy}, no restart is needed"))
    }

    /// Reads the files again and uses what they hold. On an error the old configuration stays in use.
    ///
    /// # Errors
    /// As [`Live::open`].
    pub fn reload(&self) -> Result<(), TlsError> {
        // The fingerprints are taken first: a file that changes while it is read is read again next time.
        let seen = fingerprints(&self.settings);
        let built = self.settings.build();
        let mut current = self.current.write();
        current.seen = seen;
        let (config, ends) = built?;
        current.config = Arc::new(config);
        current.ends = ends;
        Ok(())
    }

    /// Reloads if a file has changed since it was last read; `None` when none has.
    pub fn refresh(&self) -> Option<Result<(), TlsError>> {
        let changed = fingerprints(&self.settings) != self.current.read().seen;
        changed.then(|| self.reload())
    }

    /// Follows the files until `shutdown`, and logs what it finds. `name` says whose files they are.
    ///
    /// # Cancel safety
    /// May be dropped at any time; the configuration stays as it is.
    pub async fn watch(&self, name: &str, mut shutdown: watch::Receiver<bool>) {
        let mut files = Watched::new(self.settings.files());
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        // What changed between the first reading and now.
        self.refresh_and_log(name);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                stop = shutdown.wait_for(|stop| *stop) => { drop(stop); return }
            }
            if files.have_changed() {
                self.refresh_and_log(name);
            }
        }
    }

    /// [`Live::refresh`], its outcome logged once.
    pub fn refresh_and_log(&self, name: &str) {
        match self.refresh() {
            None => {}
            Some(Ok(())) => {
                info!(name, expires_at = self.expires_at().map(tracing::field::display), "certificates reloaded")
            }
            Some(Err(error)) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                warn!(name, %error, cause, "new certificates refused, the old ones stay in use");
            }
        }
    }
}

impl<S: Source + fmt::Debug> fmt::Debug for Live<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("settings", &self.settings).finish_non_exhaustive()
    }
}

fn fingerprints<S: Source>(settings: &S) -> Vec<Option<Fingerprint>> {
    settings.files().into_iter().map(Fingerprint::of).collect()
}
