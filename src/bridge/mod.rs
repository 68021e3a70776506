//! Upstreams: the client side of MQTT, over TLS, fed by a durable session.
