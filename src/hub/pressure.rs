//! What holds a publisher back: receivers or a disk that cannot keep up with it.

use std::sync::Arc;
use std::time::Duration;

use super::Hub;
use super::session::Session;

/// How long a publisher waits after each batch for a full disk: long enough that one whose messages are refused does not
/// keep the machine busy.
const FULL_DISK_PAUSE: Duration = Duration::from_millis(100);

/// Receivers, or the disk, that cannot keep up with this publisher.
#[derive(Debug)]
pub struct Pressure {
    pub(super) sessions: Vec<Arc<Session>>,
    pub(super) disk_full: bool,
    pub(super) hub: Hub,
}

impl Pressure {
    /// Waits until they have caught up, or have made the publisher wait for long enough.
    ///
    /// # Cancel safety
    /// Nothing is lost; the publisher just goes on early.
    pub async fn wait(&self) {
        for session in &self.sessions {
            session.drained().await;
        }
        if let Some(store) = self.hub.store() {
            store.when_ready().await;
        }
        if self.disk_full {
            tokio::time::sleep(FULL_DISK_PAUSE).await;
        }
    }
}
