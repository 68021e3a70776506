//! rumqttd as a process of its own, with queues large enough that its limits are not what is measured.

const CONFIG: &str = r#"
id = 0

[router]
max_connections = 20000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10

[v4.1]
name = "bench"
listen = "127.0.0.1:PORT"
next_connection_delay_ms = 0

[v4.1.connections]
connection_timeout_ms = 60000
max_payload_size = 262144
max_inflight_count = 100
dynamic_filters = true
"#;

pub fn run(port: u16) {
    let text = CONFIG.replace("PORT", &port.to_string());
    let source = config::File::from_str(&text, config::FileFormat::Toml);
    let settings = config::Config::builder().add_source(source).build().expect("a configuration");
    let settings: rumqttd::Config = settings.try_deserialize().expect("rumqttd's configuration");
    rumqttd::Broker::new(settings).start().expect("rumqttd runs");
}
