//! Which gateways a message has been at, written on the message itself: what ends circles between bridges. Pure.
//!
//! [`VIA`] is a user property (MQTT 5.0 §3.3.2.3.7), named after the header of HTTP that does the same (RFC 9110 §7.6.3): the
//! entries of the gateways in the order in which they had the message, separated by commas. An entry is a [`GatewayId`] and
//! four characters made from the topic that the message has there. The topic counts because programs copy user properties
//! from the message they react to: a command that is made from a reading, under another topic, has not been anywhere yet.
//! 3.1.1 has no user properties: there, what is known of a message ends with the gateway before.

use data_encoding::BASE64URL_NOPAD;

use crate::message::{Message, Properties};

/// The user property of a message.
pub const VIA: &str = "fieldgate-via";
/// The user property of CONNECT and CONNACK with the [`GatewayId`] of who sends it.
pub const ID: &str = "fieldgate-id";
/// Where a bridge asks for the id of a gateway over 3.1.1, and says its own.
pub const ID_TOPIC: &str = "$SYS/fieldgate/id";

/// The longest list that is carried on, in bytes: bridges end what has crossed `max_hops` of them long before.
const MAX_LIST_BYTES: usize = 8 * 1024;

/// One start of one gateway, in eight characters.
///
/// Not its name, nor anything that is kept on its disk: disks are cloned, and two gateways of one id would take each
/// other's messages for their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatewayId([u8; 8]);

impl GatewayId {
    /// Of the start with this boot id: 48 bits of it.
    pub fn of_boot(boot_id: &str) -> Self {
        let hash = hash(boot_id);
        let folded = hash ^ (hash >> 48);
        let mut text = [0; 8];
        BASE64URL_NOPAD.encode_mut(&folded.to_be_bytes()[2..], &mut text);
        Self(text)
    }

    /// What a peer says; `None` where it is no such id.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes().try_into().ok()?;
        let is_known = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        text.as_bytes().iter().all(is_known).then_some(Self(bytes))
    }

    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.0).expect("ASCII only")
    }

    /// As a number, which is not zero.
    pub fn to_bits(self) -> u64 {
        u64::from_be_bytes(self.0)
    }

    /// From [`GatewayId::to_bits`]; zero is none.
    pub fn from_bits(bits: u64) -> Option<Self> {
        (bits != 0).then(|| Self(bits.to_be_bytes()))
    }
}

/// What the bridge of a gateway says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Introduction {
    pub gateway: GatewayId,
    /// Whether all that it fetches is called at its gateway as it is called here.
    pub keeps_names: bool,
}

impl Introduction {
    /// As it stands in [`ID`] and on [`ID_TOPIC`].
    pub fn to_text(self) -> String {
        format!("{}{}", self.gateway.as_str(), if self.keeps_names { KEEPS_NAMES } else { "" })
    }

    /// What a peer says; words behind the id that are not known say nothing.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, rest) = text.split_at_checked(8)?;
        let is_whole = rest.is_empty() || rest.starts_with(' ');
        let gateway = GatewayId::parse(id).filter(|_| is_whole)?;
        Some(Self { gateway, keeps_names: rest == KEEPS_NAMES })
    }
}

/// The word for [`Introduction::keeps_names`].
const KEEPS_NAMES: &str = " keeps-names";

/// Whether a message has been at `gateway` under this topic.
pub fn has_been_at(gateway: GatewayId, topic: &str, properties: Option<&Properties>) -> bool {
    list(properties).is_some_and(|list| list.split(',').any(|found| found.as_bytes() == entry(gateway, topic)))
}

/// Whether a message that is at this gateway has been at `other` before: that one does not want it back.
pub fn came_by(other: GatewayId, message: &Message) -> bool {
    list(message.properties.as_deref())
        .is_some_and(|list| mentions(list, other) && is_about(list, message.topic.as_str()))
}

/// Whether a message says anything about where it has been.
pub fn is_told(properties: Option<&Properties>) -> bool {
    list(properties).is_some()
}

/// Notes that a message is at the gateway `here` under `topic`, and came `from` there, if that is known. Where it says
/// already that it was here under this topic, it stays as it is.
pub fn note(here: GatewayId, from: Option<GatewayId>, topic: &str, properties: &mut Properties) {
    if has_been_at(here, topic, Some(properties)) {
        return;
    }
    // A list that is about another topic was copied from another message, unless a gateway has sent it under that name.
    let is_its_own = |list: &&str| !mentions(list, here) && (from.is_some() || is_about(list, topic));
    let kept = list(Some(properties)).filter(is_its_own).filter(|list| list.len() <= MAX_LIST_BYTES);
    let mut list = kept.unwrap_or_default().to_owned();
    let sender = from.filter(|from| !mentions(&list, *from));
    for gateway in sender.into_iter().chain([here]) {
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(str::from_utf8(&entry(gateway, topic)).expect("ASCII only"));
    }
    properties.set_user(VIA, &list);
}

/// As [`note`], for `properties` that serve for one message of this gateway after another: nothing is allocated for the
/// second.
pub fn note_next(here: GatewayId, topic: &str, properties: &mut Properties) {
    match properties.user_properties.iter_mut().find(|(name, _)| **name == *VIA) {
        Some((_, list)) => {
            let mut text = String::from(std::mem::take(list));
            text.clear();
            text.push_str(str::from_utf8(&entry(here, topic)).expect("ASCII only"));
            *list = text.into_boxed_str();
        }
        None => note(here, None, topic, properties),
    }
}

fn list(properties: Option<&Properties>) -> Option<&str> {
    let (_, list) = properties?.user_properties.iter().find(|(name, _)| **name == *VIA)?;
    Some(list)
}

fn mentions(list: &str, gateway: GatewayId) -> bool {
    list.split(',').any(|found| found.as_bytes().starts_with(&gateway.0))
}

/// Whether the last gateway had the message under this topic.
fn is_about(list: &str, topic: &str) -> bool {
    list.as_bytes().last_chunk().is_some_and(|last: &[u8; 4]| *last == tag(topic))
}

fn entry(gateway: GatewayId, topic: &str) -> [u8; 12] {
    let mut entry = [0; 12];
    let (id, rest) = entry.split_at_mut(8);
    id.copy_from_slice(&gateway.0);
    rest.copy_from_slice(&tag(topic));
    entry
}

/// 24 bits of the topic.
fn tag(topic: &str) -> [u8; 4] {
    let hash = hash(topic);
    let folded = hash ^ (hash >> 24) ^ (hash >> 48);
    let mut text = [0; 4];
    BASE64URL_NOPAD.encode_mut(&folded.to_be_bytes()[5..], &mut text);
    text
}

/// FNV-1a, which every release computes alike.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;
    use crate::message::QoS;
    use crate::topic::TopicName;

    fn id(boot_id: &str) -> GatewayId {
        GatewayId::of_boot(boot_id)
    }

    fn message(topic: &str, properties: &Properties) -> Message {
        let topic = TopicName::new(topic).unwrap();
        let message = Message::new(topic, "x", QoS::AtMostOnce, UnixMillis(0));
        Message { properties: Some(Box::new(properties.clone())), ..message }
    }

    #[test]
    fn an_id_is_eight_characters_that_are_read_back_and_nothing_else_is() {
        let known = id("9f86d081884c7d65");
        assert_eq!(GatewayId::parse(known.as_str()), Some(known));
        assert_eq!(GatewayId::from_bits(known.to_bits()), Some(known));
        assert_eq!(GatewayId::from_bits(0), None);
        assert_ne!(known, id("9f86d081884c7d66"));
        for text in ["", "short", "too-long-for-it", "with,com", "with spc", "umlautä"] {
            assert_eq!(GatewayId::parse(text), None, "{text}");
            assert_eq!(Introduction::parse(text), None, "{text}");
        }
        for keeps_names in [false, true] {
            let said = Introduction { gateway: known, keeps_names };
            assert_eq!(Introduction::parse(&said.to_text()), Some(said));
        }
        let newer = format!("{} knows-more", known.as_str());
        assert_eq!(Introduction::parse(&newer), Some(Introduction { gateway: known, keeps_names: false }));
    }

    #[test]
    fn a_message_tells_of_every_gateway_that_had_it_and_is_noted_once() {
        let mut properties = Properties::default();
        properties.set_user("unit", "V");
        assert!(!is_told(Some(&properties)) && !is_told(None));
        for _ in 0..2 {
            note(id("a"), None, "devices/m", &mut properties);
        }
        // Under another name, as the rules of the next one say.
        note(id("b"), Some(id("a")), "plant/devices/m", &mut properties);
        let list = list(Some(&properties)).unwrap();
        let mut next = Properties::default();
        for topic in ["x", "devices/m"] {
            note_next(id("a"), topic, &mut next);
        }
        assert!(list.starts_with(super::list(Some(&next)).unwrap()), "{list}");
        assert_eq!((list.len(), list.split(',').count(), properties.user_properties.len()), (25, 2, 2), "{list}");
        assert!(has_been_at(id("a"), "devices/m", Some(&properties)));
        assert!(has_been_at(id("b"), "plant/devices/m", Some(&properties)));
        assert!(!has_been_at(id("a"), "plant/devices/m", Some(&properties)));
        assert!(!has_been_at(id("c"), "devices/m", Some(&properties)));
        let here = message("plant/devices/m", &properties);
        assert!(came_by(id("a"), &here) && came_by(id("b"), &here) && !came_by(id("c"), &here));
    }

    #[test]
    fn what_a_program_makes_of_a_message_has_not_been_anywhere() {
        let mut properties = Properties::default();
        note(id("a"), None, "devices/m", &mut properties);
        note(id("b"), Some(id("a")), "devices/m", &mut properties);
        // A command with the user properties of the reading that it answers.
        assert!(!came_by(id("a"), &message("devices/lamp/set", &properties)));
        assert!(!has_been_at(id("a"), "devices/lamp/set", Some(&properties)));
        for gateway in ["b", "c"] {
            let mut copied = properties.clone();
            note(id(gateway), None, "devices/lamp/set", &mut copied);
            let command = message("devices/lamp/set", &copied);
            assert!(came_by(id(gateway), &command) && !came_by(id("a"), &command), "{gateway}");
        }
    }

    #[test]
    fn over_3_1_1_the_sender_is_noted_and_a_restarted_gateway_keeps_what_it_noted_before() {
        let mut properties = Properties::default();
        note(id("b"), Some(id("a")), "devices/m", &mut properties);
        note(id("b, restarted"), None, "devices/m", &mut properties);
        let here = message("devices/m", &properties);
        assert!(["a", "b", "b, restarted"].iter().all(|gateway| came_by(id(gateway), &here)));
    }

    #[test]
    fn what_peers_write_there_neither_grows_nor_breaks_anything() {
        for list in ["", ",", "nonsense", "ä", "aaaaaaaabbbb,,", &"aaaaaaaabbbb,".repeat(10_000)] {
            for from in [None, Some(id("a"))] {
                let mut properties = Properties::default();
                properties.set_user(VIA, list);
                note(id("b"), from, "devices/m", &mut properties);
                assert!(has_been_at(id("b"), "devices/m", Some(&properties)), "{list}");
                assert!(properties.size() <= MAX_LIST_BYTES + 40, "{list}");
            }
        }
    }
}
