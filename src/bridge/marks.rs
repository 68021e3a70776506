//! What the bridge writes on the messages that cross it, as user properties (MQTT 5.0 §3.3.2.3.7). Pure.
//!
//! [`HOPS`] counts the bridges that a message has crossed, in either direction. No Local keeps a message from coming
//! back over the connection it went out on; the count ends what goes around by another way, such as two gateways that
//! each have the other as an upstream. 3.1.1 has no user properties: there, the count begins anew.
//!
//! [`TIME`], [`SEQUENCE`] and [`BOOT`] let a consumer prove that nothing is missing: under one boot id each number is one
//! more than the last. Where the boot id changes, the number is at most one more: what the gateway had not delivered when
//! it ended comes under the number it had, and an empty queue starts over. Where rules differ in priority or set a
//! `live_share`, the messages of an upstream come in up to six streams, each numbered by itself: [`STREAM`] says which.

use crate::clock::UnixMillis;
use crate::hub::stream_name;
use crate::message::Properties;
use crate::store;

/// What all names that the bridge writes begin with.
pub(super) const PREFIX: &str = "fieldgate-";
/// The user property with the number of bridges crossed, in decimal digits.
pub(super) const HOPS: &str = "fieldgate-hops";

/// When this gateway accepted the message, as in `2026-05-17T09:30:00.123Z`.
const TIME: &str = "fieldgate-time";
/// Its number in its stream of the upstream's queue; none at QoS 0, which no queue keeps.
const SEQUENCE: &str = "fieldgate-sequence";
/// The stream that the number counts in: `live`, `high`, `high-live`, `low` or `low-live`. It is absent where the message
/// belongs to the stream that every upstream has, and at QoS 0.
const STREAM: &str = "fieldgate-stream";
/// The start of this gateway under which the message was sent.
const BOOT: &str = "fieldgate-boot";

/// Says where and when a message comes from. What an earlier gateway said of itself is replaced.
pub(super) fn set_provenance(properties: &mut Properties, time: UnixMillis, sequence: Option<u64>, boot: &str) {
    properties.user_properties.retain(|(found, _)| !matches!(&**found, SEQUENCE | STREAM));
    set(properties, TIME, &time.to_string());
    if let Some(sequence) = sequence {
        set(properties, SEQUENCE, &store::number(sequence).to_string());
        if let Some(stream) = stream_name(sequence) {
            set(properties, STREAM, stream);
        }
    }
    set(properties, BOOT, boot);
}

/// How many bridges a message has crossed. What is not a number was not written by us and counts as none.
pub(super) fn hops(properties: Option<&Properties>) -> u32 {
    let values = properties.into_iter().flat_map(|properties| &properties.user_properties);
    values.filter(|(name, _)| **name == *HOPS).filter_map(|(_, value)| value.parse().ok()).max().unwrap_or(0)
}

/// Writes `hops` down, in place of what was there.
pub(super) fn set_hops(properties: &mut Properties, hops: u32) {
    set(properties, HOPS, &hops.to_string());
}

/// Writes a user property, in place of those of the same name.
pub(super) fn set(properties: &mut Properties, name: &str, value: &str) {
    properties.user_properties.retain(|(found, _)| **found != *name);
    properties.user_properties.push((name.into(), value.into()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_where_it_stands_and_nothing_of_what_an_earlier_gateway_said() {
        let mut properties = Properties::default();
        let mut check = |sequence, expected: &[(&str, &str)]| {
            set_provenance(&mut properties, UnixMillis(0), sequence, "b7");
            let found = properties.user_properties.iter().map(|(name, value)| (&**name, &**value));
            assert_eq!(found.collect::<Vec<_>>(), expected);
        };
        let (time, boot) = (("fieldgate-time", "1970-01-01T00:00:00.000Z"), ("fieldgate-boot", "b7"));
        let high = store::first_sequence(2) + 5;
        check(Some(high), &[time, ("fieldgate-sequence", "5"), ("fieldgate-stream", "high"), boot]);
        check(Some(6), &[time, ("fieldgate-sequence", "6"), boot]);
        check(None, &[time, boot]);
    }

    #[test]
    fn hops_are_counted_in_one_property_among_the_others() {
        let check = |values: &[(&str, &str)], expected: u32| {
            let user_properties = values.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
            let mut properties = Properties { user_properties, ..Properties::default() };
            assert_eq!(hops(Some(&properties)), expected, "{values:?}");
            set_hops(&mut properties, expected + 1);
            assert_eq!(hops(Some(&properties)), expected + 1);
            let names = properties.user_properties.iter().filter(|(name, _)| **name == *HOPS);
            assert_eq!(names.count(), 1, "{values:?}");
        };
        check(&[], 0);
        check(&[("unit", "V"), (HOPS, "3")], 3);
        check(&[(HOPS, "2"), (HOPS, "7"), ("unit", "V")], 7);
        check(&[(HOPS, "many"), (HOPS, "-1"), (HOPS, "99999999999")], 0);
        assert_eq!(hops(None), 0);
    }
}
