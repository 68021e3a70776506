//! What an upstream's refusals mean and what to do about them, in words. Pure.

use crate::proto::mqtt::ReasonCode;

/// A message was dropped because it had crossed too many bridges.
pub(super) const LOOPED: &str = "a message has crossed as many bridges as `max_hops` allows and was not forwarded; it goes \
                                in circles, check the `in` and `out` rules of the gateways it passes";

/// A message was dropped because its user property [`crate::via::VIA`] says that it was here before.
pub(super) const RETURNED: &str = "a message that was at this gateway before has come back and was not taken again; it goes in \
                                  circles, check the `in` and `out` rules of the gateways it passes";

/// The upstream has our own id.
pub(super) const ITSELF: &str = "this upstream is this gateway itself; set `url` to the address of another broker";

/// The upstream is a gateway that is spoken to in MQTT 3.1.1.
pub(super) const OLD_TO_GATEWAY: &str = "the upstream is a Fieldgate and is spoken to in MQTT 3.1.1, in which messages cannot say \
                                        which gateways they have been at: circles over three gateways and more do not end; \
                                        take `version: 3.1.1` out";

/// Who we said we are, for the advice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who<'a> {
    pub client_id: &'a str,
    pub username: Option<&'a str>,
    pub proof: Proof,
}

/// By what we prove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// A password, a certificate or nothing.
    Given,
    /// A token made from a key.
    Token,
}

/// The upstream refused the CONNECT (MQTT 5.0 §3.2.2.2).
pub(super) fn refused(reason: ReasonCode, detail: Option<&str>, who: Who<'_>) -> String {
    let id = who.client_id;
    let advice = match reason {
        ReasonCode::BadUserNameOrPassword | ReasonCode::NotAuthorized if who.proof == Proof::Token => format!(
            "check the key in `sas`, that it belongs to the device `{id}` (the client id), and this machine's clock"
        ),
        ReasonCode::BadUserNameOrPassword => match who.username {
            Some(name) => format!("check the password of the user `{name}`"),
            None => "set `username` and `password`".into(),
        },
        ReasonCode::NotAuthorized => match who.username {
            Some(name) => {
                format!(
                    "check the password of the user `{name}` and that it may connect there with the client id `{id}`"
                )
            }
            None => format!("check that the client id `{id}` may connect there, or set `username` and `password`"),
        },
        ReasonCode::ClientIdentifierNotValid => format!("it does not accept the client id `{id}`; set `client_id`"),
        ReasonCode::BadAuthenticationMethod => "it wants another way to authenticate than a password".into(),
        ReasonCode::Banned => format!("the client id `{id}` or this address is banned there"),
        ReasonCode::UnsupportedProtocolVersion => "set `version` to one that it speaks".into(),
        ReasonCode::UseAnotherServer | ReasonCode::ServerMoved => "set `url` to the address it names".into(),
        ReasonCode::ServerUnavailable
        | ReasonCode::ServerBusy
        | ReasonCode::QuotaExceeded
        | ReasonCode::ConnectionRateExceeded => "it has no room at the moment".into(),
        ReasonCode::RetainNotSupported | ReasonCode::QoSNotSupported | ReasonCode::TopicNameInvalid => {
            "it does not take the will on `state_topic`".into()
        }
        ReasonCode::PacketTooLarge => "the CONNECT with its will is larger than it accepts".into(),
        _ => "its log may say more".into(),
    };
    format!("the upstream refuses the connection: {}; {advice}", said(reason, detail))
}

/// The upstream sent a DISCONNECT (MQTT 5.0 §3.14.2.1).
pub(super) fn disconnected(reason: ReasonCode, detail: Option<&str>, who: Who<'_>) -> String {
    let id = who.client_id;
    let advice = match reason {
        ReasonCode::SessionTakenOver => {
            format!("; another client connected with the client id `{id}`: is there a second gateway of this name?")
        }
        ReasonCode::NotAuthorized => {
            "; a message or subscription is not allowed there, check the rules against its rights".into()
        }
        ReasonCode::PacketTooLarge | ReasonCode::TopicNameInvalid | ReasonCode::QoSNotSupported => {
            "; a message broke one of its limits".into()
        }
        ReasonCode::UseAnotherServer | ReasonCode::ServerMoved => "; set `url` to the address it names".into(),
        _ => String::new(),
    };
    format!("the upstream closed the connection: {}{advice}", said(reason, detail))
}

/// The upstream closed the connection without a word, as 3.1.1 does.
pub(super) fn closed(cause: Option<&std::io::Error>, soon: bool, who: Who<'_>) -> String {
    // That a TLS connection ended without its farewell adds nothing to that it ended.
    let cause = cause.filter(|error| error.kind() != std::io::ErrorKind::UnexpectedEof);
    let cause = cause.map(|error| format!(" ({error})")).unwrap_or_default();
    if soon {
        let id = who.client_id;
        format!(
            "the upstream closed the connection soon after it was made{cause}; if this goes on, check that the client id \
             `{id}` is used once only and that the rules want nothing that is forbidden there"
        )
    } else {
        format!("the connection to the upstream was lost{cause}")
    }
}

/// The upstream refused a subscription.
pub(super) fn not_subscribed(filter: &str, reason: u8) -> String {
    let said = match ReasonCode::from_value(reason) {
        // All that 3.1.1 can say.
        Some(ReasonCode::UnspecifiedError) | None => "without a reason".into(),
        Some(reason) => reason.to_string(),
    };
    format!(
        "the upstream refuses the subscription to `{filter}`: {said}; check this gateway's rights there, or the `in` rule"
    )
}

/// The upstream answered a message with an error.
pub(super) fn not_taken(reason: ReasonCode) -> String {
    let advice = match reason {
        ReasonCode::NotAuthorized => "check this gateway's rights there against the `out` rules",
        ReasonCode::TopicNameInvalid => "check the prefixes of the `out` rules",
        ReasonCode::QuotaExceeded => "it has no room; the message is sent again later",
        _ => "its log may say more",
    };
    format!("the upstream did not take a message: {reason}; {advice}")
}

fn said(reason: ReasonCode, detail: Option<&str>) -> String {
    match detail {
        Some(detail) => format!("{reason}, \"{}\"", shortened(detail)),
        None => reason.to_string(),
    }
}

/// A peer's words, without control characters and of a bearable length.
fn shortened(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHO: Who<'_> = Who { client_id: "plant-7-cloud", username: Some("plant-7"), proof: Proof::Given };

    #[test]
    fn a_refusal_says_what_to_change() {
        let check = |reason, detail, who: Who<'_>, expected: &str| {
            let said = refused(reason, detail, who);
            assert!(said.contains(expected), "{said}");
        };
        let nobody = Who { username: None, ..WHO };
        check(ReasonCode::BadUserNameOrPassword, None, WHO, "(0x86); check the password of the user `plant-7`");
        check(ReasonCode::BadUserNameOrPassword, None, nobody, "set `username` and `password`");
        check(ReasonCode::NotAuthorized, Some("no\nway"), WHO, "not authorized (0x87), \"no way\"; check the password");
        let token = Who { proof: Proof::Token, ..nobody };
        check(ReasonCode::NotAuthorized, None, token, "check the key in `sas`, that it belongs to the device");
        check(ReasonCode::ClientIdentifierNotValid, None, WHO, "does not accept the client id `plant-7-cloud`");
        check(ReasonCode::ServerMoved, Some("b.example"), WHO, "\"b.example\"; set `url`");
    }

    #[test]
    fn a_lost_connection_says_what_may_be_behind_it() {
        let said = disconnected(ReasonCode::SessionTakenOver, None, WHO);
        assert!(said.contains("is there a second gateway of this name?"), "{said}");
        assert!(closed(None, true, WHO).contains("is used once only"));
        assert_eq!(closed(None, false, WHO), "the connection to the upstream was lost");
        assert!(not_subscribed("a/#", 0x87).contains("not authorized (0x87)"));
        assert!(not_subscribed("a/#", 0x80).contains("without a reason"));
    }
}
