//! Upstreams: the client side of MQTT, over TLS, fed by a durable session.

pub mod backoff;
mod condition;
mod dial;
pub mod rules;
mod settings;
pub mod url;

pub use condition::{DropReason, Phase};
pub use settings::{Checked, Settings, SettingsError, VersionChoice};
