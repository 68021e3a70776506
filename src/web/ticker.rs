//! The web floor's own beat: samples queues and traffic once a second, and tells listeners what changed.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Level;

use super::uplinks::{SAMPLE_INTERVAL, Uplinks};
use super::views::Traffic;
use super::{App, api};

/// How long a changed value or a log line waits to be sent together with others.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);
/// Without a change, the status is sent this often, so that a browser can tell a quiet gateway from a broken cable.
const BEAT: u32 = 10;
/// Seconds of traffic kept: five minutes.
const TRAFFIC_HISTORY: usize = 300;
/// Log lines in one event; when more were written in between, the oldest of them are not sent.
const MAX_LINES: usize = 200;

/// What is sampled once a second.
#[derive(Default)]
pub struct Samples {
    pub uplinks: Uplinks,
    last: Option<Traffic>,
    /// Messages received and sent in each second, oldest first.
    pub traffic: VecDeque<(u64, u64)>,
}

impl Samples {
    fn take_traffic(&mut self, now: Traffic) {
        if let Some(last) = self.last.replace(now) {
            if self.traffic.len() == TRAFFIC_HISTORY {
                self.traffic.pop_front();
            }
            let in_between = |now: u64, then: u64| now.saturating_sub(then);
            self.traffic.push_back((in_between(now.received, last.received), in_between(now.sent, last.sent)));
        }
    }

    /// Messages per second received and sent, over the last five seconds.
    pub fn rates(&self) -> (f64, f64) {
        let samples = self.traffic.len().min(5);
        let sum = self.traffic.iter().rev().take(samples).fold((0, 0), |sum, now| (sum.0 + now.0, sum.1 + now.1));
        let seconds = samples.max(1) as f64 * SAMPLE_INTERVAL.as_secs_f64();
        (sum.0 as f64 / seconds, sum.1 as f64 / seconds)
    }
}

/// Runs until `shutdown`, then ends the live streams.
pub async fn run(app: &App, mut shutdown: watch::Receiver<bool>) {
    let mut beat = Beat::default();
    let work = async {
        let mut next_sample = Instant::now();
        loop {
            let now = Instant::now();
            if now >= next_sample {
                next_sample = now + SAMPLE_INTERVAL;
                sample(app);
                beat.slow(app);
            }
            beat.quick(app);
            let flush = if app.feed.is_wanted() { now + FLUSH_INTERVAL } else { next_sample };
            tokio::time::sleep_until(flush.min(next_sample)).await;
        }
    };
    let mut work = pin!(work);
    tokio::select! {
        () = &mut work => {}
        // An error means that the sender is gone, which is the end too.
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
    app.feed.close();
}

fn sample(app: &App) {
    let upstreams = app.parts.controls.upstreams();
    let traffic = Traffic::of(&app.parts.hub);
    let mut samples = app.samples.lock();
    samples.uplinks.sample(upstreams.into_iter().map(|upstream| (upstream.name, upstream.depth)));
    samples.take_traffic(traffic);
}

/// What listeners were told last.
#[derive(Default)]
struct Beat {
    components: String,
    upstreams: String,
    quiet: u32,
    last_line: u64,
}

impl Beat {
    /// Values and log lines.
    fn quick(&mut self, app: &App) {
        let last_line = app.parts.log.last();
        let lines_after = std::mem::replace(&mut self.last_line, last_line);
        if !app.feed.is_wanted() {
            app.values.forget_changes();
            return;
        }
        let changes = app.values.take_changes();
        if changes.incomplete {
            app.feed.send("reload", &json!({}));
        } else {
            if !changes.values.is_empty() {
                app.feed.send("values", &changes.values);
            }
            if !changes.gone.is_empty() {
                app.feed.send("gone", &changes.gone);
            }
        }
        if last_line > lines_after {
            let lines = app.parts.log.after(lines_after, Level::DEBUG, MAX_LINES);
            // A line written since `last` was asked comes next time.
            let lines: Vec<_> = lines.iter().filter(|line| line.sequence <= last_line).map(|line| &**line).collect();
            if !lines.is_empty() {
                app.feed.send("log", &lines);
            }
        }
    }

    /// The state of components and upstreams, once a second.
    fn slow(&mut self, app: &App) {
        app.feed.keep(|login| app.logins.user(login, std::time::Instant::now()).is_some());
        if !app.feed.is_wanted() {
            return;
        }
        let status = api::status(app);
        let upstreams = api::upstreams(app, api::With::Latest);
        let components = serde_json::to_string(&status.components).unwrap_or_default();
        let upstreams_text = serde_json::to_string(&upstreams).unwrap_or_default();
        self.quiet += 1;
        if components != self.components || self.quiet >= BEAT {
            self.quiet = 0;
            self.components = components;
            app.feed.send("status", &status);
        }
        if upstreams_text != self.upstreams {
            self.upstreams = upstreams_text;
            app.feed.send("upstreams", &upstreams);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_over_the_last_seconds_and_history_is_bounded() {
        let mut samples = Samples::default();
        assert_eq!(samples.rates(), (0.0, 0.0));
        for second in 0..400u64 {
            let received = if second < 398 { 0 } else { (second - 397) * 10 };
            samples.take_traffic(Traffic { received, sent: second * 3, dropped: 0 });
        }
        assert_eq!(samples.rates(), (4.0, 3.0));
        assert_eq!(samples.traffic.len(), TRAFFIC_HISTORY);
        samples.take_traffic(Traffic::default());
        assert_eq!(samples.traffic.back(), Some(&(0, 0)), "a counter that was reset is no traffic");
    }
}
