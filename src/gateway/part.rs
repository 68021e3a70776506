//! The components as the configuration names them: how each is bound, and its place in the order of things.

use std::sync::Arc;

use super::Handle;
use crate::bridge::{self, Upstream};
use crate::config::Config;
use crate::field::mapping::PayloadForm;
use crate::field::serial::Decode;
use crate::field::{self, Exchange};
use crate::files::Fingerprint;
use crate::listener::Listener;
use crate::observe::Kind;
use crate::supervise::{Bound, Failure, Label};
use crate::{listener, sensornet, web};

/// One component and all that the configuration says about it. Equal parts need no restart.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Part {
    Listener(listener::Settings),
    Sensornet(sensornet::Settings),
    Translator(field::translate::Settings, Stamp),
    Bus(field::modbus::Settings),
    Serial(field::serial::Settings, Stamp),
    Plugin(field::process::Settings),
    Upstream(Box<bridge::Settings>),
    Web(web::Settings),
}

/// Tells whether a script is still the one that was loaded.
type Stamp = Option<Fingerprint>;

/// The order of starting; stopping goes the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    Listeners,
    Sensors,
    Field,
    Upstreams,
    Web,
}

/// Everything that `config` wants to run, in the order of starting.
pub(super) fn parts(config: &Config) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    parts.extend(config.listeners.iter().cloned().map(Part::Listener));
    parts.extend(config.mqttsn.iter().cloned().map(Part::Sensornet));
    let translator = |settings: &field::translate::Settings| {
        let stamp = Fingerprint::of(&settings.codec.path);
        Part::Translator(settings.clone(), stamp)
    };
    parts.extend(config.translators.iter().map(translator));
    parts.extend(config.buses.iter().cloned().map(Part::Bus));
    let serial = |settings: &field::serial::Settings| {
        let stamp = match &settings.decode {
            Decode::Codec(codec) => Fingerprint::of(&codec.path),
            Decode::Parse(_) => None,
        };
        Part::Serial(settings.clone(), stamp)
    };
    parts.extend(config.serial.iter().map(serial));
    parts.extend(config.plugins.iter().cloned().map(Part::Plugin));
    parts.extend(config.upstreams.iter().cloned().map(|settings| Part::Upstream(Box::new(settings))));
    parts.extend(config.web.iter().cloned().map(Part::Web));
    parts
}

impl Part {
    pub fn label(&self) -> Label {
        let (kind, name) = match self {
            Self::Listener(settings) => (Kind::Listener, &*settings.name),
            Self::Sensornet(_) => (Kind::Listener, "mqttsn"),
            Self::Translator(settings, _) => (Kind::Adapter, &*settings.name),
            Self::Bus(settings) => (Kind::Adapter, &*settings.name),
            Self::Serial(settings, _) => (Kind::Adapter, &*settings.name),
            Self::Plugin(settings) => (Kind::Adapter, &*settings.name),
            Self::Upstream(settings) => (Kind::Upstream, &*settings.name),
            Self::Web(_) => (Kind::Listener, "web"),
        };
        Label { kind, name: name.to_owned() }
    }

    pub fn rank(&self) -> Rank {
        match self {
            Self::Listener(_) => Rank::Listeners,
            Self::Sensornet(_) => Rank::Sensors,
            Self::Translator(..) | Self::Bus(_) | Self::Serial(..) | Self::Plugin(_) => Rank::Field,
            Self::Upstream(_) => Rank::Upstreams,
            Self::Web(_) => Rank::Web,
        }
    }

    /// Whether the gateway refuses to start without it: what others rely on to reach the gateway.
    pub fn must_bind(&self) -> bool {
        matches!(self, Self::Listener(_) | Self::Sensornet(_) | Self::Web(_))
    }

    /// As in "serial device `scale`".
    pub fn describe(&self) -> String {
        match self {
            Self::Listener(settings) => format!("listener `{}` on {}", settings.name, settings.address),
            Self::Sensornet(settings) => format!("the MQTT-SN gateway on {}", settings.address),
            Self::Translator(settings, _) => format!("translator `{}`", settings.name),
            Self::Bus(settings) => format!("bus `{}`", settings.name),
            Self::Serial(settings, _) => format!("serial device `{}`", settings.name),
            Self::Plugin(settings) => format!("plugin `{}`", settings.name),
            Self::Upstream(settings) => format!("upstream `{}`", settings.name),
            Self::Web(settings) => format!("the web UI on {}", settings.address),
        }
    }

    /// Opens what the component needs.
    pub async fn bind(&self, handle: &Arc<Handle>) -> Result<Bound, Failure> {
        let hub = handle.hub();
        // Names are unique among buses, among serial devices and among programs, not among all of them.
        let exchange = |kind: &str, name: &str, devices: Vec<Arc<str>>, form| {
            Exchange::attach(hub, &format!("{kind}/{name}"), devices, form)
        };
        match self.clone() {
            Self::Listener(settings) => {
                let listener = Listener::bind(settings, hub.clone()).await?;
                let (observe, certificates) = (listener.observe(), listener.certificates());
                Ok(Bound::new(Some(observe), |shutdown| listener.run(shutdown)).rereading(certificates))
            }
            Self::Sensornet(settings) => {
                let sensornet = sensornet::bind(settings, hub.clone()).await?;
                Ok(Bound::new(Some(sensornet.observe()), |shutdown| sensornet.run(shutdown)))
            }
            Self::Translator(settings, _) => {
                let translator = field::translate::Translator::bind(settings, hub, PayloadForm::Json)?;
                Ok(Bound::new(Some(translator.observe()), |shutdown| translator.run(shutdown)))
            }
            Self::Bus(settings) => {
                let devices = settings.devices.iter().map(|device| device.name.clone()).collect();
                let exchange = exchange("modbus", &settings.name, devices, settings.payload)?;
                let bus = field::modbus::Bus::new(settings, exchange);
                Ok(Bound::new(Some(bus.observe()), |shutdown| bus.run(shutdown)))
            }
            Self::Serial(settings, _) => {
                let exchange = exchange("serial", &settings.name, vec![settings.name.clone()], PayloadForm::Json)?;
                let adapter = field::serial::Adapter::bind(settings, exchange)?;
                Ok(Bound::new(Some(adapter.observe()), |shutdown| adapter.run(shutdown)))
            }
            Self::Plugin(settings) => {
                let exchange = exchange("program", &settings.name, settings.devices.clone(), PayloadForm::Json)?;
                let adapter = field::process::Adapter::bind(settings, exchange)?;
                Ok(Bound::new(Some(adapter.observe()), |shutdown| adapter.run(shutdown)))
            }
            Self::Upstream(settings) => {
                let upstream = Upstream::bind(*settings, handle.name(), hub.clone())?;
                handle.add_upstream(upstream.handle());
                Ok(Bound::new(Some(Arc::new(upstream.handle())), |shutdown| upstream.run(shutdown)))
            }
            Self::Web(settings) => {
                let parts = web::Parts {
                    gateway: handle.name().clone(),
                    hub: hub.clone(),
                    log: handle.log().clone(),
                    controls: handle.clone(),
                };
                let server = web::Server::bind(settings, parts).await?;
                let (observe, certificate) = (server.observe(), server.certificate());
                Ok(Bound::new(Some(observe), |shutdown| server.run(shutdown)).rereading(certificate))
            }
        }
    }
}
