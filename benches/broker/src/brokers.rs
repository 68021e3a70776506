//! Starting and stopping the brokers, each in a process of its own with a directory of its own.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

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

    /// What stands in a broker's configuration if nothing else is asked of it, for one that listens on `port`.
    fn configuration(self, port: u16, data: &Path) -> String {
        match self {
            Self::Mosquitto => format!("max_inflight_messages 100\nmax_queued_messages 0\n{}", mosquitto_basics(port)),
            Self::Rumqttd => String::new(),
            Self::Fieldgate => format!(
                "gateway: {{ name: bench }}\nlog: {{ level: warn }}\nstore: {{ directory: \"{}\" }}\n\
                 limits: {{ max_connections: 20000 }}\nweb: {{ enabled: false }}\n\
                 listeners: [ {{ name: bench, address: \"127.0.0.1:{port}\" }} ]\n",
                data.display()
            ),
        }
    }
}

/// The lines that every mosquitto here has.
pub fn mosquitto_basics(port: u16) -> String {
    format!(
        "listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\npersistence false\nlog_type error\n"
    )
}

/// A running broker; killed when dropped, its directory deleted.
pub struct Broker {
    kind: Kind,
    fieldgate: PathBuf,
    child: Child,
    pub directory: PathBuf,
    pub address: SocketAddr,
}

impl Broker {
    pub fn start(kind: Kind, fieldgate: &Path) -> Self {
        Self::start_with(kind, fieldgate, |port, data| kind.configuration(port, data))
    }

    /// `configuration` makes the text from the port to listen on and the directory for data.
    pub fn start_with(kind: Kind, fieldgate: &Path, configuration: impl FnOnce(u16, &Path) -> String) -> Self {
        Self::start_at(kind, fieldgate, free_port(), configuration)
    }

    pub fn start_at(kind: Kind, fieldgate: &Path, port: u16, configuration: impl FnOnce(u16, &Path) -> String) -> Self {
        let directory = std::env::temp_dir().join(format!("fieldgate-bench-{}-{port}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        fs::write(directory.join("config"), configuration(port, &directory.join("data"))).expect("a configuration");
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let child = spawn(kind, fieldgate, &directory, port);
        let mut broker = Self { kind, fieldgate: fieldgate.into(), child, directory, address };
        broker.wait_until_ready(Duration::from_millis(20));
        thread::sleep(Duration::from_millis(200));
        broker
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Holds the process still until [`Broker::thaw`].
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("a process of ours");
    }

    /// Ends the process as a power cut would. `meanwhile` sees the directory before it is started again; returns how
    /// long the new one took until it listened.
    pub fn restart(&mut self, meanwhile: impl FnOnce(&Path)) -> Duration {
        self.child.kill().expect("the broker is killed");
        self.child.wait().expect("the broker ends");
        meanwhile(&self.directory);
        let started = Instant::now();
        self.child = spawn(self.kind, &self.fieldgate, &self.directory, self.address.port());
        self.wait_until_ready(Duration::from_millis(1));
        started.elapsed()
    }

    fn wait_until_ready(&mut self, interval: Duration) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(self.address).is_err() {
            let ended = self.child.try_wait().expect("the broker's state");
            assert!(ended.is_none(), "{} ended at once: {ended:?}", self.kind.name());
            assert!(Instant::now() < deadline, "{} does not listen", self.kind.name());
            thread::sleep(interval);
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn spawn(kind: Kind, fieldgate: &Path, directory: &Path, port: u16) -> Child {
    let config = directory.join("config");
    let mut command = match kind {
        Kind::Mosquitto => {
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
            let mut command = Command::new(fieldgate);
            command.args(["run", "--config"]).arg(&config);
            command
        }
    };
    let log = fs::File::create(directory.join("log")).expect("a log");
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    child.unwrap_or_else(|error| panic!("{} does not start: {error}", kind.name()))
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}
