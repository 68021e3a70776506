//! What the operating system knows of another process: memory, time on the processor, bytes to the disk.

use std::fs;
use std::time::Duration;

/// Resident memory, in KiB.
pub fn rss_kib(pid: u32) -> i64 {
    status_kib(pid, "VmRSS:")
}

/// The most resident memory since the start or since [`forget_peak`], in KiB.
pub fn peak_rss_kib(pid: u32) -> i64 {
    status_kib(pid, "VmHWM:")
}

/// Makes the memory of now the peak.
pub fn forget_peak(pid: u32) {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").expect("a process of ours");
}

/// Bytes that had to go to the disk. A page that is written again before it got there counts once.
pub fn disk_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).expect("a process of ours");
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|number| number.parse().ok()).expect("a number of bytes")
}

/// How often its threads have gone to sleep, which is how often they were woken.
pub fn wakeups(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process of ours");
    let of_task = |task: std::io::Result<fs::DirEntry>| -> Option<u64> {
        let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()
    };
    tasks.filter_map(of_task).sum()
}

/// Time on the processor, of all threads.
pub fn cpu_time(pid: u32) -> Duration {
    const TICKS_PER_SECOND: f64 = 100.0;
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the broker runs");
    // After the name, which may hold spaces: state is the third field, user and system time are the 14th and 15th.
    let fields: Vec<_> = text[text.rfind(')').expect("a name")..].split(' ').collect();
    let ticks = |field: usize| fields[field - 2].parse::<f64>().expect("ticks");
    Duration::from_secs_f64((ticks(14) + ticks(15)) / TICKS_PER_SECOND)
}

fn status_kib(pid: u32, key: &str) -> i64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the broker runs");
    let line = status.lines().find(|line| line.starts_with(key)).expect("a line of the status");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number of kB")
}
