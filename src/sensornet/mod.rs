//! MQTT-SN over UDP.
