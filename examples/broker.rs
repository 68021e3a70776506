//! The broker alone, in memory: the hub and one listener. `cargo run --release --example broker -- 127.0.0.1:1883`

use std::error::Error;

use fieldgate::clock::Clock;
use fieldgate::hub::{self, Hub};
use fieldgate::listener::{Listener, Settings};
use tokio::sync::watch;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:1883".into()).parse()?;
    tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).init();
    let hub = Hub::new(hub::Settings::default(), Clock::start("example"), None)?;
    let listener = Listener::bind(Settings::new("example", address), hub.clone()).await?;
    let (stop, shutdown) = watch::channel(false);
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
        let _ = stop.send(true);
    };
    tokio::join!(listener.run(shutdown.clone()), hub.run(shutdown), interrupted);
    Ok(())
}
