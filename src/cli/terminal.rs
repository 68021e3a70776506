//! Standard output and error as a person or a pipe sees them, and a keyboard without echo.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rustix::process::getpgrp;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

use crate::config::report::{Look, Reports};

/// Prints a line to standard output. A reader that went away, as `head`, is no error.
pub fn say(text: &str) {
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// Prints a line to standard error.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Text of a peer, which must not command the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}

/// Prints reports to standard error, in colour where a person reads them.
pub fn show_reports(reports: &Reports) {
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let look = if colours { Look::Styled } else { Look::Plain };
    let _ = write!(io::stderr().lock(), "{}", reports.render(look));
}

/// Standard input without some of the terminal's services, until dropped.
pub struct Keyboard(Option<Termios>);

impl Keyboard {
    /// Does not show what is typed; does nothing where standard input is no terminal.
    pub fn without_echo() -> Self {
        Self::without(LocalModes::ECHO)
    }

    /// Gives every key at once and does not show it; Ctrl-C still interrupts. Does nothing in the background of a
    /// shell, where whoever asks something of the terminal is stopped.
    pub fn key_by_key() -> Self {
        if tcgetpgrp(io::stdin().as_fd()).is_ok_and(|foreground| foreground != getpgrp()) {
            return Self(None);
        }
        Self::without(LocalModes::ECHO | LocalModes::ICANON)
    }

    pub fn is_terminal(&self) -> bool {
        self.0.is_some()
    }

    fn without(modes: LocalModes) -> Self {
        let stdin = io::stdin();
        let Ok(before) = tcgetattr(stdin.as_fd()) else { return Self(None) };
        let mut changed = before.clone();
        changed.local_modes.remove(modes);
        let done = tcsetattr(stdin.as_fd(), OptionalActions::Now, &changed);
        Self(done.is_ok().then_some(before))
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Now, before);
        }
    }
}
