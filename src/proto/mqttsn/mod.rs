//! MQTT-SN 1.2: the wire codec, the life of one sensor, topic ids.
