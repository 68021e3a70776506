//! A simulated serial scale: a pty that sends lines such as `ST,GS,+00012.34kg` and takes `T` (tare) and `Z` (zero).
//!
//! Things are put on it and taken off again; the weight swings before it settles, as it does on a real one. Its path
//! is a link that stays the same when the cable is pulled and plugged in again.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_serial::{SerialPort, SerialStream};

/// How often the scale sends a line.
const LINE_INTERVAL: Duration = Duration::from_millis(250);

/// How many scales one process may have, and more than any test opens.
const MAX_SCALES: u32 = 1000;

/// How long a thing stays on the scale.
const LOAD_TIME: Duration = Duration::from_secs(6);

/// What is put on the scale, in kg, over and over.
const LOADS: [f64; 6] = [12.34, 0.0, 3.5, 27.81, 8.02, 0.0];

/// The swing's frequency in rad/s, and how fast it dies down.
const SWING: f64 = 7.0;
const DAMPING: f64 = 1.6;

/// The scale and its end of the cable.
pub struct Scale {
    path: PathBuf,
    /// A directory of its own, removed with the scale.
    directory: Option<PathBuf>,
    plugged: watch::Receiver<bool>,
    cable: Cable,
    pty: Option<Pty>,
    weighing: Weighing,
}

/// The cable between the scale and the gateway.
#[derive(Clone)]
pub struct Cable(watch::Sender<bool>);

impl Cable {
    /// Pulls the cable: the port vanishes.
    pub fn unplug(&self) {
        self.0.send_replace(false);
    }

    /// Plugs it in again: a port appears at the same path.
    pub fn replug(&self) {
        self.0.send_replace(true);
    }
}

/// A pseudo terminal. Its far end is held open so that the scale does not notice when the gateway closes the port, as
/// a real one does not.
struct Pty {
    near: SerialStream,
    _far: SerialStream,
}

/// What lies on the scale, and what it shows.
#[derive(Debug)]
struct Weighing {
    began: Duration,
    from: f64,
    load: usize,
    zero: f64,
    tare: Option<f64>,
}

impl Scale {
    /// Makes a scale with a pty of its own; the path is what the gateway opens, at any baud rate.
    ///
    /// # Errors
    /// When the system gives no pty or the link to it cannot be made in the directory for temporary files.
    pub fn open() -> io::Result<(PathBuf, Self)> {
        let directory = own_directory()?;
        let mut scale = Self::open_at(&directory.join("scale"))?;
        scale.directory = Some(directory);
        Ok((scale.path.clone(), scale))
    }

    /// Makes a scale whose port appears at `path`, in a directory that exists.
    ///
    /// # Errors
    /// As [`Scale::open`].
    pub fn open_at(path: &Path) -> io::Result<Self> {
        let (sender, plugged) = watch::channel(true);
        let weighing = Weighing { began: Duration::ZERO, from: 0.0, load: 0, zero: 0.0, tare: None };
        let pty = Some(Pty::open(path)?);
        Ok(Self { path: path.to_owned(), directory: None, plugged, cable: Cable(sender), pty, weighing })
    }

    pub fn cable(&self) -> Cable {
        self.cable.clone()
    }

    /// Weighs until it is told to stop.
    ///
    /// # Errors
    /// When the cable is plugged in again and the system gives no pty.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> io::Result<()> {
        let started = Instant::now();
        let mut lines = interval(LINE_INTERVAL);
        lines.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut input = [0; 64];
        loop {
            let read = async {
                match &mut self.pty {
                    Some(pty) => pty.near.read(&mut input).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => return Ok(()),
                _ = self.plugged.changed() => {
                    let plugged = *self.plugged.borrow_and_update();
                    self.plug(plugged)?;
                }
                read = read => {
                    let length = read?;
                    input[..length].iter().for_each(|byte| self.weighing.command(*byte, started.elapsed()));
                }
                _ = lines.tick() => {
                    let line = self.weighing.line(started.elapsed());
                    if let Some(pty) = &mut self.pty {
                        // A full buffer means that nobody reads; a scale does not wait for anybody.
                        let _ = pty.near.try_write(line.as_bytes());
                    }
                }
            }
        }
    }

    fn plug(&mut self, plugged: bool) -> io::Result<()> {
        match (plugged, &self.pty) {
            (true, None) => self.pty = Some(Pty::open(&self.path)?),
            (false, Some(_)) => {
                self.pty = None;
                fs::remove_file(&self.path)?;
            }
            (true, Some(_)) | (false, None) => {}
        }
        Ok(())
    }
}

impl Drop for Scale {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

impl Pty {
    fn open(path: &Path) -> io::Result<Self> {
        let (near, far) = SerialStream::pair()?;
        let name = far.name().ok_or_else(|| io::Error::other("the pty has no name"))?;
        symlink(name, path)?;
        Ok(Self { near, _far: far })
    }
}

impl Weighing {
    /// What the scale sends at `now` since it was switched on.
    fn line(&mut self, now: Duration) -> String {
        while now - self.began >= LOAD_TIME {
            self.from = LOADS[self.load];
            self.load = (self.load + 1) % LOADS.len();
            self.began += LOAD_TIME;
        }
        let (gross, stable) = self.gross(now);
        let stability = if stable { "ST" } else { "US" };
        match self.tare {
            // Adding zero turns a negative zero, which would show as -0.00, into a plain one.
            Some(tare) => format!("{stability},NT,{:+09.2}kg\r\n", hundredths(gross - tare)),
            None => format!("{stability},GS,{:+09.2}kg\r\n", hundredths(gross)),
        }
    }

    fn command(&mut self, byte: u8, now: Duration) {
        let (gross, _) = self.gross(now);
        match byte {
            b'T' => self.tare = Some(hundredths(gross)).filter(|tare| *tare != 0.0),
            b'Z' => {
                self.zero += gross;
                self.tare = None;
            }
            _ => {}
        }
    }

    /// The weight on the scale at `now`, and whether it has settled.
    fn gross(&self, now: Duration) -> (f64, bool) {
        let time = (now.saturating_sub(self.began)).as_secs_f64();
        let step = LOADS[self.load] - self.from;
        let swing = (-DAMPING * time).exp();
        let weight = LOADS[self.load] - step * swing * (SWING * time).cos();
        (weight - self.zero, (step * swing).abs() < 0.02)
    }
}

fn hundredths(weight: f64) -> f64 {
    (weight * 100.0).round() / 100.0 + 0.0
}

/// Makes a new directory among the temporary files.
fn own_directory() -> io::Result<PathBuf> {
    let base = std::env::temp_dir();
    let mut number = 0;
    loop {
        let path = base.join(format!("fieldgate-scale-{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < MAX_SCALES => number += 1,
            result => return result.map(|()| path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weighing() -> Weighing {
        Weighing { began: Duration::ZERO, from: 0.0, load: 0, zero: 0.0, tare: None }
    }

    #[test]
    fn the_weight_swings_and_settles() {
        let mut weighing = weighing();
        let mut at = |millis: u64| weighing.line(Duration::from_millis(millis));
        assert_eq!(at(0), "US,GS,+00000.00kg\r\n");
        assert!(at(500).starts_with("US,GS,+000"));
        assert_eq!(at(5900), "ST,GS,+00012.34kg\r\n");
        assert_eq!(at(11_900), "ST,GS,+00000.00kg\r\n");
    }

    #[test]
    fn tare_and_zero_move_the_origin() {
        let mut weighing = weighing();
        let settled = Duration::from_millis(5900);
        weighing.line(settled);
        weighing.command(b'T', settled);
        assert_eq!(weighing.line(settled), "ST,NT,+00000.00kg\r\n");
        assert_eq!(weighing.line(settled + LOAD_TIME), "ST,NT,-00012.34kg\r\n");
        weighing.command(b'Z', settled + LOAD_TIME);
        assert_eq!(weighing.line(settled + LOAD_TIME), "ST,GS,+00000.00kg\r\n");
    }
}
