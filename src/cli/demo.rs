//! `fieldgate demo`: everything at once, for a person at a terminal.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, Stdin};
use tokio::sync::{mpsc, watch};

use super::signals::{Asked, STOPPED_AT_ONCE, Signals};
use super::terminal::{Keyboard, complain, say};
use super::{SYSTEM_ERROR, log, run};
use crate::clock::Clock;
use crate::demo::{Demo, DemoError, Options, Places};
use crate::gateway::Handle;
use crate::supervise::describe;
use crate::web::log::LogRing;
use crate::web::{Controls, Switch};

#[derive(clap::Args)]
pub struct Arguments {
    /// Keep configuration, database and certificates here; a temporary directory is removed at the end.
    #[arg(short, long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// The port of the web UI.
    #[arg(long, value_name = "PORT")]
    web_port: Option<u16>,
    /// The port of the broker.
    #[arg(long, value_name = "PORT")]
    mqtt_port: Option<u16>,
    /// Take whatever ports are free.
    #[arg(long)]
    any_ports: bool,
}

pub fn demo(arguments: Arguments) -> ExitCode {
    let Arguments { directory, web_port, mqtt_port, any_ports } = arguments;
    let options = Options { directory, any_ports, web_port, mqtt_port };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("the system gives no threads: {error}"));
            return ExitCode::from(SYSTEM_ERROR);
        }
    };
    let result = runtime.block_on(serve(options));
    // The thread that reads the keyboard only ends with the next key.
    runtime.shutdown_timeout(Duration::from_millis(50));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&describe(&error));
            ExitCode::from(SYSTEM_ERROR)
        }
    }
}

async fn serve(options: Options) -> Result<(), DemoError> {
    let clock = Clock::start(&run::boot_id());
    let ring = LogRing::new(clock.clone());
    let demo = Demo::prepare(options, &clock).await?;
    log::start(demo.config.log, &clock, &ring);
    let signals = Signals::new().map_err(|source| DemoError::Device { what: "operator", source })?;
    demo.notices.iter().for_each(|notice| say(notice));
    let places = demo.places();
    let running = demo.bind(clock, ring).await?;
    let handle = running.handle();
    let (stop, shutdown) = watch::channel(false);
    let (tell, news) = mpsc::channel(4);
    let keyboard = Keyboard::key_by_key();
    introduce(&places, &keyboard);
    let working = running.run(shutdown, tell);
    tokio::pin!(working);
    let in_background = std::io::stdin().is_terminal() && !keyboard.is_terminal();
    let keys = (!in_background).then(tokio::io::stdin);
    let mut operator = Operator { handle, signals, news, keys };
    tokio::select! {
        () = &mut working => return Ok(()),
        () = operator.until_stop() => {}
    }
    drop(keyboard);
    say("Stopping.");
    let _ = stop.send(true);
    tokio::select! {
        () = &mut working => {}
        () = operator.until_signal() => std::process::exit(STOPPED_AT_ONCE),
    }
    Ok(())
}

fn introduce(places: &Places, keyboard: &Keyboard) {
    let Places { directory, is_temporary, web, mqtt, cloud, cloud_ca } = places;
    let (directory, cloud_ca) = (directory.display(), cloud_ca.display());
    let removed = if *is_temporary { ", removed at the end" } else { "" };
    let (mqtt, cloud) = (mqtt.port(), cloud.port());
    let keys = if keyboard.is_terminal() {
        "Press u to cut the uplink, u again to restore it; q or Ctrl-C stops. The web UI can cut it too."
    } else {
        "The button in the web UI cuts and restores the uplink. Ctrl-C stops."
    };
    say(&format!(
        "
Fieldgate is running with simulated devices, on this machine only.

  Web UI      http://{web}/
  Devices     power meters on Modbus TCP and RTU, a serial scale, a sleeping MQTT-SN sensor
  Values      mosquitto_sub -p {mqtt} -t 'devices/#' -v
  A command   mosquitto_pub -p {mqtt} -t devices/meter/relay/set -m true
  The cloud   mosquitto_sub -h localhost -p {cloud} --cafile {cloud_ca} -t '#' -v
  Files       {directory} (fieldgate.yaml, data/, cloud/{removed})

{keys}
"
    ));
}

/// The person at the terminal.
struct Operator {
    handle: Arc<Handle>,
    signals: Signals,
    news: mpsc::Receiver<String>,
    /// `None` once standard input is at its end, and in the background, where it belongs to the shell.
    keys: Option<Stdin>,
}

impl Operator {
    /// Does what is asked for until that is to stop.
    async fn until_stop(&mut self) {
        loop {
            tokio::select! {
                // A hang-up too: the terminal is gone, and with it whoever would stop the demo.
                _ = self.signals.next() => return,
                Some(news) = self.news.recv() => say(&news),
                key = key(&mut self.keys) => match key {
                    Some(b'q' | b'Q') => return,
                    Some(b'u' | b'U') => self.toggle_uplink(),
                    Some(_) => {}
                    None => self.keys = None,
                },
            }
        }
    }

    async fn until_signal(&mut self) {
        while !matches!(self.signals.next().await, Asked::Stop(_)) {}
    }

    fn toggle_uplink(&self) {
        for upstream in self.handle.upstreams() {
            let paused = !upstream.paused;
            let to = if paused { Switch::Cut } else { Switch::Restore };
            if self.handle.switch_upstream(&upstream.name, to).is_ok() {
                let waiting = upstream.depth.messages;
                say(&match paused {
                    true => "Uplink cut. What is measured now waits in its queue; u restores the uplink.".to_owned(),
                    false => format!("Uplink restored. {waiting} messages waited and are on their way."),
                });
            }
        }
    }
}

/// The next key, or `None` at the end of the input; never, once that has been reached.
async fn key(keys: &mut Option<Stdin>) -> Option<u8> {
    match keys {
        Some(stdin) => stdin.read_u8().await.ok(),
        None => std::future::pending().await,
    }
}
