//! Starting and stopping the brokers, each in a process of its own with a directory of its own.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Mosquitto,
    Rumqttd,
    Fieldgate,
}

pub const ALL: [Kind; 3] = [Kind::Mosquitto, Kind::Rumqttd, Kind::Fieldgate];

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Mosquitto => "mosquitto",
            Self::Rumqttd => "rumqttd",
            Self::Fieldgate => "fieldgate",
        }
    }
}

/// A running broker; killed when dropped.
pub struct Broker {
    child: Child,
    directory: PathBuf,
    pub address: SocketAddr,
}

impl Broker {
    pub fn start(kind: Kind, fieldgate: &Path) -> Self {
        let port = free_port();
        let directory = std::env::temp_dir().join(format!("fieldgate-bench-{}-{port}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        let config = directory.join("config");
        let mut command = match kind {
            Kind::Mosquitto => {
                let text = format!(
                    "listener {port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 100\n\
                     max_queued_messages 0\nset_tcp_nodelay true\npersistence false\nlog_type error\n"
                );
                fs::write(&config, text).expect("a configuration");
                let mut command = Command::new("mosquitto");
                command.arg("-c").arg(&config);
                command
            }
            Kind::Rumqttd => {
                let mut command = Command::new(std::env::current_exe().expect("this program"));
                command.args(["rumqttd", &port.to_string()]);
                command
            }
            Kind::Fieldgate => {
                let text = format!(
                    "gateway: {{ name: bench }}\nlog: {{ level: warn }}\nstore: {{ directory: \"{}\" }}\n\
                     limits: {{ max_connections: 20000 }}\n\
                     listeners: [ {{ name: bench, address: \"127.0.0.1:{port}\" }} ]\n",
                    directory.join("data").display()
                );
                fs::write(&config, text).expect("a configuration");
                let mut command = Command::new(fieldgate);
                command.args(["run", "--config"]).arg(&config);
                command
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{} does not start: {error}", kind.name()));
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut broker = Self { child, directory, address };
        broker.wait_until_ready(kind);
        broker
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_until_ready(&mut self, kind: Kind) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(self.address).is_err() {
            let ended = self.child.try_wait().expect("the broker's state");
            assert!(ended.is_none(), "{} ended at once: {ended:?}", kind.name());
            assert!(Instant::now() < deadline, "{} does not listen", kind.name());
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(200));
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}
