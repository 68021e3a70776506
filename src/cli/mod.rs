//! The command line: what can be asked for, and what the answer is worth.
//!
//! Exit codes: 0 all is well, 1 the user's error (arguments, configuration), 2 the system's (a port that is taken, a
//! missing permission, a full disk).

mod check;
mod demo;
mod log;
mod passwd;
mod prove;
mod run;
mod signals;
mod store;
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Where the configuration is if nobody says otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/fieldgate/fieldgate.yaml";

/// The user's error: arguments or configuration.
pub(crate) const USER_ERROR: u8 = 1;
/// The system's error: ports, permissions, disks.
pub(crate) const SYSTEM_ERROR: u8 = 2;

#[derive(Parser)]
#[command(
    name = "fieldgate",
    version,
    about = "The gateway between field devices and a cloud broker: MQTT broker, MQTT-SN, Modbus and serial adapters, \
             durable store-and-forward, web UI.",
    after_help = "\
Examples:
  fieldgate demo                             try everything, with simulated devices and a cloud
  fieldgate check --config fieldgate.yaml    what is wrong with a configuration, or what it runs
  fieldgate run --config fieldgate.yaml      run the gateway; Ctrl-C stops it, SIGHUP reloads
  fieldgate passwd operator                  make a `users:` entry for the configuration
  fieldgate keys upstreams                   explain the keys of a section of the configuration

Exit codes: 0 all is well, 1 the configuration or the arguments are wrong, 2 the system refuses (port, permission, disk),
130 a second signal ended it before it had drained."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway until SIGTERM or Ctrl-C.
    ///
    /// SIGHUP reads the configuration again and applies what has changed: clients, buses and upstreams that did not
    /// change stay connected. A wrong configuration changes nothing. A second SIGTERM or Ctrl-C ends at once.
    Run(ConfigFile),
    /// Run a gateway with simulated devices and a cloud, to see what it does.
    ///
    /// Nothing outside this machine is touched. Ports that are taken are replaced by free ones.
    Demo(demo::Arguments),
    /// Check configurations and say what they will run. Changes nothing, opens no port.
    Check {
        /// The configuration files, where there are several.
        #[arg(value_name = "FILE", conflicts_with = "config")]
        files: Vec<PathBuf>,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Explain the keys of the configuration: type, default and meaning.
    Keys {
        /// Only keys that begin with this, as in `upstreams` or `modbus.devices`; where none does, those that hold it.
        prefix: Option<String>,
    },
    /// Show, verify, export or purge the database of queued messages.
    #[command(after_help = "\
Examples:
  fieldgate store show                       what waits for whom, also while the gateway runs
  fieldgate store export cloud > cloud.jsonl the messages that wait for the upstream `cloud`
  fieldgate store verify -d fieldgate.db     is a database whole?")]
    Store(store::Arguments),
    /// Prove from a subscriber's record that no message is missing.
    ///
    /// The record is what mosquitto_sub writes, or a payload a line, with the numbers that `provenance` on an upstream's
    /// rules gives to messages; of one gateway or several. Ends with 0 where nothing is missing, out of order or twice at
    /// QoS 2, else with 1.
    #[command(after_help = "\
Examples:
  mosquitto_sub -V 5 -q 1 -c -i recorder -t 'plant-7/#' -F '%j' > record.jsonl
  fieldgate prove record.jsonl               are there gaps?
  fieldgate prove record.jsonl -t '+/alarms/#'
                                             and what came on these topics?
  fieldgate prove --format json < record.jsonl")]
    Prove(prove::Arguments),
    /// Hash a password for the `users:` section.
    ///
    /// Asks for the password, or reads the first line of standard input where that is not a terminal.
    #[command(after_help = "\
Examples:
  fieldgate passwd operator                  prints an entry for `users:`
  fieldgate passwd operator --file operator.hash
                                             writes the hash to a file; `password_hash: file:operator.hash`
  echo secret | fieldgate passwd operator    without a terminal")]
    Passwd(passwd::Arguments),
}

#[derive(clap::Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(short, long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
}

/// Does what the arguments say.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USER_ERROR } else { 0 });
        }
    };
    match cli.command {
        Command::Run(ConfigFile { config }) => run::run(&config),
        Command::Demo(arguments) => demo::demo(arguments),
        Command::Check { files, config: ConfigFile { config } } => {
            check::check(if files.is_empty() { std::slice::from_ref(&config) } else { &files })
        }
        Command::Keys { prefix } => check::keys(prefix.as_deref().unwrap_or_default()),
        Command::Store(arguments) => store::store(arguments),
        Command::Prove(arguments) => prove::prove(&arguments),
        Command::Passwd(arguments) => passwd::passwd(&arguments),
    }
}
