//! MQTT 3.1, 3.1.1 and 5.0: the wire codec and the life of one connection, as server and as client.
