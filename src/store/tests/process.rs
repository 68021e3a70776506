//! A process that is killed while it writes: whatever it said was kept is there.
//!
//! The test starts its own binary again as the victim, which writes as fast as it can and prints a line after each
//! receipt; then it kills the victim at a random moment and opens what is left.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use super::*;

const VICTIM: &str = "FIELDGATE_STORE_VICTIM";

/// Not a test: the process that is killed. It does nothing where the test has not started it.
#[test]
fn victim() {
    let Ok(directory) = std::env::var(VICTIM) else { return };
    let mut opened = open(Path::new(&directory));
    let last = opened.sessions().unwrap().first().and_then(|session| session.queues[0].last).unwrap_or(0);
    let store = opened.run().unwrap();
    keep(&store, vec![put(S)]);
    let mut out = std::io::stdout().lock();
    // The test harness has begun a line of its own.
    writeln!(out).unwrap();
    let mut waiting: Vec<(String, Arc<Receipt>)> = Vec::new();
    for sequence in last + 1.. {
        let written = receipt();
        let payload = vec![sequence as u8; sequence as usize % 600];
        store.submit(&mut vec![enqueue(S, sequence, message("t", payload), Some(written.clone()))], Due::Now);
        waiting.push((format!("+{sequence}"), written));
        if sequence % 3 == 0 {
            // A removal is not acknowledged to anybody; the receipt of what follows says that it is in.
            let removed = receipt();
            let packet_id = sequence as u16;
            let mut ops = vec![
                Op::remove(S, sequence - 2),
                Op::RemoveInbound { session: S, packet_id, receipt: Some(removed.clone()) },
            ];
            writeln!(out, "?{}", sequence - 2).unwrap();
            store.submit(&mut ops, Due::Soon);
            waiting.push((format!("-{}", sequence - 2), removed));
        }
        while waiting.len() > 50 {
            settled(&waiting[0].1);
            waiting.retain(|(line, receipt)| match receipt.state() {
                ReceiptState::Pending => true,
                state => {
                    assert_eq!(state, ReceiptState::Done);
                    writeln!(out, "{line}").unwrap();
                    false
                }
            });
            out.flush().unwrap();
        }
    }
}

#[test]
fn what_was_kept_survives_kill_9() {
    let directory = TempDir::new().unwrap();
    let (mut kept, mut removed, mut removing) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let rounds = std::env::var("FIELDGATE_CRASH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    for round in 0..rounds {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::process::victim", "--nocapture", "--test-threads=1"])
            .env(VICTIM, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(victim.stdout.take().unwrap());
        let mut left = 100 + round * 37 % 400;
        let mut line = String::new();
        // Past the kill, what is still in the pipe was said too.
        while output.read_line(&mut line).unwrap() > 0 {
            let number = |text: &str| text.parse::<u64>().unwrap();
            // A line that the kill has cut is no promise: half a number would be another one.
            match line.strip_suffix('\n').and_then(|line| line.split_at_checked(1)) {
                Some(("+", text)) => _ = kept.insert(number(text)),
                Some(("-", text)) => _ = removed.insert(number(text)),
                Some(("?", text)) => _ = removing.insert(number(text)),
                // What the test harness says of itself.
                _ => left += 1,
            }
            line.clear();
            left -= 1;
            if left == 0 {
                victim.kill().unwrap();
            }
        }
        let status = victim.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "round {round}: the victim ended by itself: {status}");
        let opened = open(directory.path());
        assert_eq!(opened.quarantined(), None, "round {round}");
        let store = opened.run().unwrap();
        let there: BTreeSet<u64> = sequences(&store, S).into_iter().collect();
        store.close();
        let lost: Vec<_> = kept.iter().filter(|&at| !there.contains(at) && !removing.contains(at)).collect();
        assert!(lost.is_empty(), "round {round}: {lost:?} were kept and are lost");
        let risen: Vec<_> = removed.intersection(&there).collect();
        assert!(risen.is_empty(), "round {round}: {risen:?} were removed and are back");
        assert_eq!(inspect::verify(directory.path()).unwrap().findings, Vec::<String>::new());
    }
    assert!(kept.len() > 100);
}
