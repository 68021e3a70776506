//! What the bridge writes on the messages that cross it, as user properties (MQTT 5.0 §3.3.2.3.7). Pure.
//!
//! [`HOPS`] counts the bridges that a message has crossed, in either direction. No Local keeps a message from coming
//! back over the connection it went out on; the count ends what goes around by another way, such as two gateways that
//! each have the other as an upstream. 3.1.1 has no user properties: there, the count begins anew.

use crate::message::Properties;

/// What all names that the bridge writes begin with.
pub(super) const PREFIX: &str = "fieldgate-";
/// The user property with the number of bridges crossed, in decimal digits.
pub(super) const HOPS: &str = "fieldgate-hops";

/// How many bridges a message has crossed. What is not a number was not written by us and counts as none.
pub(super) fn hops(properties: Option<&Properties>) -> u32 {
    let values = properties.into_iter().flat_map(|properties| &properties.user_properties);
    values.filter(|(name, _)| **name == *HOPS).filter_map(|(_, value)| value.parse().ok()).max().unwrap_or(0)
}

/// Writes `hops` down, in place of what was there.
pub(super) fn set_hops(properties: &mut Properties, hops: u32) {
    properties.set_user(HOPS, &hops.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

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
