//! MQTT-SN 1.2: the wire codec, the life of one sensor, topic ids; all sans-I/O.
//!
//! [`gateway::Gateway`] takes datagrams, the hub's answers and the time, and says what to do; `sensornet` does it.
//! Version 1.2 is the only codec; the life of a client knows no wire numbers, so that 2.0 can be a second one.
//!
//! # Interpretations
//! Where the specification is silent or says two things, this is how it is read here.
//!
//! | § | the text | our reading | why |
//! | --- | --- | --- | --- |
//! | 5.2.1 | a message has a length field | it must equal the datagram, otherwise the datagram is dropped and counted | bytes of two messages in one datagram, or half of one, cannot be told from noise |
//! | 5.2.2 | reserved message types | ignored and counted | the sender may speak a later version |
//! | 5.3.1 | ClientId has 1 to 23 characters | 1 to `max_client_id_bytes` octets of UTF-8 without control characters; others get CONNACK 3 | MQTT devices with longer ids exist; a limit must be |
//! | 5.3.8 | ProtocolId is 0x01 | any other gets CONNACK 3 | a refusal helps more than silence |
//! | 5.3.10 | return codes above 3 are reserved | a refusal, as 3 | the sender did not say "accepted" |
//! | 5.3.11 | TopicId 0x0000 and 0xFFFF are reserved | when no other is free, REGISTER and SUBSCRIBE get code 1; a live id is never given again | a wrong name is worse than none |
//! | 5.4.4 | Duration of CONNECT | 0 means that silence is not supervised | as keep alive 0 in MQTT |
//! | 5.4.12 | MsgId is "only relevant" for QoS 1 and 2 | a PUBLISH of QoS 1 or 2 with MsgId 0 is dropped | it cannot be acknowledged |
//! | 5.4.15 | a short topic name in SUBSCRIBE | may also be a filter of two octets, such as `/#` | nothing forbids it, and it has one meaning |
//! | 5.4.16 | TopicId in SUBACK | the id for a name, the predefined id for a predefined one, 0x0000 for short names and wildcards | "not relevant" there |
//! | 5.4.21 | DISCONNECT answers a message from someone not connected | at a limited rate, and not for what only gateways send; a plain DISCONNECT from a stranger is answered once a second | a spoofed message must not make two gateways answer each other for ever |
//! | 5.4.21 | Duration of DISCONNECT | 0 is the same as none | a sleep of no length |
//! | 5.5 | forwarder encapsulation | one level; the session belongs to the ClientId, wherever it is heard | frames in frames have no sender |
//! | 6.1 | GWINFO is broadcast with the radius of SEARCHGW | sent to who asked, with that radius when it came through a forwarder | UDP has no radius, and the others did not ask |
//! | 6.2 | CONNECT, WILLTOPIC or WILLMSG again | asked, or acknowledged, again | its answer was lost |
//! | 6.3 | Clean=0, Will=0 keeps the will | until the client is forgotten or the gateway restarts | a will nobody can see must not outlive its device for ever |
//! | 6.4 | WILLTOPICUPD and WILLMSGUPD are independent | the will counts when both parts are there; an empty WILLTOPICUPD deletes both | half a will cannot be published |
//! | 6.5 | REGACK with a code | 1: asked again after T_retry; others: this topic is not sent until the next CONNECT | "congestion" passes, a refusal does not |
//! | 6.6 | one QoS 1/2 exchange at a time | toward the client: kept; from the client: up to 8, then code 1 | answers may wait for the disk; harmless, and told |
//! | 6.6 | PUBACK with code 1 from a client | sent again after T_retry without counting as silence; from an awake client: when it wakes next | it is alive, and busy |
//! | 6.6 | PUBACK with code 2 for a normal id | REGISTER, then the message again, N_retry times; then it is given up and counted | the code may be a late duplicate, and there must be no loop |
//! | 6.8 | QoS −1 needs no connection | from connected and sleeping clients too, with their rights; from others only where the operator allows it | it has no identity that rules could name |
//! | 6.10 | a message too big for the network is dropped | counted, and logged once per connection | it would block the queue otherwise |
//! | 6.11 | a lost client | gets nothing; its next message is answered by DISCONNECT | whoever hears it may be someone else |
//! | 6.12 | CONNECT from a new address | takes the session over; the old address is told only when it speaks | both may be the same device |
//! | 6.14 | PINGREQ of a sleeping client carries its ClientId | a plain one from its address wakes it too | it is awake and waits for PINGRESP |
//! | 6.14 | a sleeping client must connect to send | what it sends is taken and answered, and restarts its sleep time | it is awake enough to hear the answer, and what it says would be lost |
//! | 6.14 | the gateway sends all buffered messages, then PINGRESP | after their acknowledgements; at most 1024 in one waking | a busy topic must not drain a battery |
//! | 6.14 | CONNECT of a sleeping client | Clean=0 keeps the session, the topic ids and what is buffered; Clean=1 discards them | it says so |
//! | 7.2 | tolerance 10 % above one minute, 50 % below | 50 % for exactly one minute | the more patient one |

pub mod action;
pub mod client;
pub mod codec;
pub mod connectionless;
pub mod gateway;
pub mod packet;
pub mod topics;

#[cfg(test)]
mod tests;
