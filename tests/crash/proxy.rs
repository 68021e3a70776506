//! A line that is this process: passes bytes on, or does to them what lines do. Needs nothing of the machine.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{broadcast, watch};
use tokio::time::sleep;

use crate::line::Weather;

/// 64 kbit/s.
const SLOW_BYTES_PER_SECOND: u32 = 8_000;
/// How long a half-open connection is held open at most; both ends have given it up long before.
const HALF_OPEN: Duration = Duration::from_secs(60);

/// What happens to the connections that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    /// Both ends get an RST.
    Reset,
    /// Nothing passes any more, for ever, and neither end is told; new connections pass.
    HalfOpen,
}

pub struct Proxy {
    pub address: SocketAddr,
    weather: watch::Sender<Weather>,
    blows: broadcast::Sender<Blow>,
    _runtime: Runtime,
}

impl Proxy {
    /// Listens on loopback and passes connections on to `target`.
    pub fn start(target: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let (weather, blows) = (watch::Sender::new(Weather::Clear), broadcast::Sender::new(16));
        let (for_all, blows_for_all) = (weather.clone(), blows.clone());
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(connection(stream, target, for_all.subscribe(), blows_for_all.subscribe()));
            }
        });
        Self { address, weather, blows, _runtime: runtime }
    }

    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }

    pub fn reset(&self) {
        let _ = self.blows.send(Blow::Reset);
    }

    pub fn half_open(&self) {
        let _ = self.blows.send(Blow::HalfOpen);
    }
}

async fn connection(
    mut near: TcpStream,
    target: SocketAddr,
    mut weather: watch::Receiver<Weather>,
    mut blows: broadcast::Receiver<Blow>,
) {
    let dialled = async {
        passable(&mut weather).await;
        TcpStream::connect(target).await
    };
    let mut far = tokio::select! {
        Ok(far) = dialled => far,
        _ = blows.recv() => return,
        else => return,
    };
    let blow = {
        let (from_near, to_near) = near.split();
        let (from_far, to_far) = far.split();
        let passing = async {
            // An end passes on by itself; an error ends both directions.
            tokio::try_join!(pump(from_near, to_far, weather.clone()), pump(from_far, to_near, weather.clone()))
        };
        tokio::select! {
            blow = blows.recv() => blow,
            _ = passing => return,
        }
    };
    match blow {
        Ok(Blow::HalfOpen) => sleep(HALF_OPEN).await,
        _ => {
            let _ = (near.set_zero_linger(), far.set_zero_linger());
        }
    }
}

/// Waits until bytes may pass; tells how.
async fn passable(weather: &mut watch::Receiver<Weather>) -> Weather {
    let passable = weather.wait_for(|weather| *weather != Weather::Blackhole).await.map(|weather| *weather);
    match passable {
        Ok(weather) => weather,
        // The proxy is gone, and the connections with it.
        Err(_) => std::future::pending().await,
    }
}

/// Passes the bytes of one direction on, and its end.
async fn pump(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, mut weather: watch::Receiver<Weather>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let limit = if passable(&mut weather).await == Weather::Slow { 200 } else { buffer.len() };
        let count = from.read(&mut buffer[..limit]).await?;
        // It may have changed while nothing came.
        let now = passable(&mut weather).await;
        if count == 0 {
            return to.shutdown().await;
        }
        if now == Weather::Slow {
            sleep(Duration::from_secs(1) * count as u32 / SLOW_BYTES_PER_SECOND).await;
        }
        to.write_all(&buffer[..count]).await?;
    }
}
