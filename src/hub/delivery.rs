//! From a topic to the queues of everybody who gets its messages.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::warn;

use super::queue::{Incoming, Orphan, Precedence, WhenFull};
use super::session::{Session, Shortage, submit};
use super::{Face, Hub, SubscribeOptions};
use crate::message::{Message, QoS};
use crate::store::{Due, Op, Page, PageLimit, Receipt, SessionId, Store, StoredState};
use crate::topic::SharedFilter;
use crate::via;

/// A subscription in the routes.
#[derive(Debug)]
pub(super) struct Subscriber {
    pub session: Arc<Session>,
    pub options: SubscribeOptions,
    pub filter: SharedFilter,
}

/// Who gets the messages of one topic.
#[derive(Debug)]
pub(super) struct Targets {
    pub version: u64,
    pub direct: Vec<Target>,
    /// What is left of a session's subscriptions for its own messages, where some of them are No Local and some are not.
    own: Vec<Target>,
    pub groups: Vec<Group>,
    /// Some receiver is journaled: an acknowledgement may have to wait.
    pub durable: bool,
    /// Some receiver wants to refuse messages rather than lose them.
    pub rejecting: bool,
}

/// One shared subscription: each message goes to one of its members (MQTT 5.0 §4.8.2).
#[derive(Debug)]
pub(super) struct Group {
    pub members: Vec<Target>,
    next: AtomicUsize,
}

/// What a subscription makes of a message that matches it.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub session: Arc<Session>,
    pub qos: QoS,
    /// Some subscription leaves out what the session itself published.
    pub no_local: bool,
    pub retain_as_published: bool,
    pub identifiers: Option<Arc<[u32]>>,
    pub precedence: Precedence,
    /// The shared subscription it is a member of.
    pub shared: Option<Arc<SharedFilter>>,
}

impl Target {
    fn incoming(&self, message: &Arc<Message>, spread: u8) -> Incoming {
        Incoming {
            message: self.precedence.limit(message),
            qos: message.qos.min(self.qos),
            retain: message.retain && self.retain_as_published,
            identifiers: self.identifiers.clone(),
            shared: self.shared.clone(),
            spread,
        }
    }
}

impl Hub {
    /// Looks up who gets the messages of `topic`: each session once, with the highest QoS of its subscriptions that
    /// match and the identifiers of all of them (MQTT 5.0 §3.3.4).
    pub(super) fn targets(&self, topic: &str) -> Targets {
        let version = self.0.version.load(Ordering::Acquire);
        let mut direct: Vec<Target> = Vec::new();
        let mut shared: HashMap<&SharedFilter, Vec<Target>> = HashMap::new();
        let routes = self.0.routes.read();
        routes.matches(topic, |entry| {
            let Subscriber { session, options, filter } = &entry.value;
            if !session.rights.read().may_read(topic) {
                return;
            }
            let target = Target {
                session: session.clone(),
                qos: options.qos,
                no_local: options.no_local,
                retain_as_published: options.retain_as_published,
                identifiers: options.identifier.map(|identifier| Arc::from([identifier.get()])),
                precedence: options.precedence,
                shared: filter.group.is_some().then(|| Arc::new(filter.clone())),
            };
            match filter.group {
                Some(_) => shared.entry(filter).or_default().push(target),
                None => direct.push(target),
            }
        });
        let groups: Vec<_> = shared.into_values().map(|members| Group { members, next: AtomicUsize::new(0) }).collect();
        drop(routes);
        let silent: Vec<SessionId> =
            direct.iter().filter(|target| target.no_local).map(|target| target.session.id).collect();
        let hears_itself = |target: &&Target| !target.no_local && silent.contains(&target.session.id);
        let own = one_each(direct.iter().filter(hears_itself).cloned().collect());
        let direct = one_each(direct);
        let mut all = direct.iter().chain(groups.iter().flat_map(|group| &group.members));
        let durable = all.clone().any(|target| target.session.durable);
        let rejecting = all.any(|target| target.session.limits().when_full == WhenFull::Reject);
        Targets { version, direct, own, groups, durable, rejecting }
    }

    /// Queues `messages`, in order, for everybody who gets them: each receiver is locked once and woken once. Returns
    /// the receivers that publishers should wait for.
    pub(super) fn deliver(
        &self,
        targets: &Targets,
        messages: &[(Arc<Message>, Option<Arc<Receipt>>)],
        from: Option<SessionId>,
        ops: &mut Vec<Op>,
    ) -> Vec<Arc<Session>> {
        let mut pressed = Vec::new();
        let store = self.store();
        let receivers = targets.direct.len() + targets.groups.len();
        let spread = receivers.checked_ilog2().unwrap_or(0) as u8;
        let mut give = |target: &Target, messages: &[(Arc<Message>, Option<Arc<Receipt>>)]| {
            let peer = if target.shared.is_none() { target.session.peer.get() } else { None };
            let wanted = |message: &Message| peer.is_none_or(|peer| !via::came_by(peer, message));
            if peer.is_some()
                && (targets.goes_up_to(&target.session, target.qos)
                    || !messages.iter().any(|(message, _)| wanted(message)))
            {
                return;
            }
            let wanted = messages.iter().filter(|(message, _)| wanted(message));
            let incoming = wanted.map(|(message, receipt)| (target.incoming(message, spread), receipt.clone()));
            if target.session.accept(target.precedence, incoming, store, ops, &self.0.counters) {
                pressed.push(target.session.clone());
            }
        };
        for target in &targets.direct {
            if target.no_local && from == Some(target.session.id) {
                let own = targets.own.iter().find(|own| own.session.id == target.session.id);
                own.into_iter().for_each(|own| give(own, messages));
            } else {
                give(target, messages);
            }
        }
        for group in &targets.groups {
            for message in messages {
                give(group.choose(), std::slice::from_ref(message));
            }
        }
        pressed
    }

    /// Gives what a member of a shared subscription has left behind to the others (MQTT 5.0 §4.8.2), then lets its
    /// journal go. The caller holds no session's lock.
    pub(super) fn settle(&self, estate: Estate) {
        let Estate { session, orphans, mut tails } = estate;
        // In one commit it is the others' and not this session's any more.
        let transaction = self.store().map(Store::transaction);
        self.hand_on(orphans);
        let (Some(session), Some(store)) = (session, self.store()) else { return };
        let Some(from) = tails.pop() else {
            return submit(Some(store), &mut vec![Op::DropSession(session)], Due::Soon);
        };
        drop(transaction);
        let hub = self.clone();
        let then = move |page: Page| {
            if page.failed {
                warn!(session = session.0, "what an ended session has left stays on disk until the next start");
            } else {
                hub.settle(hub.hand_on_page(session, tails, page));
            }
        };
        store.load(session, from, ESTATE_PAGE, Box::new(then));
    }

    /// Hands on a page of what an ended session has on disk, and returns what is left of it.
    fn hand_on_page(&self, session: SessionId, mut tails: Vec<u64>, page: Page) -> Estate {
        if let Some(last) = page.messages.last().filter(|_| !page.complete) {
            tails.push(last + 1);
        }
        // As above.
        let _transaction = self.store().map(Store::transaction);
        let mut removals = Vec::new();
        let orphans = page.messages.unpack().into_iter().filter_map(|stored| {
            removals.push(Op::Remove { session, first: stored.sequence, last: stored.sequence });
            match stored.state {
                StoredState::Queued(message) => Some((stored.shared?, message)),
                StoredState::Released => None,
            }
        });
        self.hand_on(orphans.collect());
        submit(self.store(), &mut removals, Due::Soon);
        Estate { session: Some(session), orphans: Vec::new(), tails }
    }

    fn hand_on(&self, orphans: Vec<Orphan>) {
        let mut ops = Vec::new();
        for (filter, message) in orphans {
            let targets = self.targets(message.topic.as_str());
            let is_its = |group: &&Group| group.members.iter().any(|member| member.shared.as_ref() == Some(&filter));
            if let Some(group) = targets.groups.iter().find(is_its) {
                let target = group.choose();
                let incoming = std::iter::once((target.incoming(&message, 0), None));
                target.session.accept(target.precedence, incoming, self.store(), &mut ops, &self.0.counters);
            }
        }
    }
}

/// What a session leaves behind when it ends.
#[derive(Debug, Default)]
#[must_use = "others wait for it, and its journal has to go"]
pub(super) struct Estate {
    /// Set where it is journaled.
    pub session: Option<SessionId>,
    pub orphans: Vec<Orphan>,
    /// Where the parts of its queue begin that are on disk only, and may hold more for the others.
    pub tails: Vec<u64>,
}

/// How much of it is read at once, on the store's thread.
const ESTATE_PAGE: PageLimit = PageLimit { messages: 256, bytes: 256 << 10 };

/// Joins the subscriptions of each session into one.
fn one_each(mut targets: Vec<Target>) -> Vec<Target> {
    targets.sort_by_key(|target| target.session.id);
    targets.dedup_by(|next, kept| {
        let same = next.session.id == kept.session.id;
        if same {
            kept.merge(next);
        }
        same
    });
    targets
}

impl Target {
    /// Takes in another subscription of the same session that matches too.
    fn merge(&mut self, other: &Self) {
        self.qos = self.qos.max(other.qos);
        self.no_local |= other.no_local;
        self.retain_as_published |= other.retain_as_published;
        if other.precedence.rank < self.precedence.rank {
            self.precedence = other.precedence;
        }
        self.identifiers = match (&self.identifiers, &other.identifiers) {
            (Some(mine), Some(others)) => Some(mine.iter().chain(others.iter()).copied().collect()),
            (mine, others) => mine.clone().or_else(|| others.clone()),
        };
    }
}

impl Group {
    /// The member whose turn it is: one that is connected, or failing that one whose session keeps messages.
    fn choose(&self) -> &Target {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let ring = || (0..self.members.len()).map(|offset| &self.members[(turn + offset) % self.members.len()]);
        let connected = |target: &&Target| target.session.state.lock().attached.is_some();
        ring()
            .find(connected)
            .or_else(|| ring().find(|target| target.session.durable))
            .unwrap_or(&self.members[turn % self.members.len()])
    }
}

impl Targets {
    /// Whether the gateway whose bridge is `client` gets the same at `qos` by the session of an upstream: each is the other's
    /// upstream, and one sends what the other fetches.
    pub fn goes_up_to(&self, client: &Session, qos: QoS) -> bool {
        let is_up = |other: &Target| other.session.face == Face::Upstream && other.qos >= qos;
        client.face == Face::Mqtt
            && self.direct.iter().any(|other| is_up(other) && other.session.peer.is_same_as(&client.peer))
    }

    pub fn matches_any(&self) -> bool {
        !self.direct.is_empty() || !self.groups.is_empty()
    }

    /// The first receiver that refuses rather than loses and has no room for the message, and what there is not enough
    /// of if not room in its own queue.
    pub fn rejecting(&self, message: &Message, store: Option<&Store>) -> Option<(&Session, Option<Shortage>)> {
        let members = self.groups.iter().flat_map(|group| &group.members);
        self.direct.iter().chain(members).find_map(|target| {
            let (session, limits) = (&target.session, target.session.limits());
            if limits.when_full != WhenFull::Reject || target.qos == QoS::AtMostOnce {
                return None;
            }
            let state = session.state.lock();
            let shortage = session.shortage(&state, store);
            let lacks = match shortage {
                Some(Shortage::Disk) => true,
                Some(Shortage::Memory) => !session.durable,
                None => false,
            };
            (lacks || state.queue.is_full(message.size(), &limits)).then_some((&**session, shortage.filter(|_| lacks)))
        })
    }
}
